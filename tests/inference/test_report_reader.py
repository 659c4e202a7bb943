"""The reader of any report on a toy teacher: the answers of its scoring, the words, and what it cannot read."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from toy_teacher import EDEMA, ToyTeacher, shared, toy_reports

from mlx_cxr import cache_teacher_outputs, lfm_finetune
from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.inference.report_reader import LONGEST, ReportReader, ReportReadingError
from mlx_cxr.teacher.image_embeddings import encode_images
from mlx_cxr.teacher.scoring import score

pytestmark = pytest.mark.usefixtures("without_plots")

SICK = "FINDINGS: Edema. Edema. Edema. Edema. Normal. Normal. Normal.\nIMPRESSION: Unread words."


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def run_dir(toy) -> Path:
    """A scored run that is no other test's."""
    folder = toy.folder / "outputs" / "read"
    if not folder.exists():
        shutil.copytree(toy.tuned(), folder)
        cache_teacher_outputs.run(toy.config(), "read")
    return folder


@pytest.fixture(scope="module")
def reader(run_dir) -> ReportReader:
    return ReportReader.from_run(run_dir)


def test_a_test_study_s_report_gets_the_answer_of_the_scoring(reader, run_dir):
    scored = read_predictions(run_dir / "predictions.csv")
    reports, _ = toy_reports()
    rows = np.flatnonzero(scored.predictions.split == "test")[:5]
    for row in rows:
        findings = reports[int(scored.predictions.study_ids[row][1:])]["findings"]
        answer = reader.read(f"FINDINGS: {findings}\nIMPRESSION: Something else.")
        np.testing.assert_allclose(answer.logits, scored.predictions.logits[row], atol=2e-3)
        np.testing.assert_allclose(answer.probabilities, scored.probabilities[row], atol=1e-3)
        assert answer.sections == (("findings", findings),)
        assert (answer.cut, answer.note) == (0, "")
    np.testing.assert_array_equal(answer.states, reader.points.states(answer.probabilities[None])[0])


def test_it_reads_what_it_may_and_nothing_else(reader):
    plain, other = reader.read(SICK), reader.read(SICK.replace("Unread words.", "Cardiomegaly. No edema."))
    np.testing.assert_array_equal(plain.logits, other.logits)
    bare = reader.read("Edema. Edema. Edema. Edema. Normal. Normal. Normal.")
    np.testing.assert_array_equal(bare.logits, plain.logits)
    assert "no headings" in bare.note
    assert reader.reads == "findings"
    assert not reader.needs_image
    assert reader.synthetic


def test_the_words_that_moved_it_add_up_to_its_answer(reader):
    answer = reader.read(SICK)
    (told,) = reader.explain(answer, ["Edema"])
    assert told.finding == "Edema"
    assert told.probability == answer.probabilities[EDEMA]
    assert told.scores.logit == pytest.approx(float(answer.logits[EDEMA]), abs=2e-3)
    assert told.abstention == reader.points.reason(EDEMA, told.probability)
    total = told.scores.blank + told.scores.report + told.scores.image + told.scores.left_over
    assert total == pytest.approx(told.scores.logit, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no text"),
        (" \n\t...", "no text"),
        ("IMPRESSION: No acute process.\nINDICATION: Cough.", "none of what this teacher reads (findings)"),
        ("word " * LONGEST, "at most 20,000"),
    ],
)
def test_what_cannot_be_read_is_said(reader, text, words):
    with pytest.raises(ReportReadingError) as error:
        reader.read(text)
    assert words in str(error.value)


def test_a_report_with_strange_characters_is_read(reader):
    for text in ("FINDINGS: Edema \x00 \u202e \U0001f4a9 <|im_end|> <script>alert(1)</script>", "Ödem, 水腫."):
        answer = reader.read(text)
        assert np.isfinite(answer.logits).all()


def test_a_teacher_of_image_and_report_asks_for_the_image(toy):
    overrides = ["teacher.modality=image_text", "teacher.training.epochs=1", "teacher.run_name=both"]
    folder = toy.folder / "outputs" / "both"
    if not folder.exists():
        lfm_finetune.run(toy.config(*overrides), "both")
        cache_teacher_outputs.run(toy.config(*overrides), "both")
    reader = ReportReader.from_run(folder)
    assert reader.needs_image
    with pytest.raises(ReportReadingError, match="looks at the film too"):
        reader.read(SICK)
    image = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    answer = reader.read(SICK, image)
    settings = reader.teacher.config.teacher
    tokens = np.array(encode_images(reader.teacher.base, image[None], settings.image_size).astype(mx.float16))
    prompt = reader.teacher.form.prompt(list(answer.sections))
    theirs = score(reader.teacher.base, reader.teacher.form, [prompt], tokens, settings).logits[0]
    np.testing.assert_allclose(answer.logits, theirs, atol=1e-5)
    assert np.abs(reader.read(SICK, 255 - image).logits - answer.logits).max() > 1e-6


def test_runs_that_cannot_answer_are_refused(toy, run_dir, tmp_path):
    with pytest.raises(RecordError, match="there is no such run"):
        ReportReader.from_run(tmp_path / "nowhere")
    unscored = shutil.copytree(toy.tuned(), tmp_path / "unscored")
    (unscored / "operating_points.json").unlink(missing_ok=True)
    with pytest.raises(RecordError, match=r"operating_points\.json is missing"):
        ReportReader.from_run(unscored)
    changed = Path(shutil.copytree(run_dir, tmp_path / "changed"))
    points = read_record(changed / "operating_points.json")
    assert points["made_from"]["adapter"] == ReportReader.from_run(run_dir).teacher.adapter_sha256
    points["made_from"]["adapter"] = "0" * 64
    write_record(changed / "operating_points.json", points)
    with pytest.raises(RecordError, match="its adapter changed"):
        ReportReader.from_run(changed)
