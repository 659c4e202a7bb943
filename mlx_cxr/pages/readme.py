"""Figures in a README come from a run: the text between two markers is replaced, the rest is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.formatting import NOT_CLINICAL, interval_text, number
from mlx_cxr.core.runs import atomic_path, read_json, write_text
from mlx_cxr.pages.results_page import closing_table


def replace_block(path: str | Path, name: str, text: str) -> Path:
    """Put `text` between the lines `<!-- begin NAME -->` and `<!-- end NAME -->` of a Markdown file, atomically.

    Args:
        path: the file.
        name: of the block.
        text: Markdown, without the markers.

    Returns:
        `path`.

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
        run_dir: an evaluated run of a cohort with masks.
        seconds: how long the pipeline took.

    Raises:
        UserError: the README has no such block, or the run has no map to show.
        RunFormatError: the run is not evaluated, or its cohort has no masks.
    """
    results = read_json(run_dir / "test_results.json")
    table = read_json(run_dir / "localization.json")
    label = best_localized(table)
    names = sorted((run_dir / "grad_cam").glob(f"{label.replace(' ', '_')}_true_positive_1_*.png"))
    if not names:
        raise UserError(f"{run_dir / 'grad_cam'} has no true positive of {label}, the finding that maps point to best")
    replace_block(readme, BLOCK, demo_block(results, table, label, seconds))
    with atomic_path(readme.parent / PICTURE) as temporary:
        shutil.copyfile(names[0], temporary)


def best_localized(table: Mapping[str, Any]) -> str:
    """The finding whose maps hit it most often beyond the random control, of those shown in `localization.json`."""
    return max(table["per_label"], key=lambda label: table["per_label"][label]["hit"]["random"]["difference"]["value"])


def demo_block(results: Mapping[str, Any], table: Mapping[str, Any], label: str, seconds: float) -> str:
    """The block's Markdown, from `test_results.json` and `localization.json`."""
    device = results["provenance"]["device"]
    where = f"{device['kind']} backend, {device['cores']} cores"
    rows = []
    for name, entry in [*table["per_label"].items(), (f"**mean of {table['macro']['labels']}**", table["macro"])]:
        cells = [name, str(entry.get("films", "")), interval_text(entry["hit"]["random"]["difference"], 2)]
        for score in ("hit", "hit_half_cell", "iou"):
            cells += [number(entry[score]["maps"]["value"], 2), number(entry[score]["random"]["mean"]["value"], 2)]
        rows.append(f"| {' | '.join([*cells[:2], *cells[3:5], cells[2], *cells[5:]])} |")
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
            "beside random maps of the same resolution; in brackets 95 % intervals by patient. The picture above is "
            f"the most confident true positive of the finding that maps hit best beyond chance ({label}).",
            "",
            "| finding | films | hit rate | random | difference | within half a cell | random | IoU | random |",
            "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            _verdict(table["per_label"]),
        ]
    )


def _verdict(per_label: Mapping[str, Any]) -> str:
    """Which findings the maps find, by the interval of the difference, and a warning about the rest."""

    def found(score: str) -> list[str]:
        return [label for label, entry in per_label.items() if entry[score]["random"]["difference"]["low"] > 0]

    strict, near = found("hit"), found("hit_half_cell")
    near = [label for label in near if label not in strict]
    rest = [label for label in per_label if label not in (*strict, *near)]
    return (
        f"With an interval of the difference above 0, the maps find: {', '.join(strict) or 'nothing'}; allowing half a "
        f"cell also {', '.join(near) or 'nothing'}. They do not, so far: {', '.join(rest) or 'nothing'}. A finding can "
        "be predicted well from somewhere else on the film than where it lies, which is what this table is for; real "
        "cohorts have no such masks to show it."
    )
