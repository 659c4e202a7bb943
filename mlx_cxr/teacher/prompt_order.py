"""Effect of the order of the prompt's lines: the same studies asked under other orders of the 14 findings.

An answer sees the lines above its own, so the order is part of the prompt. A teacher is trained and cached under one
order; how far its answers move under others is a measure of how little it answers each finding for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_cxr.core.config import Config
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.scoring import score
from mlx_cxr.teacher.teacher_run import Material, prompt_format


@dataclass(frozen=True)
class OrderEffect:
    """Answers of the same studies under several orders of the lines.

    Attributes:
        orders: (K + 1,) of the 14 labels each; the first is that of `LABELS`, which the teacher is trained with.
        logits: float32 (K + 1, N, 14), columns in the order of `LABELS` under every order.
        targets: float32 (N, 14), uncertain and empty labels counted as 0.
    """

    orders: tuple[tuple[str, ...], ...]
    logits: np.ndarray
    targets: np.ndarray

    def shift(self) -> np.ndarray:
        """float64 (14,): mean absolute difference of a finding's logit from that under the first order."""
        return np.abs(self.logits[1:].astype(np.float64) - self.logits[0]).mean(axis=(0, 1))

    def aucs(self) -> np.ndarray:
        """float64 (K + 1, 14): ROC-AUC under each order; NaN where a finding has one class only."""
        return np.stack([roc_auc_per_label(self.targets, logits) for logits in self.logits])

    def summary(self) -> dict[str, Any]:
        """JSON-ready: counts, the macro AUC under the first order and its range under the others, and per finding the
        shift, the logit's standard deviation over studies to hold it against, and the same AUCs.
        """
        aucs, shift, spread = self.aucs(), self.shift(), self.logits[0].std(axis=0, dtype=np.float64)
        return {
            "schema": 1,
            "studies": self.logits.shape[1],
            "orders": len(self.orders) - 1,
            "macro_auc": _range([macro_auc(row) for row in aucs]),
            "mean_abs_logit_shift": float(shift.mean()),
            "labels": {
                name: {"mean_abs_logit_shift": shift[i], "logit_sd": spread[i], "auc": _range(aucs[:, i])}
                for i, name in enumerate(LABELS)
            },
        }


def order_effect(
    base: Base, config: Config, material: Material, split: str = "validate", orders: int = 5, seed: int = 0
) -> OrderEffect:
    """Ask a split's studies under the usual order of the lines and under random ones.

    Takes `orders + 1` times as long as scoring the split. Orders repeat for the same seed.

    Args:
        base: with or without adapters.
        split: which studies; test only for what is reported, never to choose by.
        orders: random orders, at least 1.

    Raises:
        DataError: none of the studies can be read.
        ValueError: fewer than one order.
    """
    if orders < 1:
        raise ValueError(f"orders is {orders}: give at least 1")
    rng = np.random.default_rng(seed)
    chosen = [LABELS, *(tuple(LABELS[i] for i in rng.permutation(len(LABELS))) for _ in range(orders))]
    logits, raw_labels, images = [], None, None
    for number, order in enumerate(chosen):
        form = prompt_format(base, config, order)
        studies = material.studies(config, form, split)
        if number == 0:
            raw_labels, images = studies.raw_labels, material.images(base, studies, config)
        logits.append(score(base, form, studies.prompts, images, config.teacher).logits)
    targets = SCORING_PROTOCOLS["empty_negative"].apply(raw_labels)
    return OrderEffect(tuple(chosen), np.stack(logits), targets)


def _range(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The first value, and the least and largest of the others."""
    return {"usual": float(values[0]), "least": float(np.min(values[1:])), "largest": float(np.max(values[1:]))}
