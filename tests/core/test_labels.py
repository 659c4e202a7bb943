"""The 14 findings and the policies, against tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_cxr.core.config_schema import LabelsConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.labels import (
    LABELS,
    SCORING_PROTOCOLS,
    LabelPolicy,
    check_raw_labels,
    finding_name,
    label_index,
    label_word,
)

NAN = np.nan


def raw_rows(*rows: tuple[float, float]) -> np.ndarray:
    """Raw labels that are 0 but for Edema (column 3) and Fracture (column 5)."""
    raw = np.zeros((len(rows), 14))
    raw[:, [3, 5]] = rows
    return raw


def test_order_is_that_of_the_mimic_table():
    # The header of mimic-cxr-2.0.0-chexpert.csv.
    header = (
        "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
        "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
    )
    assert ",".join(LABELS) == header
    assert list(LABELS) == sorted(LABELS)
    assert [label_index(name) for name in LABELS] == list(range(14))


def test_unknown_finding_is_named_with_those_that_are():
    with pytest.raises(KeyError) as error:
        label_index("Effusion")
    assert "'Effusion'" in str(error.value)
    assert "Pleural Effusion" in str(error.value)


@pytest.mark.parametrize(
    ("uncertain", "empty", "wanted"),
    [
        # raw:                    1    0   -1  empty
        ("zeros", "negative", [1.0, 0.0, 0.0, 0.0]),
        ("zeros", "masked", [1.0, 0.0, 0.0, NAN]),
        ("ones", "negative", [1.0, 0.0, 1.0, 0.0]),
        ("ones", "masked", [1.0, 0.0, 1.0, NAN]),
        ("ignore", "negative", [1.0, 0.0, NAN, 0.0]),
        ("ignore", "masked", [1.0, 0.0, NAN, NAN]),
        ("soft", "negative", [1.0, 0.0, 0.7, 0.0]),
        ("soft", "masked", [1.0, 0.0, 0.7, NAN]),
    ],
)
def test_each_policy(uncertain, empty, wanted):
    raw = np.tile(np.array([[1], [0], [-1], [NAN]]), (1, 14))
    got = LabelPolicy(uncertain=uncertain, empty=empty, soft_value=0.7).apply(raw)
    assert got.dtype == np.float32
    for column in range(14):
        np.testing.assert_array_equal(got[:, column], np.array(wanted, dtype=np.float32))


def test_soft_is_a_half_unless_another_value_is_given():
    """The uncertain label then says as much for the finding as against it."""
    raw = raw_rows((-1, 1))
    assert LabelPolicy(uncertain="soft").apply(raw)[0, [3, 5]].tolist() == [0.5, 1.0]
    assert LabelsConfig(uncertain="soft").policy().apply(raw)[0, [3, 5]].tolist() == [0.5, 1.0]


def test_exceptions_by_finding():
    policy = LabelPolicy(uncertain="zeros", uncertain_per_label={"Edema": "ones", "Fracture": "ignore"})
    got = policy.apply(raw_rows((-1, -1), (1, 1), (NAN, NAN)))
    np.testing.assert_array_equal(got[:, 3], [1, 1, 0])
    np.testing.assert_array_equal(got[:, 5], [NAN, 1, 0])
    assert got[:, [0, 1, 2, 4, 13]].sum() == 0
    with pytest.raises(KeyError, match="unknown finding 'edema'"):
        LabelPolicy(uncertain_per_label={"edema": "ones"})


def test_the_input_is_left_alone():
    raw = raw_rows((-1, NAN))
    kept = raw.copy()
    LabelPolicy(uncertain="ones").apply(raw)
    np.testing.assert_array_equal(raw, kept)


def test_the_two_scoring_protocols():
    raw = raw_rows((1, 0), (-1, NAN))
    np.testing.assert_array_equal(SCORING_PROTOCOLS["empty_negative"].apply(raw)[:, [3, 5]], [[1, 0], [0, 0]])
    np.testing.assert_array_equal(SCORING_PROTOCOLS["empty_masked"].apply(raw)[:, [3, 5]], [[1, 0], [NAN, NAN]])


@pytest.mark.parametrize("bad", [2.0, -2.0, 0.5, np.inf, -np.inf, 1e-9])
def test_a_value_outside_the_four_names_row_and_finding(bad):
    raw = raw_rows((0, 0), (0, 0), (0, bad))
    with pytest.raises(ValueError, match=r"row 2, Fracture: label \S+ is not 1, 0, -1 or empty"):
        LabelPolicy().apply(raw)


@pytest.mark.parametrize("shape", [(3, 13), (14,), (2, 14, 1)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 14\)"):
        check_raw_labels(np.zeros(shape))


def test_no_rows_are_fine():
    assert LabelPolicy().apply(np.zeros((0, 14))).shape == (0, 14)


def test_a_value_has_one_word():
    words = [label_word(value) for value in (1, np.float32(0), -1.0, NAN)]
    assert words == ["present", "absent", "uncertain", "not mentioned"]


@pytest.mark.parametrize("typed", ["Pleural Effusion", "pleural effusion", "PLEURAL_EFFUSION", " pleural  Effusion "])
def test_a_finding_is_known_however_it_is_typed(typed):
    assert finding_name(typed) == "Pleural Effusion"


def test_another_name_gets_the_nearest():
    with pytest.raises(
        UserError, match="'cardiomegally' is no finding; did you mean 'Cardiomegaly'\\? The 14 are: Atel"
    ):
        finding_name("cardiomegally")
    with pytest.raises(UserError, match="'xyz' is no finding; the 14 are: Atelectasis, "):
        finding_name("xyz")
