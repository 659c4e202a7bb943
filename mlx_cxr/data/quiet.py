"""Silence around decoders: what they warn of is in an image's notes or in its error."""

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
    """No warning of Pillow's or pydicom's comes out of what is done within, nor pydicom's log of them.

    Warning filters belong to the process: `warnings.catch_warnings` in threads that overlap would leave the filters of
    one to the others. So the first thread in sets them, and the last one out sets them back.
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
