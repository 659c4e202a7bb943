"""`final_comparison.md`: `final_comparison.json` as a page that can be read on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_cxr.core.formatting import interval_text, notice_lines, number
from mlx_cxr.evaluation.comparison import LEAST_PATIENTS, PAIRS
from mlx_cxr.pages.comparison_statement import (
    CONTROLS,
    control_verdicts,
    gate_lines,
    reading_warnings,
    retention_sentence,
    statement,
    support_sentence,
)
from mlx_cxr.pages.comparison_tables import (
    NAMES,
    cost_note,
    differences_table,
    external_cells,
    intervals_line,
    main_table,
    p_text,
)
from mlx_cxr.pages.tables import Column, columns_of, entry_of, finding_table, markdown_table, mean_head

_RANKING = {"roc_auc": "ROC-AUC", "average_precision": "average precision"}


def comparison_markdown(comparison: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The page, from the content of `final_comparison.json`, as computed or read back.

    Args:
        comparison: of `comparison.compare`.
        pictures: files beside the page to show at its end.
    """
    first = comparison["fitted_under"]
    lines = [
        f"# Comparison of CNN, teacher and student: `{comparison['experiment']}`",
        "",
        *notice_lines(comparison["synthetic"]),
        _preamble(comparison),
        "",
        f"## What the figures support (protocol `{first}`)",
        "",
        statement(comparison),
        "",
        *(line for warning in reading_warnings(comparison) for line in (warning, "")),
        *(f"- Gate {line}." for line in gate_lines(comparison)),
        "",
        *_models(comparison, first),
        *_controls(comparison),
        *_teachers(comparison),
        *_by_finding(comparison, first),
    ]
    for name in comparison["protocols"]:
        if name != first:
            lines += [*_models(comparison, name), retention_sentence(comparison["protocols"][name]["retention"]), ""]
            lines += _by_finding(comparison, name)
    lines += [line for picture in pictures for line in (f"![{picture}]({picture})", "")]
    return "\n".join(lines)


def _preamble(comparison: Mapping[str, Any]) -> str:
    counts = comparison["counts"]
    return (
        f"{counts['studies']} test studies of {counts['patients']} patients: those that every model scored. "
        f"{_left_out(counts)} {intervals_line(comparison)} All models share the resamples, so differences are paired. "
        f"Thresholds (rule: {comparison['threshold_rule']}) and temperatures were fitted on each model's validation "
        f"predictions under the protocol `{comparison['fitted_under']}`, never on test. Figures of different protocols "
        "are not comparable."
    )


def _left_out(counts: Mapping[str, Any]) -> str:
    parts = [
        f"{one['left_out']} of the {one['test_studies']} of `{run}`"
        for run, one in counts["runs"].items()
        if one["left_out"]
    ]
    return f"Left out, as another model has no score for them: {', '.join(parts)}." if parts else "None was left out."


def _models(comparison: Mapping[str, Any], name: str) -> list[str]:
    section, first = comparison["protocols"][name], comparison["fitted_under"]
    fitted = "" if name == first else f" Thresholds and temperatures are still those fitted under `{first}`."
    lines = [
        f"## Models, protocol `{name}`",
        "",
        f"Here {section['meaning']}.{fitted} Means over {len(section['macro_labels'])} findings.",
        "",
    ]
    if section["single_class"]:
        labels = ", ".join(section["single_class"])
        lines += [f"Left out of the means, as test has only one class of them: {labels}.", ""]
    lines += [*main_table(comparison, name), cost_note(comparison), ""]
    lines += ["Paired differences of the same figures; for Brier, less is better:", ""]
    return [*lines, *differences_table(comparison, name)]


def _controls(comparison: Mapping[str, Any]) -> list[str]:
    first = comparison["fitted_under"]
    entries = comparison["protocols"][first]["controls"]
    lines = [f"## Controls, protocol `{first}`", ""]
    if not entries:
        return [*lines, "None was compared; `--control_run` names students that were trained without the teacher.", ""]
    lines += [
        "Students of the same stage with something else in the teacher's place. The verdict is on the paired "
        "difference of macro ROC-AUC over the findings that enough patients have, and have not "
        f"({LEAST_PATIENTS} of each): `better` where its interval lies above 0, `worse` where it lies below, else "
        "`within noise`; beside it the least that is left without any one finding.",
        "",
    ]
    targets = {model["run"]: model.get("targets") for model in comparison["models"]}
    verdicts = [said for _, _, said in control_verdicts(comparison)]
    rows = [
        [
            f"`{run}`",
            CONTROLS[targets[run]][0],
            *(interval_text(entry["macro"][key]) for key in _RANKING),
            f"{interval_text(entry['judged'])}, {support_sentence(entry)}",
            said,
        ]
        for (run, entry), said in zip(entries.items(), verdicts, strict=True)
    ]
    header = ["control", "learned from", *(f"student − control, {name}" for name in _RANKING.values())]
    return [*lines, *markdown_table([*header, "judged ROC-AUC", "the student is"], rows)]


def _teachers(comparison: Mapping[str, Any]) -> list[str]:
    graded = comparison["graded_teachers"]
    if graded is None:
        return []
    counts = graded["counts"]
    rows = []
    for model in graded["models"]:
        against = model["minus_teacher"]
        rows.append(
            [
                f"`{model['run']}`",
                model["title"].removeprefix("teacher, reads: ").replace(", reads: ", ": "),
                *(number(model[key]) for key in ("zero_shot_auc", "tuned_auc")),
                *(interval_text(model["macro"][key]) for key in _RANKING),
                *external_cells(comparison, model, graded["protocol"]).values(),
                "–" if against is None else f"{interval_text(against)}, {against['verdict']}",
            ]
        )
    header = ["teacher", "reads", "validation, zero-shot", "validation, tuned"]
    header += [f"test, {name}" for name in _RANKING.values()]
    header += external_cells(comparison, graded["models"][0], graded["protocol"])
    return [
        f"## Teachers by what they may read, protocol `{graded['protocol']}`",
        "",
        f"Macro figures; validation is ROC-AUC. {counts['studies']} test studies of {counts['patients']} patients: "
        f"those that every teacher scored. {_left_out(counts)}",
        "",
        *markdown_table([*header, f"minus `{graded['models'][0]['run']}`, ROC-AUC"], rows),
    ]


def _by_finding(comparison: Mapping[str, Any], name: str) -> list[str]:
    section = comparison["protocols"][name]
    main = {model["role"]: model for model in comparison["models"] if model["role"] in NAMES}
    models = {role: section["models"][main[role]["run"]] for role in NAMES}
    counts = columns_of(models["cnn"], {"positives": "positive", "negatives": "negative"})
    lines = [f"## By finding, protocol `{name}`", ""]
    for metric, title in _RANKING.items():
        columns = [*counts]
        for role in NAMES:
            columns += columns_of(models[role], {metric: main[role]["title"]})
        lines += [f"**{title}**", "", *finding_table(columns, mean_head(section), right=(1, 2))]
        lines += [f"**{title}, paired differences**", "", *_differences(section, metric)]
        if metric == "roc_auc":
            lines += [
                "p: DeLong's test of the pair's ROC-AUCs, with studies clustered by patient (Obuchowski), and after "
                "the arrow with Holm's correction over the findings of that pair. DeLong's own variance takes studies "
                "as independent, which those of one patient are not. With few positives p-values and intervals are "
                "rough.",
                "",
            ]
    return lines


def _differences(section: Mapping[str, Any], metric: str) -> list[str]:
    columns: list[Column] = []
    for a, b in PAIRS:
        difference = section["differences"][f"{a}_minus_{b}"]

        def tested(finding: str | None, difference: Mapping[str, Any] = difference) -> str:
            entry = entry_of(difference, finding)
            return f"{p_text(entry['p_value'])} → {p_text(entry['p_holm'])}" if finding else ""

        columns += columns_of(difference, {metric: f"{NAMES[a]} − {NAMES[b]}"})
        columns += [("p → Holm", tested)] if metric == "roc_auc" else []
    return finding_table(columns, mean_head(section))
