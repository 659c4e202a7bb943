import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from simulated_predictions import simulated

from mlx_cxr.core.labels import LABELS, MAPPED, label_index
from mlx_cxr.evaluation.results import fit_operating_points
from mlx_cxr.explain.grad_cam import class_activation_maps
from mlx_cxr.explain.localization import localize
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.inference import explanation
from mlx_cxr.inference.map_fit import MapFit
from mlx_cxr.inference.trained_run import image_maps, study_predictions
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.pages.map_checks import localization_section
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.cohort import SplitData

POINTS = fit_operating_points(simulated(60, "validate", 0), "empty_negative", "f1", 0.1)


@pytest.fixture(scope="module")
def model():
    model = ResNet18(ResNetConfig())
    initialize(model, 0)
    return model.eval()


def split_of(test, images_per_study=2, cells=4):
    """Images of each study in turn, their maps and the logits of each image."""
    rng = np.random.default_rng(0)
    studies = np.repeat(test.study_ids, images_per_study)
    n = len(studies)
    frame = pd.DataFrame(
        {
            "study_id": studies,
            "patient_id": np.repeat(test.patient_ids, images_per_study),
            "image_id": [f"i{k}" for k in range(n)],
            "text": [f"report of {study}" for study in studies],
        }
    )
    images = ImageSource(rng.integers(0, 255, (n, 32, 32), dtype=np.uint8), np.arange(n), 4.0)
    labels = ("Edema", "Fracture")
    maps = ScaledMaps(
        labels,
        rng.random((2, n, cells, cells), dtype=np.float32),
        rng.normal(size=(n, len(LABELS))).astype(np.float32),
        np.ones(2, np.float32),
        "grad_cam",
    )
    return SplitData("test", frame, np.repeat(test.raw_labels, images_per_study, axis=0), images), maps


def test_maps_do_not_depend_on_how_images_are_batched(model):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 64, 64), dtype=np.uint8)
    source = ImageSource(pixels, np.array([4, 0, 2, 1, 3]), 4.0)
    made, logits = image_maps(model, source, ["Edema", "Fracture"], ["grad_cam"], batch_size=2)
    raw = made["grad_cam"]
    direct = class_activation_maps(model, preprocess(mx.array(pixels[[4, 0, 2, 1, 3]]), 1), ["Edema", "Fracture"])
    np.testing.assert_allclose(raw, direct.raw, atol=1e-4 * max(1.0, direct.raw.max()))
    np.testing.assert_allclose(logits, direct.logits, rtol=1e-4, atol=1e-4)
    references = dict(zip(MAPPED, np.arange(1.0, 1 + len(MAPPED)), strict=True)) | {"Fracture": np.nan}
    fit = MapFit(np.zeros(0), {}, {"grad_cam": references}, "")
    maps = explanation.scaled_maps(model, source, MAPPED, "grad_cam", fit, batch_size=4)
    assert maps.labels == MAPPED
    row = MAPPED.index("Edema")
    np.testing.assert_allclose(maps.raw[row], raw[0], atol=1e-4 * max(1.0, raw.max()))
    np.testing.assert_allclose(maps.heat("Edema", 2), maps.raw[row, 2] / (1 + row), rtol=1e-6)
    assert np.isnan(maps.heat("Fracture", 2)).all()


def test_study_predictions_average_their_images(model):
    pixels = np.random.default_rng(1).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    frame = pd.DataFrame(
        {"study_id": ["a", "b", "a"], "patient_id": ["p", "q", "p"], "split": "test", "view": ["AP", "PA", "PA"]}
    )
    data = SplitData("test", frame, np.zeros((3, len(LABELS)), np.float32), ImageSource(pixels, np.arange(3), 4.0))
    images = np.array(model(preprocess(mx.array(pixels), 1)))
    got = study_predictions(model, data, batch_size=2)
    np.testing.assert_allclose(got.logits, [(images[0] + images[2]) / 2, images[1]], rtol=1e-3, atol=1e-4)


def test_localization_scores_images_that_have_both_mask_and_label():
    test = simulated(25, "test", 2)
    data, maps = split_of(test)
    rng = np.random.default_rng(0)
    masks = []
    for image in range(len(data)):
        mask = np.zeros((32, 32), bool)
        y, x = rng.integers(0, 24, 2)
        mask[y : y + 8, x : x + 8] = True
        masks.append([{"Edema": mask}, {}, {"Edema": np.zeros((32, 32), bool)}][image % 3])
    settings = {"fraction": 0.1, "half_cell": 4.0, "samples": 50, "seed": 3, "synthetic": True}
    places = rng.random((len(MAPPED), 4, 4), dtype=np.float32)
    fit = MapFit(np.zeros(0), {"grad_cam": places}, {}, "")
    table = explanation.localization(maps, fit, data, masks, test, POINTS, **settings)
    column = label_index("Edema")
    rows = [k for k in range(0, len(data), 3) if data.raw_labels[k, column] == 1]
    assert list(table["per_label"]) == ["Edema"]
    entry = table["per_label"]["Edema"]
    assert (entry["films"], entry["films_with_mask"]) == (len(rows), len(range(0, len(data), 3)))
    drawn, patients = np.stack([masks[k]["Edema"] for k in rows]), data.frame["patient_id"].to_numpy()[rows]
    assert len(set(patients)) < len(patients), "some patients have several images"
    usual = places[MAPPED.index("Edema")]
    direct, near = (localize(maps.raw[0, rows], drawn, patients, usual, 0.1, reach, seed=3) for reach in (0.0, 4.0))
    assert entry["hit"]["maps"]["value"] == pytest.approx(direct.maps.hit.mean())
    assert entry["hit_half_cell"]["maps"]["value"] == pytest.approx(near.maps.hit.mean())
    assert entry["iou"]["swapped"]["mean"]["value"] == pytest.approx(direct.swapped.iou.mean())
    assert entry["iou"]["usual"]["mean"]["value"] == pytest.approx(direct.usual.iou.mean())
    called = POINTS.calibration.probabilities(test.logits)[:, column] >= POINTS.thresholds.values[column]
    of_images = np.repeat(called, 2)[rows]
    assert entry["called"] == of_images.sum()
    assert entry["hit_when_called"] == pytest.approx(direct.maps.hit[of_images].mean())
    assert entry["empty_maps"] == 0
    section = "\n".join(localization_section({**table, "selection": "test " + explanation.SELECTIONS["boxes"]}))
    assert f"| Edema | {len(rows)} | " in section
    assert "test films with a reader's box around the finding and the report label 1" in section
    some = test.select(np.arange(len(test)) != rows[0] // 2)
    without = explanation.localization(maps, fit, data, masks, some, POINTS, **settings)["per_label"]["Edema"]
    assert without["films"] == sum(k // 2 != rows[0] // 2 for k in rows) < len(rows), "of scored studies"
    assert explanation.localization(maps, fit, data, [{}] * len(data), test, POINTS, **settings) is None


def test_randomization_takes_images_evenly_and_leaves_the_model_alone(model):
    pixels = np.random.default_rng(0).integers(0, 255, (17, 64, 64), dtype=np.uint8)
    source = ImageSource(pixels, np.arange(17), 4.0)
    labels = ("Edema", "Fracture")
    fit = MapFit(np.zeros(0), {}, {"grad_cam": dict.fromkeys(labels, 1.0)}, "")
    maps = explanation.scaled_maps(model, source, labels, "grad_cam", fit, batch_size=8)
    before = np.array(model.fc.weight)
    check = explanation.randomization(model, maps, source, seed=0)
    assert {step: values.shape for step, values in check.items()} == {"fc": (3, 2, 8), "fc+layer4": (3, 2, 8)}
    some = ImageSource(pixels[[0, 2, 4, 6, 9, 11, 13, 16]], np.arange(8), 4.0)
    again = explanation.randomization(model, maps, some, seed=0)
    np.testing.assert_allclose(check["fc"], again["fc"], atol=1e-3)
    np.testing.assert_array_equal(np.array(model.fc.weight), before)
