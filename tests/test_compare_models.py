"""The stage on run folders as the other stages leave them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from PIL import Image
from simulated_runs import NOISE, comparison_of, model, write_external, write_run, write_three

from mlx_cxr import compare_models
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.core.formatting import interval_text
from mlx_cxr.evaluation import external
from mlx_cxr.evaluation.scored_runs import ComparisonError, open_scored_run

FILES = {
    *("final_comparison.json", "final_comparison.csv", "final_comparison.md", "calibration_comparison.png"),
    *("roc_empty_negative.png", "roc_empty_masked.png"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    write_three(outputs)
    control = model(NOISE["shuffled"], 13)
    write_run(outputs, "student_shuffled", control, targets="shuffled", taught_by="teacher")
    return outputs


@pytest.fixture
def outputs(made, tmp_path):
    return shutil.copytree(made, tmp_path / "outputs")


def readme_in(folder):
    path = folder / "README.md"
    path.write_text("top\n<!-- begin comparison -->\nbefore this run\n<!-- end comparison -->\nbottom\n")
    return path


def test_a_comparison_leaves_its_files_and_hashes_what_it_read(outputs, tmp_path):
    config = config_from_plain(comparison_of(outputs, comparison={"controls": ["shuffled"]}), "test")
    readme = readme_in(tmp_path)
    folder = compare_models.run(config, readme=readme)
    assert folder == outputs / "comparison_toy" == compare_models.comparison_dir(config)
    assert {item.name for item in folder.iterdir()} == FILES
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert "Synthetic cohort" in picture.text["Warning"]
    comparison = read_record(folder / "final_comparison.json")
    assert [one["run"] for one in comparison["models"]] == ["cnn", "teacher", "student", "student_shuffled"]
    inputs = comparison["provenance"]["inputs"]
    assert inputs["teacher/teacher.json"]["sha256"] == sha256_file(outputs / "teacher" / "teacher.json")
    assert len(inputs) == 4 * 3 + 1
    assert comparison["bootstrap"]["samples"] == 50
    page = (folder / "final_comparison.md").read_text()
    assert "not for clinical use" in page.splitlines()[2]
    assert {name for name in FILES if f"![{name}]({name})" in page} == {name for name in FILES if name.endswith(".png")}
    text = readme.read_text()
    assert text.startswith("top\n<!-- begin comparison -->\n\n")
    assert text.endswith("<!-- end comparison -->\nbottom\n")
    assert "before this run" not in text
    auc = comparison["protocols"]["empty_negative"]["models"]["student"]["macro"]["roc_auc"]["value"]
    assert f"| student (`student`) | 11.18 M | 11.18 M | {auc:.3f} [" in text


def test_names_on_the_command_line_win_and_the_closing_table_is_printed(outputs, tmp_path, caplog):
    write_run(outputs, "other_cnn", model(NOISE["cnn"], 20))
    write_run(outputs, "whole", model(0.2, 14), reads="whole report", sections=("whole",))
    external = read_record(write_external(outputs / "whole", "nih", 0))["against_own"]["macro"]["external"]
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(comparison_of(outputs, comparison={"controls": ["hard"], "min_retention": 1.0})))
    where = tmp_path / "elsewhere"
    caplog.set_level("INFO")
    compare_models.main(
        f"--config {path} --cnn_run other_cnn --control_run --graded_teacher_run whole --output_dir {where} "
        "--cohort nih --set evaluation.bootstrap_samples=0".split()
    )
    comparison = read_record(where / "final_comparison.json")
    assert [one["run"] for one in comparison["models"]] == ["other_cnn", "teacher", "student"]
    assert comparison["graded_teachers"]["models"][1]["run"] == "whole"
    graded = (where / "final_comparison.md").read_text().split("## Teachers by what")[1].split("## By finding")[0]
    assert "| `whole` | whole report (the labels' source) | 0.520 | 0.910 | " in graded
    assert f" | {interval_text(external)} | " in graded
    assert comparison["gates"]["retention"]["met"] is False
    assert not (outputs / "comparison_toy").exists()
    assert "teacher, reads: findings  1.60 B" in caplog.text
    assert "WARNING: gate not met: the student keeps at least 1.00" in caplog.text
    assert "WARNING: gate met" not in caplog.text


def test_a_control_of_the_configuration_that_is_not_trained_names_its_command(outputs):
    config = config_from_plain(comparison_of(outputs, comparison={"controls": ["hard"]}), "test")
    with pytest.raises(
        ComparisonError, match=r"student_hard/config\.json is missing.*--targets … --run_name student_hard"
    ):
        compare_models.run(config)
    assert not compare_models.comparison_dir(config).exists()


def test_other_cohorts_are_beside_the_own_test_in_every_table(outputs, tmp_path, caplog):
    """The CNN answers at random there, the student as it should; the teacher was scored on another cohort alone."""
    paths = {
        "cnn": write_external(outputs / "cnn", "nih", 1000),
        "student": write_external(outputs / "student", "nih", 0),
    }
    write_external(outputs / "teacher", "chexpert", 0)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(comparison_of(outputs, comparison={"controls": ["shuffled"]})))
    caplog.set_level("INFO")
    compare_models.main(["--config", str(path), "--cohort", "nih", "--cohort", "nih"])
    folder = outputs / "comparison_toy"
    comparison = read_record(folder / "final_comparison.json")
    assert comparison["cohorts"] == ["nih"]
    about = {one["run"]: one["external"] for one in comparison["models"]}
    assert {run: list(entries) for run, entries in about.items()} == {
        "cnn": ["nih"],
        "teacher": ["chexpert"],
        "student": ["nih"],
        "student_shuffled": [],
    }
    inputs, page = comparison["provenance"]["inputs"], (folder / "final_comparison.md").read_text()
    csv = pd.read_csv(folder / "final_comparison.csv").set_index(["protocol", "run", "finding"]).sort_index()
    for run, file in paths.items():
        assert inputs[f"{run}/external/nih/external_results.json"]["sha256"] == sha256_file(file)
        results = read_record(file)["against_own"]
        assert about[run]["nih"]["against_own"] == results
        for side, column in (("external", "nih_roc_auc"), ("own", "nih_own_roc_auc")):
            assert interval_text(results["macro"][side]) in page
            assert interval_text(results["macro"][side]) in caplog.text
            for finding, entry in {"macro": results["macro"], **results["per_label"]}.items():
                row = csv.loc["empty_negative", run, finding]
                assert row[column] == pytest.approx(entry[side]["value"])
                assert row[f"{column}_low"] == pytest.approx(entry[side]["low"])
    assert csv.loc[("empty_negative", "teacher")]["nih_roc_auc"].isna().all()
    assert csv.loc["empty_masked"]["nih_roc_auc"].isna().all(), "the figures are of the protocol that fitted"
    assert read_record(paths["cnn"])["against_own"]["macro"]["verdict"] == "below"
    said = " ".join(page.split("## What the figures support")[1].split("- Gate")[0].split())
    assert "macro ROC-AUC is lower (the interval excludes the own figure) for `cnn`; " in said
    assert (
        "Not scored on `nih`: `teacher`, `student_shuffled`; `python -m mlx_cxr.evaluate_external --run teacher" in said
    )
    assert "Never seen outside its own cohort: `student_shuffled`." in said
    assert "ROC-AUC on nih | own test, findings of nih | ms/sample" in page
    (teacher,) = (
        line
        for line in page.splitlines()
        if line.startswith("| teacher, reads: findings (`teacher`) | 1.6") and "– | –" in line
    )
    assert teacher.endswith(" | – | – | 812 |")
    assert page.count("ROC-AUC on nih |") == 1


def test_a_cohort_that_no_run_was_scored_on_names_runs_and_command(outputs):
    config = config_from_plain(comparison_of(outputs, comparison={"controls": []}), "test")
    write_external(outputs / "teacher", "chexpert", 0)
    message = (
        r"--cohort nih: none of cnn, teacher, student was scored on it, only on chexpert; "
        r"`python -m mlx_cxr\.evaluate_external --run cnn --config …` with the configuration named `nih` does it"
    )
    with pytest.raises(UserError, match=message):
        compare_models.run(config, cohorts=["nih"])
    assert not compare_models.comparison_dir(config).exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run, path: (run / "best_model.safetensors").write_bytes(b"other"),
            "best_model.safetensors was .*, is ",
        ),
        (lambda run, path: (run / "best_model.safetensors").unlink(), "best_model.safetensors was .*, is missing"),
        (lambda run, path: (run / "operating_points.json").write_text("{}"), "operating_points.json was "),
        (
            lambda run, path: write_record(path, read_record(path) | {"schema": 0}),
            f"is not of schema {external.SCHEMA}",
        ),
        (lambda run, path: write_record(path, read_record(path) | {"provenance": {}}), "lacks 'provenance.inputs"),
        (lambda run, path: path.write_text(path.read_text().replace("0", "1")), "is not what was written"),
    ],
)
def test_results_of_another_state_of_a_run_are_refused_when_asked_for_and_else_do_not_count(outputs, spoil, message):
    config = config_from_plain(comparison_of(outputs, comparison={"controls": []}), "test")
    write_external(outputs / "student", "nih", 0)
    spoil(outputs / "cnn", write_external(outputs / "cnn", "nih", 0))
    with pytest.raises(RecordError, match=message):
        compare_models.run(config, cohorts=["nih"])
    assert [list(open_scored_run(outputs / run, run).external) for run in ("cnn", "student")] == [[], ["nih"]]


@pytest.mark.parametrize("other", [{"manifest": "f" * 64}, {"split": "test"}])
def test_runs_on_different_studies_of_a_cohort_are_not_set_side_by_side(outputs, other):
    config = config_from_plain(comparison_of(outputs, comparison={"controls": []}), "test")
    write_external(outputs / "cnn", "nih", 0)
    write_external(outputs / "student", "nih", 0, **other)
    ((key, value),) = other.items()
    with pytest.raises(
        ComparisonError, match=f"{key} of nih: .*cnn/external/nih/.* has .*student.* has {value}; score"
    ):
        compare_models.run(config, cohorts=["nih"])


def test_a_readme_without_the_block_is_refused_and_the_comparison_kept(outputs, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    config = config_from_plain(comparison_of(outputs), "test")
    with pytest.raises(UserError, match="begin comparison"):
        compare_models.run(config, readme=readme)
    assert readme.read_text() == "nothing\n"
    assert {item.name for item in compare_models.comparison_dir(config).iterdir()} == FILES


def test_an_error_is_one_line_and_status_2(outputs, tmp_path, capsys):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(comparison_of(outputs)))
    (outputs / "teacher" / "predictions.csv").unlink()
    with pytest.raises(SystemExit) as stopped:
        compare_models.main(["--config", str(path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "cache_teacher_outputs --teacher_run teacher" in message


def test_the_stage_needs_no_mlx():
    code = "import sys; import mlx_cxr.compare_models; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
