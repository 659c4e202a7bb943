"""A cohort of small images on disk, with manifest and pixel store, and the soft labels of a teacher for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from toy_training import square_images

from mlx_cxr import build_manifest, prepare_images
from mlx_cxr.core.config import Config, load_config
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.data.soft_label_writer import SoftLabelWriter

SPLITS = ["train"] * 12 + ["validate"] * 8 + ["test"] * 4


def make_cohort(folder: Path) -> Path:
    """`trial.yaml`, images, their table, manifest and pixel store; two findings say where the square is."""
    images, targets = square_images(len(SPLITS), 64, 0)
    (folder / "films").mkdir()
    rows = []
    for i, (image, target, split) in enumerate(zip(images, targets, SPLITS, strict=True)):
        Image.fromarray(image).save(folder / "films" / f"film{i:02}.png")
        rows.append((f"p{i:02}", f"s{i:02}", f"film{i:02}.png", split, target[0], target[1]))
    columns = ["patient_id", "study_id", "image_file", "split", "Atelectasis", "Cardiomegaly"]
    prepared(folder, pd.DataFrame(rows, columns=columns))
    return folder


def prepared(folder: Path, table: pd.DataFrame, name: str = "trial") -> Config:
    """Write the table, `trial.yaml`, the manifest and the pixel store of the images in `films`."""
    table.to_csv(folder / "table.csv", index=False)
    split = {"split": "split"} if "split" in table else {}
    plain = {
        "name": name,
        "run_name": "first",
        "outputs": str(folder / "outputs"),
        "weights_dir": str(folder / "weights"),
        "data": {
            "source": "csv",
            "root": str(folder / "films"),
            "work_dir": str(folder / "made"),
            "views": None,
            "csv": {"table": str(folder / "table.csv"), **split},
        },
        "pixels": {"size": 32, "workers": 1},
        "model": {"weights": "scratch"},
        "training": {"epochs": 2, "batch_size": 4, "log_every": 1, "save_every": 2},
        "evaluation": {"bootstrap_samples": 10, "batch_size": 4},
    }
    (folder / "trial.yaml").write_text(yaml.safe_dump(plain))
    config = load_config(folder / "trial.yaml")
    build_manifest.run(config)
    prepare_images.run(config)
    return config


def soft_labels(config: Config, run_name: str, left_out: int = 0, features: int | None = None, **header: Any) -> Path:
    """A teacher's run with soft labels for train and validation: +-6 by the label with noise, at a temperature of 2.

    Args:
        config: of the cohort.
        run_name: the teacher's.
        left_out: so many studies at the beginning have none.
        features: size of its features; None for none.
        header: entries that differ from what they should be.
    """
    manifest = load_manifest(config.manifest_path)
    known = (manifest.frame["split"] != "test").to_numpy(copy=True)
    known[:left_out] = False
    frame, raw = manifest.frame[known], np.nan_to_num(manifest.raw_labels[known])
    rng = np.random.default_rng(0)
    logits = (12 * raw - 6 + rng.normal(0, 0.5, raw.shape)).astype(np.float32)
    right = {"manifest": manifest.sha256, "labels": config.plain()["labels"]}
    folder = config.run_dir(run_name)
    ids, splits = frame["study_id"].tolist(), frame["split"].tolist()
    with SoftLabelWriter.open(folder, ids, splits, right | header, features) as writer:
        drawn = None if features is None else rng.normal(size=(len(ids), features)).astype(np.float16)
        writer.put(np.arange(len(ids)), logits, drawn)
        writer.finish(np.full(14, 2.0))
    return folder
