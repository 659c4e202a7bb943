"""The base model: found, checked and opened through mlx-vlm, with what identifies it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cxr.core import device
from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import hash_of
from mlx_cxr.models.hub import LFM, WeightsCorruptError, base_files, check_base, file_sha256, way_to
from mlx_cxr.models.weight_files import value_faults
from mlx_cxr.teacher.without_pytorch import without_pytorch

log = logging.getLogger("mlx_cxr")


class BaseUnavailableError(UserError, FileNotFoundError):
    """The base model is not on this machine; the message says how it gets here."""


@dataclass(frozen=True)
class Base:
    """An opened base.

    Attributes:
        name: as the configuration names it.
        sha256: over the hashes of its weights, `config.json` and `tokenizer.json`.
        model: `mlx_vlm`'s model, frozen and in evaluation mode.
        tokenizer: with the chat template.
        grey: (mean, deviation) that grey levels in [0, 1] are normalized by for the vision tower.
        precision: of its floating-point weights, such as `float32`.
        bits: of quantized weights; None where none is quantized.
        parameters: of the whole base, vision too, adapters not; quantized weights count unpacked.
    """

    name: str
    folder: Path
    sha256: str
    model: nn.Module
    tokenizer: Any
    grey: tuple[float, float]
    precision: str
    bits: int | None
    parameters: int

    @classmethod
    def open(cls, config: TeacherConfig, weights_dir: Path, vision: bool = True) -> Base:
        """Find, check and load the base.

        Args:
            config: `base` names it; `training.precision` is that of its weights.
            weights_dir: where `fetch_weights` puts what it fetches.
            vision: keep the vision tower and the projector; without them a text teacher takes a quarter less.

        Raises:
            BaseUnavailableError: it is not here.
            WeightsCorruptError: it lacks a file, is cut short, of another architecture, other than it was when it was
                fetched or made, or has values that no training leaves; names each fault.
        """
        folder = find_base(config.base, weights_dir)
        check_base(folder)
        with without_pytorch():
            from mlx_vlm import load

            try:
                model, processor = load(str(folder), lazy=True)
            except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
                raise WeightsCorruptError(f"{folder}: mlx-vlm cannot open it: {str(error)[:500]}") from None
        parameters = parameter_count(model)
        if not vision:
            del model.vision_tower, model.multi_modal_projector
        precision = chosen_precision(config.training.precision, model)
        model.set_dtype(getattr(mx, precision))
        model.freeze()
        model.eval()
        # One at a time: all at once would hold each weight as it is in the file beside its copy in this precision.
        faults = []
        for name, weight in tree_flatten(model.parameters()):
            mx.eval(weight)
            faults += value_faults({name: weight})
        if faults:
            raise WeightsCorruptError(f"{folder}: " + "; ".join(faults[:5]) + f"; {way_to(folder)}")
        quantized = [
            m.bits for _, m in model.named_modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))
        ]
        base = cls(
            config.base,
            folder,
            base_sha256(folder),
            model,
            processor.tokenizer,
            (float(processor.image_processor.image_mean[0]), float(processor.image_processor.image_std[0])),
            precision,
            min(quantized, default=None),
            parameters,
        )
        bits = f", {base.bits} bits" if base.bits else ""
        log.info("base %s: %s parameters, %s%s", folder, f"{base.parameters:,}", precision, bits)
        return base

    @property
    def identity(self) -> dict[str, Any]:
        """Hash and bits, which an adapter or a cache must agree with to belong to this base."""
        return {"sha256": self.sha256, "bits": self.bits}

    def release_vision(self) -> None:
        """Drop the vision tower and the projector, once the embeddings of all images are on the disk."""
        if "vision_tower" in self.model:
            del self.model.vision_tower, self.model.multi_modal_projector
            mx.clear_cache()

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def downsample(self) -> int:
        """Side in pixels of the square of image behind one image token."""
        return int(self.model.config.encoder_patch_size * self.model.config.downsample_factor)


def parameter_count(model: nn.Module) -> int:
    """Weights without adapters; 8 of 4 bits packed into one integer count as 8."""
    total = 0
    for _, module in model.named_modules():
        for key, value in module.items():
            if not isinstance(value, mx.array) or key in ("lora_a", "lora_b"):
                continue
            quantized = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
            if quantized and key in ("scales", "biases"):
                continue
            total += value.size * 32 // module.bits if quantized and key == "weight" else value.size
    return total


def find_base(base: str, weights_dir: Path) -> Path:
    """The folder of a base: a path as it is, a hub id by its last part under `weights_dir`.

    Raises:
        BaseUnavailableError: there is no such folder.
    """
    if Path(base).is_dir():
        return Path(base)
    fetched = weights_dir / base.rsplit("/", 1)[-1]
    if base.count("/") == 1 and not base.startswith(".") and fetched.is_dir():
        return fetched
    if base == LFM.repo:
        way = "run `python -m mlx_cxr.fetch_weights --what lfm` (3.2 GB) where there is a network"
    elif base.count("/") == 1 and not base.startswith("."):
        way = f"put a download of it there (`hf download {base} --local-dir {fetched}`)"
    else:
        way = "name a local folder or a hub id; `python -m mlx_cxr.make_tiny_teacher` makes a small one to try things"
    raise BaseUnavailableError(f"teacher.base {base!r}: no such folder, and none at {fetched}; {way}")


def chosen_precision(wanted: str, model: nn.Module) -> str:
    """`wanted`, or for `auto` what is stored; on the CPU float32, as it multiplies nothing else fast."""
    if wanted != "auto":
        return wanted
    if device.device_kind() == "cpu":
        return "float32"
    stored = model.language_model.model.embedding_norm.weight.dtype
    return next((name for name in ("float32", "float16") if getattr(mx, name) == stored), "bfloat16")


def base_sha256(folder: Path) -> str:
    """Hex hash over what decides a base's answers (`base_files`)."""
    return hash_of({path.name: file_sha256(path) for path in base_files(folder)})
