"""The page and its advice, from analyses of simulated runs and from figures set by hand."""

from __future__ import annotations

import copy
import re

import numpy as np
import pandas as pd
import pytest
from judged_studies import K
from simulated_runs import NOISE, model, write_run, write_three

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.failure_results import analyse
from mlx_cxr.evaluation.failures import CATEGORIES, worst
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.pages.failure_advice import ADVICE, closing_failures, gap_sentence, next_steps
from mlx_cxr.pages.failure_page import Shown, category_rules, failure_markdown


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_three(folder, 40)
    sections = {"reads": "whole report", "sections": ("whole",)}
    write_run(folder, "reader", model(NOISE["teacher"], 11, 40), **sections)
    return folder


def analysis_of(outputs, roles, drawn=None, samples=100):
    student = open_scored_run(outputs / "student", "student")
    others = {role: open_scored_run(outputs / name, role) for role, name in roles.items()}
    n = len(student.test)
    ages = np.where(np.arange(n) % 9 == 0, np.nan, 64.0)
    studies = pd.DataFrame(
        {
            "view": student.test.view_groups(),
            "sex": np.where(np.arange(n) % 5 == 0, "", "F"),
            "age": ages,
            "age_band": np.where(np.isnan(ages), "unknown", "60-79"),
        }
    )
    if drawn == "as labelled":
        drawn = (student.test.raw_labels == 1).astype(float)
    settings = {"teacher_margin": 0.5, "rare_share": 0.05, "samples": samples, "seed": 0, "provenance": {}}
    analysis = analyse(student, others, studies, np.linspace(0.03, 0.5, K), drawn, **settings)
    analysis.results["relabel"] = {"items": 10}
    return analysis


def page_of(analysis, report="No edema | seen."):
    rows = worst(analysis.failures, 4, LABELS).to_dict("records")
    shown = [Shown(row, f"images/{place}.png", report) for place, row in enumerate(rows)]
    return failure_markdown(analysis.results, shown, 2, "confusions.png")


def test_the_page_begins_with_the_notices_and_has_every_part(outputs):
    analysis = analysis_of(outputs, {"cnn": "cnn", "teacher": "teacher"}, "as labelled")
    text = page_of(analysis)
    lines = text.splitlines()
    assert lines[0] == "# Failure analysis of `student`"
    assert "not for clinical use" in lines[2]
    assert "Synthetic cohort" in lines[3]
    assert re.findall(r"(?m)^## (.*)$", text) == [
        *("What counts as a failure", "The worst errors", "Kinds of error", "Is it the label that is wrong?"),
        *("Subgroups", "Confusion between findings", "What to look at next"),
    ]
    counts = analysis.results["counts"]
    errors = counts["false_positives"] + counts["false_negatives"]
    assert f"**{errors} of {counts['pairs']} calls are failures**" in text
    assert f"on {counts['abstained_failures']} of them the model abstains" in text
    (first,) = worst(analysis.failures, 4, LABELS).to_dict("records")[:1]
    assert f"| {first['abstention'] or 'no'} | {first['confidence']:.2f} |" in text
    assert text.count("![") == 5
    assert "\\| seen" in text, "a bar in a report does not break its table"
    assert "nan" not in text.lower()
    assert "None" not in text


def test_figures_stand_where_they_belong(outputs):
    analysis = analysis_of(outputs, {"cnn": "cnn", "teacher": "teacher"}, "as labelled")
    text, row = page_of(analysis), worst(analysis.failures, 4, LABELS).iloc[0]
    first = text[text.index("### 1.") : text.index("### 2.")]
    assert f"### 1. {row['label']}: {row['error']}" in first
    assert f"{row['teacher_probability']:.3f} ({row['teacher_threshold']:.3f})" in first
    assert f"| {row['confidence']:.2f} | {row['category']} |" in first
    for label in LABELS:
        entry = analysis.results["per_label"][label]
        cells = [entry[key] for key in ("positives", "false_negatives", "negatives", "false_positives")]
        assert f"| {label} | {' | '.join(map(str, cells))} |" in text
    check = analysis.results["drawing"]["categories"]["likely label noise"]
    assert check["wrong_labels"] == 0
    assert f"**'likely label noise' is right for 0.00 of its errors** (0 of {check['errors']};" in text


def test_without_teacher_cnn_or_report_the_page_says_so(outputs):
    analysis = analysis_of(outputs, {}, samples=0)
    text = page_of(analysis, report=None)
    assert "No CNN was given" in text
    assert "Without a teacher nothing is sorted under 'likely label noise'" in text
    assert "teacher p" not in text
    assert "CNN p" not in text
    assert "likely label noise |" not in text
    assert "Is it the label that is wrong?" not in text
    assert text.count("There is no report.") == 4
    assert "No resamples were asked for" in text
    assert "No gap has an interval, so none can be told from noise." in text
    assert "nan" not in text.lower()
    assert "The report does not name it." in page_of(analysis, report="")


def test_a_teacher_that_reads_the_labels_source_is_named(outputs):
    text = page_of(analysis_of(outputs, {"teacher": "reader"}))
    assert "`reader`, which reads: whole report" in text
    assert "may read the section that the labels were taken from" in text


def test_rules_are_told_for_the_categories_that_there_are(outputs):
    results = analysis_of(outputs, {"teacher": "teacher"}).results
    rules = category_rules(results)
    assert tuple(rules) == CATEGORIES == tuple(ADVICE)
    assert "at least 0.5 of the way" in rules["likely label noise"]
    assert rules["rare finding"].endswith(f"({LABELS[0]})")


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (None, "**No gap has an interval that excludes 0.** Of 8 gaps about 0.4 would"),
        (
            {"attribute": "sex", "group": "F", "value": 0.1, "low": 0.02, "high": 0.2},
            "is that of sex F: 0.100 [0.020, 0.200], so more is missed there.** 2 of 8 gaps",
        ),
        ({"attribute": "age", "group": "80+", "value": -0.1, "low": -0.2, "high": -0.01}, "so less is missed there.**"),
    ],
)
def test_the_largest_gap_is_told_with_how_many_were_looked_at(largest, said):
    assert said in gap_sentence({"looked_at": 8, "apart": 2, "largest": largest})


def test_advice_follows_from_the_figures(outputs):
    results = copy.deepcopy(analysis_of(outputs, {"teacher": "teacher"}).results)
    nothing = {"value": 1.0, "low": 0.8, "high": 1.2}
    for entry in results["categories"].values():
        entry |= {"false_positives": 1, "false_negatives": 1, "fp_ratio": nothing, "fn_ratio": nothing}
    results["categories"]["not mentioned"]["false_positives"] = 30
    results["confused_pairs"] = []
    steps = "\n".join(next_steps(results))
    assert "The largest category is 'not mentioned' with 31 of" in steps
    assert "No category is over-represented beyond noise" in steps
    assert "instead" not in steps
    assert "relabel_key.csv" in steps
    results["categories"]["bedside view"]["fn_ratio"] = {"value": 2.0, "low": 1.1, "high": 3.0}
    results["confused_pairs"] = [
        {"called": "Edema", "present": "Fracture", "value": 3, "low": 2, "high": 4, "count": 9}
    ]
    gap = {"attribute": "sex", "group": "F", "value": 0.1, "low": 0.02, "high": 0.2}
    results["gaps"] = {"looked_at": 8, "apart": 1, "largest": gap}
    results["relabel"]["items"] = 0
    steps = "\n".join(next_steps(results))
    assert "'bedside view' is over-represented among false negatives (ratio 2.00 [1.10, 3.00])." in steps
    assert "No category" not in steps
    assert "in which Edema is called and Fracture is there instead" in steps
    assert "More is missed in sex F" in steps
    assert "relabel" not in steps
    missed = {
        label: e["false_negatives"] / e["positives"] for label, e in results["per_label"].items() if e["positives"]
    }
    enough = [label for label in missed if results["per_label"][label]["positives"] >= 5]
    assert f"{max(enough, key=missed.__getitem__)} is missed most" in steps


def test_the_closing_lines_are_the_same_from_the_file(outputs, tmp_path):
    results = analysis_of(outputs, {"teacher": "teacher"}).results
    assert any(np.isnan(entry["fn_ratio"]["low"]) for entry in results["categories"].values())
    text = closing_failures(results)
    assert closing_failures(read_record(write_record(tmp_path / "failures.json", results))) == text
    counts = results["counts"]
    errors = counts["false_positives"] + counts["false_negatives"]
    assert text.startswith(f"Failures of student on test: {errors} of {counts['pairs']} calls (")
    assert text.splitlines()[-1] == "Synthetic cohort. Research only, not for clinical use."
    assert "**" not in text
    assert "gap" in text


def test_without_errors_the_page_still_stands(outputs):
    perfect = model(0.0, 5, 40)
    perfect = type(perfect)(
        *(getattr(perfect, name) for name in ("split", "patient_ids", "study_ids", "views", "raw_labels")),
        np.where(perfect.raw_labels == 1, 4.0, -4.0).astype(np.float32),
    )
    write_run(outputs, "perfect", perfect)
    student = open_scored_run(outputs / "perfect", "student")
    studies = pd.DataFrame({"view": student.test.view_groups(), "sex": "F", "age": np.nan, "age_band": "unknown"})
    settings = {"teacher_margin": 0.5, "rare_share": 0.05, "samples": 60, "seed": 0, "provenance": {}}
    analysis = analyse(student, {}, studies, np.full(K, 0.2), np.zeros((len(studies), K)), **settings)
    analysis.results["relabel"] = {"items": 0}
    assert analysis.failures.empty
    assert "study_id" in analysis.failures
    text = page_of(analysis)
    assert "**0 of " in text
    assert "None is shown." in text
    assert "There are no errors." in text
    assert "nan" not in text.lower()
