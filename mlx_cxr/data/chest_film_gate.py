"""The quality gate: reasons why an image does not look like an upright frontal chest image.

An image without its uniform borders is reduced to 64 x 64 pixels, and their ranks are standardized, so that exposure,
gamma and histogram equalization do not matter. Its features are the ranks at 16 x 16, histograms of oriented gradients
(Dalal and Triggs, CVPR 2005) in cells of 8 x 8 with signed orientations, and a few figures of the whole: shape, spread
of gray levels, fineness, asymmetry. Two questions are asked of them:

- Which kind of image is it? Linear discriminants of frontal images, laterals, CT slices, spine radiographs, negatives,
  turned images, parts of images, other body parts and photographs.
- Is it like a frontal image at all? The Mahalanobis distance from frontal images under the Gaussian of probabilistic
  PCA (Tipping and Bishop, J R Stat Soc B 1999;61:611-622). It is for kinds of images that nobody thought of.

The figures are in `chest_gate.npz`; `tests/fit_gate.py` fits them, names its images, and measures the rates that
follow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MODEL = Path(__file__).with_name("chest_gate.npz")
SIDE, CELL, COARSE, ORIENTATIONS = 64, 8, 16, 8
LONGEST = 2.0
"""Long side over short side. Of 969 real frontal images the longest is 1.76."""
LEAST_CONTRAST = 25
"""Gray levels between the 2nd and the 98th percentile. Of 622 real frontal images the least has 55."""
COLOURED = 30
MOST_COLOURED = 0.1
"""More than this part of an image's pixels off its overall tint by more than `COLOURED` levels makes it a colour image;
markings on an image cover less."""
_UNLIKE = "does not look like a frontal chest film"
REASONS = {
    "lateral": "looks like a lateral view",
    "ct": "looks like a CT slice",
    "negative": "looks inverted (like a negative)",
    "left": "may be turned by 90 degrees to the left, or is no chest film",
    "right": "may be turned by 90 degrees to the right, or is no chest film",
    "down": "may be upside down, or is no chest film",
}
"""Kind of image -> its concern; of the other kinds it is that the image is unlike a frontal one."""
_REACH = 96
_MOST_TRIMMED = 28


@dataclass(frozen=True)
class Gate:
    """The fitted figures, of F features, K kinds and C components.

    Attributes:
        kinds: the K names, `frontal` first.
        centre, scale: of the features, (F,).
        weights, biases: of the discriminants, (K, F) and (K,).
        mean, components, variances, residual: of frontal images: (F,), (C, F), (C,) and the variance in each of the
            other directions.
        threshold: log-odds of any other kind against frontal from which there is a concern.
        farthest: distance from which there is one.
    """

    kinds: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    residual: float
    threshold: float
    farthest: float

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """Of each kind but frontal against it, (…, K - 1), for features (…, F)."""
        logits = (features - self.centre) / self.scale @ self.weights.T + self.biases
        return logits[..., 1:] - logits[..., :1]

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distance from frontal images, per feature, so that 1 is typical; (…) for features (…, F)."""
        centred = (features - self.centre) / self.scale - self.mean
        along = centred @ self.components.T
        beside = (centred**2).sum(axis=-1) - (along**2).sum(axis=-1)
        return np.sqrt((beside / self.residual + (along**2 / self.variances).sum(axis=-1)) / self.mean.size)

    def concern(self, features: np.ndarray) -> str | None:
        """The concern about an image of these features (F,); None where it looks like an upright frontal view."""
        odds = self.log_odds(features)
        if np.logaddexp.reduce(odds) <= self.threshold and self.distance(features) <= self.farthest:
            return None
        return REASONS.get(self.kinds[1 + int(odds.argmax())], _UNLIKE)


@functools.cache
def fitted_gate() -> Gate:
    """The gate of `chest_gate.npz`."""
    with np.load(MODEL, allow_pickle=False) as file:
        tables = {name: file[name] for name in file.files}
    kinds = tuple(tables.pop("kinds").tolist())
    return Gate(kinds, **{name: table.astype(np.float64)[()] for name, table in tables.items()})


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
    image = _reduced(image)
    low, high = np.percentile(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)), (2, 98))
    if high - low < LEAST_CONTRAST:
        concerns.append("is almost blank")
    elif reason := fitted_gate().concern(features_of(image)):
        concerns.append(reason)
    return tuple(concerns)


def features_of(image: Image.Image) -> np.ndarray:
    """Features of an image; float64 (F,), none of which depends on its size.

    Args:
        image: mode `L`; not of one level throughout.
    """
    image = _reduced(image)
    box = content_box(image)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, box=box), np.float64)
    ranks = standardized_ranks(pixels)
    coarse = ranks.reshape(COARSE, SIDE // COARSE, COARSE, SIDE // COARSE).mean(axis=(1, 3))
    coarse = (coarse - coarse.mean()) / max(coarse.std(), 1e-6)
    return np.concatenate([coarse.ravel(), oriented_gradients(ranks).ravel(), _figures(pixels, box)])


def _reduced(image: Image.Image) -> Image.Image:
    """An image of 256 to 511 pixels along its longer side, made of a large one in one pass."""
    factor = max(image.size) // 256
    return image.reduce(factor) if factor > 1 else image


def content_box(image: Image.Image) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an image without uniform borders, in its pixels; at most 29 % off each side."""
    small = np.asarray(image.resize((_REACH, _REACH), Image.Resampling.BOX), np.float64)
    low, high = np.percentile(small, (2, 98))
    ends = []
    for lines in (small.T, small):
        busy = lines.std(axis=1) >= 0.04 * (high - low)
        busy[_MOST_TRIMMED : _REACH - _MOST_TRIMMED] = True
        ends.append((busy.argmax() / _REACH, 1 - busy[::-1].argmax() / _REACH))
    (left, right), (top, bottom) = ends
    return left * image.width, top * image.height, right * image.width, bottom * image.height


def standardized_ranks(pixels: np.ndarray) -> np.ndarray:
    """Ranks of pixels (H, W) with mean 0 and variance 1; equal pixels share the mean of their ranks."""
    _, order, counts = np.unique(pixels.ravel(), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[order].reshape(pixels.shape)
    centred = ranks - ranks.mean()
    return centred / max(centred.std(), 1e-9)


def oriented_gradients(pixels: np.ndarray) -> np.ndarray:
    """Square roots of the histograms of signed gradient orientation, normalized by the cells around; (n, n, 8)."""
    padded = np.pad(pixels, 1, mode="edge")
    across, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = np.hypot(across, down)
    angle = np.arctan2(down, across) / (2 * np.pi) % 1 * ORIENTATIONS
    lower = np.floor(angle).astype(int)
    share = angle - lower
    cells = len(pixels) // CELL
    rows, columns = np.mgrid[: len(pixels), : len(pixels)] // CELL
    first = (rows * cells + columns) * ORIENTATIONS
    histograms = np.zeros(cells * cells * ORIENTATIONS)
    for orientation, weight in ((lower, 1 - share), (lower + 1, share)):
        where = (first + orientation % ORIENTATIONS).ravel()
        histograms += np.bincount(where, (strength * weight).ravel(), histograms.size)
    histograms = histograms.reshape(cells, cells, ORIENTATIONS)
    energy = np.pad((histograms**2).sum(axis=2), 1, mode="edge")
    around = sum(energy[i : i + cells, j : j + cells] for i in range(3) for j in range(3))
    return np.sqrt(histograms / np.sqrt(around + 0.1 * around.mean() + 1e-9)[..., None])


def coloured_part(image: Image.Image) -> float:
    """The part of an `RGB` image's area whose hue is off the image's overall tint.

    So an image scanned with a blue or brown cast has none, and a coloured arrow only its own area.
    """
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float64)
    opponents = np.stack([small[..., 0] - small[..., 1], (small[..., 0] + small[..., 1]) / 2 - small[..., 2]])
    off = opponents - np.median(opponents, axis=(1, 2), keepdims=True)
    return float((np.hypot(*off) > COLOURED).mean())


def _figures(pixels: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Log of width over height, histogram of gray levels, fineness down and across, asymmetry, dark and bright part."""
    left, top, right, bottom = box
    low, high = np.percentile(pixels, (1, 99))
    levels = ((pixels - low) / max(high - low, 1)).clip(0, 1)
    fineness = [np.abs(np.diff(levels, axis=axis)).mean() for axis in (0, 1)]
    asymmetry = np.abs(levels - levels[:, ::-1]).mean()
    histogram = np.histogram(levels, 10, (0, 1))[0] / levels.size
    shape = np.log((right - left) / (bottom - top))
    return np.array([shape, *histogram, *fineness, asymmetry, (levels < 0.03).mean(), (levels > 0.97).mean()])
