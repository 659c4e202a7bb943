"""Localization scores of maps against masks, beside controls that know nothing of the image.

A hit rate means little alone: a large finding is hit by chance, and one that always lies in the same place by
a constant guess. So each score comes with the same score of random maps, of a guess at the image's centre, of
the maps of *other patients* with the same finding, of the finding's mean map over images that are not scored (its usual
place), and with the chance level that follows from the mask's area.

The scores are the pointing game (Zhang et al., arXiv:1608.00507), IoU of a map's strongest pixels with the mask, and
the share of a map's sum on it (the energy-based pointing game of Score-CAM, Wang et al., arXiv:1910.01279). A map
without evidence scores 0 in each. Maps are raw (any positive scale will do, as every score is invariant to it); masks
lie in the pixel store's square frame. NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import distance_transform_edt

from mlx_cxr.explain.maps import random_maps, upsample


@dataclass(frozen=True)
class Scores:
    """Localization scores of N images, float64 (N,) each, in [0, 1].

    Attributes:
        hit: pointing game, at the centre of the strongest cell; a share where several cells are strongest.
        iou: IoU of the strongest `fraction` of pixels, those that tie with the last one and have evidence.
        iou_area: IoU at the mask's own area: the map is told the size, not the place.
        mass: share of the map's sum within the mask.
    """

    hit: np.ndarray
    iou: np.ndarray
    iou_area: np.ndarray
    mass: np.ndarray


@dataclass(frozen=True)
class Localization:
    """One finding's scores and its controls on the same images and masks.

    Attributes:
        maps: the maps under test.
        random: random maps of the same resolution, averaged over the draws.
        centre: a guess that falls off from the image's centre.
        swapped: each image's mask against the maps of other patients' images (at most `swaps`, averaged); above
            `random` by as much as the finding's usual place alone explains. NaN where one patient has all images.
        usual: one fixed map for all images, the finding's usual place. NaN where none is given.
        chance: a uniformly random guess, in closed form from the mask's area.
        mask_area: float64 (N,), share of the image.
    """

    maps: Scores
    random: Scores
    centre: Scores
    swapped: Scores
    usual: Scores
    chance: Scores
    mask_area: np.ndarray


def localize(
    raw: np.ndarray,
    masks: np.ndarray,
    patients: Sequence[str] | np.ndarray,
    usual: np.ndarray | None = None,
    fraction: float = 0.1,
    tolerance: float = 0.0,
    random_draws: int = 20,
    swaps: int = 8,
    seed: int = 0,
) -> Localization:
    """Score one finding's maps against its masks, and every control with them.

    Args:
        raw: float (N, h, w), one target's part of `Maps.raw`, on the N images that have a mask.
        masks: (N, S, S), non-zero on the finding, in the images' frame.
        patients: (N,), the patient of each image.
        usual: float (h, w), >= 0: the finding's mean map over other images, such as those of validation.
        fraction: of pixels that count as the map's extent, in (0, 1].
        tolerance: pixels, Euclidean, by which the maximum may miss. The paper takes 15 on images of its own size.
        random_draws: random maps per image.
        swaps: at most so many other patients' maps per mask.
        seed: of the random maps.

    Returns:
        Scores per image, so that a caller can bootstrap them by patient.

    Raises:
        ValueError: shapes do not fit, a mask is empty (names its row), or a map is negative or not finite.
    """
    raw, masks, patients = np.asarray(raw, dtype=np.float32), np.asarray(masks) > 0, np.asarray(patients)
    if raw.ndim != 3 or masks.ndim != 3 or len(raw) != len(masks) or not len(raw):
        raise ValueError(f"maps {raw.shape} and masks {masks.shape}; expected (N, h, w) and (N, S, S) with N >= 1")
    if patients.shape != (len(raw),):
        raise ValueError(f"patients {patients.shape} for {len(raw)} maps; one per image is needed")
    if not masks.any(axis=(1, 2)).all():
        row = int(np.argmin(masks.any(axis=(1, 2))))
        raise ValueError(f"mask {row} is empty; keep only films on which the finding was drawn")
    fixed = np.zeros((0, 1, 1), np.float32) if usual is None else np.asarray(usual, dtype=np.float32)[None]
    if not all(np.isfinite(heat).all() and (heat >= 0).all() for heat in (raw, fixed)):
        raise ValueError("maps hold negative or non-finite values; pass them as class_activation_maps made them")
    if not 0 < fraction <= 1 or tolerance < 0 or random_draws < 1:
        raise ValueError(f"fraction {fraction}, tolerance {tolerance} or random_draws {random_draws} is out of range")
    n, size = len(raw), masks.shape[1:]
    heats = upsample(raw, size)
    centre = _centre_guess(size)
    place = upsample(fixed, size) if len(fixed) else fixed
    arms: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Localization) if field.type == "Scores"}
    for row, mask in enumerate(masks):
        wide = mask if tolerance == 0 else distance_transform_edt(~mask) <= tolerance

        def scored(
            candidates: np.ndarray, cells: np.ndarray | None, mask: np.ndarray = mask, wide: np.ndarray = wide
        ) -> np.ndarray:
            hits = [_hit(h, wide) for h in candidates] if cells is None else [_peak_hit(c, wide) for c in cells]
            rows = [
                (hit, _iou(h, mask, fraction), _iou(h, mask, mask.mean()), _mass(h, mask))
                for hit, h in zip(hits, candidates, strict=True)
            ]
            return np.mean(rows, axis=0) if rows else np.full(4, np.nan)

        draws = random_maps((random_draws, *raw.shape[1:]), seed=seed * 1_000_003 + row)
        after = np.roll(np.arange(n), -row - 1)
        other = after[patients[after] != patients[row]][:swaps]
        arms["maps"].append(scored(heats[row : row + 1], raw[row : row + 1]))
        arms["random"].append(scored(upsample(draws, size), draws))
        arms["centre"].append(scored(centre[None], None))
        arms["swapped"].append(scored(heats[other], raw[other]))
        arms["usual"].append(scored(place, fixed))
        arms["chance"].append(_chance(mask.mean(), wide.mean(), fraction))
    return Localization(
        **{arm: Scores(*np.array(rows, dtype=np.float64).T) for arm, rows in arms.items()},
        mask_area=masks.mean(axis=(1, 2)),
    )


def _hit(heat: np.ndarray, mask: np.ndarray) -> float:
    highest = heat.max()
    return float(mask[heat == highest].mean()) if highest > 0 else 0.0


def _peak_hit(cells: np.ndarray, mask: np.ndarray) -> float:
    """`_hit` of a map before its resize: its peak is the centre of its strongest cell.

    A bilinear map peaks at cell centres, but past the last one it is level, and that plateau is no place.
    """
    highest = cells.max()
    if highest <= 0:
        return 0.0
    peaks = np.argwhere(cells == highest) * (np.array(mask.shape) / cells.shape)
    rows, columns = np.rint(peaks).astype(int).T
    return float(mask[rows, columns].mean())


def _iou(heat: np.ndarray, mask: np.ndarray, fraction: float) -> float:
    count = max(1, round(fraction * heat.size))
    cut = np.partition(heat, heat.size - count, axis=None)[heat.size - count]
    found = (heat >= cut) & (heat > 0)
    return float((found & mask).sum() / (found | mask).sum())


def _mass(heat: np.ndarray, mask: np.ndarray) -> float:
    total = heat.sum(dtype=np.float64)
    return float(heat[mask].sum(dtype=np.float64) / total) if total > 0 else 0.0


def _centre_guess(size: tuple[int, int]) -> np.ndarray:
    """(H, W), 1 at the centre and falling to 0 at the corners."""
    y, x = (np.linspace(-1, 1, side) if side > 1 else np.zeros(1) for side in size)
    return (1.0 - np.hypot(y[:, None], x[None, :]) / np.sqrt(2)).clip(0)


def _chance(area: float, wide_area: float, fraction: float) -> tuple[float, float, float, float]:
    """Scores of pixels drawn uniformly: intersections have the expected size, and unions follow."""
    return wide_area, fraction * area / (fraction + area - fraction * area), area / (2 - area), area
