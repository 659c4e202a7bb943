"""Parts of a batch on streams of their own, so that the CPU backend uses all cores.

MLX's CPU backend runs one operation of a stream at a time, and all but the matrix products on one core: the patches of
a convolution, BatchNorm, ReLU, pooling. Inside `batch_parallel` a network's batch is cut into a part per core; each
part has a stream, and each matrix product one thread. Outside of it, and on other devices, a batch is one part.

MLX hands a graph's operations to their streams in one order, a few ahead of the computation. With more than
`MLX_BFS_MAX_WIDTH` open arrays it goes depth-first: the whole of one part before the next, one core after the other.
Its default, 20, is less than a training step of the teacher has; this module raises it, unless it is set already.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_cxr.core import device
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.workers import available_cores
from mlx_cxr.ops.switch import fast_ops_enabled

_MOST = 8
_WIDTH = "1000"
_own = threading.local()
"""`streams` of this thread, as MLX gives a stream to a thread; `active`, the number of them in use."""
_held = threading.Lock()
"""Held by the thread inside `batch_parallel`, as OpenBLAS's number of threads is one setting for the process."""


@contextmanager
def batch_parallel(streams: int | None = None, rows: int | None = None) -> Iterator[int]:
    """Cut the batches of graphs built inside the context into parts, one per core; evaluate them inside it too.

    Does nothing on another device than the CPU, with one core, where BLAS is limited to one thread, for batches of one
    row, while another thread of this process is inside, with `MLX_CXR_STREAMS=1`, or where the switch is off.

    Args:
        streams: number of parts; None takes `MLX_CXR_STREAMS`, or as many as BLAS has threads, up to 8.
        rows: of the batches, as a part has one at least; None for many.

    Yields:
        Largest number of parts of a batch; 1 means that nothing changes.

    Raises:
        UserError: `MLX_CXR_STREAMS` is no whole number above 0.
    """
    before = _active()
    wanted = streams or available()
    wanted = wanted if rows is None else min(wanted, max(rows, 1))
    if before > 1 or not fast_ops_enabled() or wanted == 1:
        yield before
        return
    if not _held.acquire(blocking=False):
        yield 1
        return
    blas = _OpenBLAS.linked()
    threads = blas.threads() if blas else 1
    own = getattr(_own, "streams", [])
    _own.streams = own + [mx.new_stream(mx.cpu) for _ in range(wanted - len(own))]
    _own.active = wanted
    if blas:
        blas.set_threads(1)
    try:
        yield wanted
    finally:
        _own.active = 1
        if blas:
            blas.set_threads(threads)
        _held.release()


def available() -> int:
    """Number of parts that a batch is cut into by default: `MLX_CXR_STREAMS`, or one per BLAS thread; 1 if off.

    Raises:
        UserError: `MLX_CXR_STREAMS` is no whole number above 0.
    """
    if not fast_ops_enabled():
        return 1
    if asked := os.environ.get("MLX_CXR_STREAMS"):
        if not asked.isdecimal() or int(asked) < 1:
            raise UserError(f"MLX_CXR_STREAMS is {asked!r}; give a whole number from 1 (off), or leave it out")
        return int(asked)
    blas = _OpenBLAS.linked()
    return min(blas.threads() if blas else available_cores(), _MOST)


def split(x: mx.array) -> list[mx.array]:
    """A batch (N, …) in parts of like size, in order; one part outside of `batch_parallel`, never more than N."""
    count = min(_active(), len(x))
    if count < 2:
        return [x]
    return mx.split(x, [len(x) * i // count for i in range(1, count)])


def each(function: Callable[..., mx.array], *parts: Sequence[mx.array]) -> list[mx.array]:
    """`function` of every part, on the part's stream; several lists of parts give several arguments."""
    arguments = list(zip(*parts, strict=True))
    if len(arguments) == 1:
        return [function(*arguments[0])]
    if len(arguments) > _active():
        raise RuntimeError(f"{len(arguments)} parts of a batch outside of the batch_parallel that cut it")
    made = []
    for stream, own in zip(_own.streams, arguments, strict=False):
        with mx.stream(stream):
            made.append(function(*own))
    return made


def joined(parts: Sequence[mx.array]) -> mx.array:
    """The batch (N, …) of its parts."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def with_gradient(function: Callable[..., mx.array], gradient: Callable[..., Any]) -> Callable[..., mx.array]:
    """`function` with a gradient of its own, computed on the stream that this is called on.

    `gradient` takes the arguments, the cotangent of the value and the value; it returns each argument's cotangent.
    """
    stream = here()
    made = mx.custom_function(function)

    @made.vjp
    def vjp(arguments: Any, cotangent: mx.array, value: mx.array) -> Any:
        with mx.stream(stream):
            return gradient(*(arguments if isinstance(arguments, tuple) else (arguments,)), cotangent, value)

    return made


def here() -> mx.Stream:
    """The stream of the current part."""
    return mx.default_stream(mx.default_device())


def _active() -> int:
    return getattr(_own, "active", 1) if fast_ops_enabled() else 1


class _OpenBLAS:
    """Thread control of the OpenBLAS that serves MLX."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.threads: Callable[[], int] = library.openblas_get_num_threads
        self.set_threads: Callable[[int], None] = library.openblas_set_num_threads

    @classmethod
    def linked(cls) -> _OpenBLAS | None:
        name = device.link_openblas()
        try:
            return cls(ctypes.CDLL(name)) if name else None
        except (OSError, AttributeError):
            return None


if fast_ops_enabled():
    # Read by MLX when it first evaluates something.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", _WIDTH)
