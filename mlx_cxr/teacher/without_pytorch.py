"""Imports of mlx-vlm and transformers that leave PyTorch alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_pytorch() -> Iterator[None]:
    """PyTorch is not found while this is open, unless it is loaded already; afterwards it is as before.

    Transformers, of which the tokenizer alone is used, would load it wherever it is installed, as for `benchmark`: four
    seconds of each start, and 0.3 GB.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # import and find_spec both take this for a module that does not exist
    try:
        yield
    finally:
        sys.modules.pop("torch", None)
