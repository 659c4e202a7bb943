"""The losses against PyTorch's, and class weights worked out by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.training.losses import (
    binary_cross_entropy,
    distillation_loss,
    masked_bce,
    positive_weights,
    prior_logits,
)

NAN = np.nan


def draws(rows: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all sizes, and targets of which a third is unknown and some are soft."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, 14)) * rng.choice([0.1, 3, 30], (rows, 14))).astype(np.float32)
    targets = rng.choice([0, 1, 0.3, NAN], (rows, 14), p=[0.4, 0.2, 0.1, 0.3]).astype(np.float32)
    return logits, targets


@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_torch(torch, weighted):
    logits, targets = draws()
    weight = np.linspace(0.5, 10, 14).astype(np.float32) if weighted else None
    value, gradient = mx.value_and_grad(masked_bce(weight))(mx.array(logits), mx.array(targets))

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    known = ~np.isnan(targets)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        theirs,
        torch.tensor(np.nan_to_num(targets), dtype=torch.float64),
        pos_weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
        reduction="none",
    )
    wanted = each[torch.tensor(known)].mean()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), theirs.grad.numpy(), rtol=2e-5, atol=1e-9)
    assert not np.array(gradient)[~known].any(), "an unknown label has no gradient"


def test_by_hand():
    loss = masked_bce(np.full(14, 3.0))
    logits, targets = np.zeros((1, 14), np.float32), np.full((1, 14), NAN, np.float32)
    targets[0, 2] = 1
    assert loss(mx.array(logits), mx.array(targets)).item() == pytest.approx(3 * np.log(2))
    targets[0, 5] = 0
    assert loss(mx.array(logits), mx.array(targets)).item() == pytest.approx((3 + 1) * np.log(2) / 2)


@pytest.mark.parametrize("logit", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_extreme_logits_are_finite_and_exact(logit, target):
    def of(x: mx.array) -> mx.array:
        return binary_cross_entropy(x, mx.array([[target]])).sum()

    value, slope = mx.value_and_grad(of)(mx.array([[logit]]))
    # -log p = log(1 + exp(-x)), in float64; small ones, too, down to what float32 holds.
    wanted = target * np.logaddexp(0, -logit) + (1 - target) * np.logaddexp(0, logit)
    assert value.item() == pytest.approx(wanted, rel=1e-4, abs=1e-37)
    assert value.item() >= 0
    sigmoid = np.exp(-np.logaddexp(0, -logit))
    assert slope.item() == pytest.approx(sigmoid - target, abs=1e-7)


def test_a_batch_without_any_label_gives_nothing():
    logits, _ = draws()
    targets = mx.full(logits.shape, NAN)
    value, gradient = mx.value_and_grad(masked_bce(np.full(14, 5.0)))(mx.array(logits), targets)
    assert value.item() == 0
    assert not np.array(gradient).any()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_reduced_precision_logits_are_summed_in_float32(dtype):
    logits = mx.full((8, 14), 4.0).astype(dtype)
    value = masked_bce()(logits, mx.zeros((8, 14)))
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(np.logaddexp(0, 4.0), rel=1e-6)


def soft_draws(rows: int = 9, features: int = 0, seed: int = 1) -> np.ndarray:
    """Hard labels, teacher logits of which a third is unknown, and features that every third study lacks."""
    rng = np.random.default_rng(seed)
    _, hard = draws(rows, seed)
    teacher = (rng.normal(size=(rows, 14)) * 3).astype(np.float32)
    teacher[rng.random((rows, 14)) < 0.3] = NAN
    teacher[1] = NAN
    seen = rng.normal(size=(rows, features)).astype(np.float32)
    seen[::3] = NAN
    return np.concatenate([hard, teacher, seen], axis=1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("features", [0, 5])
def test_distillation_is_that_of_torch(torch, alpha, temperature, features):
    """Each term by PyTorch's own function, in float64: values and gradients."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(9, 14 + features)).astype(np.float32) * 4
    targets, weight = soft_draws(features=features), np.linspace(0.5, 10, 14)
    loss = distillation_loss(alpha, temperature, weight, 0.7 if features else 0.0)
    value, gradient = mx.value_and_grad(loss)(mx.array(outputs), mx.array(targets))

    theirs = torch.tensor(outputs, dtype=torch.float64, requires_grad=True)
    logits, wanted = theirs[:, :14], torch.tensor(targets, dtype=torch.float64)
    hard, teacher, seen = wanted[:, :14], wanted[:, 14:28], wanted[:, 28:]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    each = bce(logits, torch.nan_to_num(hard), pos_weight=torch.tensor(weight), reduction="none")
    softened = torch.sigmoid(torch.nan_to_num(teacher) / temperature)
    soft = temperature**2 * bce(logits / temperature, softened, reduction="none")
    both, one = ~torch.isnan(hard) & ~torch.isnan(teacher), torch.isnan(hard) ^ torch.isnan(teacher)
    terms = [
        alpha * each[both] + (1 - alpha) * soft[both],
        each[one & ~torch.isnan(hard)],
        soft[one & torch.isnan(hard)],
    ]
    assert all(len(term) > 5 for term in terms)
    total = torch.cat(terms).mean()
    if features:
        there = ~torch.isnan(seen[:, 0])
        assert 0 < there.sum() < 9
        cosine = torch.nn.functional.cosine_similarity(theirs[there][:, 14:], seen[there])
        total = total + 0.7 * (1 - cosine).mean()
    total.backward()
    assert value.item() == pytest.approx(total.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient), theirs.grad.numpy(), rtol=5e-5, atol=1e-8)
    assert np.array(gradient)[1, :14].any(), "study 1 has no soft label, so hard ones alone, at any alpha"


def test_alpha_one_is_the_hard_loss_to_the_last_bit():
    logits, _ = draws()
    targets, weight = soft_draws(), np.linspace(0.5, 10, 14)
    got = mx.value_and_grad(distillation_loss(1.0, 3.0, weight))(mx.array(logits), mx.array(targets))
    wanted = mx.value_and_grad(masked_bce(weight))(mx.array(logits), mx.array(targets[:, :14]))
    assert got[0].item() == wanted[0].item()
    np.testing.assert_array_equal(np.array(got[1]), np.array(wanted[1]))


def test_the_square_of_the_temperature_keeps_the_gradients_size():
    """Its limit is (z_s - z_t) / 4 per entry; without the factor it would fall 10,000-fold from T = 1 to 100."""
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(6, 14)).astype(np.float32) * 2 for _ in range(2))
    targets = mx.array(np.concatenate([np.full((6, 14), NAN, np.float32), teacher], axis=1))

    def gradient(temperature: float) -> np.ndarray:
        # A mean over 84 entries, so each has 1/84 of its own.
        return 84 * np.array(mx.grad(distillation_loss(0.0, temperature))(mx.array(student), targets))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x.astype(np.float64)))

    for temperature in (1.0, 2.0, 5.0):
        wanted = temperature * (sigmoid(student / temperature) - sigmoid(teacher / temperature))
        np.testing.assert_allclose(gradient(temperature), wanted, atol=1e-5)
    np.testing.assert_allclose(gradient(100.0), (student - teacher) / 4, atol=5e-3)
    sizes = [np.linalg.norm(gradient(temperature)) for temperature in (1.0, 4.0, 20.0, 100.0)]
    assert min(sizes) / max(sizes) > 0.3


def test_a_teacher_that_agrees_has_no_gradient():
    logits = np.random.default_rng(0).normal(size=(4, 14)).astype(np.float32)
    targets = np.concatenate([np.full((4, 14), NAN, np.float32), logits], axis=1)
    gradient = mx.grad(distillation_loss(0.5, 3.0))(mx.array(logits), mx.array(targets))
    assert np.abs(np.array(gradient)).max() < 1e-7


def test_a_batch_without_soft_labels_learns_from_the_hard_ones():
    logits, hard = draws()
    targets = np.concatenate([hard, np.full((9, 14 + 3), NAN, np.float32)], axis=1)
    outputs = mx.array(np.concatenate([logits, np.zeros((9, 3), np.float32)], axis=1))
    value, gradient = mx.value_and_grad(distillation_loss(0.25, 4.0, None, 2.0))(outputs, mx.array(targets))
    wanted, slope = mx.value_and_grad(masked_bce())(mx.array(logits), mx.array(hard))
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(gradient)[:, :14], np.array(slope), rtol=1e-6)
    assert not np.array(gradient)[:, 14:].any(), "not even where the features are all 0, whose direction is none"


def label_table() -> np.ndarray:
    """Positives, negatives by column; the rest unknown: 1, 9; 5, 5; 9, 1; 0, 10; 2, 2; none; 5, 5 (soft); 10, 0."""
    table = np.zeros((10, 14), dtype=np.float32)
    for column, (positives, known) in enumerate([(1, 10), (5, 10), (9, 10), (0, 10), (2, 4), (0, 0)]):
        table[:positives, column] = 1
        table[known:, column] = NAN
    table[:, 6] = 0.5
    table[:, 7] = 1
    return table


def test_balanced_weights_by_hand():
    weights = positive_weights(label_table(), "balanced", 8.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[:8], [8, 1, 1 / 8, 8, 1, 8, 1, 1 / 8], rtol=1e-6)
    wider = positive_weights(label_table(), "balanced", 100.0)
    np.testing.assert_allclose(wider[:8], [9, 1, 1 / 9, 100, 1, 100, 1, 1 / 100], rtol=1e-6)


def test_square_root_weights_by_hand():
    weights = positive_weights(label_table(), "inverse_sqrt", 8.0)
    np.testing.assert_allclose(weights[:8], [3, 1, 1 / 3, 8, 1, 8, 1, 1 / 8], rtol=1e-6)


def test_no_weights_and_unknown_rules():
    assert positive_weights(label_table(), "none", 8.0) is None
    with pytest.raises(ValueError, match="class weighting 'balance'"):
        positive_weights(label_table(), "balance", 8.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_prior_logits_are_where_the_loss_of_a_constant_answer_is_least(weighted):
    _, targets = draws(4000, seed=3)
    weight = np.linspace(0.5, 10, 14).astype(np.float32) if weighted else None
    prior = prior_logits(targets, weight)

    def constant(bias: mx.array) -> mx.array:
        return masked_bce(weight)(mx.broadcast_to(bias, targets.shape), mx.array(targets))

    slope = np.array(mx.grad(constant)(mx.array(prior)))
    at_zero = np.array(mx.grad(constant)(mx.zeros(14)))
    # The half counts that keep the logarithm finite move the minimum by about 1 / 2700.
    assert np.abs(slope).max() < 2e-3 * np.abs(at_zero).max()


def test_prior_logits_by_hand():
    prior = prior_logits(label_table())
    np.testing.assert_allclose(prior[:6], np.log([1.5 / 9.5, 1, 9.5 / 1.5, 0.5 / 10.5, 1, 1]), rtol=1e-6)
    assert prior.dtype == np.float32
    assert np.isfinite(prior_logits(label_table(), positive_weights(label_table(), "balanced", 10.0))).all()
