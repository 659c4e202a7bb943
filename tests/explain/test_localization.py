import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cxr.explain.localization import Scores, localize


def grid(*rows: str) -> np.ndarray:
    """Digits as a map or mask."""
    return np.array([[int(cell) for cell in row] for row in rows], dtype=np.float32)


MASK = grid("0000", "0110", "0110", "0000")


def scores(heat: np.ndarray, mask: np.ndarray, **settings: float) -> Scores:
    """Of one map, a cell of which is a pixel."""
    return localize(heat[None], mask[None], ["p"], random_draws=1, **settings).maps


@pytest.mark.parametrize(
    ("heat", "tolerance", "expected"),
    [
        (grid("1111", "1191", "1111", "1111"), 0, 1.0),
        (grid("9111", "1111", "1111", "1111"), 0, 0.0),
        (grid("9111", "1111", "1111", "1111"), 1.0, 0.0),
        (grid("9111", "1111", "1111", "1111"), 1.5, 1.0),
        (grid("1911", "1111", "1111", "1111"), 1.0, 1.0),
        (grid("9111", "1911", "1111", "1119"), 0, 1 / 3),
        (grid("0000", "0000", "0000", "0000"), 0, 0.0),
    ],
    ids=[
        "inside",
        "corner",
        "corner is sqrt 2 away",
        "within tolerance",
        "one above",
        "ties share",
        "no evidence",
    ],
)
def test_pointing_game_by_hand(heat, tolerance, expected):
    assert scores(heat, MASK, tolerance=tolerance).hit.item() == pytest.approx(expected)


def test_iou_by_hand():
    heat = grid("9000", "0870", "0605", "0000")
    for fraction, expected in ((1 / 16, 0.0), (2 / 16, 1 / 5), (4 / 16, 3 / 5), (1.0, 3 / 6)):
        assert scores(heat, MASK, fraction=fraction).iou.item() == pytest.approx(expected)
    assert scores(heat, MASK).iou_area.item() == pytest.approx(3 / 5)
    assert scores(MASK, MASK * 255).iou_area.item() == 1.0
    assert scores(np.zeros((4, 4)), MASK, fraction=0.5).iou.item() == 0.0


def test_mass_by_hand():
    assert scores(grid("9000", "0870", "0605", "0000"), MASK).mass.item() == pytest.approx(21 / 35)
    assert scores(np.zeros((4, 4)), MASK).mass.item() == 0.0


@given(
    st.lists(st.integers(0, 5), min_size=36, max_size=36),
    st.lists(st.booleans(), min_size=36, max_size=36).filter(any),
    st.floats(0.02, 1.0),
    st.floats(0.001, 1000.0),
)
def test_scores_are_shares_and_do_not_depend_on_the_scale(heat, mask, fraction, factor):
    heat, mask = np.array(heat, dtype=np.float64).reshape(6, 6), np.array(mask).reshape(6, 6)
    got, scaled = (scores(h, mask, fraction=fraction) for h in (heat, heat * factor))
    for name in ("hit", "iou", "iou_area", "mass"):
        value = getattr(got, name).item()
        assert 0 <= value <= 1 + 1e-12
        assert getattr(scaled, name).item() == pytest.approx(value)


def planted(n: int = 12, cells: int = 8, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps that peak on a blob of 2 x 2 cells, somewhere else on each image, and its mask."""
    rng = np.random.default_rng(seed)
    raw = rng.random((n, cells, cells)).astype(np.float32)
    masks = np.zeros((n, size, size), dtype=np.uint8)
    step = size // cells
    for image, (y, x) in enumerate(rng.integers(1, cells - 2, (n, 2))):
        raw[image, y : y + 2, x : x + 2] += 3
        # Cell i is centred on pixel step * i.
        top, left = y * step - step // 2, x * step - step // 2
        masks[image, top : top + 2 * step, left : left + 2 * step] = 255
    return raw, masks


def test_maps_that_know_the_place_beat_every_control():
    raw, masks = planted()
    result = localize(raw, masks, range(12), fraction=1 / 16, random_draws=40)
    assert result.maps.hit.mean() == 1.0
    assert result.maps.iou.mean() > 0.6
    for control in (result.random, result.centre, result.swapped, result.chance):
        assert control.hit.mean() < 0.4
        assert control.iou.mean() < 0.25
    np.testing.assert_allclose(result.mask_area, 1 / 16)
    np.testing.assert_allclose(result.chance.hit, 1 / 16)
    np.testing.assert_allclose(result.chance.iou, (1 / 256) / (2 / 16 - 1 / 256))
    np.testing.assert_allclose(result.chance.mass, 1 / 16)


def test_each_arm_is_what_its_name_says():
    raw, masks = planted(n=3)
    result = localize(raw, masks, list("abc"), raw[1], fraction=0.1, tolerance=2.0, random_draws=2, seed=3)
    for image in range(3):
        mask = masks[image]
        for name in ("hit", "iou", "iou_area", "mass"):
            alone = [getattr(scores(heat, mask, tolerance=2.0), name).item() for heat in raw]
            assert getattr(result.maps, name)[image] == pytest.approx(alone[image])
            others = [alone[other] for other in range(3) if other != image]
            assert getattr(result.usual, name)[image] == pytest.approx(alone[1]), "the map given, whatever the image"
            assert getattr(result.swapped, name)[image] == pytest.approx(np.mean(others))
    again = localize(raw, masks, list("abc"), raw[1], fraction=0.1, tolerance=2.0, random_draws=2, seed=3)
    np.testing.assert_array_equal(result.random.mass, again.random.mass)


def test_random_maps_hit_at_the_rate_of_chance():
    """At cell resolution a random maximum is uniform over the cells: hits follow the mask's area."""
    rng = np.random.default_rng(1)
    masks = np.zeros((60, 8, 8), dtype=bool)
    for mask in masks:
        mask.ravel()[rng.choice(64, 16, replace=False)] = True
    result = localize(rng.random((60, 8, 8)), masks, range(60), random_draws=30)
    assert result.random.hit.mean() == pytest.approx(0.25, abs=0.03)
    assert result.random.mass.mean() == pytest.approx(0.25, abs=0.01)
    assert result.random.iou.mean() == pytest.approx(result.chance.iou.mean(), abs=0.02)


def test_centre_guess_hits_the_centre_only():
    masks = np.zeros((2, 9, 9), dtype=bool)
    masks[0, 4, 4] = masks[1, 0, 0] = True
    result = localize(np.ones((2, 3, 3)), masks, range(2))
    np.testing.assert_array_equal(result.centre.hit, [1.0, 0.0])
    assert result.centre.mass[1] == 0.0


def test_swapped_maps_are_of_other_patients():
    """Two images of one patient, and one of another: the pair see the third map alone, which sees both of theirs."""
    raw, masks = planted(n=3)
    result = localize(raw, masks, ["a", "a", "b"], random_draws=1)
    for image, others in ((0, [2]), (1, [2]), (2, [0, 1])):
        wanted = [scores(raw[other], masks[image]).mass.item() for other in others]
        assert result.swapped.mass[image] == pytest.approx(np.mean(wanted))
    alone = localize(raw, masks, ["a"] * 3, random_draws=1)
    assert np.isnan(alone.swapped.hit).all(), "one patient has no other"
    assert np.isnan(alone.usual.hit).all(), "none was given"


def test_one_image_has_no_swap():
    result = localize(*planted(n=1), ["p"])
    assert result.maps.hit.item() == 1.0
    assert np.isnan(result.swapped.hit).all()


def test_bad_input_is_named():
    raw, masks = planted(n=3)
    with pytest.raises(ValueError, match="mask 1 is empty"):
        localize(raw, np.stack([masks[0], masks[0] * 0, masks[0]]), range(3))
    with pytest.raises(ValueError, match="N >= 1"):
        localize(raw, masks[:2], range(3))
    with pytest.raises(ValueError, match="N >= 1"):
        localize(raw[:0], masks[:0], [])
    with pytest.raises(ValueError, match="negative or non-finite"):
        localize(-raw, masks, range(3))
    with pytest.raises(ValueError, match="out of range"):
        localize(raw, masks, range(3), fraction=0.0)
    with pytest.raises(ValueError, match="non-finite"):
        localize(np.full((3, 2, 2), np.nan), masks, range(3))
    with pytest.raises(ValueError, match=r"tolerance -1 .* out of range"):
        localize(raw, masks, range(3), tolerance=-1)
    with pytest.raises(ValueError, match=r"fraction 1\.5, .* out of range"):
        localize(raw, masks, range(3), fraction=1.5)
    with pytest.raises(ValueError, match=r"patients \(2,\) for 3 maps"):
        localize(raw, masks, range(2))
    with pytest.raises(ValueError, match="negative or non-finite"):
        localize(raw, masks, range(3), -raw[0])


def test_a_peak_in_the_last_cell_is_its_centre_and_not_the_level_ground_past_it():
    raw = np.zeros((1, 6, 6), dtype=np.float32)
    raw[0, 5, 2] = 1
    mask = np.zeros((1, 96, 96), dtype=np.uint8)
    mask[0, 78:83, 30:35] = 1  # around pixel 16 * (5, 2)
    assert localize(raw, mask, ["p"], random_draws=1).maps.hit.item() == 1.0
    mask[0] = 0
    mask[0, 88:, 30:35] = 1
    assert localize(raw, mask, ["p"], random_draws=1).maps.hit.item() == 0.0
    assert localize(raw, mask, ["p"], tolerance=8.0, random_draws=1).maps.hit.item() == 1.0
