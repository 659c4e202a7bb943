"""The training loop: one compiled step, validated each epoch, resumable to the same weights.

It trains a `Task`: `classifier_task` makes one of a network that reads images, the teacher one of its adapters. A step
depends on the seed and its own number only (order, augmentation, dropout), so a run that was killed and resumed ends
where an unbroken one does. A step is evaluated once; the loss is added up on the device and read once per logging
interval. On several ranks each does its part of the step, and rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import append_jsonl, write_text
from mlx_cxr.training.checkpoint import STATE, Progress, load_state, save_state, share_state
from mlx_cxr.training.distributed import ALONE, World

log = logging.getLogger("mlx_cxr")

_SAY_SECONDS = 30.0


class TrainingDivergedError(UserError, RuntimeError):
    """The loss or its gradient is no longer a number."""


class TrainingDataError(UserError, ValueError):
    """There is nothing to train on, or nothing to choose the best weights by."""


@dataclass(frozen=True)
class Task:
    """A model to train, with its step, its data and its validation.

    Attributes:
        model: trained by `step`; put into training mode before each epoch.
        optimizer: initialized with the model's trainable parameters (`make_optimizer`).
        step: the arrays of one batch -> loss and gradient norm, both scalars. Compiled with the state of model,
            optimizer and `mx.random` as inputs and outputs, which it updates in place.
        batches: (epoch, steps to leave out at its beginning) -> the arguments of `step`, one tuple a step. The same
            each time it is asked.
        steps_per_epoch: number of batches, the same in every epoch.
        samples: (epoch, steps left out) -> samples in the rest of the epoch, for the rate.
        validate: called with the model after each epoch; gives `loss`, `macro_auc`, which is maximized, and any other
            figures to log.
        keep: writes the best weights to a path, atomically.
        best_name: that path, relative to the run's folder.
        trainable_only: leave frozen parameters out of the state to resume from, as a base that can be loaded again.
        tokens: as `samples`, for a rate in tokens beside it.
        unit: name of a sample.
        remedy: advice in the message when the loss is not finite.
        world: the ranks that take a step together; its loss and norm, and what `validate` gives, are those of all.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    step: Callable[..., tuple[mx.array, mx.array]]
    batches: Callable[[int, int], Iterable[tuple[mx.array, ...]]]
    steps_per_epoch: int
    samples: Callable[[int, int], int]
    validate: Callable[[nn.Module], dict[str, float]]
    keep: Callable[[Path], object]
    best_name: str
    trainable_only: bool = False
    tokens: Callable[[int, int], int] | None = None
    unit: str = "sample"
    remedy: str = "lower the learning rate, or use precision float32"
    world: World = ALONE


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run."""

    best_auc: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    stopped_early: bool


def train(
    task: Task,
    *,
    epochs: int,
    seed: int,
    patience: int,
    save_every: int,
    log_every: int,
    run_dir: Path,
    settings: str,
    resume: bool = False,
) -> TrainingResult:
    """Train `task.model` in place and leave its best weights in `run_dir`.

    Args:
        seed: fixes what `mx.random` gives each step.
        patience: epochs without a better validation macro AUC before stopping; 0 never stops early.
        save_every: steps between saves of the state to resume from; each epoch's end is one too.
        log_every: steps between lines of `metrics.jsonl`.
        run_dir: gets `metrics.jsonl`, `task.best_name`, and `last/state.safetensors` to resume from.
        settings: hash of what may not change between a run and its resumption.
        resume: resume from `last/state.safetensors`; otherwise these three files of an earlier run are removed.

    Raises:
        TrainingDivergedError: the loss or its gradient became NaN or infinite; the last saved state stays.
        TrainingDataError: `macro_auc` is NaN, as no label of the validation split has both classes.
        RecordError: nothing to resume, or made with other settings.
        RanksDifferError: the ranks were given other settings, or their weights have come apart.
        RankLostError: another rank is gone.
    """
    world, steps_per_epoch = task.world, task.steps_per_epoch
    state_path, metrics_path, best_path = (run_dir / name for name in (STATE, "metrics.jsonl", task.best_name))

    # Every rank begins as rank 0 does: with fresh weights, or with the last saved state.
    world.check_same("data or settings", settings)
    progress = Progress(settings=settings)
    if world.writes:
        _clear(run_dir, state_path, metrics_path, best_path, resume)
        if resume:
            progress = load_state(state_path, task.model, task.optimizer, settings, task.trainable_only)
            _forget_after(metrics_path, progress.step)
    progress = share_state(progress, task.model, task.optimizer, world, task.trainable_only)
    clock, stopped_early = _Clock(progress.seconds), False

    for epoch in range(progress.step // steps_per_epoch, epochs):
        if stopped_early := 0 < patience <= progress.stale_epochs:
            break

        # Train on the epoch's batches; a resumed run skips those that it has seen.
        skip = progress.step - epoch * steps_per_epoch
        losses = _RunningLoss(progress.sums, skip, min(skip, progress.step % log_every), task.remedy)
        ahead, previous = _device_runs_ahead(), []
        bar = tqdm(
            task.batches(epoch, skip),
            total=steps_per_epoch,
            initial=skip,
            unit="step",
            desc=f"epoch {epoch + 1}/{epochs}",
            leave=False,
            disable=None if world.writes else True,
        )
        task.model.train()
        clock.lap()
        said = time.monotonic()
        for batch in bar:
            # The draws of a step depend on its number, so that a resumed run repeats those of an unbroken one.
            mx.random.seed(int(np.random.SeedSequence([seed, progress.step]).generate_state(1, np.uint64)[0]))
            losses.add(*task.step(*batch))
            progress = replace(progress, step=progress.step + 1)
            ends, logs, saves = (progress.step % every == 0 for every in (steps_per_epoch, log_every, save_every))
            with world.waiting(f"step {progress.step}"):
                stepped = (task.model.state, task.optimizer.state, losses.arrays)
                if ahead and not (ends or logs or saves):
                    # The device computes this step while the next is built; never two of them, or memory would grow.
                    mx.async_eval(*stepped)
                    mx.eval(previous)
                else:
                    mx.eval(*stepped)
                previous = losses.arrays

            # Where no bar is drawn, as in a log file, long epochs say how far they are.
            if bar.disable and world.writes and time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                done = progress.step - epoch * steps_per_epoch
                left = (steps_per_epoch - done) * clock.since_lap() / (done - skip)
                where = (epoch + 1, epochs, done, steps_per_epoch, left / 60)
                log.info("epoch %d/%d: step %d of %d, about %.1f min to its end", *where)

            # Read the loss, which ends the run where it is not finite, before such weights are saved.
            if logs:
                mean, norm = losses.interval(progress.step)
                bar.set_postfix(loss=f"{mean:.4f}")
                if world.writes:
                    append_jsonl(metrics_path, {"kind": "step", "step": progress.step, "loss": mean, "grad_norm": norm})
            if saves and not ends:
                sums = losses.finite_sums(progress.step)
                world.check_same_weights(task.model, task.trainable_only)
                if world.writes:
                    reached = replace(progress, seconds=clock.total(), sums=sums)
                    save_state(state_path, task.model, task.optimizer, reached, task.trainable_only)
        train_loss = losses.epoch(progress.step)
        seconds = clock.lap()

        # Validate, and keep the weights if they are the best so far.
        world.check_same_weights(task.model, task.trainable_only)
        figures = task.validate(task.model)
        if math.isnan(figures["macro_auc"]):
            raise TrainingDataError("the validation macro AUC is undefined: no label has both classes there")
        if improved := figures["macro_auc"] > progress.best_auc:
            standing = {"best_auc": figures["macro_auc"], "best_epoch": epoch + 1, "stale_epochs": 0}
            if world.writes:
                task.keep(best_path)
        else:
            standing = {"stale_epochs": progress.stale_epochs + 1}
        progress = replace(progress, **standing, seconds=clock.total(), sums=(0.0, 0.0, 0.0))

        # Log the epoch, and save the state to resume from.
        record = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": progress.step,
            "train_loss": train_loss,
            **{f"val_{name}": value for name, value in figures.items()},
            "learning_rate": float(task.optimizer.learning_rate),
            "samples_per_second": task.samples(epoch, skip) / seconds,
            **({} if task.tokens is None else {"tokens_per_second": task.tokens(epoch, skip) / seconds}),
            "seconds": progress.seconds,
            "peak_memory_bytes": mx.get_peak_memory(),
            "active_memory_bytes": mx.get_active_memory(),
            "cache_memory_bytes": mx.get_cache_memory(),
        }
        if world.writes:
            append_jsonl(metrics_path, record)
            save_state(state_path, task.model, task.optimizer, progress, task.trainable_only)
            _print_epoch(record, epochs, improved, task.unit)

    return TrainingResult(
        best_auc=progress.best_auc,
        best_epoch=progress.best_epoch,
        epochs=progress.step // steps_per_epoch,
        steps=progress.step,
        seconds=progress.seconds,
        stopped_early=stopped_early,
    )


class _RunningLoss:
    """Sums of loss and gradient norm on the device; reading them raises TrainingDivergedError if one is not finite."""

    def __init__(self, sums: tuple[float, float, float], epoch_steps: int, interval_steps: int, remedy: str) -> None:
        self.arrays = [mx.array(value) for value in sums]
        self._epoch_steps, self._interval_steps = epoch_steps, interval_steps
        self._remedy = remedy

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
                    f"the {what} was {value} by step {step}; {self._remedy}. "
                    "The last saved state and the best weights so far are kept"
                )
        return epoch_loss, interval_loss, interval_norm


class _Clock:
    """Seconds of training, those before a resumption included, and of its laps."""

    def __init__(self, before: float) -> None:
        self._before, self._start, self._lap = before, time.perf_counter(), time.perf_counter()

    def total(self) -> float:
        return self._before + time.perf_counter() - self._start

    def since_lap(self) -> float:
        return time.perf_counter() - self._lap

    def lap(self) -> float:
        lap, self._lap = time.perf_counter() - self._lap, time.perf_counter()
        return lap


def _device_runs_ahead() -> bool:
    """True on a GPU. On the CPU backend the host has nothing else to do, and it would gain nothing."""
    return mx.default_device().type != mx.DeviceType.cpu


def _clear(run_dir: Path, state_path: Path, metrics_path: Path, best_path: Path, resume: bool) -> None:
    """Remove the files of an earlier run, unless it is resumed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        for old in (state_path, metrics_path, best_path):
            old.unlink(missing_ok=True)


def _forget_after(metrics_path: Path, step: int) -> None:
    """Keep the lines up to `step`; those after it are written again."""
    if not metrics_path.exists():
        return
    kept, unread = [], 0
    # What follows the last line's end is a write cut short.
    *lines, _ = metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, TypeError, KeyError):
            unread += 1
    if unread:
        log.warning(
            "%s: left out %d of %d lines, which cannot be read; the training does without",
            metrics_path,
            unread,
            len(lines),
        )
    write_text(metrics_path, "".join(kept))


def _print_epoch(record: dict, epochs: int, improved: bool, unit: str) -> None:
    tokens = f"  {record['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in record else ""
    tqdm.write(
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
        f"val macro AUC {record['val_macro_auc']:.4f}{' *' if improved else '  '}  "
        f"{record['samples_per_second']:.1f} {unit}/s{tokens}  "
        f"peak {record['peak_memory_bytes'] / 1e9:.1f} GB"
    )
