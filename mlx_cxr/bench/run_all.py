"""The sections of the benchmark in their order, each with its share of the time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.bench import grad_cam, inference, input_data, machine, teacher, training
from mlx_cxr.bench.contenders import Row
from mlx_cxr.core.config import Config
from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.core.runs import run_folder
from mlx_cxr.inference.trained_run import TrainedRun
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize

log = logging.getLogger("mlx_cxr")

_SHARES = {"peak": 0.05, "inference": 0.44, "training": 0.2, "epoch": 0.12, "grad_cam": 0.12, "data": 0.03}
_EPOCH_BATCH, _CAM_BATCHES, _TRAINING_BATCHES = 8, (1, 8), (8, 32)
_PIPELINE_BATCH, _PIPELINE_IMAGES = 32, 256
_SECONDS_PER_STORED_IMAGE = 5.0


@dataclass(frozen=True)
class Settings:
    """Sizes, sections and time of a benchmark run.

    Attributes:
        size: side of the images in pixels.
        batch_sizes: images per forward pass; training and maps take those of them that suit them.
        torch_device: where PyTorch computes; None leaves it out.
        only: sections, of `bench.SECTIONS`.
        minutes: for all sections of an ordinary run, the teacher aside; fewer sections take less.
        compile_seconds: for `torch.compile`.
        seed: of images, labels and weights.
        tokens: of a prompt of the teacher.
        bits: of the teacher's base; None leaves it in floating point.
    """

    size: int
    batch_sizes: tuple[int, ...]
    torch_device: str | None
    only: tuple[str, ...]
    minutes: float
    compile_seconds: float
    seed: int
    teacher_size: Literal["tiny", "full"] | None
    tokens: int
    bits: Literal[4, 8] | None


def random_network(config: ResNetConfig, seed: int) -> ResNet18:
    """A ResNet-18 with random weights, BatchNorms that do something included, in evaluation mode."""
    model, rng = ResNet18(config), np.random.default_rng(seed)
    initialize(model, seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        kind = name.rsplit(".", 1)[-1]
        if kind == "running_mean" or (kind == "bias" and not name.startswith("fc.")):
            weights.append((name, rng.normal(0.0, 0.2, value.shape)))
        elif kind == "running_var" or (kind == "weight" and value.ndim == 1):
            weights.append((name, rng.uniform(0.5, 1.2, value.shape)))
    model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in weights], strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model


def network_of(config: Config, run_name: str | Path | None, size: int | None) -> tuple[ResNet18, int, dict[str, Path]]:
    """The network to measure, the side of its images in pixels, and the file that it is from.

    Arguments are those of the stage; raises RecordError where there is no such run.
    """
    if run_name is None:
        model = ResNetConfig(in_channels=config.model.in_channels, output_stride=config.model.output_stride)
        return random_network(model, config.seed), size or config.pixels.size, {}
    folder = Path(run_name) if Path(run_name).is_dir() else run_folder(config.outputs, str(run_name))
    trained = TrainedRun.open(folder)
    return trained.model, size or trained.config.pixels.size, {"weights": trained.checkpoint}


def measure_all(model: ResNet18, config: TeacherConfig, settings: Settings) -> tuple[list[Row], dict[str, Any]]:
    """Run the sections.

    Args:
        model: in evaluation mode.

    Returns:
        All rows, and `peak` (`gflops` and `bandwidth_gbs` by name; None where no section needs it) and `teacher`
        (`teacher.time_and_memory`; None where it was not asked for).
    """
    rows: list[Row] = []
    found: dict[str, Any] = {"peak": None, "teacher": None}

    def seconds(part: str) -> float:
        return 60 * settings.minutes * _SHARES[part]

    def section(name: str, measure: Callable[..., list[Row]], *arguments: object) -> None:
        log.info("%s …", name)
        for row in measure(*arguments):
            rows.append(row)
            if row.timing is not None:
                rate = "" if row.gflops is None else f", {row.gflops:.0f} GFLOP/s"
                note = f"  ({row.note})" if row.note else ""
                figures = row.name, row.samples, row.ms_per_sample, row.timing.rounds, rate, note
                log.info("  %-52s batch %3d  %9.3f ms each, %d rounds%s%s", *figures)

    size, seed, torch_device = settings.size, settings.seed, settings.torch_device
    if "inference" in settings.only:
        # The machine's peaks are the yardstick of the forward pass.
        log.info("peak …")
        each = seconds("peak") / 8
        peaks = machine.matrix_product_peaks(torch_device, each)
        bandwidth = machine.memory_bandwidth(torch_device, each)
        found["peak"] = {
            "gflops": {f"{framework}, {precision}": value for (framework, precision), value in peaks.items()},
            "bandwidth_gbs": bandwidth,
        }
        section(
            "inference",
            inference.measure,
            model,
            size,
            settings.batch_sizes,
            torch_device,
            peaks,
            max(bandwidth.values()),
            seconds("inference"),
            settings.compile_seconds,
            seed,
        )
    if "training" in settings.only:
        batches = tuple(n for n in settings.batch_sizes if n in _TRAINING_BATCHES) or settings.batch_sizes[-1:]
        section("training", training.measure_steps, model, size, batches, torch_device, seconds("training"), seed)
        section("epoch", training.measure_epoch, model, size, _EPOCH_BATCH, seconds("epoch"), seed)
    if "grad_cam" in settings.only:
        section("grad_cam", grad_cam.measure, model, size, _CAM_BATCHES, seconds("grad_cam"), seed)
    if "data" in settings.only:
        images = max(8, int(60 * settings.minutes / _SECONDS_PER_STORED_IMAGE))
        section("store", lambda: [input_data.measure_store(size, images, seed)])
        shape = (size, _PIPELINE_BATCH, _PIPELINE_IMAGES, model.config.in_channels)
        section("pipeline", input_data.measure_pipeline, *shape, seconds("data"), seed)
    if "teacher" in settings.only and settings.teacher_size is not None:

        def teacher_rows() -> list[Row]:
            made, found["teacher"] = teacher.measure(
                settings.teacher_size, config, settings.tokens, seed, settings.bits
            )
            return made

        section("teacher", teacher_rows)
    return rows, found
