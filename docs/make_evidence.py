"""Writes `docs/evidence.md`, each claim beside the strongest thing that could refute it, of finished runs:
`python docs/make_evidence.py OUTPUTS [OUTPUTS ...]`, folders of runs and comparisons such as `outputs`.

No figure and no verdict is typed by hand. A claim is shown where the interval of its figure lies above 0 (for a cohort
never seen, above chance), refuted where it lies below, and not shown in between.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_cxr.core.files import read_record, write_text
from mlx_cxr.core.formatting import interval_text
from mlx_cxr.core.runs import bag_of_words_name
from mlx_cxr.evaluation.comparison import graded_teachers
from mlx_cxr.evaluation.map_verdict import map_verdict
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.pages.comparison_statement import CONTROLS, support_sentence
from mlx_cxr.pages.tables import markdown_table

PAGE = Path(__file__).with_name("evidence.md")
HEAD = ["claim", "what could refute it", "figure (ROC-AUC where nothing else is said)", "it is", "run"]


def rows_of(outputs: Path) -> Iterator[tuple[bool, list[str]]]:
    """(synthetic, cells of a row) of every result file under a folder of runs."""
    for path in sorted(outputs.glob("*/test_results.json")):
        results = read_record(path)
        if results["exposure_only"] is not None:
            yield results["synthetic"], _exposure(results["exposure_only"], path)
        if (places := path.with_name("localization.json")).exists():
            yield results["synthetic"], _maps(read_record(places), path)
    compared = set()
    for path in sorted(outputs.glob("comparison_*/final_comparison.json")):
        comparison = read_record(path)
        compared |= {model["run"] for model in comparison["models"]}
        for row in _compared(comparison, path):
            yield comparison["synthetic"], row
    # A cohort of reports without images has no comparison.
    for path in sorted(outputs.glob(f"{bag_of_words_name('*')}/test_results.json")):
        teacher = path.parent.with_name(path.parent.name.removesuffix(bag_of_words_name("")))
        if teacher.name not in compared and (teacher / "test_results.json").exists():
            results, runs = read_record(path), [open_scored_run(path.parent, "bag of words")]
            protocol, samples = runs[0].points.protocol, results["bootstrap"]["samples"]
            bins, seed = results["calibration_bins"]["count"], results["bootstrap"]["seed"]
            graded = graded_teachers(runs, open_scored_run(teacher, "teacher"), protocol, samples, seed, bins)
            for row in _read(graded, teacher / path.name):
                yield results["synthetic"], row
    for path in sorted(outputs.glob("*/external/*/external_results.json")):
        results = read_record(path)
        for row in _external(results, path):
            yield results["synthetic"], row
        if (places := path.with_name("localization.json")).exists():
            yield results["synthetic"], _maps(read_record(places), path)


def _said(interval: Mapping[str, Any], least: float = 0.0) -> str:
    low, high = interval["low"], interval["high"]
    if any(bound is None or math.isnan(bound) for bound in (low, high)):
        return "not shown (no interval)"
    return "shown" if low > least else "refuted" if high < least else "not shown"


def _exposure(exposure: Mapping[str, Any], path: Path) -> list[str]:
    macro = exposure["macro"]
    figure = f"{interval_text(macro['model_minus_it'])} over it; it alone {interval_text(macro['roc_auc'])}"
    refuting = "a regression that sees exposure, format, view, age and sex alone"
    return ["the network reads films", refuting, figure, _said(macro["model_minus_it"]), _run(path)]


def _maps(places: Mapping[str, Any], path: Path) -> list[str]:
    best = map_verdict(places["macro"])
    beaten = [label for label, entry in places["per_label"].items() if map_verdict(entry).better]
    findings = f"{len(beaten)} of {len(places['per_label'])} findings{': ' * bool(beaten)}{', '.join(beaten)}"
    figure = f"mean hit rate {interval_text(best.difference)} above it; by itself each, {findings}"
    return [
        "maps point at the finding",
        f"the strongest control: {best.control}",
        figure,
        _said(best.difference),
        _run(path),
    ]


def _compared(comparison: Mapping[str, Any], path: Path) -> Iterator[list[str]]:
    section = comparison["protocols"][comparison["fitted_under"]]
    yield from _read(comparison["graded_teachers"], path)
    pairs = {"teacher_minus_cnn": ("a teacher of reports beats the CNN", "the CNN")}
    pairs |= {"student_minus_cnn": ("the student gains by its teacher", "the CNN of the same labels")}
    entries = [(*pairs[name], section["differences"][name]) for name in pairs]
    targets = {model["run"]: model.get("targets") for model in comparison["models"]}
    entries += [
        ("the student gains by its teacher", f"a student of {CONTROLS[targets[run]][0]}", entry)
        for run, entry in section["controls"].items()
    ]
    for claim, refuting, entry in entries:
        support = support_sentence(entry)
        figure = interval_text(entry["judged"]) + (f" {support}" if support else "")
        said = _said(entry["judged"])
        said += ", but not without a finding" if entry["rests_on"] else ""
        yield [claim, refuting, figure, said, _run(path)]


def _read(graded: Mapping[str, Any] | None, path: Path) -> Iterator[list[str]]:
    for model in graded["models"] if graded else ():
        if model["role"] == "bag of words":
            minus = model["minus_teacher"]
            ends = {"low": _negative(minus["high"]), "high": _negative(minus["low"])}
            gain = {**minus, "value": -minus["value"], **ends}
            claim = "the language model is worth its size"
            yield [claim, "a bag of words that reads the same", interval_text(gain), _said(gain), _run(path)]


def _external(results: Mapping[str, Any], path: Path) -> Iterator[list[str]]:
    macro = results["against_own"]["macro"]
    figure = f"{interval_text(macro['external'])}; own test {interval_text(macro['own'])}"
    yield ["it holds where it was not trained", "chance", figure, _said(macro["external"], 0.5), _run(path)]


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _run(path: Path) -> str:
    return f"`{path.parent.relative_to(path.parents[3] if path.parents[1].name == 'external' else path.parents[1])}`"


def page(folders: list[Path]) -> str:
    """The page, of the runs in some folders."""
    rows = [row for folder in folders for row in rows_of(folder)]
    lines = [
        "# Evidence",
        "",
        "Each claim beside the strongest thing that could refute it, written by `docs/make_evidence.py` from the files "
        "of finished runs. 95 % intervals by patient. Shown: the interval lies above 0 (of a cohort never seen: above "
        "chance); refuted: below; not shown: in between. Research only, not for clinical use.",
        "",
    ]
    for title, wanted in (("Films and reports of patients", False), ("Synthetic films: rendered by a program", True)):
        own = [row for synthetic, row in rows if synthetic == wanted]
        lines += [f"## {title}", "", *(markdown_table(HEAD, own) if own else ["No run.", ""])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    write_text(PAGE, page([Path(name) for name in sys.argv[1:]]))
