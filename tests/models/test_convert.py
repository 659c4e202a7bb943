"""Conversion to and from torchvision's layout, checkpoints, initial weights and freezing."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlx_cxr.core.config_schema import ModelConfig
from mlx_cxr.core.files import SEAL, UNSEALED, seal_weights
from mlx_cxr.core.labels import LABELS
from mlx_cxr.models import convert, hub
from mlx_cxr.models.convert import (
    ModelFormatError,
    adapt,
    export_torchvision,
    freeze,
    initial_model,
    load_model,
    load_torchvision,
    save_model,
)
from mlx_cxr.models.resnet import RGB_MEAN, RGB_STD, ResNet18, ResNetConfig, initialize, preprocess

Arrays = dict[str, np.ndarray]


def random_model(seed: int = 0, **settings: int) -> ResNet18:
    """A model all of whose parameters and statistics are drawn, so that none is at a default."""
    model = ResNet18(ResNetConfig(**settings))
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(np.abs(rng.normal(0.3, 0.1, v.shape)).astype(np.float32) * _sign(rng, name, v.shape)))
        for name, v in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def _sign(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray | float:
    return rng.choice([-0.1, 0.1], shape).astype(np.float32) if len(shape) == 4 or "mean" in name else 1.0


def parameters(model: ResNet18) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_equal_bits(got: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert mx.array_equal(got[name], value).item(), name


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory) -> Path:
    """As the hub has torchvision's ResNet-18: 3 channels, 1000 classes, header `pt`, random weights."""
    path = tmp_path_factory.mktemp("imagenet") / "model.safetensors"
    arrays = torchvision_arrays(random_model(seed=1, in_channels=3, num_classes=1000))
    save_file(arrays, path, metadata={"format": "pt"})
    return path


def torchvision_arrays(model: ResNet18) -> Arrays:
    """Written out here, independent of `export_torchvision`."""
    arrays = {}
    for name, value in parameters(model).items():
        array = np.array(value)
        arrays[name] = np.ascontiguousarray(np.moveaxis(array, 3, 1)) if array.ndim == 4 else array
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = np.array(7, dtype=np.int64)
    return arrays


@pytest.mark.parametrize(("channels", "stride"), [(1, 32), (3, 16)])
def test_export_round_trip_is_exact(tmp_path, channels, stride):
    model = random_model(in_channels=channels, output_stride=stride)
    path = export_torchvision(tmp_path / "out.safetensors", model)
    assert_equal_bits(adapt(load_torchvision(path), model.config), parameters(model))


def test_export_has_torchvisions_names_layout_and_header(tmp_path):
    model = random_model(output_stride=16)
    path = export_torchvision(tmp_path / "out.safetensors", model)
    arrays = load_file(path)
    assert arrays["conv1.weight"].shape == (64, 1, 7, 7)
    assert arrays["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert arrays["layer3.1.conv2.weight"].shape == (256, 256, 3, 3)
    assert arrays["bn1.num_batches_tracked"].dtype == np.int64
    assert arrays["bn1.num_batches_tracked"].shape == ()
    # 20 convolutions, 20 BatchNorms of five, the head of two: torchvision's state dict has 122 entries.
    assert len(arrays) == 122
    ours = np.array(model.layer3[1].conv2.weight)
    assert arrays["layer3.1.conv2.weight"][5, 9, 0, 2] == ours[5, 0, 2, 9]
    with safe_open(path, "np") as file:
        header = file.metadata()
    assert header["layout"] == "nchw"
    assert header["format"] == "pt"
    assert header["in_channels"] == "1"
    assert header["output_stride"] == "16"
    assert tuple(json.loads(header["labels"])) == LABELS


def test_export_is_idempotent(tmp_path):
    """Out, in and out again: the same bytes, so no conversion was applied twice."""
    model = random_model()
    first = export_torchvision(tmp_path / "a.safetensors", model)
    again = ResNet18(model.config)
    again.load_weights(list(adapt(load_torchvision(first), model.config).items()))
    second = export_torchvision(tmp_path / "b.safetensors", again)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("channels", "stride"), [(1, 32), (3, 16)])
def test_strict_load_in_torch_gives_the_same_logits(tmp_path, torch, channels, stride):
    from safetensors.torch import load_file as load_torch_file
    from torch_reference import TorchResNet18, randomize_batchnorm

    model = ResNet18(ResNetConfig(in_channels=channels, output_stride=stride))
    initialize(model, 4)
    randomize_batchnorm(model, 4)
    model.eval()
    path = export_torchvision(tmp_path / "out.safetensors", model)
    reference = TorchResNet18(channels, 14, stride)
    reference.load_state_dict(load_torch_file(path), strict=True)
    x = np.random.default_rng(0).normal(size=(2, 64, 61, channels)).astype(np.float32)
    with torch.no_grad():
        wanted = reference.eval()(torch.from_numpy(np.moveaxis(x, 3, 1).copy())).numpy()
    got = np.array(model(mx.array(x)))
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_prefixes_and_batch_counters_are_tolerated(tmp_path, prefix):
    model = random_model(in_channels=3, num_classes=5)
    arrays = {prefix + name: value for name, value in torchvision_arrays(model).items()}
    save_file(arrays, tmp_path / "w.safetensors")
    weights = load_torchvision(tmp_path / "w.safetensors")
    assert_equal_bits(adapt(weights, model.config), parameters(model))


def test_half_precision_file_becomes_float32(tmp_path):
    model = random_model(in_channels=3)
    arrays = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in torchvision_arrays(model).items()}
    save_file(arrays, tmp_path / "w.safetensors")
    weights = load_torchvision(tmp_path / "w.safetensors")
    assert {value.dtype for value in weights.values()} == {mx.float32}
    np.testing.assert_array_equal(np.array(weights["fc.bias"]), arrays["fc.bias"].astype(np.float32))


def test_gray_stem_sees_a_gray_image_as_three_channels_do(imagenet_like):
    """stem + BatchNorm: equal where no tap falls on padding, and only there."""
    weights = load_torchvision(imagenet_like)
    stems = []
    pixels = mx.array(np.random.default_rng(0).integers(0, 256, (2, 33, 40), dtype=np.uint8))
    for channels in (1, 3):
        model = ResNet18(ResNetConfig(in_channels=channels))
        model.load_weights(list(adapt(weights, model.config).items()))
        model.eval()
        stems.append(np.array(model.bn1(model.conv1(preprocess(pixels, channels)))))
    gray, rgb = stems
    scale = np.abs(rgb).max()
    assert np.abs(gray - rgb)[:, 2:-2, 2:-2].max() < 1e-5 * scale
    assert np.abs(gray - rgb)[:, :2].max() > 1e-4 * scale


def test_gray_logits_are_close_to_three_channel_logits():
    """Whole network, at the size images have: what is left is the stem's border."""
    rgb = ResNet18(ResNetConfig(in_channels=3))
    initialize(rgb, 2)
    rgb.eval()
    weights = {n: mx.array(a) for n, a in torchvision_arrays(rgb).items() if "num_batches" not in n}
    gray = ResNet18(ResNetConfig(in_channels=1))
    gray.load_weights(list(adapt(weights, gray.config).items()))
    gray.eval()
    pixels = mx.array(np.random.default_rng(1).integers(0, 256, (2, 224, 224), dtype=np.uint8))
    got, wanted = np.array(gray(preprocess(pixels, 1))), np.array(rgb(preprocess(pixels, 3)))
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    # A plain sum over the channels, without the deviations, is further off.
    plain = dict(tree_flatten(gray.parameters())) | {"conv1.weight": rgb.conv1.weight.sum(-1, keepdims=True)}
    gray.load_weights(list((plain | {"bn1.running_mean": rgb.bn1.running_mean}).items()))
    assert np.abs(np.array(gray(preprocess(pixels, 1))) - wanted).max() > np.abs(got - wanted).max()


def test_gray_kernel_is_the_weighted_sum(imagenet_like):
    kernel = load_file(imagenet_like)["conv1.weight"].astype(np.float64)
    adapted = adapt(load_torchvision(imagenet_like), ResNetConfig(in_channels=1))
    wanted = sum(kernel[:, c] * 0.226 / RGB_STD[c] for c in range(3))
    np.testing.assert_allclose(np.array(adapted["conv1.weight"])[..., 0], wanted, rtol=1e-4, atol=1e-6)
    shift = sum(kernel[:, c].sum(axis=(1, 2)) * (0.449 - RGB_MEAN[c]) / RGB_STD[c] for c in range(3))
    mean = load_file(imagenet_like)["bn1.running_mean"]
    np.testing.assert_allclose(np.array(adapted["bn1.running_mean"]), mean - shift, rtol=1e-4, atol=1e-5)


def test_head_is_replaced_aloud_and_by_seed(imagenet_like, caplog):
    caplog.set_level(logging.INFO, "mlx_cxr")
    weights = load_torchvision(imagenet_like)
    first, same, other = (adapt(weights, ResNetConfig(), seed)["fc.weight"] for seed in (1, 1, 2))
    assert first.shape == (14, 512)
    assert mx.array_equal(first, same).item()
    assert not mx.array_equal(first, other).item()
    assert float(mx.abs(first).max()) <= 512**-0.5
    assert "head: 1000 classes replaced by 14, freshly initialized with seed 1" in caplog.text
    kept = adapt(weights, ResNetConfig(in_channels=3, num_classes=1000))
    assert mx.array_equal(kept["fc.weight"], weights["fc.weight"]).item()


def test_one_channel_weights_for_three_channels_are_refused(tmp_path):
    path = export_torchvision(tmp_path / "gray.safetensors", random_model())
    with pytest.raises(ModelFormatError, match="in_channels: 1"):
        adapt(load_torchvision(path), ResNetConfig(in_channels=3))


def _drop(arrays: Arrays) -> None:
    del arrays["layer1.0.bn1.running_var"], arrays["layer4.1.conv2.weight"]


def _add(arrays: Arrays) -> None:
    arrays["layer5.0.conv1.weight"] = np.zeros(3, np.float32)


def _misshape(arrays: Arrays) -> None:
    arrays["layer2.0.conv1.weight"] = np.zeros((128, 64, 5, 5), np.float32)


def _nhwc(arrays: Arrays) -> None:
    arrays["layer1.0.conv1.weight"] = np.zeros((64, 3, 3, 64), np.float32)


def _infinite(arrays: Arrays) -> None:
    arrays["fc.bias"] = np.full_like(arrays["fc.bias"], np.nan)


def _integers(arrays: Arrays) -> None:
    arrays["bn1.weight"] = np.ones(64, np.int32)


def _no_stem(arrays: Arrays) -> None:
    arrays["conv1.weight"] = np.zeros((64, 4, 7, 7), np.float32)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_drop, ["missing (2)", "layer1.0.bn1.running_var", "layer4.1.conv2.weight"]),
        (_add, ["unexpected (1)", "layer5.0.conv1.weight"]),
        (_misshape, ["of another shape (1)", "layer2.0.conv1.weight (128, 64, 5, 5)", "(128, 64, 3, 3)"]),
        (_nhwc, ["layer1.0.conv1.weight (64, 3, 3, 64)", "expected nchw (64, 64, 3, 3)"]),
        (_infinite, ["not finite (1): fc.bias"]),
        (_integers, ["not floating point (1): bn1.weight"]),
        (_no_stem, ["conv1.weight (64, 4, 7, 7)"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_of_a_torchvision_file_is_named(tmp_path, imagenet_like, fault: Callable, words):
    arrays = load_file(imagenet_like)
    fault(arrays)
    save_file(arrays, tmp_path / "bad.safetensors")
    with pytest.raises(ModelFormatError) as error:
        load_torchvision(tmp_path / "bad.safetensors")
    for word in ["bad.safetensors", *words]:
        assert word in str(error.value)


def test_all_faults_are_gathered_in_one_error(tmp_path, imagenet_like):
    arrays = load_file(imagenet_like)
    for fault in (_drop, _add, _misshape, _infinite):
        fault(arrays)
    save_file(arrays, tmp_path / "bad.safetensors")
    with pytest.raises(ModelFormatError) as error:
        load_torchvision(tmp_path / "bad.safetensors")
    for kind in ("missing (2)", "unexpected (1)", "of another shape (1)", "not finite (1)"):
        assert kind in str(error.value)


@pytest.mark.parametrize(
    ("extra", "guess"), [("layer1.0.conv3.weight", "ResNet-50"), ("layer1.2.conv1.weight", "ResNet-34")]
)
def test_another_depth_is_recognized(tmp_path, imagenet_like, extra, guess):
    arrays = load_file(imagenet_like) | {extra: np.zeros((256, 64, 1, 1), np.float32)}
    save_file(arrays, tmp_path / "deeper.safetensors")
    with pytest.raises(ModelFormatError, match=guess):
        load_torchvision(tmp_path / "deeper.safetensors")


@pytest.mark.parametrize("metadata", [{"format": "mlx"}, {"layout": "nhwc"}])
def test_layout_is_taken_from_the_header(tmp_path, imagenet_like, metadata):
    """A header that says channels last is believed, although the shapes fit torchvision's layout."""
    save_file(load_file(imagenet_like), tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(ModelFormatError, match="nchw"):
        load_torchvision(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 400, 0.5, 0.999])
def test_truncated_file(tmp_path, imagenet_like, kept):
    data = imagenet_like.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    for read in (load_torchvision, load_model):
        with pytest.raises(ModelFormatError, match=r"cut\.safetensors is damaged"):
            read(path)


@pytest.mark.parametrize("content", [b"not tensors at all, just text", b"\x00" * 100])
def test_file_that_is_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"x\.safetensors"):
        load_torchvision(path)


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_is_refused_unopened(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "resnet18.pth"
    path.write_bytes(pickle.dumps(_Bomb(), protocol=protocol))
    with pytest.raises(ModelFormatError, match="save_file"):
        load_torchvision(path)
    assert not Path("bomb-went-off").exists()


def test_zipped_torch_checkpoint_is_refused(tmp_path, torch):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "new.pth")
    with pytest.raises(ModelFormatError, match="PyTorch pickle"):
        load_torchvision(tmp_path / "new.pth")


def test_header_length_that_looks_like_a_pickle_is_still_read(tmp_path):
    """640 is b'\\x80\\x02' in little-endian order, as pickles of protocol 2 begin."""
    path = tmp_path / "w.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(640).encode()
    path.write_bytes(struct.pack("<Q", 640) + header + np.float32(2.5).tobytes())
    assert path.read_bytes()[:2] == b"\x80\x02"
    with pytest.raises(ModelFormatError, match=r"unexpected \(1\): x"):
        load_torchvision(path)


@pytest.mark.parametrize("settings", [{}, {"in_channels": 3, "output_stride": 16, "num_classes": 3}])
def test_checkpoint_round_trip_is_exact(tmp_path, settings):
    model = random_model(**settings)
    loaded = load_model(save_model(tmp_path / "m.safetensors", model))
    assert loaded.config == model.config
    assert not loaded.training
    assert_equal_bits(parameters(loaded), parameters(model))


def test_checkpoint_keeps_statistics_that_training_moved(tmp_path):
    model = random_model()
    model.train()
    freeze(model, 2, True)
    model.bn1.running_mean = model.bn1.running_mean + 1
    loaded = load_model(save_model(tmp_path / "m.safetensors", model))
    assert mx.array_equal(loaded.bn1.running_mean, model.bn1.running_mean).item()


def rewrite(path: Path, header: dict[str, str] | None = None, arrays: Arrays | None = None) -> Path:
    with safe_open(path, "np") as file:
        old = file.metadata()
    changed = old | (header or {}) | {SEAL: UNSEALED}
    save_file(arrays if arrays is not None else load_file(path), path, metadata=changed)
    seal_weights(path)
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": "other"}, "not a checkpoint of this package"),
        ({"schema": "2"}, "schema '2'"),
        ({"layout": "nchw"}, "layout 'nchw'"),
        ({"config": '{"in_channels": 2}'}, "in_channels is 2"),
        ({"config": "{"}, "configuration in its header"),
        ({"config": '{"depth": 50}'}, "depth"),
        ({"labels": json.dumps(LABELS[::-1])}, "other labels"),
    ],
)
def test_checkpoint_with_another_header_is_refused(tmp_path, header, words):
    path = rewrite(save_model(tmp_path / "m.safetensors", random_model()), header)
    with pytest.raises(ModelFormatError, match=words) as error:
        load_model(path)
    assert "m.safetensors" in str(error.value)


def test_checkpoint_of_another_shape_names_every_key(tmp_path):
    path = save_model(tmp_path / "m.safetensors", random_model())
    arrays = load_file(path)
    arrays["fc.weight"] = np.zeros((13, 512), np.float32)
    arrays["extra"] = arrays.pop("layer4.1.bn2.bias")
    rewrite(path, arrays=arrays)
    with pytest.raises(ModelFormatError) as error:
        load_model(path)
    for words in ("fc.weight (13, 512)", "missing (1): layer4.1.bn2.bias", "unexpected (1): extra"):
        assert words in str(error.value)


def test_readers_refuse_each_others_files(tmp_path):
    model = random_model()
    ours = save_model(tmp_path / "ours.safetensors", model)
    theirs = export_torchvision(tmp_path / "theirs.safetensors", model)
    with pytest.raises(ModelFormatError, match="load_model"):
        load_torchvision(ours)
    with pytest.raises(ModelFormatError, match=r"model\.weights"):
        load_model(theirs)


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    """A real short write: the process may not write files over 1 MB."""
    path = save_model(tmp_path / "m.safetensors", random_model())
    before = path.read_bytes()
    script = f"""
import resource, signal
import mlx_cxr
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import ResNet18, ResNetConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
save_model({str(path)!r}, ResNet18(ResNetConfig()))
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "File too large" in done.stderr
    assert f"could not write {path}" in done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_missing_file_says_so(tmp_path):
    for read in (load_torchvision, load_model):
        with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such weights file"):
            read(tmp_path / "absent.safetensors")


def test_initial_scratch_is_by_seed(tmp_path):
    first, origin = initial_model(ModelConfig(weights="scratch"), tmp_path, 5)
    second, _ = initial_model(ModelConfig(weights="scratch"), tmp_path, 5)
    third, _ = initial_model(ModelConfig(weights="scratch"), tmp_path, 6)
    assert origin == {"weights": "scratch", "requested": "scratch", "head": "fresh"}
    assert_equal_bits(parameters(first), parameters(second))
    assert not mx.array_equal(first.conv1.weight, third.conv1.weight).item()
    assert first.training


def test_initial_imagenet_from_the_weights_folder(tmp_path, imagenet_like):
    convert.fetch_imagenet(tmp_path, imagenet_like)
    config = ModelConfig(weights="imagenet", in_channels=3, output_stride=16, dropout=0.2)
    model, origin = initial_model(config, tmp_path, 0)
    assert model.config == ResNetConfig(in_channels=3, output_stride=16, dropout=0.2)
    assert origin["weights"] == "imagenet"
    assert origin["source"] == "local file"
    assert origin["licence"] == "BSD-3-Clause"
    assert (
        origin["sha256"]
        == json.loads((tmp_path / "resnet18.tv_in1k.json").read_text())["files"]["resnet18.tv_in1k.safetensors"][
            "sha256"
        ]
    )
    wanted = load_file(imagenet_like)["layer3.0.conv1.weight"]
    np.testing.assert_array_equal(np.array(model.layer3[0].conv1.weight), np.moveaxis(wanted, 1, 3))


def test_initial_imagenet_offline_starts_from_scratch_aloud(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model, origin = initial_model(ModelConfig(weights="imagenet"), tmp_path / "weights", 9)
    scratch, _ = initial_model(ModelConfig(weights="scratch"), tmp_path, 9)
    assert_equal_bits(parameters(model), parameters(scratch))
    assert origin["weights"] == "scratch"
    assert origin["requested"] == "imagenet"
    assert "HF_HUB_OFFLINE is set" in origin["reason"]
    assert "RANDOM weights" in caplog.text
    assert "fetch_weights --what resnet18" in caplog.text
    assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_initial_imagenet_that_changed_is_an_error_not_scratch(tmp_path, imagenet_like, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    convert.fetch_imagenet(tmp_path, imagenet_like)
    path = hub.IMAGENET.path(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(hub.WeightsCorruptError, match="recorded was"):
        initial_model(ModelConfig(weights="imagenet"), tmp_path, 0)


def test_initial_imagenet_of_another_model_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.IMAGENET.path(tmp_path).write_bytes(b"<html>404</html>")
    with pytest.raises(ModelFormatError, match="damaged"):
        initial_model(ModelConfig(weights="imagenet"), tmp_path, 0)


def test_initial_from_each_kind_of_file(tmp_path, imagenet_like):
    model = random_model(output_stride=16)
    wanted = parameters(model)
    ours = save_model(tmp_path / "ours.safetensors", model)
    theirs = export_torchvision(tmp_path / "theirs.safetensors", model)
    for path in (ours, theirs):
        loaded, origin = initial_model(ModelConfig(weights=str(path), output_stride=16), tmp_path, 0)
        assert_equal_bits(parameters(loaded), wanted)
        assert origin["weights"] == "file"
        assert len(origin["sha256"]) == 64
        assert loaded.training
    timm, _ = initial_model(ModelConfig(weights=str(imagenet_like)), tmp_path, 0)
    assert timm.conv1.weight.shape == (64, 7, 7, 1)


def test_initial_from_checkpoint_with_other_channels_is_refused(tmp_path):
    path = save_model(tmp_path / "m.safetensors", random_model())
    with pytest.raises(ModelFormatError, match=r"set model\.in_channels: 1"):
        initial_model(ModelConfig(weights=str(path), in_channels=3), tmp_path, 0)


def test_initial_from_missing_file_is_not_scratch(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        initial_model(ModelConfig(weights=str(tmp_path / "nowhere.safetensors")), tmp_path, 0)


def trained_names(model: ResNet18) -> set[str]:
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_freeze_stages_and_batchnorm():
    model = random_model()
    everything = trained_names(model)
    assert len(everything) == 62
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    for stages in range(6):
        freeze(model, stages, False)
        frozen = tuple(f"{part}." for part in (parts[: stages + 1] if stages else []))
        assert trained_names(model) == {n for n in everything if not n.startswith(frozen or "none")}
        assert model.bn1.frozen_statistics == (stages >= 1)
        assert model.layer4[1].bn2.frozen_statistics == (stages == 5)
        assert model.layer2[0].downsample[1].frozen_statistics == (stages >= 3)
    freeze(model, 0, True)
    assert trained_names(model) == {n for n in everything if "bn" not in n and "downsample.1" not in n}
    assert model.layer3[0].bn1.frozen_statistics
    freeze(model, 0, False)
    assert trained_names(model) == everything
    assert not model.layer3[0].bn1.frozen_statistics


@pytest.mark.parametrize("stages", [-1, 6])
def test_freeze_refuses_other_stages(stages):
    with pytest.raises(ValueError, match="freeze_stages"):
        freeze(random_model(), stages, False)


def test_a_training_step_leaves_frozen_parts_as_they_were():
    import mlx.optimizers as optim

    model = ResNet18(ResNetConfig())
    initialize(model, 0)
    freeze(model, 3, False)
    model.train()
    before = {name: np.array(value) for name, value in parameters(model).items()}
    x = mx.random.normal((2, 32, 32, 1))
    loss_and_gradient = nn.value_and_grad(model, lambda m, x: m(x).square().mean())
    _, gradients = loss_and_gradient(model, x)
    optim.SGD(0.1).update(model, gradients)
    changed = {name for name, value in parameters(model).items() if not np.array_equal(np.array(value), before[name])}
    assert not {n for n in changed if n.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert {"layer3.0.bn1.running_mean", "layer4.1.conv2.weight", "fc.weight"} <= changed


def _tail(data: bytearray) -> None:
    data[-400_000:] = bytes(400_000)


def _hole(data: bytearray) -> None:
    start = len(data) // 2
    data[start : start + (4 << 20)] = bytes(4 << 20)


@pytest.mark.parametrize("damage", [_tail, _hole])
def test_blocks_of_zeros_in_a_file_put_there_by_hand_are_found(tmp_path, imagenet_like, damage):
    """Of full length, with a sound header, finite; nobody recorded its hash."""
    data = bytearray(imagenet_like.read_bytes())
    damage(data)
    path = hub.IMAGENET.path(tmp_path)
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"nothing but zeros in [\d,]+ of [\d,]+ rows") as refused:
        initial_model(ModelConfig(), tmp_path, 0)
    assert str(path) in str(refused.value)
    with pytest.raises(ModelFormatError, match="nothing but zeros"):
        initial_model(ModelConfig(weights=str(path)), tmp_path, 0)
    with pytest.raises(ModelFormatError, match="nothing but zeros"):
        convert.fetch_imagenet(tmp_path / "other", path)
    assert not hub.IMAGENET.path(tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layer1.0.conv1.weight", lambda a: a * 1e9, "beyond 1e+06"),
        ("layer3.1.bn2.running_var", lambda a: -a, "negative variances"),
        ("bn1.running_var", lambda a: a * 1e15, "beyond 1e+12"),
        ("layer4.0.conv2.weight", lambda a: a * 0, "zeros in 512 of 512 rows"),
    ],
)
def test_values_that_no_training_leaves_are_named(tmp_path, imagenet_like, name, change, words):
    arrays = load_file(imagenet_like)
    arrays[name] = change(arrays[name])
    save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(ModelFormatError) as refused:
        load_torchvision(tmp_path / "w.safetensors")
    assert name in str(refused.value)
    assert words in str(refused.value)


def test_weights_with_some_dead_filters_and_unit_statistics_are_taken(tmp_path, imagenet_like):
    arrays = load_file(imagenet_like)
    arrays["conv1.weight"][[3, 40]] = 0
    arrays["layer1.0.bn2.weight"][:] = 0
    arrays["bn1.running_var"] *= 1e5
    save_file(arrays, tmp_path / "w.safetensors")
    assert load_torchvision(tmp_path / "w.safetensors")["conv1.weight"].shape == (64, 3, 7, 7)


def test_a_full_disk_is_called_so(small_disk):
    disk = small_disk("1m")
    with pytest.raises(OSError, match=r"could not write .*m\.safetensors: No space left on device") as full:
        save_model(disk / "m.safetensors", random_model())
    assert full.value.errno == 28
    assert list(disk.iterdir()) == []


def test_the_bytes_written_are_mlx_own(tmp_path):
    model = random_model()
    path = save_model(tmp_path / "m.safetensors", model)
    _, header = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(tmp_path / "direct.safetensors"), parameters(model), metadata={**header, SEAL: UNSEALED})
    seal_weights(tmp_path / "direct.safetensors")
    assert path.read_bytes() == (tmp_path / "direct.safetensors").read_bytes()
