"""Folders that are dear to make, and that tests only read: one for all processes of a test session."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The session's folder of that name, filled by the first process that asks; others wait until it is.

    Args:
        name: of the folder, which is new and empty when it is filled.
        make: fills it; where it fails the next one that asks begins anew, in a folder of its own.
    """
    session = Path(os.environ["MLX_CXR_TEST_SESSION"])
    done = session / f"{name}.done"
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=session))
            make(folder)
            done.write_text(folder.name)
    return session / done.read_text()
