"""What a README shows of an evaluated run: its tables and one picture, both chosen and written by rule."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cxr.errors import UserError
from mlx_cxr.evaluation.tables import closing_table
from mlx_cxr.readme import replace_block
from mlx_cxr.runs import atomic_path, read_json
from mlx_cxr.wording import NOT_CLINICAL, interval_text, number

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
