"""Images: what a finding changes lies in its mask, and nothing else changes."""

import numpy as np
import pytest

from mlx_cxr.synthetic import image as image_module
from mlx_cxr.synthetic.anatomy import sample_patient
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.devices import BYSTANDERS, DEVICES
from mlx_cxr.synthetic.findings import LOBES
from mlx_cxr.synthetic.image import render_image

SIZE = 160
# Findings that also shift or reshape what lies beside them get a smaller factor.
CASES = [
    ("Atelectasis", 1, "plate", 1.7),
    ("Cardiomegaly", 0, "", 1.7),
    ("Consolidation", -1, "right upper lobe", 5),
    ("Edema", 0, "", 3),
    ("Enlarged Cardiomediastinum", 0, "", 2),
    ("Fracture", -1, "acute", 3),
    ("Lung Lesion", -1, "single", 5),
    ("Lung Opacity", 1, "lingula", 5),
    ("Pleural Effusion", 1, "", 5),
    ("Pleural Other", 1, "thickening", 4),
    ("Pneumonia", -1, "right lower lobe", 4),
    ("Pneumothorax", 1, "", 2),
    ("Support Devices", 0, "endotracheal tube|PICC", 4),
]


def patient(seed=4):
    return sample_patient(10_000_001, np.random.default_rng(seed), seed)


@pytest.mark.parametrize(("label", "side", "kind", "factor"), CASES)
def test_a_finding_changes_the_image_where_its_mask_is(monkeypatch, label, side, kind, factor):
    # The grey scale is fitted to each image, so images are compared before display.
    monkeypatch.setattr(image_module.physics, "display", lambda density, view, exposure: density)
    monkeypatch.setattr(image_module, "_mark_side", lambda *args: None)
    without = render_image(patient(), {}, "PA", SIZE, 9)
    with_it = render_image(patient(), {label: Finding(label, 0.7, side, kind, 5)}, "PA", SIZE, 9)
    mask = with_it.masks[label]
    assert mask.shape == with_it.pixels.shape
    assert mask.dtype == bool
    assert 0.002 < mask.mean() < 0.5
    change = np.abs(with_it.pixels - without.pixels)
    assert change[mask].mean() > factor * change[~mask].mean()
    assert change[mask].mean() > 0.02


@pytest.mark.parametrize(
    "label", [case[0] for case in CASES if case[0] not in ("Support Devices", "Fracture", "Lung Lesion")]
)
def test_more_severe_is_more_to_see(label):
    side, kind = next((side, kind) for name, side, kind, _ in CASES if name == label)
    areas = [
        render_image(patient(), {label: Finding(label, s, side, kind, 5)}, "PA", SIZE, 9).masks[label].mean()
        for s in (0.3, 0.9)
    ]
    assert areas[1] > areas[0]


def test_side_is_side():
    for side in (-1, 1):
        image = render_image(patient(), {"Pleural Effusion": Finding("Pleural Effusion", 0.6, side)}, "PA", SIZE, 3)
        columns = np.nonzero(image.masks["Pleural Effusion"])[1]
        assert (columns.mean() > image.pixels.shape[1] / 2) == (side == 1)


def test_opacity_is_the_parent_of_its_children():
    images = {
        name: render_image(patient(), {name: Finding(name, 0.7, -1, "right lower lobe", 2)}, "PA", SIZE, 3)
        for name in ("Consolidation", "Pneumonia", "Edema", "Atelectasis", "Lung Lesion")
    }
    for name, image in images.items():
        assert (image.masks["Lung Opacity"] >= image.masks[name]).all()
    assert (
        "Lung Opacity"
        not in render_image(patient(), {"Pneumothorax": Finding("Pneumothorax", 0.7, 1)}, "PA", SIZE, 3).masks
    )


def test_the_heart_is_drawn_at_the_ratio_of_its_severity():
    normal = render_image(patient(), {}, "PA", SIZE, 3)
    large = render_image(patient(), {"Cardiomegaly": Finding("Cardiomegaly", 1.0)}, "PA", SIZE, 3)
    assert normal.ratio < 0.5 < large.ratio
    assert large.ratio == pytest.approx(0.525 + 0.135)


@pytest.mark.parametrize("kind", ["PA", "AP", "LATERAL"])
def test_views_and_seeds(kind):
    one, same, other = (render_image(patient(), {}, kind, 128, seed, kind == "AP") for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.pixels, same.pixels)
    assert one.pixels.shape != other.pixels.shape or (one.pixels != other.pixels).any()
    assert one.pixels.dtype == np.uint8
    assert min(one.pixels.shape) == 128
    assert one.pixels.std() > 40


@pytest.mark.parametrize("name", list(DEVICES))
def test_every_device_is_bright_and_masked_unless_a_bystander(name):
    finding = {"Support Devices": Finding("Support Devices", 1.0, 1, name, 3)}
    image = render_image(patient(), finding, "AP", 256, 3, supine=True)
    plain = render_image(patient(), {}, "AP", 256, 3, supine=True)
    assert ("Support Devices" in image.masks) == (name not in BYSTANDERS)
    gain = image.pixels.astype(int) - plain.pixels
    assert (gain > 10).sum() > 15
    if name not in BYSTANDERS:
        assert gain[image.masks["Support Devices"]].mean() > 3 + abs(gain[~image.masks["Support Devices"]].mean())


def test_every_lobe_and_lateral_draws():
    for lobe, (side, _, _) in LOBES.items():
        for kind in ("PA", "LATERAL"):
            image = render_image(
                patient(), {"Consolidation": Finding("Consolidation", 0.7, side, lobe, 1)}, kind, 128, 2
            )
            assert image.masks["Consolidation"].any(), (lobe, kind)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="OBLIQUE"):
        render_image(patient(), {}, "OBLIQUE", 128, 1)
    with pytest.raises(ValueError, match="32 px"):
        render_image(patient(), {}, "PA", 32, 1)
