"""The stage from a run's folder to its pages, on a tiny cohort made with the data room's own functions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from mlx_cxr import evaluate_cnn
from mlx_cxr.core.config import Config, config_from_plain
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS, label_index
from mlx_cxr.core.runs import create_run
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import load_manifest, write_manifest
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.data.tables import DataError
from mlx_cxr.evaluation.image_statistics import STATISTICS, image_statistics
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.evaluation.shortcuts import study_metadata
from mlx_cxr.inference import explanation
from mlx_cxr.inference.trained_run import TrainedRun
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.pages import results_page

SIZE = 64
EFFUSION, NODULE = label_index("Pleural Effusion"), label_index("Lung Lesion")
OUTPUTS = {
    *("predictions.csv", "test_results.json", "results.md", "roc.png", "precision_recall.png", "reliability.png"),
    *("operating_points.json", "risk_coverage.png", "cost.json", "inference.json"),
    *("grad_cam", "map_fit.npz", "localization.json", "findings.md"),
}
PATIENTS = {"train": 20, "validate": 18, "test": 20}


def make_cohort(root: Path) -> None:
    """Noise images; an effusion is a bright square low on the left, a lesion one high on the right; masks beside them.

    Every second patient has a second study, every third study a second image. Labels follow what is drawn, but some of
    the absent ones are not mentioned and some are uncertain.
    """
    rng = np.random.default_rng(0)
    rows = []
    for split, patients in PATIENTS.items():
        for patient in range(patients):
            for study in range(1 + patient % 2):
                drawn = rng.random(2) < 0.45
                raw = rng.choice([1, 0, np.nan], len(LABELS), p=[0.3, 0.2, 0.5])
                raw[[EFFUSION, NODULE]] = np.where(drawn, 1, rng.choice([0, np.nan, -1], 2, p=[0.3, 0.6, 0.1]))
                ids = f"{split}{patient:03d}", f"{split}{patient:03d}-{study}"
                for image in range(1 + (patient + study) % 3 // 2):
                    name = f"{ids[1]}-{image}"
                    draw_image(root, name, drawn, rng)
                    row = {"image_id": name, "patient_id": ids[0], "study_id": ids[1], "split": split}
                    row |= {
                        "view": ("AP", "PA", "")[patient % 3],
                        "age": str(40 + patient),
                        "sex": "F",
                        "text": "No | acute",
                    }
                    rows.append(row | {"path": f"files/{name}.png"} | dict(zip(LABELS, raw, strict=True)))
    write_manifest(root / "work" / "manifest.csv", pd.DataFrame(rows))


def draw_image(root: Path, name: str, drawn: np.ndarray, rng: np.random.Generator) -> None:
    pixels = rng.normal(90, 12, (SIZE, SIZE))
    for there, label, (y, x) in zip(drawn, ("Pleural_Effusion", "Lung_Lesion"), ((40, 8), (8, 40)), strict=True):
        if there:
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[y : y + 16, x : x + 16] = 255
            pixels[mask > 0] += 14
            folder = root / "masks" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / f"{label}.png")
    (root / "files").mkdir(exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "files" / f"{name}.png")


def make_run(config: Config) -> None:
    """A random trunk whose head is fitted to the two findings on training images, saved as a trained run."""
    manifest = load_manifest(config.manifest_path)
    build_store(config.pixels_path, manifest, Transform(SIZE), config.data.root, workers=1)
    model = ResNet18(ResNetConfig(output_stride=16))
    initialize(model, 0)
    model.eval()
    rows = np.flatnonzero(manifest.frame["split"] == "train")
    pooled = np.array(mx.mean(model.features(preprocess(mx.array(np.load(config.pixels_path)[rows]), 1)), axis=(1, 2)))
    weight, bias = np.array(model.fc.weight), np.array(model.fc.bias)
    scale = pooled.std()
    targets = SCORING_PROTOCOLS["empty_negative"].apply(manifest.raw_labels[rows])
    for k in (EFFUSION, NODULE):
        fit = LogisticRegression(C=0.3).fit(pooled / scale, targets[:, k])
        weight[k], bias[k] = fit.coef_[0] / scale, fit.intercept_[0]
    model.load_weights([("fc.weight", mx.array(weight)), ("fc.bias", mx.array(bias))], strict=False)
    folder = create_run(
        config.outputs,
        "cnn",
        stage="train_cnn",
        config=config.plain(),
        inputs={"manifest": config.manifest_path},
        overwrite=True,
    )
    save_model(folder / "best_model.safetensors", model)


def config_in(root: Path, **changes: dict) -> Config:
    plain = {
        "name": "tiny",
        "run_name": "cnn",
        "outputs": str(root / "outputs"),
        "data": {"source": "mimic-cxr-jpg", "synthetic": True, "root": str(root), "work_dir": str(root / "work")},
        "pixels": {"size": SIZE},
        "model": {"weights": "scratch", "output_stride": 16},
        "evaluation": {"bootstrap_samples": 50, "batch_size": 16},
        "explain": {"labels": ["Pleural Effusion", "Lung Lesion"], "examples_per_outcome": 1},
    }
    for section, values in changes.items():
        plain[section] = plain.get(section, {}) | values if isinstance(values, dict) else values
    return config_from_plain(plain, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cohort and a run that is not evaluated yet; tests that change something take a copy."""
    root = tmp_path_factory.mktemp("trained")
    make_cohort(root)
    make_run(config_in(root))
    return root


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated") / "root"
    shutil.copytree(trained, root)
    config = config_in(root)
    assert evaluate_cnn.run(config) == root / "outputs" / "cnn"
    return config


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "root")
    return tmp_path / "root"


def folder_of(config: Config) -> Path:
    return config.run_dir()


def independent_logits(config: Config, split: str) -> dict[str, np.ndarray]:
    """Study to mean logits, image by image through the saved weights, without the training or evaluation rooms."""
    from mlx_cxr.models.convert import load_model

    model = load_model(folder_of(config) / "best_model.safetensors")
    frame = load_manifest(config.manifest_path).frame
    logits: dict[str, list[np.ndarray]] = {}
    for row in frame[frame["split"] == split].itertuples():
        image = np.asarray(Image.open(config.data.root / row.path).convert("L"))
        out = model(preprocess(mx.array(image)[None], 1))
        logits.setdefault(row.study_id, []).append(np.array(out)[0])
    return {study: np.mean(images, axis=0) for study, images in logits.items()}


def test_every_file_is_there_and_every_picture_opens(evaluated):
    folder = folder_of(evaluated)
    assert {item.name for item in folder.iterdir()} == OUTPUTS | {"config.json", "best_model.safetensors"}
    pictures = [*folder.glob("*.png"), *folder.glob("grad_cam/*.png")]
    assert len(pictures) > 5
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert "not for clinical use" in picture.text["Warning"]
    links = re.findall(r"\]\((grad_cam/[^)]*)\)", (folder / "findings.md").read_text())
    assert {folder / link for link in links} == set(folder.glob("grad_cam/*.png"))


def test_probabilities_are_the_sigmoid_of_mean_logits_over_a_temperature_of_validation(evaluated):
    scored = read_predictions(folder_of(evaluated) / "predictions.csv")
    validation = independent_logits(evaluated, "validate")
    part = scored.predictions.of_split("validate")
    assert sorted(part.study_ids) == sorted(validation)
    targets = SCORING_PROTOCOLS["empty_negative"].apply(part.raw_labels)
    test = independent_logits(evaluated, "test")
    test_rows = np.flatnonzero(scored.predictions.split == "test")
    assert sorted(scored.predictions.study_ids[test_rows]) == sorted(test)
    for k in range(len(LABELS)):
        z = np.array([validation[study][k] for study in part.study_ids])
        fit = minimize_scalar(
            lambda t, z=z, y=targets[:, k]: np.mean(np.logaddexp(0, z / t) - y * z / t),
            bounds=(0.05, 20),
            method="bounded",
        )
        expected = [expit(test[study][k] / fit.x) for study in scored.predictions.study_ids[test_rows]]
        np.testing.assert_allclose(scored.probabilities[test_rows, k], expected, atol=2e-3)


def test_results_are_scikit_learns_on_the_predictions(evaluated):
    # pandas 2 reads floats to within the last bit unless told otherwise.
    table = pd.read_csv(folder_of(evaluated) / "predictions.csv", float_precision="round_trip")
    results = read_record(folder_of(evaluated) / "test_results.json")
    for label, rows in table[table["split"] == "test"].groupby("label"):
        y = (rows["raw_label"] == 1).to_numpy().astype(int)
        entry = results["protocols"]["empty_negative"]["per_label"][label]
        assert entry["roc_auc"]["value"] == pytest.approx(sk.roc_auc_score(y, rows["logit"]))
        assert entry["f1"]["value"] == pytest.approx(sk.f1_score(y, rows["above_threshold"], zero_division=0))
        assert entry["brier"]["value"] == pytest.approx(np.mean((rows["probability"] - y) ** 2))
        explicit = rows["raw_label"].isin([0, 1]).to_numpy()
        masked = results["protocols"]["empty_masked"]["per_label"][label]
        assert masked["roc_auc"]["value"] == pytest.approx(sk.roc_auc_score(y[explicit], rows["logit"][explicit]))
        assert results["operating_points"][label]["threshold"] == rows["threshold"].iloc[0]
    assert results["metadata_only"]["features"] == ["view", "age", "sex"]
    assert results["exposure_only"]["features"] == ["view", "age", "sex", *STATISTICS]
    assert results["synthetic"] is True
    assert set(results["provenance"]["inputs"]) == {"manifest", "checkpoint"}
    assert results["provenance"]["stage"] == "evaluate_cnn"


def test_the_exposure_s_ranking_is_that_of_scikit_learn_on_the_stored_pixels(evaluated):
    """A bright square is drawn for an effusion, so the statistics of brightness tell it."""
    frame = load_manifest(evaluated.manifest_path).frame
    known = study_metadata(frame).assign(study_id=frame["study_id"].drop_duplicates().to_numpy()).set_index("study_id")
    statistics = [image_statistics(image[None])[0] for image in np.load(evaluated.pixels_path)]
    known[[*STATISTICS]] = pd.DataFrame(statistics).groupby(frame["study_id"].to_numpy()).mean().loc[known.index]
    first = frame.drop_duplicates("study_id").set_index("study_id")
    train = (first["split"] == "train").to_numpy()
    columns = [known[name] == value for name in ("view", "sex") for value in sorted(set(known[name][train]))]
    for name in ("age", *STATISTICS):
        values = known[name].to_numpy()
        columns.append(np.nan_to_num((values - np.nanmean(values[train])) / (np.nanstd(values[train]) or 1)))
    features, y = np.stack(columns, axis=1), (first["Pleural Effusion"] == 1).to_numpy()
    fitted = LogisticRegression(max_iter=1000).fit(features[train], y[train])
    test = (first["split"] == "test").to_numpy()
    expected = sk.roc_auc_score(y[test], fitted.decision_function(features[test]))
    entry = read_record(folder_of(evaluated) / "test_results.json")["exposure_only"]["per_label"]["Pleural Effusion"]
    assert entry["roc_auc"]["value"] == pytest.approx(expected, abs=0.005)
    assert entry["roc_auc"]["value"] > 0.7


def test_cost_counts_what_was_trained_and_names_what_is_timed(evaluated, copy):
    cost = read_record(folder_of(evaluated) / "cost.json")
    # torchvision's resnet18 with one input channel and 14 classes.
    total = 11_689_512 - 2 * 3136 - 513 * 1000 + 513 * 14
    assert cost["parameters"] == {"total": total, "trainable": total}
    assert cost["what"] == f"one film of {SIZE} px in memory, forward pass in batches of 16"
    assert cost["samples"] >= 3 * 16
    assert 0.05 < cost["ms_per_sample"] < 1000
    assert cost["device"] == read_record(folder_of(evaluated) / "test_results.json")["provenance"]["device"]
    record = read_record(folder_of(config_in(copy)) / "config.json")
    record["config"]["model"]["freeze_stages"] = 5
    write_record(folder_of(config_in(copy)) / "config.json", record)
    assert TrainedRun.open(folder_of(config_in(copy))).parameters == {"total": total, "trainable": 513 * 14}


def test_a_student_is_scored_as_the_cnn_is(evaluated, copy, monkeypatch):
    """By the weights that its stage leaves, whatever an earlier run of that name left beside them."""
    folder = folder_of(config_in(copy))
    (folder / "best_model.safetensors").rename(folder / "best_student.safetensors")
    other = ResNet18(ResNetConfig(output_stride=16))
    initialize(other, 5)
    save_model(folder / "best_model.safetensors", other)
    record = read_record(folder / "config.json")
    write_record(folder / "config.json", record | {"stage": "distillation"})
    monkeypatch.setattr(evaluate_cnn, "explain", lambda *_: None)  # pictures have no part in this
    monkeypatch.setattr(results_page, "write_results", lambda *_: None)
    evaluate_cnn.run(config_in(copy))
    assert (folder / "predictions.csv").read_bytes() == (folder_of(evaluated) / "predictions.csv").read_bytes()
    inputs = read_record(folder / "test_results.json")["provenance"]["inputs"]
    assert inputs["checkpoint"]["path"].endswith("best_student.safetensors")
    write_record(folder / "config.json", record | {"stage": "lfm_finetune"})
    with pytest.raises(RecordError, match=r"made by the stage 'lfm_finetune'; a run of train_cnn or distillation"):
        evaluate_cnn.run(config_in(copy))


def test_the_fitted_head_ranks_its_findings_and_its_maps_find_them(evaluated):
    results = read_record(folder_of(evaluated) / "test_results.json")
    located = read_record(folder_of(evaluated) / "localization.json")
    frame = load_manifest(evaluated.manifest_path).frame
    for label in ("Pleural Effusion", "Lung Lesion"):
        assert results["protocols"]["empty_negative"]["per_label"][label]["roc_auc"]["value"] > 0.8
        entry = located["per_label"][label]
        positive = frame[(frame["split"] == "test") & (frame[label] == 1)]
        assert entry["films"] == entry["films_with_mask"] == len(positive)
        assert entry["mask_area"] == pytest.approx(16 * 16 / SIZE**2)
        assert entry["hit"]["chance"]["mean"]["value"] == pytest.approx(16 * 16 / SIZE**2)
        assert 0 <= entry["called"] <= entry["films"]
    assert (located["truth"], located["method"]) == ("drawn", "contrast_cam")
    assert located["selection"].startswith("test films with a mask of the finding (it was drawn")
    assert "| Lung Lesion |" in (folder_of(evaluated) / "findings.md").read_text()


def test_pages_carry_the_notices(evaluated):
    for name in ("results.md", "findings.md"):
        text = (folder_of(evaluated) / name).read_text()
        assert "not for clinical use" in text.splitlines()[2]
        assert "Synthetic cohort" in text
    assert read_record(folder_of(evaluated) / "localization.json")["synthetic"] is True


def test_test_labels_change_no_threshold_and_no_temperature(evaluated, copy, monkeypatch):
    frame = load_manifest(copy / "work" / "manifest.csv").frame
    test = frame["split"] == "test"
    flipped = 1 - frame.loc[test, list(LABELS)].clip(lower=0)
    frame.loc[test, list(LABELS)] = flipped
    write_manifest(copy / "work" / "manifest.csv", frame)
    config = config_in(copy)
    make_run(config)
    monkeypatch.setattr(evaluate_cnn, "explain", lambda *_: None)  # pictures have no part in this
    monkeypatch.setattr(results_page, "write_results", lambda *_: None)
    evaluate_cnn.run(config)
    before, after = (read_record(folder_of(c) / "test_results.json") for c in (evaluated, config))
    assert after["operating_points"] == before["operating_points"]
    counts = [r["protocols"]["empty_masked"]["per_label"]["Lung Lesion"]["positives"] for r in (before, after)]
    assert counts[0] != counts[1]


def test_again_replaces_what_was_there_and_only_that(evaluated, tmp_path):
    shutil.copytree(evaluated.data.root, tmp_path / "root")
    config = config_in(tmp_path / "root", explain={"labels": ["Lung Lesion"], "examples_per_outcome": 1})
    folder = folder_of(config)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "predictions.csv").read_bytes()
    shutil.rmtree(tmp_path / "root" / "masks")
    evaluate_cnn.run(config)
    assert (folder / "predictions.csv").read_bytes() == before
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("grad_cam/Pleural*")), "pictures that no page links to are gone"
    assert list(folder.glob("grad_cam/Lung_Lesion*"))
    assert not (folder / "localization.json").exists(), "without masks nothing can be said of places"


def test_predictions_and_results_stay_when_the_pictures_fail(copy, monkeypatch):
    def fail(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(explanation, "scaled_maps", fail)
    config = config_in(copy)
    with pytest.raises(OSError, match="No space left"):
        evaluate_cnn.run(config)
    there = {item.name for item in folder_of(config).iterdir()}
    assert OUTPUTS - {"findings.md", "grad_cam", "map_fit.npz", "localization.json"} <= there


def test_a_run_is_refused_other_data_than_it_was_trained_for(copy):
    config = config_in(copy)
    recorded = read_record(folder_of(config) / "config.json")["inputs"]["manifest"]["sha256"]
    frame = load_manifest(config.manifest_path).frame
    changed = write_manifest(config.manifest_path, frame[frame["image_id"] != frame["image_id"].iloc[0]])
    with pytest.raises(RecordError, match=rf"manifest .*: the run has {recorded}, this is {changed}"):
        evaluate_cnn.run(config)
    assert not (folder_of(config) / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": {"size": 96}}, r"pixels\.size: the run has 64, this is 96"),
        ({"pixels": {"fit": "center_crop"}}, r"pixels\.fit: the run has letterbox, this is center_crop"),
        ({"model": {"output_stride": 32}}, r"model\.output_stride: the run has 16, this is 32"),
        ({"model": {"in_channels": 3}}, r"model\.in_channels: the run has 1, this is 3"),
        ({"run_name": "other"}, r"other/config\.json is missing: there is no such run"),
    ],
)
def test_a_mismatch_names_both_sides(trained, changes, message):
    with pytest.raises(RecordError, match=message):
        evaluate_cnn.run(config_in(trained, **changes))


def test_what_lacks_is_named(copy):
    config = config_in(copy)
    config.pixels_path.unlink()
    with pytest.raises(DataError, match=r"images_64\.npy"):
        evaluate_cnn.run(config)
    (folder_of(config) / "best_model.safetensors").unlink()
    with pytest.raises(RecordError, match=r"has no best_model\.safetensors; has its training saved an epoch"):
        evaluate_cnn.run(config)
    write_record(folder_of(config) / "config.json", {"stage": "train_cnn"})
    with pytest.raises(RecordError, match=r"lacks 'config' or 'inputs\.manifest\.sha256'"):
        evaluate_cnn.run(config)


def test_a_split_without_images_is_named(copy):
    config = config_in(copy)
    frame = load_manifest(config.manifest_path).frame
    write_manifest(config.manifest_path, frame[frame["split"] != "validate"])
    make_run(config)
    with pytest.raises(UserError, match="no films in the split 'validate'"):
        evaluate_cnn.run(config)


def test_the_command_ends_with_status_2_and_a_readable_message(trained, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(config_in(trained).plain()))
    with pytest.raises(SystemExit) as ended:
        evaluate_cnn.main(["--config", str(path), "--run_name", "nobody"])
    assert ended.value.code == 2
    assert re.search(r"error: .*nobody/config\.json is missing", capsys.readouterr().err)
