"""Compare CNN, teacher, student and controls: `python -m mlx_cxr.compare_models --config configs/demo.yaml`.

Reads predictions, results and costs of runs that are scored already, and writes into `outputs/comparison_<name>/`:
`final_comparison.json`, `.csv` and `.md`, `calibration_comparison.png`, and `roc_<protocol>.png` for each protocol. A
gate that is not met is recorded and said; the pipeline decides what follows. `--cohort` adds figures on other cohorts,
from `evaluate_external`. Nothing is fitted, and MLX is not needed.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import read_record, write_record, write_text
from mlx_cxr.core.runs import bag_of_words_name, provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config
    from mlx_cxr.evaluation.scored_runs import ScoredRun

log = logging.getLogger("mlx_cxr")

BLOCK = "comparison"


@claims(lambda config, *, output_dir=None, **_: output_dir or comparison_dir(config))
def run(
    config: Config,
    *,
    cnn_run: str | None = None,
    teacher_run: str | None = None,
    student_run: str | None = None,
    control_runs: Sequence[str] | None = None,
    graded_teacher_runs: Sequence[str] = (),
    bag_of_words_run: str | None = None,
    cohorts: Sequence[str] = (),
    readme: Path | None = None,
    output_dir: Path | None = None,
) -> Path:
    """Compare runs under `outputs`, and return the folder of the comparison.

    Args:
        config: the experiment; `outputs`, `seed`, `evaluation`, `comparison` and the runs' names are used.
        cnn_run: None takes `run_name` of the configuration.
        teacher_run: None takes `teacher.run_name`.
        student_run: None takes `distillation.run_name`.
        control_runs: students with something else in the teacher's place; None takes `control_run_name` of each of
            `comparison.controls`.
        graded_teacher_runs: further teachers, which may read something else.
        bag_of_words_run: the word counts beside the teacher; None takes the run that `bag_of_words` makes beside it,
            if it is there.
        cohorts: names of other cohorts that runs were scored on, whose figures are shown beside.
        readme: a README whose block `comparison` is replaced.
        output_dir: None takes `comparison_dir`.

    Raises:
        ComparisonError: a run lacks a file, or no run was scored on one of `cohorts` (names the command that makes
            it), or runs do not belong together.
        RecordError: a file is not what it should be, or a run was scored on one of `cohorts` in another state.
        UserError: the README has no such block; the comparison itself is written then.
    """
    from mlx_cxr.data.tables import write_table
    from mlx_cxr.evaluation.comparison import compare
    from mlx_cxr.evaluation.external import results_path
    from mlx_cxr.evaluation.scored_runs import open_scored_run
    from mlx_cxr.pages.comparison_page import comparison_markdown
    from mlx_cxr.pages.comparison_statement import gate_lines
    from mlx_cxr.pages.comparison_tables import comparison_block, comparison_table
    from mlx_cxr.pages.readme import replace_block

    student_run = student_run or config.distillation.run_name
    if control_runs is None:
        control_runs = [control_run_name(student_run, targets) for targets in config.comparison.controls]
    roles = [
        ("cnn", cnn_run or config.run_name),
        ("teacher", teacher_run or config.teacher.run_name),
        ("student", student_run),
        *(("control", name) for name in control_runs),
        *(("graded teacher", name) for name in graded_teacher_runs),
    ]
    words = bag_of_words_run or bag_of_words_name(teacher_run or config.teacher.run_name)
    if bag_of_words_run or (config.run_dir(words) / "predictions.csv").exists():
        roles.append(("bag of words", words))
    runs = [open_scored_run(config.run_dir(name), role, cohorts) for role, name in roles]
    folder = output_dir or comparison_dir(config)
    files = ("predictions.csv", "test_results.json", "cost.json", "teacher.json")
    inputs = {f"{one.name}/{file}": one.folder / file for one in runs for file in files if (one.folder / file).exists()}
    external = [(one, results_path(one.folder, cohort)) for one in runs for cohort in one.external]
    inputs |= {f"{one.name}/{path.relative_to(one.folder).as_posix()}": path for one, path in external}
    comparison = compare(
        runs,
        experiment=config.name,
        min_retention=config.comparison.min_retention,
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed,
        bins=config.evaluation.calibration_bins,
        provenance=provenance("compare_models", config.plain(), inputs),
        cohorts=cohorts,
    )
    write_record(folder / "final_comparison.json", comparison)
    write_table(folder / "final_comparison.csv", comparison_table(comparison))
    pictures = draw(runs, folder, config)
    write_text(folder / "final_comparison.md", comparison_markdown(comparison, [path.name for path in pictures]))
    log.info("tables and pictures in %s", folder / "final_comparison.md")
    for gate, line in zip(comparison["gates"].values(), gate_lines(comparison), strict=True):
        if not gate["met"]:
            log.warning("WARNING: gate %s", line)
    if readme is not None:
        replace_block(readme, BLOCK, comparison_block(comparison))
    return folder


def draw(runs: Sequence[ScoredRun], folder: Path, config: Config) -> list[Path]:
    """Pictures of CNN, teacher and student on the studies that the table is about; returns their paths."""
    from mlx_cxr.core.labels import SCORING_PROTOCOLS
    from mlx_cxr.evaluation.scored_runs import BESIDE, shared_studies
    from mlx_cxr.pages.comparison_plots import Arm, plot_calibration_comparison, plot_roc_comparison

    main = [one for one in runs if one.role not in BESIDE]
    study_ids = shared_studies(main)
    arms = [Arm(one.title, one.on(study_ids), one.points) for one in main if one.role != "control"]
    synthetic, fitted_under = main[0].settings["synthetic"], main[0].settings["fitted_under"]
    paths = [plot_roc_comparison(folder / f"roc_{name}.png", arms, name, synthetic) for name in SCORING_PROTOCOLS]
    calibration = folder / "calibration_comparison.png"
    bins = config.evaluation.calibration_bins
    return [*paths, plot_calibration_comparison(calibration, arms, fitted_under, synthetic, bins)]


def comparison_dir(config: Config) -> Path:
    """Folder of an experiment's comparison; the name keeps two experiments in one outputs folder apart."""
    return config.outputs / f"comparison_{config.name}"


def control_run_name(student_run: str, targets: str) -> str:
    """The run of a control in `comparison.controls`, such as `student_v1_shuffled`."""
    return f"{student_run}_{targets}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("compare_models", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--cnn_run", help="run under outputs/; default: run_name of the configuration")
    parser.add_argument("--teacher_run", help="default: teacher.run_name")
    parser.add_argument("--student_run", help="default: distillation.run_name")
    parser.add_argument(
        "--control_run",
        nargs="*",
        metavar="RUN",
        help="students trained with another distillation.targets; default: <student_run>_<control> for each of "
        "comparison.controls; without a name: none",
    )
    parser.add_argument(
        "--graded_teacher_run", nargs="+", default=[], metavar="RUN", help="further teachers, by what they may read"
    )
    parser.add_argument(
        "--bag_of_words_run", metavar="RUN", help="default: what bag_of_words made beside the teacher, if it is there"
    )
    parser.add_argument(
        "--cohort",
        action="append",
        default=[],
        metavar="NAME",
        help="show the figures on another cohort that evaluate_external scored runs on; repeat it for several",
    )
    parser.add_argument("--update_readme", type=Path, metavar="README.md", help="replace its block `comparison`")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/comparison_<name of the configuration>")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        from mlx_cxr.pages.comparison_tables import closing_comparison

        folder = run(
            configuration(args),
            cnn_run=args.cnn_run,
            teacher_run=args.teacher_run,
            student_run=args.student_run,
            control_runs=args.control_run,
            graded_teacher_runs=args.graded_teacher_run,
            bag_of_words_run=args.bag_of_words_run,
            cohorts=args.cohort,
            readme=args.update_readme,
            output_dir=args.output_dir,
        )
        log.info("\n%s", closing_comparison(read_record(folder / "final_comparison.json")))


if __name__ == "__main__":
    main()
