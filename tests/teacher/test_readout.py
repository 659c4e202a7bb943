"""An answer sees the input and the lines above it, and nothing else; heads quantized, tied or apart."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from toy_teacher import prompts_of

from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.prompt import PromptBatch, PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, finding_logits, finding_states
from mlx_cxr.teacher.scoring import prompt_embeddings

TEXTS = ("Edema. Clear lungs.", "The heart is enlarged " * 5)
SLACK = 2e-5


def answers(base, form: PromptFormat, batch: PromptBatch, image: mx.array | None = None) -> np.ndarray:
    language = base.model.language_model
    embeddings = prompt_embeddings(language, form, mx.array(batch.ids), image)
    direction = answer_direction(language, form.yes, form.no)
    return np.array(finding_logits(language, embeddings, mx.array(batch.read), direction))


@pytest.mark.parametrize("line", range(14))
def test_an_answer_does_not_see_what_follows(base, form, line):
    """Everything after the line is replaced by other tokens."""
    batch = padded(prompts_of(form, TEXTS), 32)
    wanted = answers(base, form, batch)
    changed = batch.ids.copy()
    for row, read in zip(changed, batch.read, strict=True):
        row[read[line] + 1 :] = np.random.default_rng(line).integers(500, 700, len(row) - read[line] - 1)
    got = answers(base, form, PromptBatch(changed, batch.read, batch.tokens))
    np.testing.assert_allclose(got[:, : line + 1], wanted[:, : line + 1], atol=SLACK)
    if line < 13:
        assert np.abs(got[:, line + 1 :] - wanted[:, line + 1 :]).max() > 1e-3


def test_an_answer_sees_the_report_and_the_lines_above(base, form):
    batch = padded(prompts_of(form, TEXTS[:1]), 32)
    wanted = answers(base, form, batch)
    for position in (len(form.head) + 2, batch.read[0, 3] - 1):
        changed = batch.ids.copy()
        changed[0, position] = 700
        got = answers(base, form, PromptBatch(changed, batch.read, batch.tokens))
        seen = batch.read[0] >= position
        assert (np.abs(got - wanted)[0, seen] > 1e-6).all()
        np.testing.assert_allclose(got[0, ~seen], wanted[0, ~seen], atol=SLACK)


@pytest.mark.parametrize("bucket", [1, 64, 256])
def test_padding_and_neighbours_change_nothing(base, form, bucket):
    alone = [answers(base, form, padded([prompt], 1))[0] for prompt in prompts_of(form, TEXTS)]
    together = answers(base, form, padded(prompts_of(form, [*TEXTS, "x " * 200]), bucket))
    np.testing.assert_allclose(together[:2], alone, atol=SLACK)


def test_the_image_stands_in_the_place_of_its_tokens_only(base):
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    image = mx.random.normal((2, 4, 64), key=mx.random.key(0)).astype(mx.float16)
    plain = np.array(prompt_embeddings(language, form, mx.array(batch.ids)))
    with_image = np.array(prompt_embeddings(language, form, mx.array(batch.ids), image))
    places = batch.ids == form.image_token
    assert places.sum() == 8
    np.testing.assert_array_equal(with_image[places], np.array(image.astype(mx.float32)).reshape(8, 64))
    np.testing.assert_array_equal(with_image[~places], plain[~places])


def test_a_head_of_its_own_is_read_and_not_the_embedding():
    head = nn.Linear(64, 50, bias=False)
    ours = np.array(answer_direction(SimpleHead(lm_head=head), 7, 3))
    np.testing.assert_allclose(ours, np.array(head.weight[7] - head.weight[3]), rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_read_through_its_scales(bits):
    head = nn.Linear(64, 50, bias=False)
    quantized = nn.QuantizedLinear.from_linear(head, 32, bits)
    rows = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, 32, bits)
    ours = np.array(answer_direction(SimpleHead(lm_head=quantized), 7, 3))
    np.testing.assert_allclose(ours, np.array(rows[7] - rows[3]), atol=1e-7)
    embedding = nn.Embedding(50, 64)
    tied = nn.QuantizedEmbedding.from_embedding(embedding, 32, bits)
    rows = mx.dequantize(tied.weight, tied.scales, tied.biases, 32, bits)
    ours = np.array(answer_direction(SimpleHead(model=SimpleNamespace(embed_tokens=tied)), 7, 3))
    np.testing.assert_allclose(ours, np.array(rows[7] - rows[3]), atol=1e-7)


class SimpleHead(dict):
    """The part of a language model that the direction is read from."""

    __getattr__ = dict.__getitem__


def test_only_the_positions_that_are_read_reach_the_last_norm(base, form):
    language = base.model.language_model
    batch = padded(prompts_of(form, TEXTS), 32)
    embeddings = prompt_embeddings(language, form, mx.array(batch.ids))
    states = finding_states(language, embeddings, mx.array(batch.read))
    assert states.shape == (2, len(LABELS), 64)
    rms = np.sqrt(np.mean((np.array(states) / np.array(language.model.embedding_norm.weight)) ** 2, axis=-1))
    np.testing.assert_allclose(rms, 1.0, atol=1e-3)


def test_recomputed_layers_answer_alike(base, form):
    language = base.model.language_model
    batch = padded(prompts_of(form, TEXTS), 32)
    embeddings = prompt_embeddings(language, form, mx.array(batch.ids))
    kept, recomputed = (finding_states(language, embeddings, mx.array(batch.read), flag) for flag in (False, True))
    np.testing.assert_array_equal(np.array(kept), np.array(recomputed))
