"""Next steps after a failure analysis: sentences chosen by rule from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cxr.core.formatting import footer, interval_text
from mlx_cxr.evaluation.failures import BEDSIDE, DEVICES, NOISE, OTHER, RARE, UNCERTAIN, UNMENTIONED

MIN_POSITIVES = 5
"""Positives from which a finding's share missed is spoken of."""

ADVICE: Mapping[str, str] = {
    NOISE: "Have the films read anew before the model is changed: `relabel.csv`.",
    UNCERTAIN: "Try another `labels.uncertain` for training, and read the results under `empty_masked` beside these.",
    UNMENTIONED: "The report is silent there: read the results under `empty_masked` beside these.",
    RARE: "Bring in more training studies that have them, or set `training.class_weighting`.",
    BEDSIDE: "See the table by view, and the ROC-AUC within views in the student's `results.md`.",
    DEVICES: "See in the maps whether the device is taken for the finding.",
    OTHER: "No rule explains them: look at the films.",
}
"""Category to what follows from errors that gather in it."""


def gap_sentence(gaps: Mapping[str, Any]) -> str:
    """The largest gap that can be told from noise, or that there is none, and how many were looked at."""
    looked, largest = gaps["looked_at"], gaps["largest"]
    if not looked:
        return "No gap has an interval, so none can be told from noise."
    by_chance = f"Of {looked} gaps about {0.05 * looked:.1f} would have an interval that excludes 0 by chance alone."
    if largest is None:
        return f"**No gap has an interval that excludes 0.** {by_chance}"
    more = "more" if largest["value"] > 0 else "less"
    return (
        f"**The largest gap whose interval excludes 0 is that of {largest['attribute']} {largest['group']}: "
        f"{interval_text(largest)}, so {more} is missed there.** {gaps['apart']} of {looked} gaps have such an "
        f"interval. {by_chance}"
    )


def closing_failures(results: Mapping[str, Any]) -> str:
    """The main points of `failures.json` as plain text for a terminal, with the notice."""
    counts = results["counts"]
    errors = counts["false_positives"] + counts["false_negatives"]
    lines = [
        f"Failures of {results['run']} on test: {errors} of {counts['pairs']} calls ({counts['false_negatives']} false "
        f"negatives, {counts['false_positives']} false positives).",
        *(f"- {step}" for step in next_steps(results)),
        f"- {gap_sentence(results['gaps']).replace('**', '')}",
        footer(results["synthetic"]),
    ]
    return "\n".join(lines)


def next_steps(results: Mapping[str, Any]) -> list[str]:
    """Sentences, each by a rule of its own on `failures.json`; with no errors, that there are none."""
    counts = results["counts"]
    errors = counts["false_positives"] + counts["false_negatives"]
    if not errors:
        return ["There are no errors. On a test split of some size that is a reason to look for a leak."]
    steps = [*_categories(results, errors), *_findings(results)]
    gap = results["gaps"]["largest"]
    if gap is not None and gap["value"] > 0:
        steps.append(
            f"More is missed in {gap['attribute']} {gap['group']} ({interval_text(gap)}): see whether training has "
            "enough of these studies, and whether their films differ."
        )
    if results["confused_pairs"]:
        pair = results["confused_pairs"][0]
        steps.append(f"Look at the films in which {pair['called']} is called and {pair['present']} is there instead.")
    items = results["relabel"]["items"]
    if items:
        steps.append(
            f"Fill in `relabel.csv` ({items} questions, half of them about right calls, in random order), and open "
            "`relabel_key.csv` only then."
        )
    return steps


def _categories(results: Mapping[str, Any], errors: int) -> list[str]:
    categories = results["categories"]
    totals = {name: entry["false_positives"] + entry["false_negatives"] for name, entry in categories.items()}
    largest = max(totals, key=totals.__getitem__)
    steps = [f"The largest category is '{largest}' with {totals[largest]} of {errors} errors. {ADVICE[largest]}"]
    gathered = False
    for name, entry in categories.items():
        above = {
            kind: entry[key]
            for kind, key in (("false positives", "fp_ratio"), ("false negatives", "fn_ratio"))
            if entry[key]["low"] is not None and entry[key]["low"] > 1
        }
        if above:
            gathered = True
            said = " and ".join(f"{kind} (ratio {interval_text(ratio, 2)})" for kind, ratio in above.items())
            advice = f" {ADVICE[name]}" if name != largest else ""
            steps.append(f"'{name}' is over-represented among {said}.{advice}")
    if not gathered:
        steps.append("No category is over-represented beyond noise: no single cause stands out.")
    return steps


def _findings(results: Mapping[str, Any]) -> list[str]:
    left_out = results["counts"]["without_threshold"]
    entries = {
        label: entry
        for label, entry in results["per_label"].items()
        if label not in left_out and entry["positives"] >= MIN_POSITIVES
    }
    steps = []
    if entries:
        label = max(entries, key=lambda name: entries[name]["false_negatives"] / entries[name]["positives"])
        missed, positives = entries[label]["false_negatives"], entries[label]["positives"]
        if missed:
            steps.append(
                f"{label} is missed most, in {missed} of {positives} studies with it (of the findings with at least "
                f"{MIN_POSITIVES})."
            )
    called = {label: entry["false_positives"] for label, entry in results["per_label"].items()}
    label = max(called, key=called.__getitem__)
    if called[label]:
        steps.append(f"{label} has the most false positives, {called[label]}.")
    return steps
