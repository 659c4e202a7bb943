"""Several arrays on disk read as one: the pixels of a store of more films than go into one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class ShardedImages:
    """uint8 (N, S, S), read-only: the rows of several arrays (n, S, S), one after the other.

    It serves what readers of a store ask of an array: `shape`, `dtype`, `ndim`, `nbytes`, `len`, and rows by number, by
    slice, or by a list or integer array of numbers (negative ones count from the end). What it gives is a copy in
    memory, except for a single row, which is a view of the file.

    Args:
        shards: memory-mapped or not; of one dtype and, but for their number of rows, one shape.

    Raises:
        ValueError: there are none, or they differ.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        if len({(shard.dtype, shard.shape[1:]) for shard in shards}) != 1:
            raise ValueError(f"shards are {[(str(shard.dtype), shard.shape) for shard in shards]}; expected one form")
        self._shards = tuple(shards)
        self._stops = np.cumsum([len(shard) for shard in shards])
        self._starts = self._stops - [len(shard) for shard in shards]
        self.dtype = shards[0].dtype
        self.shape = (int(self._stops[-1]), *shards[0].shape[1:])
        self.ndim = len(self.shape)
        self.nbytes = sum(shard.nbytes for shard in shards)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in self._shards:
            yield from shard

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """One row (S, S), or rows (M, S, S) in the order asked for.

        Raises:
            IndexError: a row that is not there, or no rows by number: masks and several axes are not served.
        """
        if isinstance(rows, slice):
            return self._rows(np.arange(len(self))[rows])
        if isinstance(rows, tuple):  # as `images[0, 1]` gives
            raise IndexError(f"rows of a sharded store are asked for by number or slice, not by {rows!r}")
        wanted = np.asarray(rows) if np.size(rows) else np.zeros(0, np.int64)
        if wanted.ndim > 1 or wanted.dtype.kind not in "iu":
            raise IndexError(f"rows of a sharded store are asked for by number or slice, not by {rows!r}")
        if wanted.size and (wanted.min() < -len(self) or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} asked for, of {len(self)}")
        wanted = wanted.astype(np.int64)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if wanted.ndim == 0:
            shard = int(np.searchsorted(self._stops, wanted, side="right"))
            return self._shards[shard][int(wanted - self._starts[shard])]
        return self._rows(wanted)

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Shard by shard, forward through each file."""
        out = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        edges = np.searchsorted(rows[order], self._stops)
        begin = 0
        for shard, start, end in zip(self._shards, self._starts, edges, strict=True):
            if end > begin:
                places = order[begin:end]
                out[places] = shard[rows[places] - start]
            begin = end
        return out
