"""`summary.md` of a failure analysis: `failures.json` and the worst errors as a page that reads well on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_cxr.core.formatting import escaped, interval_text, notice_lines, number
from mlx_cxr.core.labels import LABELS, label_word
from mlx_cxr.evaluation.confusions import MIN_COUNT
from mlx_cxr.evaluation.failures import BEDSIDE, DEVICES, NOISE, OTHER, RARE, UNCERTAIN, UNMENTIONED
from mlx_cxr.evaluation.results import MEANINGS
from mlx_cxr.evaluation.subgroups import FEW_POSITIVES, MIN_PATIENTS
from mlx_cxr.pages.failure_advice import gap_sentence, next_steps
from mlx_cxr.pages.tables import columns_of, finding_table, markdown_table

TITLES = {"student": "student", "cnn": "CNN", "teacher": "teacher"}
PAIRS_SHOWN = 5
_COUNTS = {
    "positives": "present",
    "false_negatives": "missed (false negatives)",
    "negatives": "absent",
    "false_positives": "called (false positives)",
}


@dataclass(frozen=True)
class Shown:
    """An error of the gallery.

    Attributes:
        row: of `failures.csv`, column to value.
        picture: path relative to the page.
        report: the sentences that name the finding; "" where the report has none, None where there is no report.
    """

    row: Mapping[str, Any]
    picture: str
    report: str | None


def failure_markdown(results: Mapping[str, Any], shown: Sequence[Shown], most_of_a_finding: int, picture: str) -> str:
    """The page.

    Args:
        results: as `failure_results.analyse` gives them, with `relabel`.
        shown: the worst errors, in their order.
        most_of_a_finding: errors of one finding that the gallery takes.
        picture: of the confusions, relative to the page.
    """
    if largest := results["gaps"]["largest"]:
        largest = {**largest, "group": escaped(largest["group"])}
        results = {**results, "gaps": {**results["gaps"], "largest": largest}}
    lines = [
        f"# Failure analysis of `{results['run']}`",
        "",
        *notice_lines(results["synthetic"]),
        *_failures(results),
        *_gallery(results, shown, most_of_a_finding),
        *_categories(results),
        *_drawing(results),
        *_subgroups(results),
        *_confusions(results, picture),
        "## What to look at next",
        "",
        *(f"- {step}" for step in next_steps(results)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def category_rules(results: Mapping[str, Any]) -> dict[str, str]:
    """Category to its rule in words, in the order in which they are looked at."""
    settings = results["settings"]
    rare = ", ".join(settings["rare"]) or "none"
    rules = {
        NOISE: "the teacher's call is against the label, and its probability has gone at least "
        f"{settings['teacher_margin']:g} of the way from its threshold to the other end of the scale",
        UNCERTAIN: "the label is -1, which counts as absent here",
        UNMENTIONED: "the label is empty, which counts as absent here",
        RARE: f"fewer than {100 * settings['rare_share']:g} % of the training studies have the finding ({rare})",
        BEDSIDE: "the study's frontal films are AP only",
        DEVICES: "the study's label of Support Devices is 1 (and the finding is another)",
        OTHER: "none of these",
    }
    return {name: rules[name] for name in results["categories"]}


def _failures(results: Mapping[str, Any]) -> list[str]:
    counts, boot = results["counts"], results["bootstrap"]
    errors = counts["false_positives"] + counts["false_negatives"]
    intervals = (
        f"Intervals (95 %) are from {boot['samples']} resamples of patients. "
        if boot["samples"]
        else "No resamples were asked for, so there are no intervals. "
    )
    left_out = ", ".join(counts["without_threshold"])
    left_out = f" Left out, as validation could choose no threshold: {left_out}." if left_out else ""

    def share(finding: str, part: str, whole: str) -> str:
        entry = results["per_label"][finding]
        return f"{100 * entry[part] / entry[whole]:.0f} %" if entry[whole] else "–"

    columns = [
        *columns_of(results, _COUNTS),
        ("share missed", lambda finding: share(finding, "false_negatives", "positives")),
        ("share called", lambda finding: share(finding, "false_positives", "negatives")),
    ]
    return [
        "## What counts as a failure",
        "",
        f"{counts['studies']} test studies of {counts['patients']} patients. A failure is a finding of a study whose "
        "call differs from the report's label: the calibrated probability is at or above the threshold and the label "
        "says absent (false positive), or below it and the label says present (false negative). Thresholds (rule: "
        f"{results['threshold_rule']}) and temperatures were fitted on validation under `{results['fitted_under']}`. "
        f"Labels are taken under `{results['protocol']}`: {MEANINGS[results['protocol']]}. So a failure is a "
        f"disagreement with a label, and the label may be the one that is wrong.{left_out}",
        "",
        "Confidence of a call is the share of the way from the threshold to the end of the scale that its probability "
        f"has gone: 0 at the threshold, 1 at a probability of 0 or 1. {intervals}{_models(results)}",
        "",
        f"**{errors} of {counts['pairs']} calls are failures**: {counts['false_negatives']} false negatives among "
        f"{counts['positives']} labels that say present, {counts['false_positives']} false positives among "
        f"{counts['negatives']} that say absent. Failures are those of the threshold; on "
        f"{counts['abstained_failures']} of them the model abstains, so that its call would not have been shown.",
        "",
        *finding_table(columns, None, right=range(1, 7), findings=_judged(results)),
        "All of them, with probabilities, categories and what is known of the study, are in `failures.csv`.",
        "",
    ]


def _models(results: Mapping[str, Any]) -> str:
    parts = []
    studies = results["counts"]["studies"]
    for name, about in results["models"].items():
        if about is None:
            parts.append(f"No {TITLES[name]} was given, so its probabilities are left out.")
            continue
        reads = f", which reads: {about['reads']}" if name == "teacher" else ""
        some = f" It has no answer for {studies - about['scored']} of the studies." if about["scored"] < studies else ""
        parts.append(f"The {TITLES[name]} is `{about['run']}`{reads}.{some}")
    teacher = results["models"]["teacher"]
    if teacher is None:
        parts.append(f"Without a teacher nothing is sorted under '{NOISE}'.")
    elif teacher["reads_label_source"]:
        parts.append("It may read the section that the labels were taken from, so it seldom goes against a wrong one.")
    return " ".join(parts)


def _gallery(results: Mapping[str, Any], shown: Sequence[Shown], most: int) -> list[str]:
    lines = ["## The worst errors", ""]
    if not shown:
        return [*lines, "None is shown.", ""]
    lines += [
        f"{len(shown)} errors, chosen by rule: false positives and false negatives in turn, each time the one of "
        f"highest confidence that is left, at most one of a study and {most} of a finding. They are the extremes, not "
        "a sample to estimate from. The map shows which cells raise the finding's score, on the scale of its reference "
        "activation on validation; below the threshold it shows what little there was. The report's sentences are "
        "found by the finding's words, stated or denied; they are for the reader: nothing is trained on them.",
        "",
    ]
    for place, error in enumerate(shown, start=1):
        lines += _case(place, error, results)
    return lines


def _case(place: int, error: Shown, results: Mapping[str, Any]) -> list[str]:
    row = error.row
    known = [f"view {escaped(row['view'])}"]
    known += [f"sex {escaped(row['sex'])}"] if row["sex"] else []
    known += [f"age {row['age']:g}"] if not np.isnan(row["age"]) else []
    probabilities = [("student", row["probability"], row["threshold"])]
    probabilities += [
        (TITLES[name], row[f"{name}_probability"], row[f"{name}_threshold"])
        for name in ("cnn", "teacher")
        if results["models"][name] is not None
    ]
    models = (f"{name} p (threshold)" for name, _, _ in probabilities)
    header = ["label", *models, "student abstains", "confidence", "category"]
    cells = [
        label_word(row["raw_label"]),
        *(f"{number(p)} ({number(t)})" for _, p, t in probabilities),
        row["abstention"] or "no",
        number(row["confidence"], 2),
        row["category"],
    ]
    if "drawn" in row:
        header.append("shows in the film, by the drawing")
        cells.append("yes" if row["drawn"] else "no")
    said = {None: "There is no report.", "": "The report does not name it."}.get(error.report)
    quote = said or "> " + escaped(error.report)
    return [
        f"### {place}. {row['label']}: {row['error']}",
        "",
        f"Study {escaped(row['study_id'])}, {', '.join(known)}.",
        "",
        f"![{row['label']}, {row['error']}]({error.picture})",
        "",
        quote,
        "",
        *markdown_table(header, [cells]),
    ]


def _categories(results: Mapping[str, Any]) -> list[str]:
    categories, rules = results["categories"], category_rules(results)
    lines = [
        "## Kinds of error",
        "",
        "Each error is in one category: the first in this order whose rule holds.",
        "",
        *markdown_table(["category", "rule"], [[name, rule] for name, rule in rules.items()]),
        "A category may hold many errors only because it holds many studies. So each is also taken of all scored pairs "
        "of study and finding, right or wrong; a ratio is the error rate in the category over that of all. Above 1 "
        "with an interval that excludes 1, errors gather there. Of false positives the pairs are those with the label "
        "absent, of false negatives those with it present.",
        "",
        *_rate_table(categories),
        "The same for each condition wherever it holds, whatever came first:",
        "",
        *_rate_table(results["conditions"]),
        "Errors by finding and category:",
        "",
    ]
    totals = {name: entry["false_positives"] + entry["false_negatives"] for name, entry in categories.items()}

    def errors(finding: str | None) -> Mapping[str, int]:
        return results["per_label"][finding]["categories"] if finding else totals

    columns = [(name, lambda finding, name=name: str(errors(finding)[name])) for name in categories]
    columns.append(("all", lambda finding: str(sum(errors(finding).values()))))
    return lines + finding_table(columns, "**all**", range(1, len(categories) + 2), _judged(results))


def _rate_table(rates: Mapping[str, Any]) -> list[str]:
    header = ["", "false positives", "false negatives", "share of errors", "share of pairs", "ratio"]
    shares = ("share_of_errors", "share_of_pairs")
    rows = [
        [
            name,
            *(str(entry[key]) for key in ("false_positives", "false_negatives")),
            *("–" if np.isnan(share) else f"{100 * share:.0f} %" for share in (entry[key] for key in shares)),
            *(interval_text(entry[key], 2) for key in ("ratio", "fp_ratio", "fn_ratio")),
        ]
        for name, entry in rates.items()
    ]
    return markdown_table([*header, "ratio, false positives", "ratio, false negatives"], rows, right=range(1, 5))


def _drawing(results: Mapping[str, Any]) -> list[str]:
    check = results["drawing"]
    if check is None:
        return []
    entries = check["categories"]
    rows = [
        [name, str(entry["errors"]), str(entry["wrong_labels"]), interval_text(entry["share"], 2)]
        for name, entry in entries.items()
    ]
    lines = [
        "## Is it the label that is wrong?",
        "",
        "Only a synthetic cohort can tell: a program drew the films, and its masks say what shows in them. A label is "
        "wrong here where it says present and nothing of the finding shows in the study's films, or absent (uncertain "
        "and not mentioned included) and it does. No Finding is right where nothing but devices shows.",
        "",
        *markdown_table(["errors in", "errors", "with a wrong label", "share"], rows, right=(1, 2)),
    ]
    if check["caught"] is not None:
        positive, negative = check["false_positives"], check["false_negatives"]
        lines += [
            f"**'{NOISE}' is right for {interval_text(entries[NOISE]['share'], 2)} of its errors** "
            f"({entries[NOISE]['wrong_labels']} of {entries[NOISE]['errors']}; false positives "
            f"{positive['wrong_labels']} of {positive['errors']}, false negatives {negative['wrong_labels']} of "
            f"{negative['errors']}), against {interval_text(entries['all errors']['share'], 2)} of all errors and "
            f"{interval_text(entries['all pairs']['share'], 2)} of all pairs. It holds "
            f"{interval_text(check['caught'], 2)} of the errors whose label is wrong.",
            "",
        ]
    return lines


def _subgroups(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Subgroups",
        "",
        f"Means over the findings that have at least {MIN_PATIENTS} patients with and {MIN_PATIENTS} without them in "
        "the group; the others are left out of that row. The gap is the group's false-negative rate minus that of all "
        "studies over the same findings: above 0, more is missed in the group. Rows differ in their findings, so "
        f"compare gaps, not means. \\* marks fewer than {FEW_POSITIVES} positive labels. The manifest has no site or "
        "scanner.",
        "",
    ]
    for attribute, table in results["subgroups"].items():
        lines += [f"### By {attribute}", ""]
        if not table:
            lines += ["All studies are of one group.", ""]
            continue
        rows = [
            [
                escaped(name) + ("\\*" if entry["small"] else ""),
                f"{entry['studies']} ({entry['patients']})",
                str(entry["positives"]),
                str(len(entry["labels"])),
                *(interval_text(entry[key]) for key in ("roc_auc", "sensitivity", "specificity", "fnr_gap")),
            ]
            for name, entry in table.items()
        ]
        header = ["group", "studies (patients)", "positive labels", "findings"]
        header += ["ROC-AUC", "sensitivity", "specificity", "false-negative gap"]
        lines += markdown_table(header, rows, right=(1, 2, 3))
        left_out = [f"{escaped(name)}: {_left_out(entry)}" for name, entry in table.items() if entry["left_out"]]
        lines += [f"Left out for too few patients. {'; '.join(left_out)}.", ""] if left_out else []
    return [*lines, gap_sentence(results["gaps"]), ""]


def _left_out(entry: Mapping[str, Any]) -> str:
    """The findings left out of a group's means, or those kept where these are fewer."""
    kept, left_out = entry["labels"], entry["left_out"]
    if len(left_out) <= len(kept):
        return ", ".join(left_out)
    return f"all but {', '.join(kept)}" if kept else "all"


def _confusions(results: Mapping[str, Any], picture: str) -> list[str]:
    pairs = results["confused_pairs"]
    lines = [
        "## Confusion between findings",
        "",
        "Among the false positives of a finding, how often each other finding is labelled present, over how often it "
        "is among all studies without the first (lift). Above 1, the model may take the one for the other, or the two "
        "go together and the report names one; and as sick patients have more of everything, many lifts are above 1. "
        f"From {MIN_COUNT} false positives on.",
        "",
        f"![Confusion between findings]({picture})",
        "",
    ]
    if not pairs:
        none = f"No pair of at least {MIN_COUNT} has an interval above 1, of {results['lifts']} looked at."
        return [*lines, none, ""]
    lines += [
        f"Of {results['lifts']} pairs {len(pairs)} come together at least {MIN_COUNT} times and have an interval above "
        f"1 (about {0.025 * results['lifts']:.1f} would by chance alone). The highest:",
        "",
    ]
    for pair in pairs[:PAIRS_SHOWN]:
        total = results["confusions"][pair["called"]]["false_positives"]
        lines.append(
            f"- {pair['called']} called wrongly: {pair['present']} is present in {pair['count']} of {total}, "
            f"{interval_text(pair, 1)} times as often as in all studies without {pair['called']}."
        )
    return [*lines, ""]


def _judged(results: Mapping[str, Any]) -> list[str]:
    """The findings that have a threshold."""
    return [label for label in LABELS if label not in results["counts"]["without_threshold"]]
