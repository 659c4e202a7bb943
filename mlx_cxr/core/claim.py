"""Claims on folders: while a stage writes into one, no other process does.

A claim is a lock of the file system on `.claim` in the folder, which ends with the process that holds it, also when
that is killed, and also across machines that share a disk with locks. The file says who holds it, for the message and
for disks without locks; there a claim of this machine is stale when its process is gone, and one of another machine has
to be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import ParamSpec, TypeVar

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import sweep

P = ParamSpec("P")
T = TypeVar("T")

CLAIM = ".claim"
"""Name of the file in a claimed folder."""

_held: dict[Path, int] = {}


class FolderBusyError(UserError, RuntimeError):
    """Another process is writing into the folder."""


@contextmanager
def claimed(folder: str | Path) -> Iterator[Path]:
    """Claim a folder for as long as the context lasts, and remove what killed writers left in it.

    A folder that is not there is made, and removed again if nothing was written into it. Within one process a folder
    may be claimed again: a pipeline claims what its stages claim.

    Raises:
        FolderBusyError: another process has claimed it; says which, since when, and the way out.
        OSError: the folder cannot be made or written.
    """
    folder = Path(folder)
    place = folder.resolve()
    if place in _held:
        _held[place] += 1
        try:
            yield folder
        finally:
            _held[place] -= 1
        return
    made = [parent for parent in (place, *place.parents) if not parent.exists()]
    with _locked(place / CLAIM) as claim:
        with suppress(OSError):  # A full disk holds the lock all the same, and is told of by what is written next.
            claim.truncate(0)
            claim.write(json.dumps(_us()).encode())
        _held[place] = 1
        try:
            sweep(place)
            yield folder
        finally:
            del _held[place]
            (place / CLAIM).unlink(missing_ok=True)
            with suppress(OSError):  # One of them is not empty: the stage wrote into it.
                for empty in made:
                    empty.rmdir()


def claims(folder_of: Callable[..., str | Path]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a function that writes into a folder, which `folder_of` names when given the same arguments.

    Of the processes of one distributed run, the first writes and claims.
    """

    def claiming(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def claimed_function(*args: P.args, **kwargs: P.kwargs) -> T:
            with nullcontext() if launched_rank() else claimed(folder_of(*args, **kwargs)):
                return function(*args, **kwargs)

        return claimed_function

    return claiming


def launched_rank() -> int:
    """This process's number among those that `mlx.launch` or `mpirun` started; 0 by itself."""
    return max(int(os.environ.get(name) or 0) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))


@contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = path.open("a+b", buffering=0)
        except FileNotFoundError:  # Who ends removed the empty folder.
            continue
        with opened as claim:
            claim.seek(0)
            holder = _holder(claim.read())
            try:
                # A lock of the process, not of the open file: workers that it forks do not keep it when it is killed.
                fcntl.lockf(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise _busy(path, holder) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                if holder and not _gone(holder):
                    raise _busy(path, holder) from None
            # Who ends removes the file, perhaps between our opening and our locking it.
            if _is_at(claim, path):
                yield claim
                return


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _us() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _holder(content: bytes) -> dict[str, str | int]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _gone(holder: dict[str, str | int]) -> bool:
    """True if a process of this machine has ended; of another machine nothing is known."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _busy(path: Path, holder: dict[str, str | int]) -> FolderBusyError:
    who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
    what = f" ({holder['command']}, since {holder['since']})" if {"command", "since"} <= holder.keys() else ""
    return FolderBusyError(
        f"{path.parent} is being written by {who}{what}; wait for it or end it, or give another name or folder. If "
        f"that process is surely gone, delete {path}"
    )
