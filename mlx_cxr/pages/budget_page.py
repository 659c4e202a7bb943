"""Worth of a teacher by the share of labels that training may use: a table and a picture from comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_cxr.core.formatting import interval_text, notice_lines, number
from mlx_cxr.pages.comparison_statement import CONTROLS, support_sentence
from mlx_cxr.pages.figures import BLACK, BLUE, GRAY, GREEN, VERMILION, bare, page, save
from mlx_cxr.pages.tables import markdown_table

_STYLES = (
    *((BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (GRAY, ":", "D"), (BLACK, "--", "v")),
    *(("#E69F00", "-", "P"), ("#56B4E9", "-.", "X"), ("#CC79A7", ":", "*")),
)
"""Enough for CNN, teacher, student, bag of words and the four controls; further teachers begin again."""


def budget_rows(comparisons: Mapping[float, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per budget and model, and per budget and difference.

    Args:
        comparisons: label budget, as a share of the training patients or their number -> `final_comparison.json`.

    Returns:
        Dictionaries of `budget`, `what` (the model, or the two that are subtracted), `kind` (`model` or `difference`),
        `roc_auc` (value, low, high; macro, of a difference `judged`) and `verdict` (with the findings that it rests
        on; empty for a model).
    """
    rows = []
    for budget, comparison in sorted(comparisons.items()):
        section = comparison["protocols"][comparison["fitted_under"]]
        models = {model["run"]: section["models"][model["run"]] for model in comparison["models"]}
        titles = {model["run"]: model["title"] for model in comparison["models"]}
        for model in (comparison["graded_teachers"] or {"models": []})["models"]:
            models[model["run"]], titles[model["run"]] = model, model["title"]
        rows += [
            {
                "budget": budget,
                "what": titles[run],
                "kind": "model",
                "roc_auc": entry["macro"]["roc_auc"],
                "verdict": "",
            }
            for run, entry in models.items()
        ]
        targets = {model["run"]: model.get("targets") for model in comparison["models"]}
        pairs = {"student minus CNN": section["differences"]["student_minus_cnn"]}
        pairs |= {f"student minus {CONTROLS[targets[run]][0]}": entry for run, entry in section["controls"].items()}
        rows += [
            {
                "budget": budget,
                "what": what,
                "kind": "difference",
                "roc_auc": entry["judged"],
                "verdict": f"{entry['verdict']}, {support_sentence(entry)}",
            }
            for what, entry in pairs.items()
        ]
    return rows


def budget_markdown(rows: Sequence[Mapping[str, Any]], synthetic: bool) -> str:
    """The page: macro ROC-AUC by budget, then the differences with their verdicts."""
    budgets = sorted({row["budget"] for row in rows})
    found = {(row["budget"], row["what"]): row for row in rows}
    names = list(dict.fromkeys(row["what"] for row in rows if row["kind"] == "model"))
    cells = [
        [name, *(interval_text(found[b, name]["roc_auc"]) if (b, name) in found else "–" for b in budgets)]
        for name in names
    ]
    differences = [
        [budget_text(row["budget"]), row["what"], interval_text(row["roc_auc"]), row["verdict"]]
        for row in rows
        if row["kind"] == "difference"
    ]
    lines = [
        "# Worth of a teacher by the labels that training may use",
        "",
        *notice_lines(synthetic),
        "Test macro ROC-AUC with 95 % intervals by patient. CNN and teacher learn from the labels of a share of the "
        "training patients; the student sees all training films, those without labels with the teacher's reading of "
        "their reports. Every model takes as many steps at each budget, and validation keeps its labels. A bag of "
        "words is scored on the studies that every reader could read, the others on those that all of them scored.",
        "",
        *markdown_table(["model", *map(budget_text, budgets)], cells),
        *markdown_table(["budget", "difference", "ROC-AUC", "the student is"], differences),
    ]
    return "\n".join(lines).rstrip() + "\n"


def budget_text(budget: float) -> str:
    """`10 %` of a share, `30 patients` of a number."""
    return f"{budget:.0%}".replace("%", " %") if isinstance(budget, float) else f"{budget} patients"


def plot_budgets(path: Path, rows: Sequence[Mapping[str, Any]], synthetic: bool) -> Path:
    """Write the curves of all models over the budgets, with their intervals, as a PNG."""
    figure = page("Test macro ROC-AUC by labels used in training", "95 % intervals by patient")
    ax = figure.add_axes((0.07, 0.1, 0.9, 0.76))
    models = [row for row in rows if row["kind"] == "model"]
    budgets = sorted({row["budget"] for row in models})
    names = list(dict.fromkeys(row["what"] for row in models))
    for place, name in enumerate(names):
        color, line, marker = _STYLES[place % len(_STYLES)]
        own = [row for row in models if row["what"] == name]
        # Beside each other, so that intervals at one budget can be told apart.
        at = [budgets.index(row["budget"]) + 0.02 * (place - (len(names) - 1) / 2) for row in own]
        values = [row["roc_auc"]["value"] for row in own]
        ax.plot(at, values, color=color, linestyle=line, marker=marker, label=name)
        for x, row in zip(at, own, strict=True):
            low, high = row["roc_auc"]["low"], row["roc_auc"]["high"]
            if number(low) != "–":
                ax.plot([x, x], [low, high], color=color, linewidth=1)
    ax.set_xticks(range(len(budgets)), [budget_text(budget) for budget in budgets])
    ax.set_xlabel("training patients whose labels were used")
    ax.set_ylabel("macro ROC-AUC")
    bare(ax)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=4, frameon=False, fontsize=11)
    return save(figure, path, synthetic)
