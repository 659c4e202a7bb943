"""LoRA adapters on the language model, in mlx-vlm's own schema, and the checks before one is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cxr.core.config_schema import LoraConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_json, write_json
from mlx_cxr.models.weight_files import read_safetensors, write_safetensors
from mlx_cxr.teacher.without_pytorch import without_pytorch

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"
_LAYERS = "language_model.model.layers"


class AdapterError(UserError, ValueError):
    """An adapter that cannot be attached: to this base, in this shape, or at all; names file and fault."""


def attach_lora(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Freeze the model and put fresh adapters on it, A uniform and B zero, so that nothing changes yet.

    Args:
        model: an LFM2.5-VL, quantized or not.
        seed: of A.

    Returns:
        Names of the adapted layers.

    Raises:
        AdapterError: a module name that no decoder layer has, or more layers than there are.
    """
    with without_pytorch():
        from mlx_vlm.trainer.peft import get_peft_model

    names = target_layers(model, config)
    mx.random.seed(seed)
    get_peft_model(model, names, rank=config.rank, alpha=config.alpha, dropout=config.dropout, verbose=False)
    mx.eval(model.trainable_parameters())
    return names


def target_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the linear layers that a configuration adapts, in the order of the decoder.

    Raises:
        AdapterError: as `attach_lora`.
    """
    layers = model.language_model.model.layers
    if config.layers is not None and config.layers > len(layers):
        raise AdapterError(f"teacher.lora.layers {config.layers}: the base has {len(layers)} decoder layers")
    first = len(layers) - (config.layers or len(layers))
    linear = {
        f"{number}.{name}"
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    }
    known = {name.split(".", 1)[1] for name in linear}
    if unknown := [name for name in config.modules if name not in known]:
        raise AdapterError(
            f"teacher.lora.modules: the base has no {', '.join(unknown)}; "
            f"its linear layers are {', '.join(sorted(known))}"
        )
    wanted = [f"{i}.{name}" for i in range(first, len(layers)) for name in config.modules]
    names = [f"{_LAYERS}.{name}" for name in wanted if name in linear]
    if not names:
        raise AdapterError(
            f"the last {config.layers} decoder layers have none of teacher.lora.modules; adapt more layers or modules"
        )
    return names


def linear_widths(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantized or not, with an adapter or without."""
    linear = linear.linear if "linear" in linear else linear
    outputs, inputs = linear.weight.shape
    return inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs, outputs


def adapter_parameters(model: nn.Module) -> int:
    """Weights of all adapters, the only ones that are not frozen."""
    return sum(value.size for _, value in tree_flatten(model.trainable_parameters()))


def save_adapter(folder: Path, model: nn.Module, base: dict[str, Any]) -> None:
    """Write `adapters.safetensors` and `adapter_config.json`, each atomically; `mlx_vlm` loads the folder as it is.

    Args:
        base: identity of the base they belong to; stands under `base` in the settings, which mlx-vlm ignores.
    """
    settings = model._vlm_adapter_config
    write_safetensors(folder / WEIGHTS, dict(tree_flatten(model.trainable_parameters())), {"format": "mlx"})
    write_json(folder / SETTINGS, {**settings, "base": base})


def load_adapter(model: nn.Module, folder: Path, base: dict[str, Any]) -> None:
    """Put a saved adapter on a fresh base, frozen and in evaluation mode.

    Args:
        base: as `save_adapter` was given; every entry must agree.

    Raises:
        AdapterError: as `read_adapter`.
    """
    with without_pytorch():
        from mlx_vlm.trainer.peft import load_adapters

    read_adapter(model, folder, base)
    load_adapters(model, folder)
    model.freeze()
    model.eval()


def read_adapter(model: nn.Module, folder: Path, base: dict[str, Any]) -> dict[str, mx.array]:
    """The arrays of a saved adapter, checked against a base that has none yet.

    Arguments are those of `load_adapter`.

    Raises:
        AdapterError: a file is missing or unreadable, the adapter is of another base or kind, or an array of it is
            missing, superfluous, or of another rank or width than the settings say.
    """
    settings_path, weights_path = folder / SETTINGS, folder / WEIGHTS
    for path in (settings_path, weights_path):
        if not path.exists():
            raise AdapterError(
                f"{path} is missing: no teacher is saved there; run lfm_finetune, or give its --run_name"
            )
    settings = read_json(settings_path)
    theirs = settings.get("base", {})
    if faults := [
        f"{key}: {theirs.get(key)} there, {value} here" for key, value in base.items() if theirs.get(key) != value
    ]:
        raise AdapterError(f"{settings_path} belongs to another base:\n  " + "\n  ".join(faults))
    if (kind := settings.get("fine_tune_type", "lora")) != "lora":
        raise AdapterError(f"{settings_path}: fine_tune_type is {kind!r}; only LoRA adapters are read")
    try:
        parameters = settings["lora_parameters"]
        keys, rank = parameters["keys"], parameters["rank"]
    except (KeyError, TypeError):
        raise AdapterError(f"{settings_path} lacks lora_parameters with keys and rank; is it a LoRA adapter?") from None
    arrays, _ = read_safetensors(weights_path)
    _check_arrays(weights_path, model, arrays, keys, rank)
    return arrays


def read_first_adapter(model: nn.Module, folder: Path, base: dict[str, Any], config: LoraConfig) -> dict[str, mx.array]:
    """The arrays of another adapter that fresh ones begin with, as a second phase does where the first ended.

    Args:
        config: of the adapters to be attached.

    Raises:
        AdapterError: as `read_adapter`, or it was made with other settings than `config`; names them.
    """
    arrays = read_adapter(model, folder, base)
    theirs = read_json(folder / SETTINGS)["lora_parameters"]
    pairs = {
        "modules or layers": (set(theirs["keys"]), set(target_layers(model, config))),
        "rank": (theirs["rank"], config.rank),
        "alpha / rank": (theirs.get("scale"), config.alpha / config.rank),
    }
    if faults := [name for name, (there, here) in pairs.items() if there != here]:
        raise AdapterError(
            f"teacher.start_from: {folder / SETTINGS} has other {', '.join(faults)} than teacher.lora; take the same"
        )
    return arrays


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn the adapters off inside the context: the base's zero-shot answers."""
    adapted = [module for _, module in model.named_modules() if "lora_a" in module]
    scales = [module.scale for module in adapted]
    try:
        for module in adapted:
            module.scale = 0.0
        yield
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale


def _check_arrays(path: Path, model: nn.Module, arrays: dict[str, mx.array], keys: list[str], rank: int) -> None:
    modules = dict(model.named_modules())
    expected = {}
    for name in keys:
        if name not in modules:
            raise AdapterError(f"{path}: the base has no layer {name}; it was made for another base")
        inputs, outputs = linear_widths(modules[name])
        expected |= {f"{name}.lora_a": (inputs, rank), f"{name}.lora_b": (rank, outputs)}
    faults = [f"{name} is missing" for name in expected if name not in arrays]
    faults += [f"{name} is not expected" for name in arrays if name not in expected]
    faults += [
        f"{name} is {arrays[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if faults:
        shown = "\n  ".join([*faults[:5], *([f"and {len(faults) - 5} more"] if len(faults) > 5 else [])])
        raise AdapterError(f"{path} does not fit the base and {SETTINGS}:\n  {shown}")
