"""Batches in parts: what a network says and learns does not depend on how its batch is cut."""

from __future__ import annotations

import ctypes
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_cxr.core import device
from mlx_cxr.core.errors import UserError
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize
from mlx_cxr.ops import streams
from mlx_cxr.ops.batch_norm import BatchNorm

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="batches are cut into parts on the CPU backend only"
)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def loss_and_gradients(parts: int, images: mx.array, stride: int) -> tuple[np.ndarray, dict, dict]:
    """Logits, gradients and running statistics of one training pass of a fixed network."""
    model = ResNet18(ResNetConfig(in_channels=images.shape[-1], output_stride=stride))
    initialize(model, seed=3)
    weight = normal(len(images), 14, seed=9)

    def objective(parameters: dict) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        logits = model(images)
        return (logits * weight).sum(), logits

    with streams.batch_parallel(parts) as count:
        assert count == parts
        (_, logits), gradients = mx.value_and_grad(objective)(model.trainable_parameters())
        mx.eval(logits, gradients, model.state)
    statistics = {name: np.array(a) for name, a in tree_flatten(model.parameters()) if "running" in name}
    return np.array(logits), {name: np.array(a) for name, a in tree_flatten(gradients)}, statistics


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float, name: str = "") -> None:
    np.testing.assert_allclose(got, wanted, atol=tolerance * max(np.abs(wanted).max(), 1e-6), err_msg=name)


@pytest.mark.parametrize(("batch", "parts"), [(4, 2), (5, 2), (7, 3), (2, 3)])
@pytest.mark.parametrize(("stride", "channels"), [(32, 1), (16, 3)])
def test_a_training_pass_in_parts_is_that_of_the_whole_batch(batch, parts, stride, channels, monkeypatch):
    # With ReLU, rounding may turn a value near 0 round, which changes all gradients behind it: a smooth one cannot.
    monkeypatch.setattr(nn, "relu", nn.silu)
    images = normal(batch, 64, 64, channels)
    logits, gradients, statistics = loss_and_gradients(parts, images, stride)
    wanted, wanted_gradients, wanted_statistics = loss_and_gradients(1, images, stride)
    assert_close(logits, wanted, 1e-4)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        assert_close(gradients[name], gradient, 1e-4, name)
    for name, value in wanted_statistics.items():
        assert_close(statistics[name], value, 1e-5, name)


def test_batchnorm_over_parts_has_the_statistics_of_all_of_them():
    x = normal(5, 3, 4, 6) * 2 + 3
    norm = BatchNorm(6)
    with streams.batch_parallel(2):
        y = streams.joined(norm.over(streams.split(x)))
        mx.eval(y, norm.state)
    flat = np.array(x).reshape(-1, 6)
    expected = (flat - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 1e-5)
    np.testing.assert_allclose(np.array(y).reshape(-1, 6), expected, atol=1e-5)
    np.testing.assert_allclose(np.array(norm.running_var), 0.9 + 0.1 * flat.var(axis=0, ddof=1), rtol=1e-5)


def test_parts_are_of_like_size_and_in_order():
    x = normal(7, 2)
    with streams.batch_parallel(3):
        parts = streams.split(x)
        assert [len(part) for part in parts] == [2, 2, 3]
        assert mx.array_equal(streams.joined(parts), x).item()
        assert [len(part) for part in streams.split(x[:2])] == [1, 1]
    assert len(streams.split(x)) == 1


def test_each_part_has_a_stream_of_its_own():
    with streams.batch_parallel(2):
        used = []
        streams.each(lambda part: used.append(streams.here()) or part, streams.split(normal(4, 2)))
    assert len(used) == 2
    assert used[0] != used[1]
    assert mx.default_stream(mx.default_device()) not in used


@pytest.fixture
def two_blas_threads():
    """However many the tests' worker has."""
    if (name := device.link_openblas()) is None:
        pytest.skip("no OpenBLAS serves here")
    blas = ctypes.CDLL(name)
    before = blas.openblas_get_num_threads()
    blas.openblas_set_num_threads(2)
    yield
    blas.openblas_set_num_threads(before)


def blas_threads() -> int:
    name = device.link_openblas()
    if name is None:
        pytest.skip("no OpenBLAS serves here")
    return ctypes.CDLL(name).openblas_get_num_threads()


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_has_its_threads_back_afterwards_whatever_happens():
    before = blas_threads()
    assert before == 2
    with streams.batch_parallel(2):
        assert blas_threads() == 1
        with streams.batch_parallel(4) as inner:
            assert inner == 2
        assert blas_threads() == 1
    with pytest.raises(ZeroDivisionError), streams.batch_parallel(2):
        1 / 0  # noqa: B018
    assert blas_threads() == before
    assert len(streams.split(normal(4, 2))) == 1


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("MLX_CXR_STREAMS", "1")
    with streams.batch_parallel() as count:
        assert count == 1
        assert len(streams.split(normal(4, 2))) == 1


@pytest.mark.parametrize("asked", ["garbage", "-3", "0", "1.5"])
def test_a_number_of_streams_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("MLX_CXR_STREAMS", asked)
    with pytest.raises(UserError, match="MLX_CXR_STREAMS"), streams.batch_parallel():
        pass


def test_parts_belong_to_the_context_that_cut_them():
    with streams.batch_parallel(3):
        parts = streams.split(normal(6, 2))
    with pytest.raises(RuntimeError, match="3 parts"):
        streams.each(nn.relu, parts)


def test_another_thread_goes_on_in_one_part_and_blas_has_its_threads_back():
    """MLX gives a stream to the thread that made it, and OpenBLAS's number of threads is one for all of them."""
    before, results = blas_threads(), []

    def work() -> None:
        with streams.batch_parallel(2) as count:
            y = streams.joined(streams.each(nn.relu, streams.split(normal(4, 3))))
            mx.eval(y)
            results.append((count, np.array(y)))

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with streams.batch_parallel(2):
        in_a_thread()
        work()
    in_a_thread()
    assert [count for count, _ in results] == [1, 2, 2]
    for _, result in results:
        np.testing.assert_array_equal(result, np.maximum(np.array(normal(4, 3)), 0))
    assert blas_threads() == before
