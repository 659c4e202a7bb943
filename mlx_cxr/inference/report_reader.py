"""A scored teacher that answers for any report: probabilities, calls, and the words that moved them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.reports import has_headings, section_texts, select
from mlx_cxr.evaluation.operating_points import FILE, OperatingPoints, read_operating_points
from mlx_cxr.explain.word_scores import TextExplanation
from mlx_cxr.inference.answers import LONGEST, ReportAnswer
from mlx_cxr.teacher.attribution import explain
from mlx_cxr.teacher.image_embeddings import encode_images
from mlx_cxr.teacher.prompt import Prompt
from mlx_cxr.teacher.scoring import score
from mlx_cxr.teacher.teacher_run import TrainedTeacher, what_it_reads

_WORDS = re.compile(r"\w")


class ReportReadingError(UserError, ValueError):
    """A report or image that this teacher cannot answer for; the message is the reason."""


def sections_to_read(text: str, settings: TeacherConfig) -> list[tuple[str, str]]:
    """(section, text) of a report that a teacher may read; one without headings counts as the first such section.

    Raises:
        ReportReadingError: the report has none of them.
    """
    texts = section_texts(text)
    if not has_headings(text):
        texts = {settings.sections[0]: texts["whole"]}
    wanted = select(texts, settings.sections, settings.section_mode)
    if not wanted:
        raise ReportReadingError(f"the report has none of what this teacher reads ({', '.join(settings.sections)})")
    return wanted


@dataclass(frozen=True)
class ReportReader:
    """A teacher that was trained and scored.

    Attributes:
        teacher: the run.
        points: what was fitted on its validation split.
    """

    teacher: TrainedTeacher
    points: OperatingPoints

    @classmethod
    def from_run(cls, folder: str | Path) -> ReportReader:
        """Open a run of `lfm_finetune` that `cache_teacher_outputs` has scored.

        Raises:
            ReportReadingError: the teacher reads no text.
            RecordError: there is no such run, it is no teacher's, was not trained to its end, is not scored, or its
                adapter changed since.
            BaseUnavailableError, AdapterError, ConfigError: base, adapter or record cannot be used.
        """
        teacher = TrainedTeacher.open(folder)
        if teacher.config.teacher.modality == "image":
            raise ReportReadingError(f"{folder} is a teacher that sees films only; it reads no words to explain")
        points, record = read_operating_points(Path(folder) / FILE)
        if record["made_from"].get("adapter") != teacher.adapter_sha256:
            raise RecordError(
                f"{folder}: its adapter changed since {FILE} was written; run cache_teacher_outputs again"
            )
        return cls(teacher, points)

    @property
    def reads(self) -> str:
        """Sections that it may read, in words, such as `findings`."""
        return what_it_reads(self.teacher.config)

    @property
    def needs_image(self) -> bool:
        """It looks at an image too."""
        return self.teacher.config.teacher.modality == "image_text"

    @property
    def synthetic(self) -> bool:
        """It was trained on the synthetic cohort."""
        return self.teacher.config.data.synthetic

    @property
    def transform(self) -> Transform:
        """Geometry and size of the image that `read` takes."""
        return Transform.of(self.teacher.config)

    def read(self, text: str, image: np.ndarray | None = None) -> ReportAnswer:
        """Answer for a report; one without headings counts as the first section that may be read.

        Args:
            text: the report.
            image: uint8 (S, S) by `transform`, for a teacher that needs one.

        Raises:
            ReportReadingError: no text, too long a text, none of the sections that it reads, or no image where it needs
                one.
        """
        if not _WORDS.search(text):
            raise ReportReadingError("there is no text to read")
        if len(text) > LONGEST:
            raise ReportReadingError(f"{len(text):,} characters; a report has at most {LONGEST:,}")
        if self.needs_image and image is None:
            raise ReportReadingError("this teacher looks at the film too: choose or upload one")
        settings = self.teacher.config.teacher
        wanted = sections_to_read(text, settings)
        headed = has_headings(text) or settings.sections[0] == "whole"
        note = "" if headed else f"The text has no headings; all of it is taken as {settings.sections[0]}."
        tokens = None
        if self.needs_image:
            encoded = encode_images(self.teacher.base, np.asarray(image)[None], settings.image_size)
            tokens = np.array(encoded.astype(mx.float16))[0]
        return self.answer(self.teacher.form.prompt(wanted), tokens, wanted, note)

    def answer(
        self, prompt: Prompt, image: np.ndarray | None = None, sections: Sequence[tuple[str, str]] = (), note: str = ""
    ) -> ReportAnswer:
        """Answer for a prompt of this teacher's form.

        Args:
            prompt: of the study.
            image: float16 (T, H), its image's tokens, or None.
            sections: of the report that the prompt was made of.
            note: on the reading, in a sentence.
        """
        images = None if image is None else np.asarray(image)[None]
        logits = score(self.teacher.base, self.teacher.form, [prompt], images, self.teacher.config.teacher).logits
        decided = self.points.decide(logits)
        return ReportAnswer(
            tuple(sections), prompt.cut, note, logits[0], decided.probabilities[0], decided.states[0], prompt, image
        )

    def explain(
        self, answer: ReportAnswer, findings: Sequence[str], study_id: str = "text", labels: Sequence[str] = ()
    ) -> list[TextExplanation]:
        """Which words moved the answer, for each of some findings.

        Args:
            answer: of `read`.
            findings: of `LABELS`.
            study_id: to tell the report by.
            labels: the source's labels of these findings in words, where they are known.

        Raises:
            AttributionError: the prompt holds no report.
        """
        columns = [label_index(name) for name in findings]
        teacher, settings = self.teacher, self.teacher.config.teacher
        scores = explain(teacher.base, teacher.form, answer._prompt, answer._image, columns, settings)
        return [
            TextExplanation(
                study_id,
                LABELS[k],
                words,
                float(answer.probabilities[k]),
                float(self.points.tuned_thresholds[k]),
                label,
                self.reads,
                answer.cut,
                self.synthetic,
                self.points.reason(k, float(answer.probabilities[k])),
            )
            for k, words, label in zip(columns, scores, labels or [""] * len(columns), strict=True)
        ]
