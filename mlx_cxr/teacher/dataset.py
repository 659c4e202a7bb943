"""Studies of a manifest that have the text or image that a teacher reads, as prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.reports import select
from mlx_cxr.data.tables import DataError
from mlx_cxr.teacher.prompt import Prompt, PromptFormat


@dataclass(frozen=True)
class Studies:
    """Studies of one or more splits, a row each.

    Attributes:
        frame: the manifest's row of the study's first image: `study_id`, `patient_id`, `split`, `view` and the rest.
        raw_labels: float32 (N, 14), 1 / 0 / -1 / NaN.
        counts: `studies` of these splits, `read`, `without_text` (skipped), `cut` (reports shortened), `cut_tokens`.
        withheld: bool (N,), studies whose labels a budget took away; None without one.
    """

    frame: pd.DataFrame
    raw_labels: np.ndarray
    prompts: list[Prompt]
    counts: Mapping[str, int]
    withheld: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def study_ids(self) -> list[str]:
        """In the order of the rows."""
        return self.frame["study_id"].tolist()

    def lengths(self) -> np.ndarray:
        """int (N,): tokens of each prompt."""
        return np.array([len(prompt.ids) for prompt in self.prompts])

    def of_split(self, name: str) -> Studies:
        """The studies of one split; `counts` keeps `read` and `cut` only."""
        return self.taken(np.flatnonzero((self.frame["split"] == name).to_numpy()))

    def taken(self, rows: np.ndarray) -> Studies:
        """The given rows, int (M,), a study as often as it is in them; `counts` keeps `read` and `cut` only."""
        prompts = [self.prompts[i] for i in rows]
        counts = {"read": len(rows), "cut": sum(prompt.cut > 0 for prompt in prompts)}
        return Studies(self.frame.iloc[rows].reset_index(drop=True), self.raw_labels[rows], prompts, counts)


def read_studies(
    manifest: Manifest,
    reports: Mapping[str, Mapping[str, str]],
    config: TeacherConfig,
    form: PromptFormat,
    splits: tuple[str, ...],
    without_image: frozenset[str] = frozenset(),
) -> Studies:
    """Prompts of the studies of some splits, those of `readable`.

    Args:
        manifest, reports, config, splits, without_image: as `readable`.
        form: of the prompt.

    Raises:
        DataError: none of them can be read.
        PromptError: no room for a report.
    """
    rows, sections, counts = readable(manifest, reports, config, splits, without_image)
    prompts = [form.prompt(pairs) for pairs in sections]
    counts |= {"cut": sum(prompt.cut > 0 for prompt in prompts), "cut_tokens": sum(prompt.cut for prompt in prompts)}
    withheld = None if manifest.withheld is None else manifest.withheld[rows]
    frame = manifest.frame.iloc[rows].reset_index(drop=True)
    return Studies(frame, manifest.raw_labels[rows], prompts, counts, withheld)


def readable(
    manifest: Manifest,
    reports: Mapping[str, Mapping[str, str]],
    config: TeacherConfig,
    splits: tuple[str, ...],
    without_image: frozenset[str] = frozenset(),
) -> tuple[list[int], list[list[tuple[str, str]]], dict[str, int]]:
    """Studies of some splits that a teacher can read.

    A study without any of `config.sections` is left out and counted when the teacher reads text only or both; so is
    one without an image that can be read, when it looks at images.

    Args:
        manifest: the rows; a study's first one speaks for it.
        reports: study id -> section -> text.
        config: modality and what may be read.
        without_image: image ids that the pixel store could not read.

    Returns:
        The manifest's row of each; its (section, text) pairs, none for a teacher that reads no text; and the counts
        `studies` of these splits, `read`, `without_text`.

    Raises:
        DataError: none of them can be read.
    """
    frame, looks = manifest.frame, config.modality != "text"
    usable = ~frame["image_id"].isin(without_image) if looks else pd.Series(True, index=frame.index)
    wanted = frame["split"].isin(splits) & usable
    rows = np.flatnonzero(wanted & ~frame["study_id"].where(wanted).duplicated())
    kept, read = [], []
    for row, study in zip(rows.tolist(), frame["study_id"].iloc[rows], strict=True):
        sections = []
        if config.modality != "image":
            sections = select(reports.get(study, {}), config.sections, config.section_mode)
            if not sections:
                continue
        kept.append(row)
        read.append(sections)
    if not len(rows):
        lack = "has a film that can be read" if looks else "is in the manifest"
        raise DataError(f"no study of {', '.join(splits)} {lack}; look at the manifest's summary and the pixel store")
    if not kept:
        raise DataError(
            f"none of {len(rows)} studies of {', '.join(splits)} has any of teacher.sections "
            f"({', '.join(config.sections)}); read others, or look at the manifest's summary for what reports there are"
        )
    counts = {
        "studies": int(frame.loc[frame["split"].isin(splits), "study_id"].nunique()),
        "read": len(kept),
        "without_text": len(rows) - len(kept),
    }
    return kept, read, counts
