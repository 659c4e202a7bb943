"""Images in batches: resident on the device where they fit, else read ahead from the memory-mapped store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy

import mlx.core as mx
import numpy as np

_PIECE = 256


class ImageSource:
    """Rows of a pixel store, served as device arrays.

    Args:
        images: uint8 (N, S, S), memory-mapped or not.
        rows: int (M,), the images of this source; its item i is `images[rows[i]]`.
        budget_gb: images are held on the device when all of them take less than this (GB, 1e9 bytes).
    """

    def __init__(self, images: np.ndarray, rows: np.ndarray, budget_gb: float) -> None:
        if images.dtype != np.uint8 or images.ndim != 3:
            raise ValueError(f"films are {images.dtype} {images.shape}; expected uint8 (N, S, S)")
        self._images = images
        self._rows = np.asarray(rows, dtype=np.int64)
        size = len(self._rows) * images.shape[1] * images.shape[2]
        self._resident = _on_device(images, np.sort(self._rows)) if size <= budget_gb * 1e9 else None
        if self._resident is not None:
            self._place = np.argsort(np.argsort(self._rows, kind="stable"), kind="stable")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def resident(self) -> bool:
        """True if the images are held on the device."""
        return self._resident is not None

    def taken(self, items: np.ndarray) -> ImageSource:
        """A source of the given items, int (M,), an image as often as it is in them; the device has one copy."""
        source = copy(self)
        source._rows = self._rows[items]
        if self._resident is not None:
            source._place = self._place[items]
        return source

    def batch(self, items: np.ndarray) -> mx.array:
        """uint8 (B, S, S): the given items, in their order."""
        if self._resident is not None:
            return self._resident[mx.array(self._place[items])]
        return mx.array(self._read(items))

    def batches(self, batches_of_items: Iterable[np.ndarray]) -> Iterator[mx.array]:
        """Each batch in turn; from disk, the next one is read while the current one is in use."""
        if self._resident is not None:
            for items in batches_of_items:
                yield self.batch(items)
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = None
            for items in batches_of_items:
                coming = reader.submit(self._read, items)
                if pending is not None:
                    yield mx.array(pending.result())
                pending = coming
            if pending is not None:
                yield mx.array(pending.result())

    def _read(self, items: np.ndarray) -> np.ndarray:
        rows = self._rows[items]
        order = np.argsort(rows, kind="stable")  # forward through the file
        out = np.empty((len(rows), *self._images.shape[1:]), dtype=np.uint8)
        out[order] = self._images[rows[order]]
        return out


def _on_device(images: np.ndarray, rows: np.ndarray) -> mx.array:
    """`images[rows]` on the device, filled piece by piece: a copy of all of it would double the memory taken."""
    out = mx.zeros((len(rows), *images.shape[1:]), dtype=mx.uint8)
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        out[start : start + len(piece)] = mx.array(images[piece])
        mx.eval(out)
    return out


def epoch_order(items: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The items of an epoch in batches: int (steps, batch_size), a function of seed and epoch alone.

    The last partial batch is dropped, so that shapes stay fixed; as each epoch has another order, no image is left out
    for good. A source smaller than one batch gives one batch of all of it.
    """
    order = np.random.default_rng([seed, epoch]).permutation(items)
    batch_size = min(batch_size, items)
    steps = items // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)
