"""Training of a network that reads images: batches from the pixel store, augmentation, and reduced precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_cxr.core.config_schema import AugmentConfig, TrainingConfig
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.ops import batch_norm
from mlx_cxr.ops.switch import fast_ops_enabled
from mlx_cxr.training.augment import augment
from mlx_cxr.training.batches import ImageSource, epoch_order
from mlx_cxr.training.distributed import ALONE, World, share_dropout
from mlx_cxr.training.loop import Task, TrainingDataError
from mlx_cxr.training.losses import Loss
from mlx_cxr.training.optimizer import optimizer_of

_PRECISION = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_FLOAT16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TrainingData:
    """Training images, and rows of targets for the loss in the same order."""

    images: ImageSource
    targets: np.ndarray

    def __post_init__(self) -> None:
        if len(self.images) != len(self.targets):
            raise ValueError(f"{len(self.images)} films but {len(self.targets)} rows of targets")
        if len(self.images) == 0:
            raise TrainingDataError("no training films; look at the manifest's summary for what was dropped and why")


def classifier_task(
    model: nn.Module,
    loss: Loss,
    data: TrainingData,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    training: TrainingConfig,
    augmentation: AugmentConfig,
    seed: int,
    best_name: str = "best_model.safetensors",
    keep: Callable[[Path], object] | None = None,
    world: World = ALONE,
) -> Task:
    """The task of training `model` on images.

    Args:
        model: initialized, frozen where wanted; takes preprocessed images with `model.config.in_channels` channels.
        loss: logits and target rows to a scalar; made for `world`.
        validate: as `Task.validate`.
        training: epochs, batch size, learning rate and the rest. A step counts `batch_size` images, or all of
            them where there are fewer; the last partial batch of an epoch is left out.
        seed: fixes the order of the images.
        best_name: file name of the best weights.
        keep: writes them; None saves `model`, a ResNet-18, with its running statistics.
        world: the ranks that share each batch. On any number of them the same steps are taken, with BatchNorm's
            statistics, dropout and augmentation of the whole batch, up to the order in which sums are added.

    Raises:
        UserError: a batch cannot be shared equally.
    """

    def order(epoch: int, skip: int) -> np.ndarray:
        return epoch_order(len(data.images), training.batch_size, seed, epoch)[skip:]

    def batches(epoch: int, skip: int) -> Iterator[tuple[mx.array, mx.array]]:
        chosen = order(epoch, skip)[:, part]
        for items, images in zip(chosen, data.images.batches(chosen), strict=True):
            yield images, targets[mx.array(items)]

    targets = mx.array(data.targets.astype(np.float32))
    steps_per_epoch, width = order(0, 0).shape
    part = world.part(width, "training.batch_size")
    share_dropout(model, world)
    batch_norm.share_statistics(world.group)
    optimizer = optimizer_of(model, training, steps_per_epoch * training.epochs)
    return Task(
        model=model,
        optimizer=optimizer,
        step=_step(model, optimizer, loss, training, augmentation, world),
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        samples=lambda epoch, skip: order(epoch, skip).size,
        validate=validate,
        keep=keep or (lambda path: save_model(path, model)),
        best_name=best_name,
        unit="img",
        remedy="lower training.learning_rate, or use training.precision: float32",
        world=world,
    )


def _step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    loss: Loss,
    training: TrainingConfig,
    augmentation: AugmentConfig,
    world: World,
) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Make `Task.step`: one compiled graph; with the CPU paths on, only the optimizer's update is compiled.

    MLX's compiler does not support the streams of the parts of a batch (`ops.streams`), and the whole graph was no
    faster there than its operations one by one.
    """
    precision = _PRECISION[training.precision]
    scale = _FLOAT16_LOSS_SCALE if precision == mx.float16 else 1.0

    def lower(weight: mx.array) -> mx.array:
        return weight.astype(precision) if weight.ndim > 1 else weight

    def objective(parameters: dict, images: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_map(lower, parameters))
        return scale * loss(model(images.astype(precision)), targets)

    def gradient(images: mx.array, targets: mx.array) -> tuple[mx.array, dict]:
        images = augment(images, mx.random.split(mx.random.state[0])[0], augmentation, (world.rank, world.size))
        images = preprocess(images, model.config.in_channels)
        parameters = model.trainable_parameters()
        # Frozen kernels are lowered too: one of them in float32 would lift all that follows it.
        kernels = tree_unflatten([(name, w) for name, w in tree_flatten(model.parameters()) if w.ndim > 1])
        model.update(tree_map(lower, kernels))
        value, gradients = mx.value_and_grad(objective)(parameters, images, targets)
        # The objective left the lowered weights in the model; the update is made to the float32 ones.
        model.update(kernels)
        model.update(parameters)
        if scale != 1.0:
            value, gradients = value / scale, tree_map(lambda g: g.astype(mx.float32) / scale, gradients)
        return world.average((value, gradients))

    def descend(gradients: dict) -> mx.array:
        gradients = tree_map(lambda g: g.astype(mx.float32), gradients)
        gradients, norm = optim.clip_grad_norm(gradients, training.clip_norm)
        optimizer.update(model, gradients)
        return norm

    def step(images: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        value, gradients = gradient(images, targets)
        return value, descend(gradients)

    if fast_ops_enabled():
        updated = [model.state, optimizer.state]
        descend = mx.compile(descend, inputs=updated, outputs=updated)
        return step
    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state)
