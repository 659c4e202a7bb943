"""Analyse a student's failures and their causes: `python -m mlx_cxr.failure_analysis --config configs/demo.yaml`.

Reads runs that are scored already, and writes into `outputs/<student_run>/failure_analysis/`: `failures.csv` (every
error on test), `relabel.csv` (a sheet for reading images anew, blind to label and model) and `relabel_key.csv`,
`confusions.png`, `images/` (the worst errors with their maps), `failures.json` and `summary.md`. CNN and teacher are
shown beside the student where there are such runs; only a teacher can point at labels that are likely wrong.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import read_record, sha256_file, write_record, write_text
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config
    from mlx_cxr.evaluation.scored_runs import ScoredRun


log = logging.getLogger("mlx_cxr")

FOLDER, PICTURE = "failure_analysis", "confusions.png"


@claims(lambda config, *, student_run=None, **_: config.run_dir(student_run or config.distillation.run_name))
def run(
    config: Config, *, student_run: str | None = None, cnn_run: str | None = None, teacher_run: str | None = None
) -> Path:
    """Analyse a student's errors on test, and return the folder of the analysis.

    Args:
        config: the experiment; manifest and pixels must be those of the student.
        student_run: folder under `outputs`; None takes `distillation.run_name`.
        cnn_run: None takes `run_name` of the configuration, and does without where that is not scored.
        teacher_run: None takes `teacher.run_name`, likewise.

    Raises:
        ComparisonError: a run that was named lacks a file (names the command that makes it), or the runs do not belong
            together.
        RecordError: the student is no trained run, was trained for something else, or was evaluated without maps.
        DataError: manifest, pixel store or reports missing or not matching.
    """
    from mlx_cxr.core.labels import MAPPED
    from mlx_cxr.data.places import Places
    from mlx_cxr.data.study_reports import load_reports
    from mlx_cxr.data.tables import write_table
    from mlx_cxr.evaluation.failure_results import analyse
    from mlx_cxr.evaluation.failures import PROTOCOL, per_label, worst
    from mlx_cxr.evaluation.scored_runs import open_scored_run, shared_studies
    from mlx_cxr.evaluation.study_table import drawn_findings, study_table, training_shares
    from mlx_cxr.inference.explanation import study_maps
    from mlx_cxr.inference.trained_run import TrainedRun
    from mlx_cxr.pages.confusion_plot import plot_confusions
    from mlx_cxr.pages.failure_page import Shown, failure_markdown
    from mlx_cxr.pages.failure_pictures import draw_failures, remove_stale
    from mlx_cxr.pages.figures import cohort_line
    from mlx_cxr.pages.relabeling import relabel_sheet
    from mlx_cxr.training.cohort import Cohort

    machine = device.start("failure_analysis")
    student = open_scored_run(config.run_dir(student_run or config.distillation.run_name), "student")
    others = {
        "cnn": _optional(config, "cnn", cnn_run, config.run_name),
        "teacher": _optional(config, "teacher", teacher_run, config.teacher.run_name),
    }
    others = {role: one for role, one in others.items() if one is not None}
    shared_studies([student, *others.values()])
    trained = TrainedRun.open(student.folder)
    trained.check(config)
    cohort = Cohort.open(config)
    manifest, study_ids = cohort.manifest, student.test.study_ids
    reports = load_reports(config.reports_path, manifest) if config.reports_path.exists() else None
    files = {f"{one.name}/predictions.csv": one.folder / "predictions.csv" for one in (student, *others.values())}
    files |= {"manifest": config.manifest_path, "checkpoint": trained.checkpoint}
    scales = student.folder / "inference.json"
    files |= {f"{student.name}/{scales.name}": scales} if scales.exists() else {}
    files |= {"reports": config.reports_path} if reports is not None else {}
    images = manifest.frame.groupby("study_id", sort=False)["path"].agg(list)
    settings = config.failure
    analysis = analyse(
        student,
        others,
        study_table(manifest, student),
        training_shares(manifest),
        drawn_findings(config, [images[study] for study in study_ids]),
        teacher_margin=settings.teacher_margin,
        rare_share=settings.rare_share,
        samples=config.evaluation.bootstrap_samples,
        seed=config.seed,
        provenance=provenance("failure_analysis", config.plain(), files, machine),
    )

    folder, failures = student.folder / FOLDER, analysis.failures
    sheet, key = relabel_sheet(analysis.judged, analysis.category, images, settings.relabel, config.seed)
    _keep_filled_in(folder)
    for name, table in {"failures": failures, "relabel": sheet, "relabel_key": key}.items():
        write_table(folder / f"{name}.csv", table, "%.6g")
    results = analysis.results | {"relabel": {"items": len(sheet)}}
    cohort_said = cohort_line(student.test, PROTOCOL)
    plot_confusions(folder / PICTURE, results["confusions"], cohort_said, config.data.synthetic)
    labels = config.explain.labels or MAPPED
    shown, pictures = worst(failures, settings.examples, labels), []
    if len(shown):
        batch_size = config.evaluation.batch_size
        maps = study_maps(trained, cohort.split("test"), shown, config.explain.method, batch_size)
        places = Places.of(config.data, cohort.manifest.frame["path"].tolist())
        pictures = draw_failures(folder, shown, *maps, places, config)
    rows = shown.to_dict("records")
    texts = [None if reports is None else _excerpt(reports.sections.get(row["study_id"]), row["label"]) for row in rows]
    gallery = [Shown(*parts) for parts in zip(rows, pictures, texts, strict=True)]
    write_record(folder / "failures.json", results)
    page = failure_markdown(results, gallery, per_label(settings.examples, labels), PICTURE)
    path = write_text(folder / "summary.md", page)
    remove_stale(folder, pictures)
    log.info("tables and pictures in %s", path)
    return folder


def closing_lines(folder: Path) -> str:
    """The main points of an analysis that is there, as plain text for a terminal.

    Raises:
        RecordError: its `failures.json` is missing or unreadable.
    """
    from mlx_cxr.pages.failure_advice import closing_failures

    return closing_failures(read_record(folder / "failures.json"))


def _optional(config: Config, role: str, named: str | None, default: str) -> ScoredRun | None:
    """A run that was named, or the default one where it is scored."""
    from mlx_cxr.evaluation.scored_runs import open_scored_run

    folder = config.run_dir(named or default)
    if named is None and not (folder / "predictions.csv").exists():
        log.info("no scored %s run %s: its columns are left out", role, folder)
        return None
    return open_scored_run(folder, role)


def _keep_filled_in(folder: Path) -> None:
    """Give a sheet that somebody wrote answers into, and its key, names that new ones do not take."""
    sheet = folder / "relabel.csv"
    lines = sheet.read_bytes().splitlines()[1:] if sheet.exists() else []
    # Answer and comment are the last cells; what a spreadsheet wrote anew, with other separators, is kept too.
    if all(line.endswith(b",,") for line in lines):
        return
    mark = sha256_file(sheet)[:8]
    for path in (sheet, folder / "relabel_key.csv"):
        if path.exists():
            path.replace(path.with_stem(f"{path.stem}_filled_in_{mark}"))
    log.warning("the sheet that was filled in is kept as %s", sheet.with_stem(f"{sheet.stem}_filled_in_{mark}"))


def _excerpt(sections: dict[str, str] | None, label: str) -> str | None:
    from mlx_cxr.data.report_mentions import mentions
    from mlx_cxr.data.reports import select

    if sections is None:
        return None
    parts = select(sections, ("findings", "impression", "last_paragraph"), "all") or select(sections, ("whole",))
    return mentions(" ".join(text for _, text in parts), label)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("failure_analysis", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--student_run", "--run_name", help="run under outputs/; default: distillation.run_name")
    parser.add_argument("--cnn_run", help="shown beside it; default: run_name of the configuration, where it is scored")
    parser.add_argument("--teacher_run", help="default: teacher.run_name, where it is scored")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        folder = run(
            configuration(args),
            student_run=args.student_run,
            cnn_run=args.cnn_run,
            teacher_run=args.teacher_run,
        )
        log.info("\n%s", closing_lines(folder))


if __name__ == "__main__":
    main()
