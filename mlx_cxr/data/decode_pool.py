"""Images decoded by several processes at once, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.workers import available_cores, lean_start, worker_pool
from mlx_cxr.data.decoding import Transform, decode
from mlx_cxr.data.image_limits import ImageError

OBJECTION = "the film "
"""What a note begins with that is one of `decoding.DecodedImage.concerns`."""
_MAX_CHUNK = 4
_CHUNKS_PER_WORKER = 3
"""Submitted at a time: enough that none waits, few enough that 377,000 images do not pile up in memory."""


class WorkerDiedError(UserError, RuntimeError):
    """The operating system ended a decoding process."""


@dataclass(frozen=True)
class Decoded:
    """One image, or the reason why there is none.

    Attributes:
        row: the one that came with its path.
        pixels: S * S bytes, row by row; None where the image cannot be used.
        reason: why not; None where it can.
        notes: see `decoding.DecodedImage`; its concerns are among them, see `OBJECTION`.
    """

    row: int
    pixels: bytes | None
    reason: str | None = None
    notes: tuple[str, ...] = ()


def decode_images(jobs: Sequence[tuple[int, Path]], transform: Transform, workers: int = 0) -> Iterator[Decoded]:
    """Decode images and yield each when it is done, in no particular order.

    This process decodes too, in a thread, which counts as one of the workers.

    Args:
        jobs: (row, path of the image).
        workers: processes; 0 takes one per core. With 1, or very few images, this process does it alone.

    Raises:
        WorkerDiedError: a worker was killed, as happens when memory runs out; names the images it may have been at.
    """
    workers = min(workers or available_cores(), len(jobs) // 4)
    if workers <= 1:
        for job in jobs:
            yield from decode_chunk([job], transform)
        return
    size = max(1, min(_MAX_CHUNK, len(jobs) // (workers * _CHUNKS_PER_WORKER)))
    chunks = (jobs[start : start + size] for start in range(0, len(jobs), size))
    others = worker_pool(workers - 1)
    # Pillow decodes without the GIL, so this process need not wait idly, least of all while the others start.
    here = ThreadPoolExecutor(1)
    free = {others: (workers - 1) * _CHUNKS_PER_WORKER, here: _CHUNKS_PER_WORKER}
    under_way: dict[Future[list[Decoded]], tuple[Executor, Sequence[tuple[int, Path]]]] = {}
    try:
        for chunk in chunks:
            pool = others if free[others] else here
            free[pool] -= 1
            with lean_start():
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
    """Decode some images, each to its pixels or the reason why there are none; the work of a worker process.

    What the gate for chest images objects to is a note that begins with `OBJECTION`.
    """
    done = []
    for row, path in jobs:
        try:
            decoded = decode(path, transform)
        except ImageError as error:
            done.append(Decoded(row, None, str(error)))
        else:
            objections = tuple(OBJECTION + concern for concern in decoded.concerns)
            done.append(Decoded(row, decoded.gray.tobytes(), None, decoded.notes + objections))
    return done


def _finished(
    under_way: dict[Future[list[Decoded]], tuple[Executor, Sequence[tuple[int, Path]]]], free: dict[Executor, int]
) -> Iterator[Decoded]:
    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
    for future in done:
        result = future.result()
        pool, _ = under_way.pop(future)
        free[pool] += 1
        yield from result
