"""The predictor on a tiny evaluated run: the same answers as the evaluation's, from any kind of file, and refusals."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from chest_images import chest_image
from dicom_files import dicom_bytes
from PIL import Image
from prepared_images import read_image
from toy_cohort import make_cohort

from mlx_cxr import evaluate_cnn, inference, train_cnn
from mlx_cxr.core.config import Config, load_config
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.data.decoding import Transform, decode_bytes
from mlx_cxr.data.dicom import equalize
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, STATE_WORDS
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.explain.maps import fit_reference
from mlx_cxr.inference.map_fit import METHODS
from mlx_cxr.inference.predictor import MAPPED, Predictor
from mlx_cxr.models.convert import load_model
from mlx_cxr.models.folded import FoldedResNet18
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.models.weight_files import read_safetensors, write_safetensors

pytestmark = pytest.mark.usefixtures("without_plots")


def configured(folder: Path) -> Config:
    """So few validation studies allow calls at this alpha only."""
    return load_config(folder / "trial.yaml", ["evaluation.abstention_alpha=0.4"])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A toy cohort with a run `first`, trained and evaluated with maps."""
    folder = make_cohort(tmp_path_factory.mktemp("cohort"))
    config = configured(folder)
    train_cnn.run(config)
    evaluate_cnn.run(config)
    return folder


@pytest.fixture(scope="module")
def run_dir(cohort) -> Path:
    return cohort / "outputs" / "first"


@pytest.fixture(scope="module")
def predictor(run_dir) -> Predictor:
    return Predictor.from_run(run_dir)


@pytest.fixture
def copied(run_dir, tmp_path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "outputs" / "first"))


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def test_files_get_the_answers_of_the_evaluation(predictor, cohort, run_dir):
    """`predictions.csv`, whose studies are of one image each, made through manifest and pixel store."""
    table = pd.read_csv(run_dir / "predictions.csv", dtype={"study_id": str})
    studies = table["study_id"].unique()
    files = [cohort / "films" / f"film{study[1:]}.png" for study in studies]
    answers = list(predictor.predict_files(files))
    assert [answer.image.name for answer in answers] == [str(path) for path in files]
    for key, ours in (("logit", "logits"), ("probability", "probabilities")):
        theirs = table[key].to_numpy().reshape(len(studies), 14)
        np.testing.assert_allclose(np.stack([getattr(a, ours) for a in answers]), theirs, rtol=1e-5, atol=1e-6)
    states = table["call"].map({word: state for state, word in STATE_WORDS.items()}).to_numpy().reshape(-1, 14)
    # A validation study that a bound was fitted to lies on it, where the last bit of a logit decides.
    bounds = np.stack([predictor.points.bands.lower, predictor.points.bands.upper, predictor.points.thresholds.values])
    clear = np.abs(np.stack([a.probabilities for a in answers])[None] - bounds[:, None]).min(axis=0) > 1e-6
    np.testing.assert_array_equal(np.stack([a.states for a in answers])[clear], states[clear])
    assert len(studies) == 12
    assert clear.sum() > 100
    assert set(states[clear].tolist()) == {PRESENT, ABSENT, ABSTAIN}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_how_images_are_batched_changes_nothing(predictor, cohort, run_dir, batch_size):
    files = sorted((cohort / "films").glob("*.png"))[:12]
    whole = np.stack([a.logits for a in predictor.predict_files(files)])
    parts = np.stack([a.logits for a in Predictor.from_run(run_dir, batch_size).predict_files(files)])
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_an_image_is_the_same_in_every_wrapping(predictor, tmp_path):
    image = chest_image()
    path = tmp_path / "film.dat"
    path.write_bytes(png(image))
    wide = io.BytesIO()
    Image.fromarray(image.astype(np.uint16) * 257).save(wide, "PNG")
    stretched = np.clip((image.astype(int) - image.min()) * 255 // (int(image.max()) - int(image.min())), 0, 255)
    given = [path, str(path), png(image), image, np.repeat(image[..., None], 3, axis=2)]
    answers = predictor.predict([predictor.read(source) for source in given])
    for answer in answers:
        assert answer.status == "answered", answer.image
        np.testing.assert_array_equal(answer.image.pixels, answers[0].image.pixels)
        np.testing.assert_allclose(answer.logits, answers[0].logits, rtol=1e-5)
    assert [a.image.name for a in answers[:3]] == [str(path), str(path), "film"]
    sixteen, eight = (predictor.read(source).pixels for source in (wide.getvalue(), stretched.astype(np.uint8)))
    np.testing.assert_array_equal(sixteen, eight)


def test_an_array_is_no_file_on_the_way(predictor, monkeypatch):
    wanted = predictor.read(png(chest_image()))
    monkeypatch.setattr(Image.Image, "save", None)
    np.testing.assert_array_equal(predictor.read(chest_image()).pixels, wanted.pixels)


def test_the_room_loads_mlx_for_the_models_only():
    code = (
        "import sys, mlx_cxr.inference.answers as a; print('mlx.core' in sys.modules); from mlx_cxr.inference import "
    )
    done = subprocess.run([sys.executable, "-c", code + "Predictor as P; print(P)"], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["False", str(Predictor)]
    assert {"Predictor", "ReportReader"} <= set(dir(inference))
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        inference.Predicter  # noqa: B018


def test_dicoms_of_every_kind_get_one_answer(predictor):
    """That of a PNG of what the recipe makes of the image, within 1e-3: the training's, or one that is asked for."""
    image = chest_image(1)
    files = {
        (photometric, bits): dicom_bytes(image, photometric, bits)
        for photometric in ("MONOCHROME1", "MONOCHROME2")
        for bits in (8, 12, 16)
    }
    levels = ((image.astype(int) - image.min()) * 255 // (int(image.max()) - int(image.min()))).astype(np.uint8)
    # The cohort's images are PNGs of a table; only MIMIC-CXR-JPG's were equalized.
    for recipe, shown in ((None, levels), ("window", levels), ("mimic", equalize(levels))):
        reference = predictor.read(png(shown))
        answers = predictor.predict([reference, *(predictor.read(file, recipe=recipe) for file in files.values())])
        for kind, answer in zip(files, answers[1:], strict=True):
            message = f"{recipe} {kind}"
            np.testing.assert_allclose(answer.logits, answers[0].logits, atol=1e-3, err_msg=message)


def test_the_recipe_is_that_of_the_run(copied, run_dir):
    """Of a run that was trained on DICOMs or JPEGs made as MIMIC's, and of one that was not."""
    assert Predictor.from_run(run_dir).transform.recipe == "window"
    spoil(copied / "config.json", "config", "pixels", "dicom_recipe", value="mimic")
    with pytest.raises(RecordError, match=r"dicom_recipe: recorded 'window', this version has 'mimic'"):
        Predictor.from_run(copied)
    spoil(copied / "inference.json", "preprocessing", "dicom_recipe", value="mimic")
    spoil(copied / "inference.json", "preprocessing", "transform", value=Transform(32).plain())
    content = dicom_bytes(chest_image(1), bits=12)
    theirs = Predictor.from_run(copied).read(content).pixels
    np.testing.assert_array_equal(theirs, np.asarray(decode_bytes(content, Transform(32, recipe="mimic")).gray))
    ours = Predictor.from_run(run_dir).read(content).pixels
    np.testing.assert_array_equal(ours, np.asarray(decode_bytes(content, Transform(32, recipe="window")).gray))
    assert (ours != theirs).any()


def test_what_cannot_be_read_is_answered_with_the_reason(predictor, cohort, tmp_path):
    """In its place, and nothing else is lost."""
    good = sorted((cohort / "films").glob("*.png"))[:3]
    (tmp_path / "empty.png").write_bytes(b"")
    files = [good[0], tmp_path / "empty.png", good[1], tmp_path / "nowhere.png", good[2], tmp_path]
    answers = list(predictor.predict_files(files))
    assert [a.image.error is None for a in answers] == [True, False, True, False, True, False]
    assert "0 bytes" in answers[1].image.error
    assert "no such file" in answers[3].image.error
    assert answers[1].status == "unreadable"
    assert answers[1].logits is None
    assert not answers[1].answered
    alone = predictor.predict([predictor.read(good[2])])[0]
    np.testing.assert_allclose(answers[4].logits, alone.logits, rtol=1e-5, atol=1e-6)
    for bad in (np.zeros((64, 64)), np.zeros((64, 64, 2), np.uint8), np.zeros((0, 64), np.uint8)):
        assert "give uint8 (H, W)" in predictor.read(bad).error
    assert "no name of a file" in predictor.read("a\0b").error
    assert predictor.predict([]) == []


def test_a_negative_is_questionable_and_answered_on_request_only(predictor):
    negative = predictor.read(png(255 - chest_image()))
    assert any("inverted" in concern for concern in negative.concerns)
    (answer,) = predictor.predict([negative])
    assert (answer.status, answer.answered) == ("questionable", False)
    (anyway,) = predictor.predict([negative], ignore_gate=True)
    assert (anyway.status, anyway.answered) == ("questionable", True)
    np.testing.assert_array_equal(anyway.probabilities, answer.probabilities)


def contrast_by_hand(model, images, validation):
    """(13, N, h, w) by NumPy: each image and three shifts of it, the head's weights, less the validation's mean."""
    half, size = model.config.output_stride // 2, images.shape[1]
    wide = np.pad(images, ((0, 0), (0, half), (0, half)), mode="edge")
    weights = np.array(model.fc.weight)[[label_index(label) for label in MAPPED]]
    signed = None
    for i, y in enumerate((0, half)):
        for j, x in enumerate((0, half)):
            part = np.array(model.features(preprocess(mx.array(wide[:, y : y + size, x : x + size]), 1)))
            n, h, w, _ = part.shape
            signed = np.zeros((13, n, 2 * h, 2 * w)) if signed is None else signed
            signed[:, :, i::2, j::2] = np.einsum("kc,nhwc->knhw", weights, part) / (4 * h * w)
    return np.maximum(signed - signed[:, :validation].mean(axis=1, keepdims=True), 0)


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_shares_of_the_reference_on_validation(predictor, cohort, run_dir, method):
    model, transform = load_model(run_dir / "best_model.safetensors"), Transform(32)
    images = np.stack([read_image(cohort / "films" / f"film{i:02}.png", transform) for i in range(12, 21)])
    if method == "contrast_cam":
        raw = contrast_by_hand(model, images, validation=8)
    else:
        raw = class_activation_maps(model, preprocess(mx.array(images), 1), MAPPED, method).raw
    reference = fit_reference(raw[:, :8])
    labels = ["Cardiomegaly", "Edema"]
    maps = predictor.maps(predictor.predict([predictor.read(cohort / "films" / "film20.png")])[0], labels, method)
    for label, ours in zip(labels, maps, strict=True):
        k = MAPPED.index(label)
        np.testing.assert_allclose(ours, raw[k, 8] / reference[k], rtol=1e-3, atol=1e-5)
    assert predictor.maps(predictor.predict([predictor.read(cohort / "films" / "film20.png")])[0]).shape[0] == 13
    with pytest.raises(KeyError):
        predictor.maps(predictor.predict([predictor.read(cohort / "films" / "film20.png")])[0], ["No Finding"], method)


def test_a_network_in_half_precision_answers_and_maps_like_the_other(predictor, run_dir, cohort):
    half = Predictor.from_run(run_dir, batch_size=2, precision="auto")
    half._take(FoldedResNet18.of(half.trained.model, mx.float16))
    assert half.computed_in == "float16"
    images = [predictor.read(cohort / "films" / f"film{i:02}.png") for i in (12, 15, 20)]
    for ours, wanted in zip(half.predict(images), predictor.predict(images), strict=True):
        assert ours.features.dtype == np.float32
        np.testing.assert_allclose(ours.logits, wanted.logits, atol=0.02)
        assert (ours.logits != wanted.logits).any(), "computed in the other precision"
        scale = np.nanmax(predictor.maps(wanted))
        np.testing.assert_allclose(half.maps(ours), predictor.maps(wanted), atol=0.02 * max(scale, 1))


def test_an_image_beyond_float16_is_scored_in_float32(predictor, run_dir, cohort):
    other = Predictor.from_run(run_dir, batch_size=2, precision="auto")
    network = FoldedResNet18.of(other.trained.model, mx.float16)
    network.stem.bias = network.stem.bias + mx.inf
    other._take(network)
    image = predictor.read(cohort / "films" / "film20.png")
    np.testing.assert_allclose(other.predict([image])[0].logits, predictor.predict([image])[0].logits, atol=1e-5)
    assert other.computed_in == "float32"


def test_the_record_says_how_images_are_prepared(run_dir):
    """The figures that the network normalizes by, as `models.resnet` documents them."""
    record = read_record(run_dir / "inference.json")
    assert record["preprocessing"]["transform"] == Transform(32, recipe="window").plain()
    assert record["preprocessing"]["dicom_recipe"] == "window"
    assert record["preprocessing"]["normalization"] == {"in_channels": 1, "mean": [0.449], "std": [0.226]}
    assert read_record(run_dir / "training.json")["preprocessing"] == record["preprocessing"]
    assert record["map_references"]["films"] == 8
    assert set(record["map_references"]["methods"]) == set(METHODS)


def spoil(path: Path, *keys: str, value: object) -> None:
    entry = plain = read_record(path)
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    write_record(path, plain)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("schema",), 0, "another version"),
        (("preprocessing", "transform", "version"), 2, "'version': 2"),
        (("preprocessing", "normalization", "mean"), [0.5], "[0.5]"),
        (("preprocessing", "dicom_recipe"), "mimic", "'mimic'"),
        (("map_references",), None, "cannot be used"),
        (("preprocessing",), None, "no preprocessing is recorded"),
        (("preprocessing",), [], "no preprocessing is recorded"),
        (("map_references", "methods"), {"grad_cam": {"Edema": "much"}}, "cannot be used"),
        (("checkpoint", "sha256"), "0" * 64, "changed since"),
    ],
)
def test_a_run_of_another_version_is_refused(copied, keys, value, words):
    spoil(copied / "inference.json", *keys, value=value)
    with pytest.raises(RecordError) as error:
        Predictor.from_run(copied)
    assert words in str(error.value)
    assert str(copied) in str(error.value)


def test_weights_that_changed_are_refused(copied, run_dir):
    weights, header = read_safetensors(run_dir / "best_model.safetensors")
    weights["fc.bias"] = weights["fc.bias"] + 1
    write_safetensors(copied / "best_model.safetensors", weights, header)
    with pytest.raises(RecordError, match="changed since"):
        Predictor.from_run(copied)


@pytest.mark.parametrize(
    "name", ["inference.json", "map_fit.npz", "operating_points.json", "best_model.safetensors", "config.json"]
)
def test_a_run_that_lacks_a_file_is_refused(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Predictor.from_run(copied)


def test_evaluation_refuses_a_network_trained_with_other_preprocessing(cohort):
    shutil.copytree(cohort / "outputs" / "first", cohort / "outputs" / "other")
    spoil(cohort / "outputs" / "other" / "training.json", "preprocessing", "transform", "fit", value="center_crop")
    with pytest.raises(RecordError, match=r"training\.json: films are no longer prepared"):
        evaluate_cnn.run(configured(cohort), "other")


def test_a_run_evaluated_without_maps_has_none(cohort):
    shutil.copytree(cohort / "outputs" / "first", cohort / "outputs" / "bare")
    evaluate_cnn.run(configured(cohort), "bare", maps=False)
    bare = Predictor.from_run(cohort / "outputs" / "bare")
    assert bare.methods == ()
    with pytest.raises(KeyError):
        bare.maps(bare.predict([bare.read(chest_image())])[0], ["Edema"])
    assert len(LABELS) == len(bare.predict([bare.read(chest_image())])[0].probabilities)
