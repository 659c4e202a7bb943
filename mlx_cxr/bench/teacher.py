"""Time and memory of the teacher's LoRA step and scoring batch, with random weights."""

from __future__ import annotations

from typing import Any, Literal

from mlx_cxr import runtime
from mlx_cxr.bench.contenders import Row
from mlx_cxr.bench.timing import summary
from mlx_cxr.config_sections import TeacherConfig
from mlx_cxr.teacher import full_size

SECTION = "teacher"
_ROUNDS = {"tiny": 10, "full": 1}


def measure(
    size: Literal["full", "tiny"], config: TeacherConfig, tokens: int, seed: int = 0, bits: Literal[4, 8] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """A row for the LoRA step and one for scoring, and the figures they are from (`full_size.measure`).

    Of the tiny size ten steps after one that compiles; of the full size one, compiling included.

    Args:
        size: `full` or `tiny`.
        config: batch sizes, adapters and precision.
        tokens: length of each prompt.
        seed: of the weights.
        bits: of a quantized base.
    """
    rounds = _ROUNDS[size]
    figures = full_size.measure(size, config, tokens, seed, rounds, bits)
    rows = []
    for what, name in (("training", "LoRA step"), ("scoring", "scoring")):
        entry = figures[what]
        memory = f"peak {entry['peak_bytes'] / 1e9:.2f} GB, estimate {entry['estimate_bytes'] / 1e9:.2f} GB"
        once = "" if rounds > 1 else "; once, compiling included"
        rows.append(
            Row(
                SECTION,
                f"{name}, {size} teacher" + (f", {bits} bits" if bits else ""),
                "mlx",
                runtime.device_kind(),
                figures["precision"],
                entry["shape"][0],
                "timed",
                note=f"{tokens} tokens a study; {memory}{once}",
                timing=summary(entry["seconds"], int(rounds > 1)),
            )
        )
    return rows, figures
