"""All 14 logits of a study from one forward pass: yes minus no, read from the language head where each line ends.

The end of the last layer, the last norm and the head are computed at 14 positions, and the head for two rows of the
vocabulary only; the full logits of 512 tokens would be 134 MB per study in float32.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_cxr.teacher.decoder import decode


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


def finding_logits(
    language_model: nn.Module,
    embeddings: mx.array,
    read: mx.array,
    direction: mx.array,
    checkpoint: bool = False,
    shared: int = 0,
) -> mx.array:
    """float32 (B, 14): the answers.

    Args:
        embeddings: (B, L, H).
        read: int (B, 14), positions along L.
        shared: as `decode`; no answer is read among these tokens.
    """
    return answers(finding_states(language_model, embeddings, read, checkpoint, shared), direction)


def finding_states(
    language_model: nn.Module, embeddings: mx.array, read: mx.array, checkpoint: bool = False, shared: int = 0
) -> mx.array:
    """(B, 14, H): normed states where each line ends, from which the answers are read."""
    model = language_model.model
    states = decode(model.layers, embeddings, read.astype(mx.int32), shared, checkpoint, language_model.training)
    return model.embedding_norm(states)


def answers(states: mx.array, direction: mx.array) -> mx.array:
    """float32 (B, 14): the answers that `finding_states` (B, 14, H) give in `direction`."""
    return states.astype(mx.float32) @ direction
