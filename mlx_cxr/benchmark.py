"""Measure what a machine can do: `python -m mlx_cxr.benchmark --config configs/mimic.yaml --teacher_size full`.

So far the teacher: one LoRA step and one scoring batch with random weights of the published size, with MLX's peak
memory beside the estimate that `lfm_finetune` makes before it starts. Writes `outputs/benchmark_teacher_<size>.json`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from mlx_cxr import runtime
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.errors import UserError, readable_errors
from mlx_cxr.labels import LABELS
from mlx_cxr.runs import provenance, write_json
from mlx_cxr.teacher.full_size import measure

log = logging.getLogger("mlx_cxr")


def run(config: Config, teacher_size: str = "full", tokens: int = 256) -> Path:
    """Measure, and return the path of the figures.

    Args:
        config: batch sizes, adapters and precision of `teacher` are used.
        teacher_size: `full` (LFM2.5-VL-1.6B) or `tiny`.
        tokens: length of each prompt.

    Raises:
        UserError: fewer tokens than there are findings to read.
        AdapterError: `teacher.lora` names what the base has not.
    """
    if tokens < len(LABELS):
        raise UserError(f"--tokens {tokens}: a prompt has a position for each of {len(LABELS)} findings")
    device = runtime.start("benchmark")
    figures = measure(teacher_size, config.teacher, tokens, config.seed)  # type: ignore[arg-type]
    count = figures["parameters"]
    log.info(
        "%s: %s parameters of language, %s of vision, %s trainable, %s",
        teacher_size,
        *(f"{count[part]:,}" for part in ("language", "vision", "trainable")),
        figures["precision"],
    )
    for what in ("training", "scoring"):
        entry = figures[what]
        log.info(
            "%s: %d studies of %d tokens in %.1f s (%.0f tokens/s); peak %.2f GB, estimate %.2f GB (x %.2f)",
            what,
            *entry["shape"],
            entry["seconds"],
            entry["shape"][0] * entry["shape"][1] / entry["seconds"],
            entry["peak_bytes"] / 1e9,
            entry["estimate_bytes"] / 1e9,
            entry["estimate_over_peak"],
        )
    record = provenance("benchmark", config.plain(), {}, device)
    return write_json(config.outputs / f"benchmark_teacher_{teacher_size}.json", {**figures, "provenance": record})


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mlx_cxr.benchmark", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--teacher_size", choices=("full", "tiny"), default="full")
    parser.add_argument("--tokens", type=int, default=256, help="length of each prompt")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    with readable_errors():
        run(load_config(args.config, args.overrides), args.teacher_size, args.tokens)


if __name__ == "__main__":
    main()
