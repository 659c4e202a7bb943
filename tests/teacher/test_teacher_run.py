"""A trained teacher and what it reads: opened, described, and kept from data that it was not trained for."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import RecordError
from mlx_cxr.data.tables import DataError
from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher, prompt_format, what_it_reads

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("teacher.sections=[findings]",), "findings"),
        (("teacher.sections=[findings, last_paragraph]",), "findings, last paragraph"),
        (("teacher.sections=[impression, findings]", "teacher.section_mode=first"), "impression, else findings"),
        (("teacher.modality=image",), "film"),
        (("teacher.modality=image_text",), "film + findings"),
    ],
)
def test_what_it_reads_is_said_in_words(toy, overrides, said):
    assert what_it_reads(toy.config(*overrides)) == said


@pytest.mark.parametrize(("modality", "tokens"), [("text", 0), ("image", 4), ("image_text", 4)])
def test_the_prompt_has_a_place_for_the_image_where_there_is_one(toy, base, modality, tokens):
    config = toy.config(f"teacher.modality={modality}")
    form = prompt_format(base, config)
    assert form.image.count(form.image_token) == tokens
    assert len(prompt_format(base, toy.config("teacher.image_size=128", f"teacher.modality={modality}")).image) == (
        18 if tokens else 0
    )


@pytest.mark.parametrize(
    ("modality", "files"),
    [
        ("text", {"manifest", "reports"}),
        ("image", {"manifest", "pixel_index"}),
        ("image_text", {"manifest", "reports", "pixel_index"}),
    ],
)
def test_material_is_what_the_modality_needs(toy, modality, files):
    config = toy.config(f"teacher.modality={modality}")
    material = Material.open(config)
    assert set(material.inputs(config)) == files
    assert (material.reports is not None, material.store is not None) == (modality != "image", modality != "text")


def test_a_text_teacher_needs_no_images_and_an_image_teacher_no_reports(toy):
    assert Material.open(toy.config("pixels.size=128")).store is None
    with pytest.raises(DataError, match="images_128"):
        Material.open(toy.config("pixels.size=128", "teacher.modality=image"))


def test_a_patient_in_two_splits_is_refused(toy, tmp_path):
    import shutil

    made = tmp_path / "made"
    shutil.copytree(toy.folder / "made", made)
    lines = (made / "manifest.csv").read_text().replace("p103,", "p000,", 1)
    (made / "manifest.csv").write_text(lines)
    with pytest.raises(DataError, match="p000"):
        Material.open(toy.config(f"data.work_dir={made}"))


def test_an_opened_teacher_answers_as_it_was_trained(toy):
    teacher = TrainedTeacher.open(toy.tuned())
    assert teacher.config.teacher == toy.config().teacher
    assert teacher.protocol == "empty_negative"
    assert teacher.record["reads"] == "findings"
    assert teacher.form.sha256() == prompt_format(teacher.base, teacher.config).sha256()
    assert not teacher.base.model.training
    teacher.check(toy.config(), Material.open(toy.config()))


def checked(toy, *overrides: str) -> str:
    config: Config = toy.config(*overrides)
    teacher = TrainedTeacher.open(toy.tuned())
    with pytest.raises(RecordError) as raised:
        teacher.check(config, Material.open(teacher.config))
    return str(raised.value)


def test_each_difference_is_named_with_both_values(toy):
    message = checked(toy, "data.synthetic=false", "labels.uncertain=ones")
    assert "data.synthetic: the run has True, this is False" in message
    assert "labels: the run has" in message
    assert "or train again under another --run_name" in message


def test_where_the_tower_is_left_out_stored_embeddings_are_enough(toy):
    run_dir = toy.tuned("image", "teacher.modality=image", "teacher.training.epochs=1")
    teacher = TrainedTeacher.open(run_dir, vision=False)
    material = Material.open(teacher.config)
    images = material.images(teacher.base, material.studies(teacher.config, teacher.form, "train"), teacher.config)
    assert images.dtype == np.float16
    assert images.shape == (64, 4, 64)
