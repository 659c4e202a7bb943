"""Distance between two sets of images in the features of a network: the kernel distance (KID) of Bińkowski et al.,
"Demystifying MMD GANs", ICLR 2018 (arXiv:1801.01401), here in the features of the run's own network.

It is the squared maximum mean discrepancy under a cubic kernel, by its unbiased estimator: 0 on average for images of
one kind, however few there are. The Fréchet distance of 512 features is above 0 for them until there are thousands.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

MOST = 500
"""Patients of a set; of more, so many are drawn."""
PERMUTATIONS = 999


class FeatureDistance(TypedDict):
    """Distance between two sets of images, one image of each patient."""

    value: float | None
    p_value: float | None
    """Below 0 where the sets are more alike than two draws from one; and the share of permutations of the patients
    between the sets that are as far apart. Null for a set of fewer than two patients."""
    patients: list[int]
    """Drawn from each."""


def one_of_each(patient_ids: np.ndarray, seed: int, most: int = MOST) -> np.ndarray:
    """Rows of one image of each patient, which are independent of each other: int (P,), sorted; P <= `most`.

    Args:
        patient_ids: (N,) str, of the images.
        seed: draws the images, and the patients where there are more than `most`.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(patient_ids))
    rows = order[np.unique(patient_ids[order], return_index=True)[1]]
    return np.sort(rng.permutation(rows)[:most])


def feature_distance(
    first: np.ndarray, second: np.ndarray, seed: int, permutations: int = PERMUTATIONS
) -> FeatureDistance:
    """The distance, and the test of Gretton et al. (JMLR 2012) for images of one kind, by permutation.

    Args:
        first, second: float (M, D) and (N, D), features of independent images.
        seed: of the permutations.
    """
    counts = [len(first), len(second)]
    if min(counts) < 2:
        return {"value": float("nan"), "p_value": float("nan"), "patients": counts}
    x = np.concatenate([first, second]).astype(np.float64)
    kernel = (x @ x.T / x.shape[1] + 1) ** 3
    np.fill_diagonal(kernel, 0)
    rng = np.random.default_rng(seed)
    sides = np.repeat([1.0, 0.0], counts)
    sides = np.stack([sides, *(rng.permutation(sides) for _ in range(permutations))])
    rows = sides @ kernel
    within = (rows * sides).sum(axis=1)
    between = rows.sum(axis=1) - within
    rest = kernel.sum() - within - 2 * between
    (m, n), pairs = counts, [count * (count - 1) for count in counts]
    value, *permuted = within / pairs[0] + rest / pairs[1] - 2 * between / (m * n)
    # A permutation that changes nothing is as far apart, whatever the order of its sums.
    as_far = np.asarray(permuted) >= value - 1e-12 * kernel.max()
    return {"value": float(value), "p_value": float((1 + as_far.sum()) / (1 + permutations)), "patients": counts}
