"""The training loop: one compiled step, validated each epoch, resumable to the same weights.

What a step does depends on the seed and the step's number only (order, augmentation, dropout), so a run that was
killed and resumed ends where an unbroken one does. The step is compiled with all state as inputs and outputs and
evaluated once; the loss is added up on the device and read once per logging interval.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from mlx_cxr.config_sections import AugmentConfig, TrainingConfig
from mlx_cxr.errors import UserError
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.runs import append_jsonl, write_text
from mlx_cxr.training.augment import augment
from mlx_cxr.training.batches import FilmSource, epoch_order
from mlx_cxr.training.checkpoint import Progress, load_state, save_state
from mlx_cxr.training.losses import Loss

_PRECISION = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_FLOAT16_LOSS_SCALE = 1024.0

Validate = Callable[[ResNet18], dict[str, float]]
"""Model -> figures of the validation split; `macro_auc` among them decides which weights are kept."""


class TrainingDivergedError(UserError, RuntimeError):
    """The loss or its gradient is no longer a number."""


class TrainingDataError(UserError, ValueError):
    """There is nothing to train on, or nothing to choose the best weights by."""


@dataclass(frozen=True)
class TrainingData:
    """What is trained on: the films, and as many rows of targets as the loss takes, in the films' order."""

    films: FilmSource
    targets: np.ndarray

    def __post_init__(self) -> None:
        if len(self.films) != len(self.targets):
            raise ValueError(f"{len(self.films)} films but {len(self.targets)} rows of targets")
        if len(self.films) == 0:
            raise TrainingDataError("no training films; look at the manifest's summary for what was dropped and why")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    best_auc: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    stopped_early: bool


def train(
    model: ResNet18,
    loss: Loss,
    data: TrainingData,
    validate: Validate,
    *,
    training: TrainingConfig,
    augmentation: AugmentConfig,
    seed: int,
    run_dir: Path,
    settings: str,
    best_name: str = "best_model.safetensors",
    resume: bool = False,
) -> TrainingResult:
    """Train `model` in place and leave its best weights in `run_dir`.

    Args:
        model: initialized, frozen where wanted.
        loss: logits and target rows to a scalar.
        data: training films and targets.
        validate: called after each epoch with the model; its `macro_auc` is maximized.
        training: epochs, batch size, learning rate and the rest. A step counts `batch_size` films, or all of
            them where there are fewer; the last partial batch of an epoch is left out.
        augmentation: largest amounts of each random change.
        seed: fixes order, augmentation and dropout.
        run_dir: gets `metrics.jsonl`, `best_name`, and `last/state.safetensors` to resume from.
        settings: hash of what may not change between a run and its resumption.
        best_name: file name of the best weights.
        resume: go on from `last/state.safetensors`; otherwise these three files of an earlier run are removed.

    Raises:
        TrainingDivergedError: the loss or its gradient became NaN or infinite; the last saved state stays.
        TrainingDataError: `macro_auc` is NaN, as no label of the validation split has both classes.
        RunFormatError: nothing to resume, or made with other settings.
    """
    steps_per_epoch = len(epoch_order(len(data.films), training.batch_size, seed, 0))
    total_steps = steps_per_epoch * training.epochs
    optimizer = _optimizer(training, total_steps)
    optimizer.init(model.trainable_parameters())
    run_dir.mkdir(parents=True, exist_ok=True)
    state_path, metrics_path = run_dir / "last" / "state.safetensors", run_dir / "metrics.jsonl"
    # What kills in the middle of a save left behind, 130 MB each.
    for stray in (*run_dir.glob(".*.safetensors"), *state_path.parent.glob(".*.safetensors")):
        stray.unlink()
    progress = Progress(settings=settings)
    if resume:
        progress = load_state(state_path, model, optimizer, settings)
        _forget_after(metrics_path, progress.step)
    else:
        for old in (state_path, metrics_path, run_dir / best_name):
            old.unlink(missing_ok=True)
    step = _compiled_step(model, optimizer, loss, training, augmentation)
    targets = mx.array(data.targets.astype(np.float32))
    clock = _Clock(progress.seconds)
    stopped_early = False

    for epoch in range(progress.step // steps_per_epoch, training.epochs):
        if stopped_early := _out_of_patience(progress, training):
            break
        order = epoch_order(len(data.films), training.batch_size, seed, epoch)
        skip = progress.step - epoch * steps_per_epoch
        losses = _RunningLoss(progress.sums, skip, min(skip, progress.step % training.log_every))
        bar = tqdm(
            total=order.size,
            initial=skip * order.shape[1],
            unit="img",
            desc=f"epoch {epoch + 1}/{training.epochs}",
            leave=False,
            disable=None,
        )
        model.train()
        clock.lap()
        for items, films in zip(order[skip:], data.films.batches(order[skip:]), strict=True):
            mx.random.seed(_step_seed(seed, progress.step))
            losses.add(*step(films, targets[mx.array(items)]))
            mx.eval(model.state, optimizer.state, losses.arrays)
            progress = replace(progress, step=progress.step + 1)
            bar.update(len(items))
            if progress.step % training.log_every == 0:
                mean, norm = losses.interval(progress.step)
                bar.set_postfix(loss=f"{mean:.4f}")
                append_jsonl(metrics_path, {"kind": "step", "step": progress.step, "loss": mean, "grad_norm": norm})
            if progress.step % training.save_every == 0 and progress.step % steps_per_epoch:
                sums = losses.finite_sums(progress.step)
                save_state(state_path, model, optimizer, replace(progress, seconds=clock.total(), sums=sums))
        bar.close()
        train_loss = losses.epoch(progress.step)
        rate = (len(order) - skip) * order.shape[1] / clock.lap()
        figures = validate(model)
        if math.isnan(figures["macro_auc"]):
            raise TrainingDataError("the validation macro AUC is undefined: no label has both classes there")
        improved = figures["macro_auc"] > progress.best_auc
        if improved:
            save_model(run_dir / best_name, model)
        progress = replace(
            progress,
            best_auc=figures["macro_auc"] if improved else progress.best_auc,
            best_epoch=epoch + 1 if improved else progress.best_epoch,
            stale_epochs=0 if improved else progress.stale_epochs + 1,
            seconds=clock.total(),
            sums=(0.0, 0.0, 0.0),
        )
        record = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": progress.step,
            "train_loss": train_loss,
            **{f"val_{name}": value for name, value in figures.items()},
            "learning_rate": float(optimizer.learning_rate),
            "images_per_second": rate,
            "seconds": progress.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
            "active_memory_bytes": mx.get_active_memory(),
            "cache_memory_bytes": mx.get_cache_memory(),
        }
        append_jsonl(metrics_path, record)
        save_state(state_path, model, optimizer, progress)
        _say_epoch(record, training.epochs, improved)

    return TrainingResult(
        best_auc=progress.best_auc,
        best_epoch=progress.best_epoch,
        epochs=progress.step // steps_per_epoch,
        steps=progress.step,
        seconds=progress.seconds,
        stopped_early=stopped_early,
    )


def _optimizer(training: TrainingConfig, total_steps: int) -> optim.Optimizer:
    """AdamW with warm-up and cosine; weight decay on kernels only, not on BatchNorm or biases."""
    warmup = max(1, round(training.warmup_fraction * total_steps))
    peak, last = training.learning_rate, training.final_learning_rate

    def schedule(step: mx.array) -> mx.array:
        rising = peak * (step + 1) / warmup
        done = mx.minimum((step + 1 - warmup) / max(total_steps - warmup, 1), 1.0)
        falling = last + 0.5 * (peak - last) * (1 + mx.cos(math.pi * done))
        return mx.where(step < warmup, rising, falling)

    decayed = optim.AdamW(schedule, weight_decay=training.weight_decay, bias_correction=True)
    plain = optim.AdamW(schedule, weight_decay=0.0, bias_correction=True)
    return optim.MultiOptimizer([decayed, plain], [lambda _, weight: weight.ndim > 1])


def _compiled_step(
    model: ResNet18, optimizer: optim.Optimizer, loss: Loss, training: TrainingConfig, augmentation: AugmentConfig
) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    precision = _PRECISION[training.precision]
    scale = _FLOAT16_LOSS_SCALE if precision == mx.float16 else 1.0

    def lower(weight: mx.array) -> mx.array:
        return weight.astype(precision) if weight.ndim > 1 else weight

    def objective(parameters: dict, films: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_map(lower, parameters))
        return scale * loss(model(films.astype(precision)), targets)

    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(films: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        films = augment(films, mx.random.split(mx.random.state[0])[0], augmentation)
        films = preprocess(films, model.config.in_channels)
        parameters = model.trainable_parameters()
        # Frozen kernels are lowered too: one of them in float32 would lift all that follows it.
        kernels = tree_unflatten([(name, w) for name, w in tree_flatten(model.parameters()) if w.ndim > 1])
        model.update(tree_map(lower, kernels))
        value, gradients = mx.value_and_grad(objective)(parameters, films, targets)
        # The objective left the lowered weights in the model; the update is made to the float32 ones.
        model.update(kernels)
        model.update(parameters)
        gradients = tree_map(lambda g: g.astype(mx.float32) / scale, gradients)
        gradients, norm = optim.clip_grad_norm(gradients, training.clip_norm)
        optimizer.update(model, gradients)
        return value / scale, norm

    return step


class _RunningLoss:
    """Sums on the device, read once per interval and before a save, where one that is no number ends the run."""

    def __init__(self, sums: tuple[float, float, float], epoch_steps: int, interval_steps: int) -> None:
        self.arrays = [mx.array(value) for value in sums]
        self._epoch_steps, self._interval_steps = epoch_steps, interval_steps

    def add(self, loss: mx.array, norm: mx.array) -> None:
        epoch_loss, interval_loss, interval_norm = self.arrays
        self.arrays = [epoch_loss + loss, interval_loss + loss, interval_norm + norm]
        self._epoch_steps += 1
        self._interval_steps += 1

    def interval(self, step: int) -> tuple[float, float]:
        _, loss, norm = self.finite_sums(step)
        steps, self._interval_steps = self._interval_steps, 0
        self.arrays[1] = self.arrays[2] = mx.array(0.0)
        return loss / steps, norm / steps

    def epoch(self, step: int) -> float:
        return self.finite_sums(step)[0] / self._epoch_steps

    def finite_sums(self, step: int) -> tuple[float, float, float]:
        epoch_loss, interval_loss, interval_norm = (array.item() for array in self.arrays)
        for value, what in ((epoch_loss, "loss"), (interval_norm, "gradient's norm")):
            if not math.isfinite(value):
                raise TrainingDivergedError(
                    f"the {what} was {value} by step {step}; lower training.learning_rate, or use training.precision: "
                    "float32. The last saved state and the best weights so far are kept"
                )
        return epoch_loss, interval_loss, interval_norm


class _Clock:
    def __init__(self, before: float) -> None:
        self._before, self._start, self._lap = before, time.perf_counter(), time.perf_counter()

    def total(self) -> float:
        return self._before + time.perf_counter() - self._start

    def lap(self) -> float:
        lap, self._lap = time.perf_counter() - self._lap, time.perf_counter()
        return lap


def _out_of_patience(progress: Progress, training: TrainingConfig) -> bool:
    return 0 < training.patience <= progress.stale_epochs


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _forget_after(metrics_path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last save: those steps are done again."""
    if metrics_path.exists():
        # A killed writer can leave a last line without its end.
        lines = [line for line in metrics_path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(metrics_path, "".join(f"{line}\n" for line in kept))


def _say_epoch(record: dict, epochs: int, improved: bool) -> None:
    tqdm.write(
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
        f"val macro AUC {record['val_macro_auc']:.4f}{' *' if improved else '  '}  "
        f"{record['images_per_second']:.0f} img/s  peak {record['peak_memory_bytes'] / 1e9:.1f} GB"
    )
