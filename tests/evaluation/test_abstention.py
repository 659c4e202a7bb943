import math
from dataclasses import replace

import numpy as np
import pytest
from simulated_predictions import simulated

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.abstention import COVERAGES, abstention_section, finding_calls, weighted_figures
from mlx_cxr.evaluation.bootstrap import patient_resamples
from mlx_cxr.evaluation.conformal import coverage_range, quantile_rank
from mlx_cxr.evaluation.predictions import join
from mlx_cxr.evaluation.results import evaluate, fit_operating_points
from mlx_cxr.evaluation.risk_coverage import risk_coverage
from mlx_cxr.pages.results_page import closing_table, results_markdown

VALIDATION, TEST = simulated(150, "validate", 0), simulated(120, "test", 1)
POINTS = fit_operating_points(VALIDATION, "empty_negative", "f1", 0.1)
NAN = math.nan


def counted(finding, rows):
    """The figures of some rows by counting, in the order of `FIGURES` without the areas."""
    y, called, made = finding.truth[rows], finding.above_threshold[rows], finding.made[rows]
    present, absent = finding.present_plausible[rows], finding.absent_plausible[rows]

    def share(part, of):
        return np.mean(part[of]) if of.any() else NAN

    anything = np.ones(len(y), bool)
    return [
        share(present, y),
        share(absent, ~y),
        share(made, anything),
        share(made, y),
        share(made, ~y),
        share(called != y, anything),
        share(called != y, made),
        share(called, made & y),
        share(~called, made & ~y),
    ]


def counts_of(bands):
    """The validation studies behind each coverage."""
    return {"positive_coverage": bands.positives, "negative_coverage": bands.negatives}


@pytest.fixture(scope="module", params=list(SCORING_PROTOCOLS))
def findings(request):
    return finding_calls(VALIDATION, TEST, POINTS, request.param)


def test_figures_are_what_counting_gives_and_weights_repeat_rows(findings):
    weights = np.random.default_rng(0).integers(0, 3, (4, len(TEST)))
    weights[0] = 1
    for finding in findings:
        got = weighted_figures(finding, weights)
        for figures, weight in zip(got, weights[:, finding.kept], strict=True):
            rows = np.repeat(np.arange(len(finding.truth)), weight)
            np.testing.assert_allclose(figures[:-2], counted(finding, rows), rtol=1e-12)
            for area, ranking in zip(figures[-2:], ("probability", "conformal"), strict=True):
                curve = risk_coverage(finding.wrong[rows], finding.confidences[ranking][rows])[1]
                assert area == pytest.approx(curve.mean())


def test_calls_and_sets_are_those_of_the_points():
    p = POINTS.calibration.probabilities(TEST.logits)
    for protocol, policy in SCORING_PROTOCOLS.items():
        targets = policy.apply(TEST.raw_labels)
        for k, finding in enumerate(finding_calls(VALIDATION, TEST, POINTS, protocol)):
            kept = ~np.isnan(targets[:, k])
            np.testing.assert_array_equal(finding.kept, kept)
            np.testing.assert_array_equal(finding.truth, targets[kept, k])
            np.testing.assert_array_equal(finding.above_threshold, p[kept, k] >= POINTS.thresholds.values[k])
            np.testing.assert_array_equal(finding.made, [not POINTS.reason(k, q) for q in p[kept, k]])
            only_one = finding.present_plausible != finding.absent_plausible
            np.testing.assert_array_equal(
                finding.made, only_one & (finding.above_threshold == finding.present_plausible)
            )


@pytest.fixture(scope="module")
def section():
    return abstention_section(VALIDATION, TEST, POINTS, patient_resamples(TEST.patient_ids, 60, 0))


def test_coverage_over_draws_is_what_the_rank_promises():
    """k / (n + 1) of n validation studies of a class, of studies of patients that validation has not seen."""
    reached, promised = [], []
    for seed in range(20):
        validation, test = simulated(80, "validate", 2 * seed), simulated(80, "test", 2 * seed + 1)
        points = fit_operating_points(validation, "empty_negative", "f1", 0.1)
        section = abstention_section(validation, test, points, patient_resamples(test.patient_ids, 0, 0))
        entries = section["protocols"]["empty_negative"]["per_label"].values()
        for key, counts in (
            ("positive_coverage", points.bands.positives),
            ("negative_coverage", points.bands.negatives),
        ):
            reached.append(np.nanmean([entry[key]["value"] for entry in entries]))
            promised.append(np.mean([min(1, quantile_rank(int(n), 0.1) / (n + 1)) for n in counts]))
    reached, promised = (np.reshape(x, (20, 2)).mean(axis=0) for x in (reached, promised))
    assert (promised > 0.9).all()
    np.testing.assert_allclose(reached, promised, atol=0.012)


def test_what_to_expect_is_by_the_number_of_validation_studies(section):
    """And of test studies, under the protocol of the bands."""
    targets = SCORING_PROTOCOLS["empty_negative"].apply(TEST.raw_labels)
    for k, label in enumerate(LABELS):
        for key, counts, value in (
            ("positive_coverage", POINTS.bands.positives, 1),
            ("negative_coverage", POINTS.bands.negatives, 0),
        ):
            tested = int((targets[:, k] == value).sum())
            assert section["expected"][label][key] == coverage_range(int(counts[k]), 0.1, tested)


def test_means_are_over_the_labels_that_both_splits_can_judge():
    def without(part, column, value):
        """Keeps at most three labels of that value, and takes the others for not mentioned."""
        raw = part.raw_labels.copy()
        rows = np.flatnonzero(raw[:, column] == value)[3:]
        raw[rows, column] = NAN
        return replace(part, raw_labels=raw)

    few = fit_operating_points(without(VALIDATION, 5, 1), "empty_negative", "f1", 0.1)
    none = replace(TEST, raw_labels=np.where(np.arange(14) == 8, NAN, TEST.raw_labels).astype(np.float32))
    section = abstention_section(without(VALIDATION, 5, 1), none, few, patient_resamples(TEST.patient_ids, 0, 0))
    assert section["too_few"] == ["Fracture"]
    assert section["needed"] == 9
    protocol = section["protocols"]["empty_negative"]
    assert set(LABELS) - set(protocol["macro_labels"]) == {"Fracture", "No Finding"}
    fracture, nothing = (protocol["per_label"][label] for label in ("Fracture", "No Finding"))
    assert (fracture["positive_coverage"]["value"], fracture["called"]["value"]) == (1, 0)
    assert math.isnan(nothing["positive_coverage"]["value"])
    assert section["expected"]["Fracture"]["positive_coverage"] == (1, 1)
    values = [protocol["per_label"][label]["called"]["value"] for label in protocol["macro_labels"]]
    assert protocol["macro"]["called"]["value"] == pytest.approx(np.mean(values))
    assert section["protocols"]["empty_masked"]["per_label"]["No Finding"]["risk_at"]["conformal"] == pytest.approx(
        [NAN] * 10, nan_ok=True
    )


def test_risk_at_full_coverage_is_that_of_all_calls_and_ranking_by_probability_has_the_smaller_area(section):
    for protocol in section["protocols"].values():
        assert COVERAGES[-1] == 1
        for entry in protocol["per_label"].values():
            for curve in entry["risk_at"].values():
                assert curve[-1] == pytest.approx(entry["risk"]["value"])
        macro = protocol["macro"]
        assert macro["aurc_probability"]["value"] < macro["aurc_conformal"]["value"] < macro["risk"]["value"]
        assert macro["aurc_probability"]["high"] < macro["risk"]["low"]
    curves = [entry["risk_at"]["conformal"] for entry in section["protocols"]["empty_negative"]["per_label"].values()]
    mean = section["protocols"]["empty_negative"]["macro"]["risk_at"]["conformal"]
    np.testing.assert_allclose(mean, np.mean(curves, axis=0))


def test_the_more_may_be_ruled_out_the_less_is_covered():
    resamples = patient_resamples(TEST.patient_ids, 0, 0)
    covered = []
    for alpha in (0.05, 0.1, 0.2, 0.3):
        points = fit_operating_points(VALIDATION, "empty_negative", "f1", alpha)
        macro = abstention_section(VALIDATION, TEST, points, resamples)["protocols"]["empty_negative"]["macro"]
        covered.append([macro[key]["value"] for key in ("positive_coverage", "negative_coverage", "called")])
    positives, negatives, called = np.array(covered).T
    assert (np.diff(positives) < 0).all()
    assert (np.diff(negatives) < 0).all()
    assert called[0] < called[1] < called[2]


def test_the_page_holds_the_figures_and_says_what_they_promise(tmp_path):
    settings = {"run": "r", "synthetic": True, "samples": 60, "seed": 0, "bins": 15, "provenance": {}}
    results = evaluate(join(VALIDATION, TEST), POINTS, **settings)
    page = results_markdown(read_record(write_record(tmp_path / "test_results.json", results)))
    assert page == results_markdown(results)
    text = page[page.index("## Abstention") : page.index("## Shortcuts")]
    edema = results["abstention"]["protocols"]["empty_negative"]["per_label"]["Edema"]
    coverage, (low, high) = edema["positive_coverage"], results["abstention"]["expected"]["Edema"]["positive_coverage"]
    cell = f"{coverage['value']:.3f} [{coverage['low']:.3f}, {coverage['high']:.3f}] ({low:.2f} to {high:.2f})"
    n = results["operating_points"]["Edema"]["positives"]
    assert f"| Edema | {n} | {cell} |" in text
    assert f"| {edema['aurc_conformal']['value']:.3f} [" in text
    for said in ("0.9 is aimed at", "another hospital", "a study of one film", "approximate", "risk_coverage.png"):
        assert said in text
    assert "`empty_masked`, with the bands of `empty_negative`" in text
    assert "nan" not in text
    outside = []
    for side, key in (("positives", "positive_coverage"), ("negatives", "negative_coverage")):
        for label, ranges in results["abstention"]["expected"].items():
            value = results["abstention"]["protocols"]["empty_negative"]["per_label"][label][key]["value"]
            if not ranges[key][0] <= value <= ranges[key][1]:
                outside.append(f"{label} ({side}: {value:.3f}, {'below' if value < ranges[key][0] else 'above'} ")
    said = next(line for line in text.splitlines() if "chance alone" in line)
    assert said.count(" (positives: ") + said.count(" (negatives: ") == len(outside) > 0
    assert all(part in said for part in outside)
    assert "of 28, chance alone puts 1.4 or fewer outside on average" in said
    macro = results["abstention"]["protocols"]["empty_negative"]["macro"]
    line = f"Abstaining at alpha 0.1, means of 14: {macro['called']['value']:.2f} called, "
    line += f"{macro['risk_called']['value']:.2f} of these wrong; {macro['risk']['value']:.2f} if all are called."
    assert line in closing_table(results).splitlines()
