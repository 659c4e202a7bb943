"""Reports to explain: studies of a manifest, or a text, as a teacher reads them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.labels import LABELS, label_word
from mlx_cxr.data.report_files import UnreadableReportError, read_report_file
from mlx_cxr.data.reports import decode
from mlx_cxr.explain.word_scores import TextExplanation
from mlx_cxr.inference.answers import ReportAnswer
from mlx_cxr.inference.report_reader import ReportReader, sections_to_read
from mlx_cxr.teacher.image_embeddings import encode_images
from mlx_cxr.teacher.prompt import Prompt
from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher, what_it_reads

log = logging.getLogger("mlx_cxr")


class ExplainReportError(UserError, ValueError):
    """A study, report or finding that cannot be explained; says why."""


@dataclass(frozen=True)
class Asked:
    """One report to explain.

    Attributes:
        study_id: or `text`.
        prompt: what the teacher reads.
        image: float16 (T, H), or None.
        raw_labels: float32 (14,), or None for a text without labels.
        columns: findings to explain; None leaves it to the answers.
    """

    study_id: str
    prompt: Prompt
    image: np.ndarray | None
    raw_labels: np.ndarray | None
    columns: tuple[int, ...] | None


def of_studies(
    wanted: Mapping[str, tuple[int, ...] | None], teacher: TrainedTeacher, material: Material
) -> list[Asked]:
    """Studies as the teacher reads them, in the order asked.

    Args:
        wanted: study to findings.
        teacher: who reads.
        material: what it reads.

    Raises:
        ExplainReportError: a study is not in the manifest, or has not what the teacher reads.
    """
    frame = material.manifest.frame
    split_of = dict(zip(frame["study_id"].tolist(), frame["split"].tolist(), strict=True))
    if unknown := [study for study in wanted if study not in split_of]:
        raise ExplainReportError(f"study {unknown[0]!r} is not in {teacher.config.manifest_path}")
    splits = tuple(sorted({split_of[study] for study in wanted}))
    studies = material.studies(teacher.config, teacher.form, *splits)
    place = {study: i for i, study in enumerate(studies.study_ids)}
    if lacking := [study for study in wanted if study not in place]:
        raise ExplainReportError(
            f"study {lacking[0]!r} has not what this teacher reads ({what_it_reads(teacher.config)}), "
            "so it has no answer to explain"
        )
    asked = []
    for study, columns in wanted.items():
        i = place[study]
        image = None
        if material.store is not None:
            pixels = material.store.images[material.store.rows([studies.frame["image_id"].iloc[i]])]
            tokens = encode_images(teacher.base, pixels, teacher.config.teacher.image_size)
            image = np.array(tokens.astype(mx.float16))[0]
        asked.append(Asked(study, studies.prompts[i], image, studies.raw_labels[i], columns))
    return asked


def of_text(text: str, teacher: TrainedTeacher, columns: tuple[int, ...] | None) -> Asked:
    """A report that is given as a text; one without headings counts as the first section that may be read.

    Raises:
        ExplainReportError: the teacher needs an image.
        ReportReadingError: the report has none of the sections.
    """
    settings = teacher.config.teacher
    if settings.modality != "text":
        raise ExplainReportError(f"{teacher.folder} reads films too, and --text has none; name a study with --study_id")
    wanted = sections_to_read(text, settings)
    return Asked("text", teacher.form.prompt(wanted), None, None, columns)


def read_report(text: str) -> str:
    """The file of that name, or the text itself; what looks like a file's name has to be one.

    Raises:
        ExplainReportError: there is no such file.
    """
    try:
        if Path(text).is_file():
            return decode(read_report_file(Path(text)))[0]
    except UnreadableReportError as error:
        raise ExplainReportError(f"--text {error}") from None
    except (OSError, ValueError):  # too long for a file's name
        return text
    if re.fullmatch(r"\S+\.\w{1,5}|\S*/\S*", text):
        raise ExplainReportError(f"--text {text}: there is no such file; a report itself goes between quotes")
    return text


def explained(asked: Asked, reader: ReportReader) -> tuple[ReportAnswer, list[TextExplanation]]:
    """The answer for one report and its explanations.

    Without findings asked for these are of the ones at or above their thresholds, or of the likeliest one of those that
    validation could test.
    """
    answer, points = reader.answer(asked.prompt, asked.image), reader.points
    columns = asked.columns
    if columns is None:
        above = np.flatnonzero(answer.probabilities >= points.tuned_thresholds).tolist()
        columns = tuple(above or [int(np.argmax(np.where(points.tuned, answer.probabilities, -1)))])
    findings = [LABELS[k] for k in columns]
    log.info("study %s: %s", asked.study_id, ", ".join(findings))
    labels = () if asked.raw_labels is None else [label_word(float(asked.raw_labels[k])) for k in columns]
    return answer, reader.explain(answer, findings, asked.study_id, labels)
