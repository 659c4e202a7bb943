"""`results.md`: `test_results.json` as tables for people, each with its protocol and the notice at the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_cxr.core.formatting import footer, interval_text, notice_lines, number
from mlx_cxr.core.labels import LABELS

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


def results_markdown(results: Mapping[str, Any]) -> str:
    """The page, from the content of `test_results.json` (`results.evaluate`, or the file read back)."""
    counts, boot = results["counts"], results["bootstrap"]
    intervals = (
        f"In brackets 95 % intervals from {boot['samples']} resamples of patients."
        if boot["samples"]
        else "No intervals: no resamples were asked for."
    )
    lines = [
        f"# Test results of `{results['run']}`",
        "",
        *notice_lines(results["synthetic"]),
        f"Test split: {counts['test']['studies']} studies of {counts['test']['patients']} patients; a study's score is "
        f"{results['score']}. {intervals} Thresholds (rule: {results['threshold_rule']}) and temperatures "
        f"were fitted on {counts['validate']['studies']} validation studies under the protocol "
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
    rows = [("", "positive", *_RANKING.values())]
    for label in LABELS:
        entry = protocol["per_label"][label]
        rows.append((label, str(entry["positives"]), *(interval_text(entry[key]) for key in _RANKING)))
    macro = protocol["macro"]
    rows.append((f"mean of {len(protocol['macro_labels'])}", "", *(interval_text(macro[key]) for key in _RANKING)))
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
    macro = f"**mean of {len(protocol['macro_labels'])}**"
    rows = [(label, protocol["per_label"][label]) for label in LABELS]
    fitted = (
        f" Thresholds and temperatures are still those fitted under `{fitted_under}`, so calibration and calls show "
        "the change of protocol too."
    )
    meaning = f"Here {protocol['meaning']}.{fitted if name != fitted_under else ''}"
    lines = [f"## Protocol `{name}`", "", meaning, ""]
    if protocol["single_class"]:
        lines += [
            f"Left out of the means, as test has only one class of them: {', '.join(protocol['single_class'])}.",
            "",
        ]
    counts = ("positives", "negatives", "left_out")
    ranked = [[label, *(str(entry[key]) for key in counts), *_ranking(entry)] for label, entry in rows]
    ranked.append([macro, "", "", "", *_ranking(protocol["macro"])])
    header = ["finding", "positive", "negative", "left out", *_RANKING.values(), "Brier", "ECE before → after scaling"]
    lines += markdown_table(header, ranked, right=(1, 2, 3))
    called = [[label, _threshold(points[label]), *_calls(entry)] for label, entry in rows]
    called.append([macro, "", *_calls(protocol["macro"])])
    lines += markdown_table(["finding", "threshold", *_CALLS.values()], called, right=(1,))
    defaults = [label for label in LABELS if points[label]["threshold_source"] == "default"]
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
        "validation studies, which the brackets, about test alone, leave out.",
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


def _abstention_tables(results: Mapping[str, Any], protocol: str) -> list[str]:
    abstention, points = results["abstention"], results["operating_points"]
    section = abstention["protocols"][protocol]
    mean = f"**mean of {len(section['macro_labels'])}**"
    sides = {"positives": "positive_coverage", "negatives": "negative_coverage"}
    covered = []
    for label in LABELS:
        row = [label]
        for side, key in sides.items():
            low, high = abstention["expected"][label][key]
            expected = f" ({number(low, 2)} to {number(high, 2)})" if protocol == abstention["fitted_under"] else ""
            row += [str(points[label][side]), interval_text(section["per_label"][label][key]) + expected]
        covered.append(row)
    means = [interval_text(section["macro"][key]) for key in sides.values()]
    covered.append([mean, "", means[0], "", means[1]])
    header = ["finding", "positives fitted", "coverage of positives", "negatives fitted", "coverage of negatives"]
    entries = [*section["per_label"].items(), (mean, section["macro"])]
    called = [[name, *(interval_text(entry[key]) for key in _ABSTENTION)] for name, entry in entries]
    return [
        *markdown_table(header, covered, right=(1, 3)),
        *markdown_table(["finding", *_ABSTENTION.values()], called),
    ]


def _shortcuts(results: Mapping[str, Any]) -> list[str]:
    views, metadata = results["by_view"], results["metadata_only"]
    shared = next(iter(views.values()))["macro"]["labels"] if views else []
    lines = [
        "## Shortcuts",
        "",
        f"ROC-AUC under `{results['fitted_under']}`. By view, as the bedside view (AP) goes with sicker patients; the "
        f"means are over the {len(shared)} findings with both classes in each view. "
        + (
            f"Last, a logistic regression that sees only {', '.join(metadata['features'])}, and the model minus it."
            if metadata
            else "There was no training metadata for a comparison."
        ),
        "",
    ]
    header = ["finding", *(f"{view} ({group['studies']} studies)" for view, group in views.items())]
    header += ["metadata only", "model minus metadata"] if metadata else []
    rows = []
    for label in (*LABELS, "mean"):
        entries = [g["macro"] if label == "mean" else g["per_label"][label] for g in views.values()]
        cells = [interval_text(entry["roc_auc"]) for entry in entries]
        if metadata:
            entry = metadata["macro"] if label == "mean" else metadata["per_label"][label]
            cells += [interval_text(entry[arm]) for arm in ("roc_auc", "model_minus_metadata")]
        rows.append([f"**{label}**" if label == "mean" else label, *cells])
    lines += markdown_table(header, rows)
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


def _ranking(entry: Mapping[str, Any]) -> list[str]:
    calibration = f"{number(entry['ece_uncalibrated'])} → {number(entry['ece'])}"
    return [*(interval_text(entry[key]) for key in _RANKING), interval_text(entry["brier"]), calibration]


def _calls(entry: Mapping[str, Any]) -> list[str]:
    return [interval_text(entry[key]) for key in _CALLS]


def _threshold(point: Mapping[str, Any]) -> str:
    return number(point["threshold"]) + ("\\*" if point["threshold_source"] == "default" else "")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table, and an empty one; columns at the positions `right` are set to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)] + [""]
