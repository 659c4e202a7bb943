"""Rows of a source: dropping with a count, what lies on disk, and the normal form of ages, sexes and splits."""

import numpy as np
import pandas as pd
import pytest

from mlx_cxr.data.source_rows import SourceRows, images_on_disk, normalized_ages, normalized_sexes, normalized_splits
from mlx_cxr.data.tables import DataError


def test_images_on_disk_against_asking_for_each(tmp_path):
    there = ["a.jpg", "x/b.jpg", "x/y/c.jpg", "x/y/d e.jpg"]
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    asked = [*there, "b.jpg", "x/a.jpg", "x/y/z/c.jpg", "w/y/c.jpg", "x/b.jpg/c.jpg", "./a.jpg", "x/../a.jpg"]
    np.testing.assert_array_equal(images_on_disk(tmp_path, asked), [(tmp_path / name).is_file() for name in asked])


def test_dropped_images_are_counted_by_reason():
    rows = SourceRows(pd.DataFrame({"image_id": list("abcd")}), read=4)
    kept = rows.keep(np.array([1, 0, 1, 1]), "one").keep(np.array([1, 1, 1]), "none").keep(np.array([0, 1, 0]), "one")
    assert kept.frame["image_id"].tolist() == ["c"]
    assert kept.dropped == {"one": 3}
    assert kept.read == len(kept) + sum(kept.dropped.values())


def test_ages():
    text, odd = normalized_ages(pd.Series(["58", "058Y", "58.0", "0", "120", "411", "-1", "old", ""], dtype=str))
    assert text.tolist() == ["58", "58", "58", "0", "120", "", "", "", ""]
    assert odd == 3


def test_sexes():
    given = pd.Series(["M", "female", "Unknown", "", "o"], dtype=str)
    assert normalized_sexes(given).tolist() == ["M", "F", "", "", "O"]


def test_splits():
    names = pd.Series(["Train", "val", "validate", "TEST", ""], dtype=str)
    assert normalized_splits(names, "t.csv").tolist() == ["train", "validate", "validate", "test", ""]
    with pytest.raises(DataError, match="row 3: split 'x'"):
        normalized_splits(pd.Series(["train", "x"], dtype=str), "t.csv")


def test_rows_read_are_rows_kept_and_rows_dropped():
    rows = SourceRows(pd.DataFrame({"image_id": list("abcdef")}), read=6)
    kept = rows.keep(np.array([0, 0, 0, 0, 1, 1]), "one").keep(np.array([0, 1]), "two")
    assert kept.examples == {"one": ["a", "b", "c"], "two": ["e"]}
    assert kept.dropped == {"one": 4, "two": 1}
    added = kept.with_dropped(pd.Series(["x", "y"]), "two")
    assert (added.read, added.dropped["two"], added.examples["two"]) == (8, 3, ["e", "x", "y"])
    with pytest.raises(ValueError, match="6 rows were read, 5 kept"):
        SourceRows(rows.frame[:5], read=6)
