"""A whole training step, MLX against PyTorch from the same weights, and the overhead of the loop."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.bench.contenders import Contender, Row, compare, stock_operations
from mlx_cxr.bench.timing import seconds_of, summary
from mlx_cxr.bench.torch_side import import_torch, synchronize, torch_dtype, torch_resnet18
from mlx_cxr.core import device
from mlx_cxr.core.config_schema import AugmentConfig, TrainingConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.models.resnet import GRAY_MEAN, GRAY_STD, RGB_MEAN, RGB_STD, ResNet18
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.classifier_task import TrainingData, classifier_task
from mlx_cxr.training.loop import Task, train
from mlx_cxr.training.losses import masked_bce

SECTION, EPOCH = "training", "epoch"
TOLERANCE = {"float32": 2e-2, "float16": 1e-1, "bfloat16": 3e-1}
"""Largest `step_difference` from MLX's own float32 step."""
STOCK, OURS, IN_PARTS = "MLX step, stock", "MLX step", "MLX step, in parts"
BARE, LOOPED = "bare step", "step in the loop"
_EPOCHS, _STEPS = 3, (4, 64)
EAGER, AMP = "PyTorch step, channels last", "PyTorch step, channels last, amp"
_STILL = AugmentConfig(shift=0, scale=0, rotate=0, brightness=0, contrast=0)


def random_cohort(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (count, size, size) of noise and float32 labels (count, 14), a tenth of them NaN."""
    rng = np.random.default_rng([seed, count])
    images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
    labels = rng.integers(0, 2, (count, len(LABELS))).astype(np.float32)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    return images, labels


def measure_steps(
    model: ResNet18, size: int, batch_sizes: tuple[int, ...], torch_device: str | None, budget: float, seed: int = 0
) -> list[Row]:
    """Compare and time one optimizer step: preprocessing, forward, loss, backward, clipping, AdamW.

    MLX's step holds the augmentation too, here with no amounts; PyTorch's has none.

    Args:
        model: where training starts; not changed.
        size: side of the images in pixels.
        torch_device: None leaves PyTorch out.
        budget: seconds for all of it.
    """
    rows, known = [], {}
    for images in sorted(batch_sizes):
        cohort = random_cohort(images, size, seed)
        settings = TrainingConfig(batch_size=images, epochs=1000, warmup_fraction=0.0)
        reference = _MlxStep(model, cohort, settings, stock_operations).first_step()
        on_cpu = device.device_kind() == "cpu"
        contenders = [
            _mlx_contender(name, "float32", _MlxStep(model, cohort, settings, around), reference)
            for name, around in ((STOCK, stock_operations), (OURS, nullcontext), (IN_PARTS, batch_parallel))
            if on_cpu or name != IN_PARTS
        ]
        for precision in () if on_cpu else ("float16", "bfloat16"):
            step = _MlxStep(model, cohort, settings.model_copy(update={"precision": precision}))
            contenders.append(_mlx_contender(f"{OURS}, {precision}", precision, step, reference))
        if torch_device is not None:
            contenders.append(_torch_contender(EAGER, "float32", model, cohort, settings, reference, torch_device))
            if torch_device != "cpu":
                contenders += [
                    _torch_contender(f"{AMP}, {p}", p, model, cohort, settings, reference, torch_device)
                    for p in ("float16", "bfloat16")
                ]
        rows += compare(SECTION, contenders, budget / len(batch_sizes), None, known, seed)
    return rows


def measure_epoch(model: ResNet18, size: int, batch_size: int, budget: float, seed: int = 0) -> list[Row]:
    """Steps of the training loop beside bare steps of the same task, turn about: their ratio is the loop's overhead.

    The epoch is timed as the loop itself reports it, from its first batch to its last loss: reading and gathering
    images, seeds, sums, log lines. Validation and saving are apart.

    Args:
        model: where training starts; not changed.
        size: side of the images in pixels.
        budget: seconds for all of it; an epoch has four steps at least.

    Returns:
        A row for the bare step, and one for a step in the loop, whose rounds are epochs.
    """

    def step_of(steps: int) -> _MlxStep:
        settings = TrainingConfig(batch_size=batch_size, epochs=1000)
        cohort = random_cohort(batch_size * steps, size, seed)
        return _MlxStep(model, cohort, settings, batch_parallel, AugmentConfig())

    bare, looped = [], []
    probe = step_of(1)
    once = min(seconds_of(probe.call) for _ in range(3))
    steps = int(np.clip(budget / (2 * _EPOCHS * once), *_STEPS))
    step = step_of(steps)
    step.call()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_EPOCHS):
            bare += [seconds_of(step.call) for _ in range(steps)]
            looped.append(_epoch_seconds(step.task, Path(folder), steps * batch_size, seed) / steps)
    facts = {"framework": "mlx", "device": device.device_kind(), "precision": "float32", "samples": batch_size}
    note = f"{_EPOCHS} epochs of {steps} steps, with augmentation"
    return [
        Row(EPOCH, name, **facts, status="timed", note=note, timing=summary(seconds, 1))
        for name, seconds in ((BARE, bare), (LOOPED, looped))
    ]


def _epoch_seconds(task: Task, folder: Path, images: int, seed: int) -> float:
    limits = {"epochs": 1, "patience": 0, "save_every": 10**9, "log_every": 10}
    with redirect_stdout(io.StringIO()), batch_parallel():
        train(task, **limits, seed=seed, run_dir=folder, settings=SECTION)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return images / json.loads(lines[-1])["samples_per_second"]


@dataclass(frozen=True)
class FirstStep:
    """Effect of the first optimizer step.

    Attributes:
        loss: before it.
        moments: Adam's first moments by parameter, which after one step are the clipped gradient times 1 - beta1.
        moved: by how much each parameter and running statistic changed.
    """

    loss: float
    moments: Mapping[str, np.ndarray]
    moved: Mapping[str, np.ndarray]


class _MlxStep:
    """An image task on a copy of a model, and the arguments of one step."""

    def __init__(
        self,
        model: ResNet18,
        cohort: tuple[np.ndarray, np.ndarray],
        settings: TrainingConfig,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        augmentation: AugmentConfig = _STILL,
    ) -> None:
        self.model = ResNet18(model.config)
        self.model.update(model.parameters())
        self.around = around
        images, labels = cohort
        self.task = classifier_task(
            self.model,
            masked_bce(),
            TrainingData(ImageSource(images, np.arange(len(images)), 1e9), labels),
            lambda _: {"loss": 0.0, "macro_auc": 0.5},
            training=settings,
            augmentation=augmentation,
            seed=0,
            keep=lambda path: None,
        )
        self.model.train()
        self.batch = next(iter(self.task.batches(0, 0)))
        mx.eval(self.batch, self.model.state, self.task.optimizer.state)

    def call(self) -> mx.array:
        with self.around():
            loss, norm = self.task.step(*self.batch)
            mx.eval(loss, norm, self.task.model.state, self.task.optimizer.state)
        return loss

    def first_step(self) -> FirstStep:
        """Take the first step; the model is no longer where it started."""
        before = _arrays(self.model)
        loss, after = self.call().item(), _arrays(self.model)
        moments = {
            name.split(".", 2)[2].removesuffix(".m"): np.array(value)
            for name, value in tree_flatten(self.task.optimizer.state)
            if name.endswith(".m")
        }
        return FirstStep(loss, moments, {name: after[name] - before[name] for name in after})


def _arrays(model: ResNet18) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def _mlx_contender(name: str, precision: str, step: _MlxStep, reference: FirstStep) -> Contender:
    return Contender(
        name=name,
        framework="mlx",
        device=device.device_kind(),
        precision=precision,
        call=step.call,
        difference=lambda: step_difference(step.first_step(), reference),
        tolerance=TOLERANCE[precision],
        samples=len(step.batch[0]),
    )


def step_difference(step: FirstStep, reference: FirstStep) -> float:
    """Distance of a first step from another: the largest of four relative differences.

    These are the loss's, the clipped gradient's, the update's and the running statistics', the last three as the root
    of summed squares over that of the reference. Adam's first update is the gradient's sign, so that where the gradient
    is rounding noise it says nothing: updates count by the size of the reference's gradient.

    Returns:
        Infinity where names differ or something is not finite.
    """
    if set(step.moved) != set(reference.moved) or set(step.moments) != set(reference.moments):
        return float("inf")
    weights = reference.moments
    statistics = reference.moved.keys() - weights.keys()
    shares = [
        abs(step.loss - reference.loss) / max(abs(reference.loss), 1e-12),
        _relative((step.moments[name], reference.moments[name], 1.0) for name in weights),
        _relative((step.moved[name], reference.moved[name], weights[name]) for name in weights),
        _relative((step.moved[name], reference.moved[name], 1.0) for name in statistics),
    ]
    return float(max(shares)) if np.isfinite(shares).all() else float("inf")


def _relative(entries: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | float]]) -> float:
    """Root of the summed squares of (got - wanted) * weight, over that of wanted * weight."""
    off = size = 0.0
    for got, wanted, weight in entries:
        off += float(np.sum(((got - wanted) * weight) ** 2))
        size += float(np.sum((wanted * weight) ** 2))
    return (off / max(size, 1e-30)) ** 0.5


class _TorchStep:
    """The same step in PyTorch: normalization, masked cross-entropy, clipping, AdamW with decay on kernels only."""

    def __init__(
        self,
        model: ResNet18,
        cohort: tuple[np.ndarray, np.ndarray],
        settings: TrainingConfig,
        device: str,
        precision: Literal["float32", "float16", "bfloat16"],
    ) -> None:
        torch = import_torch()
        self.torch, self.device, self.precision = torch, device, precision
        self.clip_norm = settings.clip_norm
        self.channels = model.config.in_channels
        self.network = torch_resnet18(model).to(device, memory_format=torch.channels_last).train()
        images, labels = cohort
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        gray = self.channels == 1
        mean, deviation = ([GRAY_MEAN], [GRAY_STD]) if gray else (RGB_MEAN, RGB_STD)
        self.mean, self.deviation = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, deviation)
        )
        kernels = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [
            {"params": kernels, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "float16")

    def call(self) -> Any:
        torch = self.torch
        x = (self.images[:, None].float() / 255 - self.mean) / self.deviation
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, torch_dtype(self.precision), enabled=self.precision != "float32"):
            logits = self.network(x)
        known = ~torch.isnan(self.labels)
        targets = torch.where(known, self.labels, 0.0)
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        loss = torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        synchronize(self.device)
        return loss.detach()

    def first_step(self) -> FirstStep:
        before = self._arrays()
        loss, after = self.call().item(), self._arrays()
        moments = {name: self.optimizer.state[p]["exp_avg"] for name, p in self.network.named_parameters()}
        return FirstStep(
            loss,
            {name: _nhwc(value) for name, value in moments.items()},
            {name: after[name] - before[name] for name in after},
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        state = self.network.state_dict()
        return {name: _nhwc(value) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _nhwc(value: Any) -> np.ndarray:
    array = value.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1).copy() if array.ndim == 4 else array.copy()


def _torch_contender(
    name: str,
    precision: Literal["float32", "float16", "bfloat16"],
    model: ResNet18,
    cohort: tuple[np.ndarray, np.ndarray],
    settings: TrainingConfig,
    reference: FirstStep,
    device: str,
) -> Contender:
    made: list[_TorchStep] = []

    def difference() -> float:
        made.append(_TorchStep(model, cohort, settings, device, precision))
        return step_difference(made[0].first_step(), reference)

    return Contender(
        name=name,
        framework="torch",
        device=device,
        precision=precision,
        call=lambda: made[0].call(),
        difference=difference,
        tolerance=TOLERANCE[precision],
        samples=len(cohort[0]),
    )
