"""`results.md`: `test_results.json` as tables for people, each with its protocol, and the plots beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cxr.core.files import write_text
from mlx_cxr.core.formatting import footer, interval_text, notice_lines, number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.pages import plots
from mlx_cxr.pages.comparison_tables import intervals_line
from mlx_cxr.pages.tables import (
    Column,
    calibration_column,
    columns_of,
    entry_of,
    finding_table,
    markdown_table,
    mean_head,
)

log = logging.getLogger("mlx_cxr")

_COUNTS = {"positives": "positive", "negatives": "negative", "left_out": "left out"}
_RANKING = {"roc_auc": "ROC-AUC", "average_precision": "average precision"}
_CALLS = {"sensitivity": "sensitivity", "specificity": "specificity", "precision": "precision", "f1": "F1"}
_ABSTENTION = {
    "called": "called",
    "called_positives": "positives called",
    "called_negatives": "negatives called",
    "risk_called": "wrong, of those called",
    "risk": "wrong, if all are called",
    "sensitivity_called": "sensitivity when called",
    "specificity_called": "specificity when called",
    "aurc_probability": "AURC by probability",
    "aurc_conformal": "AURC by p-value",
}


def write_results(folder: Path, results: Mapping[str, Any], predictions: Predictions, points: OperatingPoints) -> None:
    """Write `results.md`, `roc.png`, `precision_recall.png`, `reliability.png` and `risk_coverage.png`.

    Args:
        folder: the run's.
        results: the content of its `test_results.json`.
        predictions: with the splits `validate`, which `points` were fitted on, and `test`.

    Raises:
        OSError: a file cannot be written; what was there before is kept.
    """
    validation, test = predictions.of_split("validate"), predictions.of_split("test")
    synthetic, bins = results["synthetic"], results["calibration_bins"]["count"]
    page = write_text(folder / "results.md", results_markdown(results))
    plots.plot_roc(folder / "roc.png", test, points, synthetic)
    plots.plot_precision_recall(folder / "precision_recall.png", test, points, synthetic)
    plots.plot_reliability(folder / "reliability.png", test, points, synthetic, bins=bins)
    plots.plot_risk_coverage(folder / "risk_coverage.png", validation, test, points, synthetic)
    protocol = results["fitted_under"]
    macro = results["protocols"][protocol]["macro"]["roc_auc"]
    log.info(
        "test macro ROC-AUC %.3f [%.3f, %.3f] (%s, per study); tables in %s",
        *(macro[key] for key in ("value", "low", "high")),
        protocol,
        page,
    )


def results_markdown(results: Mapping[str, Any]) -> str:
    """The page, from the content of `test_results.json` (`results.evaluate`, or the file read back)."""
    counts = results["counts"]
    lines = [
        f"# Test results of `{results['run']}`",
        "",
        *notice_lines(results["synthetic"]),
        f"Test split: {counts['test']['studies']} studies of {counts['test']['patients']} patients; a study's score is "
        f"{results['score']}. {intervals_line(results)} Thresholds (rule: {results['threshold_rule']}) and "
        f"temperatures were fitted on {counts['validate']['studies']} validation studies under the protocol "
        f"`{results['fitted_under']}`. Figures of different protocols are not comparable.",
        "",
    ]
    first = results["fitted_under"]
    for name in (first, *(other for other in results["protocols"] if other != first)):
        lines += _protocol(name, results["protocols"][name], results["operating_points"], first)
    lines += _abstention(results)
    lines += _shortcuts(results)
    return "\n".join(lines)


def closing_table(results: Mapping[str, Any]) -> str:
    """The main figures as plain text of fixed width for a terminal: the protocol that fitted, and the notice."""
    name = results["fitted_under"]
    protocol = results["protocols"][name]

    def ranked(entry: Mapping[str, Any]) -> list[str]:
        # A terminal has no room for how many resamples were valid; the page says it.
        return [interval_text(entry[key], counted=False) for key in _RANKING]

    rows = [("", "positive", *_RANKING.values())]
    for label in LABELS:
        entry = protocol["per_label"][label]
        rows.append((label, str(entry["positives"]), *ranked(entry)))
    macro = protocol["macro"]
    rows.append((f"mean of {len(protocol['macro_labels'])}", "", *ranked(macro)))
    abstention = results["abstention"]
    means = abstention["protocols"][name]
    made, wrong, all_wrong = (number(means["macro"][key]["value"], 2) for key in ("called", "risk_called", "risk"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"Test split, {results['counts']['test']['studies']} studies, protocol {name}: {protocol['meaning']}",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        f"Abstaining at alpha {abstention['alpha']:g}, means of {len(means['macro_labels'])}: {made} called, {wrong} "
        f"of these wrong; {all_wrong} if all are called.",
        footer(results["synthetic"]),
    ]
    return "\n".join(lines)


def _protocol(name: str, protocol: Mapping[str, Any], points: Mapping[str, Any], fitted_under: str) -> list[str]:
    fitted = (
        f" Thresholds and temperatures are still those fitted under `{fitted_under}`, so calibration and calls show "
        "the change of protocol too."
    )
    meaning = f"Here {protocol['meaning']}.{fitted if name != fitted_under else ''}"
    lines = [f"## Protocol `{name}`", "", meaning, ""]
    if protocol["single_class"]:
        labels = ", ".join(protocol["single_class"])
        lines += [f"Left out of the means, as test has only one class of them: {labels}.", ""]
    defaults = [label for label in LABELS if points[label]["threshold_source"] == "default"]

    def threshold(finding: str | None) -> str:
        return number(points[finding]["threshold"]) + "\\*" * (finding in defaults) if finding else ""

    ranked = columns_of(protocol, _COUNTS | _RANKING | {"brier": "Brier"})
    ranked.append(calibration_column(protocol, "ECE before → after scaling"))
    lines += finding_table(ranked, mean_head(protocol), right=(1, 2, 3))
    called = [("threshold", threshold), *columns_of(protocol, _CALLS)]
    lines += finding_table(called, mean_head(protocol), right=(1,))
    if defaults:
        lines += [f"\\* 0.5 by default, as validation has only one class: {', '.join(defaults)}.", ""]
    return lines


def _abstention(results: Mapping[str, Any]) -> list[str]:
    abstention, counts = results["abstention"], results["counts"]
    fitted_under, alpha = abstention["fitted_under"], abstention["alpha"]
    lines = [
        "## Abstention",
        "",
        f'Conformal prediction, class by class: "present" is ruled out where the probability is lower than that of '
        f'all but a share of {alpha:g} of the validation positives, "absent" where it is higher than that of all but '
        f"a share of {alpha:g} of the negatives. A call is made only where what is left is exactly what the threshold "
        f"says; else the model abstains. Coverage is the share of positives, and of negatives, whose truth was not "
        f"ruled out; {1 - alpha:.4g} is aimed at for each. In parentheses: where it lies in 95 of 100 draws of so many "
        "validation and test studies, if they are exchangeable (beta-binomial); the brackets are about test alone.",
        "",
        f"The aim is for studies from where the {counts['validate']['studies']} validation studies come from; with "
        "films of another hospital or of other patients coverage can be lower. It is per study: a film read alone "
        "counts as a study of one film. It is approximate, as the weights were chosen on the same studies and studies "
        "of one patient are not independent; the tables have what was reached.",
        "",
    ]
    if abstention["too_few"]:
        lines += [
            f"Never called and left out of the means, as validation has too few studies of a class to ever rule it out "
            f"({abstention['needed']} are needed): {', '.join(abstention['too_few'])}.",
            "",
        ]
    lines += _abstention_tables(results, fitted_under)
    lines += [
        _outside_sentence(abstention),
        "",
        "AURC: area under the curve of the share of wrong calls against the share of studies called "
        "(`risk_coverage.png`), the most confident calls first; calls in random order have the share that is wrong if "
        "all are called. Ranked by the calibrated probability of the call, which gives up the positive calls of a rare "
        "finding first, the share of wrong calls falls fastest. Ranked by the conformal p-value of the class that is "
        "not called, as abstention is, positives and negatives are given up alike; of a rare finding the share of "
        "wrong calls can then even rise, as the calls that remain are more often positive ones.",
        "",
    ]
    for name in abstention["protocols"]:
        if name != fitted_under:
            said = f"Under `{name}`, with the bands of `{fitted_under}`, which promise nothing about these negatives:"
            lines += [said, "", *_abstention_tables(results, name)]
    return lines


def _outside_sentence(abstention: Mapping[str, Any]) -> str:
    """The coverages that exchangeable studies would rarely have, beside how many chance alone puts there."""
    per_label = abstention["protocols"][abstention["fitted_under"]]["per_label"]
    tested, outside = 0, []
    for side, key in (("positives", "positive_coverage"), ("negatives", "negative_coverage")):
        for label, ranges in abstention["expected"].items():
            value, (low, high) = per_label[label][key]["value"], ranges[key]
            if number(value) == "–" or low == 1:
                continue
            tested += 1
            if not low <= value <= high:
                where = "below" if value < low else "above"
                outside.append(f"{label} ({side}: {number(value)}, {where} {number(low)} to {number(high)})")
    if not tested:
        return "No coverage can be held against a range."
    chance = f"of {tested}, chance alone puts {0.05 * tested:.1f} or fewer outside on average"
    if not outside:
        return f"No coverage lies outside its range ({chance})."
    return (
        f"Outside its range: {', '.join(outside)} ({chance}). Below it, test studies are not like those of validation, "
        "or depend on each other; above it, some may also have equal probabilities."
    )


def _abstention_tables(results: Mapping[str, Any], protocol: str) -> list[str]:
    abstention, points = results["abstention"], results["operating_points"]
    section = abstention["protocols"][protocol]

    def coverage(finding: str | None, key: str) -> str:
        text = interval_text(entry_of(section, finding)[key])
        if finding is None or protocol != abstention["fitted_under"]:
            return text
        low, high = abstention["expected"][finding][key]
        return f"{text} ({number(low, 2)} to {number(high, 2)})"

    covered: list[Column] = []
    for side, key in (("positives", "positive_coverage"), ("negatives", "negative_coverage")):
        covered += [
            (f"{side} fitted", lambda finding, side=side: str(points[finding][side]) if finding else ""),
            (f"coverage of {side}", lambda finding, key=key: coverage(finding, key)),
        ]
    return [
        *finding_table(covered, mean_head(section), right=(1, 3)),
        *finding_table(columns_of(section, _ABSTENTION), mean_head(section)),
    ]


def _shortcuts(results: Mapping[str, Any]) -> list[str]:
    views, metadata, exposure = (results[key] for key in ("by_view", "metadata_only", "exposure_only"))
    shared = next(iter(views.values()))["macro"]["labels"] if views else []
    lines = [
        "## Shortcuts",
        "",
        f"ROC-AUC under `{results['fitted_under']}`. By view, as the bedside view (AP) goes with sicker patients; the "
        f"means are over the {len(shared)} findings with both classes in each view. "
        + (
            f"Then a logistic regression that sees only {', '.join(metadata['features'])}, and the model minus it."
            if metadata
            else "There was no training metadata for a comparison."
        ),
        "",
        *([_exposure(exposure), ""] if exposure else []),
    ]
    columns: list[Column] = []
    for view, group in views.items():
        columns += columns_of(group, {"roc_auc": f"{view} ({group['studies']} studies)"})
    if metadata:
        columns += columns_of(metadata, {"roc_auc": "metadata only", "model_minus_it": "model minus metadata"})
    if exposure:
        columns += columns_of(exposure, {"roc_auc": "exposure only", "model_minus_it": "model minus exposure"})
    lines += finding_table(columns, "**mean**")
    devices = results["pneumothorax_by_support_devices"]
    lines += ["Pneumothorax with and without Support Devices, as drains mark treated ones:", ""]
    return lines + markdown_table(
        ["studies", "pneumothorax", "no pneumothorax", "ROC-AUC"],
        [
            [name.replace("_", " "), str(entry["positives"]), str(entry["negatives"]), interval_text(entry["roc_auc"])]
            for name, entry in devices.items()
        ],
        right=(1, 2),
    )


def _exposure(control: Mapping[str, Any]) -> str:
    """The sentence on what needs no finding to be seen."""
    own, gain = control["macro"]["roc_auc"], control["macro"]["model_minus_it"]
    seen = ", ".join(control["features"])
    shown = gain["low"] is not None and gain["low"] > 0
    return (
        f"Last, the strongest control: a regression that sees nothing but {seen}, none of which shows a finding: "
        f"a mean ROC-AUC of {interval_text(own)}; the model adds {interval_text(gain)} over what the exposure tells"
        + ("." if shown else ": that it sees more than the exposure is not shown.")
    )
