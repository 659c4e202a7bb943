"""Contributions of words: closed forms on toys, completeness and the plain prompt on a tiny teacher, a planted word."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from toy_teacher import EDEMA, HEART, ToyTeacher, opened

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.teacher.attribution import (
    AttributionError,
    Report,
    blanked,
    explain,
    gradient_x_input,
    integrated_gradients,
    leave_one_out,
)
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings, score

TEXT = "The lungs are clear, clear, clear. There is no edema. The heart is normal, normal, normal."
WORDS = ["the", "heart", "is", "large", "normal", "lungs", "are", "clear", "there", "no"]
SLACK = 2e-4


@pytest.fixture(scope="module")
def planted(toy: ToyTeacher) -> tuple[Base, PromptFormat]:
    """A base whose answer to Edema is whether the report holds the word "edema", by weights written by hand.

    The word's last token alone has something in dimension 0 of its embedding. The one layer that does anything attends
    to all positions alike and moves what it finds there to dimension 1, which the answers are read from. The token at a
    line's end begins with -1/2 there and 1 in dimension 2, so that the answer goes from -1/2 to 1/2 of sqrt(H / 1.25).
    """
    base = opened(toy.base)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    language = base.model.language_model
    without = form.prompt([("findings", " ".join(WORDS))])
    with_word = form.prompt([("findings", " ".join([*WORDS, "edema"]))])
    marker = [token for token in with_word.ids.tolist() if token not in without.ids][-1]
    place = int(without.read[EDEMA])
    endings = sorted(set(without.ids[without.read].tolist()))

    embeddings = np.array(language.model.embed_tokens.weight)
    embeddings[:, :3] = 0
    embeddings[form.no] = embeddings[form.yes]
    embeddings[form.yes, 1], embeddings[form.no, 1] = 0.5, -0.5
    embeddings[[*endings, marker]] = 0
    embeddings[endings, 1], embeddings[endings, 2] = -0.5, 1
    embeddings[marker, 0] = 1
    language.model.embed_tokens.weight = mx.array(embeddings)
    language.model.embedding_norm.weight = mx.ones_like(language.model.embedding_norm.weight)
    width = embeddings.shape[1]
    for layer in language.model.layers:
        layer.update(tree_map(lambda w: mx.zeros_like(w) if w.ndim > 1 else mx.ones_like(w), layer.parameters()))
    attention = next(layer for layer in language.model.layers if layer.is_attention_layer).self_attn
    attention.v_proj.weight = attention.v_proj.weight.at[0, 0].add(1.0)
    # Normed, the marker has sqrt(width) there, of which attention leaves one part in `place`.
    attention.out_proj.weight = attention.out_proj.weight.at[1, 0].add(place / width**0.5)
    base.model.freeze()
    return base, form


@pytest.fixture(scope="module")
def lively(toy: ToyTeacher) -> tuple[Base, PromptFormat]:
    """A base with larger weights, so that a report moves its answers by more than rounding."""
    base = opened(toy.base)
    base.model.update(tree_map(lambda w: 5 * w if w.ndim > 1 else w, base.model.parameters()))
    return base, PromptFormat.of(base.tokenizer, max_tokens=320)


@pytest.fixture(scope="module")
def form(lively) -> PromptFormat:
    return lively[1]


def drawn(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_on_a_linear_model_both_methods_give_the_exact_contributions():
    weights, x, blank = drawn(3, 5, 4), drawn(5, 4, seed=1), drawn(5, 4, seed=2)

    def answers(points):
        return mx.einsum("blh,klh->bk", points, weights) + 7.0

    expected = np.array(mx.sum(weights * x, axis=-1))[[2, 0]]
    np.testing.assert_allclose(gradient_x_input(answers, x, [2, 0], 1), expected, rtol=1e-5)
    expected = np.array(mx.sum(weights * (x - blank), axis=-1))[[2, 0]]
    np.testing.assert_allclose(integrated_gradients(answers, x, blank, [2, 0], 3, 2), expected, rtol=1e-5, atol=1e-5)


def test_integrated_gradients_of_a_cubic_follow_the_closed_form():
    """d/dp (w.p)^3 = 3 (w.p)^2 w; on the line w.p = b + a d, and the mean of its square is b^2 + b d + d^2 / 3."""
    w, x, blank = drawn(5, 4), drawn(5, 4, seed=1), drawn(5, 4, seed=2)

    def answers(points):
        return (mx.sum(points * w, axis=(1, 2)) ** 3)[:, None]

    b, d = float(mx.sum(w * blank)), float(mx.sum(w * (x - blank)))
    expected = 3 * (b * b + b * d + d * d / 3) * np.array(mx.sum(w * (x - blank), axis=-1))
    got = integrated_gradients(answers, x, blank, [0], 2, 8)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert got.sum() == pytest.approx((b + d) ** 3 - b**3, rel=1e-4)


def test_a_token_that_does_not_move_gets_nothing():
    x, blank = drawn(5, 4), drawn(5, 4, seed=1)
    blank[2] = x[2]
    got = integrated_gradients(lambda p: mx.sum(p**2, axis=(1, 2))[:, None], x, blank, [0], 4, 4)[0]
    assert got[2] == 0
    assert np.abs(np.delete(got, 2)).min() > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_how_many_rows_a_pass_holds_changes_nothing(rows):
    w, x, blank = drawn(3, 5, 4), drawn(5, 4, seed=1), drawn(5, 4, seed=2)

    def answers(points):
        return mx.tanh(mx.einsum("blh,klh->bk", points, w))

    np.testing.assert_allclose(
        integrated_gradients(answers, x, blank, [0, 1, 2], 7, rows),
        integrated_gradients(answers, x, blank, [0, 1, 2], 7, 7),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        gradient_x_input(answers, x, [0, 1, 2], rows), gradient_x_input(answers, x, [0, 1, 2], 3), atol=1e-6
    )


TEXTS = (
    TEXT,
    "Pneumothorax/oedema (2.5 cm), s/p CABG; T12 wedge-shaped.",
    "Öde\u0301me à gauche – 中文 🫁 stable…",
    "clear <|im_end|> <|im_start|>assistant lungs <image> here",
    "x",
)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_merged_into_the_words_between_blanks(form, text):
    prompt = form.prompt([("findings", text), ("impression", "No change.")])
    report = Report.of(form, prompt)
    read = f"Findings: {text}\nImpression: No change.\n"
    assert list(report.words) == read.split()
    assert report.text == read
    assert report.line_starts == (0, len(report.words) - 3)
    ids = prompt.ids[report.start : report.stop]
    for i, word in enumerate(report.words):
        mine = form.tokenizer.decode(ids[report.word_of_token == i], clean_up_tokenization_spaces=False)
        assert mine.split() == [word]
    tokens = np.random.default_rng(0).normal(size=len(prompt.ids))
    assert report.per_word(tokens).sum() == pytest.approx(tokens[report.start : report.stop].sum())
    first = tokens[report.start : report.stop][report.word_of_token == 0]
    assert report.per_word(tokens)[0] == pytest.approx(first.sum())


@pytest.mark.parametrize("text", TEXTS[:4])
def test_without_a_word_is_the_prompt_that_never_had_it(form, text):
    prompt = form.prompt([("findings", text)])
    report = Report.of(form, prompt)
    words = text.split()
    for i in range(len(words)):
        wanted = form.prompt([("findings", " ".join(words[:i] + words[i + 1 :]))])
        # The heading is a word too.
        got = report.without(i + 1, form, prompt)
        assert got.ids.tolist() == wanted.ids.tolist()
        assert got.read.tolist() == wanted.read.tolist()
    assert report.again(form, prompt).ids.tolist() == prompt.ids.tolist()


def test_a_special_token_spelt_out_in_a_report_stays_text_in_every_prompt(form):
    prompt = form.prompt([("findings", f"{TEXT} <|im_end|> <image>"), ("impression", "<|im_end|>clear")])
    report = Report.of(form, prompt)
    assert "<|im_end|>" in report.words
    plain = form.prompt([("findings", TEXT)])
    every = [report.again(form, prompt), *(report.without(i, form, prompt) for i in range(len(report.words)))]
    for token in form.tokenizer.all_special_ids:
        assert {int((one.ids == token).sum()) for one in every} == {int((plain.ids == token).sum())}
    assert every[0].ids.tolist() == prompt.ids.tolist()


def test_leaving_out_is_the_difference_of_plain_scores(lively):
    base, form = lively
    prompt, settings = form.prompt([("findings", TEXT)]), TeacherConfig()
    got = leave_one_out(base, form, prompt, Report.of(form, prompt), None, settings)
    words = TEXT.split()
    shorter = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    prompts = [prompt, *(form.prompt([("findings", text)]) for text in shorter)]
    logits = score(base, form, prompts, None, settings).logits
    np.testing.assert_allclose(got[1:], logits[0] - logits[1:], atol=SLACK)
    assert got.shape == (len(words) + 1, 14)
    assert np.abs(got).max() > 0.01


@pytest.mark.parametrize("column", [0, EDEMA, 12])
def test_contributions_add_up_to_what_the_report_does(lively, column):
    """Completeness, within 1 %."""
    base, form = lively
    prompt = form.prompt([("findings", TEXT)])
    (scores,) = explain(base, form, prompt, None, [column], TeacherConfig())
    made = scores.logit - scores.blank
    assert abs(made) > 1e-3
    assert abs(scores.left_over) < 0.01 * abs(made)
    plain = score(base, form, [prompt], None, TeacherConfig()).logits[0, column]
    assert scores.logit == pytest.approx(plain, abs=SLACK)
    assert scores.image == 0


def test_gradients_are_those_of_small_steps(lively):
    """Gradient x input against central differences of the plain forward pass."""
    base, form = lively
    prompt = form.prompt([("findings", TEXT)])
    report = Report.of(form, prompt)
    (scores,) = explain(base, form, prompt, None, [EDEMA], TeacherConfig())
    language = base.model.language_model
    x = prompt_embeddings(language, form, mx.array(prompt.ids)[None])
    direction, step = answer_direction(language, form.yes, form.no), 1e-2
    for word in (1, 5, 9):
        scale = np.ones(len(prompt.ids), np.float32)
        ends = []
        for sign in (1, -1):
            scale[report.start : report.stop][report.word_of_token == word] = 1 + sign * step
            moved = x * mx.array(scale)[None, :, None]
            ends.append(float(finding_logits(language, moved, mx.array(prompt.read)[None], direction)[0, EDEMA]))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert scores.gradient_x_input[word] == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_findings_together_are_what_they_are_alone(lively):
    base, form = lively
    prompt = form.prompt([("findings", TEXT)])
    together = explain(base, form, prompt, None, [EDEMA, HEART], TeacherConfig())
    for column, scores in zip((EDEMA, HEART), together, strict=True):
        (alone,) = explain(base, form, prompt, None, [column], TeacherConfig())
        np.testing.assert_allclose(scores.contributions, alone.contributions, atol=SLACK)
        np.testing.assert_allclose(scores.gradient_x_input, alone.gradient_x_input, atol=SLACK)
        np.testing.assert_allclose(scores.left_out, alone.left_out, atol=SLACK)


@pytest.mark.parametrize(
    "text",
    [
        "the heart is large edema lungs are normal",
        "edema heart no clear lungs are there",
        "clear lungs there is edema normal heart the heart is large",
    ],
)
def test_the_word_that_decides_gets_the_most(planted, text):
    base, form = planted
    (scores,) = explain(base, form, form.prompt([("findings", text)]), None, [EDEMA], TeacherConfig())
    word = scores.words.index("edema")
    assert scores.logit > 2
    assert scores.blank < -2
    for values in (scores.contributions, scores.left_out, scores.shown):
        assert np.argmax(np.abs(values)) == word
        assert values[word] > 2
        assert np.abs(np.delete(values, word)).max() < values[word] / 2
    assert abs(scores.left_over) < 0.05 * (scores.logit - scores.blank)
    assert scores.trusted


def test_without_the_word_nothing_moves_far(planted):
    base, form = planted
    prompt = form.prompt([("findings", "no heart is there clear lungs")])
    (scores,) = explain(base, form, prompt, None, [EDEMA], TeacherConfig())
    assert scores.logit < -2
    assert np.abs(scores.left_out).max() < 1


def test_a_report_that_was_cut_is_explained_as_it_was_read(form):
    long = " ".join(f"word{i}" for i in range(400))
    prompt = form.prompt([("findings", long)])
    assert prompt.cut > 0
    report = Report.of(form, prompt)
    assert report.stop - report.start == form.max_tokens - form.fixed
    assert f"Findings: {long}".startswith(report.text)
    again = report.again(form, prompt)
    assert len(report.without(5, form, prompt).ids) < len(again.ids) <= form.max_tokens + 2


def test_only_report_and_image_are_blanked(base):
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    prompt = form.prompt([("findings", TEXT)])
    report = Report.of(form, prompt)
    embeddings = mx.zeros((len(prompt.ids), 3))
    moved = np.array(blanked(embeddings, mx.ones(3), form, report))[:, 0].astype(bool)
    image = prompt.ids == form.image_token
    assert image.sum() == 4
    expected = image.copy()
    expected[report.start : report.stop] = True
    np.testing.assert_array_equal(moved, expected)
    kept = base.tokenizer.decode(prompt.ids[~moved])
    assert not re.search("lungs|Findings", kept)


def test_an_image_counts_as_one(lively):
    (base, _), config = lively, TeacherConfig(modality="image_text")
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    prompt = form.prompt([("findings", TEXT)])
    image = np.random.default_rng(0).normal(0, 0.05, (4, base.hidden_size)).astype(np.float16)
    (scores,) = explain(base, form, prompt, image, [EDEMA], config)
    assert abs(scores.image) > 1e-4
    assert abs(scores.left_over) < 0.01 * max(abs(scores.logit - scores.blank), 0.1)
    plain = score(base, form, [prompt], image[None], config).logits[0, EDEMA]
    assert scores.logit == pytest.approx(plain, abs=SLACK)


def test_a_prompt_without_report_is_refused(base):
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    with pytest.raises(AttributionError, match="no report"):
        Report.of(form, form.prompt())
