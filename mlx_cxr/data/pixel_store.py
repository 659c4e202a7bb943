"""The pixel store: every image of a manifest as memory-mapped uint8 pixels, and the index of their ids.

`images_<size>.npy` holds (N, S, S), a row per manifest row in its order; an image that could not be used is all 0.
`images_<size>.json` beside it has, key by key:

    schema      3
    manifest    SHA-256 of the manifest
    transform   `Transform.plain()`
    films       SHA-256 over the images' names, sizes, times of modification, and a block of each, when it was begun
    shape       [N, S, S]
    pixels      SHA-256 of the array's file
    pillow      version of the decoder
    stored      images in the array
    unreadable  image_id -> why it could not be used
    notes       image_id -> anything unusual about it (`decoding.DecodedImage.notes`)
    image_ids   of each row

A store of very many images lies in shards, each of the next so many rows of the manifest: `images_<size>-1-of-6.npy`
with an index of its own, as above, and so on; `ShardedImages` reads them as one array. The index of the whole,
`images_<size>.json`, is written when all are there; its schema is 4, it has no `pillow`, and

    shards      [{file, films, pixels}] in order: name of the array, number of rows, as in its own index
    films       SHA-256 of what the shards have under `films`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.files import RecordError, known_sha256, read_record
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.tables import DataError

SCHEMA = 3
SHARDED_SCHEMA = 4
_KEYS = ("manifest", "transform", "films", "shape", "unreadable", "notes", "image_ids")
_AGAIN = "run prepare_images with this configuration again"


@dataclass(frozen=True)
class PixelStore:
    """An opened store.

    Attributes:
        images: uint8 (N, S, S), memory-mapped, read-only, gray levels 0..255.
        missing: image_id -> reason, of the images that could not be used; their rows are all 0.
        notes: image_id -> anything unusual about the image.
    """

    images: np.ndarray | ShardedImages
    missing: Mapping[str, str]
    notes: Mapping[str, list[str]]
    _place: pd.Index

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, transform: Transform) -> PixelStore:
        """Open the store made for this manifest and transform.

        Args:
            path: `images_<size>.npy`.

        Raises:
            DataError: it is not there, incomplete, damaged (all of it is hashed, once in a process), or made for
                something else.
        """
        path = Path(path)
        index = read_index(path)
        expected = {"manifest": manifest.sha256, "transform": transform.plain()}
        for what, wanted in expected.items():
            if index[what] != wanted:
                raise DataError(
                    f"{path} was made for another {what} ({_short(index[what])}, now {_short(wanted)}); {_AGAIN}"
                )
        place = pd.Index(index["image_ids"], dtype=object)
        if not place.equals(pd.Index(manifest.frame["image_id"], dtype=object)):
            raise DataError(f"{path.with_suffix('.json')} lists other films than the manifest; {_AGAIN}")
        arrays = []
        for file, shape, pixels in _arrays(path, index):
            arrays.append(map_images(file, shape))
            if known_sha256(file) != pixels:
                raise DataError(
                    f"{file} is not what its index {path.with_suffix('.json')} says: it is damaged, or was changed or "
                    f"replaced; {_AGAIN}"
                )
        images = arrays[0] if index["schema"] == SCHEMA else ShardedImages(arrays)
        return cls(images, index["unreadable"], index["notes"], place)

    def rows(self, image_ids: Iterable[str]) -> np.ndarray:
        """int64 (M,): the row of each image in `images`.

        Raises:
            DataError: an id that the store does not know, or whose image could not be used; names the first.
        """
        ids = pd.Index(image_ids, dtype=object)
        rows = self._place.get_indexer(ids).astype(np.int64)
        if (unknown := np.flatnonzero(rows < 0)).size:
            raise DataError(f"image_id {ids[unknown[0]]!r} is not in the pixel store; {_AGAIN}")
        if (unusable := np.flatnonzero(ids.isin(list(self.missing)))).size:
            image_id = ids[unusable[0]]
            raise DataError(f"the film of image_id {image_id!r} could not be used: {self.missing[image_id]}")
        return rows


class ShardedImages:
    """uint8 (N, S, S), read-only: the rows of several arrays (n, S, S), one after the other.

    It has the part of an array's interface that readers of a store use: `shape`, `dtype`, `ndim`, `nbytes`, `len`, and
    rows by number, by slice, or by a list or integer array of numbers (negative ones count from the end). The rows are
    copies in memory, except for a single row, which is a view of the file.

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
        """Rows (M,) that exist, read shard by shard and forward through each file."""
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


def read_index(path: Path) -> dict[str, Any]:
    """The index beside a store.

    Raises:
        DataError: there is no complete store, or the index is damaged or of another version.
    """
    index_path = path.with_suffix(".json")
    if not index_path.is_file():
        raise DataError(f"the pixel store {path} {_state(path)}; run prepare_images with this configuration")
    try:
        index = read_record(index_path)
    except RecordError as error:
        raise DataError(f"{error}; {_AGAIN}") from None
    if not _is_index(index):
        raise DataError(f"{index_path} is not an index of this version of mlx_cxr; {_AGAIN}")
    for file, *_ in _arrays(path, index):
        if not file.is_file():
            raise DataError(f"the pixel store {file} {_state(path)}; run prepare_images with this configuration")
    return index


def store_files(path: Path) -> list[Path]:
    """The index of a store and its arrays, as the index lists them; without a usable index, the two of one file."""
    index_path = path.with_suffix(".json")
    with suppress(RecordError):
        if _is_index(index := read_record(index_path)):
            return [index_path, *(file for file, *_ in _arrays(path, index))]
    return [index_path, path]


def shard_paths(path: Path, shards: int) -> list[Path]:
    """Paths of the arrays of a store of so many shards; with one, the array is `path`."""
    if shards == 1:
        return [path]
    width = len(str(shards))
    return [path.with_name(f"{path.stem}-{k:0{width}}-of-{shards}{path.suffix}") for k in range(1, shards + 1)]


def files_of_shards(path: Path) -> list[Path]:
    """Files of shards beside a store: finished, begun, or left by other settings."""
    name = re.compile(re.escape(path.stem) + r"-\d+-of-\d+(\.partial)?\.(npy|json|jsonl|npy\.partial)")
    return sorted(file for file in path.parent.glob(f"{path.stem}-*-of-*") if name.fullmatch(file.name))


def partial_paths(path: Path) -> tuple[Path, Path]:
    """(pixels, journal) of a store that is being written."""
    return path.with_name(f"{path.name}.partial"), path.with_name(f"{path.stem}.partial.jsonl")


def map_images(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a store, memory-mapped and read-only.

    Raises:
        DataError: it is damaged, cut short, or not uint8 of that shape.
    """
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); {_AGAIN}") from None
    if images.dtype != np.uint8 or images.shape != shape:
        raise DataError(f"{path} holds {images.dtype} {images.shape}, its index says uint8 {shape}; {_AGAIN}")
    return images


def _is_index(index: Any) -> bool:
    if any(key not in index for key in _KEYS):
        return False
    if index.get("schema") == SHARDED_SCHEMA:
        shards = index.get("shards")
        wanted = {"file", "films", "pixels"}
        return isinstance(shards, list) and all(isinstance(s, dict) and wanted <= s.keys() for s in shards)
    return index.get("schema") == SCHEMA and "pixels" in index


def _state(path: Path) -> str:
    begun = partial_paths(path)[1].exists() or bool(files_of_shards(path))
    return "is not complete: prepare_images was stopped" if begun else "is missing"


def _arrays(path: Path, index: dict[str, Any]) -> list[tuple[Path, tuple[int, ...], str]]:
    """(file, shape, SHA-256) of each array of a store."""
    if index["schema"] == SCHEMA:
        return [(path, tuple(index["shape"]), index["pixels"])]
    side = index["shape"][1:]
    return [(path.with_name(s["file"]), (s["films"], *side), s["pixels"]) for s in index["shards"]]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
