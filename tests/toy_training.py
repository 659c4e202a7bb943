"""A task that is learned in seconds, a network that trains in milliseconds, and a run of the loop on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.core.config_schema import AugmentConfig, TrainingConfig
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.models.resnet import ResNetConfig
from mlx_cxr.ops import conv
from mlx_cxr.ops.batch_norm import BatchNorm
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.classifier_task import TrainingData, classifier_task
from mlx_cxr.training.distributed import ALONE, World
from mlx_cxr.training.loop import TrainingResult, train
from mlx_cxr.training.losses import Loss, masked_bce
from mlx_cxr.training.scoring import predict_logits

NO_AUGMENTATION = AugmentConfig(shift=0, scale=0, rotate=0, brightness=0, contrast=0)
UNTIMED = (
    *("seconds", "samples_per_second", "tokens_per_second"),
    *("peak_memory_bytes", "active_memory_bytes", "cache_memory_bytes"),
)


def square_images(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one bright square: label 0 says that it is in the left half, label 1 in the right; the rest are 0.

    Returns:
        uint8 (count, side, side) and float32 (count, 14).
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 140, (count, side, side)).astype(np.uint8)
    targets = np.zeros((count, 14), np.float32)
    size = side // 4
    for image, target in zip(images, targets, strict=True):
        right = int(rng.integers(0, 2))
        row = int(rng.integers(2, side - size - 2))
        column = int(rng.integers(1, side // 2 - size)) + right * (side // 2)
        image[row : row + size, column : column + size] = 230
        target[right] = 1
    return images, targets


def source(images: np.ndarray, budget_gb: float = 1.0) -> ImageSource:
    """All of `images`, in their order."""
    return ImageSource(images, np.arange(len(images)), budget_gb)


def validator(images: np.ndarray, targets: np.ndarray, world: World = ALONE) -> Callable[[nn.Module], dict[str, float]]:
    """As the stage's: loss and macro AUC of a split."""
    held_out = source(images)

    def validate(model: nn.Module) -> dict[str, float]:
        logits = predict_logits(model, held_out, 16, world)
        loss = float(np.mean(np.logaddexp(0, logits) - targets * logits))
        return {"loss": loss, "macro_auc": macro_auc(roc_auc_per_label(targets, logits))}

    return validate


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, dropout and a linear layer, for 16 px images; to the loop as the ResNet."""

    def __init__(self, seed: int = 0, dropout: float = 0.2) -> None:
        super().__init__()
        self.config = ResNetConfig()
        mx.random.seed(seed)
        self.conv1 = conv.Conv3x3(1, 4, 2)
        self.bn1 = BatchNorm(4)
        self.blocks = [conv.Conv3x3(4, 8, 2), BatchNorm(8)]
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * 4 * 8, 14)
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.bn1(self.conv1(x)))
        for layer in self.blocks:
            x = layer(x)
        return self.fc(self.dropout(nn.relu(x).reshape(x.shape[0], -1)))


TINY = square_images(20, 16, 0)
TINY_VALIDATION = square_images(24, 16, 1)


def run_tiny(
    run_dir: Path,
    *,
    model: nn.Module | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = False,
    settings: str = "same",
    seed: int = 3,
    targets: np.ndarray | None = None,
    augmentation: AugmentConfig | None = None,
    world: World = ALONE,
    **training: Any,
) -> tuple[nn.Module, TrainingResult]:
    """The loop on the toy task: by default 2 epochs of 5 steps, saved every 3 steps, logged every 2."""
    model = model or TinyNet()
    chosen = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3, "log_every": 2} | training
    result = train_images(
        model,
        masked_bce(world=world),
        TrainingData(source(TINY[0]), TINY[1] if targets is None else targets),
        validate or validator(*TINY_VALIDATION, world),
        training=TrainingConfig(**chosen),
        augmentation=augmentation or AugmentConfig(),
        seed=seed,
        run_dir=run_dir,
        settings=settings,
        resume=resume,
        world=world,
    )
    return model, result


def train_images(
    model: nn.Module,
    loss: Loss,
    data: TrainingData,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    training: TrainingConfig,
    augmentation: AugmentConfig,
    seed: int,
    run_dir: Path,
    settings: str = "",
    resume: bool = False,
    world: World = ALONE,
) -> TrainingResult:
    """The loop on images, as the stage runs it."""
    return train(
        classifier_task(
            model, loss, data, validate, training=training, augmentation=augmentation, seed=seed, world=world
        ),
        epochs=training.epochs,
        seed=seed,
        patience=training.patience,
        save_every=training.save_every,
        log_every=training.log_every,
        run_dir=run_dir,
        settings=settings,
        resume=resume,
    )


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter and running statistic by name."""
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def metrics(run_dir: Path, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without what differs from run to run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines if timed else [{k: v for k, v in line.items() if k not in UNTIMED} for line in lines]


def assert_same_weights(got: nn.Module, wanted: nn.Module) -> None:
    """Bit by bit, by name."""
    ours, theirs = arrays(got), arrays(wanted)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
