"""The stage that counts words: its run, what it may learn from, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from toy_teacher import ToyTeacher, shared

from mlx_cxr import bag_of_words, build_manifest
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import label_index
from mlx_cxr.core.runs import RunExistsError, open_run
from mlx_cxr.data.study_reports import load_reports
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.teacher.bag_of_words import BagOfWords

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def counted(toy, tmp_path_factory):
    config = toy.config(f"outputs={tmp_path_factory.mktemp('words')}", "teacher.run_name=lora")
    return config, bag_of_words.run(config)


def test_the_run_is_scored_beside_the_teachers(counted):
    config, folder = counted
    assert folder == config.outputs / "lora_bag_of_words"
    record, results = read_record(folder / "teacher.json"), read_record(folder / "test_results.json")
    assert open_run(folder, finished=True).kind == "bag of words"
    assert record["strength"] in (0.1, 1, 10, 100)
    scored = open_scored_run(folder, "bag of words")
    assert scored.title == f"bag of words, reads: {record['reads']}"
    assert results["exposure_only"] is None
    # It counts the words of the report that the label was made from.
    assert results["protocols"]["empty_negative"]["per_label"]["Edema"]["roc_auc"]["value"] > 0.95


def test_predictions_are_those_of_the_saved_model_on_the_study_s_report(counted):
    config, folder = counted
    bag, reports = BagOfWords.load(folder / "bag_of_words.npz"), load_reports(config.reports_path, None)
    part = read_predictions(folder / "predictions.csv").predictions.of_split("test")
    section = config.teacher.sections[0]
    for row, study in enumerate(part.study_ids[:10].tolist()):
        assert part.logits[row] == pytest.approx(bag.logits([reports.sections[study][section]])[0], abs=1e-5)


def test_test_studies_have_no_influence_on_the_model(toy, counted, tmp_path):
    table = pd.read_csv(toy.folder / "table.csv", keep_default_na=False)
    held_out = table["split"] == "test"
    table.loc[held_out, "findings"] = "floccinaucinihilipilification " * 20
    table.loc[held_out, "Edema"] = 1 - table.loc[held_out, "Edema"]
    table.to_csv(tmp_path / "table.csv", index=False)
    changed = toy.config(
        *(f"data.csv.table={tmp_path / 'table.csv'}", f"data.work_dir={tmp_path / 'made'}", f"outputs={tmp_path}"),
        "teacher.run_name=lora",
    )
    build_manifest.run(changed)
    other, own = (BagOfWords.load(f / "bag_of_words.npz") for f in (bag_of_words.run(changed), counted[1]))
    np.testing.assert_array_equal(other.terms, own.terms)
    np.testing.assert_array_equal(other.weights, own.weights)
    assert other.strength == own.strength
    assert other.weights[:, label_index("Edema")].any()


def test_a_run_is_kept_unless_it_is_to_be_replaced(counted):
    config, folder = counted
    with pytest.raises(RunExistsError, match=f"{folder} exists"):
        bag_of_words.run(config)
    assert bag_of_words.run(config, overwrite=True) == folder


def test_a_teacher_of_images_alone_has_no_words(toy):
    with pytest.raises(UserError, match=r"teacher\.modality is image: a bag of words needs reports"):
        bag_of_words.run(toy.config("teacher.modality=image"))
