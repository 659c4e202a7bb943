"""Each sentence follows from the figures by rule; so the figures are made up here, and the sentences checked."""

import copy
import math
from typing import get_args

import pytest

from mlx_cxr.core.config_schema import DistillationConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.comparison_statement import (
    CONTROLS,
    control_verdicts,
    external_sentences,
    findings_sentence,
    gate_lines,
    reading_warnings,
    retention_sentence,
    statement,
    support_sentence,
)


def interval(value, half=0.02):
    return {"value": value, "low": value - half, "high": value + half, "replicates": 100}


def difference(value, verdict, p_holm=1.0):
    per_label = {label: {"roc_auc": interval(value), "p_value": 0.5, "p_holm": p_holm} for label in LABELS}
    return {**judged(value, verdict), "per_label": per_label}


def judged(value, verdict, **rest):
    """A difference over two findings, by default resting on neither."""
    without = {"Edema": interval(value - 0.001), "Fracture": interval(value + 0.001)}
    entry = {"macro": {"roc_auc": interval(value + 0.1)}, "verdict": verdict, "judged": interval(value)}
    return {**entry, "judged_labels": ["Edema", "Fracture"], "without_each": without, "rests_on": [], **rest}


@pytest.fixture
def comparison():
    runs = {"cnn": 0.8, "teacher": 0.9, "student": 0.85}
    models = [{"run": role, "role": role, "title": role, "external": {}} for role in runs]
    models[1] |= {"reads": "findings", "reads_findings": True, "reads_label_source": False}
    section = {
        "models": {run: {"macro": {"roc_auc": interval(auc)}} for run, auc in runs.items()},
        "differences": {
            "teacher_minus_cnn": difference(0.1, "better"),
            "student_minus_cnn": difference(0.05, "better"),
            "student_minus_teacher": difference(-0.05, "worse"),
        },
        "controls": {},
        "retention": {
            "share": interval(0.944),
            "chance_share": 0.556,
            "gap_closed": interval(0.5, 0.1),
            "gap_closed_undefined": None,
        },
    }
    gates = {
        "teacher_beats_cnn": {
            "protocol": "p",
            "difference": interval(0.1),
            "interval_above_0": True,
            "met": True,
            "test": interval(0.05),
        },
        "retention": {
            "protocol": "p",
            "share": interval(0.944),
            "minimum": 0.9,
            "interval_above_minimum": True,
            "met": True,
            "test": interval(0.93),
        },
    }
    return {
        "fitted_under": "p",
        "protocols": {"p": section},
        "models": models,
        "gates": gates,
        "graded_teachers": None,
        "cohorts": [],
    }


def add_control(comparison, targets, value, verdict):
    comparison["models"].append(
        {"run": f"s_{targets}", "role": "control", "title": "", "targets": targets, "external": {}}
    )
    section = comparison["protocols"]["p"]
    section["models"][f"s_{targets}"] = {"macro": {"roc_auc": interval(0.85 - value)}}
    section["controls"][f"s_{targets}"] = judged(value, verdict)


def test_clear_differences_are_stated_with_their_intervals(comparison):
    text = statement(comparison)
    assert "Macro ROC-AUC is 0.800 [0.780, 0.820] for the CNN, 0.900 [0.880, 0.920] for the teacher (reads: fi" in text
    assert "The teacher is better than the CNN (0.100 [0.080, 0.120])." in text
    assert "The student is better than the CNN (0.050 [0.030, 0.070])." in text
    assert "The student is worse than the teacher (-0.050 [-0.070, -0.030])." in text
    assert "No control was compared" in text
    assert "not what another seed would have given" in text


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ("within noise", "The student is not distinguishable from the CNN (0.010 [-0.010, 0.030])."),
        ("worse", "The student is worse than the CNN (0.010 [-0.010, 0.030])."),
        ("no interval", "Whether student and CNN differ (0.010 [-0.010, 0.030]) cannot be told without an interval."),
    ],
)
def test_other_verdicts_on_the_student_have_their_own_words(comparison, verdict, sentence):
    comparison["protocols"]["p"]["differences"]["student_minus_cnn"] = difference(0.01, verdict)
    text = statement(comparison)
    assert sentence in text
    assert "The student is better than the CNN" not in text


def test_findings_that_survive_holm_are_named_with_their_direction():
    pair = difference(0.05, "better")
    assert findings_sentence(pair).endswith("Holm over 14, p < 0.05) the student differs from the CNN on none.")
    pair["per_label"]["Edema"]["p_holm"] = 0.049
    pair["per_label"]["Fracture"]["p_holm"] = 0.05
    pair["per_label"]["Lung Lesion"] = {"roc_auc": interval(-0.2), "p_value": math.nan, "p_holm": math.nan}
    assert findings_sentence(pair).endswith("Holm over 13, p < 0.05) the student is better than the CNN on Edema.")
    pair["per_label"]["Pneumonia"] = {"roc_auc": interval(-0.2), "p_value": 0.0, "p_holm": 0.001}
    assert findings_sentence(pair).endswith("is better than the CNN on Edema and worse on Pneumonia.")
    pair["per_label"]["Edema"]["p_holm"] = None
    assert findings_sentence(pair).endswith("Holm over 12, p < 0.05) the student is worse than the CNN on Pneumonia.")


def test_retention_is_told_beside_what_chance_keeps_and_why_a_quotient_lacks(comparison):
    kept = comparison["protocols"]["p"]["retention"]
    text = retention_sentence(kept)
    assert "keeps 0.944 [0.924, 0.964] of the teacher's macro ROC-AUC" in text
    assert "knows nothing would keep 0.556." in text
    assert text.endswith("it closes 0.500 [0.400, 0.600].")
    undefined = {**kept, "gap_closed": None, "gap_closed_undefined": "the teacher is not above the CNN"}
    assert retention_sentence(undefined).endswith("it closes is undefined: the teacher is not above the CNN.")


def elsewhere(verdict, studies=100):
    compared = {"macro": {"verdict": verdict}, "findings": ["Edema", "Fracture"]}
    return {"counts": {"studies": studies}, "against_own": compared}


def test_other_cohorts_are_told_by_verdict_with_the_command_that_lacks_and_what_saw_none(comparison):
    cnn, teacher, student = comparison["models"]
    assert external_sentences(comparison) == ["Never seen outside its own cohort: `cnn`, `teacher`, `student`."]
    comparison["cohorts"] = ["nih", "padchest"]
    cnn["external"] = {"nih": elsewhere("below"), "padchest": elsewhere("no interval")}
    student["external"] = {"nih": elsewhere("below")}
    words = {"run": "words", "role": "bag of words", "external": {"nih": elsewhere("above", 90)}}
    comparison["graded_teachers"] = {"models": [teacher, words]}
    nih, sizes, lacks, padchest, others_lack, unseen = external_sentences(comparison)
    assert nih == (
        "On `nih`, beside the run's own test split over the same findings, macro ROC-AUC is lower (the interval "
        "excludes the own figure) for `cnn`, `student`; higher (the interval excludes the own figure) for `words`."
    )
    assert sizes.endswith("100 studies and 2 findings for `cnn`, `student`; 90 studies and 2 findings for `words`.")
    assert lacks == (
        "Not scored on `nih`: `teacher`; `python -m mlx_cxr.evaluate_external --run teacher --config …` with the "
        "configuration named `nih` does it."
    )
    assert padchest.endswith("macro ROC-AUC is without an interval for `cnn`.")
    assert others_lack.startswith("Not scored on `padchest`: `teacher`, `student`, `words`; ")
    assert unseen == "Never seen outside its own cohort: `teacher`."


def test_gates_say_met_or_not_with_figure_and_minimum(comparison):
    beats, keeps = gate_lines(comparison)
    assert beats == (
        "met: the teacher beats the CNN (macro ROC-AUC on validation, which each was selected on, too; p): difference "
        "0.100 [0.080, 0.120]; the interval lies above 0; on test 0.050 [0.030, 0.070]"
    )
    assert keeps.startswith("met: the student keeps at least 0.90 of the teacher's")
    gates = comparison["gates"]
    gates["teacher_beats_cnn"] |= {"met": False, "interval_above_0": False, "difference": interval(-0.1)}
    gates["retention"] |= {"interval_above_minimum": False}
    beats, keeps = gate_lines(comparison)
    assert beats.startswith("not met: the teacher beats the CNN")
    assert beats.endswith("-0.100 [-0.120, -0.080]; the interval does not lie above 0; on test 0.050 [0.030, 0.070]")
    assert keeps.startswith("met: ")
    assert keeps.endswith("the interval does not lie above 0.90; on test 0.930 [0.910, 0.950]")
    gates["retention"]["share"] = {"value": 0.95, "low": math.nan, "high": math.nan}
    assert gate_lines(comparison)[1].endswith("0.950; there is no interval; on test 0.930 [0.910, 0.950]")


def test_controls_are_grouped_by_verdict_and_each_says_what_it_means(comparison):
    add_control(comparison, "shuffled", 0.08, "better")
    add_control(comparison, "hard", 0.01, "within noise")
    add_control(comparison, "smoothed", -0.05, "worse")
    expected = "better than shuffled (`s_shuffled`); not distinguishable from hard (`s_hard`); worse than smoothed (`s_"
    assert f"Of the controls, the student is {expected}smoothed`)." in statement(comparison)
    shuffled, hard, smoothed = control_verdicts(comparison)
    assert shuffled == ("shuffled", interval(0.08), "better: it matters that the answers belong to the study")
    assert hard[2] == "within noise: that the teacher's answers helped beyond the labels is not shown"
    assert smoothed[2] == "worse: that the teacher's answers do more than smoothing is not shown"


def test_a_verdict_that_rests_on_one_finding_says_so(comparison):
    add_control(comparison, "hard", 0.03, "better")
    entry = comparison["protocols"]["p"]["controls"]["s_hard"]
    assert support_sentence(entry) == "over 2 findings; least without Edema, 0.029 [0.009, 0.049]"
    entry["rests_on"] = ["Fracture"]
    expected = (
        "better: the teacher's answers helped beyond the labels; it rests on Fracture, without which it is within noise"
    )
    assert control_verdicts(comparison)[0][2] == expected
    entry["rests_on"] = ["Fracture", "Edema"]
    assert control_verdicts(comparison)[0][2].endswith(
        "rests on Fracture, Edema, without any one of which it is within noise"
    )
    difference = comparison["protocols"]["p"]["differences"]["student_minus_cnn"]
    difference["rests_on"] = ["Edema"]
    assert "better than the CNN (0.050 [0.030, 0.070]; it rests on Edema, without which" in statement(comparison)


def test_every_target_of_a_control_has_its_words():
    assert set(CONTROLS) == set(get_args(DistillationConfig.model_fields["targets"].annotation))


def test_a_teacher_that_reads_the_labels_source_is_warned_of(comparison):
    (findings,) = reading_warnings(comparison)
    assert findings.startswith("`teacher` (reads: findings): findings are written by someone who saw the film")
    whole = {"run": "t2", "role": "graded teacher", "reads": "whole report"}
    whole |= {"reads_label_source": True, "reads_findings": False}
    image = {"run": "t3", "role": "graded teacher", "reads": "film", "reads_label_source": False}
    graded = [copy.deepcopy(comparison["models"][1]), whole, image | {"reads_findings": False}]
    comparison["graded_teachers"] = {"models": graded}
    source, findings = reading_warnings(comparison)
    assert source.startswith("**`t2` (reads: whole report) may read what the labels were taken from.**")
    assert findings.startswith("`teacher` (reads: findings): ")
    assert "t3" not in source + findings
