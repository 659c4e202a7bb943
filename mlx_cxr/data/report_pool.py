"""Reports cut into sections by several processes at once, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

from mlx_cxr.data.reports import decode, section_texts
from mlx_cxr.errors import UserError
from mlx_cxr.workers import lean_start, worker_pool

Cut = tuple[dict[str, str], bool]
"""A report's text for each of `reports.SECTIONS`, and whether it was UTF-8."""
_BATCHES_PER_WORKER = 2
"""Handed out at a time: none waits, and reports do not pile up."""


class ReportWorkerDiedError(UserError, RuntimeError):
    """The operating system ended a process that cut reports."""


def cut_all(batches: Iterable[Sequence[bytes | None]], workers: int) -> Iterator[list[Cut | None]]:
    """Cut batches of reports, and yield each in its turn.

    Args:
        batches: the content of report files; None stands for one that is not there, and stays None.
        workers: processes beside this one; below 2 this process does it alone.

    Raises:
        ReportWorkerDiedError: a worker was killed, as happens when memory runs out.
    """
    if workers < 2:
        yield from map(cut_batch, batches)
        return
    pool = worker_pool(workers)
    under_way: deque[Future[list[Cut | None]]] = deque()
    try:
        for batch in batches:
            with lean_start():
                under_way.append(pool.submit(cut_batch, batch))
            if len(under_way) > _BATCHES_PER_WORKER * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ReportWorkerDiedError(
            "a process that read reports was ended by the system, perhaps for lack of memory; run the same command "
            "again with --workers 1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cut_batch(batch: Sequence[bytes | None]) -> list[Cut | None]:
    """What a worker does."""
    return [None if data is None else _cut(data) for data in batch]


def _cut(data: bytes) -> Cut:
    report, utf8 = decode(data)
    return section_texts(report), utf8
