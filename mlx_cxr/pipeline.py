"""Run every stage of an experiment in order: `python -m mlx_cxr.pipeline --config configs/demo.yaml`.

A stage whose configuration, inputs and outputs are unchanged is skipped, and the reason is said either way.
What was done is recorded in `<data.work_dir>/pipeline.json` and `outputs/<run>/pipeline.json`. A gate of the
configuration that is not met stops the pipeline with status 3.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cxr import build_manifest, evaluate_cnn, make_demo_data, prepare_images, runtime, train_cnn
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.errors import UserError, readable_errors
from mlx_cxr.evaluation.tables import closing_table
from mlx_cxr.freshness import Ledger, fingerprint
from mlx_cxr.runs import RunExistsError, read_json
from mlx_cxr.showcase import update_readme

log = logging.getLogger("mlx_cxr")


class GateError(UserError, RuntimeError):
    """A figure lies below what the configuration asks for."""


@dataclass(frozen=True)
class Step:
    """A stage as the pipeline sees it.

    Attributes:
        name: the stage.
        run: does it; gets whether to go on with a stopped run.
        settings: top-level configuration keys it reads.
        inputs: files it reads; looked for when its turn comes.
        outputs: files it leaves.
        in_run: whether it writes into the run's folder, rather than the data folder.
    """

    name: str
    run: Callable[[bool], Any]
    settings: tuple[str, ...]
    inputs: Callable[[], list[Path]]
    outputs: tuple[Path, ...]
    in_run: bool = False


def steps(config: Config, run_name: str | None = None) -> list[Step]:
    """The stages of an experiment, in order; the synthetic cohort is made only where the data are synthetic."""
    run_dir = config.run_dir(run_name)
    pixel_index = config.pixels_path.with_suffix(".json")
    made = [config.manifest_path, pixel_index]
    weights = run_dir / "best_model.safetensors"
    chain = [
        Step(
            "build_manifest",
            lambda _: build_manifest.run(config),
            ("seed", "data"),
            lambda: build_manifest.source_tables(config),
            (config.manifest_path, config.splits_path),
        ),
        Step(
            "prepare_images",
            lambda _: prepare_images.run(config),
            ("pixels",),
            lambda: [config.manifest_path],
            (config.pixels_path, pixel_index),
        ),
        Step(
            "train_cnn",
            lambda resume: train_cnn.run(config, run_name, resume=resume, overwrite=not resume),
            ("seed", "labels", "model", "augment", "training", "pixels"),
            lambda: made,
            (weights, run_dir / "training.json"),
            in_run=True,
        ),
        Step(
            "evaluate_cnn",
            lambda _: evaluate_cnn.run(config, run_name),
            ("seed", "evaluation", "explain"),
            lambda: [*made, weights],
            tuple(run_dir / name for name in ("predictions.csv", "test_results.json", "findings.md")),
            in_run=True,
        ),
    ]
    if config.data.synthetic:
        tables = config.data.root / "mimic-cxr-2.0.0-metadata.csv.gz"
        # A cohort of an older version gives way to this one's; anything else in its place is still refused.
        demo = Step(
            "make_demo_data", lambda _: make_demo_data.run(config, overwrite=True), ("seed", "demo"), list, (tables,)
        )
        chain.insert(0, demo)
    return chain


def run(
    config: Config,
    run_name: str | None = None,
    *,
    start_at: str | None = None,
    overwrite: bool = False,
    ignore_gates: bool = False,
    readme: Path | None = None,
) -> Path:
    """Bring an experiment up to date, and return the run's folder.

    Args:
        config: the experiment.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.
        start_at: run this stage and those after it, up to date or not.
        overwrite: replace a run of that name that was made with another configuration or other data.
        ignore_gates: go on, and say so, where a gate is not met.
        readme: a README whose figures and picture are replaced with this run's.

    Raises:
        GateError: a gate is not met.
        RunExistsError: the run is there, made differently, and `overwrite` is false.
        UserError: an unknown `start_at`, or whatever a stage raises.
    """
    runtime.start("pipeline")
    run_dir, begun = config.run_dir(run_name), time.perf_counter()
    chain = steps(config, run_name)
    names = [step.name for step in chain]
    if start_at is not None and start_at not in names:
        raise UserError(f"--start_at {start_at}: the stages of this experiment are {', '.join(names)}")
    forced = names[names.index(start_at) :] if start_at else []
    data_ledger, run_ledger = Ledger(config.data.work_dir / "pipeline.json"), Ledger(run_dir / "pipeline.json")
    data_changed = False
    for number, step in enumerate(chain, 1):
        ledger = run_ledger if step.in_run else data_ledger
        plain = config.plain()
        now = fingerprint({key: plain[key] for key in step.settings}, step.inputs())
        why = ledger.why_run(step.name, now, step.outputs) or ("asked for" if step.name in forced else "")
        if not why and data_changed and not step.in_run:
            # Films can change under tables that do not; the stage itself looks at the films.
            why = "an earlier stage ran"
        title = f"[{number}/{len(chain)}] {step.name}"
        if not why:
            log.info("%s: up to date, skipped (configuration, inputs and outputs unchanged)", title)
        else:
            log.info("%s: runs (%s)", title, why)
            resume = False
            if step.name == "train_cnn":
                resume = _may_resume(run_dir, ledger.changes(step.name, now), step.name in forced, overwrite)
            ledger.record(step.name, now, finished=False)
            step.run(resume)
            ledger.record(step.name, now, finished=True)
            data_changed = data_changed or not step.in_run
        if step.name == "train_cnn":
            check_gate(run_dir, config.pipeline.min_val_auc, ignore_gates)
    results, seconds = read_json(run_dir / "test_results.json"), time.perf_counter() - begun
    if readme is not None:
        update_readme(readme, run_dir, seconds)
    log.info("\n%s\nDone in %.0f s. To open:", closing_table(results), seconds)
    for name in ("results.md", "findings.md", "roc.png", "reliability.png", "grad_cam", "test_results.json"):
        if (run_dir / name).exists():
            log.info("  %s", run_dir / name)
    return run_dir


def _may_resume(run_dir: Path, changes: str, forced: bool, overwrite: bool) -> bool:
    """Whether a run that is there is gone on with; False means it is made anew.

    Raises:
        RunExistsError: it is there, finished or begun with something else, and may not be replaced.
    """
    if not (run_dir / "config.json").exists() or forced or overwrite:
        return False
    recorded = (run_dir / "pipeline.json").exists()
    if recorded and not changes:
        return not (run_dir / "training.json").exists()
    why = changes or "it was not made by the pipeline"
    raise RunExistsError(
        f"{run_dir} exists and would be replaced ({why}); choose another --run_name, or pass --overwrite"
    )


def check_gate(run_dir: Path, minimum: float, ignore: bool = False) -> None:
    """Hold a trained run's validation macro AUC (per film, -1 and empty as 0) against the configuration's gate.

    Raises:
        GateError: it is lower, and `ignore` is false.
    """
    reached = read_json(run_dir / "training.json")["best_auc"]
    if reached >= minimum:
        log.info("gate met: validation macro AUC %.4f >= %.2f", reached, minimum)
        return
    message = f"gate not met: validation macro AUC {reached:.4f} < pipeline.min_val_auc {minimum:.2f} ({run_dir})"
    if not ignore:
        raise GateError(
            f"{message}. Train longer or on more data, lower the gate in the configuration, or pass --ignore_gates"
        )
    log.warning("WARNING: %s; going on because of --ignore_gates", message)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mlx_cxr.pipeline", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    parser.add_argument("--n_studies", type=int, help="data.n_studies: sample so many studies")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start_at", metavar="STAGE", help="run this stage and those after it, up to date or not")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that was made differently")
    parser.add_argument("--ignore_gates", action="store_true", help="go on where a gate is not met")
    parser.add_argument(
        "--update_readme", type=Path, metavar="README.md", help="put this run's figures and a map into it"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; status 2 for an error, 3 for a gate that is not met."""
    args = build_parser().parse_args(argv)
    with readable_errors():
        config = load_config(args.config, args.overrides, seed=args.seed, data__n_studies=args.n_studies)
        try:
            run(
                config,
                args.run_name,
                start_at=args.start_at,
                overwrite=args.overwrite,
                ignore_gates=args.ignore_gates,
                readme=args.update_readme,
            )
        except GateError as error:
            log.error("error: %s", error)
            raise SystemExit(3) from None


if __name__ == "__main__":
    main()
