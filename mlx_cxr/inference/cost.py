"""The cost of a prediction: parameters, and milliseconds per sample on this machine (`cost.json`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import write_record
from mlx_cxr.inference.trained_run import TrainedRun
from mlx_cxr.training.cohort import SplitData
from mlx_cxr.training.scoring import image_forward


def milliseconds_per_sample(
    forward: Callable[[], mx.array], batch_size: int, seconds: float = 0.5, least_rounds: int = 3
) -> tuple[float, int]:
    """Time a forward pass over one batch that is in memory, for `write_cost`.

    `forward` gives the batch's logits; it is evaluated inside the clock, after one round that is not counted, for at
    least so many seconds and rounds.

    Returns:
        The median over the rounds in ms per sample, and the number of samples timed.
    """
    mx.eval(forward())
    rounds, begun = [], time.perf_counter()
    while len(rounds) < least_rounds or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        mx.eval(forward())
        rounds.append(time.perf_counter() - start)
    return 1000 * float(np.median(rounds)) / batch_size, len(rounds) * batch_size


def write_cost(
    folder: Path,
    *,
    parameters: Mapping[str, int],
    ms_per_sample: float,
    samples: int,
    batch_size: int,
    what: str,
    device: Mapping[str, Any],
) -> Path:
    """Write `cost.json`: the size of a model, and the time of a prediction on this machine.

    Args:
        folder: the run's.
        parameters: as `models.resnet.parameter_counts`.
        ms_per_sample: of `milliseconds_per_sample`.
        samples: number of samples timed.
        batch_size: samples per batch.
        what: phrase that names the sample, its size and the pass that is timed.
        device: `core.device.describe()`.
    """
    return write_record(
        folder / "cost.json",
        {
            "schema": 1,
            "parameters": dict(parameters),
            "ms_per_sample": ms_per_sample,
            "samples": samples,
            "batch_size": batch_size,
            "what": what,
            "device": dict(device),
        },
    )


def measure_image_cost(trained: TrainedRun, test: SplitData, config: Config, machine: Mapping[str, Any]) -> None:
    """Write the `cost.json` of a network: its forward pass on a batch of test images in memory."""
    items = np.arange(min(config.evaluation.batch_size, len(test)))
    images, forward = test.images.batch(items), image_forward(trained.model)
    per_image, samples = milliseconds_per_sample(lambda: forward(images), len(items))
    write_cost(
        trained.folder,
        parameters=trained.parameters,
        ms_per_sample=per_image,
        samples=samples,
        batch_size=len(items),
        what=f"one film of {config.pixels.size} px in memory, forward pass in batches of {len(items)}",
        device=machine,
    )
