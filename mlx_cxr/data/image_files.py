"""Files that are given to be read as images, by name or by folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def all_files(inputs: Iterable[Path], left_out: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Files and the files of folders, each once, in order.

    A name or a link that leads nowhere, a folder that cannot be listed, and what is no ordinary file are among them:
    reading them says what is wrong.

    Args:
        inputs: files and folders; folders in them and links are followed, each folder once.
        left_out: tells by its path, with links resolved but its own, a file of a folder that is not to be read.

    Returns:
        The files; and the hidden files and folders of folders, such as macOS's `._*`, which are not read.
    """
    files: dict[Path, None] = {}
    hidden: list[Path] = []
    for path in inputs:
        try:
            folder = path.is_dir()
        except (OSError, ValueError):  # such as a name that is too long
            folder = False
        if not folder:
            files[path] = None
            continue
        for one in sorted(_inside(path, left_out)):
            if one != path and one.name.startswith("."):
                hidden.append(one)
            else:
                files[one] = None
    return list(files), hidden


def _inside(folder: Path, left_out: Callable[[Path], bool]) -> Iterator[Path]:
    seen: set[Path] = set()
    failed: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=failed.append, followlinks=True):
        here = Path(root).resolve()
        names += [name for name in folders if name.startswith(".")]
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        if here not in seen:
            yield from (Path(root) / name for name in names if not left_out(here / name))
        seen.add(here)
    yield from (Path(error.filename) for error in failed)


def file_state(path: Path) -> list[Any]:
    """Path, size and modification time in ns, which tell a file from another in its place; without a file the path."""
    try:
        known = path.stat()
    except (OSError, ValueError):
        return [str(path)]
    return [str(path), known.st_size, known.st_mtime_ns]
