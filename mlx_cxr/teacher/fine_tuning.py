"""LoRA fine-tuning as a task of the training loop: bucketed batches, accumulated gradients, masked cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.ops.activations import compiled
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.dataset import Studies
from mlx_cxr.teacher.lora import WEIGHTS, save_adapter
from mlx_cxr.teacher.prompt import Prompt, PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings, shared_score
from mlx_cxr.teacher.teacher_run import ADAPTER
from mlx_cxr.training.distributed import ALONE, World
from mlx_cxr.training.loop import Task, TrainingDataError
from mlx_cxr.training.losses import Loss
from mlx_cxr.training.optimizer import optimizer_of
from mlx_cxr.training.scoring import validation

_SORTED_TOGETHER = 16
"""Batches whose studies are sorted by length among themselves: little padding, and still a random order."""


def lora_task(
    base: Base,
    form: PromptFormat,
    studies: Studies,
    targets: np.ndarray,
    images: np.ndarray | None,
    loss: Loss,
    validate: Callable[[nn.Module], dict[str, float]],
    config: TeacherConfig,
    seed: int,
    world: World = ALONE,
    image_rows: np.ndarray | None = None,
) -> Task:
    """The task of training the adapters on `base.model`.

    Args:
        base: with adapters attached.
        targets: float32 (N, 14) in [0, 1], NaN where unknown.
        images: float16 (M, T, H) embeddings, or None for a teacher that reads text only.
        seed: of the order of the studies.
        world: the ranks that share the forward passes of each step.
        image_rows: int (N,), the row of `images` of each study, so that they need not be copied; None for its own.

    Raises:
        TrainingDataError: no studies.
        UserError: the passes of a step cannot be shared equally.
    """
    training = config.training
    plan = BatchPlan(studies.lengths(), training.batch_size, training.accumulate, seed)
    # Of the passes of a step, those of this rank.
    part = world.part(plan.accumulate, "teacher.training.accumulate")
    optimizer = optimizer_of(base.model, training, plan.steps * training.epochs)

    def batches(epoch: int, skip: int) -> Iterator[tuple[mx.array, ...]]:
        for group in plan.epoch(epoch)[skip:]:
            arrays: list[mx.array] = []
            for items in group[part]:
                arrays += batch_arrays([studies.prompts[i] for i in items], training.bucket)
                arrays.append(mx.array(targets[items]))
                if images is not None:
                    arrays.append(mx.array(images[items if image_rows is None else image_rows[items]]))
            yield tuple(arrays)

    def tokens(epoch: int, skip: int) -> int:
        return int(sum(plan.lengths[items].sum() for group in plan.epoch(epoch)[skip:] for items in group))

    return Task(
        model=base.model,
        optimizer=optimizer,
        step=accumulating_step(base.model, form, optimizer, loss, config, arrays=3 + (images is not None), world=world),
        batches=batches,
        steps_per_epoch=plan.steps,
        samples=lambda epoch, skip: (plan.steps - skip) * plan.accumulate * plan.batch_size,
        validate=validate,
        keep=lambda path: save_adapter(path.parent, base.model, base.identity),
        best_name=f"{ADAPTER}/{WEIGHTS}",
        trainable_only=True,
        tokens=tokens,
        unit="studies",
        remedy="lower teacher.training.learning_rate, or use teacher.training.precision: float32",
        world=world,
    )


class BatchPlan:
    """Studies of each forward pass and step, a function of seed and epoch alone.

    Attributes:
        lengths: int (N,), tokens of each study's prompt.
        batch_size: studies per forward pass; all of them where there are fewer.
        accumulate: forward passes per step; as many as there are where there are fewer.
        steps: per epoch; the remainder is left out of this epoch.

    Raises:
        TrainingDataError: no studies.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, accumulate: int, seed: int) -> None:
        if not len(lengths):
            raise TrainingDataError("no training study can be read; look at the manifest's summary for the reports")
        self.lengths, self.seed = lengths, seed
        self.batch_size = min(batch_size, len(lengths))
        passes = len(lengths) // self.batch_size
        self.accumulate = min(accumulate, passes)
        self.steps = passes // self.accumulate

    def epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """Per step, per forward pass: the studies, of like length within a pass."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        window = self.batch_size * _SORTED_TOGETHER
        passes: list[np.ndarray] = []
        for start in range(0, len(order) // self.batch_size * self.batch_size, window):
            items = order[start : start + window]
            items = items[np.argsort(self.lengths[items], kind="stable")]
            passes += [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]
        passes = [items for items in passes if len(items) == self.batch_size]
        mixed = [passes[i] for i in rng.permutation(len(passes))]
        return [mixed[i * self.accumulate : (i + 1) * self.accumulate] for i in range(self.steps)]


def batch_arrays(prompts: Sequence[Prompt], bucket: int) -> list[mx.array]:
    """Token ids (B, L) and positions read (B, 14) of a batch."""
    batch = padded(prompts, bucket)
    return [mx.array(batch.ids), mx.array(batch.read)]


def accumulating_step(
    model: nn.Module,
    form: PromptFormat,
    optimizer: optim.Optimizer,
    loss: Loss,
    config: TeacherConfig,
    arrays: int,
    world: World = ALONE,
) -> Callable[..., tuple[mx.array, mx.array]]:
    """A step over several forward passes, whose mean loss it descends; one pass is in memory at a time.

    Args:
        model: with adapters, the only weights that are not frozen; `optimizer` is initialized with them.
        arrays: how many of the arguments belong to one pass: ids, read, targets and, with images, embeddings.
        world: the ranks, each of which is given as many of the step's passes, in their order.
    """
    language = model.language_model
    direction = answer_direction(language, form.yes, form.no)

    def objective(ids: mx.array, read: mx.array, targets: mx.array, *image: mx.array) -> mx.array:
        embeddings = prompt_embeddings(language, form, ids, *image)
        checkpoint = config.training.gradient_checkpointing
        return loss(finding_logits(language, embeddings, read, direction, checkpoint, form.shared(len(ids))), targets)

    state = [model.state, mx.random.state]

    @partial(compiled, inputs=state, outputs=state)
    def gradient(*batch: mx.array) -> tuple[mx.array, dict]:
        return nn.value_and_grad(model, objective)(*batch)

    updated = [model.state, optimizer.state]

    @partial(compiled, inputs=updated, outputs=updated)
    def update(gradients: dict) -> mx.array:
        gradients, norm = optim.clip_grad_norm(gradients, config.training.clip_norm)
        optimizer.update(model, gradients)
        return norm

    def step(*batches: mx.array) -> tuple[mx.array, mx.array]:
        passes = [batches[i : i + arrays] for i in range(0, len(batches), arrays)]
        total, summed = mx.array(0.0), None
        # A pass draws one key (`decode`): those of the passes before, on other ranks, are left out.
        for _ in range(world.rank * len(passes)):
            mx.random.state[0][:] = mx.random.split(mx.random.state[0])[0]
        for batch in passes:
            value, gradients = gradient(*batch)
            summed = gradients if summed is None else tree_map(mx.add, summed, gradients)
            total = total + value
            mx.eval(total, summed, mx.random.state)
        mean, gradients = world.average((total / len(passes), tree_map(lambda g: g / len(passes), summed)))
        return mean, update(gradients)

    return step


def validator(
    base: Base,
    form: PromptFormat,
    studies: Studies,
    images: np.ndarray | None,
    config: TeacherConfig,
    world: World = ALONE,
) -> Callable[[nn.Module], dict[str, float]]:
    """The loop's validation on some studies; raises as `validation`."""
    return validation(
        lambda _: shared_score(base, form, studies.prompts, images, config, world).logits,
        studies.raw_labels,
        "studies",
        "teacher.training.learning_rate",
        f"{len(studies)} validation studies can be read and have both classes of no label, so the best weights "
        "cannot be chosen; give more studies or another split",
    )
