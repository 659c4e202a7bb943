"""Test images of a run's manifest that the page offers, a few of each finding, with what their reports say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import streamlit as st

from mlx_cxr.core.config import Config
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.labels import LABELS, label_word
from mlx_cxr.data.manifest import Manifest, load_manifest
from mlx_cxr.data.study_reports import StudyReports, load_reports

OFFERED = 42


@dataclass(frozen=True)
class Sample:
    """A test image.

    Attributes:
        image_id: of the image. study_id: of its study.
        path: the image's file.
        view: such as `AP`; empty when missing.
        about: age and sex in words, or empty.
        raw_labels: the study's 14 as the source has them: 1, 0, -1 or NaN.
        images: how many the study has.
        report: the report's text under its headings; empty where there is none.
    """

    image_id: str
    study_id: str
    path: Path
    view: str
    about: str
    raw_labels: tuple[float, ...]
    images: int
    report: str

    @property
    def title(self) -> str:
        """One line: what the report's labels say is there, then study, view, age and sex."""
        there = [label for label, value in zip(LABELS, self.raw_labels, strict=True) if value == 1]
        named = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        parts = (named or "no finding labelled", f"study {self.study_id}", self.view, self.about)
        return " · ".join(part for part in parts if part)

    @property
    def label_words(self) -> dict[str, str]:
        """Finding to the report's label in words; only those that the source has."""
        pairs = zip(LABELS, self.raw_labels, strict=True)
        return {label: label_word(float(value)) for label, value in pairs if not np.isnan(value)}


@dataclass(frozen=True)
class Cohort:
    """The test split that a run was evaluated on, as far as it is on this machine.

    Attributes:
        offered: image id to sample, in the order of the menu; empty where there are none.
        absent: why there are none, in a sentence; empty where there are.
    """

    offered: Mapping[str, Sample]
    absent: str = ""
    _manifest: Manifest | None = None
    _reports: StudyReports | None = None
    _root: Path | None = None

    def of_study(self, study_id: str) -> Sample | None:
        """The first image of a test study; None where it is not on this machine."""
        if self._manifest is None:
            return None
        frame = self._manifest.frame
        rows = np.flatnonzero((frame["study_id"] == study_id).to_numpy() & (frame["split"] == "test").to_numpy())
        sample = _sample(self, int(rows[0])) if len(rows) else None
        return sample if sample is not None and sample.path.is_file() else None

    def of_image(self, image_id: str) -> Sample | None:
        """An image by its id, also one that is not in the menu; None where it is not on this machine."""
        if image_id in self.offered:
            return self.offered[image_id]
        if self._manifest is None:
            return None
        rows = np.flatnonzero((self._manifest.frame["image_id"] == image_id).to_numpy())
        sample = _sample(self, int(rows[0])) if len(rows) else None
        return sample if sample is not None and sample.path.is_file() else None


@st.cache_resource(max_entries=4, show_spinner="Looking for test films …")
def cohort_of(config_json: str, manifest_sha256: str, stamp: str) -> Cohort:
    """Test images for a run.

    Args:
        config_json: of the run, as JSON.
        manifest_sha256: of the manifest that it was trained on.
        stamp: other when the manifest's file changed.
    """
    config = Config.model_validate_json(config_json)
    try:
        manifest = load_manifest(config.manifest_path)
    except (UserError, OSError) as error:
        return Cohort({}, f"No test films to choose from: {error}.")
    if manifest.sha256 != manifest_sha256:
        return Cohort(
            {}, f"No test films to choose from: {config.manifest_path} is not the one that the run was trained on."
        )
    if manifest.text_only:
        return Cohort({}, "No test films to choose from: the manifest holds reports without films.")
    reports = None
    if config.reports_path.exists():
        try:
            reports = load_reports(config.reports_path, manifest)
        except (UserError, OSError):
            reports = None
    cohort = Cohort({}, "", manifest, reports, config.data.root)
    chosen = [_sample(cohort, row) for row in _spread(manifest)]
    offered = {sample.image_id: sample for sample in chosen if sample.path.is_file()}
    if not offered:
        return Cohort({}, f"No test films to choose from: their files are not under {config.data.root}.")
    return Cohort(offered, "", manifest, reports, config.data.root)


def _spread(manifest: Manifest) -> list[int]:
    """Rows of test images, one of a study: of each finding in turn the next study that has it."""
    frame = manifest.frame
    test = np.flatnonzero((frame["split"] == "test").to_numpy() & ~frame["study_id"].duplicated().to_numpy())
    columns = [test[manifest.raw_labels[test, k] == 1].tolist() for k in range(len(LABELS))]
    in_turn = (row for turn in zip_longest(*columns) for row in turn if row is not None)
    rows = list(dict.fromkeys(in_turn)) or test.tolist()
    return rows[:OFFERED]


def _sample(cohort: Cohort, row: int) -> Sample:
    manifest, known = cohort._manifest, cohort._manifest.frame.iloc[row]
    study = known["study_id"]
    sections = {} if cohort._reports is None else cohort._reports.sections.get(study, {})
    return Sample(
        image_id=known["image_id"],
        study_id=study,
        path=Path(cohort._root) / known["path"],
        view=known["view"],
        about=" ".join(part for part in (f"{known['age']} y" if known["age"] else "", known["sex"]) if part),
        raw_labels=tuple(float(value) for value in manifest.raw_labels[row]),
        images=int((manifest.frame["study_id"] == study).sum()),
        report=_text(sections),
    )


def _text(sections: Mapping[str, str]) -> str:
    parts = {name: sections.get(name, "") for name in ("indication", "findings", "impression")}
    if not (parts["findings"] or parts["impression"]):
        return sections.get("whole", "")
    return "\n\n".join(f"{name.upper()}: {text}" for name, text in parts.items() if text)
