"""Losses over the 14 findings. A loss takes logits and target rows and returns a scalar; NaN targets are masked."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_cxr.core.labels import LABELS
from mlx_cxr.training.distributed import ALONE, World

Loss = Callable[[mx.array, mx.array], mx.array]
"""(outputs (B, C), targets (B, K)) -> scalar. C is 14 logits, and H features where a network gives them; K is 14
hard labels, then for `distillation_loss` 14 soft ones and H features.

On several ranks the mean of their losses is the loss of the whole batch, however its known targets are spread."""


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


def masked_bce(positive_weight: np.ndarray | None = None, world: World = ALONE) -> Loss:
    """Mean cross-entropy over the labels that are not NaN; 0 where a batch has none.

    Args:
        positive_weight: float (14,) from `positive_weights`, or None for no weighting.
        world: the ranks that share a batch.
    """
    weight = None if positive_weight is None else mx.array(positive_weight.astype(np.float32))

    def loss(logits: mx.array, targets: mx.array) -> mx.array:
        known = ~mx.isnan(targets)
        each = binary_cross_entropy(logits, mx.where(known, targets, 0.0), weight)
        return _mean_where(known, each, world)

    return loss


def distillation_loss(
    alpha: float,
    temperature: float,
    positive_weight: np.ndarray | None = None,
    feature_weight: float = 0.0,
    world: World = ALONE,
) -> Loss:
    """`alpha * hard + (1 - alpha) * T^2 * soft`, after Hinton et al., arXiv:1503.02531, for sigmoid outputs.

    `hard` is the cross-entropy with the hard label, `soft` that of sigmoid(logit / T) with sigmoid(teacher logit / T).
    An entry (an image and a finding) without a teacher logit has `hard` alone, at weight 1, and one without a hard
    label `T^2 * soft` alone; the loss is the mean over the entries that have either, and 0 where a batch has none. The
    factor makes up for the gradient of the softened sigmoids, which falls as 1 / T^2: as T grows, `T^2 * soft` tends to
    have the gradient (logit - teacher logit) / 4 per entry.

    Args:
        alpha: weight of the hard label of an entry that has both, in [0, 1]; at 1 no soft label is used, and the loss
            is `masked_bce`.
        temperature: T, at least 1.
        positive_weight: float (14,) of the hard labels, from `positive_weights`; the soft ones have none.
        feature_weight: of the mean of 1 - cosine(outputs[:, 14:], targets[:, 28:]), over the studies that have
            features; 0 ignores them.
        world: the ranks that share a batch.

    Returns:
        A loss of outputs (B, 14) or (B, 14 + H) and targets (B, 28) or (B, 28 + H): hard labels in [0, 1], the
        teacher's logits, its features; NaN in each where there is none.
    """
    weight = None if positive_weight is None else mx.array(positive_weight.astype(np.float32))
    labels = len(LABELS)

    def loss(outputs: mx.array, targets: mx.array) -> mx.array:
        logits, hard, teacher = outputs[:, :labels], targets[:, :labels], targets[:, labels : 2 * labels]
        has_hard, has_soft = ~mx.isnan(hard), ~mx.isnan(teacher) & (alpha < 1)
        softened = mx.sigmoid(mx.where(has_soft, teacher, 0.0) / temperature)
        soft = temperature**2 * binary_cross_entropy(logits.astype(mx.float32) / temperature, softened)
        share = mx.where(has_soft, mx.where(has_hard, alpha, 0.0), 1.0)
        each = share * binary_cross_entropy(logits, mx.where(has_hard, hard, 0.0), weight) + (1 - share) * soft
        value = _mean_where(has_hard | has_soft, each, world)
        if feature_weight:
            value = value + feature_weight * _cosine_distance(outputs[:, labels:], targets[:, 2 * labels :], world)
        return value

    return loss


def _cosine_distance(predicted: mx.array, features: mx.array, world: World) -> mx.array:
    known = ~mx.isnan(features[:, 0])
    a, b = predicted.astype(mx.float32), mx.where(known[:, None], features, 1.0)
    # The small number keeps the gradient of an output that is all 0 finite.
    squares = (mx.sum(a * a, axis=1) + 1e-12) * (mx.sum(b * b, axis=1) + 1e-12)
    return _mean_where(known, 1 - mx.sum(a * b, axis=1) * mx.rsqrt(squares), world)


def _mean_where(known: mx.array, values: mx.array, world: World) -> mx.array:
    # A rank's sum over the mean count, so that a known target weighs the same on whichever rank it is.
    count = mx.maximum(world.mean(mx.sum(known)), 1 / world.size if world.size > 1 else 1)
    return mx.sum(mx.where(known, values, 0.0)) / count


def positive_weights(targets: np.ndarray, rule: str, largest: float) -> np.ndarray | None:
    """Weight of each finding's positives, from the training targets.

    Args:
        targets: float (N, 14) in [0, 1], NaN where unknown.
        rule: `none`, `inverse_sqrt` (sqrt(n0 / n1)) or `balanced` (n0 / n1).
        largest: upper bound, so that a finding with three positives does not dominate the gradient; at least 1.

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
    """The constant logits that minimize `masked_bce`: the initial bias of a fresh head.

    A head that starts at 0 learns to say "rare" through its weights, which makes the evidence of most images negative
    and their class-activation maps empty; with the prior in the bias the weights hold the evidence for and against
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
