"""Training on images: PyTorch's optimizer and gradients, what is frozen, reduced precision, and what is learned."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toy_training import (
    NO_AUGMENTATION,
    TINY,
    TINY_VALIDATION,
    TinyNet,
    arrays,
    assert_same_weights,
    metrics,
    run_tiny,
    source,
    square_images,
    train_images,
    validator,
)

from mlx_cxr.core.config_schema import AugmentConfig, TrainingConfig
from mlx_cxr.models.convert import freeze, load_model
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.training.batches import ImageSource, epoch_order
from mlx_cxr.training.classifier_task import TrainingData
from mlx_cxr.training.loop import TrainingDataError
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.scoring import predict_logits


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(cpu_only):
    """Two runs are equal bit by bit on the CPU; other devices are exercised by the stage's test."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The toy run at its defaults: folder and trained model."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_tiny(folder)[0]


def test_dropout_and_augmentation_take_part(plain, tmp_path):
    _, wanted = plain
    for changed in ({"model": TinyNet(dropout=0.0)}, {"augmentation": NO_AUGMENTATION}):
        other, _ = run_tiny(tmp_path / str(len(changed)), **changed)
        assert np.abs(np.array(other.fc.weight) - np.array(wanted.fc.weight)).max() > 1e-4


def test_images_from_disk_train_to_the_same_weights(plain, tmp_path, monkeypatch):
    _, wanted = plain
    real = ImageSource.__init__
    monkeypatch.setattr(ImageSource, "__init__", lambda self, images, rows, _: real(self, images, rows, 0.0))
    assert_same_weights(run_tiny(tmp_path)[0], wanted)


def test_running_statistics_move_are_saved_and_validation_uses_them(tmp_path):
    seen = []
    inner = validator(*TINY_VALIDATION)

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({name: value for name, value in arrays(model).items() if "running_" in name})
        model.eval()
        seen[-1]["logits"] = np.array(model(preprocess(mx.array(TINY_VALIDATION[0]), 1)))
        model.train()
        return inner(model) | {"macro_auc": len(seen) / 10}

    model, _ = run_tiny(tmp_path, validate=validate)
    fresh = arrays(TinyNet())
    for name in ("bn1.running_mean", "bn1.running_var", "blocks.1.running_mean", "blocks.1.running_var"):
        assert np.abs(seen[0][name] - fresh[name]).max() > 1e-3, f"{name} did not move in the first epoch"
        assert np.abs(seen[1][name] - seen[0][name]).max() > 1e-4, f"{name} did not move in the second epoch"
        saved = mx.load(str(tmp_path / "best_model.safetensors"))[name]
        np.testing.assert_array_equal(np.array(saved), seen[1][name])
        np.testing.assert_array_equal(np.array(saved), arrays(model)[name])
    # The logits of the loop's own scoring are those of the running statistics, not of a batch's own.
    got = predict_logits(model, source(TINY_VALIDATION[0]), 5)
    np.testing.assert_allclose(got, seen[1]["logits"], rtol=1e-4, atol=1e-5)


def schedule_by_hand(step: int, total: int, warmup: int, peak: float, last: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return last + 0.5 * (peak - last) * (1 + np.cos(np.pi * (step + 1 - warmup) / (total - warmup)))


@pytest.mark.parametrize("clip_norm", [1e9, 0.05], ids=["unclipped", "clipped"])
def test_twenty_steps_of_adamw_are_those_of_torch(torch, tmp_path, clip_norm):
    """Warm-up, cosine, decay on kernels only, and clipping, by PyTorch's own optimizer on a linear model in float64."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = ResNetConfig()
            self.fc = nn.Linear(64, 14)

        def __call__(self, x: mx.array) -> mx.array:
            return self.fc(x.reshape(x.shape[0], -1))

    images, targets = square_images(20, 8, 0)
    rng = np.random.default_rng(0)
    targets[rng.random(targets.shape) < 0.2] = np.nan
    model = Linear()
    weight = (rng.normal(size=(14, 64)) * 0.1).astype(np.float32)
    bias = rng.normal(size=14).astype(np.float32)
    model.fc.weight, model.fc.bias = mx.array(weight), mx.array(bias)
    config = TrainingConfig(
        epochs=4,
        batch_size=4,
        learning_rate=0.05,
        final_learning_rate=0.01,
        warmup_fraction=0.2,
        weight_decay=0.3,
        clip_norm=clip_norm,
        log_every=1,
    )
    train_images(
        model,
        masked_bce(),
        TrainingData(source(images), targets),
        lambda _: {"loss": 0.0, "macro_auc": 0.5},
        training=config,
        augmentation=NO_AUGMENTATION,
        seed=1,
        run_dir=tmp_path,
        settings="",
    )

    w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [w], "weight_decay": 0.3}, {"params": [b], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    inputs = torch.tensor((images / 255 - 0.449) / 0.226).reshape(20, 64)
    wanted, norms = torch.tensor(targets, dtype=torch.float64), []
    order = np.concatenate([epoch_order(20, 4, 1, epoch) for epoch in range(4)])
    assert len(order) == 20
    for step, items in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = schedule_by_hand(step, 20, 4, 0.05, 0.01)
        y = wanted[items]
        known = ~torch.isnan(y)
        logits = torch.nn.functional.linear(inputs[items], w, b)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], y[known])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([w, b], clip_norm).item())
        optimizer.step()
    np.testing.assert_allclose(np.array(model.fc.weight), w.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(np.array(model.fc.bias), b.detach().numpy(), atol=1e-5)
    logged = [line["grad_norm"] for line in metrics(tmp_path) if line["kind"] == "step"]
    np.testing.assert_allclose(logged, norms, rtol=1e-4)
    if clip_norm < 1:
        assert min(norms) < clip_norm < norms[5], "some steps were clipped, some not"
    rates = [line["learning_rate"] for line in metrics(tmp_path) if line["kind"] == "epoch"]
    np.testing.assert_allclose(rates, [schedule_by_hand(i, 20, 4, 0.05, 0.01) for i in (4, 9, 14, 19)], rtol=1e-5)
    assert rates[-1] == pytest.approx(0.01)


def test_weight_decay_is_on_kernels_only(tmp_path):
    """With no label known there is no gradient: what decay does is all that happens."""
    nothing = np.full((20, 14), np.nan, np.float32)
    model, before = TinyNet(), arrays(TinyNet())
    run_tiny(
        tmp_path,
        model=model,
        targets=nothing,
        weight_decay=0.5,
        learning_rate=0.1,
        final_learning_rate=0.1,
        warmup_fraction=0.0,
    )
    after = arrays(model)
    for name in ("conv1.weight", "blocks.0.weight", "fc.weight"):
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.1 * 0.5) ** 10, rtol=1e-5, err_msg=name)
    for name in ("bn1.weight", "bn1.bias", "blocks.1.weight", "blocks.1.bias", "fc.bias"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


@pytest.mark.parametrize(
    ("stages", "batchnorm", "precision"), [(3, False, "bfloat16"), (0, True, "float32")], ids=["stages", "batchnorm"]
)
def test_frozen_parts_do_not_move(tmp_path, stages, batchnorm, precision):
    model = ResNet18(ResNetConfig())
    initialize(model, 0)
    freeze(model, stages, batchnorm)
    before = arrays(model)
    images, targets = square_images(8, 32, 0)
    options = {"augmentation": AugmentConfig(), "seed": 0, "run_dir": tmp_path, "settings": ""}
    config = TrainingConfig(epochs=1, batch_size=4, precision=precision, learning_rate=1e-3, save_every=1)
    fit(model, images, targets, lambda _: {"loss": 0.0, "macro_auc": 0.5}, training=config, **options)
    for name, value in arrays(model).items():
        assert value.dtype == np.float32
        in_stage = name.startswith(("conv1", "bn1", "layer1", "layer2")) and stages == 3
        in_norm = batchnorm and (".bn" in f".{name}" or "downsample.1" in name)
        moved = np.abs(value - before[name]).max() > 0
        assert moved != (in_stage or in_norm), name
    # And such a run can be resumed, although the optimizer knows only a part of the network.
    longer = config.model_copy(update={"epochs": 2})
    result = fit(
        model, images, targets, lambda _: {"loss": 0.0, "macro_auc": 0.6}, training=longer, resume=True, **options
    )
    assert (result.steps, result.best_epoch) == (4, 2)


def fit(model, images, targets, validate, **options):
    return train_images(model, masked_bce(), TrainingData(source(images), targets), validate, **options)


def test_the_resnet_learns_left_from_right(tmp_path):
    """Held-out AUC above 0.95 after 5 epochs of 6 steps, by the weights that were saved as the best."""
    images, targets = square_images(96, 32, 0)
    model = ResNet18(ResNetConfig())
    initialize(model, 0)
    result = fit(
        model,
        images,
        targets,
        validator(*square_images(64, 32, 1)),
        training=TrainingConfig(epochs=5, batch_size=16, learning_rate=1e-3, log_every=1),
        augmentation=AugmentConfig(),
        seed=0,
        run_dir=tmp_path,
        settings="",
    )
    losses = [line["loss"] for line in metrics(tmp_path) if line["kind"] == "step"]
    assert losses[0] == pytest.approx(np.log(2), abs=0.25)
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert result.best_auc > 0.95
    best = load_model(tmp_path / "best_model.safetensors")
    again = validator(*square_images(64, 32, 1))(best)
    assert again["macro_auc"] == pytest.approx(result.best_auc, abs=1e-9)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_reduced_precision_stays_close_and_keeps_float32_weights(plain, tmp_path, precision, tolerance):
    """Ten steps: the loss within a few roundings of float32's (2^-8 and 2^-11), and not equal to it."""
    folder, wanted = plain
    model, _ = run_tiny(tmp_path, precision=precision)
    wanted_losses = [line["loss"] for line in metrics(folder) if line["kind"] == "step"]
    got = [line["loss"] for line in metrics(tmp_path) if line["kind"] == "step"]
    np.testing.assert_allclose(got, wanted_losses, rtol=tolerance)
    assert got != wanted_losses
    for name, value in arrays(model).items():
        assert value.dtype == np.float32, name
        if "running" not in name:
            # AdamW moves a weight by at most the rate each step, whatever the gradient's size: 10 steps of 0.01.
            assert np.abs(value - arrays(wanted)[name]).max() < 0.1, name


def test_reduced_precision_is_what_the_network_computes_in(tmp_path, monkeypatch):
    seen = []
    real = TinyNet.__call__

    def spy(self, x):
        seen.append((x.dtype, self.conv1.weight.dtype, self.bn1.weight.dtype, self.training))
        return real(self, x)

    monkeypatch.setattr(TinyNet, "__call__", spy)
    frozen = TinyNet()
    frozen.conv1.freeze()
    run_tiny(tmp_path, precision="bfloat16", model=frozen)
    assert {entry[:3] for entry in seen if entry[3]} == {(mx.bfloat16, mx.bfloat16, mx.float32)}
    assert {entry[:3] for entry in seen if not entry[3]} == {(mx.float32,) * 3}


def step_against_torch(torch, run_dir: Path, seed: int) -> dict[str, float]:
    """One step of the loop on the ResNet-18, and of PyTorch in float64: relative L2 error of each gradient.

    Loss, gradient norm and running statistics are asserted. The gradient is read from AdamW's first moment, which
    is 0.1 of it after one step.
    """
    from torch_reference import TorchResNet18, to_torch_state

    images, targets = square_images(4, 48, seed)
    targets[0, 3:6] = np.nan
    model = ResNet18(ResNetConfig())
    initialize(model, seed)
    reference = TorchResNet18(1, 14).double()
    reference.load_state_dict(to_torch_state(model))
    weight = np.linspace(1, 5, 14)
    train_images(
        model,
        masked_bce(weight),
        TrainingData(source(images), targets),
        lambda _: {"loss": 0.0, "macro_auc": 0.5},
        training=TrainingConfig(epochs=1, batch_size=4, clip_norm=1e9, log_every=1),
        augmentation=NO_AUGMENTATION,
        seed=0,
        run_dir=run_dir,
        settings="",
    )
    pixels = torch.tensor((images[:, None] / 255.0 - 0.449) / 0.226)
    wanted = torch.tensor(targets, dtype=torch.float64)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        reference.train()(pixels), torch.nan_to_num(wanted), pos_weight=torch.tensor(weight), reduction="none"
    )
    loss = each[~torch.isnan(wanted)].mean()
    loss.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}

    logged = metrics(run_dir)[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in theirs.values()))
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-2)
    state = mx.load(str(run_dir / "last" / "state.safetensors"))
    for name, buffer in reference.named_buffers():
        if "running" in name:
            np.testing.assert_allclose(np.array(state[f"model.{name}"]), buffer.numpy(), rtol=1e-4, atol=1e-5)
    errors = {}
    for name, gradient in theirs.items():
        moment = np.array(state[f"optimizer.states.{0 if gradient.ndim > 1 else 1}.{name}.m"]) * 10
        ours = moment.transpose(0, 3, 1, 2) if moment.ndim == 4 else moment
        errors[name] = float(np.linalg.norm(ours - gradient) / np.linalg.norm(gradient))
    return errors


def test_one_step_on_the_resnet_is_that_of_torch(torch, tmp_path):
    """Every gradient to 1e-3, for one of four draws: near a ReLU's edge float32 may take its other side."""
    worst = []
    for seed in range(4):
        errors = step_against_torch(torch, tmp_path / str(seed), seed)
        name = max(errors, key=errors.get)
        worst.append((errors[name], name))
        assert errors[name] < 0.1, worst
        if errors[name] < 1e-3:
            return
    pytest.fail(f"no draw agrees to 1e-3: {worst}")


def test_data_that_cannot_be_trained_on():
    with pytest.raises(TrainingDataError, match="no training films; look at the manifest's summary"):
        TrainingData(source(TINY[0][:0]), TINY[1][:0])
    with pytest.raises(ValueError, match="20 films but 19 rows of targets"):
        TrainingData(source(TINY[0]), TINY[1][1:])


def test_a_cohort_smaller_than_a_batch_trains(tmp_path):
    _, result = run_tiny(tmp_path, batch_size=64, epochs=3)
    assert (result.steps, result.epochs) == (3, 3)
