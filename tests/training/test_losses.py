"""The loss against PyTorch's, and class weights worked out by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.training.losses import binary_cross_entropy, masked_bce, positive_weights, prior_logits

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
