"""Image embeddings from the frozen vision tower, computed once and stored."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, hash_of, read_record, write_record
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.data.soft_labels import has_form
from mlx_cxr.teacher.architecture import PATCH
from mlx_cxr.teacher.base_model import Base

log = logging.getLogger("mlx_cxr")


class ImageEmbeddingError(UserError, ValueError):
    """Embeddings that are not finite, or a file of them that cannot be used."""


def image_tokens(size: int, base: Base) -> int:
    """Tokens of a square image of `size` pixels after the pixel unshuffle."""
    return (size // base.downsample) ** 2


def image_patches(images: np.ndarray, size: int, grey: tuple[float, float]) -> np.ndarray:
    """Images as the vision tower takes them: one tile, unpadded.

    The published processor pads every view to 1024 patches, four times what an image of 256 px has.

    Args:
        images: uint8 (B, S, S).
        size: side in pixels to which they are resized (bilinear, as LFM2.5-VL's processor does).
        grey: (mean, deviation) of grey levels in [0, 1].

    Returns:
        float32 (B, (size / 16)^2, 768): patches in rows, each 16 x 16 pixels of 3 equal channels.
    """
    resized = np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    )
    levels = (resized.astype(np.float32) / 255 - grey[0]) / grey[1]
    side = size // PATCH
    patches = levels.reshape(len(images), side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    flat = patches.reshape(len(images), side * side, PATCH * PATCH, 1)
    return np.repeat(flat, 3, axis=-1).reshape(len(images), side * side, -1)


def encode_images(base: Base, images: np.ndarray, size: int) -> mx.array:
    """(B, T, H): embeddings of images, in the precision of the base.

    Args:
        images: uint8 (B, S, S).
        size: side in pixels that the tower sees.
    """
    patches = image_patches(images, size, base.grey)
    side = size // PATCH
    shapes = mx.array(np.full((len(images), 2), side, dtype=np.int32))
    mask = mx.ones(patches.shape[:2], dtype=mx.int32)
    return mx.stack(base.model.encode_images(mx.array(patches), spatial_shapes=shapes, pixel_attention_mask=mask))


def image_embeddings(
    base: Base,
    store: PixelStore,
    store_sha256: str,
    image_ids: Sequence[str],
    size: int,
    folder: Path,
    batch_size: int = 16,
) -> np.ndarray:
    """Embeddings of images from disk; those that are missing are computed first, resuming where a run was stopped.

    Args:
        store_sha256: of the store's index, which names manifest and transform.
        image_ids: which, in the order wanted.
        size: side in pixels that the tower sees.
        folder: gets `film_embeddings_<size>_<key>.npy` (float16) and its JSON, a key for each base, store and list.
        batch_size: images per pass.

    Returns:
        float16 (N, T, H), memory-mapped.

    Raises:
        ImageEmbeddingError: an embedding is not finite in float16.
        OSError: the disk is full or not writable.
    """
    header = {
        "schema": 1,
        "base": base.identity,
        "precision": base.precision,
        "store": store_sha256,
        "size": size,
        "films": hash_of(list(image_ids)),
    }
    path = folder / f"film_embeddings_{size}_{hash_of(header)[:8]}.npy"
    progress_path = path.with_suffix(".json")
    shape = (len(image_ids), image_tokens(size, base), base.hidden_size)
    done = _done(path, progress_path, header, shape)
    folder.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done else "w+"
    out = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
    _reserve(path)
    rows = store.rows(image_ids)
    starts = range(done, len(rows), batch_size)
    for start in tqdm(starts, desc="film embeddings", unit="batch", leave=False, disable=None):
        chosen = rows[start : start + batch_size]
        encoded = np.array(encode_images(base, store.images[chosen], size).astype(mx.float16))
        if not np.isfinite(encoded).all():
            raise ImageEmbeddingError(
                f"embedding of film {image_ids[start]} or its neighbours is not finite in float16"
            )
        out[start : start + len(chosen)] = encoded
        # So far a stopped run resumes.
        if (start // batch_size) % 16 == 15:
            out.flush()
            write_record(progress_path, {"header": header, "done": start + len(chosen)})
    out.flush()
    write_record(progress_path, {"header": header, "done": len(rows)})
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _reserve(path: Path) -> None:
    """Claim the blocks of a file: where the disk is full, writing into its map would end the process with a signal."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from None


def _done(path: Path, progress_path: Path, header: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Number of images that a stopped run has left on the disk; 0 where the file is damaged or of something else."""
    try:
        progress = read_record(progress_path)
        # Opened for writing, a file cut short would be filled up with zeros.
        whole = has_form(np.load(path, mmap_mode="r", allow_pickle=False), shape, np.float16)
    except (RecordError, OSError, ValueError, EOFError):
        return 0
    return progress["done"] if whole and progress.get("header") == header else 0
