"""The student with a projection is the student, with features beside its logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.training.student import FeatureStudent


def test_logits_are_the_students_and_features_a_projection_of_its_pooled_ones():
    student = ResNet18(ResNetConfig())
    initialize(student, 0)
    model = FeatureStudent(student, 6, 0).eval()
    x = preprocess(mx.array(np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)), 1)
    out = np.array(model(x))
    np.testing.assert_allclose(out[:, :14], np.array(student(x)), rtol=1e-5, atol=1e-6)
    pooled = np.array(student.features(x)).mean(axis=(1, 2))
    np.testing.assert_allclose(out[:, 14:], pooled @ np.array(model.projection.weight).T, rtol=1e-4, atol=1e-5)
    assert model.config is student.config
    again = FeatureStudent(student, 6, 0)
    np.testing.assert_array_equal(np.array(again.projection.weight), np.array(model.projection.weight))
    assert np.abs(np.array(model.projection.weight)).max() <= 1 / np.sqrt(512)
