"""Dividing patients: splits where a source has none, and samples that keep patients whole and prevalence close.

Patients are dealt out one by one, those with the rarest findings first, as in iterative stratification (Sechidis et
al., On the stratification of multi-label data, ECML PKDD 2011); each goes to the part where the chi-square distance
from proportional shares, summed over the labels and the number dealt so far, stays least. Everything follows from the
seed and the patients' ids, not from the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.source_rows import SPLITS


def stratified_parts(
    sizes: np.ndarray, positives: np.ndarray, shares: Sequence[float], names: Sequence[str], seed: int
) -> np.ndarray:
    """Deal groups (patients) into parts.

    Args:
        sizes: int (G,), what a group adds to a part's size; at least 1.
        positives: int (G, K), how often each label is positive in a group.
        shares: share of the whole that each part is to get; they add up to 1.
        names: (G,), each once; with the seed they decide the order.
        seed: of the order.

    Returns:
        int (G,): the part of each group. No part is larger than its share by as much as the largest group.
    """
    share = np.asarray(shares, dtype=np.float64)
    counts = np.column_stack([sizes, positives]).astype(np.float64)
    weight = 1.0 / np.maximum(counts.sum(axis=0), 1.0)
    rarest = np.where(positives > 0, positives.sum(axis=0), np.iinfo(np.int64).max).min(axis=1)
    excess = np.zeros((len(share), counts.shape[1]))  # of each part over its share of the groups dealt so far
    room = share * counts[:, 0].sum()
    parts = np.zeros(len(names), dtype=np.int64)
    for group in sorted(range(len(names)), key=lambda group: (rarest[group], drawn_rank(names[group], seed))):
        count = counts[group]
        excess -= share[:, None] * count
        # Half a group over is as near as half under; where no part has so much room, the one with most takes it.
        fits = (room >= count[0] / 2) & (share > 0)
        if fits.any():
            growth = (2 * excess[fits] + count) @ (count * weight) / share[fits]
            part = np.flatnonzero(fits)[np.argmin(growth.round(9))]  # rounded: ties fall alike on every machine
        else:
            part = np.argmax(room)
        excess[part] += count
        room[part] -= count[0]
        parts[group] = part
    return parts


def split_patients(frame: pd.DataFrame, validation_fraction: float, test_fraction: float, seed: int) -> pd.Series:
    """`train`, `validate` or `test` for each row, patients kept whole.

    Args:
        frame: columns `patient_id`, `study_id` and the 14 labels (1, 0, -1, NaN).
        validation_fraction, test_fraction: shares of the patients.
        seed: of the order in which patients are dealt.

    Returns:
        str (N,), index as in `frame`.
    """
    patients, positives, _ = _by_patient(frame)
    shares = (1.0 - validation_fraction - test_fraction, validation_fraction, test_fraction)
    parts = stratified_parts(np.ones(len(patients), dtype=np.int64), positives, shares, patients, seed)
    return frame["patient_id"].map(dict(zip(patients, np.array(SPLITS)[parts].tolist(), strict=True)))


def sample_studies(
    frame: pd.DataFrame, n_studies: int, validation_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """Draw a sample of about `n_studies` studies, patients kept whole, prevalence close in each split.

    The splits share the sample in proportion to their studies, except that validation and test get no less than the
    given fractions of it as long as they have the studies: in proportion, 15,000 studies of MIMIC-CXR would leave
    119 for validation, too few to fit a threshold on.

    Args:
        frame: columns `patient_id`, `study_id`, `split` and the 14 labels (1, 0, -1, NaN).
        n_studies: studies wanted; all rows are kept when there are no more.
        validation_fraction, test_fraction: least shares of the sample.
        seed: of the order in which patients are dealt.

    Returns:
        bool (N,), True for rows in the sample. A split's number of studies is off its target by less than the studies
        of one patient.
    """
    there = {name: int(frame.loc[frame["split"] == name, "study_id"].nunique()) for name in SPLITS}
    wanted = sample_sizes(there, n_studies, {"validate": validation_fraction, "test": test_fraction})
    chosen = np.zeros(len(frame), dtype=bool)
    for name in SPLITS:
        rows = np.flatnonzero((frame["split"] == name).to_numpy())
        if wanted[name] == there[name]:
            chosen[rows] = True
        elif wanted[name]:
            part = frame.iloc[rows]
            patients, positives, studies = _by_patient(part)
            share = wanted[name] / there[name]
            parts = stratified_parts(studies, positives, (share, 1.0 - share), patients, seed)
            in_sample = pd.Index(np.array(patients, dtype=object)[parts == 0])
            chosen[rows] = part["patient_id"].isin(in_sample).to_numpy()
    return chosen


def sample_sizes(there: dict[str, int], n_studies: int, least: dict[str, float]) -> dict[str, int]:
    """Studies that each split gives to a sample (see `sample_studies`), together `n_studies` or all there are.

    Args:
        there: split -> studies it has.
        least: split -> least share of the sample, as far as it has them.
    """
    total = sum(there.values())
    if n_studies >= total:
        return dict(there)
    floors = {name: min(there[name], round(n_studies * share)) for name, share in least.items()}
    sizes = {name: floor for name, floor in floors.items() if floor > n_studies * there[name] / total}
    rest = n_studies - sum(sizes.values())
    free = sorted((name for name in there if name not in sizes), key=there.__getitem__)
    free_total = sum(there[name] for name in free)
    for name in free[:-1]:
        sizes[name] = round(rest * there[name] / free_total)
    sizes[free[-1]] = n_studies - sum(sizes.values())
    return {name: sizes[name] for name in there}


def _by_patient(frame: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(patient ids, positives int (G, 14), studies int (G,)), each study counted once."""
    studies = frame.drop_duplicates("study_id")
    codes, patients = pd.factorize(studies["patient_id"])
    positives = np.zeros((len(patients), len(LABELS)), dtype=np.int64)
    for column, name in enumerate(LABELS):
        np.add.at(positives[:, column], codes, (studies[name] == 1).to_numpy())
    return [str(patient) for patient in patients], positives, np.bincount(codes, minlength=len(patients))


def drawn_rank(name: str, seed: int) -> bytes:
    """The place of a name in an order drawn by the seed, whatever names there are beside it."""
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
