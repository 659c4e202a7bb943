"""Files of a scored run, of studies in any order and number."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import read_json
from mlx_cxr.data.manifest import load_manifest, write_manifest
from mlx_cxr.evaluation.operating_points import ABSTAIN, read_operating_points
from mlx_cxr.evaluation.predictions import Predictions, PredictionsError, read_predictions
from mlx_cxr.evaluation.scores import write_scores
from mlx_cxr.evaluation.shortcuts import metadata_scores, study_metadata
from mlx_cxr.pages.results_page import write_results

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
    results = read_json(tmp_path / "test_results.json")
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
    scores = metadata_scores(study_metadata(train), targets, study_metadata(one))
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
    results = read_json(tmp_path / "test_results.json")
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
