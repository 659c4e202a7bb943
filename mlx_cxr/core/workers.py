"""Worker processes: started lean, deaf to Ctrl-C, and gone when their parent is.

They are started afresh ("spawn"), as forking a process that holds MLX or a threaded BLAS is not safe.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import ModuleType

_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
"""Of glibc's `malloc.h`."""
KEPT_BYTES = 1 << 28


class WorkerPool(ProcessPoolExecutor):
    """A pool whose context ends at once upon an error, not after all that was submitted."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the rest, or, upon an error or Ctrl-C, end what is under way and drop it."""
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.terminate()
        self.shutdown(wait=True, cancel_futures=kind is not None)


def worker_pool(workers: int) -> WorkerPool:
    """A pool of so many processes, which end with this one, however it ends; submit under `lean_start`."""
    # Started with the first worker otherwise, when some Pythons unblock SIGINT behind it.
    resource_tracker.ensure_running()
    return WorkerPool(workers, multiprocessing.get_context("spawn"), _start_worker)


@contextmanager
def lean_start() -> Iterator[None]:
    """Keep from workers that are started in this context what they must not inherit.

    With "spawn" a worker imports the parent's main module anew: this would bring pandas and MLX into each, and run a
    user's script again where it lacks the usual guard. Ctrl-C reaches workers as well as their parent, which alone
    should act on it; a signal that is blocked here stays blocked in them from their first instruction. And numerical
    libraries must not start threads of their own in each.
    """
    main, settings = sys.modules["__main__"], {name: os.environ.get(name) for name in _THREAD_SETTINGS}
    sys.modules["__main__"] = ModuleType("__main__")
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, "1"))
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for name, value in settings.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_malloc(settings: Mapping[int, int]) -> bool:
    """Set parameters of glibc's `mallopt`, in their order; False where one is refused, or the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    taken = [mallopt is not None and mallopt(parameter, value) == 1 for parameter, value in settings.items()]
    return all(taken)


def _start_worker() -> None:
    warnings.simplefilter("ignore")
    # Arrays of a megabyte that come and go, and whose memory goes back, cost 12,000 page faults per rendered image.
    set_malloc({M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
