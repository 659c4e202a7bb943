"""Turn raw images, tables and reports into a manifest: `python -m mlx_cxr.build_manifest --config configs/demo.yaml`.

Writes into `data.work_dir`, a sample (`data.n_studies`) into a folder of its own there:
`manifest.csv` (one row per image, or per report where there are no images), `reports.csv`
(the sections of each study's report, where there are reports), `splits.json` (the patients of each split, and the
hashes of both), `manifest_summary.md` and `manifest_summary.json` (counts, and rows left out and why).
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import sha256_file, write_record, write_text
from mlx_cxr.core.runs import RunExistsError, provenance, runs_that_read
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    import pandas as pd

    from mlx_cxr.core.config import Config
    from mlx_cxr.data.report_files import ReportTexts
    from mlx_cxr.data.source_rows import SourceRows

log = logging.getLogger("mlx_cxr")


@claims(lambda config, *_, **__: config.manifest_path.parent)
def run(config: Config, workers: int = 0, overwrite: bool = False) -> Path:
    """Write the manifest and the files beside it, and return the manifest's path.

    Args:
        config: the experiment; `data` and `seed` are used.
        workers: processes that read reports; 0 takes one per core. The bytes written do not depend on it.
        overwrite: replace a manifest that runs were trained on by another.

    Raises:
        RunExistsError: the manifest would be another than runs were trained on, and `overwrite` is false.
        DataError: a table, column, image folder or report folder is missing, or contradicts itself; names it.
    """
    from mlx_cxr.data.csv_source import read_csv_source
    from mlx_cxr.data.manifest import split_counts, write_manifest, write_splits
    from mlx_cxr.data.manifest_summary import SCHEMA, render, summarize
    from mlx_cxr.data.mimic import read_mimic
    from mlx_cxr.data.sampling import sample_studies
    from mlx_cxr.data.source_rows import labelled
    from mlx_cxr.data.study_reports import write_reports

    # The source's rows, split by patient, sampled, with their reports.
    data = config.data
    rows = read_mimic(data) if data.source == "mimic-cxr-jpg" else read_csv_source(data)
    text_only = data.csv is not None and data.csv.text_only
    log.info("%s %s read from %s", f"{rows.read:,}", "reports" if text_only else "images", data.source)
    if not text_only:
        rows = rows.on_disk(data.root)
    rows, split_from = _with_splits(rows, config)
    in_training = (rows.frame["split"] == "train").to_numpy()
    rows = rows.keep(labelled(rows.frame) | in_training, "no labels to score by")
    before = rows.frame
    if data.n_studies is not None:
        fractions = (data.validation_fraction, data.test_fraction)
        rows = rows.keep(sample_studies(before, data.n_studies, *fractions, config.seed), "not in the sample")
        if len(rows) == len(before):
            log.warning("data.n_studies asks for %d studies and there are no more; all are kept", data.n_studies)
    sampled = len(rows) < len(before)
    rows, reports = _with_texts(rows, config, workers)
    without = ~labelled(rows.frame)
    read = rows.frame["study_id"].isin(reports.sections.keys()).to_numpy()
    rows = rows.keep(~without | read, "no labels and no report")
    rows = rows.noted(images_without_labels_kept_for_their_reports=int((without & read).sum()))

    # The files, each with the hashes of those it belongs to.
    sha256 = write_manifest(config.manifest_path, rows.frame, lambda new: _keep_what_runs_read(config, new, overwrite))
    about = {
        "reports_sha256": write_reports(config.reports_path, reports.sections),
        "source": data.source,
        "synthetic": data.synthetic,
        "seed": config.seed,
        "split_from": split_from,
    }
    write_splits(config.splits_path, rows.frame, sha256, about)
    summary = {
        "schema": SCHEMA,
        **about,
        "manifest_sha256": sha256,
        **summarize(rows, reports, before if sampled else None),
        "provenance": provenance("build_manifest", config.plain(), rows.inputs),
    }
    title = f"Manifest of {config.name} ({data.source}, seed {config.seed}, split {split_from})"
    text = render(summary, title, data.synthetic)
    write_record(config.manifest_path.with_name("manifest_summary.json"), summary)
    write_text(config.manifest_path.with_name("manifest_summary.md"), text)
    log.info("%s\n%s, sha256 %s", text, config.manifest_path, sha256[:12])
    for name, counts in split_counts(rows.frame).items():
        if not counts["images"]:
            log.warning(
                "no %s is in split %r: a model cannot be trained and scored on this manifest; "
                "get more of the data, or set data.split: made",
                "report" if text_only else "film",
                name,
            )
    return config.manifest_path


def _keep_what_runs_read(config: Config, sha256: str, overwrite: bool) -> None:
    path = config.manifest_path
    if overwrite or not path.exists() or (old := sha256_file(path)) == sha256:
        return
    if runs := runs_that_read(config.outputs, old):
        raise RunExistsError(
            f"{path} is what {', '.join(str(run) for run in runs[:3])}{' and others' if len(runs) > 3 else ''} were "
            "trained on, and the one to be made now differs from it; set another data.work_dir, or pass --overwrite: "
            "these runs can then no longer be evaluated or shown"
        )


def source_tables(config: Config) -> list[Path]:
    """The tables that a manifest of this configuration is made from.

    Raises:
        DataError: they are not there; names them.
    """
    from mlx_cxr.data.mimic import find_tables

    data = config.data
    if data.csv is not None:
        return [data.csv.table]
    tables = list(find_tables(data.root, data.labeler).values())
    return tables if data.patients_table is None else [*tables, data.patients_table]


def _with_splits(rows: SourceRows, config: Config) -> tuple[SourceRows, str]:
    from mlx_cxr.data.manifest import check_patient_splits
    from mlx_cxr.data.sampling import split_patients
    from mlx_cxr.data.source_rows import labelled

    data = config.data
    if data.split == "made" or (rows.frame["split"] == "").all():
        # Patients without any label are of no use in the other splits.
        known = rows.frame[labelled(rows.frame)]
        split = split_patients(known, data.validation_fraction, data.test_fraction, config.seed)
        of_patient = dict(zip(known["patient_id"], split, strict=True))
        split = rows.frame["patient_id"].map(of_patient).fillna("train")
        return replace(rows, frame=rows.frame.assign(split=split)), "made by patient"
    rows = rows.keep((rows.frame["split"] != "").to_numpy(), "no split given")
    check_patient_splits(rows.frame)
    return rows, "of the source"


def _with_texts(rows: SourceRows, config: Config, workers: int) -> tuple[SourceRows, ReportTexts]:
    from mlx_cxr.data.report_files import read_reports, reports_of_table

    frame = rows.frame
    if config.data.csv is not None:
        reports = reports_of_table(config.data, frame)
        key = "image_id"
    else:
        studies: pd.DataFrame = frame.drop_duplicates("study_id")
        reports = read_reports(config.data, studies["patient_id"].tolist(), studies["study_id"].tolist(), workers)
        key = "study_id"
    return replace(rows, frame=frame.assign(text=frame[key].map(reports.texts))), reports


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("build_manifest", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--n_studies", type=int, help="data.n_studies: sample so many studies, patients kept whole")
    parser.add_argument("--seed", type=int, help="of the sample, and of the split where the source brings none")
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that runs were trained on")
    parser.add_argument("--workers", type=int, default=0, help="processes that read reports; default: one per core")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, seed=args.seed, data__n_studies=args.n_studies), args.workers, args.overwrite)


if __name__ == "__main__":
    main()
