"""A student: its network, where it also gives features, its loss and its training section."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cxr.core.config import Config
from mlx_cxr.core.config_schema import DistillationConfig, TrainingConfig
from mlx_cxr.models.resnet import ResNet18, ResNetConfig
from mlx_cxr.training.distributed import ALONE, World
from mlx_cxr.training.losses import Loss, distillation_loss, masked_bce
from mlx_cxr.training.student_soft_labels import StudentSoftLabels


class FeatureStudent(nn.Module):
    """A ResNet-18 with a linear projection of its pooled features, held against its teacher's in training only.

    `model(x)` is (B, 14 + H): the logits, then the projection.

    Args:
        student: the network; trained in place.
        size: H, of the teacher's features.
        seed: of the projection.
    """

    def __init__(self, student: ResNet18, size: int, seed: int) -> None:
        super().__init__()
        self.student = student
        self.projection = nn.Linear(student.fc.weight.shape[1], size, bias=False)
        bound = 1 / np.sqrt(self.projection.weight.shape[1])
        drawn = np.random.default_rng([seed, size]).uniform(-bound, bound, self.projection.weight.shape)
        self.projection.weight = mx.array(drawn.astype(np.float32))

    @property
    def config(self) -> ResNetConfig:
        """Configuration of the student."""
        return self.student.config

    def __call__(self, x: mx.array) -> mx.array:
        maps = self.student.features(x)
        return mx.concatenate([self.student.head(maps), self.projection(mx.mean(maps, axis=(1, 2)))], axis=1)


def loss_and_targets(
    settings: DistillationConfig,
    hard: np.ndarray,
    soft: StudentSoftLabels | None,
    positive_weight: np.ndarray | None,
    world: World = ALONE,
) -> tuple[Loss, np.ndarray]:
    """The loss of a student, and its target rows: the hard labels alone where there are no soft ones.

    Args:
        hard: float32 (N, 14) in [0, 1], NaN for no information.
        soft: of the same N images; None for a student of hard labels.
        positive_weight: (14,) weights of the positives of `hard`; None for equal ones.
    """
    if soft is None:
        return masked_bce(positive_weight, world), hard
    weight = 0.0 if soft.features is None else settings.feature_weight
    parts = [hard, soft.logits, *([] if soft.features is None else [soft.features])]
    loss = distillation_loss(settings.alpha, settings.temperature, positive_weight, weight, world)
    return loss, np.concatenate(parts, 1)


def training_of_student(config: Config) -> TrainingConfig:
    """The training section with the epochs and the learning rate of the distillation section, where it has them."""
    section = config.distillation
    changes = {"epochs": section.epochs, "learning_rate": section.learning_rate}
    return config.training.model_copy(update={key: value for key, value in changes.items() if value is not None})
