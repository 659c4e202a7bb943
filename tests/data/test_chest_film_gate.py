import io
import warnings
from collections import Counter

import matplotlib
import numpy as np
import pytest
from chest_views import TEST_SEED, drawn_images, fitted_tables, patterns, real_images
from PIL import Image, ImageDraw, ImageOps

from mlx_cxr.data import chest_film_gate as gate
from mlx_cxr.data.chest_film_gate import coloured_part, concerns_about, distance, lateral_likeness, pattern
from mlx_cxr.data.decoding import Transform, decode_bytes

LEFT, RIGHT, DOWN = (
    f"may be {turn}, or is no chest film"
    for turn in ("turned by 90 degrees to the left", "turned by 90 degrees to the right", "upside down")
)
NEGATIVE, LATERAL = "looks inverted (like a negative)", "looks like a lateral view"
UNLIKE = "does not look like a frontal chest film"


@pytest.fixture
def frontal():
    return drawn_images(TEST_SEED, patients=5)["PA"][0]


@pytest.fixture
def held_out():
    """Real frontal images of patients that the tables did not see."""
    images = [real.gray for real in real_images() if not real.fitted]
    if not images:
        pytest.skip("the real films (shared/realcxr) are not on this machine")
    return images


def counts(images):
    """How often each concern comes up, and `fine` where none does."""
    found = Counter()
    for image in images:
        concerns = concerns_about(image)
        found.update(concerns or ["fine"])
    return found


def photographs():
    """Colour photographs that come with scikit-learn and Matplotlib, and crops of them: RGB."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    whole.append(Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB"))
    rng = np.random.default_rng(0)
    images = list(whole)
    for image in whole:
        for _ in range(20):
            side = int(min(image.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
            images.append(image.crop((left, top, left + side, top + side)))
    return images


class TestTables:
    def test_components_are_unit_vectors_at_right_angles(self):
        assert pytest.approx(np.eye(5), abs=0.005) == gate.COMPONENTS @ gate.COMPONENTS.T
        assert np.abs(gate.COMPONENTS.sum(axis=1)).max() < 0.02

    def test_distance_is_mahalanobis_of_the_full_covariance(self):
        axes = np.linalg.qr(gate.COMPONENTS.T)[0]
        within = axes @ np.diag(gate.VARIANCES) @ axes.T
        covariance = within + gate.RESIDUAL_VARIANCE * (np.eye(64) - axes @ axes.T)
        images = patterns(drawn_images(TEST_SEED, patients=5)["AP"])
        centred = images - gate.MEAN
        expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred) / 64)
        assert distance(images) == pytest.approx(expected, rel=0.01)

    @pytest.mark.slow
    def test_the_fit_gives_these_tables(self):
        if not real_images():
            pytest.skip("the real films (shared/realcxr) are not on this machine")
        tables = fitted_tables()
        assert pytest.approx(tables["MEAN"], abs=0.006) == gate.MEAN
        assert pytest.approx(tables["COMPONENTS"], abs=0.0006) == gate.COMPONENTS
        assert pytest.approx(tables["VARIANCES"], abs=0.006) == gate.VARIANCES
        assert pytest.approx(tables["RESIDUAL_VARIANCE"], abs=0.0006) == gate.RESIDUAL_VARIANCE
        assert pytest.approx(tables["LATERAL_PATTERN"], abs=0.0006) == gate.LATERAL_PATTERN


class TestPattern:
    def test_ranks_by_hand(self):
        # 60 pixels of 10, three of 20, one of 30: ties share the mean of their ranks, 29.5, 61 and 63.
        pixels = np.full(64, 10, np.uint8)
        pixels[[5, 6, 7]] = 20
        pixels[9] = 30
        ranks = np.full(64, 29.5)
        ranks[[5, 6, 7]], ranks[9] = 61, 63
        result = pattern(Image.fromarray(pixels.reshape(8, 8)))
        assert result == pytest.approx((ranks - ranks.mean()) / ranks.std())

    def test_exposure_and_equalization_hardly_matter(self, frontal):
        other = frontal.point([round(255 * (level / 255) ** 0.5) for level in range(256)])
        assert pattern(frontal) @ pattern(other) / 64 > 0.98
        assert pattern(frontal) @ pattern(ImageOps.equalize(frontal)) / 64 > 0.97

    def test_lateral_likeness_is_a_correlation(self, frontal):
        ranks = pattern(frontal)
        assert lateral_likeness(ranks) == pytest.approx(np.corrcoef(ranks, gate.LATERAL_PATTERN)[0, 1], abs=0.01)


class TestRealImages:
    """Rates on images that had no part in the fit, and by source on all."""

    def test_false_alarms_on_frontal_images(self, held_out):
        found = counts(held_out)
        assert len(held_out) == 265
        assert len(held_out) - found["fine"] <= 3

    @pytest.mark.parametrize(("source", "images", "alarms"), [("nih", 381, 2), ("mhh", 108, 2), ("cohen", 78, 2)])
    def test_false_alarms_by_source(self, held_out, source, images, alarms):
        found = counts(real.gray for real in real_images() if real.source == source)
        assert images - found["fine"] <= alarms

    def test_negatives(self, held_out):
        found = counts(ImageOps.invert(image) for image in held_out)
        assert found["fine"] == 0
        assert found[NEGATIVE] >= 0.95 * len(held_out)

    @pytest.mark.parametrize(
        ("turn", "reason", "missed", "named"),
        [
            (Image.Transpose.ROTATE_90, LEFT, 0.05, 0.9),
            (Image.Transpose.ROTATE_270, RIGHT, 0.05, 0.9),
            (Image.Transpose.ROTATE_180, DOWN, 0.01, 0.93),
            (Image.Transpose.FLIP_TOP_BOTTOM, DOWN, 0.01, 0.93),
        ],
    )
    def test_turned_images(self, held_out, turn, reason, missed, named):
        found = counts(image.transpose(turn) for image in held_out)
        assert found["fine"] <= missed * len(held_out)
        assert found[reason] >= named * len(held_out)

    def test_a_mirrored_image_goes_unnoticed(self, held_out):
        # A limit that the module states.
        assert counts(ImageOps.mirror(image) for image in held_out)["fine"] >= 0.98 * len(held_out)


@pytest.mark.slow
class TestSyntheticImages:
    def test_frontal_images_pass(self):
        images = drawn_images(TEST_SEED)
        assert counts(images["PA"] + images["AP"]) == {"fine": 188}

    def test_lateral_images(self):
        laterals = drawn_images(TEST_SEED)["LATERAL"]
        found = counts(laterals)
        assert found[LATERAL] >= 0.9 * len(laterals)
        assert set(found) == {LATERAL, "fine"}


class TestOtherImages:
    def test_photographs(self):
        images = photographs()
        fine = sum(not concerns_about(image.convert("L"), image) for image in images)
        coloured = sum(coloured_part(image) > gate.MOST_COLOURED for image in images)
        in_gray = counts(image.convert("L") for image in images)
        assert len(images) == 63
        assert fine <= 2
        assert coloured >= 50
        assert in_gray["fine"] <= 0.1 * len(images)

    def test_noise(self):
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (300, 300), np.uint8)) for _ in range(20)]
        assert counts(images) == {UNLIKE: 20}

    def test_a_page_of_text(self):
        page = Image.new("L", (850, 1100), 255)
        draw = ImageDraw.Draw(page)
        for row in range(80, 900, 18):
            draw.text((80, row), "lorem ipsum dolor sit amet " * (2 + row % 4), fill=0)
        assert concerns_about(page)

    @pytest.mark.parametrize("level", [0, 120, 254])
    def test_almost_blank(self, level):
        image = np.full((200, 200), level, np.uint8)
        image[90:96, 90:140] = 255 - level
        image += np.random.default_rng(0).integers(0, 2, image.shape, np.uint8)
        assert concerns_about(Image.fromarray(image)) == ("is almost blank",)

    def test_a_narrow_strip(self, frontal):
        strip = frontal.resize((300, 100))
        assert "is 3.0 times as long as it is wide; part of it may be cut off" in concerns_about(strip)

    def test_a_small_image_of_one_level(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert concerns_about(Image.new("L", (32, 32), 7)) == ("is almost blank",)


class TestColour:
    def test_a_gray_image_saved_in_colour_passes(self, frontal):
        assert coloured_part(frontal.convert("RGB")) == 0
        assert concerns_about(frontal, frontal.convert("RGB")) == ()

    def test_a_few_coloured_marks_pass(self, frontal):
        marked = frontal.convert("RGB").resize((400, 400))
        draw = ImageDraw.Draw(marked)
        draw.rectangle((60, 200, 120, 300), outline=(255, 0, 0), width=4)
        draw.text((10, 10), "RIGHT LUNG", fill=(0, 255, 0))
        assert 0 < coloured_part(marked) < gate.MOST_COLOURED
        assert concerns_about(frontal, marked) == ()

    def test_a_blue_cast_passes(self, frontal):
        gray = np.asarray(frontal, np.float64)
        blue = np.stack([0.85 * gray, 0.9 * gray, np.minimum(gray + 20, 255)], axis=-1).astype(np.uint8)
        assert coloured_part(Image.fromarray(blue)) < gate.MOST_COLOURED

    def test_a_colour_map_over_an_image_is_seen(self, frontal):
        heat = Image.fromarray((matplotlib.colormaps["jet"](np.asarray(frontal))[..., :3] * 255).astype(np.uint8))
        assert concerns_about(frontal, heat)[0] == "is in colour, like a photograph"

    @pytest.mark.parametrize("name", ["JPEG", "PNG"])
    def test_colours_are_seen_though_images_are_decoded_in_gray(self, name):
        photo = photographs()[0]
        content = io.BytesIO()
        photo.save(content, name)
        inspected = decode_bytes(content.getvalue(), Transform(64))
        assert "is in colour, like a photograph" in inspected.concerns
        plain = decode_bytes(content.getvalue(), Transform(64), inspect=False)
        assert plain.concerns == ()
        assert np.array_equal(inspected.gray, plain.gray)
