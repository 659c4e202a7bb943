"""Studies that become prompts, their sections, and the counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.tables import DataError
from mlx_cxr.teacher.dataset import Studies, read_studies
from mlx_cxr.teacher.prompt import INSTRUCTION

REPORTS = {
    "a": {"indication": "Cough.", "findings": "Edema.", "impression": "Failure.", "whole": "Cough. Edema. Failure."},
    "b": {"indication": "", "findings": "", "impression": "Clear.", "whole": "Clear."},
    "c": {"indication": "Pain.", "findings": "", "impression": "", "whole": "Pain."},
    "e": {"indication": "", "findings": "word " * 4000, "impression": "Failure.", "whole": "word " * 4000},
}
ROWS = [
    ("a", "a1", "train"),
    ("a", "a2", "train"),
    ("b", "b1", "train"),
    ("c", "c1", "validate"),
    ("d", "d1", "validate"),
    ("e", "e1", "test"),
]


@pytest.fixture
def manifest() -> Manifest:
    frame = pd.DataFrame(ROWS, columns=["study_id", "image_id", "split"]).assign(patient_id="p", view="AP")
    raw = np.arange(len(ROWS), dtype=np.float32)[:, None] * np.ones((1, 14), np.float32)
    return Manifest(frame, raw, "m" * 64)


def read(manifest: Manifest, form, *splits: str, without_image=frozenset(), **settings: object) -> Studies:
    return read_studies(manifest, REPORTS, TeacherConfig(**settings), form, splits, frozenset(without_image))


def texts(studies: Studies, form) -> list[str]:
    """Text between the instruction and the end of the turn."""
    shown = [form.tokenizer.decode(prompt.ids.tolist()) for prompt in studies.prompts]
    return [text.split(f"{INSTRUCTION}\n", 1)[1].split("<|im_end|>")[0] for text in shown]


def test_a_study_is_asked_about_once_with_its_first_images_labels(manifest, form):
    studies = read(manifest, form, "train", sections=("findings", "impression"))
    assert studies.study_ids == ["a", "b"]
    assert studies.frame["image_id"].tolist() == ["a1", "b1"]
    assert studies.raw_labels[:, 0].tolist() == [0, 2]
    assert texts(studies, form) == ["Findings: Edema.\nImpression: Failure.\n", "Impression: Clear.\n"]
    assert studies.counts == {"studies": 2, "read": 2, "without_text": 0, "cut": 0, "cut_tokens": 0}
    assert studies.lengths().tolist() == [len(prompt.ids) for prompt in studies.prompts]


@pytest.mark.parametrize(
    ("sections", "mode", "wanted"),
    [
        (("findings",), "all", {"a": "Findings: Edema.\n"}),
        (("indication",), "all", {"a": "Indication: Cough.\n", "c": "Indication: Pain.\n"}),
        (("impression", "findings"), "first", {"a": "Impression: Failure.\n", "b": "Impression: Clear.\n"}),
        (("findings", "impression"), "first", {"a": "Findings: Edema.\n", "b": "Impression: Clear.\n"}),
        (("whole",), "all", {"a": "Whole: Cough. Edema. Failure.\n", "b": "Whole: Clear.\n", "c": "Whole: Pain.\n"}),
    ],
    ids=["findings", "indication", "first-impression", "first-findings", "whole"],
)
def test_only_what_may_be_read_is_read(manifest, form, sections, mode, wanted):
    studies = read(manifest, form, "train", "validate", sections=sections, section_mode=mode)
    assert dict(zip(studies.study_ids, texts(studies, form), strict=True)) == wanted
    # Five studies in all, a to e; e is of the test split. Those without the section are skipped and counted.
    assert studies.counts["studies"] == 4
    assert studies.counts["without_text"] == 4 - len(wanted)


def test_an_image_teacher_reads_no_text_and_needs_none(manifest, form):
    studies = read(manifest, form, "validate", modality="image")
    assert studies.study_ids == ["c", "d"]
    assert texts(studies, form) == ["", ""]
    assert studies.counts["without_text"] == 0


def test_a_study_without_image_is_left_out_where_images_are_looked_at(manifest, form):
    studies = read(manifest, form, "train", modality="image", without_image={"a1", "b1"})
    assert studies.frame["image_id"].tolist() == ["a2"], "the study's next film speaks for it"
    assert studies.counts == {"studies": 2, "read": 1, "without_text": 0, "cut": 0, "cut_tokens": 0}
    both = read(manifest, form, "train", modality="image_text", sections=("findings",))
    assert both.study_ids == ["a"]
    text = read(manifest, form, "train", sections=("impression",), without_image={"a1", "b1"})
    assert text.study_ids == ["a", "b"]


def test_cut_reports_are_counted_and_keep_their_impression(manifest, form):
    studies = read(manifest, form, "test", sections=("findings", "impression"))
    assert studies.counts["cut"] == 1
    assert studies.counts["cut_tokens"] == studies.prompts[0].cut > 3000
    assert "Impression: Failure.\n" in texts(studies, form)[0]


def test_no_study_to_read_is_an_error_that_names_the_sections(manifest, form):
    with pytest.raises(DataError, match=r"none of 2 studies of validate .* teacher.sections \(impression\)"):
        read(manifest, form, "validate", sections=("impression",))


def test_images_that_cannot_be_read_are_not_blamed_on_the_report(manifest, form):
    with pytest.raises(DataError, match="has a film that can be read"):
        read(manifest, form, "test", modality="image", without_image={"e1"})


def test_the_studies_of_one_split(manifest, form):
    both = read(manifest, form, "train", "validate", modality="image")
    part = both.of_split("validate")
    assert part.study_ids == ["c", "d"]
    assert part.raw_labels[:, 0].tolist() == [3, 4]
    assert part.prompts == both.prompts[2:]
    assert part.counts == {"read": 2, "cut": 0}
