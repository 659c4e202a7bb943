"""All 14 logits of a study from one forward pass: yes minus no, read from the language head where each line ends.

The tower of layers is walked here, layer by layer, so that its last norm and the head are computed at 14 positions and
for two rows of the vocabulary only; the full logits of 512 tokens would be 134 MB per study in float32.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def answer_direction(language_model: nn.Module, yes: int, no: int) -> mx.array:
    """float32 (H,): the head's row for `yes` minus that for `no`; quantized heads are read through their scales."""
    answers = mx.array([yes, no])
    if "lm_head" in language_model:
        head = language_model.lm_head
        rows = head.weight[answers]
        if isinstance(head, nn.QuantizedLinear):
            rows = mx.dequantize(
                rows,
                head.scales[answers],
                head.biases[answers] if head.biases is not None else None,
                group_size=head.group_size,
                bits=head.bits,
                mode=getattr(head, "mode", "affine"),
            )
    else:
        rows = language_model.model.embed_tokens(answers)
    rows = rows.astype(mx.float32)
    direction = rows[0] - rows[1]
    # A compiled step can hold a constant, not a graph that is still to be computed.
    mx.eval(direction)
    return direction


def hidden_states(language_model: nn.Module, embeddings: mx.array, checkpoint: bool = False) -> mx.array:
    """States before the last norm.

    Args:
        language_model: the decoder of an LFM2.5-VL.
        embeddings: (B, L, H), of tokens and of the film.
        checkpoint: compute each layer's activations again in the backward pass instead of keeping them.

    Returns:
        (B, L, H).
    """
    h = embeddings
    for layer in language_model.model.layers:
        mask = "causal" if layer.is_attention_layer else None
        h = _checkpointed(layer, mask)(h) if checkpoint else layer(h, mask)
    return h


def finding_logits(
    language_model: nn.Module, embeddings: mx.array, read: mx.array, direction: mx.array, checkpoint: bool = False
) -> mx.array:
    """float32 (B, 14): the answers.

    Args:
        language_model: the decoder.
        embeddings: (B, L, H).
        read: int (B, 14), positions along L.
        direction: `answer_direction`.
        checkpoint: as `hidden_states`.
    """
    return answers(finding_states(language_model, embeddings, read, checkpoint), direction)


def finding_states(
    language_model: nn.Module, embeddings: mx.array, read: mx.array, checkpoint: bool = False
) -> mx.array:
    """(B, 14, H): normed states where each line ends, from which the answers are read."""
    h = hidden_states(language_model, embeddings, checkpoint)
    h = mx.take_along_axis(h, read[..., None].astype(mx.int32), axis=1)
    return language_model.model.embedding_norm(h)


def answers(states: mx.array, direction: mx.array) -> mx.array:
    """float32 (B, 14): the answers that `finding_states` (B, 14, H) give in `direction`."""
    return states.astype(mx.float32) @ direction


def _checkpointed(layer: nn.Module, mask: str | None) -> Any:
    # The backward pass runs `forward` again, and dropout has to draw the same mask then.
    following, key = mx.random.split(mx.random.state[0])
    mx.random.state[0][:] = following

    def forward(parameters: dict, x: mx.array) -> mx.array:
        layer.update(parameters)
        outside = mx.random.state[0][:]
        mx.random.state[0][:] = key
        out = layer(x, mask)
        mx.random.state[0][:] = outside
        return out

    return lambda x: mx.checkpoint(forward)(layer.trainable_parameters(), x)
