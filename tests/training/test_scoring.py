"""Logits of many images: the same however they are cut into batches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.models.resnet import GRAY_MEAN, GRAY_STD, ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.scoring import predict_logits

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 32, 32)).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> ResNet18:
    model = ResNet18(ResNetConfig(dropout=0.5))
    initialize(model, 0)
    # Running statistics away from their start, so that the batch's own would be another answer.
    model.train()
    mx.eval(model(preprocess(mx.array(IMAGES), 1)), model.state)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_batches_with_a_partial_last_one_equal_one_by_one(model, batch_size):
    source = ImageSource(IMAGES, np.array([6, 0, 3, 1, 5]), 1.0)
    got = predict_logits(model, source, batch_size)
    assert got.dtype == np.float32
    assert got.shape == (5, 14)
    model.eval()
    for row, image in enumerate([6, 0, 3, 1, 5]):
        wanted = model(preprocess(mx.array(IMAGES[image : image + 1]), 1))
        np.testing.assert_allclose(got[row], np.array(wanted)[0], rtol=1e-4, atol=1e-4)


def test_no_images_give_no_rows(model):
    assert predict_logits(model, ImageSource(IMAGES, np.array([], dtype=int), 1.0), 4).shape == (0, 14)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_statistics_are_left_alone(model, training):
    model.train(training)
    before = np.array(model.bn1.running_mean)
    first = predict_logits(model, ImageSource(IMAGES, np.arange(5), 1.0), 2)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    np.testing.assert_array_equal(np.array(model.bn1.running_mean), before)
    # Neither dropout nor batch statistics: a second call gives the same.
    np.testing.assert_array_equal(predict_logits(model, ImageSource(IMAGES, np.arange(5), 1.0), 2), first)


def test_the_mode_is_restored_after_an_error(model):
    model.train()
    with pytest.raises(IndexError):
        predict_logits(model, ImageSource(IMAGES, np.array([0, 99]), 0.0), 1)
    assert model.training


def test_weights_changed_between_calls_are_seen(model):
    source = ImageSource(IMAGES, np.arange(3), 1.0)
    before = predict_logits(model, source, 3)
    model.fc.bias = model.fc.bias + 1
    np.testing.assert_allclose(predict_logits(model, source, 3), before + 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("images", "ranks"), [(7, 3), (2, 3), (0, 2), (6, 2)])
def test_ranks_score_their_share_and_no_more(model, images, ranks):
    """Each rank by itself, its rows given back as they are: together they are all rows, once."""

    @dataclass(frozen=True)
    class Part:
        rank: int
        size: int

        def rows_of_all(self, values: np.ndarray, mine: np.ndarray) -> np.ndarray:
            return np.where(mine[:, None], values, np.nan)

    passes = []
    toy = CountingNetwork(passes)
    source = ImageSource(IMAGES, np.arange(images), 1.0)
    parts = [predict_logits(toy, source, 2, Part(rank, ranks)) for rank in range(ranks)]
    assert sum(passes) <= images + ranks, "the last batch of a rank is filled up, nothing else"
    known = [~np.isnan(part) for part in parts]
    assert (np.sum(known, axis=0) == 1).all()
    wanted = IMAGES[:images].mean(axis=(1, 2), dtype=np.float64)
    for part, mine in zip(parts, known, strict=True):
        np.testing.assert_allclose(part[mine[:, 0], 0], wanted[mine[:, 0]], rtol=1e-4)


class CountingNetwork(nn.Module):
    """Says how bright an image is, and how many images it was asked about."""

    def __init__(self, passes: list[int]) -> None:
        super().__init__()
        self._passes = passes
        self.config = ResNetConfig()

    def __call__(self, x: mx.array) -> mx.array:
        self._passes.append(len(x))
        level = (mx.mean(x, axis=(1, 2, 3)) * GRAY_STD + GRAY_MEAN) * 255
        return mx.broadcast_to(level[:, None], (len(x), 14))
