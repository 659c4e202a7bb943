"""Weights in and out of the ResNet-18; the one place where layouts change.

Other frameworks keep convolutions as (out, in, height, width), "nchw" here; this package keeps them as MLX
does, (out, height, width, in), "nhwc". Which of the two a file holds is read from its header, never from its
shapes: a file of this package says so, and any other `resnet18` safetensors is torchvision's or timm's, thus
nchw. Names are torchvision's in both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr import __version__
from mlx_cxr.core.config_schema import ModelConfig
from mlx_cxr.core.files import sha256_file
from mlx_cxr.core.labels import LABELS
from mlx_cxr.models import hub
from mlx_cxr.models.resnet import GRAY_MEAN, GRAY_STD, RGB_MEAN, RGB_STD, ResNet18, ResNetConfig, initialize
from mlx_cxr.models.weight_files import ModelFormatError, check_weights, read_safetensors, write_safetensors
from mlx_cxr.ops.batch_norm import BatchNorm

log = logging.getLogger("mlx_cxr")

FORMAT = "mlx_cxr.resnet18"
"""`format` in the header of a checkpoint of this package."""
SCHEMA = "1"
"""Version of that header."""

_PREFIXES = ("model.", "module.")


def load_torchvision(path: str | Path) -> dict[str, mx.array]:
    """Weights of a torchvision or timm `resnet18`, as the file has them.

    A prefix `model.` or `module.` on all names is dropped, and so is `num_batches_tracked`.

    Returns:
        Name -> float32 array under torchvision's names; convolutions are nchw. The number of input channels
        (1 or 3) and of classes is whatever the file has.

    Raises:
        FileNotFoundError: no such file.
        ModelFormatError: not safetensors, cut short, already nhwc, or another architecture; lists every name
            that is missing, unexpected, of another shape, or not finite.
    """
    arrays, header = read_safetensors(path)
    if header.get("format") == FORMAT:
        raise ModelFormatError(
            f"{path} is a checkpoint of this package, channels last already; read it with load_model"
        )
    if header.get("format") == "mlx" or header.get("layout", "nchw") != "nchw":
        raise ModelFormatError(
            f"{path}: its header says format {header.get('format')!r}, layout {header.get('layout')!r}, but "
            "torchvision's layout is nchw; export it with convert.export_torchvision or from PyTorch"
        )
    weights = {name: value for name, value in arrays.items() if not name.endswith("num_batches_tracked")}
    while prefix := next((p for p in _PREFIXES if weights and all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    stem, head = weights.get("conv1.weight"), weights.get("fc.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 and stem.shape[1] in (1, 3) else 3
    classes = head.shape[0] if head is not None and head.ndim == 2 else 1000
    expected = {}
    for name, shape in _shapes(ResNetConfig(channels, classes)).items():
        expected[name] = (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
    check_weights(path, weights, expected, "nchw")
    return {name: value.astype(mx.float32) for name, value in weights.items()}


def adapt(weights: Mapping[str, mx.array], config: ResNetConfig, seed: int = 0) -> dict[str, mx.array]:
    """Torchvision weights (nchw) as the parameters (nhwc) of a model of this configuration.

    A three-channel stem becomes a one-channel one that sees a gray image as the three-channel one sees it
    repeated. With a channel's mean m_c and deviation s_c, and M and S those of the gray image, the input of
    channel c is (S x + M - m_c) / s_c, where x is the gray input. So the gray kernel is the sum over c of S /
    s_c times the channel's, and the constant left over is taken off the first BatchNorm's running mean. In
    evaluation this is exact except in the first two and last two rows and columns of the stem's output, where
    part of the constant falls on padding, which is zero in both.

    A head of another number of classes is replaced by a fresh one, uniform within 1/sqrt(512), drawn with `seed`.

    Returns:
        Name -> float32 array, every entry of `model.parameters()`.

    Raises:
        ModelFormatError: a one-channel stem for a three-channel model.
    """
    adapted = {
        name: mx.contiguous(value.transpose(0, 2, 3, 1)) if value.ndim == 4 else value
        for name, value in weights.items()
    }
    have = adapted["conv1.weight"].shape[-1]
    if have == 3 and config.in_channels == 1:
        adapted["conv1.weight"], shift = _gray_stem(adapted["conv1.weight"])
        adapted["bn1.running_mean"] = adapted["bn1.running_mean"] - shift
        log.info("stem: 3 input channels folded into 1 for gray films")
    elif have != config.in_channels:
        raise ModelFormatError(
            f"the weights take {have} channel, the model {config.in_channels}; set model.in_channels: 1"
        )
    classes = adapted["fc.weight"].shape[0]
    if classes != config.num_classes:
        rng = np.random.default_rng(seed)
        for name, shape in (("fc.weight", (config.num_classes, 512)), ("fc.bias", (config.num_classes,))):
            adapted[name] = mx.array((rng.uniform(-1, 1, shape) / np.sqrt(512)).astype(np.float32))
        log.info("head: %d classes replaced by %d, freshly initialized with seed %d", classes, config.num_classes, seed)
    return adapted


def export_torchvision(path: str | Path, model: ResNet18) -> Path:
    """Write a model's weights under torchvision's names and in its layout (nchw), for a strict load there; atomically.

    The header says what the shapes alone do not: channels, classes, labels, normalization, and the output
    stride. At output stride 16 the last stage is dilated (timm: `output_stride=16`); a plain torchvision
    `resnet18` takes the same weights but computes something else with them.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    config = model.config
    arrays = {}
    for name, value in tree_flatten(model.parameters()):
        arrays[name] = mx.contiguous(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = mx.array(0, dtype=mx.int64)
    gray = config.in_channels == 1
    header = {
        "format": "pt",
        "layout": "nchw",
        "architecture": "torchvision resnet18",
        "in_channels": str(config.in_channels),
        "num_classes": str(config.num_classes),
        "output_stride": str(config.output_stride),
        "mean": json.dumps([GRAY_MEAN] if gray else RGB_MEAN),
        "std": json.dumps([GRAY_STD] if gray else RGB_STD),
        "mlx_cxr": __version__,
        **_labels_entry(config),
    }
    return write_safetensors(path, arrays, header)


def save_model(path: str | Path, model: ResNet18) -> Path:
    """Write a checkpoint: all parameters and running statistics (nhwc), the configuration in the header.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    header = {
        "format": FORMAT,
        "schema": SCHEMA,
        "layout": "nhwc",
        "config": json.dumps(model.config.plain()),
        "mlx_cxr": __version__,
        **_labels_entry(model.config),
    }
    return write_safetensors(path, dict(tree_flatten(model.parameters())), header)


def load_model(path: str | Path) -> ResNet18:
    """The model of a checkpoint that `save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ModelFormatError: not such a checkpoint, cut short, made with other labels or another schema, or with
            weights that do not fit its configuration; lists every name that is missing, unexpected, of
            another shape, or not finite.
    """
    arrays, header = read_safetensors(path)
    return _filled(path, arrays, _checkpoint_config(path, header)).eval()


def initial_model(config: ModelConfig, weights_dir: str | Path, seed: int) -> tuple[ResNet18, dict[str, Any]]:
    """The network that training starts from, and the provenance of its weights.

    `imagenet` takes `weights_dir/resnet18.tv_in1k.safetensors`, fetched from the hub when it is not there.
    Only when it is neither there nor to be had does training start from scratch, with a warning and the
    reason in the record. A file that is there but wrong is always an error.

    Returns:
        The model in training mode, and its provenance: `weights` (`imagenet`, `scratch` or `file`), `head`
        (`fresh` or `loaded`), `requested`, and as they apply `path`, `sha256`, `source`, `revision`, `licence`,
        `reason`.

    Raises:
        FileNotFoundError: `config.weights` names a file that does not exist.
        ModelFormatError: a file that does not hold these weights.
        WeightsCorruptError: ImageNet weights that changed since they were fetched.
    """
    # The published weights, or random ones where they cannot be had.
    wanted = ResNetConfig(in_channels=config.in_channels, dropout=config.dropout, output_stride=config.output_stride)
    if config.weights == "imagenet":
        try:
            record = fetch_imagenet(weights_dir)
        except hub.WeightsUnavailableError as error:
            log.warning("WARNING: no ImageNet weights, training starts from RANDOM weights. %s", error)
            model, origin = _scratch(wanted, seed)
            return model, origin | {"requested": "imagenet", "reason": str(error)}
        path = hub.IMAGENET.path(weights_dir)
        origin = {key: record.get(key) for key in ("source", "revision", "licence")}
        model = _filled(path, adapt(load_torchvision(path), wanted, seed), wanted)
        return model, {"weights": "imagenet", "requested": "imagenet", "head": "fresh", **_file_entry(path), **origin}
    if config.weights == "scratch":
        return _scratch(wanted, seed)

    # A checkpoint of this package, head and all, or a file of torchvision or timm.
    path = Path(config.weights)
    arrays, header = read_safetensors(path)
    if header.get("format") == FORMAT:
        have = _checkpoint_config(path, header)
        if have.in_channels != wanted.in_channels:
            raise ModelFormatError(
                f"{path} takes {have.in_channels} channels, the configuration asks for {wanted.in_channels}; "
                f"set model.in_channels: {have.in_channels}"
            )
        if have.output_stride != wanted.output_stride:
            log.warning("%s was trained at output stride %d, now %d", path, have.output_stride, wanted.output_stride)
        model, head = _filled(path, arrays, wanted), "loaded"
    else:
        weights = load_torchvision(path)
        head = "loaded" if weights["fc.weight"].shape[0] == wanted.num_classes else "fresh"
        model = _filled(path, adapt(weights, wanted, seed), wanted)
    return model, {"weights": "file", "requested": config.weights, "head": head, **_file_entry(path)}


def fetch_imagenet(weights_dir: str | Path, local: Path | None = None, again: bool = False) -> dict[str, Any]:
    """Check the ImageNet weights in `weights_dir`; fetch them when they are not there.

    Args:
        local: a copy on this machine to take instead of the hub's.
        again: fetch although they are there.

    Returns:
        Their record (`hub.fetch_file`).

    Raises:
        WeightsUnavailableError: not here, and the hub cannot be reached.
        WeightsCorruptError: here, but changed since they were fetched.
        ModelFormatError: what was fetched is not torchvision's ResNet-18 with 3 channels and 1000 classes.
    """
    if hub.IMAGENET.path(weights_dir).exists() and local is None and not again:
        return hub.check_record(hub.IMAGENET, weights_dir)
    return hub.fetch_file(hub.IMAGENET, weights_dir, check_imagenet, local)


def check_imagenet(path: Path) -> None:
    """Raise ModelFormatError unless a file is a torchvision `resnet18` with 3 channels and 1000 classes."""
    weights = load_torchvision(path)
    channels, classes = weights["conv1.weight"].shape[1], weights["fc.weight"].shape[0]
    if (channels, classes) != (3, 1000):
        raise ModelFormatError(f"{path} has {channels} input channels and {classes} classes; ImageNet's has 3 and 1000")


def freeze(model: ResNet18, stages: int, batchnorm: bool) -> None:
    """Keep the leading parts of a model, or all its BatchNorms, as they are while the rest trains.

    A frozen BatchNorm also normalizes with its running statistics and leaves them alone.

    Args:
        model: changed in place; parts that are not named become trainable.
        stages: leading parts: 0 none, 1 the stem, 2 to 5 also layer1 to layer4.
        batchnorm: every BatchNorm's scale, shift and statistics.

    Raises:
        ValueError: `stages` is not 0 to 5.
    """
    if not 0 <= stages <= 5:
        raise ValueError(f"freeze_stages is {stages}; 0 (nothing) to 5 (all but the head)")
    model.unfreeze()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        # A parent's unfreeze reaches into its children past their own: running statistics would be trained.
        norm.unfreeze()
    parts = [[model.conv1, model.bn1], model.layer1, model.layer2, model.layer3, model.layer4][:stages]
    frozen = [part for stage in parts for part in stage]
    for part in frozen:
        part.freeze()
    inside = {id(module) for part in frozen for module in part.modules()}
    for norm in norms:
        norm.frozen_statistics = batchnorm or id(norm) in inside
        if norm.frozen_statistics:
            norm.freeze()


def _scratch(config: ResNetConfig, seed: int) -> tuple[ResNet18, dict[str, Any]]:
    model = ResNet18(config)
    initialize(model, seed, zero_init_residual=True)
    mx.eval(model.parameters())
    return model, {"weights": "scratch", "requested": "scratch", "head": "fresh"}


def _filled(path: str | Path, arrays: Mapping[str, mx.array], config: ResNetConfig) -> ResNet18:
    check_weights(path, arrays, _shapes(config), "nhwc")
    model = ResNet18(config)
    model.load_weights(list(arrays.items()), strict=True)
    mx.eval(model.parameters())
    return model


def _gray_stem(kernel: mx.array) -> tuple[mx.array, mx.array]:
    """One-channel kernel (64, 7, 7, 1), and the constant (64,) that three channels add for a gray image."""
    std = mx.array(RGB_STD)
    gray = (kernel * (GRAY_STD / std)).sum(axis=-1, keepdims=True)
    constant = (kernel * ((GRAY_MEAN - mx.array(RGB_MEAN)) / std)).sum(axis=(1, 2, 3))
    return gray, constant


def _shapes(config: ResNetConfig) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in tree_flatten(ResNet18(config).parameters())}


def _checkpoint_config(path: str | Path, header: Mapping[str, str]) -> ResNetConfig:
    if header.get("format") != FORMAT:
        raise ModelFormatError(
            f"{path} is not a checkpoint of this package (format {header.get('format')!r} in its header); "
            "torchvision or timm weights are given as model.weights, and trained"
        )
    if header.get("schema") != SCHEMA or header.get("layout") != "nhwc":
        raise ModelFormatError(
            f"{path} has schema {header.get('schema')!r} and layout {header.get('layout')!r}; this version "
            f"reads schema {SCHEMA!r}, layout 'nhwc'"
        )
    try:
        config = ResNetConfig(**json.loads(header["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(f"{path}: the configuration in its header cannot be used: {error}") from None
    if header.get("labels") != _labels_entry(config).get("labels"):
        raise ModelFormatError(f"{path} was trained on other labels, or in another order: {header.get('labels')}")
    return config


def _labels_entry(config: ResNetConfig) -> dict[str, str]:
    return {"labels": json.dumps(LABELS)} if config.num_classes == len(LABELS) else {}


def _file_entry(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_file(path)}
