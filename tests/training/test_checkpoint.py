"""The state to resume from: everything comes back bit by bit, and what does not fit is refused by name."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from toy_training import TinyNet, arrays

from mlx_cxr.core.files import RecordError
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.weight_files import write_safetensors
from mlx_cxr.training.checkpoint import STATE, Progress, load_state, save_state
from mlx_cxr.training.classifier_run import finished_result, write_result
from mlx_cxr.training.distributed import ALONE
from mlx_cxr.training.loop import TrainingResult

PROGRESS = Progress(7, 0.8125, 2, 1, 12.5, (0.1, 1 / 3, 2.5), "settings")


def trained(steps: int = 3) -> tuple[TinyNet, optim.MultiOptimizer]:
    model = TinyNet()
    optimizer = fresh_optimizer()
    optimizer.init(model.trainable_parameters())
    images = mx.random.normal((4, 16, 16, 1))
    for _ in range(steps):
        _, gradients = nn.value_and_grad(model, lambda m: (m(images) ** 2).mean())(model)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
    return model, optimizer


def fresh_optimizer() -> optim.MultiOptimizer:
    pair = [optim.AdamW(lambda step: 0.1 / (step + 1)), optim.AdamW(1e-2)]
    return optim.MultiOptimizer(pair, [lambda _, w: w.ndim > 1])


def test_everything_comes_back_bit_by_bit(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "last" / "state.safetensors"
    save_state(path, model, optimizer, PROGRESS)
    other, other_optimizer = TinyNet(seed=9), fresh_optimizer()
    other_optimizer.init(other.trainable_parameters())
    assert load_state(path, other, other_optimizer, "settings") == PROGRESS
    wanted, got = arrays(model), arrays(other)
    assert {"bn1.running_mean", "bn1.running_var", "blocks.1.running_var"} <= set(got)
    assert np.abs(wanted["bn1.running_mean"]).max() > 0
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    theirs = dict(tree_flatten(other_optimizer.state))
    for name, value in tree_flatten(optimizer.state):
        assert theirs[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.array(theirs[name]), np.array(value), err_msg=name)
    assert other_optimizer.optimizers[0].step.item() == 3


def test_the_file_holds_weights_and_moments_under_plain_names(tmp_path):
    model, optimizer = trained()
    save_state(tmp_path / "state.safetensors", model, optimizer, PROGRESS)
    content = load_file(tmp_path / "state.safetensors")
    np.testing.assert_array_equal(content["model.fc.weight"], np.array(model.fc.weight))
    assert "optimizer.states.0.fc.weight.m" in content
    assert "optimizer.states.1.bn1.bias.v" in content


def loading(path, model=None, settings="settings"):
    model = model or TinyNet()
    optimizer = fresh_optimizer()
    optimizer.init(model.trainable_parameters())
    with pytest.raises(RecordError) as caught:
        load_state(path, model, optimizer, settings)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_resumed_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    assert "nothing to resume; start without --resume" in loading(path)
    model, optimizer = trained()
    save_state(path, model, optimizer, PROGRESS)
    assert "made with other data or settings" in loading(path, settings="others")
    whole = path.read_bytes()
    for length in (len(whole) - 4, 100, 5, 0):
        path.write_bytes(whole[:length])
        assert "--overwrite" in loading(path)


def test_another_network_is_refused_and_its_parameters_named(tmp_path):
    path = tmp_path / "state.safetensors"
    model, optimizer = trained()
    save_state(path, model, optimizer, PROGRESS)
    other = TinyNet()
    other.fc = nn.Linear(4 * 4 * 8, 5)
    message = loading(path, other)
    assert "does not fit the model" in message
    assert "fc" in message


def test_what_is_frozen_can_be_left_out(tmp_path):
    path = tmp_path / "state.safetensors"

    def half_frozen(seed: int) -> TinyNet:
        model = TinyNet(seed)
        model.conv1.freeze()
        model.bn1.freeze()
        return model

    model = half_frozen(0)
    optimizer = fresh_optimizer()
    optimizer.init(model.trainable_parameters())
    save_state(path, model, optimizer, PROGRESS, trainable_only=True)
    assert not [name for name in load_file(path) if "conv1" in name or "bn1" in name]
    other, fresh = half_frozen(9), fresh_optimizer()
    fresh.init(other.trainable_parameters())
    assert load_state(path, other, fresh, "settings", trainable_only=True) == PROGRESS
    np.testing.assert_array_equal(np.array(other.fc.weight), np.array(model.fc.weight))
    np.testing.assert_array_equal(np.array(other.conv1.weight), np.array(TinyNet(9).conv1.weight))
    whole = TinyNet()
    with pytest.raises(RecordError, match=r"does not fit the model: .*conv1\.weight"):
        load_state(path, whole, fresh_optimizer(), "settings")


def test_moments_of_another_freezing_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, *trained(), PROGRESS)
    frozen = TinyNet()
    frozen.conv1.freeze()
    message = loading(path, frozen)
    assert "does not fit the optimizer: states.0.conv1.weight.m, states.0.conv1.weight.v missing, unexpected" in message


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_model(path, TinyNet())
    assert "is not a training state" in loading(path)
    for progress in ('{"step": 1, "unknown": 2}', "not json", None):
        header = {"format": "mlx_cxr.training_state"} | ({} if progress is None else {"progress": progress})
        write_safetensors(path, {"model.a": mx.zeros(1)}, header)
        assert "another version" in loading(path)


def test_progress_is_exact_through_json():
    sums = tuple(float(np.float32(x)) for x in (0.1, 1 / 3, 1e-20))
    progress = Progress(step=2**40, best_auc=0.1 + 0.2, sums=sums)
    back = json.loads(json.dumps(progress.__dict__))
    assert Progress(**{**back, "sums": tuple(back["sums"])}) == progress


def test_a_state_that_a_run_left_when_it_was_killed_after_its_end_is_removed(tmp_path):
    result = TrainingResult(0.8125, 2, 3, 21, 12.5, False)
    write_result(tmp_path, result, "settings", {})
    state = tmp_path / STATE
    state.parent.mkdir()
    state.write_bytes(b"three times the weights")
    with pytest.raises(RecordError, match=r"training\.json is of a run that was made with other data or settings"):
        finished_result(tmp_path, "others", ALONE)
    assert state.exists()
    assert finished_result(tmp_path, "settings", ALONE) == result
    assert [path.name for path in tmp_path.iterdir()] == ["training.json"]
