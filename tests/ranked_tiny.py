"""The toy training as a program, for one process or a rank of several: its folder, then `resume`, `kill=RANK,STEP`.

A rank that is to be killed ends as by `kill -9` when it is about to read the batch of that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import mlx_cxr  # noqa: F401  before MLX, as it says which BLAS serves

sys.path.insert(0, str(Path(__file__).resolve().parent))

import mlx.core as mx
from toy_training import TINY, run_tiny

from mlx_cxr.core import device
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.distributed import World


def uneven_targets() -> np.ndarray:
    """Known labels spread so that no two images have as many: a mean of means would not be the mean."""
    targets = TINY[1].copy()
    for i, row in enumerate(targets):
        row[2 + i % 12 :] = np.nan
    return targets


def kill_at(step: int) -> None:
    """End this process at a step."""
    real, done = ImageSource.batches, 0

    def batches(self: ImageSource, chosen: Iterable[np.ndarray]) -> Iterator[mx.array]:
        nonlocal done
        for images in real(self, chosen):
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            yield images

    ImageSource.batches = batches


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    mx.set_default_device(mx.cpu)
    device.start("ranked_tiny", parallel=True)
    world = World.join()
    for option in options:
        if option.startswith("kill="):
            rank, step = map(int, option.removeprefix("kill=").split(","))
            if world.rank == rank:
                kill_at(step)
    run_tiny(folder, targets=uneven_targets(), world=world, resume="resume" in options)
    print(f"rank {world.rank} done", flush=True)
