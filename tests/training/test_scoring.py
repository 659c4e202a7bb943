"""Logits of many films: the same however they are cut into batches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.training.batches import FilmSource
from mlx_cxr.training.scoring import predict_logits

FILMS = np.random.default_rng(0).integers(0, 256, (7, 32, 32)).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> ResNet18:
    model = ResNet18(ResNetConfig(dropout=0.5))
    initialize(model, 0)
    # Running statistics away from their start, so that the batch's own would be another answer.
    model.train()
    mx.eval(model(preprocess(mx.array(FILMS), 1)), model.state)
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_batches_with_a_partial_last_one_equal_one_by_one(model, batch_size):
    source = FilmSource(FILMS, np.array([6, 0, 3, 1, 5]), 1.0)
    got = predict_logits(model, source, batch_size)
    assert got.dtype == np.float32
    assert got.shape == (5, 14)
    model.eval()
    for row, film in enumerate([6, 0, 3, 1, 5]):
        wanted = model(preprocess(mx.array(FILMS[film : film + 1]), 1))
        np.testing.assert_allclose(got[row], np.array(wanted)[0], rtol=1e-4, atol=1e-4)


def test_no_films_give_no_rows(model):
    assert predict_logits(model, FilmSource(FILMS, np.array([], dtype=int), 1.0), 4).shape == (0, 14)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_statistics_are_left_alone(model, training):
    model.train(training)
    before = np.array(model.bn1.running_mean)
    first = predict_logits(model, FilmSource(FILMS, np.arange(5), 1.0), 2)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    np.testing.assert_array_equal(np.array(model.bn1.running_mean), before)
    # Neither dropout nor batch statistics: a second call gives the same.
    np.testing.assert_array_equal(predict_logits(model, FilmSource(FILMS, np.arange(5), 1.0), 2), first)


def test_the_mode_is_restored_after_an_error(model):
    model.train()
    with pytest.raises(IndexError):
        predict_logits(model, FilmSource(FILMS, np.array([0, 99]), 0.0), 1)
    assert model.training


def test_weights_changed_between_calls_are_seen(model):
    source = FilmSource(FILMS, np.arange(3), 1.0)
    before = predict_logits(model, source, 3)
    model.fc.bias = model.fc.bias + 1
    np.testing.assert_allclose(predict_logits(model, source, 3), before + 1, rtol=1e-4, atol=1e-4)
