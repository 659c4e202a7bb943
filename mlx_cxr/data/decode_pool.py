"""Films decoded by several processes at once, in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType

from mlx_cxr.data.decoding import FilmError, Transform, decode
from mlx_cxr.errors import UserError

_MAX_CHUNK = 4
_CHUNKS_PER_WORKER = 3
"""Handed out at a time: enough that none waits, few enough that 377,000 films do not pile up in memory."""


class WorkerDiedError(UserError, RuntimeError):
    """The operating system ended a decoding process."""


@dataclass(frozen=True)
class Decoded:
    """One film, or the reason why there is none.

    Attributes:
        row: as it was asked for.
        pixels: S * S bytes, row by row; None where the film cannot be used.
        reason: why not; None where it can.
        notes: see `decoding.Film`.
    """

    row: int
    pixels: bytes | None
    reason: str | None = None
    notes: tuple[str, ...] = ()


def decode_films(jobs: Sequence[tuple[int, Path]], transform: Transform, workers: int = 0) -> Iterator[Decoded]:
    """Decode films and yield each when it is done, in no particular order.

    Worker processes are started afresh ("spawn"), as forking a process that holds MLX or a threaded BLAS is not safe.
    They end with this process, however it ends. This process decodes too, in a thread, which counts as one of them.

    Args:
        jobs: (row, path of the film).
        transform: what to make of each.
        workers: processes; 0 takes one per core. With 1, or very few films, this process does it alone.

    Raises:
        WorkerDiedError: a worker was killed, as happens when memory runs out; names the films it may have been at.
    """
    workers = min(workers or available_cores(), len(jobs) // 4)
    if workers <= 1:
        for job in jobs:
            yield from decode_chunk([job], transform)
        return
    size = max(1, min(_MAX_CHUNK, len(jobs) // (workers * _CHUNKS_PER_WORKER)))
    chunks = (jobs[start : start + size] for start in range(0, len(jobs), size))
    # Started with the first worker otherwise, when some Pythons unblock SIGINT behind it.
    resource_tracker.ensure_running()
    others = ProcessPoolExecutor(workers - 1, multiprocessing.get_context("spawn"), _start_worker)
    # Pillow decodes without the GIL, so this process need not wait idly, least of all while the others start.
    here = ThreadPoolExecutor(1)
    free = {others: (workers - 1) * _CHUNKS_PER_WORKER, here: _CHUNKS_PER_WORKER}
    under_way: dict[Future[list[Decoded]], tuple[Executor, Sequence[tuple[int, Path]]]] = {}
    try:
        for chunk in chunks:
            pool = others if free[others] else here
            free[pool] -= 1
            with _lean_start():
                under_way[pool.submit(decode_chunk, chunk, transform)] = pool, chunk
            while not any(free.values()):
                yield from _finished(under_way, free)
        while under_way:
            yield from _finished(under_way, free)
    except BrokenProcessPool:
        suspects = ", ".join(str(path) for _, chunk in list(under_way.values())[: workers + 1] for _, path in chunk[:1])
        raise WorkerDiedError(
            f"a decoding process was ended by the system, perhaps for lack of memory, at or soon after one of: "
            f"{suspects}. What was written is kept; run the same command again, with fewer processes: "
            f"--set pixels.workers={max(1, workers // 2)}"
        ) from None
    finally:
        for pool in free:
            pool.shutdown(wait=True, cancel_futures=True)


def decode_chunk(jobs: Sequence[tuple[int, Path]], transform: Transform) -> list[Decoded]:
    """What a worker does: each film decoded, or the reason why not."""
    done = []
    for row, path in jobs:
        try:
            film = decode(path, transform, inspect=False)
        except FilmError as error:
            done.append(Decoded(row, None, str(error)))
        else:
            done.append(Decoded(row, film.image.tobytes(), None, film.notes))
    return done


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _finished(
    under_way: dict[Future[list[Decoded]], tuple[Executor, Sequence[tuple[int, Path]]]], free: dict[Executor, int]
) -> Iterator[Decoded]:
    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
    for future in done:
        result = future.result()
        pool, _ = under_way.pop(future)
        free[pool] += 1
        yield from result


@contextmanager
def _lean_start() -> Iterator[None]:
    """Around whatever may start a worker: what it must not inherit.

    "spawn" has a worker import the parent's main module anew: it would bring pandas and MLX into each, and run a user's
    script again where it lacks the usual guard. And Ctrl-C reaches workers as well as their parent, which alone should
    act on it; a signal that is blocked here stays blocked in them from their first instruction.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _start_worker() -> None:
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
