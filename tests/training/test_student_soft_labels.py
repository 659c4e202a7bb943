"""Soft labels and their controls: looked up by study, as strong as the teacher, no study's own when shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from mlx_cxr.data.soft_labels import SoftLabelError, SoftLabels
from mlx_cxr.training.student_soft_labels import make_student_soft_labels

STUDIES = 40
IDS = [f"s{i:03}" for i in range(STUDIES)]
TEMPERATURES = np.linspace(0.5, 2, 14).astype(np.float32)


def labels_of(count: int = STUDIES, seed: int = 0) -> np.ndarray:
    """Hard labels, each of its own prevalence, a tenth of them unknown."""
    rng = np.random.default_rng(seed)
    hard = (rng.random((count, 14)) < np.linspace(0.1, 0.6, 14)).astype(np.float32)
    hard[rng.random(hard.shape) < 0.1] = np.nan
    return hard


def teacher(hard: np.ndarray, ids=IDS, features: int | None = None) -> SoftLabels:
    """Mostly right; its rows lie in another order than the images, with studies among them that are not trained on."""
    rng = np.random.default_rng(1)
    logits = np.nan_to_num(hard, nan=0.5) * 4 - 2 + rng.normal(0, 1, hard.shape)
    order = rng.permutation(len(ids))
    others = [f"v{i}" for i in range(5)]
    rows = np.concatenate([logits[order], rng.normal(size=(5, 14))]).astype(np.float32)
    given = None if features is None else rng.normal(size=(len(rows), features)).astype(np.float16)
    names = (*(ids[i] for i in order), *others)
    splits = ("train",) * len(ids) + ("validate",) * 5
    return SoftLabels(names, splits, rows, given, {}, TEMPERATURES)


def made(kind: str, soft: SoftLabels, ids=IDS, hard=None, **options):
    hard = labels_of() if hard is None else hard
    return make_student_soft_labels(kind, soft, ids, hard, **{"calibrated": True, "seed": 0} | options)


def test_the_teachers_logits_are_looked_up_by_study_and_calibrated():
    hard = labels_of()
    soft = teacher(hard)
    images = [3, 3, 0, 39, 17, 17, 17]
    got = made("teacher", soft, [IDS[i] for i in images], hard[images])
    plain = made("teacher", soft, [IDS[i] for i in images], hard[images], calibrated=False)
    for row, study in enumerate(images):
        theirs = soft.logits[soft.study_ids.index(IDS[study])]
        np.testing.assert_allclose(got.logits[row], theirs / TEMPERATURES, rtol=1e-6)
        np.testing.assert_array_equal(plain.logits[row], theirs)
    assert got.logits.dtype == np.float32
    assert got.features is None
    assert (got.summary["studies"], got.summary["with_soft_label"]) == (4, 4)


def test_studies_without_a_soft_label_are_counted_and_have_none():
    hard = labels_of()
    soft = teacher(hard[:30], IDS[:30])
    for kind in ("teacher", "smoothed", "shuffled"):
        got = made(kind, soft, hard=hard)
        assert np.isnan(got.logits[30:]).all(), kind
        assert (got.summary["with_soft_label"], got.summary["without_soft_label"]) == (30, 10)
    assert np.isfinite(made("shuffled", soft, hard=hard).logits[:30]).all()


def test_agreement_by_hand_and_by_scikit_learn():
    """Per study, however many images each has: images of a study weigh no more than one image."""
    hard = labels_of()
    soft = teacher(hard)
    images = [*range(STUDIES), *[5] * 50]
    summary = made("teacher", soft, [IDS[i] for i in images], hard[images]).summary
    p = expit(soft.logits[soft.place(IDS)] / TEMPERATURES)
    known = ~np.isnan(hard)
    assert summary["teacher_distance"] == pytest.approx(np.abs(p - hard)[known].mean(), rel=1e-6)
    assert summary["target_distance"] == summary["teacher_distance"]
    assert summary["teacher_agreement"] == pytest.approx(((p > 0.5) == (hard == 1))[known].mean())
    aucs = [roc_auc_score(hard[known[:, k], k], p[known[:, k], k]) for k in range(14)]
    assert summary["teacher_macro_auc"] == pytest.approx(np.mean(aucs), abs=1e-9)


def test_smoothing_is_as_strong_as_the_teacher_and_pulls_towards_the_prevalence():
    hard = labels_of()
    soft = teacher(hard)
    got = made("smoothed", soft, hard=hard)
    strength, p = got.summary["smoothing"], expit(got.logits.astype(np.float64))
    assert 0 < strength < 1
    assert got.summary["target_distance"] == pytest.approx(got.summary["teacher_distance"], rel=1e-5)
    for k in range(14):
        known = ~np.isnan(hard[:, k])
        y = hard[known, k]
        # With half a count on either side, so that a label without positives has a prevalence above 0.
        prevalence = (y.sum() + 0.5) / (len(y) + 1)
        np.testing.assert_allclose(p[known, k], (1 - strength) * y + strength * prevalence, rtol=1e-4)
    assert np.isnan(got.logits[np.isnan(hard)]).all(), "nothing is made up where the hard label is unknown"


def test_smoothing_stops_at_the_prevalence_however_bad_the_teacher():
    hard = labels_of()
    soft = teacher(1 - hard)
    got = made("smoothed", soft, hard=hard)
    assert got.summary["smoothing"] == 1
    assert got.summary["target_distance"] < got.summary["teacher_distance"]
    assert np.nanmax(np.ptp(np.where(np.isnan(got.logits), got.logits[0], got.logits), axis=0)) < 1e-5


def test_smoothing_of_a_perfect_teacher_is_finite():
    hard = np.nan_to_num(labels_of())
    hard[:, 0] = 0
    soft = teacher(hard)
    sure = SoftLabels(soft.study_ids, soft.splits, np.sign(soft.logits) * 500, None, {}, np.ones(14, np.float32))
    got = made("smoothed", sure, hard=hard)
    assert np.isfinite(got.logits).all()


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_gives_each_study_one_other_studys_label(seed):
    hard = labels_of()
    soft = teacher(hard, features=3)
    images = [*range(STUDIES), 7, 7]
    got = made(
        "shuffled", soft, [IDS[i] for i in images], hard[images], seed=seed, calibrated=False, with_features=True
    )
    own = soft.logits[soft.place(IDS)]
    source = [int(np.flatnonzero((own == row).all(axis=1))[0]) for row in got.logits[:STUDIES]]
    assert sorted(source) == list(range(STUDIES)), "each is given once; none of a study that is not trained on"
    assert all(a != b for a, b in enumerate(source)), "nobody keeps its own"
    np.testing.assert_array_equal(got.logits[-1], got.logits[7])
    wanted = soft.features[soft.place([IDS[i] for i in source])]
    np.testing.assert_array_equal(got.features[:STUDIES], wanted.astype(np.float32))
    assert got.summary["target_distance"] > 1.5 * got.summary["teacher_distance"]
    again = made("shuffled", soft, [IDS[i] for i in images], hard[images], seed=seed, calibrated=False)
    np.testing.assert_array_equal(again.logits, got.logits)
    other = made("shuffled", soft, [IDS[i] for i in images], hard[images], seed=seed + 1, calibrated=False)
    assert not np.array_equal(other.logits, got.logits)


def test_features_are_looked_up_by_study():
    hard = labels_of()
    soft = teacher(hard[:30], IDS[:30], features=4)
    got = made("teacher", soft, hard=hard, with_features=True)
    assert got.features.dtype == np.float32
    np.testing.assert_array_equal(got.features[2], soft.features[soft.study_ids.index(IDS[2])].astype(np.float32))
    assert np.isnan(got.features[30:]).all()


def test_what_cannot_be_made_is_an_error_that_says_what_to_do():
    hard = labels_of()
    soft = teacher(hard)
    with pytest.raises(SoftLabelError, match=r"feature_weight is above 0, but the soft labels come without features"):
        made("teacher", soft, with_features=True)
    with pytest.raises(SoftLabelError, match=r"0 of 2 training studies have a soft label; run cache_teacher_outputs"):
        made("teacher", soft, ["a", "b"], hard[:2])
    with pytest.raises(SoftLabelError, match=r"1 of 2 training studies"):
        made("shuffled", soft, ["a", IDS[0]], hard[:2])
