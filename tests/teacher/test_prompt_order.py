"""The effect of the order of the lines, against a count by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from toy_teacher import EDEMA, opened

from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.prompt_order import OrderEffect, order_effect
from mlx_cxr.teacher.scoring import score
from mlx_cxr.teacher.teacher_run import Material


@pytest.fixture(scope="module")
def effect(toy) -> OrderEffect:
    config = toy.config()
    return order_effect(opened(toy.base), config, Material.open(config), orders=3, seed=1)


def test_answers_under_an_order_are_those_of_its_prompt(toy, effect):
    """Each order's logits again, from a prompt format of that order."""
    config, base = toy.config(), opened(toy.base)
    material = Material.open(config)
    assert len(set(effect.orders)) == 4
    assert effect.orders[0] == LABELS
    for order, logits in zip(effect.orders, effect.logits, strict=True):
        assert sorted(order) == sorted(LABELS)
        form = PromptFormat.of(base.tokenizer, max_tokens=320, order=order)
        studies = material.studies(config, form, "validate")
        np.testing.assert_allclose(logits, score(base, form, studies.prompts, None, config.teacher).logits, atol=1e-5)
    assert effect.logits.shape == (4, 23, 14)


def test_figures_are_those_counted_by_hand(effect):
    by_hand = [
        np.mean([abs(effect.logits[k, n, EDEMA] - effect.logits[0, n, EDEMA]) for k in (1, 2, 3) for n in range(23)])
    ]
    assert effect.shift()[EDEMA] == pytest.approx(by_hand[0], rel=1e-5)
    assert effect.shift().min() > 1e-3, "the order is part of what an answer sees"
    aucs = [roc_auc_score(effect.targets[:, EDEMA], logits[:, EDEMA]) for logits in effect.logits]
    np.testing.assert_allclose(effect.aucs()[:, EDEMA], aucs)
    summary = effect.summary()
    edema = summary["labels"]["Edema"]
    assert edema["auc"] == pytest.approx({"usual": aucs[0], "least": min(aucs[1:]), "largest": max(aucs[1:])})
    assert edema["logit_sd"] == pytest.approx(np.std(effect.logits[0, :, EDEMA]), rel=1e-4)
    assert summary["mean_abs_logit_shift"] == pytest.approx(effect.shift().mean())
    assert (summary["orders"], summary["studies"]) == (3, 23)
    assert np.isnan(summary["labels"]["Fracture"]["auc"]["usual"]), "a finding with one class has no AUC"
    assert not np.isnan(summary["macro_auc"]["least"])


def test_a_model_that_looks_at_one_line_only_has_no_order_effect(toy):
    """Attention and convolutions turned off, each position answers for itself: the measure is then 0."""
    base, config = opened(toy.base), toy.config()
    for layer in base.model.language_model.model.layers:
        mixer = layer.self_attn if layer.is_attention_layer else layer.conv
        mixer.out_proj.weight = mx.zeros_like(mixer.out_proj.weight)
    alone = order_effect(base, config, Material.open(config), orders=2)
    np.testing.assert_allclose(alone.shift(), 0.0, atol=1e-6)


def test_the_seed_fixes_the_orders_and_there_is_at_least_one(toy, effect):
    config = toy.config()
    material = Material.open(config)
    again = order_effect(opened(toy.base), config, material, orders=3, seed=1)
    assert again.orders == effect.orders
    np.testing.assert_array_equal(again.logits, effect.logits)
    with pytest.raises(ValueError, match="orders is 0"):
        order_effect(opened(toy.base), config, material, orders=0)
