"""Reading soft labels: the values back, studies without one, and every fault by its name."""

import hashlib

import numpy as np
import pytest
from soft_label_run import FEATURES, HEADER, IDS, LOGITS, SPLITS, STUDIES, TEMPERATURES, make

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.soft_labels import SoftLabelError, load_soft_labels


@pytest.fixture
def folder(tmp_path):
    """Finished soft labels with features."""
    make(tmp_path / "run", with_features=True)
    return tmp_path / "run"


def rewrite(folder, **changes):
    path = folder / "teacher_study_ids.json"
    write_record(path, {**read_record(path), **changes})


def test_the_values_come_back(folder):
    labels = load_soft_labels(folder)
    assert (labels.study_ids, labels.splits) == (IDS, SPLITS)
    assert len(labels.study_ids) == STUDIES
    np.testing.assert_array_equal(labels.logits, LOGITS)
    np.testing.assert_array_equal(labels.features, FEATURES)
    np.testing.assert_array_equal(labels.temperatures, TEMPERATURES)
    dtypes = [array.dtype for array in (labels.logits, labels.features, labels.temperatures)]
    assert dtypes == [np.float32, np.float16, np.float32]
    assert {key: labels.header[key] for key in HEADER} == HEADER
    assert (labels.header["truncated"], labels.header["skipped"]) == (3, 1)


def test_the_json_says_what_the_arrays_are(folder):
    index = read_record(folder / "teacher_study_ids.json")
    assert list(index) == ["schema", "labels", "study_ids", "splits", "header", "features", "made_for", "sha256"]
    assert index["labels"] == list(LABELS)
    for name, file in (("logits", "teacher_soft_labels.npy"), ("features", "teacher_features.npy")):
        assert index["sha256"][name] == hashlib.sha256((folder / file).read_bytes()).hexdigest()


def test_rows_of_studies(folder):
    labels = load_soft_labels(folder)
    asked = [IDS[5], "unknown", IDS[0], IDS[-1], IDS[5]]
    assert labels.place(asked).tolist() == [5, -1, 0, STUDIES - 1, 5]
    assert labels.logits.dtype == np.float32
    np.testing.assert_array_equal(labels.logits[labels.place(asked)][[0, 2, 3, 4]], LOGITS[[5, 0, -1, 5]])
    assert labels.place([]).shape == (0,)


def test_what_they_were_made_from(folder):
    labels = load_soft_labels(folder)
    labels.check(**HEADER)
    labels.check()
    with pytest.raises(SoftLabelError) as caught:
        labels.check(
            manifest="b" * 64, labels={"empty": "masked", "uncertain": "zeros", "soft": 1}, modality="text", base="x"
        )
    assert str(caught.value).splitlines()[1:] == [
        "  manifest: aaaaaaaaaaaa there, bbbbbbbbbbbb here",
        "  labels.empty: negative there, masked here",
        "  labels.soft: not recorded there, 1 here",
        "  base: not recorded there, x here",
    ]
    assert "cache_teacher_outputs" in str(caught.value)


@pytest.mark.parametrize("name", ["teacher_soft_labels.npy", "teacher_features.npy"])
def test_an_array_that_is_not_whole(folder, name):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(SoftLabelError, match=rf"{name} is damaged or cut short .*run cache_teacher_outputs again"):
        load_soft_labels(folder)
    path.write_bytes(b"")
    with pytest.raises(SoftLabelError, match=rf"{name} is damaged or cut short"):
        load_soft_labels(folder)
    path.unlink()
    with pytest.raises(SoftLabelError, match=rf"{name} is missing"):
        load_soft_labels(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SoftLabelError, match=rf"{name} is not the file that teacher_study_ids\.json was written for"):
        load_soft_labels(folder)


def replaced(folder, logits):
    np.save(folder / "teacher_soft_labels.npy", logits)
    sha256 = {"logits": hashlib.sha256((folder / "teacher_soft_labels.npy").read_bytes()).hexdigest()}
    rewrite(folder, sha256=sha256, features=None)


def test_arrays_at_odds_with_the_ids(folder):
    replaced(folder, LOGITS[:-1])
    with pytest.raises(SoftLabelError, match=r"holds float32 \(599, 14\), its JSON says float32 \(600, 14\)"):
        load_soft_labels(folder)
    replaced(folder, LOGITS.astype(np.float64))
    with pytest.raises(SoftLabelError, match=r"holds float64 \(600, 14\)"):
        load_soft_labels(folder)
    hole = LOGITS.copy()
    hole[7, 3] = np.nan
    replaced(folder, hole)
    with pytest.raises(SoftLabelError, match=rf"study '{IDS[7]}' has no finite logits"):
        load_soft_labels(folder)
    replaced(folder, LOGITS)
    assert load_soft_labels(folder).features is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ["test", *SPLITS[1:]]}, rf"study '{IDS[0]}' is of the test split"),
        ({"splits": [*SPLITS, "train"]}, "600 study ids, but 601 splits"),
        ({"study_ids": [IDS[1], *IDS[1:]]}, rf"study '{IDS[1]}' is there twice"),
        ({"labels": list(reversed(LABELS))}, r"of other labels or another order: \['Support Devices'"),
        ({"header": {}}, "temperatures are not 14 positive numbers: None"),
        ({"header": {"temperatures": [0] * 14}}, "temperatures are not 14 positive numbers"),
        ({"schema": 2}, "not an index of this version"),
        ({"sha256": None}, "not an index of this version"),
        ({"sha256": {}}, "is not the file that"),
    ],
)
def test_an_edited_json(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(SoftLabelError, match=message):
        load_soft_labels(folder)


def test_no_soft_labels(folder, tmp_path):
    with pytest.raises(SoftLabelError, match=r"teacher_study_ids\.json is missing; run cache_teacher_outputs"):
        load_soft_labels(tmp_path)
    (folder / "teacher_study_ids.json").write_text('{"schema": 1, ')
    with pytest.raises(SoftLabelError, match=r"teacher_study_ids\.json is not readable JSON"):
        load_soft_labels(folder)
