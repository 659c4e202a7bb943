"""Time training and inference on this machine: `python -m mlx_cxr.benchmark [--against torch]`.

Times the ResNet-18's forward pass and training step, Grad-CAM, the training input and the teacher, in one process and
in turn, against PyTorch with the same weights where asked; outputs are compared first. Without a configuration or a run
the weights are random and the images are noise of 224 px, which cost the same. Writes `outputs/benchmark/`:
`benchmark.json`, `.csv`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_cxr.bench import SECTIONS
from mlx_cxr.core import device
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")

BATCH_SIZES, QUICK_BATCH_SIZES = (1, 8, 32, 64), (1, 8)
MINUTES, QUICK_MINUTES = 3.5, 0.4
_COMPILE_SECONDS = 60.0
_BUSY = 0.5
"""Load average per core from which figures are doubtful."""


class BenchmarkError(UserError, ValueError):
    """Options that cannot be met."""


def run(
    config: Config | None = None,
    run_name: str | Path | None = None,
    *,
    against: Literal["torch"] | None = None,
    only: Sequence[str] = SECTIONS,
    batch_sizes: Sequence[int] | None = None,
    size: int | None = None,
    minutes: float | None = None,
    quick: bool = False,
    teacher_size: Literal["tiny", "full", "none"] = "tiny",
    tokens: int = 256,
    quantize: Literal[4, 8] | None = None,
    update_readme: Path | None = None,
) -> Path:
    """Measure, and return the path of `benchmark.json`.

    Args:
        config: image size, network, teacher, seed and `outputs`; None takes the defaults.
        run_name: name or folder of a trained run, for its weights and image size; None draws random weights.
        against: `torch` to measure PyTorch too, on the best device it has.
        only: sections.
        batch_sizes: images per forward pass; None takes 1, 8, 32, 64, or when `quick` 1 and 8.
        size: side of the images in pixels; None takes that of the run, or of the configuration.
        minutes: of an ordinary run, the teacher aside; None takes 3.5, or when `quick` 0.4.
        quick: fewer batch sizes, fewer rounds, no `torch.compile`.
        teacher_size: `full` (LFM2.5-VL-1.6B), `tiny`, or `none`.
        tokens: length of each of the teacher's prompts.
        quantize: bits of the teacher's base.
        update_readme: a Markdown file whose block `benchmark` gets the short table.

    Raises:
        BenchmarkError: an unknown section, a batch or image size that cannot be, or fewer tokens than findings.
        TorchMissingError: PyTorch is asked for and not installed.
        RecordError: no such run.
        AdapterError: `teacher.lora` names what the base has not.
    """
    from mlx_cxr.bench import results, run_all
    from mlx_cxr.bench.machine import machine_state
    from mlx_cxr.bench.torch_side import best_device, describe_torch
    from mlx_cxr.core.config import Config
    from mlx_cxr.core.config_schema import DataConfig

    batch_sizes = tuple(sorted(batch_sizes or (QUICK_BATCH_SIZES if quick else BATCH_SIZES)))
    _check(only, batch_sizes, size, tokens)
    if minutes is not None and not minutes > 0:
        raise BenchmarkError(f"--minutes {minutes:g}: give more than 0")

    torch_device = best_device() if against == "torch" else None
    config = config or Config(name="benchmark", data=DataConfig(root=Path(), work_dir=Path()))
    machine = device.start("benchmark")
    model, size, inputs = run_all.network_of(config, run_name, size)
    settings = run_all.Settings(
        size=size,
        batch_sizes=batch_sizes,
        torch_device=torch_device,
        only=tuple(only),
        minutes=(QUICK_MINUTES if quick else MINUTES) if minutes is None else minutes,
        compile_seconds=0.0 if quick else _COMPILE_SECONDS,
        seed=config.seed,
        teacher_size=None if teacher_size == "none" else teacher_size,
        tokens=tokens,
        bits=quantize,
    )
    torch = describe_torch(torch_device) if torch_device else None
    record = provenance("benchmark", config.plain(), inputs, machine)

    # Load and heat before and after say how far the figures can be trusted.
    before = machine_state()
    if (before["load_average"] or 0.0) > _BUSY * machine["cores"]:
        log.warning(
            "WARNING: load average %.1f on %d cores. Run this on an idle machine: other work slows some contenders "
            "more than others, as PyTorch's threads spin while they wait (OMP_WAIT_POLICY=passive stops that)",
            before["load_average"],
            machine["cores"],
        )
    rows, found = run_all.measure_all(model, config.teacher, settings)
    result: dict[str, Any] = {
        "schema": 1,
        "machine": machine,
        "torch": torch,
        "settings": {**vars(settings), "weights": "random" if run_name is None else str(run_name)},
        "before": before,
        "after": machine_state(),
        **found,
    }
    if not rows:
        raise BenchmarkError("nothing was measured: --only teacher and --teacher_size none exclude each other")
    return results.write_results(config.outputs / "benchmark", result, rows, record, update_readme)


def _check(only: Sequence[str], batch_sizes: Sequence[int], size: int | None, tokens: int) -> None:
    from mlx_cxr.core.labels import LABELS

    if unknown := sorted(set(only) - set(SECTIONS)):
        raise BenchmarkError(f"--only {','.join(unknown)}: sections are {', '.join(SECTIONS)}")
    if not all(count >= 1 for count in batch_sizes):
        raise BenchmarkError(f"--batch_sizes {','.join(map(str, batch_sizes))}: each is a film at least")
    if size is not None and size < 32:
        raise BenchmarkError(f"--size {size}: films have 32 px at least")
    if tokens < len(LABELS):
        raise BenchmarkError(f"--tokens {tokens}: a prompt has a position for each of {len(LABELS)} findings")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("benchmark", __doc__)
    parser.add_argument("--config", type=Path, help="YAML of an experiment; none is needed")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one key of it"
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME|FOLDER", help="a trained run, for its weights and size")
    parser.add_argument("--against", choices=("torch",), help="measure PyTorch too (the extra `bench`)")
    parser.add_argument(
        "--only", type=_names, default=SECTIONS, metavar="A,B", help=f"sections, of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--batch_sizes", type=_numbers, metavar="N,M", help="films per forward pass; default 1,8,32,64")
    parser.add_argument("--size", type=int, help="side of the films in pixels; default the run's, or 224")
    parser.add_argument("--minutes", type=float, help=f"how long, the teacher aside; default {MINUTES:g}")
    parser.add_argument("--quick", action="store_true", help="batches of 1 and 8, few rounds: about a minute")
    parser.add_argument("--teacher_size", choices=("tiny", "full", "none"), default="tiny")
    parser.add_argument("--tokens", type=int, default=256, help="length of each of the teacher's prompts")
    parser.add_argument("--quantize", type=int, choices=(4, 8), help="bits of the teacher's base")
    parser.add_argument(
        "--update_readme", type=Path, metavar="FILE", help="put the short table between its markers in this file"
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        if args.config is None and args.overrides:
            raise BenchmarkError("--set changes a configuration; give --config too")
        config = None if args.config is None else configuration(args)
        run(config, **{key: value for key, value in vars(args).items() if key not in ("config", "overrides")})


if __name__ == "__main__":
    main()
