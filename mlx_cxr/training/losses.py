"""Losses over the 14 findings. A loss takes logits and target rows and returns a scalar; NaN targets have no say."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

Loss = Callable[[mx.array, mx.array], mx.array]
"""(logits (B, 14), targets (B, K)) -> scalar. K is what the loss needs: 14 hard labels here."""


def binary_cross_entropy(logits: mx.array, targets: mx.array, positive_weight: mx.array | None = None) -> mx.array:
    """Elementwise sigmoid cross-entropy in float32, stable for any logit.

    Args:
        logits: (B, 14).
        targets: (B, 14) in [0, 1].
        positive_weight: (14,) factor on the positive term, or None.

    Returns:
        (B, 14), non-negative: `-(w y log p + (1 - y) log(1 - p))` with `p = sigmoid(logits)`.
    """
    logits = logits.astype(mx.float32)
    log_p, log_not_p = -mx.logaddexp(0.0, -logits), -mx.logaddexp(0.0, logits)
    weight = 1.0 if positive_weight is None else positive_weight
    return -(weight * targets * log_p + (1 - targets) * log_not_p)


def masked_bce(positive_weight: np.ndarray | None = None) -> Loss:
    """Mean cross-entropy over the labels that are not NaN; 0 where a batch has none.

    Args:
        positive_weight: float (14,) from `positive_weights`, or None for no weighting.
    """
    weight = None if positive_weight is None else mx.array(positive_weight.astype(np.float32))

    def loss(logits: mx.array, targets: mx.array) -> mx.array:
        known = ~mx.isnan(targets)
        each = binary_cross_entropy(logits, mx.where(known, targets, 0.0), weight)
        return mx.sum(mx.where(known, each, 0.0)) / mx.maximum(mx.sum(known), 1)

    return loss


def positive_weights(targets: np.ndarray, rule: str, largest: float) -> np.ndarray | None:
    """Weight of each finding's positives, from the training targets.

    Args:
        targets: float (N, 14) in [0, 1], NaN where unknown.
        rule: `none`, `inverse_sqrt` (sqrt(n0 / n1)) or `balanced` (n0 / n1).
        largest: upper bound, so that a finding with three positives does not rule the gradient; at least 1.

    Returns:
        float32 (14,) in [1 / largest, largest], or None for `none`. A finding without positives gets `largest`, one
        without negatives `1 / largest`.

    Raises:
        ValueError: unknown rule.
    """
    if rule == "none":
        return None
    positives = np.nansum(targets, axis=0)
    negatives = np.sum(~np.isnan(targets), axis=0) - positives
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(positives > 0, negatives / positives, np.inf)
    if rule == "inverse_sqrt":
        ratio = np.sqrt(ratio)
    elif rule != "balanced":
        raise ValueError(f"class weighting {rule!r}: none, inverse_sqrt or balanced")
    return np.clip(ratio, 1 / largest, largest).astype(np.float32)


def prior_logits(targets: np.ndarray, positive_weight: np.ndarray | None = None) -> np.ndarray:
    """The logits that minimize `masked_bce` when nothing is known of the film: where a fresh head's bias starts.

    A head that starts at 0 learns to say "rare" through its weights, which makes the evidence of most films negative
    and their class-activation maps empty; with the prior in the bias the weights hold what speaks for and against
    (Lin et al., Focal Loss, arXiv:1708.02002, section 4.1, start a rare class's bias so).

    Args:
        targets: float (N, 14) in [0, 1], NaN where unknown.
        positive_weight: (14,) factor on the positive term, or None.

    Returns:
        float32 (14,): log(w (n1 + 1/2) / (n0 + 1/2)), finite with no positives or no negatives; 0 where all is unknown.
    """
    positives = np.nansum(targets, axis=0)
    negatives = np.sum(~np.isnan(targets), axis=0) - positives
    weight = np.ones(len(positives)) if positive_weight is None else positive_weight
    known = positives + negatives > 0
    return np.where(known, np.log(weight * (positives + 0.5) / (negatives + 0.5)), 0.0).astype(np.float32)
