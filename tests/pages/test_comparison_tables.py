import io
import math
from itertools import pairwise

import pandas as pd
import pytest
from simulated_runs import NOISE, model, write_run, write_three

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.formatting import interval_text
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.comparison import compare
from mlx_cxr.evaluation.metrics import METRICS
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.pages.comparison_page import comparison_markdown
from mlx_cxr.pages.comparison_tables import (
    closing_comparison,
    comparison_block,
    comparison_table,
    cost_note,
    count_text,
    milliseconds,
    p_text,
)

ROLES = {"cnn": "cnn", "teacher": "teacher", "student": "student", "shuffled": "control", "whole": "graded teacher"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    write_three(outputs)
    write_run(outputs, "shuffled", model(NOISE["shuffled"], 13), targets="shuffled")
    write_run(outputs, "whole", model(0.2, 14), reads="whole report", sections=("whole",))
    (outputs / "shuffled" / "cost.json").unlink()
    runs = [open_scored_run(outputs / name, role) for name, role in ROLES.items()]
    settings = {"experiment": "toy", "samples": 60, "seed": 0, "bins": 15, "provenance": {}}
    return compare(runs, min_retention=0.9, **settings)


def macro(comparison, run, metric="roc_auc", protocol="empty_negative"):
    return comparison["protocols"][protocol]["models"][run]["macro"][metric]


def test_the_page_begins_with_the_notices_and_the_statement(comparison):
    lines = comparison_markdown(comparison).splitlines()
    assert lines[0] == "# Comparison of CNN, teacher and student: `toy`"
    assert "not for clinical use" in lines[2]
    assert "Synthetic cohort" in lines[3]
    text = "\n".join(lines)
    n, patients = comparison["counts"]["studies"], comparison["counts"]["patients"]
    assert f"{n} test studies of {patients} patients: those that every model scored. None was left out." in text
    assert text.index("What the figures support") < text.index("| model |")
    assert "- Gate met: the teacher beats the CNN" in text
    assert "**`whole` (reads: whole report) may read what the labels were taken from.**" in text
    real = comparison_markdown({**comparison, "synthetic": False})
    assert "Synthetic cohort" not in real.split("## Models")[0]


def test_the_page_read_back_from_the_file_is_the_same(comparison, tmp_path):
    back = read_record(write_record(tmp_path / "a.json", comparison))
    assert comparison_markdown(back) == comparison_markdown(comparison)
    assert comparison_block(back) == comparison_block(comparison)
    assert closing_comparison(back) == closing_comparison(comparison)


def test_tables_hold_the_figures_of_the_comparison(comparison):
    text = comparison_markdown(comparison, ["roc.png"])
    rows = {line.split(" | ")[0].strip("| "): line for line in text.split("## Controls")[0].splitlines() if "|" in line}
    teacher = rows["teacher, reads: findings (`teacher`)"]
    assert teacher.startswith("| teacher, reads: findings (`teacher`) | 1.60 B | 6.00 M | ")
    for metric in ("roc_auc", "average_precision", "f1", "sensitivity", "specificity", "brier"):
        assert interval_text(macro(comparison, "teacher", metric)) in teacher
    figures = comparison["protocols"]["empty_negative"]["models"]["teacher"]["macro"]
    assert f"{figures['ece_uncalibrated']:.3f} → {figures['ece']:.3f}" in teacher
    assert teacher.endswith("| 812 |")
    assert rows["control: shuffled (`shuffled`)"].endswith("| – |")
    difference = comparison["protocols"]["empty_negative"]["differences"]["student_minus_cnn"]
    assert interval_text(difference["macro"]["brier"]) in rows["student − CNN"]
    edema = difference["per_label"]["Edema"]
    cell = f"{interval_text(edema['roc_auc'])} | {p_text(edema['p_value'])} → {p_text(edema['p_holm'])}"
    assert cell in text.split("## By finding, protocol `empty_negative`")[1].split("## Models")[0]
    assert "| finding | positive | negative | CNN | teacher, reads: findings | student |" in text
    assert "| `whole` | whole report (the labels' source) | 0.520 | 0.910 | " in text
    assert text.rstrip().endswith("![roc.png](roc.png)")


def test_every_table_is_a_table(comparison):
    lines = comparison_markdown(comparison).splitlines()
    pairs = [(a, b) for a, b in pairwise(lines) if a.startswith("|") and b.startswith("|")]
    assert len(pairs) > 8 * len(LABELS)
    assert all(a.count("|") == b.count("|") for a, b in pairs)


def test_both_protocols_are_there_and_each_table_says_which(comparison):
    text = comparison_markdown(comparison)
    for name in ("empty_negative", "empty_masked"):
        assert text.count(f"## Models, protocol `{name}`") == 1
        section = text.split(f"## Models, protocol `{name}`")[1]
        assert interval_text(macro(comparison, "student", protocol=name)) in section
    assert "still those fitted under `empty_negative`" in text.split("## Models, protocol `empty_masked`")[1]


def test_without_controls_or_intervals_the_page_says_so(comparison):
    bare = {**comparison, "graded_teachers": None, "bootstrap": {**comparison["bootstrap"], "samples": 0}}
    bare["models"] = [model for model in comparison["models"] if model["role"] != "control"]
    protocols = {name: {**section, "controls": {}} for name, section in comparison["protocols"].items()}
    bare["protocols"] = protocols
    text = comparison_markdown(bare)
    assert "None was compared; `--control_run` names" in text
    assert "No intervals: no resamples were asked for." in text
    assert "Teachers by what they may read" not in text


def test_what_was_left_out_and_single_class_labels_are_said(comparison):
    counts = {**comparison["counts"], "runs": {"cnn": {"test_studies": 50, "left_out": 4}}}
    section = {**comparison["protocols"]["empty_negative"], "single_class": ["Fracture"]}
    changed = {**comparison, "counts": counts, "protocols": {**comparison["protocols"], "empty_negative": section}}
    text = comparison_markdown(changed)
    assert "Left out, as another model has no score for them: 4 of the 50 of `cnn`." in text
    assert "Left out of the means, as test has only one class of them: Fracture." in text


def test_what_was_timed_is_said_and_what_was_not_names_its_command(comparison):
    note = cost_note(comparison)
    assert "one film, 96 px, on cpu backend, 2 cores (`cnn`, `student`)" in note
    assert "one report, up to 768 tokens, on cpu backend, 2 cores (`teacher`)" in note
    assert (
        "`shuffled` was not timed (it has no `cost.json`): `python -m mlx_cxr.evaluate_cnn --run_name shuffled" in note
    )
    assert "machines differ" not in note
    mac = {**comparison["models"][0], "cost": {"what": "one film", "device": {"kind": "metal", "cores": 10}}}
    assert "The machines differ" in cost_note({**comparison, "models": [mac, *comparison["models"][1:]]})
    none = [{**model, "cost": None} for model in comparison["models"]]
    assert "ms/sample is for" not in cost_note({**comparison, "models": none})


def test_the_csv_holds_every_figure_once(comparison):
    table = comparison_table(comparison)
    back = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    assert len(back) == 2 * 4 * 15
    assert not back.duplicated(["protocol", "run", "finding"]).any()
    row = back[(back.protocol == "empty_masked") & (back.run == "teacher") & (back.finding == "Edema")].iloc[0]
    entry = comparison["protocols"]["empty_masked"]["models"]["teacher"]["per_label"]["Edema"]
    for metric in METRICS:
        assert row[metric] == pytest.approx(entry[metric]["value"])
        assert row[f"{metric}_high"] == pytest.approx(entry[metric]["high"])
    assert (row["positives"], row["parameters"], row["role"]) == (entry["positives"], 1_600_000_000, "teacher")
    assert "1600000000," in table.to_csv(index=False), "counts are whole numbers"
    control = back[(back.run == "shuffled") & (back.finding == "macro")]
    assert control["ms_per_sample"].isna().all()
    assert control["positives"].isna().all()


def test_the_readmes_block_is_short_and_has_the_main_figures(comparison):
    text = comparison_block(comparison)
    assert len(text.splitlines()) < 30
    assert "The cohort is synthetic. Research only, not for clinical use." in text
    for run in ("cnn", "teacher", "student", "shuffled"):
        assert interval_text(macro(comparison, run)) in text
    assert "cpu backend, 2 cores" in text
    assert "The student keeps " in text
    assert "- Gate met: the teacher beats the CNN" in text
    assert "- Student minus the control `shuffled`: " in text
    assert "; better: it matters that the answers belong to the study." in text
    assert "The cohort is synthetic" not in comparison_block({**comparison, "synthetic": False})


def test_the_closing_table_is_plain_and_aligned(comparison):
    lines = closing_comparison(comparison).splitlines()
    assert "protocol empty_negative" in lines[0]
    assert [line.index("[") for line in lines[2:6]] == [lines[2].index("[")] * 4
    assert interval_text(macro(comparison, "student")) in lines[4]
    assert lines[3].startswith("teacher, reads: findings  1.60 B")
    assert sum(line.startswith("gate ") for line in lines) == 2
    assert any(line.startswith("student minus control shuffled: ") for line in lines)
    assert lines[-1] == "Synthetic cohort. Research only, not for clinical use."


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (812, "812"), (11_200, "11.2 k"), (11_175_374, "11.18 M"), (1_600_000_000, "1.60 B")],
)
def test_counts_for_people(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0371, "0.037"), (0.0009, "<0.001"), (0.001, "0.001"), (1.0, "1.000"), (None, "–"), (math.nan, "–")],
)
def test_p_values_for_people(p, text):
    assert p_text(p) == text


@pytest.mark.parametrize(("value", "text"), [(4.254, "4.25"), (42.54, "42.5"), (812.3, "812"), (None, "–")])
def test_milliseconds_for_people(value, text):
    assert milliseconds(value) == text
