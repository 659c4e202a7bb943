"""Memory of fine-tuning and scoring, estimated before they start, and a setting that would fit where they don't.

The count follows what each decoder layer keeps for the backward pass. For the 1.6B model on the CPU backend it is
0.3 % above MLX's peak in bfloat16 (one study of 128 tokens) and 2 % in float32 (one of 512);
`python -m mlx_cxr.benchmark --only teacher --teacher_size full` shows both for other shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_cxr.core import device
from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.teacher.lora import linear_widths

_FEED_FORWARD, _SCORES = 12, 6
"""Arrays that a layer's backward pass holds at once beside those kept: of the feed-forward width, or of the attention's
scores, whichever is more."""
_COPIES = 5
"""Float32 numbers per adapter weight: itself, its gradient, the sum of accumulated gradients, Adam's two moments."""
_SHARE = 0.7


class MemoryLimitError(UserError, MemoryError):
    """The estimate is above the limit; the message names a setting that would fit."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose.

    Attributes:
        weights: the base as it is in memory.
        adapters: LoRA weights, gradients and optimizer.
        activations: of one forward pass and its backward pass.
    """

    weights: int
    adapters: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.adapters + self.activations

    def __str__(self) -> str:
        return (
            f"{self.total / 1e9:.2f} GB (weights {self.weights / 1e9:.2f}, adapters and optimizer "
            f"{self.adapters / 1e9:.2f}, activations {self.activations / 1e9:.2f})"
        )


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder that decide its memory.

    Attributes:
        attention: for each layer, whether it is attention.
        hidden: width.
        inner: width of the feed-forward part.
        keys: width of all keys.
        heads: attention heads.
        weight_bytes: of the base's arrays in memory.
    """

    attention: tuple[bool, ...]
    hidden: int
    inner: int
    keys: int
    heads: int
    weight_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Read from an opened base, quantized or not."""
        layers, text = model.language_model.model.layers, model.config.text_config
        return cls(
            attention=tuple(bool(layer.is_attention_layer) for layer in layers),
            hidden=text.hidden_size,
            inner=linear_widths(layers[0].feed_forward.w1)[1],
            keys=text.num_key_value_heads * text.hidden_size // text.num_attention_heads,
            heads=text.num_attention_heads,
            weight_bytes=sum(value.nbytes for name, value in tree_flatten(model.parameters()) if "lora_" not in name),
        )


def training_estimate(
    decoder: Decoder, adapted: Sequence[tuple[int, int]], config: TeacherConfig, longest: int, precision: str
) -> MemoryEstimate:
    """Memory of one step of fine-tuning.

    Args:
        adapted: (inputs, outputs) of each adapted linear layer.
        config: batch, rank, dropout, checkpointing and bucket are used.
        longest: tokens of the longest prompt.
        precision: of the base's activations, such as `float32`.
    """
    tokens, length = _tokens(config.training.batch_size, longest, config.training.bucket)
    size = getattr(mx, precision).size
    layers = len(decoder.attention)
    dropped = config.lora.dropout > 0 and bool(adapted)
    kept = [_kept_bytes(decoder, attention, length, size, dropped) for attention in decoder.attention]
    scores = _SCORES * decoder.heads * length
    backward = [size * max(_FEED_FORWARD * decoder.inner, scores * attention) for attention in decoder.attention]
    # In the last layer, all that follows its keys or its convolution is computed only for the tokens that are read.
    kept[-1] -= _feed_forward_bytes(decoder, size, dropped)
    backward[-1] = 0
    before = [sum(kept[:i]) for i in range(layers)]
    if config.training.gradient_checkpointing:
        before = [layers * decoder.hidden * size] * layers
    per_token = max(map(sum, zip(before, kept, backward, strict=True)))
    weights = sum(config.lora.rank * (inputs + outputs) for inputs, outputs in adapted)
    return MemoryEstimate(decoder.weight_bytes, 4 * _COPIES * weights, round(tokens * per_token))


def scoring_estimate(decoder: Decoder, config: TeacherConfig, longest: int, precision: str) -> MemoryEstimate:
    """Memory of one batch of scoring: the widest moment of one layer, as nothing is kept."""
    tokens, length = _tokens(config.batch_size, longest, config.training.bucket)
    # Gate and up, and their products; or the scores, and in float32 the exponential's polynomial beside them.
    widest = 3 * decoder.hidden + 9 * decoder.inner
    if any(decoder.attention):
        widest = max(widest, 4 * decoder.hidden + (10 if precision == "float32" else 3) * decoder.heads * length)
    return MemoryEstimate(decoder.weight_bytes, 0, round(tokens * widest * getattr(mx, precision).size))


def adapted_widths(model: nn.Module, names: Sequence[str]) -> list[tuple[int, int]]:
    """(inputs, outputs) of linear layers by their full names."""
    modules = dict(model.named_modules())
    return [linear_widths(modules[name]) for name in names]


def memory_limit(config: TeacherConfig) -> int:
    """Bytes that may be taken: `teacher.memory_limit_gb`, or 70 % of the machine's memory."""
    if config.memory_limit_gb is not None:
        return int(config.memory_limit_gb * 1e9)
    return int(_SHARE * device.total_memory())


def check_training_fits(
    decoder: Decoder, adapted: Sequence[tuple[int, int]], config: TeacherConfig, longest: int, precision: str
) -> MemoryEstimate:
    """The estimate, or an error with a setting that would fit.

    Raises:
        MemoryLimitError: the estimate is above `memory_limit`.
    """
    estimate, limit = training_estimate(decoder, adapted, config, longest, precision), memory_limit(config)
    if estimate.total <= limit:
        return estimate
    way = next(
        (
            f"--set {' --set '.join(f'teacher.{key}={value}' for key, value in settings.items())} would take {other}"
            for settings in _remedies(config)
            if (other := training_estimate(decoder, adapted, _with(config, settings), longest, precision)).total
            <= limit
        ),
        "even one study at a time with gradient checkpointing would not fit: take a 4-bit copy of the base "
        "(teacher.base), or a lower teacher.max_tokens",
    )
    raise MemoryLimitError(
        f"fine-tuning would take about {estimate}, and {limit / 1e9:.1f} GB may be taken "
        f"(teacher.memory_limit_gb); {way}"
    )


def _remedies(config: TeacherConfig) -> list[dict[str, Any]]:
    """Settings that take less, in the order of what they cost: the same step in smaller passes, then recomputing."""
    training = config.training
    sizes = [training.batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    ways: list[dict[str, Any]] = []
    for recompute in (False,) if training.gradient_checkpointing else (False, True):
        for size in sizes:
            way: dict[str, Any] = {"training.gradient_checkpointing": "true"} if recompute else {}
            if size != training.batch_size:
                passes = max(1, training.accumulate * training.batch_size // size)
                way |= {"training.batch_size": size, "training.accumulate": passes}
            ways += [way] if way else []
    return ways


def _with(config: TeacherConfig, settings: dict[str, Any]) -> TeacherConfig:
    values = {key.removeprefix("training."): value == "true" or value for key, value in settings.items()}
    return config.model_copy(update={"training": config.training.model_copy(update=values)})


def _tokens(batch_size: int, longest: int, bucket: int) -> tuple[int, int]:
    length = -(-longest // bucket) * bucket
    return batch_size * length, length


def _kept_bytes(decoder: Decoder, attention: bool, length: int, size: int, dropped: bool) -> int:
    """Bytes per token that a layer keeps for its backward pass; a dropout's mask takes one for each of its inputs."""
    hidden, keys = decoder.hidden, decoder.keys
    # The layer's input and its norm's output; three gates in one projection; convolved; the output.
    kept = 7 * hidden
    if attention:
        # In their place queries, keys and values, both normed and rotated, and the scores' softmax, which a fused
        # kernel computes again.
        kept = 5 * hidden + 4 * keys + decoder.heads * length
    return kept * size + 2 * hidden * dropped + _feed_forward_bytes(decoder, size, dropped)


def _feed_forward_bytes(decoder: Decoder, size: int, dropped: bool) -> int:
    # The residual and its norm's output; gate, up and their product.
    inputs = decoder.hidden + decoder.inner
    return (decoder.hidden + inputs + 2 * decoder.inner) * size + inputs * dropped
