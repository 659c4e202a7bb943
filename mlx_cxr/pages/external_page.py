"""`external.md`: a frozen run on another cohort, in words and tables, from `external_results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cxr.core.formatting import interval_text, notice_lines, number
from mlx_cxr.evaluation.feature_distance import MOST
from mlx_cxr.pages.map_checks import localization_section
from mlx_cxr.pages.tables import Column, columns_of, finding_table, markdown_table

CHANCE = 0.5
SIGNIFICANCE = 0.05
"""P-value of a distance below which films are said to differ."""
NEVER_SEEN = "Never seen outside its own cohort"
_VERDICTS = {
    "below": "lower: the interval here excludes the figure there",
    "above": "higher: the interval here excludes the figure there",
    "not told apart": "not told apart from it",
    "no interval": "without an interval, so nothing can be said",
}


def external_markdown(results: Mapping[str, Any], places: Mapping[str, Any] | None = None) -> str:
    """The page; `places` is the content of `localization.json`, if there is one."""
    compared, counts, shift = results["against_own"], results["counts"], results["shift"]
    calls = results["abstention"]["protocols"][compared["protocol"]]
    columns: list[Column] = columns_of(compared, {"positives": "positive", "negatives": "negative"})
    columns += columns_of(compared, {"external": "ROC-AUC here", "own": "on its own test split"})
    columns += [
        ("here it is", lambda finding: _entry(compared, finding)["verdict"]),
        ("share present, here / own", lambda finding: _prevalence(compared, finding)),
    ]
    lines = [
        f"# `{results['run']}` on `{results['cohort']}`",
        "",
        *notice_lines(results["synthetic"]),
        " ".join(statement(results)),
        "",
        f"{counts['studies']} studies of {counts['patients']} patients (split: {results['split']}); a study's score is "
        f"{results['score']}. Temperatures, thresholds and bands are the run's own; protocol "
        f"`{compared['protocol']}`. In brackets 95 % intervals from {results['bootstrap']['samples']} resamples of "
        f"patients. {_left_out(results)}",
        "",
        *finding_table(columns, f"**mean of {len(compared['findings'])}**", (1, 2), compared["findings"]),
        "## Calls",
        "",
        "What the conformal bands of the own validation split do here: the share of each class whose truth stays "
        "plausible, against the promise of "
        f"{1 - results['abstention']['alpha']:.0%} there.",
        "",
        *finding_table(
            columns_of(calls, {"positive_coverage": "coverage of positives", "negative_coverage": "of negatives"}),
            None,
            findings=compared["findings"],
        ),
    ]
    if shift is not None:
        rows = [
            [name, *(number(entry[key]) for key in ("external", "own", "difference"))]
            for name, entry in shift["per_statistic"].items()
        ]
        lines += [
            "## How the films differ",
            "",
            "Figures of films as wholes, none of which shows a finding; the difference is in standard deviations of "
            "the own cohort.",
            "",
            *markdown_table(["statistic", "here", "own", "difference"], rows, right=(1, 2, 3)),
            "The distance in the features of the run's own network from the films of its own test split: the kernel "
            "distance (KID, arXiv:1801.01401), which for films of one kind is 0 on average, below it as often as "
            f"above. One film of each patient, drawn with the seed, and {MOST} patients where there are more; p: the "
            "share of permutations of the patients that are as far apart. Distances of different runs are not "
            "comparable.",
            "",
            *_distances(shift["features"]),
        ]
    if places is not None:
        lines += ["", *localization_section(places)]
    return "\n".join(lines).rstrip() + "\n"


def statement(results: Mapping[str, Any]) -> list[str]:
    """Sentences that the figures support."""
    compared, shift = results["against_own"], results["shift"]
    macro, findings = compared["macro"], len(compared["findings"])
    sentences = [
        f"Over the {findings} findings that both cohorts have, mean ROC-AUC is {interval_text(macro['external'])} here "
        f"and {interval_text(macro['own'])} on the run's own test split: {_VERDICTS[macro['verdict']]}."
    ]
    low = macro["external"]["low"]
    if low is not None and low <= CHANCE:
        sentences.append("**That it ranks better than chance here is not shown.**")
    lower = [label for label in compared["findings"] if compared["per_label"][label]["verdict"] == "below"]
    if lower:
        sentences.append(f"Its own figures do not hold here for {', '.join(lower)}.")
    if (exposure := results["exposure_only"]) is not None:
        sentences.append(
            f"On its own test split a regression that sees nothing but exposure, format, view, age and sex has a mean "
            f"ROC-AUC of {interval_text(exposure['macro']['roc_auc'])}: that much may stay behind."
        )
    if shift is not None and number(shift["told_apart"]) != "–":
        sentences.append(
            f"The films of the two cohorts can be told apart by exposure and format alone with a ROC-AUC of "
            f"{number(shift['told_apart'])}, where {CHANCE} would be films of one kind."
        )
    if shift is not None and number(shift["features"]["external"]["p_value"]) != "–":
        here, own = (shift["features"][key] for key in ("external", "own"))
        differ = here["p_value"] < SIGNIFICANCE
        sentences.append(
            f"In the features of its own network the films {'differ' if differ else 'are not shown to differ'}: "
            f"{_distance(here)} from the films of its own test split, where those of its own validation split are "
            f"{_distance(own)} from them."
        )
    return sentences


def _distances(features: Mapping[str, Any]) -> list[str]:
    rows = [
        [title, _kid(features[key]), number(features[key]["p_value"]), str(features[key]["patients"][0])]
        for key, title in (("external", "here"), ("own", "own validation split"))
    ]
    return markdown_table(["films", "distance", "p", "patients"], rows, right=(1, 2, 3))


def _distance(entry: Mapping[str, Any]) -> str:
    return f"{_kid(entry)} (KID, p {number(entry['p_value'])})"


def _kid(entry: Mapping[str, Any]) -> str:
    """Three digits, as the size of it depends on the network."""
    return "–" if number(entry["value"]) == "–" else f"{entry['value']:.3g}"


def _left_out(results: Mapping[str, Any]) -> str:
    counts, objections = results["counts"], results["objections"]
    if counts["shared_patients"] is None:
        said = "Whether patients are also in the run's own cohort could not be checked, as its manifest is gone."
    elif counts["shared_patients"]:
        said = f"Left out: {counts['shared_patients']} patients whose ids the run's own cohort has too."
    else:
        said = "No patient id is also in the run's own cohort."
    if objections:
        said += f" The gate objects to {objections} of the films, which are scored all the same."
    return said


def _entry(compared: Mapping[str, Any], finding: str | None) -> Mapping[str, Any]:
    return compared["macro"] if finding is None else compared["per_label"][finding]


def _prevalence(compared: Mapping[str, Any], finding: str | None) -> str:
    if finding is None:
        return ""
    entry = compared["per_label"][finding]
    return f"{entry['external_prevalence']:.1%} / {entry['own_prevalence']:.1%}"
