"""Silence around decoders: their warnings are in an image's notes or in its error already."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_lock = threading.Lock()
_inside = 0
_restore = ExitStack()


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence warnings of Pillow and pydicom within the context, and pydicom's log of them.

    Warning filters belong to the process: `warnings.catch_warnings` in threads that overlap would leave the filters of
    one to the others. So the first thread in sets them, and the last one out restores them.
    """
    global _inside
    log = logging.getLogger("pydicom")
    with _lock:
        if not _inside:
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _restore.callback(setattr, log, "propagate", log.propagate)
            log.propagate = False
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore.close()
