import io
import warnings
from collections import Counter
from functools import cache

import fit_gate
import matplotlib
import numpy as np
import pytest
from chest_views import PARTS, TEST_SEED, TURNS, drawn_images, drawn_part, photographs, real_images, varied
from fit_gate import SHRINKAGE, Examples
from PIL import Image, ImageDraw, ImageOps
from scipy.stats import multivariate_normal

from mlx_cxr.data import chest_film_gate as gate
from mlx_cxr.data.chest_film_gate import coloured_part, concerns_about, features_of, fitted_gate
from mlx_cxr.data.decoding import Transform, decode_bytes

UNLIKE = "does not look like a frontal chest film"


@pytest.fixture
def frontal():
    return drawn_images(TEST_SEED, patients=5)["PA"][0]


@cache
def examples():
    if not real_images():
        pytest.skip("the real films (shared/realcxr, shared/realcxr2) are not on this machine")
    return fit_gate.examples()


def counts(images):
    """How often each concern comes up, and `fine` where none does."""
    found = Counter()
    for image in images:
        concerns = concerns_about(image)
        found.update(concerns or ["fine"])
    return found


@pytest.fixture(scope="module")
def seen():
    """Features of three kinds, drawn at random."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(40, 40)) / 6
    kinds = np.repeat(["frontal", "hand", "lateral"], (200, 40, 100))
    shift = {kind: rng.normal(size=40) for kind in ("frontal", "hand", "lateral")}
    features = rng.normal(size=(340, 40)) @ spread + np.stack([shift[kind] for kind in kinds])
    return Examples(features, kinds, np.repeat("here", 340), np.arange(340).astype(str), np.ones(340, bool))


@pytest.fixture(scope="module")
def over():
    """Of each of `examples`: whether it is objected to, by a fit that has not seen the patient."""
    found = fit_gate.cross_validated(examples())
    stored = [fitted_gate().threshold, fitted_gate().farthest]
    assert fit_gate.thresholds(examples(), found) == pytest.approx(stored, abs=0.01)
    return (found > stored).any(axis=1)


class TestFit:
    """The discriminants and the distance against SciPy's normal distribution."""

    def test_log_odds_are_those_of_normal_densities(self, seen):
        fitted = fit_gate.fit(seen)
        scaled = (seen.features - fitted.centre) / fitted.scale
        means = np.stack([scaled[seen.kinds == kind].mean(axis=0) for kind in fitted.kinds])
        # Frontal images have half of the weight, the two other kinds a quarter each.
        share = {"frontal": 1 / 2, "hand": 1 / 4, "lateral": 1 / 4}
        within = sum(share[kind] * np.cov(scaled[seen.kinds == kind].T, bias=True) for kind in fitted.kinds)
        within += SHRINKAGE * np.trace(within) / 40 * np.eye(40)
        logs = [multivariate_normal(m, within).logpdf(scaled) for m in means]
        expected = np.stack(logs[1:], axis=1) - logs[0][:, None] + np.log(1 / 2)
        assert fitted.kinds == ("frontal", "hand", "lateral")
        assert fitted.log_odds(seen.features) == pytest.approx(expected, abs=1e-8)

    def test_the_distance_is_mahalanobis_of_the_full_covariance(self, seen):
        fitted = fit_gate.fit(seen)
        rest = np.eye(40) - fitted.components.T @ fitted.components
        covariance = fitted.components.T @ np.diag(fitted.variances) @ fitted.components + fitted.residual * rest
        scaled = (seen.features - fitted.centre) / fitted.scale
        off = scaled - scaled[seen.kinds == "frontal"].mean(axis=0)
        expected = np.sqrt(np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off) / 40)
        assert fitted.distance(seen.features) == pytest.approx(expected, rel=1e-9)
        assert np.trace(covariance) == pytest.approx(np.trace(np.cov(scaled[seen.kinds == "frontal"].T, bias=True)))


@pytest.mark.slow
class TestRates:
    """On images of patients that the fit did not see, five folds, with the thresholds that `chest_gate.npz` has."""

    def test_the_fit_gives_these_figures(self):
        again, stored = fit_gate.fit(examples()), fitted_gate()
        assert again.kinds == stored.kinds
        assert stored.weights == pytest.approx(again.weights, abs=0.002 * np.abs(again.weights).max())
        assert stored.distance(examples().features) == pytest.approx(again.distance(examples().features), abs=0.01)

    @pytest.mark.parametrize(("source", "images"), [("nih", 584), ("mhh", 108), ("cohen", 277)])
    def test_false_alarms_on_real_frontal_images(self, over, source, images):
        seen = examples()
        rows = (seen.kinds == "frontal") & (seen.sources == source) & seen.plain
        assert rows.sum() == images
        assert over[rows].mean() <= 0.02

    @pytest.mark.parametrize(("source", "most"), [("nih", 0.025), ("mhh", 0.08), ("cohen", 0.025), ("synthetic", 0.01)])
    def test_false_alarms_on_altered_frontal_images(self, over, source, most):
        """Turned by up to 10 degrees, cropped, bordered, of other exposure, written on, noisy, blurred."""
        seen = examples()
        assert over[(seen.kinds == "frontal") & (seen.sources == source) & ~seen.plain].mean() <= most

    @pytest.mark.parametrize(
        ("kind", "images", "least"), [("lateral", 21, 0.97), ("ct", 24, 0.9), ("spine", 30, 0.9), ("photo", 12, 0.97)]
    )
    def test_real_images_of_other_kinds_are_objected_to(self, over, kind, images, least):
        seen = examples()
        real, altered = ((seen.kinds == kind) & (seen.plain == plain) for plain in (True, False))
        assert real.sum() == images
        assert over[real].mean() >= least
        assert over[altered].mean() >= least

    @pytest.mark.parametrize("kind", [*PARTS, *TURNS])
    def test_drawn_parts_and_turned_images_are_objected_to(self, over, kind):
        assert over[examples().kinds == kind].mean() >= 0.97

    def test_a_kind_that_was_not_fitted(self):
        """All drawn parts of the body at once, and laterals: what the distance from frontal images is for."""
        seen = examples()
        limits = [fitted_gate().threshold, fitted_gate().farthest]
        for kinds, least in ((list(PARTS), 0.95), (["lateral"], 0.75)):
            out = np.isin(seen.kinds, kinds)
            rows = out & seen.plain if (out & seen.plain).any() else out
            found = fit_gate.scores(fit_gate.fit(seen.only(~out)), seen.only(rows))
            assert (found > limits).any(axis=1).mean() >= least


class TestWords:
    """In-sample: which concern it is, not how often there is one."""

    @pytest.mark.parametrize("turn", TURNS)
    def test_turned_images_and_negatives(self, turn):
        images = [real.gray for real in real_images() if real.kind == "frontal"][::6]
        if not images:
            pytest.skip("the real films (shared/realcxr) are not on this machine")
        found = counts(TURNS[turn](image) for image in images)
        assert found[gate.REASONS[turn]] >= 0.9 * len(images)

    @pytest.mark.parametrize("kind", ["lateral", "ct"])
    def test_laterals_and_ct(self, kind):
        images = [real.gray for real in real_images() if real.kind == kind]
        if not images:
            pytest.skip("the real films (shared/realcxr2) are not on this machine")
        assert counts(images)[gate.REASONS[kind]] >= 0.9 * len(images)

    def test_a_mirrored_image_goes_unnoticed(self):
        # A limit that the README states.
        images = [real.gray for real in real_images() if real.kind == "frontal"][::6]
        assert counts(ImageOps.mirror(image) for image in images)["fine"] >= 0.95 * len(images)


@pytest.mark.slow
class TestSyntheticImages:
    """Of other patients than the fit's."""

    def test_frontal_images_pass(self):
        images = drawn_images(TEST_SEED, patients=45)
        assert counts(images["PA"] + images["AP"]) == {"fine": 97}

    def test_lateral_images(self):
        laterals = drawn_images(TEST_SEED, patients=45)["LATERAL"]
        assert counts(laterals)[gate.REASONS["lateral"]] >= 0.97 * len(laterals)

    @pytest.mark.parametrize("kind", PARTS)
    def test_parts_of_the_body_drawn_anew(self, kind):
        rng = np.random.default_rng(TEST_SEED)
        found = counts(varied(drawn_part(kind, rng), rng) for _ in range(30))
        assert found["fine"] <= 1


class TestFeatures:
    def test_ranks_by_hand(self):
        # 12 pixels of 10, three of 20, one of 30: ties share the mean of their ranks, 5.5, 13 and 15.
        pixels = np.full(16, 10.0)
        pixels[[5, 6, 7]], pixels[9] = 20, 30
        ranks = np.full(16, 5.5)
        ranks[[5, 6, 7]], ranks[9] = 13, 15
        result = gate.standardized_ranks(pixels.reshape(4, 4))
        assert result.ravel() == pytest.approx((ranks - ranks.mean()) / ranks.std())

    def test_exposure_and_equalization_hardly_matter(self, frontal):
        ranks = slice(0, gate.COARSE**2)
        first = features_of(frontal)[ranks]
        for other in (
            frontal.point([round(255 * (level / 255) ** 0.5) for level in range(256)]),
            ImageOps.equalize(frontal),
        ):
            assert np.corrcoef(first, features_of(other)[ranks])[0, 1] > 0.97

    @pytest.mark.parametrize(("angle", "orientation"), [(0, 0), (90, 2), (180, 4), (270, 6)])
    def test_a_ramp_has_the_orientation_of_its_slope(self, angle, orientation):
        y, x = np.mgrid[:64, :64] / 64
        ramp = np.cos(np.deg2rad(angle)) * x + np.sin(np.deg2rad(angle)) * y
        histograms = gate.oriented_gradients(ramp)
        assert histograms.shape == (8, 8, 8)
        assert (histograms.argmax(axis=2) == orientation).all()
        assert np.delete(histograms, orientation, axis=2).max() < 1e-3

    def test_borders_are_left_out(self, frontal):
        whole = frontal.resize((200, 200))
        framed = ImageOps.expand(whole, (40, 30, 20, 10), 0)
        left, top, right, bottom = gate.content_box(framed)
        own = gate.content_box(whole)
        assert (left - 40, top - 30, right - 40, bottom - 30) == pytest.approx(own, abs=4)

    def test_size_does_not_matter(self, frontal):
        large, small = (features_of(frontal.resize((side, side), Image.Resampling.BICUBIC)) for side in (1500, 300))
        assert np.corrcoef(large, small)[0, 1] > 0.99


class TestOtherImages:
    def test_photographs(self):
        images = photographs()
        fine = sum(not concerns_about(image.convert("L"), image) for image in images)
        coloured = sum(coloured_part(image) > gate.MOST_COLOURED for image in images)
        assert len(images) == 63
        assert fine == 0
        assert coloured >= 50

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
