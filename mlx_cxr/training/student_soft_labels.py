"""Soft labels of a student's training images: the teacher's, or a control's in their place.

A student may do better than one of hard labels alone without learning anything that its teacher knows of an image:
because soft labels of any kind regularize (Szegedy et al., arXiv:1512.00567, section 7; Yuan et al., arXiv:1909.11723),
or because the teacher's answers tell which findings are common and go together. The control `smoothed` has the first
without the rest, `shuffled` both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit

from mlx_cxr.core.config import Config
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.soft_labels import (
    FEATURES_NAME,
    INDEX_NAME,
    LOGITS_NAME,
    SoftLabelError,
    SoftLabels,
    load_soft_labels,
)
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.training.losses import prior_logits

log = logging.getLogger("mlx_cxr")

_LARGEST_LOGIT = 30.0


@dataclass(frozen=True)
class StudentSoftLabels:
    """Soft labels, a row per training image: the second part of the targets of `distillation_loss`.

    Attributes:
        logits: float32 (M, 14), NaN where there is none.
        features: float32 (M, H), NaN where there is none; None where they are not asked for.
        summary: counts and agreement figures, as `make_student_soft_labels` describes them.
    """

    logits: np.ndarray
    features: np.ndarray | None
    summary: dict[str, Any]

    def taken(self, rows: np.ndarray) -> StudentSoftLabels:
        """The given rows, int (M,)."""
        features = None if self.features is None else self.features[rows]
        return StudentSoftLabels(self.logits[rows], features, self.summary)


def read_student_soft_labels(
    config: Config, manifest: Manifest, study_ids: Sequence[str], hard: np.ndarray
) -> tuple[StudentSoftLabels, dict[str, Path]]:
    """The soft labels that an experiment asks for, and the files that they are from.

    Args:
        config: the experiment; `distillation.targets` is not `hard`.
        study_ids: (M,), the study of each training image.
        hard: as `make_student_soft_labels`.

    Returns:
        The soft labels, and role -> file.

    Raises:
        SoftLabelError: they are missing or damaged, of another manifest or label policy, or of test studies.
    """
    folder, settings = config.run_dir(config.soft_labels_run), config.distillation
    cache = load_soft_labels(folder)
    cache.check(manifest=manifest.sha256, labels=config.plain()["labels"])
    test = set(manifest.frame.loc[manifest.frame["split"] == "test", "study_id"])
    if leaked := sorted(test.intersection(cache.study_ids)):
        raise SoftLabelError(
            f"{folder / INDEX_NAME}: {len(leaked)} soft labels are of test studies, such as {leaked[0]!r}, which the "
            "student must not learn from; run cache_teacher_outputs again"
        )
    with_features = settings.feature_weight > 0 and settings.targets not in ("smoothed", "words")
    soft = make_student_soft_labels(
        settings.targets,
        cache,
        study_ids,
        hard,
        calibrated=settings.calibrated,
        seed=config.seed,
        with_features=with_features,
    )
    summary = soft.summary
    log.info(
        "soft labels (%s) for %d of %d training studies, %d of them without hard labels; %d learn from their hard "
        "labels alone. The teacher's probabilities lie %.3f from the hard labels on average, and on their side of 1/2 "
        "for %.1f %%",
        *(
            summary[key]
            for key in (
                "targets",
                "with_soft_label",
                "studies",
                "without_hard_label",
                "without_soft_label",
                "teacher_distance",
            )
        ),
        100 * summary["teacher_agreement"],
    )
    if settings.targets != "teacher":
        log.info("the targets of this control lie %.3f from the hard labels on average", summary["target_distance"])
    inputs = {"soft_labels": folder / LOGITS_NAME, "soft_label_index": folder / INDEX_NAME}
    return soft, inputs | ({"teacher_features": folder / FEATURES_NAME} if with_features else {})


def make_student_soft_labels(
    kind: Literal["teacher", "words", "smoothed", "shuffled"],
    cache: SoftLabels,
    study_ids: Sequence[str],
    hard: np.ndarray,
    *,
    calibrated: bool,
    seed: int,
    with_features: bool = False,
) -> StudentSoftLabels:
    """Soft labels of training images; images of one study share theirs, and a study that the cache lacks has none.

    Kinds:
        teacher, words: the logits of the teacher, or of the bag of words beside it.
        smoothed: `(1 - e) y + e m` of each known hard label y, with m the label's prevalence in training, as a logit.
            e is such that these lie as far from the hard labels as the teacher's probabilities do: the mean of
            |e (m - y)| over the entries that have both labels equals that of |p - y|. At most 1.
        shuffled: the logits (and features) of another training study, each study's given to exactly one other.

    Args:
        cache: the teacher's soft labels.
        study_ids: (M,), the study of each training image.
        hard: float (M, 14) in [0, 1], NaN where unknown; the same for all images of a study.
        calibrated: divide the teacher's logits by its temperatures first.
        with_features: give features too: the teacher's own or shuffled ones; `smoothed` has none.

    Returns:
        The soft labels. The summary has, per study: `targets` (the kind), `studies`, `with_soft_label`,
        `without_soft_label` (hard labels only), `without_hard_label` (soft ones only); `teacher_distance`, the mean of
        |p - y| over the entries that have both labels, and `target_distance`, the same of the soft labels made here;
        `teacher_agreement`, the share of those entries with both on one side of 1/2; `teacher_macro_auc` against the
        hard labels that are 1 or 0; and `smoothing`, e, for `smoothed`.

    Raises:
        SoftLabelError: no training study has a soft label (two are needed to shuffle), or features are asked for and
            there are none.
    """
    # A row per study: its hard labels, and the row of the cache that holds its soft ones.
    studies, first, study_of_image = np.unique(np.asarray(study_ids, dtype=str), return_index=True, return_inverse=True)
    y, place = hard[first].astype(np.float64), cache.place(studies.tolist())
    has = place >= 0
    if has.sum() < (2 if kind == "shuffled" else 1):
        raise SoftLabelError(
            f"{has.sum()} of {len(studies)} training studies have a soft label; run cache_teacher_outputs on this "
            "manifest, with reports for the training studies"
        )
    if with_features and cache.features is None:
        raise SoftLabelError(
            "distillation.feature_weight is above 0, but the soft labels come without features; take a teacher that "
            "sees the film (teacher.modality: image or image_text), or set it to 0"
        )

    # The teacher's answers, and how they agree with the hard labels.
    temperatures = cache.temperatures if calibrated else np.ones(hard.shape[1])

    def teacher_logits(rows: np.ndarray) -> np.ndarray:
        return np.where(rows[:, None] >= 0, cache.logits[rows] / temperatures, np.nan)

    def distance(p: np.ndarray) -> float:
        return float(np.abs(p - y)[known].mean()) if known.any() else float("nan")

    known = ~np.isnan(y) & has[:, None]
    logits = teacher_logits(place)
    p = expit(logits)
    agree = ((p >= 0.5) == (y >= 0.5))[known]
    sure = np.where(known & np.isin(y, (0.0, 1.0)), y, np.nan)

    # A control's in their place.
    smoothing = {}
    if kind == "smoothed":
        prevalence = expit(prior_logits(hard[first]).astype(np.float64))
        strength = min(1.0, distance(p) / distance(np.broadcast_to(prevalence, y.shape)))
        with np.errstate(divide="ignore"):
            logits = logit((1 - strength) * y + strength * prevalence)
        logits = np.where(known, np.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT), np.nan)
        smoothing["smoothing"] = strength
    elif kind == "shuffled":
        # One cycle through all of them, so that nobody keeps its own.
        order = np.random.default_rng([seed, len(studies)]).permutation(np.flatnonzero(has))
        place = place.copy()
        place[order] = place[np.roll(order, 1)]
        logits = teacher_logits(place)

    # From studies to images.
    features = None
    if with_features:
        features = np.full((len(studies), cache.features.shape[1]), np.nan, dtype=np.float32)
        features[has] = cache.features[place[has]]
        features = features[study_of_image]
    summary = {
        "targets": kind,
        "studies": len(studies),
        "with_soft_label": int(has.sum()),
        "without_soft_label": int((~has & ~np.isnan(y).all(axis=1)).sum()),
        "without_hard_label": int((has & np.isnan(y).all(axis=1)).sum()),
        "teacher_distance": distance(p),
        "target_distance": distance(expit(logits)),
        "teacher_agreement": float(agree.mean()) if agree.size else float("nan"),
        "teacher_macro_auc": macro_auc(roc_auc_per_label(sure, np.nan_to_num(p))),
        **smoothing,
    }
    return StudentSoftLabels(logits[study_of_image].astype(np.float32), features, summary)
