"""The sections of a model card that hold figures, as Markdown, for `model_card_page`.

A card is that of `model_card.model_card`; every cell is one of its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cxr.core.formatting import escaped, interval_text, number
from mlx_cxr.evaluation.map_verdict import map_verdict
from mlx_cxr.pages.map_checks import table_rows
from mlx_cxr.pages.tables import calibration_column, columns_of, finding_table, markdown_table, mean_head
from mlx_cxr.publishing.claim_checklist import NOT_RECORDED

_RANKING = {
    "positives": "positive",
    "negatives": "negative",
    "roc_auc": "ROC-AUC",
    "average_precision": "average precision",
    "brier": "Brier",
}
_CALLS = {"sensitivity": "sensitivity", "specificity": "specificity", "precision": "precision", "f1": "F1"}
_COVERAGE = {"positive_coverage": "coverage, with it", "negative_coverage": "coverage, without it"}
_CALLED = {
    "called": "called",
    "risk_called": "wrong of these",
    "risk": "wrong if all called",
    "sensitivity_called": "sensitivity of calls",
    "specificity_called": "specificity of calls",
}
_HITS = {
    "random": "random maps",
    "swapped": "other patients' maps",
    "usual": "usual place",
    "centre": "film's centre",
    "chance": "chance",
}

Card = Mapping[str, Any]


def results_section(card: Card) -> list[str]:
    """Both protocols by finding, and the models beside it."""
    evaluation, points = card["evaluation"], card["operating_points"]["labels"]
    counts, bins = evaluation["counts"], evaluation["calibration_bins"]["count"]
    lines = [
        "## Test results",
        "",
        f"Per study, whose score is {evaluation['score']}; {counts['test']['studies']} studies of "
        f"{counts['test']['patients']} patients. Thresholds (rule: {evaluation['threshold_rule']}) and temperatures "
        f"were fitted on {counts['validate']['studies']} validation studies under `{evaluation['fitted_under']}`. "
        f"Figures of different protocols are not comparable. Calibration error is over {bins} bins, before and after "
        "temperature scaling.",
        "",
    ]
    for name, protocol in protocols(evaluation):
        lines += [f"### Protocol `{name}`", "", f"Here {protocol['meaning']}.", ""]
        ranked = [*columns_of(protocol, _RANKING), calibration_column(protocol, "calibration error")]
        lines += finding_table(ranked, mean_head(protocol), right=(1, 2))
        lines += [f"If all were called at the threshold, without abstention (`{name}`):", ""]
        thresholds = ("threshold", lambda finding: number(points[finding]["threshold"]) if finding else "")
        lines += finding_table([thresholds, *columns_of(protocol, _CALLS)], mean_head(protocol), right=(1,))
    comparison = evaluation["comparison"]
    return lines if comparison is None else lines + _beside(comparison)


def _beside(comparison: Mapping[str, Any]) -> list[str]:
    rows = [[model["title"], f"`{model['run']}`", interval_text(model["roc_auc"])] for model in comparison["models"]]
    differences = [
        [
            name.replace("_", " ") if name.count("_minus_") else f"student minus `{name}`",
            interval_text(d["roc_auc"]),
            d["verdict"] + (f"; rests on {', '.join(d['rests_on'])}" if d["rests_on"] else ""),
        ]
        for name, d in comparison["differences"].items()
    ]
    return [
        "### Beside other models",
        "",
        f"Mean ROC-AUC under `{comparison['protocol']}` on the {comparison['studies']} test studies that all of them "
        f"scored. The student keeps {interval_text(comparison['retention'])} of the teacher's.",
        "",
        *markdown_table(["model", "run", "ROC-AUC"], rows),
        *markdown_table(["difference", "ROC-AUC", "verdict"], differences),
    ]


def calls_section(card: Card) -> list[str]:
    """Coverage of what conformal prediction leaves plausible, share of studies called, and errors among them."""
    abstention = card["abstention"]
    lines = ["## Calls and abstention", ""]
    if abstention is None:
        return [*lines, f"Coverage and risk on test: {NOT_RECORDED}.", ""]
    name = abstention["fitted_under"]
    section, points = abstention["protocols"][name], card["operating_points"]["labels"]
    sure = f"{100 * (1 - abstention['alpha']):.4g} %"
    lines += [
        f"A call is made where it is all that conformal prediction leaves plausible at {sure}; else the model "
        "abstains. Coverage is the share of studies with the finding for which present stays plausible, and of those "
        f"without for which absent does. Test studies, protocol `{name}`.",
        "",
    ]

    def zone(finding: str | None) -> str:
        if finding is None:
            return ""
        point = points[finding]
        if min(point["positives"], point["negatives"]) < abstention["needed"]:
            return "everywhere"
        bounds = [point[key] for key in ("lower", "upper", "threshold")]
        return f"{number(min(bounds))} and {number(max(bounds))}"

    lines += finding_table([("abstains between", zone), *columns_of(section, _COVERAGE)], mean_head(section))
    return lines + finding_table(columns_of(section, _CALLED), mean_head(section))


def subgroups_section(card: Card) -> list[str]:
    """Views, support devices, metadata, and the groups of the failure analysis."""
    subgroups, name = card["subgroups"], card["evaluation"]["fitted_under"]
    rows = [
        [
            f"view {view}",
            str(group["studies"]),
            f"mean of {len(group['macro']['labels'])}",
            interval_text(group["macro"]["roc_auc"]),
        ]
        for view, group in subgroups["by_view"].items()
    ]
    for key, entry in subgroups["pneumothorax_by_support_devices"].items():
        studies = str(entry["positives"] + entry["negatives"])
        rows.append([key.replace("_", " "), studies, "Pneumothorax", interval_text(entry["roc_auc"])])
    lines = [
        "## Subgroups and shortcuts",
        "",
        f"Under `{name}`. AP is the bedside view, of sicker patients; drains mark pneumothoraces that were treated.",
        "",
        *markdown_table(["studies", "number", "findings", "ROC-AUC"], rows, right=(1,)),
    ]
    for what, control in (("view, age and sex", "metadata_only"), ("exposure and format of the film", "exposure_only")):
        entry = subgroups[control]
        if entry is None or not entry["macro"]["labels"]:
            lines += [f"What {what} alone would tell: {NOT_RECORDED}.", ""]
            continue
        macro = entry["macro"]
        lines += [
            f"A regression that sees only {', '.join(entry['features'])} has a mean ROC-AUC of "
            f"{interval_text(macro['roc_auc'])} over {macro['labels']} findings; the model minus it: "
            f"{interval_text(macro['model_minus_it'])}.",
            "",
        ]
    analysis = subgroups["failure_analysis"]
    if analysis is None:
        return [*lines, f"By sex, age and support devices: {NOT_RECORDED}, as there is no failure analysis.", ""]
    return lines + _groups(analysis)


def _groups(analysis: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            attribute,
            f"{escaped(group)}{' (few)' if entry['small'] else ''}",
            str(entry["studies"]),
            str(len(entry["labels"])),
            *(interval_text(entry[key]) for key in ("roc_auc", "sensitivity", "specificity", "fnr_gap")),
        ]
        for attribute, table in analysis["subgroups"].items()
        for group, entry in table.items()
    ]
    gaps = analysis["gaps"]
    return [
        f"Means over the findings with enough patients in the group, protocol `{analysis['protocol']}`. The gap is the "
        "group's false-negative rate minus that of all studies: above 0, findings go unseen more often. "
        f"{gaps['apart']} of {gaps['looked_at']} gaps exclude 0; some would by chance.",
        "",
        *markdown_table(
            ["", "group", "studies", "findings", "ROC-AUC", "sensitivity", "specificity", "gap"], rows, right=(2, 3)
        ),
    ]


def maps_section(card: Card) -> list[str]:
    """Hit rates of the maps and of their controls."""
    table = card["localization"]
    if table is None:
        return ["## Maps", "", f"Whether its maps point at the findings: {NOT_RECORDED}.", ""]
    cells = []
    for name, images, entry in table_rows(table):
        hit, verdict = entry["hit"], map_verdict(entry)
        cells.append([name, images, interval_text(hit["maps"]), *(number(hit[arm]["mean"]["value"]) for arm in _HITS)])
        cells[-1] += [_HITS[verdict.control], interval_text(verdict.difference)]
    return [
        "## Maps",
        "",
        f"Share of films whose {table['method']} map peaks on the finding, beside what points at it without looking at "
        f"the film. Films: {table['selection']}.",
        "",
        *markdown_table(
            ["finding", "films", "maps", *_HITS.values(), "strongest control", "maps minus it"], cells, right=(1,)
        ),
    ]


def cost_section(card: Card) -> list[str]:
    """Time of a prediction."""
    cost = card["cost"]
    if cost is None:
        return ["## Cost", "", f"{NOT_RECORDED.capitalize()}.", ""]
    return [
        "## Cost",
        "",
        f"{number(cost['ms_per_sample'], 2)} ms for {cost['what']}, {on_device(cost['device'])}, over "
        f"{cost['samples']} films.",
        "",
    ]


def protocols(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Protocols by name, the one that fitted first."""
    first, protocols = evaluation["fitted_under"], evaluation["protocols"]
    return [(name, protocols[name]) for name in (first, *(other for other in protocols if other != first))]


def on_device(device: Mapping[str, Any]) -> str:
    """Such as `on Apple M4 (metal)`."""
    return f"on {device.get('name', NOT_RECORDED)} ({device.get('kind', NOT_RECORDED)})"


SECTIONS = (results_section, calls_section, subgroups_section, maps_section, cost_section)
"""In the order of the page; each takes a card and gives Markdown lines."""
