"""Speed of the training input: from JPEG files into the pixel store, and from the store into a training step."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pandas as pd
from PIL import Image

from mlx_cxr.bench.contenders import Contender, Row, compare
from mlx_cxr.bench.timing import summary
from mlx_cxr.core import device
from mlx_cxr.core.config_schema import AugmentConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.training.augment import augment
from mlx_cxr.training.batches import ImageSource, epoch_order

STORE, PIPELINE = "store", "pipeline"
RESIDENT, FROM_DISK = "training input, resident", "training input, from disk"
_RAW = (3056, 2544)
"""Rows and columns of the images that are written: MIMIC-CXR-JPG's commonest."""
_DISTINCT = 4


def measure_store(size: int, images: int, seed: int = 0, raw: tuple[int, int] = _RAW) -> Row:
    """Build a pixel store of JPEGs once, on all cores, starting the decoding processes included.

    Args:
        size: side of a stored image in pixels.
        seed: of what they show: smooth noise, as large and as compressible as a chest image.
        raw: rows and columns of the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write_images(root, images, raw, seed)
        frame = pd.DataFrame({"image_id": [name.removesuffix(".jpg") for name in names], "path": names})
        manifest = Manifest(frame, np.zeros((images, len(LABELS)), np.float32), "0" * 64)
        report = build_store(root / f"images_{size}.npy", manifest, Transform(size), root)
        kilobytes = sum((root / name).stat().st_size for name in names) / images / 1000
    return Row(
        STORE,
        "pixel store build",
        "none",
        "cpu",
        "uint8",
        images,
        "timed",
        note=f"once, {images} JPEGs of {raw[1]} x {raw[0]} pixels, {kilobytes:.0f} kB each",
        timing=summary([report.seconds]),
    )


def measure_pipeline(size: int, batch_size: int, images: int, channels: int, budget: float, seed: int = 0) -> list[Row]:
    """An epoch of batches as a training step sees them, gathered, augmented and normalized, but no step.

    Args:
        size: side of an image in pixels.
        channels: of the network's input.
        budget: seconds for all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "films.npy"
        np.save(path, np.random.default_rng(seed).integers(0, 256, (images, size, size), dtype=np.uint8))
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        rows = np.arange(images)
        order = epoch_order(images, batch_size, seed, 0)

        def epoch(source: ImageSource) -> None:
            for number, batch in enumerate(source.batches(order)):
                x = augment(batch, mx.random.key(number), AugmentConfig())
                mx.eval(preprocess(x, channels))

        contenders = [
            Contender(name, "mlx", device.device_kind(), "uint8", partial(epoch, source), None, 0.0, order.size, note)
            for name, source, note in (
                (RESIDENT, ImageSource(stored, rows, 1e9), ""),
                (FROM_DISK, ImageSource(stored, rows, 0.0), "the system had the file in memory"),
            )
        ]
        return compare(PIPELINE, contenders, budget, seed=seed)


def _write_images(root: Path, images: int, raw: tuple[int, int], seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    names = [f"film{number:04d}.jpg" for number in range(images)]
    for name in names[:_DISTINCT]:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 10), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(raw[::-1], Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-4, 5, raw, dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(root / name, quality=95)
    for number, name in enumerate(names[_DISTINCT:]):
        (root / name).write_bytes((root / names[number % _DISTINCT]).read_bytes())
    return names
