"""The page of evidence: every figure and verdict is that of the runs' files, whichever way they turn out."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
from simulated_runs import NOISE, comparison_of, model, write_run, write_three

from mlx_cxr import compare_models
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import read_record
from mlx_cxr.core.formatting import interval_text

EVIDENCE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "make_evidence.py"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A student better than its CNN and as good as one of hard labels, and word counts worse than the teacher."""
    folder = tmp_path_factory.mktemp("outputs")
    write_three(folder)
    write_run(folder, "student_hard", model(NOISE["student"], 12), targets="hard", taught_by="teacher")
    write_run(folder, "teacher_bag_of_words", model(6.0, 14), reads="findings")
    plain = comparison_of(folder, comparison={"controls": ["hard"]})
    compare_models.run(config_from_plain(plain, "test"))
    return folder


def test_claims_stand_beside_what_could_refute_them(outputs):
    comparison = read_record(outputs / "comparison_toy" / "final_comparison.json")
    section = comparison["protocols"]["empty_negative"]
    rows = {(cells[0], cells[1]): cells[2:] for synthetic, cells in EVIDENCE["rows_of"](outputs) if synthetic}
    gain = section["differences"]["student_minus_cnn"]
    figure, said, run = rows["the student gains by its teacher", "the CNN of the same labels"]
    assert figure.startswith(interval_text(gain["judged"]))
    assert (said, run) == ("shown", "`comparison_toy`")
    assert rows["the student gains by its teacher", "a student of the labels alone"][1] == "not shown"
    words = next(one for one in comparison["graded_teachers"]["models"] if one["role"] == "bag of words")
    figure, said, _ = rows["the language model is worth its size", "a bag of words that reads the same"]
    assert words["minus_teacher"]["high"] < 0
    assert figure == interval_text(
        {
            **words["minus_teacher"],
            "value": -words["minus_teacher"]["value"],
            "low": -words["minus_teacher"]["high"],
            "high": -words["minus_teacher"]["low"],
        }
    )
    assert said == "shown"


def test_the_page_keeps_synthetic_films_apart_from_those_of_patients(outputs):
    page = EVIDENCE["page"]([outputs])
    patients, synthetic = page.split("## Synthetic films")
    assert "No run." in patients
    assert "the language model is worth its size" in synthetic
    assert EVIDENCE["page"]([outputs, outputs]).count("`comparison_toy`") == 2 * page.count("`comparison_toy`")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.51, 0.6, "shown"), (0.4, 0.49, "refuted"), (0.45, 0.55, "not shown"), (None, None, "not shown (no interval)")],
)
def test_a_cohort_never_seen_is_held_against_chance(low, high, said):
    macro = {"external": {"value": 0.5, "low": low, "high": high}, "own": {"value": 0.8, "low": 0.7, "high": 0.9}}
    path = Path("outputs/cnn/external/other/external_results.json")
    (row,) = EVIDENCE["_external"]({"against_own": {"macro": macro}}, path)
    assert row[3:] == [said, "`cnn/external/other`"]


def test_a_teacher_without_a_comparison_is_held_against_word_counts_too(outputs, tmp_path):
    for name in ("teacher", "teacher_bag_of_words"):
        shutil.copytree(outputs / name, tmp_path / name)
    (row,) = [cells for _, cells in EVIDENCE["rows_of"](tmp_path) if "bag of words" in cells[1]]
    wanted = {cells[1]: cells for _, cells in EVIDENCE["rows_of"](outputs)}["a bag of words that reads the same"]
    # These runs were evaluated without resamples.
    assert row == [*wanted[:2], wanted[2].partition(" ")[0], "not shown (no interval)", "`teacher`"]
