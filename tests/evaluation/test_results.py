"""Results of a run: their figures against independent ones, and the files that hold them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from simulated_predictions import simulated
from sklearn import metrics as sk
from sklearn.metrics import roc_auc_score

from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.data.manifest import load_manifest, write_manifest
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.evaluation.operating_points import ABSTAIN, read_operating_points
from mlx_cxr.evaluation.predictions import Predictions, PredictionsError, join, read_predictions
from mlx_cxr.evaluation.results import evaluate, fit_operating_points, write_scores
from mlx_cxr.evaluation.shortcuts import control_scores, study_metadata
from mlx_cxr.pages.results_page import closing_table, results_markdown, write_results

VALIDATION, TEST = simulated(60, "validate", 0), simulated(70, "test", 1)
LESION = LABELS.index("Lung Lesion")


def without_lesions(part):
    raw = part.raw_labels.copy()
    raw[:, LESION] = np.where(raw[:, LESION] == 1, math.nan, raw[:, LESION])
    return replace(part, raw_labels=raw)


def results_of(validation, test, samples=60, protocol="empty_negative", **more):
    points = fit_operating_points(validation, protocol, "f1", 0.1)
    predictions = join(validation, test)
    settings = {"run": "r", "synthetic": True, "samples": samples, "seed": 0, "bins": 15, "provenance": {"commit": "c"}}
    return evaluate(predictions, points, **settings, **more), points


@pytest.fixture(scope="module")
def scored():
    return results_of(VALIDATION, without_lesions(TEST))


@pytest.mark.parametrize("protocol", list(SCORING_PROTOCOLS))
def test_figures_are_scikit_learns(scored, protocol):
    results, points = scored
    section = results["protocols"][protocol]
    test = without_lesions(TEST)
    targets = SCORING_PROTOCOLS[protocol].apply(test.raw_labels)
    aucs = []
    for k, label in enumerate(LABELS):
        entry, kept = section["per_label"][label], ~np.isnan(targets[:, k])
        y, z = targets[kept, k], test.logits[kept, k].astype(float)
        point = results["operating_points"][label]
        p = expit(z / point["temperature"])
        assert (entry["positives"], entry["negatives"]) == (y.sum(), (1 - y).sum())
        assert entry["left_out"] == len(test) - len(y)
        assert entry["brier"]["value"] == pytest.approx(np.mean((p - y) ** 2))
        assert entry["brier_uncalibrated"] == pytest.approx(np.mean((expit(z) - y) ** 2))
        if k == LESION:
            assert math.isnan(entry["roc_auc"]["value"])
            assert math.isnan(entry["roc_auc"]["low"])
            continue
        call = p >= point["threshold"]
        expected = (sk.roc_auc_score(y, z), sk.average_precision_score(y, z), sk.f1_score(y, call))
        assert [entry[m]["value"] for m in ("roc_auc", "average_precision", "f1")] == pytest.approx(expected)
        assert entry["sensitivity"]["value"] == pytest.approx(call[y == 1].mean())
        assert entry["specificity"]["value"] == pytest.approx((~call[y == 0]).mean())
        assert entry["roc_auc"]["low"] <= entry["roc_auc"]["value"] <= entry["roc_auc"]["high"]
        aucs.append(entry["roc_auc"]["value"])
    assert section["macro"]["roc_auc"]["value"] == pytest.approx(np.mean(aucs))
    assert section["single_class"] == ["Lung Lesion"]
    assert len(section["macro_labels"]) == 13
    assert points.protocol == "empty_negative"


def test_protocols_differ_by_what_empty_means(scored):
    negative, masked = (scored[0]["protocols"][name]["per_label"]["Edema"] for name in SCORING_PROTOCOLS)
    raw = TEST.raw_labels[:, LABELS.index("Edema")]
    assert (negative["positives"], negative["left_out"]) == ((raw == 1).sum(), 0)
    assert masked["left_out"] == (np.isnan(raw) | (raw == -1)).sum() > 0


def test_thresholds_and_temperatures_come_from_validation_alone(scored):
    first = scored[0]
    other = replace(TEST, raw_labels=np.roll(TEST.raw_labels, 7, axis=0), logits=TEST.logits[::-1] * 2)
    second, _ = results_of(VALIDATION, other)
    assert second["operating_points"] == first["operating_points"]
    assert second["protocols"]["empty_negative"]["macro"] != first["protocols"]["empty_negative"]["macro"]
    with pytest.raises(ValueError, match="these predictions hold test studies"):
        fit_operating_points(join(VALIDATION, TEST), "empty_negative", "f1", 0.1)


def test_operating_points_follow_the_protocol_they_are_fitted_under(scored):
    masked, _ = results_of(VALIDATION, TEST, protocol="empty_masked")
    assert masked["fitted_under"] == "empty_masked"
    assert masked["operating_points"] != scored[0]["operating_points"]


def test_the_models_steep_logits_are_scaled_down_and_calibration_improves(scored):
    results, points = scored
    assert (points.calibration.temperatures > 1).mean() > 0.8
    macro = results["protocols"]["empty_negative"]["macro"]
    assert macro["ece"] < macro["ece_uncalibrated"]
    assert macro["brier"]["value"] < macro["brier_uncalibrated"]


def test_single_class_validation_falls_back_and_says_so():
    results, _ = results_of(without_lesions(VALIDATION), TEST, samples=0)
    point = results["operating_points"]["Lung Lesion"]
    expected = {"threshold": 0.5, "threshold_source": "default", "temperature": 1.0, "temperature_source": "default"}
    assert expected.items() <= point.items()
    assert (point["lower"], point["positives"]) == (0, 0)
    assert results["abstention"]["too_few"][-1:] != []
    lesion = results["abstention"]["protocols"]["empty_negative"]["per_label"]["Lung Lesion"]
    assert lesion["called"]["value"] == 0
    assert math.isnan(lesion["risk_called"]["value"])
    assert results["protocols"]["empty_negative"]["macro"]["roc_auc"]["replicates"] == 0
    assert "0.5 by default" in results_markdown(results)


def test_validation_counts_and_the_rest(scored):
    results = scored[0]
    y = SCORING_PROTOCOLS["empty_masked"].apply(VALIDATION.raw_labels)
    kept = ~np.isnan(y)
    aucs = [sk.roc_auc_score(y[m, k], VALIDATION.logits[m, k]) for k, m in enumerate(kept.T)]
    assert results["validation"]["empty_masked"]["roc_auc"] == pytest.approx(np.mean(aucs))
    assert results["counts"]["test"] == {"studies": len(TEST), "patients": 70}
    assert results["provenance"] == {"commit": "c"}
    assert results["metadata_only"] is None
    assert results["notice"] == "Synthetic cohort. Research only, not for clinical use."
    assert set(METRICS) <= set(results["protocols"]["empty_negative"]["macro"])


def test_file_and_page_hold_the_same_figures(scored, tmp_path):
    results, _ = scored
    back = read_record(write_record(tmp_path / "test_results.json", results))
    assert back["protocols"]["empty_negative"]["per_label"]["Lung Lesion"]["roc_auc"]["value"] is None
    page = results_markdown(back)
    assert page == results_markdown(results)
    auc = results["protocols"]["empty_negative"]["per_label"]["Edema"]["roc_auc"]
    assert f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in page
    assert page.index("not for clinical use") < page.index("| finding")
    assert "Synthetic cohort" in page
    assert "`empty_negative`" in page
    assert "`empty_masked`" in page
    assert page.count("test has only one class of them: Lung Lesion.") == 2
    lines = page.splitlines()
    pairs = [(a, b) for a, b in pairwise(lines) if a.startswith("|") and b.startswith("|")]
    assert all(a.count("|") == b.count("|") for a, b in pairs)
    assert len(pairs) > 5 * len(LABELS)


def test_closing_table_holds_the_main_figures(scored):
    results, _ = scored
    text = closing_table(results)
    macro = results["protocols"]["empty_negative"]["macro"]["roc_auc"]
    assert "mean of 13" in text
    valid, drawn = macro["replicates"], macro["drawn"]
    assert 0 < valid < drawn
    interval = f"{macro['value']:.3f} [{macro['low']:.3f}, {macro['high']:.3f}"
    assert f"{interval}]" in text
    assert f"| {interval}; {valid} of {drawn} resamples] |" in results_markdown(results)
    assert text.splitlines()[-1] == "Synthetic cohort. Research only, not for clinical use."
    assert "protocol empty_negative" in text
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_metadata_only_model_is_scored_beside_the_model():
    def metadata(part):
        return pd.DataFrame({"view": part.views, "age": math.nan, "sex": ""})

    train = simulated(80, "train", 9)
    more = {"train": (metadata(train), train.raw_labels), "test_metadata": metadata(TEST)}
    results, _ = results_of(VALIDATION, TEST, **more)
    got = results["metadata_only"]
    assert got["features"] == ["view"]
    assert abs(got["macro"]["roc_auc"]["value"] - 0.5) < 0.06
    assert got["macro"]["model_minus_it"]["low"] > 0.1
    assert "sees only view" in results_markdown(json.loads(json.dumps(results)))


CONFIG = config_from_plain(
    {
        "name": "scored",
        "data": {"root": "nowhere", "work_dir": "nowhere", "synthetic": True},
        "evaluation": {"bootstrap_samples": 10},
    },
    "test",
)


RECORD = {"stage": "test", "inputs": {"checkpoint": {"path": "best_model.safetensors", "sha256": "ab" * 32}}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """240 studies, some of two images; age decides the labels, so that a model of age alone ranks well."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(240):
        age = int(rng.integers(20, 90))
        labels = (age + rng.normal(0, 12, len(LABELS)) > 55).astype(float)
        for image in range(1 + i % 3 // 2):
            row = {"image_id": f"i{i:03}-{image}", "patient_id": f"p{i:03}", "study_id": f"s{i * 7 % 240:03}"}
            row |= {"split": ("train", "validate", "test")[i % 3], "view": ("AP", "PA")[image], "age": str(age)}
            rows.append(row | {"sex": "", "path": f"{i}.png", "text": ""} | dict(zip(LABELS, labels, strict=True)))
    path = tmp_path_factory.mktemp("made") / "manifest.csv"
    write_manifest(path, pd.DataFrame(rows))
    return load_manifest(path)


def predictions_of(manifest, splits=("validate", "test"), left_out: int = 0) -> Predictions:
    """A model's logits of each study but the first few of each split, in an order of its own."""
    frame = manifest.frame.drop_duplicates("study_id")
    raw = manifest.raw_labels[frame.index]
    rng = np.random.default_rng(1)
    chosen = [np.flatnonzero(frame["split"] == split)[left_out:] for split in splits]
    rows = np.concatenate([rng.permutation(part) for part in chosen])
    logits = (raw[rows] * 2 - 1 + rng.normal(0, 1, (len(rows), len(LABELS)))).astype(np.float32)
    columns = [frame[name].to_numpy(str)[rows] for name in ("split", "patient_id", "study_id", "view")]
    return Predictions(*columns, raw[rows], logits)


def test_metadata_belong_to_the_studies_that_were_scored(manifest, tmp_path):
    predictions = predictions_of(manifest, left_out=9)
    points, _ = write_scores(tmp_path, predictions, "empty_negative", manifest, CONFIG, RECORD)
    results = read_record(tmp_path / "test_results.json")
    assert results["counts"]["test"]["studies"] == len(predictions.of_split("test")) == 71
    assert results["provenance"] == RECORD
    read = read_predictions(tmp_path / "predictions.csv")
    np.testing.assert_array_equal(read.predictions.study_ids, predictions.study_ids)
    np.testing.assert_array_equal(read.thresholds, points.thresholds.values)

    # Age alone, by its own fit on training and looked up by study: a shuffled look-up would be near 0.5.
    frame = manifest.frame
    train = frame[frame["split"] == "train"]
    targets = manifest.raw_labels[train.drop_duplicates("study_id").index]
    test = predictions.of_split("test")
    by_study = frame.set_index("study_id")
    one = pd.concat([by_study.loc[[study]].reset_index() for study in test.study_ids])
    scores = control_scores(study_metadata(train), targets, study_metadata(one))
    for k, label in enumerate(LABELS):
        wanted = roc_auc_score(test.raw_labels[:, k], scores[:, k])
        got = results["metadata_only"]["per_label"][label]["roc_auc"]["value"]
        assert got == pytest.approx(wanted, abs=1e-9)
        assert got > 0.8


def test_files_are_those_of_a_scored_run_and_hang_together(manifest, tmp_path):
    settings = CONFIG.evaluation.model_copy(update={"abstention_alpha": 0.25, "threshold_rule": "youden"})
    config = CONFIG.model_copy(update={"evaluation": settings})
    predictions = predictions_of(manifest)
    points, results = write_scores(tmp_path, predictions, "empty_masked", manifest, config, RECORD)
    names = {"predictions.csv", "operating_points.json", "test_results.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    write_results(tmp_path, results, predictions, points)
    names |= {"results.md", "roc.png", "precision_recall.png", "reliability.png", "risk_coverage.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    results = read_record(tmp_path / "test_results.json")
    assert (results["fitted_under"], results["abstention"]["alpha"]) == ("empty_masked", 0.25)
    assert "Synthetic cohort" in (tmp_path / "results.md").read_text()

    kept, about = read_operating_points(tmp_path / "operating_points.json")
    assert about == {"run": tmp_path.name, "synthetic": True, "made_from": {"checkpoint": "ab" * 32}}
    assert (kept.protocol, kept.thresholds.rule, kept.bands.alpha) == ("empty_masked", "youden", 0.25)
    states = points.decide(predictions.logits).states
    np.testing.assert_array_equal(kept.decide(predictions.logits).states, states)
    written = read_predictions(tmp_path / "predictions.csv").states
    np.testing.assert_array_equal(written, states)
    assert 0 < (written == ABSTAIN).mean() < 1


def test_a_split_without_predictions_is_named_and_nothing_is_written(manifest, tmp_path):
    for there, lacking in (("test", "validate"), ("validate", "test")):
        with pytest.raises(PredictionsError, match=f"no predictions of split '{lacking}'"):
            write_scores(tmp_path, predictions_of(manifest, (there,)), "empty_negative", manifest, CONFIG, {})
    assert not list(tmp_path.iterdir())
