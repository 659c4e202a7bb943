"""LFM2's decoder layers over the modules that mlx-vlm opens, for prompts that begin alike.

The layers are mlx-vlm's, weights and all; their forward pass is computed here for four things that theirs does not
give: tokens that all prompts of a batch begin with are computed once, with gradients; adapters work in the precision of
the base, with one dropout mask for the projections of one input, which takes less memory; nothing is kept for the
backward pass that is cheaper to compute again; and on the CPU backend the exponentials are those of `ops.activations`,
and all cores work on a batch inside `ops.streams.batch_parallel`. `tests/teacher` holds it against mlx-vlm and against
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_cxr.ops.activations import fast, softmax, swiglu
from mlx_cxr.ops.streams import each, here, joined, split, with_gradient

State = tuple[mx.array, ...]
"""A layer's state for the tokens that follow: keys and values (1, heads, P, D), or a short convolution's last inputs
(1, K - 1, H)."""

_HIDDEN = -1e30
"""Added to the score of a token that is not to be seen."""


class Dropout(NamedTuple):
    """Inputs of the adapters that are dropped: drawn by a key for a whole batch, of which some rows are at hand.

    So the same ones are dropped into however many parts a batch is cut.
    """

    key: mx.array
    start: int
    """Row of the batch that is the first one here."""
    rows: int
    """Of the batch."""

    def kept(self, x: mx.array, share: float) -> tuple[mx.array, float]:
        """Bool of the shape of `x`, (B, L, I), and the share of the batch's elements that is kept, about `share`."""
        # One random byte per element is a quarter of the usual draws; the share is that to the nearest 1 / 256.
        kept = min(max(round(256 * share), 1), 255)
        shape = (self.rows, *x.shape[1:])
        size = self.rows * x[0].size
        draws = mx.random.split(self.key, -(-size // 8)).view(mx.uint8).reshape(-1)[:size].reshape(shape)
        return draws[self.start : self.start + len(x)] < kept, kept / 256


def decode(
    layers: Sequence[nn.Module],
    embeddings: mx.array,
    read: mx.array | None = None,
    shared: int = 0,
    checkpoint: bool = False,
    training: bool = False,
) -> mx.array:
    """States after the last layer.

    Args:
        embeddings: (B, L, H), of tokens and of the image.
        read: int (B, R), positions along L whose states are wanted, none of them shared; None for all of them. The
            last layer is computed there only.
        shared: so many of the first tokens are the same in every row; only the first row's are computed.
        checkpoint: compute each layer's activations again in the backward pass instead of keeping them.
        training: drop inputs of the adapters out, as their `dropout` says, by `mx.random`'s state.

    Returns:
        (B, R, H); (B, L - shared, H) where `read` is None.
    """
    if training:
        following, key = mx.random.split(mx.random.state[0])
        mx.random.state[0][:] = following
        keys = mx.random.split(key, 2 * len(layers))
    beginning, parts = embeddings[:1, :shared], split(embeddings[:, shared:])
    places = [None] * len(parts) if read is None else split(read - shared)
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]

    def decoded(h: mx.array, places: mx.array | None, start: int) -> mx.array:
        first = beginning
        for number, layer in enumerate(layers):
            run = _checkpointed(layer) if checkpoint else partial(decoder_layer, layer)
            drops = [None, None]
            if training:
                drops = [Dropout(keys[2 * number], 0, 1), Dropout(keys[2 * number + 1], start, len(embeddings))]
            state: State = ()
            if shared:
                first, state = run(first, (), drops[0], None)
            h, _ = run(h, state, drops[1], places if number == len(layers) - 1 else None)
        return h

    return joined(each(decoded, parts, places, starts))


def decoder_layer(
    layer: nn.Module, x: mx.array, before: State, drop: Dropout | None, read: mx.array | None = None
) -> tuple[mx.array, State]:
    """One layer.

    Args:
        layer: mlx-vlm's `Lfm2DecoderLayer`.
        x: (B, L, H).
        before: its state from tokens that come before those of `x`; empty where none do.
        drop: inputs of the adapters; None drops nothing.
        read: int (B, R), positions along L whose states are wanted; None for all.

    Returns:
        (B, R or L, H), and its state.
    """
    drops = [None] * 4 if drop is None else [drop._replace(key=key) for key in mx.random.split(drop.key, 4)]
    operator = _attention if layer.is_attention_layer else _short_convolution
    module = layer.self_attn if layer.is_attention_layer else layer.conv
    mixed, state = operator(module, layer.operator_norm(x), before, drops[:2], read)
    h = _at(x, read) + mixed
    ffn = layer.feed_forward
    gate, up = projections(layer.ffn_norm(h), drops[2], ffn.w1, ffn.w3)
    (out,) = projections(swiglu(gate, up), drops[3], ffn.w2)
    return h + out, state


def projections(x: mx.array, drop: Dropout | None, *linears: nn.Module) -> list[mx.array]:
    """One input through some linear layers, each with its adapter where it has one.

    The adapters' product is taken in the precision of `x`, and they see the same input, dropped out or not.

    Args:
        x: (B, L, I).
        drop: inputs of the adapters; None drops nothing.
        linears: of I inputs.
    """
    adapted = [linear for linear in linears if "lora_a" in linear]
    # Under the name by which `nn.Dropout` keeps the share that stays.
    keep = adapted[0].dropout._p_1 if adapted else 1.0
    dropped = x
    if drop is not None and keep < 1.0:
        kept, keep = drop.kept(x, keep)
        dropped = with_gradient(_masked, _masked_gradient)(x, kept)
    else:
        keep = 1.0
    outputs = []
    for linear in linears:
        if "lora_a" not in linear:
            outputs.append(linear(x))
            continue
        inner = dropped @ linear.lora_a.astype(x.dtype)
        scale = linear.scale / keep
        outputs.append(mx.addmm(linear.linear(x), inner, linear.lora_b.astype(x.dtype), alpha=scale))
    return outputs


def _masked(x: mx.array, kept: mx.array) -> mx.array:
    """`x` where `kept`, else 0, as a product: a choice is slower on the CPU backend, and a float mask larger."""
    return x * kept


def _masked_gradient(x: mx.array, kept: mx.array, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    return cotangent * kept, mx.zeros_like(kept)


def _attention(
    attention: nn.Module, x: mx.array, before: State, drops: Sequence[Dropout | None], read: mx.array | None
) -> tuple[mx.array, State]:
    rows, length, _ = x.shape
    offset = before[0].shape[2] if before else 0

    def heads(projected: mx.array, count: int) -> mx.array:
        return projected.reshape(rows, length, count, -1)

    q, k, v = projections(x, drops[0], attention.q_proj, attention.k_proj, attention.v_proj)
    q = attention.q_layernorm(heads(q, attention.n_heads)).transpose(0, 2, 1, 3)
    k = attention.k_layernorm(heads(k, attention.n_kv_heads)).transpose(0, 2, 1, 3)
    v = heads(v, attention.n_kv_heads).transpose(0, 2, 1, 3)
    q, k = attention.rope(q, offset=offset), attention.rope(k, offset=offset)
    if before:
        k, v = (
            mx.concatenate([mx.broadcast_to(old, (rows, *old.shape[1:])), new], axis=2)
            for old, new in zip(before, (k, v), strict=True)
        )
    if read is not None:
        q = mx.take_along_axis(q, read[:, None, :, None], axis=2)
    attend = _grouped_attention if fast(x) else _fused_attention
    mixed = attend(q, k, v, attention.scale, None if read is None else read + offset)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(rows, q.shape[2], -1)
    return projections(mixed, drops[1], attention.out_proj)[0], (k, v)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, places: mx.array | None) -> mx.array:
    """Attention of queries that stand at the end, or at `places` (B, Q), to the keys up to their own."""
    mask = "causal" if places is None else mx.arange(k.shape[2]) <= places[:, None, :, None]
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _grouped_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, places: mx.array | None) -> mx.array:
    """The same; a group of query heads shares a head of keys in one product."""
    rows, heads, queries, width = q.shape
    groups, seen = k.shape[1:3]
    ends = mx.arange(seen - queries, seen)[:, None] if places is None else places[:, None, :, None]
    unseen = (mx.arange(seen) > ends).astype(q.dtype) * _HIDDEN
    scores = (q * scale).reshape(rows, groups, -1, width) @ k.swapaxes(-1, -2)
    weights = softmax(scores.reshape(rows, heads, queries, seen) + unseen)
    return (weights.reshape(rows, groups, -1, seen) @ v).reshape(rows, heads, queries, width)


def _short_convolution(
    conv: nn.Module, x: mx.array, before: State, drops: Sequence[Dropout | None], read: mx.array | None
) -> tuple[mx.array, State]:
    (projected,) = projections(x, drops[0], conv.in_proj)
    gate_in, gate_out, value = mx.split(projected, 3, axis=-1)
    gated = gate_in * value
    rows, length, width = gated.shape
    earlier = conv.L_cache - 1
    start = before[0] if before else mx.zeros((1, earlier, width), gated.dtype)
    gated = mx.concatenate([mx.broadcast_to(start, (rows, earlier, width)), gated], axis=1)
    if fast(x):
        kernel = conv.conv.weight[..., 0]
        mixed = sum(kernel[:, i] * gated[:, i : i + length] for i in range(conv.L_cache))
        mixed = mixed + conv.conv.bias if "bias" in conv.conv else mixed
    else:
        mixed = conv.conv(gated)
    return projections(_at(gate_out * mixed, read), drops[1], conv.out_proj)[0], (gated[:, -earlier:],)


def _at(x: mx.array, read: mx.array | None) -> mx.array:
    """(B, R, H) of (B, L, H)."""
    return x if read is None else mx.take_along_axis(x, read[..., None], axis=1)


def _checkpointed(layer: nn.Module) -> Callable[..., tuple[mx.array, State]]:
    """`decoder_layer` of a layer that keeps only its inputs for the backward pass.

    Unlike `mx.checkpoint`'s, its activations are computed again only when the gradient has reached it, and the gradient
    is passed on only when that of the adapters is taken: on several streams MLX's order would else have the activations
    of all layers in memory.
    """
    stream, own = here(), tree_flatten(layer.trainable_parameters())

    def run(x: mx.array, before: State, drop: Dropout | None, read: mx.array | None) -> tuple[mx.array, State]:
        def forward(*arrays: mx.array) -> list[mx.array]:
            layer.update(tree_unflatten([(name, array) for (name, _), array in zip(own, arrays, strict=False)]))
            x, *before = arrays[len(own) :]
            out, state = decoder_layer(layer, x, tuple(before), drop, read)
            return [out, *state]

        kept = mx.custom_function(forward)

        @kept.vjp
        def vjp(
            arrays: tuple[mx.array, ...], cotangents: list[mx.array], outputs: list[mx.array]
        ) -> tuple[mx.array, ...]:
            with mx.stream(stream):
                _, slopes = mx.vjp(forward, mx.depends(list(arrays), list(cotangents)), list(cotangents))
                of_weights, of_inputs = slopes[: len(own)], slopes[len(own) :]
                # In an explanation nobody asks for the adapters' gradient, and it is not to be taken.
                if of_weights and layer.training:
                    of_inputs = mx.depends(of_inputs, of_weights)
            layer.update(tree_unflatten(own))
            return (*of_weights, *of_inputs)

        out, *state = kept(*(array for _, array in own), x, *before)
        return out, tuple(state)

    return run
