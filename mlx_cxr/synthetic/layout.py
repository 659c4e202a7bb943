"""A cohort in the file layout of MIMIC-CXR-JPG 2.0.0, with the columns of its tables, plus masks.

The same cohort gives the same bytes, whatever the number of processes: images are encoded one by one, tables are
gzipped without a time stamp.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image

from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.workers import lean_start, worker_pool
from mlx_cxr.synthetic.cohort import Cohort, StudyPlan
from mlx_cxr.synthetic.image import render_image

QUALITY = 95
_CHUNK = 4
_VIEW_CODES = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral", "LL": "left lateral", "": ""}


def study_folder(root: Path, study: StudyPlan) -> Path:
    """`root/p10/p10000032/s50414267`."""
    subject = str(study.patient.subject_id)
    return root / f"p{subject[:2]}" / f"p{subject}" / f"s{study.study_id}"


def write_images(
    cohort: Cohort, root: Path, size: int, workers: int, tick: Callable[[], None]
) -> list[tuple[int, int]]:
    """Render every image with its masks.

    Args:
        cohort: the plan.
        root: the cohort's folder.
        size: short side, pixels.
        workers: processes; 0 or 1 renders here.
        tick: called after each study.

    Returns:
        (rows, columns) of each image, in the cohort's order.
    """
    tasks = [(study, root, size) for study in cohort.studies]
    shapes: list[tuple[int, int]] = []
    if workers <= 1:
        for task in tasks:
            shapes += _write_study(task)
            tick()
        return shapes
    with worker_pool(workers) as pool:
        with lean_start():
            found = pool.map(_write_study, tasks, chunksize=_CHUNK)
        for some in found:
            shapes += some
            tick()
    return shapes


def _write_study(task: tuple[StudyPlan, Path, int]) -> list[tuple[int, int]]:
    study, root, size = task
    images, masks = study_folder(root / "files", study), study_folder(root / "masks", study)
    images.mkdir(parents=True, exist_ok=True)
    images.with_suffix(".txt").write_text(study.report.text, encoding="utf-8")
    shapes = []
    for plan in study.images:
        image = render_image(study.patient, study.findings, plan.kind, size, plan.seed, plan.supine)
        # Not into the file: Pillow takes no notice of a write that a full disk cuts short.
        content = io.BytesIO()
        Image.fromarray(image.pixels).save(content, "JPEG", quality=QUALITY)
        (images / f"{plan.dicom_id}.jpg").write_bytes(content.getvalue())
        for label, mask in image.masks.items():
            path = masks / plan.dicom_id / f"{label.replace(' ', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype("uint8") * 255).save(path)
        shapes.append(image.pixels.shape)
    return shapes


def write_tables(cohort: Cohort, root: Path, shapes: list[tuple[int, int]]) -> None:
    """Metadata, split, both label tables and the patients' table."""
    metadata, split = [], []
    images = [(study, plan) for study in cohort.studies for plan in study.images]
    for (study, plan), (rows, columns) in zip(images, shapes, strict=True):
        dicom, subject = plan.dicom_id, study.patient.subject_id
        metadata.append(
            {
                "dicom_id": dicom,
                "subject_id": subject,
                "study_id": study.study_id,
                "PerformedProcedureStepDescription": study.procedure,
                "ViewPosition": plan.view_position,
                "Rows": rows,
                "Columns": columns,
                "StudyDate": study.when.strftime("%Y%m%d"),
                "StudyTime": study.when.strftime("%H%M%S.%f")[:-3],
                "ProcedureCodeSequence_CodeMeaning": study.procedure,
                "ViewCodeSequence_CodeMeaning": _VIEW_CODES[plan.view_position],
                "PatientOrientationCodeSequence_CodeMeaning": "Recumbent" if plan.supine else "Erect",
            }
        )
        ids = {"dicom_id": dicom, "study_id": study.study_id, "subject_id": subject}
        split.append(ids | {"split": cohort.split[subject]})
    _write_gzip(root / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    _write_gzip(root / "mimic-cxr-2.0.0-split.csv.gz", split)
    for labeler in ("chexpert", "negbio"):
        rows_of = [
            {"subject_id": study.patient.subject_id, "study_id": study.study_id}
            | dict(zip(LABELS, getattr(study, labeler).tolist(), strict=True))
            for study in cohort.studies
        ]
        _write_gzip(root / f"mimic-cxr-2.0.0-{labeler}.csv.gz", rows_of)
    patients = {study.patient.subject_id: study.patient for study in cohort.studies}
    _write_gzip(
        root / "patients.csv.gz",
        [{"subject_id": p.subject_id, "gender": p.sex, "anchor_age": p.age} for p in patients.values()],
    )


def _write_gzip(path: Path, rows: list[dict[str, object]]) -> None:
    text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
