"""A student that also gives features, for the cosine distance to its teacher's."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cxr.models.resnet import ResNet18, ResNetConfig


class FeatureStudent(nn.Module):
    """A ResNet-18 with a linear projection of its pooled features, which only training needs.

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
