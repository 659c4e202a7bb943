"""Conclusions that the figures of a comparison support: sentences chosen by rule from `final_comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cxr.core.formatting import interval_text, number
from mlx_cxr.evaluation.external import evaluate_command
from mlx_cxr.pages.external_page import NEVER_SEEN

SIGNIFICANCE = 0.05

CONTROLS: Mapping[str, tuple[str, str, str]] = {
    "hard": (
        "the labels alone",
        "the teacher's answers helped beyond the labels",
        "that the teacher's answers helped beyond the labels is not shown",
    ),
    "words": (
        "the answers of a bag of words",
        "the language model taught more than counted words would have",
        "that the language model taught more than counted words is not shown",
    ),
    "smoothed": (
        "labels smoothed as strongly as the teacher softens them",
        "the teacher's answers do more than smoothing",
        "that the teacher's answers do more than smoothing is not shown",
    ),
    "shuffled": (
        "the teacher's answers to other studies",
        "it matters that the answers belong to the study",
        "that it matters whose study the answers belong to is not shown",
    ),
    "teacher": (
        "the teacher's answers, with other settings",
        "the student's settings are better",
        "that the student's settings are better is not shown",
    ),
}
"""Source that a control learned from in the teacher's place, and the meaning of a better student, and of another."""


_ELSEWHERE = {
    "below": "lower (the interval excludes the own figure)",
    "above": "higher (the interval excludes the own figure)",
    "not told apart": "not told apart from the own figure",
    "no interval": "without an interval",
}


def statement(comparison: Mapping[str, Any]) -> str:
    """One paragraph: which differences can be told from noise, what the student keeps, and what the controls say."""
    section = comparison["protocols"][comparison["fitted_under"]]
    differences, kept = section["differences"], section["retention"]
    reads = next(model["reads"] for model in comparison["models"] if model["role"] == "teacher")
    aucs = {m["role"]: section["models"][m["run"]]["macro"]["roc_auc"] for m in comparison["models"]}
    sentences = [
        f"Macro ROC-AUC is {interval_text(aucs['cnn'])} for the CNN, {interval_text(aucs['teacher'])} for the "
        f"teacher (reads: {reads}), and {interval_text(aucs['student'])} for the student.",
        *words_sentences(comparison),
        _pair("teacher", "CNN", differences["teacher_minus_cnn"]),
        _pair("student", "CNN", differences["student_minus_cnn"]),
        _pair("student", "teacher", differences["student_minus_teacher"]),
        findings_sentence(differences["student_minus_cnn"]),
        retention_sentence(kept),
        _controls_sentence(comparison, section),
        *external_sentences(comparison),
        "Each model is one training run: the intervals cover which patients were tested, and not what another seed "
        "would have given.",
    ]
    return " ".join(sentences)


def words_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """The worth of the language model beside the word counts that read the same text."""
    models = (comparison["graded_teachers"] or {"models": []})["models"]
    sentences = []
    for words in models:
        if words["role"] != "bag of words":
            continue
        minus = words["minus_teacher"]
        verdicts = {
            "better": "counting words is better than the language model, which is not worth its size here",
            "worse": "the language model is worth more than counting words",
            "within noise": "that the language model is worth more than counting words is not shown",
            "no interval": "whether the language model is worth more cannot be told without an interval",
        }
        sentences.append(
            f"A bag of words that reads {words['reads']} has {interval_text(words['macro']['roc_auc'])}, minus the "
            f"teacher {interval_text(minus)}: {verdicts[minus['verdict']]}."
        )
    return sentences


def external_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """The models on other cohorts beside their own, the commands that lack, and the models that saw no other cohort."""
    graded = (comparison["graded_teachers"] or {"models": []})["models"]
    models = {model["run"]: model["external"] for model in (*comparison["models"], *graded)}
    sentences = []
    for cohort in comparison["cohorts"]:
        there = {run: external[cohort] for run, external in models.items() if cohort in external}
        verdicts = {run: _ELSEWHERE[entry["against_own"]["macro"]["verdict"]] for run, entry in there.items()}
        sentences.append(
            f"On `{cohort}`, beside the run's own test split over the same findings, macro ROC-AUC is "
            f"{_grouped(verdicts)}."
        )
        sizes = {
            run: f"{entry['counts']['studies']} studies and {len(entry['against_own']['findings'])} findings"
            for run, entry in there.items()
        }
        if len(set(sizes.values())) > 1:
            sentences.append(f"Its figures are not of the same studies and findings: {_grouped(sizes)}.")
        if lacking := [run for run in models if run not in there]:
            named = ", ".join(f"`{run}`" for run in lacking)
            sentences.append(f"Not scored on `{cohort}`: {named}; {evaluate_command(lacking[0], cohort)} does it.")
    if unseen := [f"`{run}`" for run, external in models.items() if not external]:
        sentences.append(f"{NEVER_SEEN}: {', '.join(unseen)}.")
    return sentences


def _grouped(said: Mapping[str, str]) -> str:
    """What is said of runs, each once and with the runs that it is said of."""
    of: dict[str, list[str]] = {}
    for run, text in said.items():
        of.setdefault(text, []).append(f"`{run}`")
    return "; ".join(f"{text} for {', '.join(runs)}" for text, runs in of.items())


def findings_sentence(difference: Mapping[str, Any]) -> str:
    """On which findings student and CNN differ once Holm's correction is made."""
    per_label = difference["per_label"]
    tested = [label for label, entry in per_label.items() if number(entry["p_holm"]) != "–"]
    apart = [label for label in tested if per_label[label]["p_holm"] < SIGNIFICANCE]
    ahead = [label for label in apart if per_label[label]["roc_auc"]["value"] > 0]
    behind = [label for label in apart if label not in ahead]
    lead = f"By finding (DeLong by patient, Holm over {len(tested)}, p < {SIGNIFICANCE}) the student "
    parts = [f"is better than the CNN on {', '.join(ahead)}"] if ahead else []
    if behind:
        parts.append(f"{'worse' if ahead else 'is worse than the CNN'} on {', '.join(behind)}")
    return lead + (" and ".join(parts) or "differs from the CNN on none") + "."


def retention_sentence(kept: Mapping[str, Any]) -> str:
    """Student over teacher beside what chance keeps, and the share of the gap that is closed, or why there is none."""
    closed = (
        f"Of the gap between CNN and teacher it closes {interval_text(kept['gap_closed'])}."
        if kept["gap_closed"]
        else f"What share of the gap between CNN and teacher it closes is undefined: {kept['gap_closed_undefined']}."
    )
    return (
        f"The student keeps {interval_text(kept['share'])} of the teacher's macro ROC-AUC, where a model that knows "
        f"nothing would keep {number(kept['chance_share'])}. {closed}"
    )


def gate_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Each gate with its figures on validation, which decide, and on test: `met: …` or `not met: …`."""
    beats, keeps = comparison["gates"]["teacher_beats_cnn"], comparison["gates"]["retention"]
    where = f"macro ROC-AUC on validation, which each was selected on, too; {beats['protocol']}"
    least = f"{keeps['minimum']:.2f}"
    return [
        f"{_met(beats)}: the teacher beats the CNN ({where}): difference {interval_text(beats['difference'])}; "
        f"{_reach(beats['difference'], beats['interval_above_0'], '0')}; on test {interval_text(beats['test'])}",
        f"{_met(keeps)}: the student keeps at least {least} of the teacher's ({where}): "
        f"{interval_text(keeps['share'])}; {_reach(keeps['share'], keeps['interval_above_minimum'], least)}; "
        f"on test {interval_text(keeps['test'])}",
    ]


def control_verdicts(comparison: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Per control its targets, the student minus it (macro ROC-AUC, `judged`), and what that says."""
    section = comparison["protocols"][comparison["fitted_under"]]
    targets = {model["run"]: model["targets"] for model in comparison["models"] if model["role"] == "control"}
    verdicts = []
    for run, entry in section["controls"].items():
        _, better, otherwise = CONTROLS[targets[run]]
        meaning = better if entry["verdict"] == "better" else otherwise
        said = f"{entry['verdict']}: {meaning}{_resting(entry)}"
        verdicts.append((targets[run], entry["judged"], said))
    return verdicts


def support_sentence(entry: Mapping[str, Any]) -> str:
    """The findings that a verdict is over, and what is left of the difference without any one of them."""
    without = {label: one for label, one in entry["without_each"].items() if number(one["low"]) != "–"}
    if not without:
        return ""
    label = min(without, key=lambda name: without[name]["value"])
    return (
        f"over {len(entry['judged_labels'])} findings; least without {label}, {interval_text(without[label])}"
        + _resting(entry)
    )


def _resting(entry: Mapping[str, Any]) -> str:
    if not (findings := entry["rests_on"]):
        return ""
    any_one = "which" if len(findings) == 1 else "any one of which"
    return f"; it rests on {', '.join(findings)}, without {any_one} it is within noise"


def reading_warnings(comparison: Mapping[str, Any]) -> list[str]:
    """Warnings about teachers that read the report, one sentence per kind of teacher."""
    graded = comparison["graded_teachers"]
    teachers = [model for model in comparison["models"] if model["role"] == "teacher"]
    teachers += [model for model in graded["models"] if model["role"] != "teacher"] if graded else []
    lines = []
    if copies := [f"`{model['run']}` (reads: {model['reads']})" for model in teachers if model["reads_label_source"]]:
        lines.append(
            f"**{', '.join(copies)} may read what the labels were taken from.** Labels of MIMIC-CXR, and of the "
            "synthetic cohort, were extracted by a program from the report's impression, else its findings, else its "
            "last section. Such a teacher learns the program: its figures are no measure of reading films, and it "
            "cannot be used where there is no report yet."
        )
    if others := [f"`{model['run']}` (reads: {model['reads']})" for model in teachers if model["reads_findings"]]:
        lines.append(
            f"{', '.join(others)}: findings are written by someone who saw the film, and where a report has no "
            "impression the labels were taken from them. The figures say how much of the labels the text holds, not "
            "how well a film can be read."
        )
    return lines


def _pair(first: str, second: str, difference: Mapping[str, Any]) -> str:
    text = f"({interval_text(difference['judged'])}{_resting(difference)})"
    return {
        "better": f"The {first} is better than the {second} {text}.",
        "worse": f"The {first} is worse than the {second} {text}.",
        "within noise": f"The {first} is not distinguishable from the {second} {text}.",
        "no interval": f"Whether {first} and {second} differ {text} cannot be told without an interval.",
    }[difference["verdict"]]


def _controls_sentence(comparison: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    targets = {model["run"]: model.get("targets") for model in comparison["models"]}
    of: dict[str, list[str]] = {}
    for run, entry in section["controls"].items():
        of.setdefault(entry["verdict"], []).append(f"{targets[run]} (`{run}`)")
    if not of:
        return (
            "No control was compared, so what the teacher's answers did cannot be told from what any second term in "
            "the loss would have done."
        )
    words = {
        "better": "better than",
        "worse": "worse than",
        "within noise": "not distinguishable from",
        "no interval": "without an interval of its difference from",
    }
    parts = [f"{words[verdict]} {', '.join(names)}" for verdict, names in of.items()]
    return f"Of the controls, the student is {'; '.join(parts)}."


def _reach(interval: Mapping[str, Any], above: bool, bound: str) -> str:
    if number(interval["low"]) == "–":
        return "there is no interval"
    return f"the interval {'lies' if above else 'does not lie'} above {bound}"


def _met(gate: Mapping[str, Any]) -> str:
    return "met" if gate["met"] else "not met"
