"""Run every stage of an experiment in order: `python -m mlx_cxr.pipeline --config configs/demo.yaml`.

A stage whose configuration, inputs and outputs are unchanged is skipped, and the reason is said either way. What was
done is recorded in a `pipeline.json` in each folder that a stage writes: the data's, each run's, the comparison's.
A gate of the configuration that is not met ends the pipeline with status 3: that of the CNN at once, those of the
comparison when all is done.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr import compare_models, failure_analysis
from mlx_cxr.core.claim import claimed
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record
from mlx_cxr.core.ledger import NEVER, STOPPED, Ledger, fingerprint
from mlx_cxr.core.runs import RunExistsError
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started
from mlx_cxr.pipeline_steps import Step, steps

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")

PAGE = Path("app/streamlit_app.py")
"""From a checkout's folder."""


class GateError(UserError, RuntimeError):
    """A figure lies below what the configuration asks for."""


def run(
    config: Config,
    run_name: str | None = None,
    *,
    start_at: str | None = None,
    overwrite: bool = False,
    ignore_gates: bool = False,
    readme: Path | None = None,
) -> Path:
    """Bring an experiment up to date, and return the CNN run's folder.

    Args:
        config: the experiment.
        run_name: folder of the CNN under `outputs`; None takes `run_name` of the configuration.
        start_at: run this stage and those after it, up to date or not.
        overwrite: replace runs that were made with another configuration or other data.
        ignore_gates: go on, and say so, where a gate is not met.
        readme: a README whose figures and picture are replaced with this run's.

    Raises:
        GateError: a gate is not met.
        RunExistsError: a run is there, made differently, and `overwrite` is false.
        BaseUnavailableError: the teacher's base is not on this machine; said before anything runs.
        UserError: an unknown `start_at`, or whatever a stage raises.
    """
    from mlx_cxr.core import device
    from mlx_cxr.pages.readme import update_readme
    from mlx_cxr.pages.results_page import closing_table

    device.start("pipeline")
    if run_name is not None:
        config = config.model_copy(update={"run_name": run_name})
    if config.pipeline.teacher and config.teacher.tiny is None:
        _refuse_a_missing_base(config)
    run_dir, begun = config.run_dir(), time.perf_counter()
    chain = steps(config, overwrite)
    _refuse_a_name_for_two_runs(chain)
    names = [step.name for step in chain]
    if start_at is not None and start_at not in names:
        raise UserError(f"--start_at {start_at}: the stages of this experiment are {', '.join(names)}")
    forced = names[names.index(start_at) :] if start_at else []
    with ExitStack() as claims:
        # All of them at once, so that no other process steps in between two stages.
        for folder in dict.fromkeys(step.folder for step in chain):
            claims.enter_context(claimed(folder))
        _bring_up_to_date(config, chain, forced, overwrite, ignore_gates)
    seconds = time.perf_counter() - begun
    if readme is not None:
        update_readme(readme, run_dir, seconds)
    if config.pipeline.teacher:
        _close_with_comparison(config, seconds, ignore_gates, readme)
    else:
        log.info("\n%s\nDone in %.0f s. To open:", closing_table(read_record(run_dir / "test_results.json")), seconds)
        _say_where(run_dir, "results.md", "findings.md", "roc.png", "reliability.png", "grad_cam", "test_results.json")
        _say_page()
    return run_dir


def run_budgets(config: Config, budgets: Sequence[float], overwrite: bool = False) -> Path:
    """Run the experiment once for each label budget, in a folder of its own, and write what came of it.

    Args:
        config: the experiment; `labels.budget` is replaced.
        budgets: shares of the training patients, 1.0 for all of them.
        overwrite: as `run`.

    Returns:
        The folder `label_budgets_<name>` under `outputs`: a folder per budget as `outputs` is one, and
        `label_budgets.json`, `.csv`, `.md` and `.png`.

    Raises:
        UserError: the experiment has no teacher, or a budget is no share; and as `run`.
    """
    import pandas as pd

    from mlx_cxr.core.files import write_record, write_text
    from mlx_cxr.data.tables import write_table
    from mlx_cxr.pages.budget_page import budget_markdown, budget_rows, plot_budgets

    if not config.pipeline.teacher:
        raise UserError("--label_budgets: this experiment has no teacher (pipeline.teacher is false)")
    if wrong := [budget for budget in budgets if not 0 < budget <= 1]:
        raise UserError(f"--label_budgets: {wrong[0]} is no share of the patients above 0 and at most 1")
    folder, comparisons = config.outputs / f"label_budgets_{config.name}", {}
    for budget in sorted(set(budgets)):
        labels = config.labels.model_copy(update={"budget": budget if budget < 1 else None})
        one = config.model_copy(update={"labels": labels, "outputs": folder / f"{budget:g}"})
        run(one, overwrite=overwrite, ignore_gates=True)
        comparisons[float(budget)] = read_record(compare_models.comparison_dir(one) / "final_comparison.json")
    rows, synthetic = budget_rows(comparisons), config.data.synthetic
    write_record(folder / "label_budgets.json", {"schema": 1, "synthetic": synthetic, "rows": rows})
    flat = [{**row, **{key: row["roc_auc"][key] for key in ("value", "low", "high")}} for row in rows]
    write_table(folder / "label_budgets.csv", pd.DataFrame(flat).drop(columns="roc_auc"))
    write_text(folder / "label_budgets.md", budget_markdown(rows, synthetic))
    plot_budgets(folder / "label_budgets.png", rows, synthetic)
    log.info("%s", (folder / "label_budgets.md").read_text(encoding="utf-8"))
    return folder


def _bring_up_to_date(
    config: Config, chain: Sequence[Step], forced: Sequence[str], overwrite: bool, ignore_gates: bool
) -> None:
    """Run those steps of a chain that are not up to date."""
    ledgers = {step.folder: Ledger(step.folder / "pipeline.json") for step in chain}
    data_changed = False
    for number, step in enumerate(chain, 1):
        ledger = ledgers[step.folder]
        now = fingerprint({key: _setting(config, key) for key in step.settings}, step.inputs())
        why = ledger.why_run(step.name, now, step.left) or ("asked for" if step.name in forced else "")
        if not why and data_changed and step.looks:
            # Images and reports can change under tables that do not; the stage itself looks at them.
            why = "an earlier stage ran"
        title = f"[{number}/{len(chain)}] {step.name}"
        if not why:
            log.info("%s: up to date, skipped (configuration, inputs and outputs unchanged)", title)
        else:
            log.info("%s: runs (%s)", title, why)
            _say_time_to_come(ledgers, chain[number - 1 :])
            resume = step.trains and _may_resume(step, why, step.name in forced, overwrite)
            ledger.begin(step.name, now)
            started = time.perf_counter()
            step.run(resume)
            seconds = time.perf_counter() - started
            ledger.finish(step.name, now, step.left, seconds)
            log.info("%s took %.0f s", step.name, seconds)
            data_changed = data_changed or step.folder == config.sample_dir
        if step.name == "train_cnn":
            check_gate(step.folder, config.pipeline.min_val_auc, ignore_gates)


def _say_time_to_come(ledgers: Mapping[Path, Ledger], left: Sequence[Step]) -> None:
    """Log the time that the steps from here on took when they were last run, if all of them ever were."""
    took = [ledgers[step.folder].seconds(step.name) for step in left]
    known = [seconds for seconds in took if seconds is not None]
    if len(known) == len(took):
        log.info("from here to the end, all stages took %.1f min the last time", sum(known) / 60)


def _refuse_a_name_for_two_runs(chain: Sequence[Step]) -> None:
    """Before the second run replaces the first."""
    made: dict[Path, str] = {}
    for step in chain:
        if step.trains and made.setdefault(step.folder, step.name) != step.name:
            raise UserError(
                f"{made[step.folder]} and {step.name} would both make the run {step.folder}; give each a name of its "
                "own (run_name, teacher.run_name, distillation.run_name)"
            )


def _refuse_a_missing_base(config: Config) -> None:
    """Before hours of training, not after."""
    from mlx_cxr.teacher.base_model import BaseUnavailableError, find_base

    try:
        find_base(config.teacher.base, config.weights_dir)
    except BaseUnavailableError as error:
        raise BaseUnavailableError(f"{error}; or go without a teacher: --set pipeline.teacher=false") from None


def _close_with_comparison(config: Config, seconds: float, ignore_gates: bool, readme: Path | None) -> None:
    from mlx_cxr.pages.comparison_statement import gate_lines
    from mlx_cxr.pages.comparison_tables import closing_comparison, comparison_block
    from mlx_cxr.pages.readme import replace_block

    folder, student = compare_models.comparison_dir(config), config.run_dir(config.distillation.run_name)
    comparison = read_record(folder / "final_comparison.json")
    if readme is not None:
        replace_block(readme, compare_models.BLOCK, comparison_block(comparison))
    closing = failure_analysis.closing_lines(student / "failure_analysis")
    log.info("\n%s\n\n%s\nDone in %.0f s. To open:", closing_comparison(comparison), closing, seconds)
    _say_where(folder, "final_comparison.md", "calibration_comparison.png")
    _say_where(student, "failure_analysis/summary.md", "results.md", "findings.md", "grad_cam")
    _say_where(config.run_dir(config.teacher.run_name), "results.md", "text_explanation/index.html")
    _say_where(config.run_dir(), "results.md", "findings.md")
    _say_page()
    for gate, line in zip(comparison["gates"].values(), gate_lines(comparison), strict=True):
        if not gate["met"] and not ignore_gates:
            raise GateError(f"gate {line}. Everything is written; --ignore_gates ends with success all the same")


def _say_page() -> None:
    if PAGE.exists():
        log.info("Or all of it as a page, with films and reports of your own: .venv/bin/streamlit run %s", PAGE)


def _say_where(folder: Path, *names: str) -> None:
    for name in names:
        if (folder / name).exists():
            log.info("  %s", folder / name)


def _setting(config: Config, key: str) -> Any:
    value = config.plain()
    for part in key.split("."):
        value = value[part]
    return value


def _may_resume(step: Step, why: str, forced: bool, overwrite: bool) -> bool:
    """True where a run that is there is resumed; False where it is made anew.

    Args:
        why: from `Ledger.why_run`.

    Raises:
        RunExistsError: it is there, finished or begun with something else, and may not be replaced.
    """
    if not (step.folder / "config.json").exists() or forced or overwrite:
        return False
    if why == STOPPED:
        return True
    reason = f"{step.name} did not make it" if why == NEVER else why
    raise RunExistsError(
        f"{step.folder} exists and would be replaced ({reason}); choose another --run_name, or pass --overwrite"
    )


def check_gate(run_dir: Path, minimum: float, ignore: bool = False) -> None:
    """Hold a trained run's validation macro AUC (per image, -1 and empty as 0) against the configuration's gate.

    Raises:
        GateError: it is lower, and `ignore` is false.
    """
    reached = read_record(run_dir / "training.json")["best_auc"]
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
    parser = stage_parser("pipeline", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    parser.add_argument("--n_studies", type=int, help="data.n_studies: sample so many studies")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--start_at", metavar="STAGE", help="run this stage and those after it, up to date or not")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that was made differently")
    parser.add_argument("--ignore_gates", action="store_true", help="go on where a gate is not met")
    parser.add_argument(
        "--label_budgets",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="once for each share of the training patients whose labels may be used, such as 0.05 0.1 0.25 1",
    )
    parser.add_argument(
        "--update_readme", type=Path, metavar="README.md", help="put this run's figures and a map into it"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; status 2 for an error, 3 for a gate that is not met."""
    with started(build_parser(), argv) as args:
        config = configuration(args, seed=args.seed, data__n_studies=args.n_studies)
        if args.label_budgets:
            run_budgets(config, args.label_budgets, args.overwrite)
            return
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
