"""A run that makes soft labels, also as a program that can be killed: folder, features (0 or 1), seconds a chunk."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from mlx_cxr.data.soft_label_writer import SoftLabelWriter

STUDIES, WIDTH, CHUNK = 600, 24, 7
IDS = tuple(f"5{number:07d}" for number in range(STUDIES))
SPLITS = tuple("validate" if number % 6 == 0 else "train" for number in range(STUDIES))
HEADER = {"manifest": "a" * 64, "labels": {"empty": "negative", "uncertain": "zeros"}, "modality": "text"}
LOGITS = np.random.default_rng(0).normal(0, 4, (STUDIES, 14)).astype(np.float32)
FEATURES = np.random.default_rng(1).normal(0, 2, (STUDIES, WIDTH)).astype(np.float16)
TEMPERATURES = np.linspace(0.5, 2.0, 14).astype(np.float32)


def make(folder: Path, with_features: bool, pause: float = 0.0) -> int:
    """Do what is left to do, in chunks, and return how many studies that were."""
    with SoftLabelWriter.open(folder, IDS, SPLITS, HEADER, WIDTH if with_features else None) as writer:
        todo = writer.todo
        for start in range(0, len(todo), CHUNK):
            rows = todo[start : start + CHUNK]
            writer.put(rows, LOGITS[rows], FEATURES[rows] if with_features else None)
            time.sleep(pause)
        writer.finish(TEMPERATURES, truncated=3, skipped=1)
    return len(todo)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2] == "1", float(sys.argv[3]))
