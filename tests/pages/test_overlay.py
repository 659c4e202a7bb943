import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from mlx_cxr.core.formatting import footer
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds
from mlx_cxr.evaluation.operating_points import ABSTAIN, PRESENT, OperatingPoints
from mlx_cxr.pages.overlay import (
    Reading,
    Tile,
    _colours,
    colour_scale,
    draw_overlay,
    font,
    image_tile,
    map_tile,
    montage,
    save_picture,
    wrapped,
)

IMAGE = np.tile(np.linspace(30, 220, 64).astype(np.uint8), (64, 1))
HEAT = np.zeros((8, 8), dtype=np.float32)
HEAT[:4, 4:] = 1.0
ABOVE = Reading("Edema", 0.8, 0.4, 1)
BELOW = Reading("Edema", 0.1, 0.4, 0)
SIDE = 256
LEFT, TOP, GAP = 20, 92, 14
RIGHT = LEFT + SIDE + GAP


def panel(picture: Image.Image, x: int) -> np.ndarray:
    return np.asarray(picture.crop((x, TOP, x + SIDE, TOP + SIDE))).astype(int)


def saturation(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(axis=-1) - pixels.min(axis=-1)


def test_no_evidence_leaves_the_image_as_it_is():
    np.testing.assert_array_equal(
        np.asarray(map_tile(IMAGE, np.zeros((4, 4)), 128)), np.asarray(image_tile(IMAGE, 128))
    )


def test_colour_lies_where_the_map_does_and_nowhere_else():
    picture = draw_overlay(IMAGE, HEAT, ABOVE, side=SIDE)
    np.testing.assert_array_equal(panel(picture, LEFT), np.asarray(image_tile(IMAGE, SIDE)))
    colour = saturation(panel(picture, RIGHT))
    assert colour[:96, 160:].min() > 60
    assert colour[160:].max() == 0
    assert colour[:, :96].max() == 0


def test_more_evidence_is_more_colour_and_over_one_clips():
    image = np.full((32, 32), 110, np.uint8)
    levels = [saturation(np.asarray(map_tile(image, np.full((2, 2), v), 32)).astype(int))[0, 0] for v in (0, 0.25, 1)]
    assert levels[0] == 0
    assert levels[0] < levels[1] < levels[2]
    np.testing.assert_array_equal(
        np.asarray(map_tile(image, np.full((2, 2), 1.0), 32)),
        np.asarray(map_tile(image, np.full((2, 2), 7.0), 32)),
    )


@pytest.mark.parametrize("opacity", [0.2, 0.72])
def test_the_scale_is_the_colours_of_a_map_on_gray(opacity):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, axis=0)
    picture = np.asarray(map_tile(np.full((64, 64), 110, np.uint8), ramp, 64, opacity))
    np.testing.assert_array_equal(colour_scale(64, 5, opacity), picture[:5])


def test_a_finer_image_has_its_map_in_the_place_of_the_one_that_was_seen():
    image = np.full((64, 64), 110, np.uint8)
    fine = np.full((128, 128), 110, np.uint8)
    wanted = np.asarray(map_tile(image, HEAT, 256))
    np.testing.assert_array_equal(np.asarray(map_tile(fine, HEAT, 256, seen=64)), wanted)
    assert (np.asarray(map_tile(fine, HEAT, 256)) != wanted).any()


def test_the_palette_gets_lighter_all_the_way():
    """Luminance rises with the value, so that the colours keep their order without colour vision."""
    luminance = _colours() @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -0.5).all()
    assert (np.diff(luminance[::8]) > 1).all()


def test_below_the_threshold_the_map_is_withheld_unless_asked_for():
    withheld = panel(draw_overlay(IMAGE, HEAT, BELOW, side=SIDE), RIGHT)
    assert saturation(withheld).max() <= 8
    assert withheld[:40].max() < 0.35 * 256
    asked = panel(draw_overlay(IMAGE, HEAT, BELOW, side=SIDE, show_withheld=True), RIGHT)
    assert saturation(asked).max() > 60


def test_a_map_without_scale_or_threshold_is_withheld_even_when_asked_for():
    nan = np.full((8, 8), np.nan, dtype=np.float32)
    assert saturation(panel(draw_overlay(IMAGE, nan, ABOVE, side=SIDE, show_withheld=True), RIGHT)).max() <= 8
    untuned = Reading("Edema", 0.8, math.nan)
    assert "no threshold" in untuned.withheld(HEAT)
    assert "never" in ABOVE.withheld(nan)
    assert saturation(panel(draw_overlay(IMAGE, HEAT, untuned, side=SIDE), RIGHT)).max() <= 8


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (
            Reading("Edema", 0.831, 0.41, 1),
            "calibrated p = 0.83 ≥ threshold 0.41   ·   report label: present",
        ),
        (Reading("Edema", 0.03, 0.41, 0), "calibrated p = 0.03 < threshold 0.41   ·   report label: absent"),
        (
            Reading("Edema", 0.5, 0.5, -1),
            "calibrated p = 0.50 ≥ threshold 0.50   ·   report label: uncertain",
        ),
        (
            Reading("Edema", 0.4096, 0.4099),
            "calibrated p = 0.4096 < threshold 0.4099   ·   report label: not mentioned",
        ),
        (
            Reading("Edema", 0.5, math.nan),
            "calibrated p = 0.50 no threshold   ·   report label: not mentioned",
        ),
    ],
)
def test_the_line_says_probability_threshold_and_label(reading, text):
    assert reading.summary() == text


def test_the_outline_runs_along_the_mask():
    dark = np.full((64, 64), 40, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    pixels = panel(draw_overlay(dark, HEAT, ABOVE, mask, side=SIDE), LEFT)[..., 0]
    white = np.argwhere(pixels > 200)
    assert 56 <= white.min() <= 64
    assert 191 <= white.max() <= 199
    assert (pixels[80:176, 80:176] == 40).all()
    assert (pixels[:40] == 40).all()


def test_synthetic_images_say_so_and_change_nothing_else():
    real = draw_overlay(IMAGE, HEAT, ABOVE, side=SIDE)
    synthetic = draw_overlay(IMAGE, HEAT, Reading("Edema", 0.8, 0.4, 1, synthetic=True), side=SIDE)
    assert ImageChops.difference(real, synthetic).getbbox()[1] >= TOP + SIDE + 20


def test_text_that_is_too_long_stays_inside_its_margin():
    reading = Reading("Enlarged Cardiomediastinum", 0.05, 0.2, image="p10/" + "0123456789" * 30)
    picture = np.asarray(draw_overlay(IMAGE, HEAT, reading, side=SIDE))
    assert (picture[:, -LEFT + 1 :] == picture[0, 0]).all()


def test_montage_places_every_tile_in_order():
    tiles = [Tile(Image.new("RGB", (40, 40), (value, 0, 0)), str(value)) for value in (60, 120, 180, 240)]
    picture = np.asarray(montage(tiles, 3, "title", synthetic=True, scale=False))
    assert picture.shape[1] == 2 * 20 + 3 * 40 + 2 * 14
    reds = [picture[62 + 20 + row * 74, 20 + 20 + column * 54, 0] for row, column in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert reds == [60, 120, 180, 240]
    with pytest.raises(ValueError, match="one size"):
        montage([tiles[0], Tile(Image.new("RGB", (41, 40)), "")], 2)
    with pytest.raises(ValueError, match="at least one column"):
        montage(tiles, 0)
    with pytest.raises(ValueError, match="one size"):
        montage([], 2)


@pytest.mark.parametrize("synthetic", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_notice_and_the_title_of_a_montage_are_whole(synthetic, count):
    tile = Tile(image_tile(IMAGE, 208), "")
    sheet = montage([tile] * count, 8, "student_v1_of_a_long_name: films, page 1", synthetic, own_images=True)
    room = sheet.width - 2 * 20
    lines = wrapped(footer(synthetic, own_image=True), 13, room)
    assert " ".join(lines) == footer(synthetic, own_image=True)
    assert all(font(13).getlength(line) <= room for line in lines)
    pixels = np.asarray(sheet).astype(int)
    ours = (np.abs(pixels - (255, 196, 61)).sum(axis=-1) < 40).any(axis=1)
    assert (np.diff(ours[-18 * len(lines) - 20 :].astype(int)) == 1).sum() >= len(lines), "each line is drawn"
    # What lies outside the margins is ground.
    assert (pixels[:, :18] == pixels[0, 0]).all()
    assert (pixels[-60:, -20:] == pixels[0, 0]).all()


def test_saved_picture_reads_back_and_carries_the_warning(tmp_path):
    picture = draw_overlay(IMAGE, HEAT, ABOVE, side=SIDE)
    path = save_picture(tmp_path / "new" / "edema.png", picture)
    with Image.open(path) as read:
        assert read.text["Warning"] == "Research only, not for clinical use"
        assert ImageChops.difference(read.convert("RGB"), picture).getbbox() is None
    assert [item.name for item in path.parent.iterdir()] == ["edema.png"]
    with pytest.raises(ValueError, match=r"\.png"):
        save_picture(tmp_path / "edema.jpg", picture)


def test_a_picture_says_that_the_model_abstains_and_why_and_is_otherwise_the_same():
    plain = draw_overlay(IMAGE, HEAT, ABOVE, side=SIDE)
    uncalled = replace(ABOVE, abstention="both are plausible")
    abstains = draw_overlay(IMAGE, HEAT, uncalled, side=SIDE, show_withheld=True)
    assert (abstains.width, abstains.height) == (plain.width, plain.height + 26)
    header, line, rest = (
        (0, 0, plain.width, 80),
        (0, 80, plain.width, 110),
        (0, TOP + 26, plain.width, plain.height + 26),
    )
    assert ImageChops.difference(plain.crop(header), abstains.crop(header)).getbbox() is None
    below = plain.crop((0, TOP, plain.width, plain.height))
    assert ImageChops.difference(below, abstains.crop(rest)).getbbox() is None
    accent = np.all(np.asarray(abstains.crop(line)) == (255, 196, 61), axis=-1)
    assert accent.sum() > 20
    longer = draw_overlay(IMAGE, HEAT, replace(ABOVE, abstention="both are plausible, and " * 20), side=SIDE)
    assert (np.asarray(longer)[:, -LEFT + 1 :] == np.asarray(longer)[0, 0]).all()


def test_one_reason_for_withholding_a_map_and_abstention_before_the_threshold():
    nan, none = np.full((8, 8), np.nan, np.float32), math.nan
    uncalled = replace(BELOW, abstention="both are plausible at 90 %")
    assert ABOVE.withheld(HEAT) == ""
    assert BELOW.withheld(HEAT) == "p = 0.10 is below the threshold 0.40"
    assert replace(BELOW, probability=0.3999).withheld(HEAT) == "p = 0.3999 is below the threshold 0.4000"
    for reading in (uncalled, replace(uncalled, probability=0.8), replace(uncalled, threshold=none)):
        for heat in (HEAT, nan):
            assert reading.withheld(heat) == "the model abstains on Edema: both are plausible at 90 %"
    assert replace(BELOW, threshold=none).withheld(nan) == "no scale: this finding never activated on validation"
    assert replace(BELOW, threshold=none).withheld(HEAT) == "no threshold could be tuned for this finding"
    assert uncalled.withheld(None) == "this run was evaluated without maps (evaluate_cnn --without_maps)"
    assert "No Finding has no map" in replace(uncalled, finding="No Finding").withheld(None)
    assert uncalled.summary() == BELOW.summary()


def test_a_map_without_a_call_is_not_drawn_unasked():
    uncalled = replace(ABOVE, abstention="both present and absent are plausible at 90 %")
    assert saturation(panel(draw_overlay(IMAGE, HEAT, uncalled, side=SIDE), RIGHT)[26:]).max() <= 8
    assert saturation(panel(draw_overlay(IMAGE, HEAT, uncalled, side=SIDE, show_withheld=True), RIGHT)).max() > 60


@pytest.mark.parametrize("probability", [0.05, 0.25, 0.35, 0.9])
def test_a_reading_of_an_answer_is_withheld_just_where_it_is_not_called_present(probability):
    sources = ("validation",) * 13 + ("default",)
    points = OperatingPoints(
        Calibration(np.ones(14), sources),
        Thresholds(np.full(14, 0.3), sources, "f1"),
        "empty_negative",
        ConformalBands(0.1, np.full(14, 0.2), np.full(14, 0.4), np.array([50] * 13 + [0]), np.full(14, 50)),
    )
    probabilities = np.full(14, probability)
    for k, state in enumerate(points.states(probabilities[None])[0]):
        reading = Reading.of(points, LABELS[k], probabilities, image="film")
        assert (reading.withheld(HEAT) == "") == (state == PRESENT)
        assert bool(reading.abstention) == (state == ABSTAIN)
        assert (reading.finding, reading.probability, reading.image) == (LABELS[k], probability, "film")
        assert reading.withheld(HEAT).startswith(f"the model abstains on {LABELS[k]}: ") == (state == ABSTAIN)
        np.testing.assert_equal(reading.threshold, 0.3 if k < 13 else math.nan)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"s50 Edema: probability is 1\.2"):
        Reading("Edema", 1.2, 0.5, image="s50")
    with pytest.raises(ValueError, match="probability is nan"):
        Reading("Edema", math.nan, 0.5)
    with pytest.raises(ValueError, match="threshold is -1"):
        Reading("Edema", 0.5, -1)
    with pytest.raises(ValueError, match="label is 2"):
        Reading("Edema", 0.5, 0.5, 2)
    with pytest.raises(KeyError, match="lime"):
        Reading("Edema", 0.5, 0.5, method="lime")
    with pytest.raises(ValueError, match="at least 256"):
        draw_overlay(IMAGE, HEAT, ABOVE, side=100)
    with pytest.raises(ValueError, match="uint8"):
        image_tile(IMAGE.astype(np.float32), 64)
    with pytest.raises(ValueError, match="expected finite"):
        map_tile(IMAGE, np.full((2, 2), np.nan), 64)
    with pytest.raises(ValueError, match="mask has shape"):
        draw_overlay(IMAGE, HEAT, ABOVE, np.ones((1, 64, 64)))
