"""The pixel store: every film of a manifest as one memory-mapped uint8 array, and the index that says which is which.

`images_<size>.npy` holds (N, S, S), a row per manifest row in its order; a film that could not be used is all 0.
`images_<size>.json` beside it has, key by key:

    schema      1
    manifest    SHA-256 of the manifest
    transform   `Transform.plain()`
    films       SHA-256 over the films' names and sizes in bytes when the store was begun
    shape       [N, S, S]
    sample      SHA-256 of some of the rows, which ties the index to its array
    pillow      version of the decoder
    stored      films in the array
    unreadable  image_id -> why it could not be used
    notes       image_id -> what is unusual about it (`decoding.Film.notes`)
    image_ids   of each row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.tables import DataError
from mlx_cxr.runs import RunFormatError, read_json

SCHEMA = 1
_SAMPLED_ROWS = 16


@dataclass(frozen=True)
class PixelStore:
    """An opened store.

    Attributes:
        images: uint8 (N, S, S), memory-mapped, read-only, gray levels 0..255.
        missing: image_id -> reason, of the films that could not be used; their rows are all 0.
        notes: image_id -> what is unusual about the film.
    """

    images: np.ndarray
    missing: Mapping[str, str]
    notes: Mapping[str, list[str]]
    _place: pd.Index

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, transform: Transform) -> PixelStore:
        """Open the store made for this manifest and transform.

        Args:
            path: `images_<size>.npy`.
            manifest: whose films it must hold.
            transform: how they must have been prepared.

        Raises:
            DataError: it is not there, incomplete, damaged, or made for something else.
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
        images = map_images(path, tuple(index["shape"]))
        if sample_hash(images) != index["sample"]:
            raise DataError(f"{path} and its index {path.with_suffix('.json')} do not belong together; {_AGAIN}")
        return cls(images, index["unreadable"], index["notes"], place)

    def rows(self, image_ids: Iterable[str]) -> np.ndarray:
        """int64 (M,): the row of each film in `images`.

        Raises:
            DataError: an id that the store does not know, or whose film could not be used; names the first.
        """
        ids = pd.Index(image_ids, dtype=object)
        rows = self._place.get_indexer(ids).astype(np.int64)
        if (unknown := np.flatnonzero(rows < 0)).size:
            raise DataError(f"image_id {ids[unknown[0]]!r} is not in the pixel store; {_AGAIN}")
        for image_id in ids if self.missing else ():
            if image_id in self.missing:
                raise DataError(f"the film of image_id {image_id!r} could not be used: {self.missing[image_id]}")
        return rows


_AGAIN = "run prepare_images with this configuration again"
_KEYS = ("manifest", "transform", "films", "shape", "sample", "unreadable", "notes", "image_ids")


def read_index(path: Path) -> dict[str, Any]:
    """The index beside a store.

    Raises:
        DataError: there is no complete store, or the index is damaged or of another version.
    """
    index_path = path.with_suffix(".json")
    if not path.is_file() or not index_path.is_file():
        begun = partial_paths(path)[1].exists()
        state = "is not complete: prepare_images was stopped" if begun else "is missing"
        raise DataError(f"the pixel store {path} {state}; run prepare_images with this configuration")
    try:
        index = read_json(index_path)
    except RunFormatError as error:
        raise DataError(f"{error}; {_AGAIN}") from None
    if not isinstance(index, dict) or index.get("schema") != SCHEMA or any(key not in index for key in _KEYS):
        raise DataError(f"{index_path} is not an index of this version of mlx_cxr; {_AGAIN}")
    return index


def partial_paths(path: Path) -> tuple[Path, Path]:
    """(pixels, journal) of a store that is being written."""
    return path.with_name(f"{path.name}.partial"), path.with_name(f"{path.stem}.partial.jsonl")


def sample_hash(images: np.ndarray) -> str:
    """SHA-256 of some rows of (N, S, S), evenly spaced: cheap for any N."""
    chosen = np.unique(np.linspace(0, len(images) - 1, _SAMPLED_ROWS).astype(int))
    return hashlib.sha256(np.ascontiguousarray(images[chosen])).hexdigest()


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


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
