"""`manifest.csv`: exact labels and ids, one set of bytes, and files that were edited."""

import csv
import hashlib

import numpy as np
import pandas as pd
import pytest

from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.manifest import (
    Manifest,
    check_patient_splits,
    labelled_in_turn,
    load_manifest,
    split_counts,
    write_manifest,
    write_splits,
)
from mlx_cxr.data.source_rows import TEXT_COLUMNS
from mlx_cxr.data.tables import DataError


def cohort():
    text = {name: ["", "", ""] for name in TEXT_COLUMNS}
    frame = pd.DataFrame(text, dtype=str).assign(
        image_id=["c", "a", "b"],
        patient_id=["007", "007", "1.0"],
        study_id=["02", "01", "10"],
        split=["train", "train", "test"],
        path=["x/c.jpg", "x/a.jpg", "b.jpg"],
        text=['Said "no", clearly;\tNaN', "NA", "ü"],
    )
    values = np.full((3, 14), np.nan, dtype=np.float32)
    values[0, 0], values[1, 1], values[2, 13] = 1, 0, -1
    return pd.concat([frame, pd.DataFrame(values, columns=LABELS)], axis=1)


def test_the_bytes_and_back(tmp_path):
    path = tmp_path / "manifest.csv"
    sha256 = write_manifest(path, cohort())
    assert path.read_bytes().decode() == (
        "image_id,patient_id,study_id,split,view,age,sex,path,text," + ",".join(LABELS) + "\n"
        "a,007,01,train,,,,x/a.jpg,NA,,0" + "," * 12 + "\n"
        'c,007,02,train,,,,x/c.jpg,"Said ""no"", clearly;\tNaN",1' + "," * 13 + "\n"
        "b,1.0,10,test,,,,b.jpg,ü," + "," * 13 + "-1\n"
    )
    manifest = load_manifest(path)
    assert manifest.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest.frame["patient_id"].tolist() == ["007", "007", "1.0"]
    assert manifest.frame["text"].tolist() == ["NA", 'Said "no", clearly;\tNaN', "ü"]
    assert manifest.frame.columns.tolist() == [*TEXT_COLUMNS, *LABELS]
    expected = cohort()[list(LABELS)].to_numpy()[[1, 0, 2]]
    assert manifest.raw_labels.dtype == np.float32
    np.testing.assert_array_equal(manifest.raw_labels, expected)


def test_order_of_rows_does_not_matter(tmp_path):
    first = write_manifest(tmp_path / "a.csv", cohort())
    assert write_manifest(tmp_path / "b.csv", cohort().iloc[::-1]) == first


def test_a_patient_in_two_splits_is_not_written(tmp_path):
    frame = cohort().assign(split=["train", "validate", "test"])
    with pytest.raises(DataError, match=r"1 patient\(s\) are in more than one split: 007 in train and validate"):
        check_patient_splits(frame)
    with pytest.raises(DataError, match="007"):
        write_manifest(tmp_path / "manifest.csv", frame)
    assert not (tmp_path / "manifest.csv").exists()


def test_reports_without_images(tmp_path):
    path = tmp_path / "manifest.csv"
    write_manifest(path, cohort().assign(path=""))
    manifest = load_manifest(path)
    assert manifest.text_only
    assert manifest.frame["path"].tolist() == ["", "", ""]
    np.testing.assert_array_equal(manifest.raw_labels[0], cohort()[list(LABELS)].to_numpy()[1])
    with pytest.raises(DataError, match=r"row 3: column 'path' is empty \(1 such"):
        write_manifest(tmp_path / "other.csv", cohort().assign(path=["x/c.jpg", "", "b.jpg"]))
    write_manifest(path, cohort())
    assert not load_manifest(path).text_only
    path.write_text(path.read_text(encoding="utf-8").replace(",x/c.jpg,", ",,"), encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.csv, row 3: column 'path' is empty"):
        load_manifest(path)


def test_nothing_or_an_image_twice_is_not_written(tmp_path):
    with pytest.raises(DataError, match="no film to write"):
        write_manifest(tmp_path / "m.csv", cohort().iloc[:0])
    with pytest.raises(DataError, match="image 'c' appears twice"):
        write_manifest(tmp_path / "m.csv", pd.concat([cohort(), cohort()[:1]]))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",-1\n", ",2\n", r"manifest\.csv, row 4, column 'Support Devices': label '2' is not"),
        (",test,", ",tst,", r"row 4: split 'tst' is not one of train, validate, test"),
        ("\nc,", "\na,", r"image 'a' appears twice, in rows 2 and 3"),
        ("\nc,007,", "\nc,,", r"row 3: column 'patient_id' is empty"),
        ("sex,path", "gender,path", r"lacks the column\(s\) sex; columns there: image_id"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, old, new, message):
    path = tmp_path / "manifest.csv"
    write_manifest(path, cohort())
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_manifest(path)


def test_a_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.csv is missing; run build_manifest first"):
        load_manifest(tmp_path / "manifest.csv")


def test_splits(tmp_path):
    write_splits(tmp_path / "splits.json", cohort(), "abc", {"seed": 3, "source": "csv"})
    splits = read_record(tmp_path / "splits.json")
    assert (splits["manifest_sha256"], splits["seed"], splits["source"]) == ("abc", 3, "csv")
    assert splits["splits"]["train"] == {"patients": 1, "studies": 2, "images": 2, "patient_ids": ["007"]}
    assert splits["splits"]["validate"] == {"patients": 0, "studies": 0, "images": 0, "patient_ids": []}
    assert split_counts(cohort())["test"] == {"patients": 1, "studies": 1, "images": 1}


HOSTILE = ["=1+1", "'=1", "- no edema", "'", " NA ", "nan", "@x", "''+1"]


@pytest.mark.parametrize("name", ["image_id", "patient_id", "study_id", "path", "text", "view", "sex"])
def test_cells_are_no_formulas_and_come_back_exactly(tmp_path, name):
    base = cohort().iloc[[0] * len(HOSTILE)].reset_index(drop=True)
    numbers = [f"{number:02d}" for number in range(len(HOSTILE))]
    frame = base.assign(image_id=numbers, patient_id=numbers, study_id=numbers).assign(**{name: HOSTILE})
    path = tmp_path / "manifest.csv"
    write_manifest(path, frame)
    key = "image_id" if name != "image_id" else "study_id"
    assert dict(zip(frame[key], frame[name], strict=True)) == load_manifest(path).frame.set_index(key)[name].to_dict()
    with path.open(encoding="utf-8", newline="") as out:
        cells = [row[name] for row in csv.DictReader(out)]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")] == []


def test_a_line_break_is_not_written(tmp_path):
    for name in ("patient_id", "text", "view"):
        with pytest.raises(DataError, match=rf"{name} 'a\\rb' of image 'a' has a line break"):
            write_manifest(tmp_path / "m.csv", cohort().assign(**{name: ["x", "a\rb", "y"]}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("one", "other"), [("007", "7"), ("1.0", "1"), ("P1", "p01"), ("\uff17", "07")])
def test_a_patient_of_two_spellings_in_two_splits_is_refused(tmp_path, one, other):
    frame = cohort().assign(patient_id=[one, one, other], split=["train", "train", "test"])
    with pytest.raises(DataError, match=rf"1 patient\(s\) .*: {one} or {other} in test and train"):
        write_manifest(tmp_path / "manifest.csv", frame)
    check_patient_splits(frame.assign(split="train"))


def test_a_manifest_with_a_patient_in_two_splits_is_not_opened(tmp_path):
    path = tmp_path / "manifest.csv"
    write_manifest(path, cohort())
    path.write_text(path.read_text(encoding="utf-8").replace("c,007,02,train", "c,07,02,test"), encoding="utf-8")
    with pytest.raises(DataError, match=r"007 or 07 in test and train"):
        load_manifest(path)


def many(patients=40, unlabelled=4):
    """Two images of each patient; every fifth patient is of test, and the last of training have no label."""
    ids = [f"p{i:02}" for i in range(patients) for _ in range(2)]
    split = ["test" if i % 5 == 4 else "train" for i in range(patients) for _ in range(2)]
    raw = np.zeros((2 * patients, 14), dtype=np.float32)
    raw[-2 * unlabelled :] = np.nan
    frame = pd.DataFrame({"patient_id": ids, "split": split, **dict(zip(LABELS, raw.T, strict=True))})
    return Manifest(frame, raw, "0" * 64)


def patients_with_labels(manifest):
    kept = manifest.labelled & (manifest.frame["split"] == "train").to_numpy()
    return set(manifest.frame.loc[kept, "patient_id"])


def test_a_budget_leaves_so_many_training_patients_their_labels():
    whole = many()
    everyone = patients_with_labels(whole)
    assert len(everyone) == 29
    assert whole.within_budget(None, 0) is whole
    assert patients_with_labels(whole.within_budget(29, 0)) == everyone
    smaller = set()
    for budget, count in ((1, 1), (0.1, 3), (0.5, 14), (20, 20)):
        kept = whole.within_budget(budget, 0)
        now = patients_with_labels(kept)
        assert len(now) == count
        assert smaller < now <= everyone, "a smaller budget is part of a larger one"
        smaller = now
        # All images of a patient or none; test as it was; the table says what the array says.
        test = (whole.frame["split"] == "test").to_numpy()
        np.testing.assert_array_equal(kept.raw_labels[test], whole.raw_labels[test])
        assert kept.labelled.sum() == 2 * count + whole.labelled[test].sum()
        np.testing.assert_array_equal(kept.frame[list(LABELS)].to_numpy(), kept.raw_labels)
        np.testing.assert_array_equal(kept.withheld, whole.labelled & ~kept.labelled)
    assert patients_with_labels(whole.within_budget(0.5, 1)) != patients_with_labels(whole.within_budget(0.5, 0))


def test_a_budget_beyond_what_is_there_is_refused():
    with pytest.raises(DataError, match=r"labels\.budget is 30, and 29 training patients have labels; .* null for all"):
        many().within_budget(30, 0)


def test_labelled_rows_take_turns_for_those_withheld():
    raw = np.full((5, 14), np.nan)
    raw[1, 3] = raw[4, 0] = 1
    assert labelled_in_turn(raw, None).tolist() == [1, 4]
    assert labelled_in_turn(raw, np.array([True, False, True, True, False])).tolist() == [1, 4, 1, 4, 1]
    assert labelled_in_turn(np.full((3, 14), np.nan), np.array([True, True, False])).tolist() == []
