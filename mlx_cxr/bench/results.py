"""Results of a benchmark run: ratios, targets, tables, and the files that hold them."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cxr.bench import grad_cam, inference, plot, training
from mlx_cxr.bench.contenders import Row, fastest
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import write_record, write_text
from mlx_cxr.core.formatting import number
from mlx_cxr.pages.readme import replace_block

log = logging.getLogger("mlx_cxr")

TARGET_BATCH = 8
"""Images per call at which the targets are set."""
LARGEST_RATIO = {"inference": 2.0, "training": 3.5, "grad_cam": 1.3, "epoch": 1.05}
"""Targets for two Linux cores with OpenBLAS, 224 px, float32: MLX's time over PyTorch's on the CPU, that of 14 maps
over a forward pass, that of a step in the loop over a bare one."""
LARGEST_LORA_GB = 8.0
"""Target of the peak of a LoRA step at full size."""
_CONVERTS = 1.2
MAC_COMMAND = "python -m mlx_cxr.benchmark --against torch --update_readme README.md"


@dataclass(frozen=True)
class Ratio:
    """One line of the short table.

    Attributes:
        what: such as `forward, batch 8`.
        mlx: MLX's row.
        other: what it is held against; None where it stands alone.
        compiled: `torch.compile`'s row, where it worked.
        limit: the largest ratio wanted; None where there is no target.
    """

    what: str
    mlx: Row
    other: Row | None
    compiled: Row | None = None
    limit: float | None = None

    @property
    def value(self) -> float | None:
        """MLX's time over the other's."""
        if self.other is None or not self.other.ms_per_sample:
            return None
        return self.mlx.ms_per_sample / self.other.ms_per_sample

    @property
    def met(self) -> bool | None:
        """True where the target is met; None without one or without a ratio, and on a GPU, as targets are the CPU's."""
        if self.limit is None or self.value is None or self.mlx.device != "cpu":
            return None
        return self.value <= self.limit


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """The comparisons that the targets are about, at each batch size that was timed.

    Inference takes each side's fastest float32 way, PyTorch's without `torch.compile`, which stands beside it.
    """
    lines = []
    for images in _batches(rows, inference.SECTION):
        here = [row for row in rows if row.section == inference.SECTION and row.samples == images]
        ours = fastest(here, framework="mlx", precision="float32")
        inductor = fastest(here, name=inference.INDUCTOR)
        eager = fastest([row for row in here if row is not inductor], framework="torch", precision="float32")
        if ours:
            limit = LARGEST_RATIO["inference"] if images == TARGET_BATCH else None
            lines.append(Ratio(f"forward, batch {images}", ours, eager, inductor, limit))
    for section, what, names, against in (
        (training.SECTION, "training step", (training.OURS, training.IN_PARTS), training.EAGER),
        (grad_cam.SECTION, "14-label Grad-CAM", (grad_cam.AT_ONCE,), grad_cam.FORWARD),
        (training.EPOCH, "epoch of the loop", (training.LOOPED,), training.BARE),
    ):
        for images in _batches(rows, section):
            here = [row for row in rows if row.section == section and row.samples == images]
            ours = fastest([row for row in here if row.name in names])
            if ours:
                limit = LARGEST_RATIO[section] if images == TARGET_BATCH else None
                lines.append(Ratio(f"{what}, batch {images}", ours, fastest(here, name=against), None, limit))
    return lines


@claims(lambda folder, *_, **__: folder)
def write_results(
    folder: Path, result: Mapping[str, Any], rows: Sequence[Row], record: Mapping[str, Any], update_readme: Path | None
) -> Path:
    """Write `benchmark.json`, `.csv`, `.md`, `.png` and the README's block, and log which targets are met.

    Returns:
        The path of `benchmark.json`.
    """
    targets = [ratio_entry(line) for line in ratios(rows)]
    lora = lora_entry(result["teacher"])
    write_text(folder / "benchmark.csv", table_csv(rows))
    write_text(folder / "benchmark.md", full_page(result, rows))
    plot.plot(folder / "benchmark.png", result, rows)
    found = {"ratios": [*targets, *([lora] if lora else [])], "rows": [row.plain() for row in rows]}
    path = write_record(folder / "benchmark.json", {**result, **found, "provenance": record})
    if update_readme is not None:
        replace_block(update_readme, "benchmark", readme_block(result, rows))
    for entry in targets:
        if entry["met"] is not None:
            log.info(
                "%s: %.2f of %s, at most %g wanted: %s",
                *(entry[key] for key in ("what", "ratio", "against", "at_most")),
                "met" if entry["met"] else "NOT MET",
            )
    log.info("tables in %s", folder / "benchmark.md")
    return path


def table_csv(rows: Sequence[Row]) -> str:
    """All rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0].plain()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.plain() for row in rows)
    return out.getvalue()


def ratio_entry(line: Ratio) -> dict[str, Any]:
    """A line of the short table as JSON-ready data."""
    return {
        "what": line.what,
        "mlx": line.mlx.name,
        "against": None if line.other is None else line.other.name,
        "ratio": line.value,
        "at_most": line.limit,
        "met": line.met,
    }


def lora_entry(teacher: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The memory target of the full-size LoRA step; None where that was not run."""
    if teacher is None or teacher["size"] != "full":
        return None
    peak, estimate = (teacher["training"][key] / 1e9 for key in ("peak_bytes", "estimate_bytes"))
    return {
        "what": f"LoRA step at full size, {teacher['precision']}"
        + (f", {teacher['bits']}-bit base" if teacher["bits"] else ""),
        "peak_gb": peak,
        "estimate_gb": estimate,
        "at_most_gb": LARGEST_LORA_GB,
        "met": max(peak, estimate) <= LARGEST_LORA_GB,
    }


def readme_block(result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The short table, with the machine it is of and the command that makes it on a Mac."""
    machine, torch = result["machine"], result["torch"]
    cores = f"{machine['cores']} cores" + (f", {machine['blas']}" if machine["blas"] else "")
    against = f", against PyTorch {torch['version']} on {torch['device']}" if torch else ""
    load = " and ".join(number(result[when]["load_average"], 1) for when in ("before", "after"))
    lines = [
        f"Measured on {machine['kind']} ({machine['name']}, {cores}){against}, films of {result['settings']['size']} "
        "px, float32: median milliseconds per film, all taking turns in one process. Load average before and after: "
        f"{load}. These lines are written by the run (`--update_readme`).",
        "",
        "| what | MLX | held against | ratio | target for two Linux cores |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [_ratio_line(line) for line in ratios(rows)]
    lines += [
        f"| {row.name}, batch {row.samples} | {_ms(row)} per study | {row.note} | | |"
        for row in rows
        if row.section == "teacher"
    ]
    if entry := lora_entry(result["teacher"]):
        lines.append(
            f"| {entry['what']} | peak {entry['peak_gb']:.1f} GB | estimate {entry['estimate_gb']:.1f} GB | | "
            f"at most {entry['at_most_gb']:.0f} GB: {_met(entry['met'])} |"
        )
    if machine["kind"] != "metal":
        lines += ["", f"None of this is Metal. On a Mac, `{MAC_COMMAND}` puts MLX against PyTorch MPS here."]
    return "\n".join(lines)


def full_page(result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Everything as Markdown: machine, peaks, targets, and a table per section."""
    before, after = result["before"], result["after"]
    drift = after["reference_gflops"] / before["reference_gflops"]
    lines = [
        "# Benchmark",
        "",
        readme_block(result, rows),
        "",
        f"Reference product (float32, side 1024): {before['reference_gflops']:.0f} GFLOP/s at the start, "
        f"{after['reference_gflops']:.0f} at the end (x {drift:.2f}; well below 1 means heat or neighbours).",
    ]
    lines += ["", *(f"Heat: {state['thermal']}" for state in (before, after) if state["thermal"])]
    if result["peak"]:
        bandwidth = ", ".join(f"{who} {value:.1f}" for who, value in result["peak"]["bandwidth_gbs"].items())
        lines += ["", "## peak", "", "| matrix product | GFLOP/s |", "| --- | ---: |"]
        lines += [f"| {who} | {value:.1f} |" for who, value in result["peak"]["gflops"].items()]
        lines += ["", f"Memory, GB/s read and written: {bandwidth}."]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", "", *_section_table([row for row in rows if row.section == section])]
    lines += [
        "",
        "Quartiles in brackets. `share` is GFLOP/s over the peak that the same framework reached in a matrix product "
        "of that precision; `bound` is the least time that measured peak and bandwidth allow a pass layer by layer; "
        "both are left out where a pass beats its precision's matrix products, as it is computed in another. "
        "`differs` is the largest difference of the output from MLX's float32 network on stock operations, in "
        "multiples of its largest value, and what is tolerated.",
    ]
    return "\n".join(lines) + "\n"


def _section_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| contender | device | batch | ms per sample | rounds (warm-ups) | GFLOP/s | share | bound | differs | note |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        timing, scale = row.timing, 1000 / row.samples
        # Faster than that precision's own matrix products: the framework converts, and they are no yardstick.
        converts = row.share_of_peak is not None and row.share_of_peak > _CONVERTS
        cells = [
            row.name,
            row.device,
            str(row.samples),
            row.status if timing is None else f"{_ms(row)} [{scale * timing.lower:.3g}, {scale * timing.upper:.3g}]",
            "" if timing is None else f"{timing.rounds} ({timing.warmups})",
            "" if row.gflops is None else f"{row.gflops:.0f}",
            "" if row.share_of_peak is None or converts else f"{100 * row.share_of_peak:.0f} %",
            "" if row.bound_seconds is None or converts else f"{scale * row.bound_seconds:.3g}",
            "" if row.difference is None else f"{row.difference:.1e} of {row.tolerance:.0e}",
            row.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio_line(line: Ratio) -> str:
    held = "" if line.other is None else f"{_ms(line.other)} ({line.other.name})"
    if line.compiled is not None and line.compiled.timing is not None:
        held += f"; {_ms(line.compiled)} ({line.compiled.name})"
    target = "" if line.limit is None else f"at most {line.limit:g}x"
    if line.met is not None:
        target += f": {_met(line.met)}"
    ratio = "" if line.value is None else f"{line.value:.2f}x"
    return f"| {line.what} | {_ms(line.mlx)} ({line.mlx.name}) | {held} | {ratio} | {target} |"


def _ms(row: Row) -> str:
    return f"{row.ms_per_sample:.3g}"


def _met(met: bool) -> str:
    return "met" if met else "**not met**"


def _batches(rows: Sequence[Row], section: str) -> list[int]:
    return sorted({row.samples for row in rows if row.section == section and row.timing is not None})
