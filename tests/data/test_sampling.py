"""Splits and samples: patients whole, sizes near their targets, labels spread, the same again for the same seed."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.sampling import sample_sizes, sample_studies, split_patients, stratified_parts


def cohort(patients: int, seed: int, split: bool = False) -> pd.DataFrame:
    """Studies of `patients`, one image each, label rates from 30 % down to 0.5 %, more images for some patients."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(1 + rng.geometric(0.5, patients), 12)
    of = np.repeat(np.arange(patients), sizes)
    rates = np.geomspace(0.3, 0.005, len(LABELS))
    sick = rng.beta(1, 1, patients)[of] * 2
    frame = pd.DataFrame({"patient_id": [f"p{i:05d}" for i in of], "study_id": [f"s{i}" for i in range(len(of))]})
    for name, rate in zip(LABELS, rates, strict=True):
        frame[name] = (rng.random(len(of)) < rate * sick).astype(np.float32)
    if split:
        of_patient = rng.choice(["train", "validate", "test"], patients, p=[0.9, 0.04, 0.06])
        frame["split"] = of_patient[of]
    return frame


@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 80),
    largest=st.sampled_from([1, 9, 40]),
    density=st.sampled_from([0.03, 0.2, 0.5]),
    shares=st.sampled_from([(0.65, 0.15, 0.2), (0.1, 0.9), (1.0,), (0.8, 0.0, 0.2), (1 / 3, 1 / 3, 1 / 3)]),
)
@settings(max_examples=200, deadline=None)
def test_every_group_is_dealt_and_sizes_are_within_one_group(seed, groups, largest, density, shares):
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(0.2, groups), largest)
    positives = (rng.random((groups, 14)) < density) * rng.integers(1, sizes[:, None] + 1)
    parts = stratified_parts(sizes, positives, shares, [str(i) for i in range(groups)], seed)
    got = np.bincount(parts, weights=sizes, minlength=len(shares))
    target = np.array(shares) * sizes.sum()
    assert got.sum() == sizes.sum()
    assert (got < target + sizes.max()).all()
    assert (got > target - (len(shares) - 1) * sizes.max() - 1e-9).all()
    assert (got[np.array(shares) == 0] == 0).all()


@given(seed=st.integers(0, 100), patients=st.integers(150, 400))
@settings(max_examples=15, deadline=None)
def test_split_of_patients(seed, patients):
    frame = cohort(patients, seed)
    split = split_patients(frame, 0.15, 0.2, seed)
    by_patient = pd.DataFrame({"patient": frame["patient_id"], "split": split}).drop_duplicates()
    assert by_patient["patient"].is_unique
    counts = by_patient["split"].value_counts()
    for name, share in (("validate", 0.15), ("test", 0.2), ("train", 0.65)):
        assert abs(counts[name] - share * patients) <= 2
    shuffled = frame.sample(frac=1, random_state=seed)
    pd.testing.assert_series_equal(split_patients(shuffled, 0.15, 0.2, seed).sort_index(), split, check_names=False)


def test_another_seed_gives_another_split():
    frame = cohort(200, 0)
    assert (split_patients(frame, 0.15, 0.2, 0) != split_patients(frame, 0.15, 0.2, 1)).mean() > 0.2


def test_rare_labels_reach_every_split():
    """With 13 positives of a label, chance leaves validation or test without any in one split of ten."""
    frame = cohort(400, 3)
    rare = LABELS[0]
    frame[rare] = 0.0
    rows = frame.drop_duplicates("patient_id").sample(13, random_state=0).index
    frame.loc[rows, rare] = 1.0
    for seed in range(20):
        split = split_patients(frame, 0.15, 0.2, seed)
        counts = split[rows].value_counts()
        assert counts["train"] in (8, 9)
        assert counts["validate"] == 2
        assert counts["test"] in (2, 3)


@given(seed=st.integers(0, 100), n_studies=st.integers(200, 900))
@settings(max_examples=15, deadline=None)
def test_sample_keeps_patients_whole_and_prevalence_close(seed, n_studies):
    frame = cohort(700, seed % 5, split=True)
    chosen = sample_studies(frame, n_studies, 0.1, 0.1, seed)
    largest = frame["patient_id"].value_counts().max()
    assert frame.loc[chosen, "patient_id"].isin(frame.loc[~chosen, "patient_id"]).sum() == 0
    wanted = sample_sizes(frame["split"].value_counts().to_dict(), n_studies, {"validate": 0.1, "test": 0.1})
    for name, size in wanted.items():
        assert abs(int((frame.loc[chosen, "split"] == name).sum()) - size) < largest
    train = (frame["split"] == "train").to_numpy()
    share = frame.loc[train, list(LABELS)].mean() - frame.loc[train & chosen, list(LABELS)].mean()
    # Three studies too many or too few of the label that fares worst, where one patient brings up to twelve.
    assert share.abs().max() <= 3 / (train & chosen).sum()
    np.testing.assert_array_equal(chosen, sample_studies(frame, n_studies, 0.1, 0.1, seed))


def test_sample_is_closer_than_chance():
    """Against drawing patients at random: the mean distance of prevalence is at least five times smaller."""
    frame = cohort(3000, 1, split=True)
    frame = frame[frame["split"] == "train"].reset_index(drop=True)
    source = frame[list(LABELS)].mean()
    ours, chance = [], []
    patients = frame["patient_id"].unique()
    for seed in range(5):
        chosen = sample_studies(frame, 900, 0, 0, seed)
        ours.append((frame.loc[chosen, list(LABELS)].mean() - source).abs().mean())
        drawn = np.random.default_rng(seed).permutation(patients)[: round(900 / len(frame) * len(patients))]
        chance.append((frame.loc[frame["patient_id"].isin(drawn), list(LABELS)].mean() - source).abs().mean())
    assert np.mean(ours) < np.mean(chance) / 5


def test_images_of_a_study_count_once():
    frame = cohort(300, 2, split=True)
    more = pd.concat([frame, frame[frame["Edema"] == 1], frame[:99]], ignore_index=True)
    chosen = sample_studies(more, 200, 0.1, 0.1, 0)
    np.testing.assert_array_equal(chosen[: len(frame)], sample_studies(frame, 200, 0.1, 0.1, 0))
    np.testing.assert_array_equal(chosen[-99:], chosen[:99])


def test_more_than_there_is_keeps_all():
    frame = cohort(20, 0, split=True)
    assert sample_studies(frame, 10_000, 0.1, 0.1, 0).all()


@pytest.mark.parametrize(
    ("there", "n", "wanted"),
    [
        # MIMIC-CXR's own: in proportion, validation would get 119 and test 215 of 15,000.
        ({"train": 222758, "validate": 1808, "test": 3269}, 15000, {"train": 10192, "validate": 1808, "test": 3000}),
        ({"train": 650, "validate": 150, "test": 200}, 100, {"train": 65, "validate": 15, "test": 20}),
        ({"train": 10, "validate": 500, "test": 500}, 900, {"train": 9, "validate": 446, "test": 445}),
        ({"train": 10, "validate": 10, "test": 1000}, 500, {"train": 5, "validate": 10, "test": 485}),
        ({"train": 30, "validate": 0, "test": 0}, 20, {"train": 20, "validate": 0, "test": 0}),
        ({"train": 3, "validate": 2, "test": 1}, 60, {"train": 3, "validate": 2, "test": 1}),
    ],
)
def test_sizes_of_a_sample(there, n, wanted):
    assert sample_sizes(there, n, {"validate": 0.15, "test": 0.2}) == wanted


@given(
    there=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    n=st.integers(1, 200),
    least=st.sampled_from([(0.15, 0.2), (0.0, 0.0), (0.49, 0.5)]),
)
@settings(max_examples=200, deadline=None)
def test_sizes_add_up_and_are_there(there, n, least):
    names = dict(zip(("train", "validate", "test"), there, strict=True))
    sizes = sample_sizes(names, n, dict(zip(("validate", "test"), least, strict=True)))
    assert sum(sizes.values()) == min(n, sum(there))
    assert all(0 <= sizes[name] <= names[name] for name in names)
