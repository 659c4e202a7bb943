"""Each section on small images: what is compared is what it says, and what is wrong is found."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.bench import contenders, grad_cam, inference, input_data, teacher, training
from mlx_cxr.bench.contenders import Row, stock_operations
from mlx_cxr.bench.run_all import random_network
from mlx_cxr.core.config_schema import FineTuningConfig, TeacherConfig, TinyTeacherConfig, TrainingConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.models.resnet import ResNetConfig
from mlx_cxr.ops import conv, switch

SIZE = 48
PEAKS = {("mlx", "float32"): 100.0, ("torch", "float32"): 100.0}


@pytest.fixture(scope="module")
def model():
    return random_network(ResNetConfig(), 0)


@pytest.fixture
def uncompiled(torch, monkeypatch):
    """`torch.compile` takes half a minute, and is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    return torch


@pytest.fixture
def patient(monkeypatch):
    """Nothing is left out, however busy the machine."""
    monkeypatch.setattr(contenders, "_too_slow", lambda seconds, budget: "")


def by_name(rows: list[Row], samples: int) -> dict[str, Row]:
    return {row.name: row for row in rows if row.samples == samples}


def test_inference_times_both_frameworks_and_all_of_them_agree(uncompiled, model, patient):
    rows = inference.measure(model, SIZE, (1, 2), "cpu", PEAKS, 10.0, 1.0)
    assert {row.samples for row in rows} == {1, 2}
    found = by_name(rows, 1)
    assert {inference.STOCK, inference.PLAIN, inference.EAGER, inference.CHANNELS_LAST} <= set(found)
    assert {row.status for row in rows} == {"timed"}, [(row.name, row.note) for row in rows]
    for name in (inference.STOCK, inference.FOLDED, inference.COMPILED, inference.CHANNELS_LAST, inference.INDUCTOR):
        row = found[name]
        assert row.timing.rounds >= 3
        assert row.difference < 1e-4
        assert row.bound_seconds > 0
        assert row.share_of_peak == pytest.approx(row.flops / row.timing.median / 1e9 / 100)
    half = [row for row in rows if row.precision != "float32" and row.difference is not None]
    assert {row.precision for row in half} == {"float16", "bfloat16"}
    assert all(1e-5 < row.difference < row.tolerance for row in half), "they did compute in half precision"


def test_a_contender_with_other_weights_is_wrong_and_not_timed(uncompiled, model, monkeypatch):
    real = inference.torch_resnet18

    def other(network: object) -> object:
        made = real(network)
        made.fc.bias.data[3] += 0.1
        return made

    monkeypatch.setattr(inference, "torch_resnet18", other)
    rows = inference.measure(model, SIZE, (1,), "cpu", PEAKS, 10.0, 0.3)
    wrong = {row.name for row in rows if row.status == "wrong"}
    assert wrong >= {inference.EAGER, inference.CHANNELS_LAST}
    assert not {row.name for row in rows if row.framework == "mlx"} & wrong
    assert all(row.timing is None for row in rows if row.name in wrong)


def test_stock_means_stock_and_fast_operations_come_back():
    with stock_operations():
        assert not switch.fast_ops_enabled()
    assert switch._enabled
    with pytest.raises(RuntimeError), stock_operations():
        raise RuntimeError
    assert switch._enabled


def test_torch_compile_stops_when_its_time_is_used_up():
    compiler = inference.TorchCompiler(limit=1e-9)
    assert compiler.first_run(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="of 0 allowed"):
        compiler.first_run(lambda: 3)


def test_training_steps_agree_with_pytorch(torch, model, patient):
    before = np.array(model.fc.weight)
    rows = training.measure_steps(model, SIZE, (4,), "cpu", 1.0)
    found = by_name(rows, 4)
    assert set(found) >= {training.STOCK, training.OURS, training.EAGER}
    for row in rows:
        assert row.status == "timed", row.note
        assert row.difference < 5e-3
    assert found[training.EAGER].difference > 1e-7, "the other framework's step is another computation"
    np.testing.assert_array_equal(np.array(model.fc.weight), before)


def test_a_wrong_gradient_of_ours_is_found_and_not_timed(model, patient, monkeypatch):
    """The reference is MLX's own operations: no fast path vouches for itself."""
    right = conv._stride2_gradients
    monkeypatch.setattr(conv, "_stride2_gradients", lambda *a: tuple(0.3 * g for g in right(*a)))
    found = by_name(training.measure_steps(model, SIZE, (2,), None, 0.2), 2)
    assert found[training.STOCK].status == "timed"
    assert found[training.OURS].status == "wrong"
    assert found[training.OURS].timing is None


def test_a_step_with_another_optimizer_is_found(torch, model):
    cohort = training.random_cohort(4, SIZE, 0)
    settings = TrainingConfig(batch_size=4, warmup_fraction=0.0)
    right = training._MlxStep(model, cohort, settings).first_step()
    assert training.step_difference(right, right) == 0
    for change in ({"learning_rate": 4e-4}, {"weight_decay": 10.0}, {"clip_norm": 0.1}):
        other = settings.model_copy(update=change)
        step = training._TorchStep(model, cohort, other, "cpu", "float32").first_step()
        assert training.step_difference(step, right) > training.TOLERANCE["float32"], change


def first_step(
    loss: float = 2.0, w: tuple = (3.0, 4.0), mean: float = 1.0, m: tuple = (1.0, 0.0)
) -> training.FirstStep:
    return training.FirstStep(loss, {"w": np.array(m)}, {"w": np.array(w), "bn.running_mean": np.array([mean])})


@pytest.mark.parametrize(
    ("change", "share"),
    [
        ({}, 0.0),
        ({"loss": 2.5}, 0.25),
        ({"mean": 0.7}, 0.3),
        ({"m": (0.9, 0.0)}, 0.1),
        ({"w": (3.3, 4.0)}, 0.1),
        ({"w": (3.0, -4.0)}, 0.0),  # where the gradient is nothing, its sign is chance
        ({"w": (np.nan, 4.0)}, np.inf),
        ({"loss": np.nan}, np.inf),
    ],
)
def test_step_differences_by_hand(change, share):
    assert training.step_difference(first_step(**change), first_step()) == pytest.approx(share)


def test_another_networks_step_is_infinitely_far():
    other = training.FirstStep(2.0, {"v": np.zeros(2)}, first_step().moved)
    assert training.step_difference(other, first_step()) == np.inf


def test_an_epoch_is_held_against_bare_steps(model, monkeypatch):
    monkeypatch.setattr(training, "_EPOCHS", 2)
    bare, looped = training.measure_epoch(model, 32, 4, 0.0)
    assert (bare.name, looped.name) == (training.BARE, training.LOOPED)
    assert (bare.timing.rounds, looped.timing.rounds) == (8, 2)
    assert 0.3 < looped.ms_per_sample / bare.ms_per_sample < 3
    assert "2 epochs of 4 steps" in looped.note


def test_maps_one_by_one_are_those_of_the_explainer(model):
    x = mx.array(np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 1)).astype(np.float32))
    one_by_one = grad_cam.maps_one_by_one(model, x, range(3, 14, 2))
    at_once = class_activation_maps(model, x, LABELS[3::2]).raw
    assert at_once.max() > 0.01
    np.testing.assert_allclose(one_by_one, at_once, rtol=1e-4, atol=1e-5)


def test_maps_of_something_else_are_wrong(model, monkeypatch):
    def off(*arguments: object) -> object:
        maps = class_activation_maps(*arguments)
        return replace(maps, raw=maps.raw * 1.01)

    monkeypatch.setattr(grad_cam, "class_activation_maps", off)
    rows = grad_cam.measure(model, 32, (1,), 2.0)
    assert {row.name for row in rows if row.status == "wrong"} == {grad_cam.AT_ONCE}


def test_grad_cam_is_timed_beside_the_forward_pass(model, patient):
    rows = grad_cam.measure(model, 32, (1,), 1.0)
    assert [row.name for row in rows] == [grad_cam.FORWARD, grad_cam.AT_ONCE, grad_cam.ONE_BY_ONE]
    forward, at_once, one_by_one = rows
    assert (forward.status, at_once.status) == ("timed", "timed")
    assert at_once.difference < grad_cam.TOLERANCE
    assert one_by_one.ms_per_sample > max(forward.ms_per_sample, at_once.ms_per_sample)


def test_the_store_is_built_of_files(monkeypatch):
    row = input_data.measure_store(32, 6, raw=(300, 250))
    assert (row.samples, row.timing.rounds) == (6, 1)
    assert row.timing.median > 0
    assert "6 JPEGs of 250 x 300 pixels" in row.note


def test_the_input_pipeline_from_both_places():
    rows = input_data.measure_pipeline(32, 8, 20, 1, 0.2)
    assert [row.name for row in rows] == [input_data.RESIDENT, input_data.FROM_DISK]
    assert {row.samples for row in rows} == {16}, "the last partial batch is left out"
    assert all(row.timing.rounds >= 3 for row in rows)


def test_the_teachers_memory_stands_beside_the_estimate():
    config = TeacherConfig(
        batch_size=4,
        training=FineTuningConfig(batch_size=2),
        tiny=TinyTeacherConfig(hidden_size=64, layers=2, vocabulary=800),
    )
    ballast = mx.zeros(50_000_000)
    mx.eval(ballast)
    rows, figures = teacher.measure("tiny", config, 64)
    assert [row.samples for row in rows] == [2, 4]
    assert [row.timing.rounds for row in rows] == [10, 10]
    assert figures["training"]["shape"] == [2, 64]
    assert figures["scoring"]["logits"] == [4, 14]
    assert figures["training"]["loss"] == pytest.approx(np.log(2), abs=0.2), "fresh adapters change nothing"
    # 200 MB that this process held before are not the teacher's.
    assert figures["training"]["peak_bytes"] < 100e6
    assert 0.3 < figures["training"]["estimate_over_peak"] < 3
    _, smaller = teacher.measure("tiny", config, 64, bits=4)
    assert smaller["bits"] == 4
    assert smaller["parameters"] == figures["parameters"]
    assert smaller["training"]["estimate_bytes"] < figures["training"]["estimate_bytes"]
    assert smaller["training"]["peak_bytes"] < figures["training"]["peak_bytes"]
    del ballast
