"""The quality gate: reasons why an image does not look like an upright frontal chest image.

An image is reduced to 8 x 8 pixels, and their ranks are standardized, so that exposure, gamma and histogram
equalization do not matter. The result is compared with frontal chest images: their mean, and the five ways in which
they differ most (principal components). The distance is Mahalanobis's under the Gaussian of probabilistic PCA (Tipping
and Bishop, J R Stat Soc B 1999;61:611-622), per pixel, so that a typical image is at about 1. An image that is too far
away, but whose negative or turned copy is not, is reported as such.

The tables were fitted on half of the patients of three public sources of equal weight (302 images of NIH ChestX-ray14,
the Hannover and the Cohen COVID-19 collections) and, for `LATERAL_PATTERN`, on 90 patients of the synthetic cohort;
`tests/chest_views.py` fits them again. On the 265 images of the other half the gate objects to 3 (1 %), which have
broad black bands or show much of the abdomen, and on 55 images of a fourth source to none. It objects to all negatives
of the 265, to 96 % of their copies turned by 90 degrees, to all but one upside down; to 91 % of the synthetic laterals
and none of the synthetic frontal images; to 97 % of 403 colour photographs and crops of them, and to 89 % of these in
gray. `tests/data/test_chest_film_gate.py` measures most of these rates.

The gate misses images that are mirrored left to right, turned by less than about 30 degrees, or of a child's or an
animal's chest; a missing part (half an image passes as often as not); poor exposure; and lateral views unlike the
synthetic ones: no real lateral was at hand. It describes the look of an image, not its content.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 8
FARTHEST = 1.8
"""Greatest distance of a frontal image; 0.3 % of the images that the tables were fitted on are farther."""
FARTHEST_TURNED = 1.5
"""Greatest distance of a negative or turned image for it to be reported so; 2 % of upright images are farther."""
LATERAL_FROM = 0.2
"""Correlation with `LATERAL_PATTERN` from which an image looks lateral; 0.7 % of those images reach it."""
LONGEST = 2.0
"""Long side over short side. Of 622 real frontal images the longest is 1.76."""
LEAST_CONTRAST = 25
"""Gray levels between the 2nd and the 98th percentile. Of 622 real frontal images the least has 55."""
COLOURED = 30
MOST_COLOURED = 0.1
"""More than this part of an image's pixels off its overall tint by more than `COLOURED` levels makes it a colour image;
markings on an image cover less."""


def _table(left: tuple[tuple[int, ...], ...], scale: float, mirrored: int = 1) -> np.ndarray:
    """float64 (64,), row by row, from the left half of a table that is symmetrical (1) or antisymmetrical (-1)."""
    half = np.array(left, np.float64) / scale
    return np.concatenate([half, mirrored * half[:, ::-1]], axis=1).ravel()


MEAN = _table(
    (
        (-129, -113, -89, -1),
        (-29, -13, -65, -18),
        (-2, -6, -98, -5),
        (-8, -18, -91, 39),
        (-24, -21, -42, 85),
        (-38, 0, 26, 113),
        (-52, 51, 94, 135),
        (-50, 90, 131, 148),
    ),
    scale=100,
)
"""Mean frontal chest image in standardized ranks: dark upper corners and lungs, bright mediastinum and abdomen."""
COMPONENTS = np.stack(
    [
        _table(
            (
                (7, -33, -50, -64),
                (79, -93, -141, -97),
                (66, -151, -121, -72),
                (141, -160, -111, -59),
                (210, -141, -103, -32),
                (260, -61, -67, -24),
                (278, 59, -5, -9),
                (287, 154, 34, 23),
            ),
            scale=1000,
        ),
        _table(
            (
                (74, 34, 77, 74),
                (142, 50, -7, 106),
                (162, -11, -20, 200),
                (197, -54, 30, 207),
                (205, -34, 99, 153),
                (211, 51, 99, 99),
                (218, 132, 59, 43),
                (239, 151, 44, 22),
            ),
            scale=1000,
            mirrored=-1,
        ),
        _table(
            (
                (-31, -49, -87, -179),
                (-191, -182, -74, -135),
                (-202, -113, 32, -88),
                (-145, -17, 108, -41),
                (-47, 123, 202, -35),
                (17, 259, 241, 10),
                (50, 211, 158, 32),
                (61, 60, 31, 22),
            ),
            scale=1000,
        ),
        _table(
            (
                (179, 179, 183, 123),
                (-74, -76, 98, 88),
                (-220, -154, 158, 53),
                (-197, -159, 115, -23),
                (-152, -171, 0, -61),
                (-100, -158, -46, -18),
                (39, -90, -35, 31),
                (232, 82, 75, 99),
            ),
            scale=1000,
        ),
        _table(
            (
                (139, 176, 43, -12),
                (297, 83, -209, -107),
                (68, -161, -170, 60),
                (-30, -197, -11, 170),
                (-80, -140, 148, 131),
                (-100, -12, 190, 29),
                (-96, 66, 93, -36),
                (-71, -56, -87, -118),
            ),
            scale=1000,
        ),
    ]
)
"""Principal components of frontal images: the shoulders' and sides' brightness, the side they lean to, the height of
the diaphragm, and finer ones; unit vectors."""
VARIANCES = np.array([5.04, 4.09, 3.89, 1.81, 1.69])
RESIDUAL_VARIANCE = 0.233
"""Variance along each of the components, and of each other direction."""
LATERAL_PATTERN = _table(
    (
        (9, -29, 109, 316),
        (-46, -205, 94, 203),
        (-270, -83, 195, -121),
        (-204, 69, 25, -184),
        (5, 87, 40, -155),
        (29, -16, 41, -111),
        (49, 4, 134, 10),
        (69, -80, 9, 6),
    ),
    scale=1000,
)
"""Linear discriminant, without a side, of synthetic lateral images against synthetic and real frontal ones."""


def concerns_about(image: Image.Image, colour: Image.Image | None = None) -> tuple[str, ...]:
    """Reasons why an image does not look like an upright frontal chest image.

    Args:
        image: mode `L`, the whole image, of any size.
        colour: mode `RGB`, the same in its colours, of any size; None for an image that has none.

    Returns:
        Each in words that complete "the film …"; empty where nothing speaks against it.
    """
    concerns = []
    if colour is not None and coloured_part(colour) > MOST_COLOURED:
        concerns.append("is in colour, like a photograph")
    longest, shortest = max(image.size), min(image.size)
    if longest > LONGEST * shortest:
        concerns.append(f"is {longest / shortest:.1f} times as long as it is wide; part of it may be cut off")
    low, high = np.percentile(np.asarray(image.resize((64, 64), Image.Resampling.BOX)), (2, 98))
    if high - low < LEAST_CONTRAST:
        concerns.append("is almost blank")
    elif reason := _view_concern(pattern(image)):
        concerns.append(reason)
    return tuple(concerns)


def pattern(image: Image.Image) -> np.ndarray:
    """Standardized ranks of an image's 8 x 8 means; float64 (64,), mean 0 and variance 1.

    Args:
        image: mode `L`; not of one level throughout.
    """
    means = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)).ravel()
    _, order, counts = np.unique(means, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[order]
    centred = ranks - ranks.mean()
    return centred / max(centred.std(), 1e-9)


def distance(patterns: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of patterns from those of frontal chest images; 1 is typical.

    Args:
        patterns: (…, 64), as `pattern` gives.

    Returns:
        float64 (…).
    """
    centred = patterns - MEAN
    along = centred @ COMPONENTS.T
    beside = (centred**2).sum(axis=-1) - (along**2).sum(axis=-1)
    return np.sqrt((beside / RESIDUAL_VARIANCE + (along**2 / VARIANCES).sum(axis=-1)) / MEAN.size)


def lateral_likeness(patterns: np.ndarray) -> np.ndarray:
    """Correlation of patterns (…, 64) with `LATERAL_PATTERN`; float64 (…) in -1..1."""
    return patterns @ LATERAL_PATTERN / (np.linalg.norm(LATERAL_PATTERN) * SIDE)


def coloured_part(image: Image.Image) -> float:
    """The part of an `RGB` image's area whose hue is off the image's overall tint.

    So an image scanned with a blue or brown cast has none, and a coloured arrow only its own area.
    """
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float64)
    opponents = np.stack([small[..., 0] - small[..., 1], (small[..., 0] + small[..., 1]) / 2 - small[..., 2]])
    off = opponents - np.median(opponents, axis=(1, 2), keepdims=True)
    return float((np.hypot(*off) > COLOURED).mean())


def _view_concern(ranks: np.ndarray) -> str | None:
    """The concern about an image of this pattern (64,); None where it looks like an upright frontal view."""
    if distance(ranks) <= FARTHEST:
        return "looks like a lateral view" if lateral_likeness(ranks) > LATERAL_FROM else None
    square = ranks.reshape(SIDE, SIDE)
    # Each fault undone: whichever then looks most like a frontal view is the likely one.
    others = {
        "looks inverted (like a negative)": -ranks,
        "may be turned by 90 degrees to the left, or is no chest film": np.rot90(square, -1).ravel(),
        "may be turned by 90 degrees to the right, or is no chest film": np.rot90(square).ravel(),
        "may be upside down, or is no chest film": np.rot90(square, 2).ravel(),
    }
    far = {reason: float(distance(other)) for reason, other in others.items()}
    reason = min(far, key=far.__getitem__)
    return reason if far[reason] <= FARTHEST_TURNED else "does not look like a frontal chest film"
