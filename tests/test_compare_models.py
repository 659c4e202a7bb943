"""The stage on run folders as the other stages leave them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from simulated_runs import NOISE, comparison_of, model, write_run, write_three

from mlx_cxr import compare_models
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record, sha256_file
from mlx_cxr.evaluation.scored_runs import ComparisonError

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
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(comparison_of(outputs, comparison={"controls": ["hard"], "min_retention": 1.0})))
    where = tmp_path / "elsewhere"
    caplog.set_level("INFO")
    compare_models.main(
        f"--config {path} --cnn_run other_cnn --control_run --graded_teacher_run whole --output_dir {where} "
        "--set evaluation.bootstrap_samples=0".split()
    )
    comparison = read_record(where / "final_comparison.json")
    assert [one["run"] for one in comparison["models"]] == ["other_cnn", "teacher", "student"]
    assert comparison["graded_teachers"]["models"][1]["run"] == "whole"
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
