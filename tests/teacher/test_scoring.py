"""Scoring many studies: each as if alone, in the order asked; the image is seen where one is given, and only there."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from toy_teacher import opened, prompts_of

from mlx_cxr.core.config_schema import LoraConfig, TeacherConfig
from mlx_cxr.teacher.image_embeddings import encode_images
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.prompt import PromptFormat, padded
from mlx_cxr.teacher.readout import finding_states
from mlx_cxr.teacher.scoring import prompt_embeddings, score

TEXTS = [
    "Edema.",
    "The heart is enlarged. " * 4,
    "Clear lungs.",
    "No acute process. " * 9,
    "x",
    "Large heart " * 6,
    "y",
]


@pytest.mark.parametrize("bucket", [1, 32, 128])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_study_is_answered_as_if_alone(base, form, batch_size, bucket):
    config = TeacherConfig(batch_size=batch_size, training={"bucket": bucket})
    answers = score(base, form, prompts_of(form, TEXTS), None, config)
    for i, text in enumerate(TEXTS):
        alone = score(base, form, prompts_of(form, [text]), None, TeacherConfig(batch_size=1))
        np.testing.assert_allclose(answers.logits[i], alone.logits[0], atol=3e-5)
        np.testing.assert_allclose(answers.features[i], alone.features[0], atol=2e-3)
    assert answers.tokens == sum(len(prompt.ids) for prompt in prompts_of(form, TEXTS))
    assert answers.logits.std(axis=0).min() > 1e-3


def test_features_are_the_mean_state_of_the_lines(base, form):
    prompts = prompts_of(form, TEXTS[:2])
    batch = padded(prompts, 32)
    language = base.model.language_model
    states = finding_states(language, prompt_embeddings(language, form, mx.array(batch.ids)), mx.array(batch.read))
    answers = score(base, form, prompts, None, TeacherConfig())
    assert answers.features.dtype == np.float16
    np.testing.assert_allclose(answers.features, np.array(states).mean(axis=1), atol=3e-3)


def test_batches_are_handed_over_as_they_are_done_the_longest_first(base, form):
    prompts = prompts_of(form, TEXTS)
    seen, lengths = [], []

    def done(rows: np.ndarray, logits: np.ndarray, features: np.ndarray) -> None:
        assert logits.shape == (len(rows), 14)
        assert features.shape == (len(rows), 64)
        seen.extend(zip(rows.tolist(), logits, strict=True))
        lengths.extend(len(prompts[i].ids) for i in rows)

    answers = score(base, form, prompts, None, TeacherConfig(batch_size=2), done)
    assert sorted(row for row, _ in seen) == list(range(len(TEXTS)))
    assert lengths == sorted(lengths, reverse=True)
    for row, logits in seen:
        np.testing.assert_array_equal(logits, answers.logits[row])


def test_the_time_of_a_batch_leaves_out_the_first_of_its_shape(base, form):
    once = score(base, form, prompts_of(form, TEXTS[:1]), None, TeacherConfig(batch_size=1))
    assert np.isnan(once.seconds), "one batch of its shape is compiled, not timed"
    often = score(base, form, prompts_of(form, ["Edema."] * 9), None, TeacherConfig(batch_size=3))
    assert 0 < often.seconds < 60


def test_the_image_is_seen_and_another_one_gives_other_answers(base):
    """Image and image + text; a text teacher has no place for it."""
    config = TeacherConfig(batch_size=4)
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    rng = np.random.default_rng(0)
    images = np.array(encode_images(base, rng.integers(0, 256, (4, 64, 64)).astype(np.uint8), 64).astype(mx.float16))
    for prompts in ([form.prompt() for _ in images], prompts_of(form, ["The lungs are clear."] * 4)):
        straight = score(base, form, prompts, images, config).logits
        swapped = score(base, form, prompts, images[[1, 0, 2, 3]], config).logits
        np.testing.assert_allclose(swapped[[1, 0, 2, 3]], straight, atol=2e-5)
        assert np.abs(swapped[0] - straight[0]).max() > 1e-4
        assert np.abs(straight - straight[0]).max() > 1e-4
    # Without text, the image is all that studies differ by.
    same = score(base, form, [form.prompt()] * 2, images[[0, 0]], config).logits
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    other_text = prompts_of(form, ["The lungs are clear."] * 3 + ["Edema."])
    changed = score(base, form, other_text, images, config).logits
    straight = score(base, form, prompts_of(form, ["The lungs are clear."] * 4), images, config).logits
    np.testing.assert_allclose(changed[:3], straight[:3], atol=2e-5)
    assert np.abs(changed[3] - straight[3]).max() > 1e-3


def test_a_compiled_scoring_sees_the_weights_of_its_moment(toy):
    """Scored, changed, scored again: as the loop does between epochs."""
    base = opened(toy.base)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    prompts = prompts_of(form, TEXTS[:3])
    attach_lora(base.model, LoraConfig(rank=2), 0)
    first = score(base, form, prompts, None, TeacherConfig()).logits
    layer = base.model.language_model.model.layers[0].feed_forward.w2
    layer.lora_b = layer.lora_b + 1.0
    second = score(base, form, prompts, None, TeacherConfig()).logits
    assert np.abs(second - first).max() > 1e-2
    layer.lora_b = layer.lora_b - 1.0
    np.testing.assert_allclose(score(base, form, prompts, None, TeacherConfig()).logits, first, atol=1e-6)


def test_what_is_done_is_left_out_and_the_rest_is_answered_to_the_bit_as_before(base, form):
    """Also where a run was stopped in the middle of a batch."""
    prompts, config = prompts_of(form, TEXTS), TeacherConfig(batch_size=2)
    batches: list[list[int]] = []
    whole = score(base, form, prompts, None, config, lambda rows, *_: batches.append(rows.tolist()))
    todo = np.ones(len(TEXTS), bool)
    todo[[*batches[0], batches[1][0]]] = False
    again: list[list[int]] = []
    rest = score(base, form, prompts, None, config, lambda rows, *_: again.append(rows.tolist()), todo)
    assert again == batches[1:]
    np.testing.assert_array_equal(rest.logits[todo], whole.logits[todo])
    assert np.isnan(rest.logits[batches[0]]).all()
    assert rest.tokens == sum(len(prompts[i].ids) for rows in again for i in rows)
