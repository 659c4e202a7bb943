"""Several processes as one run: parts of each batch, means over all of them, one writer, an end when one is lost.

`mlx.launch -n 2 -- python -m mlx_cxr.train_cnn …` starts the same program on every rank. The batch of the configuration
is divided among them, gradients are averaged, and rank 0 alone writes. That every rank holds the same weights is
checked. Collectives match by their order, so all ranks alike call whatever communicates.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_cxr.core import device
from mlx_cxr.core.errors import UserError

_TIMEOUT = "MLX_CXR_RANK_TIMEOUT"
_SECONDS = 600.0
_LOST = 3


class RankLostError(UserError, ConnectionError):
    """Another process of the run has died, or its machine cannot be reached."""


class RanksDifferError(UserError, RuntimeError):
    """Processes of one run do not have the same data, settings or weights."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's rank. For a single process, every method is the identity or a no-op.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: MLX's handle; None for one process.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None

    @classmethod
    def join(cls) -> World:
        """The processes that `mlx.launch` (or `mpirun`) started; one process where it was not used.

        Raises:
            UserError: the others cannot be reached.
        """
        group = device.process_group()
        return cls() if group is None else cls(group.rank(), group.size(), group)

    @property
    def writes(self) -> bool:
        """True on the one process that writes the run's files."""
        return self.rank == 0

    def part(self, count: int, key: str) -> slice:
        """This rank's part of `count` things; the parts are of one size, disjoint and complete.

        Raises:
            UserError: `count` does not divide by the number of processes; names `key` and what would do.
        """
        each, left = divmod(count, self.size)
        if left or not each:
            larger = (each + 1) * self.size
            fitting = f"{each * self.size} or {larger}" if each else str(larger)
            raise UserError(
                f"{key} is {count} here, which {self.size} processes cannot share equally; {fitting} would do"
            )
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, x: mx.array) -> mx.array:
        """Mean of `x` over the ranks, inside a graph or outside."""
        return x if self.size == 1 else mx.distributed.all_sum(x, group=self.group) / self.size

    def average(self, tree: Any) -> Any:
        """A tree of arrays, each averaged over the ranks, many small ones at a time."""
        return nn.average_gradients(tree, self.group) if self.size > 1 else tree

    def from_first(self, tree: Any) -> Any:
        """A tree of arrays as rank 0 has it."""
        if self.size == 1:
            return tree
        mine = tree if self.rank == 0 else tree_map(mx.zeros_like, tree)
        everywhere = tree_map(lambda x: mx.distributed.all_sum(x, group=self.group), mine)
        self._evaluate(everywhere, "what rank 0 hands out")
        return everywhere

    def agree(self, decide: Callable[[], Any]) -> Any:
        """Call `decide` on rank 0 alone, and return its JSON-ready result on every rank."""
        if self.size == 1:
            return decide()
        said = json.dumps(decide()).encode() if self.rank == 0 else b""
        length = int(self.from_first(mx.array([len(said)], dtype=mx.int32)).item())
        said = np.frombuffer(said, np.uint8).astype(np.int32) if self.rank == 0 else np.zeros(length, np.int32)
        return json.loads(np.array(self.from_first(mx.array(said))).astype(np.uint8).tobytes())

    def gather(self, x: np.ndarray) -> np.ndarray:
        """(size, *x.shape): `x`, of one shape and type everywhere, of each rank."""
        if self.size == 1:
            return x[None]
        every = mx.distributed.all_gather(mx.array(x)[None], group=self.group)
        self._evaluate(every, "a comparison of all ranks")
        return np.array(every)

    def rows_of_all(self, values: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Gather rows that the ranks have computed among them.

        Args:
            values: float (N, …); only this rank's rows are read.
            mine: bool (N,); true for one rank in each row.

        Returns:
            As `values`, complete.
        """
        if self.size == 1:
            return values
        own = values.astype(np.float32)
        own[~mine] = 0
        total = mx.distributed.all_sum(mx.array(own), group=self.group)
        self._evaluate(total, "the answers of all ranks")
        return np.array(total).astype(values.dtype)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(np.zeros(1, np.int32))

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """Let rank 0 go first, so that the others find the files that it makes."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def check_same(self, what: str, text: str) -> None:
        """Check that all ranks have the same text.

        Raises:
            RanksDifferError: they have not; names those that differ.
        """
        if self.size > 1:
            self._check(what, np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32))

    def check_same_weights(self, model: nn.Module, trainable_only: bool = False) -> None:
        """Check that all ranks have the same parameters and running statistics, by a sum over their bits.

        Args:
            trainable_only: leave out frozen ones, such as a base that each rank has read from the same file.

        Raises:
            RanksDifferError: they have not; names those that differ.
        """
        if self.size == 1:
            return
        total = mx.array(0, dtype=mx.uint32)
        compared = model.trainable_parameters() if trainable_only else model.parameters()
        for place, (_, value) in enumerate(tree_flatten(compared)):
            bits = value.reshape(-1).view({4: mx.uint32, 2: mx.uint16}.get(value.dtype.size, mx.uint8))
            total = total + (place + 1) * mx.sum(bits.astype(mx.uint32))
        self._check("weights", np.array(total)[None].view(np.int32))

    def _check(self, what: str, mark: np.ndarray) -> None:
        every = self.gather(mark)
        other = [str(rank) for rank in range(self.size) if (every[rank] != every[0]).any()]
        if other:
            raise RanksDifferError(
                f"rank {', '.join(other)} has other {what} than rank 0; give every process the same configuration, "
                "manifest, pixel store and version of this package"
            )

    def _evaluate(self, tree: Any, where: str) -> None:
        """Evaluate without a time limit: another rank may be slower, or rank 0 busy with something it does alone."""
        with self._connection(where):
            mx.eval(tree)

    @contextmanager
    def _connection(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and str(error).startswith(("[ring]", "[mpi]", "[nccl]", "[jaccl]")):
                raise RankLostError(f"{self._lost(where)} ({error})") from error
            raise

    @contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """Context of an evaluation that communicates, where no rank should take long.

        MLX's ring reports a lost peer to the first exchange that misses it, and leaves those queued behind that one
        waiting for ever, where no exception can reach. `mlx.launch` ends the others when a process dies, but not when
        a machine goes. So the process ends itself, with status 3, when this takes longer than `MLX_CXR_RANK_TIMEOUT`
        seconds (600).

        Args:
            where: for the message, such as `step 12`.

        Raises:
            RankLostError: the connection was lost.
        """
        if self.size == 1:
            yield
            return
        _watchdog.begin(f"error: {self._lost(where)}")
        try:
            with self._connection(where):
                yield
        finally:
            _watchdog.end()

    def _lost(self, where: str) -> str:
        return (
            f"rank {self.rank} of {self.size} waits in vain for another rank at {where}: a process has died, or its "
            "machine cannot be reached. What was saved is kept; go on with --resume, on any number of processes"
        )


ALONE = World()
"""One process."""


def _seconds_to_wait() -> float:
    asked = os.environ.get(_TIMEOUT)
    try:
        seconds = float(asked) if asked else _SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{_TIMEOUT} is {asked!r}; give the seconds to wait for another rank, such as 600")
    return seconds


class _Watchdog:
    """A thread that ends the process when a wait has outlasted its time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._limit = _SECONDS
        self._wait: tuple[float, str] | None = None

    def begin(self, message: str) -> None:
        if self._thread is None:
            self._limit = _seconds_to_wait()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._wait = (time.monotonic() + self._limit, message)

    def end(self) -> None:
        self._wait = None

    def _watch(self) -> NoReturn:
        while True:
            time.sleep(min(1.0, self._limit / 10))
            wait = self._wait
            if wait is not None and time.monotonic() > wait[0]:
                print(wait[1], file=sys.stderr, flush=True)
                os._exit(_LOST)


_watchdog = _Watchdog()


class PartialDropout(nn.Dropout):
    """Dropout of a rank's part of a batch, drawn as one process would draw it for the whole.

    Args:
        p: probability of dropping.
        world: the ranks, each with an equal part in their order.
    """

    def __init__(self, p: float, world: World) -> None:
        super().__init__(p)
        self._world = world

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        n, (rank, size) = x.shape[0], (self._world.rank, self._world.size)
        mask = mx.random.bernoulli(self._p_1, (size * n, *x.shape[1:]))
        return (1 / self._p_1) * mask[rank * n : (rank + 1) * n] * x


def share_dropout(model: nn.Module, world: World) -> None:
    """Replace each `nn.Dropout` of `model` by one that draws for all ranks; alone, leave it."""
    if world.size == 1:
        return

    def shared(module: nn.Module) -> nn.Module:
        return PartialDropout(1 - module._p_1, world) if type(module) is nn.Dropout else module

    model.update_modules(tree_map(shared, model.leaf_modules(), is_leaf=nn.Module.is_module))
