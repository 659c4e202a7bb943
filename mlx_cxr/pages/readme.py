"""Figures in a README come from a run: the text between two markers is replaced, the rest is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import atomic_path, read_record, write_text
from mlx_cxr.core.formatting import NOT_CLINICAL, interval_text, number
from mlx_cxr.evaluation.map_verdict import map_verdict
from mlx_cxr.pages.map_checks import CONTROL_NAMES, found, table_rows
from mlx_cxr.pages.results_page import closing_table
from mlx_cxr.pages.tables import markdown_table


def replace_block(path: str | Path, name: str, text: str) -> Path:
    """Put `text` between the lines `<!-- begin NAME -->` and `<!-- end NAME -->` of a Markdown file, atomically.

    Raises:
        UserError: the file is missing, or does not hold each marker once and in order.
    """
    path = Path(path)
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's top folder") from None
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise UserError(f"{path}: expected one line '{begin.strip()}' and, below it, one '{end}'")
    head, tail = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    return write_text(path, f"{head}\n{text.strip()}\n\n{tail}")


BLOCK = "demo"
PICTURE = Path(".github/images/map.png")


def update_readme(readme: Path, run_dir: Path, seconds: float) -> None:
    """Replace the block `demo` of a README with a run's figures, and the picture beside it with one of its maps.

    Args:
        readme: the Markdown file; the picture lies at `PICTURE` from its folder.
        run_dir: an evaluated run of a cohort with boxes or masks.
        seconds: that the pipeline took.

    Raises:
        UserError: the README has no such block, or the run has no map to show.
        RecordError: the run is not evaluated, or its cohort has neither boxes nor masks.
    """
    results = read_record(run_dir / "test_results.json")
    table = read_record(run_dir / "localization.json")
    label = best_localized(table)
    names = sorted((run_dir / "grad_cam").glob(f"{label.replace(' ', '_')}_true_positive_1_*.png"))
    if not names:
        raise UserError(f"{run_dir / 'grad_cam'} has no true positive of {label}, the finding that maps point to best")
    replace_block(readme, BLOCK, demo_block(results, table, label, seconds))
    with atomic_path(readme.parent / PICTURE) as temporary:
        shutil.copyfile(names[0], temporary)


def best_localized(table: Mapping[str, Any]) -> str:
    """The finding of `localization.json` whose maps hit it most often beyond its strongest control."""
    return max(table["per_label"], key=lambda label: map_verdict(table["per_label"][label]).difference["value"])


def demo_block(results: Mapping[str, Any], table: Mapping[str, Any], label: str, seconds: float) -> str:
    """The block's Markdown, from `test_results.json` and `localization.json`."""
    device = results["provenance"]["device"]
    where = f"{device['kind']} backend, {device['cores']} cores"
    rows = []
    for name, images, entry in table_rows(table):
        cells = [name, images]
        for score in ("hit", "hit_half_cell", "iou"):
            verdict = map_verdict(entry, score)
            cells += [number(entry[score]["maps"]["value"], 2), f"{number(verdict.mean, 2)} {verdict.control}"]
            cells += [interval_text(verdict.difference, 2)] * (score != "iou")
        rows.append(cells)
    header = ["finding", "films", "hit rate", "control", "difference", "within half a cell", "control", "difference"]
    return "\n".join(
        [
            f"What the demo printed ({where}; the stages took {seconds / 60:.1f} minutes). These lines and the picture "
            f"are written by the run (`--update_readme`). The cohort is synthetic. {NOT_CLINICAL}.",
            "",
            "```",
            closing_table(results),
            "```",
            "",
            "Does the map's peak lie on the finding? Films of the test split with the finding drawn and reported, "
            "beside the strongest of four controls on the same films: "
            f"{', '.join(f'{words} (`{name}`)' for name, words in CONTROL_NAMES.items())}. In brackets 95 % intervals "
            "by patient. The picture above is the most confident true positive of the finding that maps hit best "
            f"beyond its strongest control ({label}).",
            "",
            *markdown_table([*header, "IoU", "control"], rows, right=(1, 2, 5, 8)),
            _verdict(table["per_label"]),
        ]
    )


def _verdict(per_label: Mapping[str, Any]) -> str:
    """The findings that the maps find, by the interval of the difference, and a warning about the rest."""
    strict = found(per_label)
    near = [label for label in found(per_label, "hit_half_cell") if label not in strict]
    rest = [label for label in per_label if label not in (*strict, *near)]
    return (
        "With an interval of the difference from the strongest control above 0, the maps find: "
        f"{', '.join(strict) or 'nothing'}; allowing half a cell also {', '.join(near) or 'nothing'}. That they do is "
        f"not shown for: {', '.join(rest) or 'none'}. A finding can be predicted well from somewhere else on the film "
        "than where it lies, which is what this table is for. It is a table of drawn findings, and says nothing of "
        "maps on films of patients."
    )
