import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from simulated_predictions import simulated

from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds
from mlx_cxr.evaluation.operating_points import (
    ABSENT,
    ABSTAIN,
    PRESENT,
    OperatingPoints,
    read_operating_points,
    write_operating_points,
)
from mlx_cxr.evaluation.predictions import join
from mlx_cxr.evaluation.results import fit_operating_points

K = len(LABELS)
VALIDATION = simulated(60, "validate", 0)
SHA = "0123456789abcdef" * 4


def points_with(threshold=0.5, lower=0.3, upper=0.6, positives=50, negatives=50, source="validation", alpha=0.1):
    """The same for every finding, at temperature 1."""

    def column(value, dtype=np.float64):
        return np.full(K, value, dtype=dtype)

    return OperatingPoints(
        Calibration(column(1.0), ("validation",) * K),
        Thresholds(column(threshold), (source,) * K, "f1"),
        "empty_negative",
        ConformalBands(alpha, column(lower), column(upper), column(positives, np.int64), column(negatives, np.int64)),
    )


def decided(points, probability):
    """State and reason of the first finding."""
    p = np.full((1, K), probability)
    return int(points.states(p)[0, 0]), points.reason(0, probability)


BOTH = "both present and absent are plausible at 90 %"
FEW = "too few examples {} Atelectasis on validation ({}; 9 needed at alpha 0.1)"
NEITHER = "neither present nor absent fits at 90 %: unlike the validation films of either kind"


@pytest.mark.parametrize(
    ("changes", "probability", "state", "reason"),
    [
        ({}, 0.29, ABSENT, ""),
        ({}, 0.3, ABSTAIN, BOTH),
        ({}, 0.6, ABSTAIN, BOTH),
        ({}, 0.61, PRESENT, ""),
        ({"lower": 0.6, "upper": 0.4}, 0.3, ABSENT, ""),
        ({"lower": 0.6, "upper": 0.4}, 0.41, ABSTAIN, NEITHER),
        ({"lower": 0.6, "upper": 0.4}, 0.59, ABSTAIN, NEITHER),
        ({"lower": 0.6, "upper": 0.4}, 0.6, PRESENT, ""),
        ({"threshold": 0.8}, 0.7, ABSTAIN, "the threshold says absent, but at 90 % only present is plausible"),
        ({"threshold": 0.8}, 0.8, PRESENT, ""),
        ({"threshold": 0.1}, 0.2, ABSTAIN, "the threshold says present, but at 90 % only absent is plausible"),
        ({"threshold": 0.1}, 0.05, ABSENT, ""),
        ({"alpha": 0.025}, 0.5, ABSTAIN, "both present and absent are plausible at 97.5 %"),
        ({"positives": 8, "lower": 0.0}, 0.2, ABSTAIN, FEW.format("with", 8)),
        ({"positives": 8, "lower": 0.0}, 0.7, ABSTAIN, FEW.format("with", 8)),
        ({"negatives": 3, "upper": 1.0}, 0.9, ABSTAIN, FEW.format("without", 3)),
        ({"negatives": 3, "upper": 1.0}, 0.1, ABSTAIN, FEW.format("without", 3)),
        ({"positives": 4, "negatives": 2, "lower": 0.0, "upper": 1.0}, 0.1, ABSTAIN, FEW.format("without", 2)),
        ({"positives": 0, "lower": 0.0, "source": "default"}, 0.9, ABSTAIN, FEW.format("with", 0)),
        ({"positives": 9, "negatives": 9}, 0.2, ABSENT, ""),
    ],
)
def test_a_call_is_made_only_where_the_set_is_what_the_threshold_says(changes, probability, state, reason):
    assert decided(points_with(**changes), probability) == (state, reason)


unit = st.integers(0, 20).map(lambda i: i / 20)


@settings(max_examples=300, deadline=None)
@given(threshold=unit, lower=unit, upper=unit, p=unit, n=st.sampled_from([9, 50]), alpha=st.sampled_from([0.1, 0.3]))
def test_never_a_call_beside_the_set_and_always_a_reason(threshold, lower, upper, p, n, alpha):
    points = points_with(threshold, lower, upper, n, n, alpha=alpha)
    state, reason = decided(points, p)
    held = {kind for kind, there in ((PRESENT, p >= lower), (ABSENT, p <= upper)) if there}
    called = PRESENT if p >= threshold else ABSENT
    assert state == (called if held == {called} else ABSTAIN)
    assert (reason == "") == (state != ABSTAIN)


@given(*(st.floats(0, 1) for _ in range(3)), st.sampled_from([8, 9, 50]))
@settings(max_examples=200, deadline=None)
def test_the_zone_holds_what_is_abstained_on_and_nothing_else(threshold, lower, upper, n):
    points = points_with(threshold, lower, upper, positives=n)
    low, high = points.abstention_zone(0)
    grid = np.linspace(0, 1, 1001)
    states = points.states(np.repeat(grid[:, None], K, axis=1))[:, 0]
    inside = (grid > low) & (grid < high)
    assert (states[inside] == ABSTAIN).all()
    outside = (grid < low) | (grid > high)
    assert (states[outside] == np.where(grid > high, PRESENT, ABSENT)[outside]).all()
    assert (low, high) == (0, 1) or n >= 9


def test_decisions_are_of_the_calibrated_probabilities():
    points = points_with(threshold=0.5, lower=0.3, upper=0.6)
    points = replace(points, calibration=Calibration(np.full(K, 4.0), ("validation",) * K))
    logits = np.tile(4 * logit([[0.1], [0.4], [0.9]]), K).astype(np.float32)
    got = points.decide(logits)
    np.testing.assert_allclose(got.probabilities[:, 0], [0.1, 0.4, 0.9], rtol=1e-6)
    assert got.states.dtype == np.int8
    np.testing.assert_array_equal(got.states, np.tile([[ABSENT], [ABSTAIN], [PRESENT]], K))


def test_logits_that_cannot_be_decided_are_named():
    points = points_with()
    with pytest.raises(ValueError, match=r"logits have shape \(14,\), expected \(N, 14\)"):
        points.decide(np.zeros(K))
    logits = np.zeros((3, K))
    logits[2, 3] = math.nan
    with pytest.raises(ValueError, match="row 2, Edema: logit nan is not finite"):
        points.decide(logits)


@pytest.mark.parametrize("protocol", list(SCORING_PROTOCOLS))
def test_bands_are_fitted_to_the_targets_of_the_protocol(protocol):
    """By the definition: floor(alpha (n + 1)) - 1 of the n validation positives are ruled out, or none, and likewise of
    the negatives."""
    points = fit_operating_points(VALIDATION, protocol, "f1", 0.1)
    y = SCORING_PROTOCOLS[protocol].apply(VALIDATION.raw_labels)
    p = expit(VALIDATION.logits.astype(float) / points.calibration.temperatures)
    for k in range(K):
        for value, bound, side, count in (
            (1, points.bands.lower, 1, points.bands.positives),
            (0, points.bands.upper, -1, points.bands.negatives),
        ):
            of_class = side * p[y[:, k] == value, k]
            assert count[k] == len(of_class)
            cut = (len(of_class) + 1) // 10
            expected = np.sort(of_class)[cut - 1] if cut else min(0, side)
            assert side * bound[k] == pytest.approx(expected, rel=1e-12)
    assert points.protocol == protocol
    assert points.tuned.all()


def test_alpha_and_split_are_checked():
    with pytest.raises(ValueError, match="alpha is 1"):
        fit_operating_points(VALIDATION, "empty_negative", "f1", 1)
    with pytest.raises(ValueError, match="these predictions hold test studies"):
        fit_operating_points(join(VALIDATION, simulated(3, "test", 1)), "empty_negative", "f1", 0.1)


@pytest.fixture
def written(tmp_path):
    raw = VALIDATION.raw_labels.copy()
    raw[:, 5] = 0  # no positive: no threshold, and nothing that rules "present" out
    points = fit_operating_points(replace(VALIDATION, raw_labels=raw), "empty_masked", "youden", 0.07)
    path = tmp_path / "operating_points.json"
    return points, write_operating_points(path, points, run="r", synthetic=True, made_from={"checkpoint": SHA})


def test_what_is_written_reads_back_exactly(written):
    points, path = written
    back, about = read_operating_points(path)
    assert about == {"run": "r", "synthetic": True, "made_from": {"checkpoint": SHA}}
    assert (back.protocol, back.thresholds.rule, back.bands.alpha) == ("empty_masked", "youden", 0.07)
    assert back.thresholds.sources == points.thresholds.sources
    assert back.calibration.sources == points.calibration.sources
    assert "default" in back.thresholds.sources
    for got, wanted in (
        (back.calibration.temperatures, points.calibration.temperatures),
        (back.thresholds.values, points.thresholds.values),
        *((getattr(back.bands, name), getattr(points.bands, name)) for name in ("lower", "upper")),
        *((getattr(back.bands, name), getattr(points.bands, name)) for name in ("positives", "negatives")),
    ):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(back.decide(VALIDATION.logits).states, points.decide(VALIDATION.logits).states)


def renamed(plain):
    plain["labels"] = {("Oedema" if name == "Edema" else name): entry for name, entry in plain["labels"].items()}


def reordered(plain):
    plain["labels"] = dict(reversed(plain["labels"].items()))


def setting(*path, to):
    def damage(plain):
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = to

    return damage


def without(*path):
    def damage(plain):
        for key in path[:-1]:
            plain = plain[key]
        del plain[path[-1]]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (setting("schema", to=0), "has schema 0, not 1"),
        (without("schema"), "has schema None, not 1"),
        (without("alpha"), "alpha: Field required"),
        (without("labels", "Edema", "upper"), r"labels\.Edema\.upper: Field required"),
        (without("labels", "Edema"), "its labels are Atelectasis, Cardiomegaly, Consolidation, Enlarged"),
        (renamed, "Consolidation, Oedema, .*those of this version are Atelectasis"),
        (reordered, "its labels are Support Devices"),
        (setting("labels", "Edema", "lower", to=None), r"labels\.Edema\.lower: Input should be a valid number"),
        (setting("labels", "Edema", "threshold", to=1.5), r"labels\.Edema\.threshold: .*less than or equal to 1"),
        (setting("labels", "Edema", "threshold", to="0.5"), r"labels\.Edema\.threshold: .*valid number"),
        (setting("labels", "Edema", "temperature", to=0), r"labels\.Edema\.temperature: .*greater than 0"),
        (setting("labels", "Edema", "temperature", to=True), r"labels\.Edema\.temperature: .*valid number"),
        (setting("labels", "Edema", "positives", to=-1), r"labels\.Edema\.positives: .*greater than or equal to 0"),
        (setting("labels", "Edema", "positives", to=1.5), r"labels\.Edema\.positives: .*valid integer"),
        (setting("labels", "Edema", "positives", to=0), "Edema: threshold_source is 'validation' with 0 positives"),
        (setting("labels", "Edema", "threshold_source", to="test"), r"labels\.Edema\.threshold_source"),
        (setting("labels", "Edema", "more", to=1), r"labels\.Edema\.more: Extra inputs are not permitted"),
        (setting("alpha", to=0), "alpha: .*greater than 0"),
        (setting("protocol", to="mine"), "protocol: .*'empty_negative' or 'empty_masked'"),
        (setting("threshold_rule", to="best"), "threshold_rule"),
        (setting("synthetic", to="no"), "synthetic: .*valid boolean"),
        (setting("made_from", "checkpoint", to="abc"), r"made_from\.checkpoint: .*pattern"),
    ],
)
def test_every_damage_is_named_with_the_way_out(written, damage, message):
    _, path = written
    plain = read_record(path)
    damage(plain)
    write_record(path, plain)
    with pytest.raises(RecordError, match=message) as caught:
        read_operating_points(path)
    assert str(path) in str(caught.value)
    assert "run evaluate_cnn again" in str(caught.value)


def test_a_file_that_is_none_is_named(written):
    _, path = written
    path.write_text("[]")
    with pytest.raises(RecordError, match=r"operating_points\.json carries no 'self_sha256'"):
        read_operating_points(path)
    path.write_text(path.read_text()[:-1])
    with pytest.raises(RecordError, match=r"operating_points\.json is not readable JSON"):
        read_operating_points(path)
    path.unlink()
    with pytest.raises(RecordError, match=r"operating_points\.json is missing.*run evaluate_cnn again"):
        read_operating_points(path)
