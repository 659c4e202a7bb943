from collections import Counter

import numpy as np
import pytest
from judged_studies import K, judged, random_judged

from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.relabeling import QUESTIONS, SHEET_COLUMNS, question, relabel_sheet


def sheet_of(studies, count=40, seed=0):
    images = {study: [f"files/{study}/a.jpg", f"files/{study}/b.jpg"] for study in studies.study_ids.tolist()}
    category = np.full(studies.targets.shape, "other", dtype=object)
    return relabel_sheet(studies, category, images, count, seed)


def test_the_sheet_shows_images_and_questions_and_nothing_else():
    studies = random_judged(60, 0)
    sheet, key = sheet_of(studies)
    assert tuple(sheet) == SHEET_COLUMNS
    assert len(sheet) == len(key) == 40
    assert set(sheet["answer"]) == set(sheet["comment"]) == {""}
    assert sheet["item"].tolist() == key["item"].tolist() == list(range(1, 41))
    row = sheet.iloc[0]
    assert row["films"] == f"files/{row['study_id']}/a.jpg | files/{row['study_id']}/b.jpg"
    assert set(sheet["question"]) <= {question(label) for label in LABELS}
    assert len({question(label) for label in LABELS}) == K, "each finding is asked for in words of its own"
    assert set(QUESTIONS) <= set(LABELS)


def test_what_is_asked_says_nothing_of_whether_the_call_was_right_or_the_finding_there():
    studies = random_judged(60, 1)
    sheet, key = sheet_of(studies)
    assert [question(label) for label in key["label"]] == sheet["question"].tolist()
    key["present"] = key["raw_label"] == 1
    right = Counter(key.loc[key["call"] == "right", ["label", "present"]].itertuples(index=False, name=None))
    wrong = Counter(key.loc[key["call"] != "right", ["label", "present"]].itertuples(index=False, name=None))
    assert right == wrong
    assert sum(right.values()) == 20
    assert not key.duplicated(["study_id", "label"]).any()
    places = np.flatnonzero(key["call"] == "right")
    assert 12 < places.mean() < 27, "right and wrong calls are shuffled"
    runs = np.diff((key["call"] == "right").to_numpy().astype(int))
    assert (runs != 0).sum() < 39, "and do not simply alternate"


def test_the_key_is_true():
    studies = random_judged(60, 2)
    _, key = sheet_of(studies)
    for row in key.to_dict("records"):
        i, k = studies.study_ids.tolist().index(row["study_id"]), LABELS.index(row["label"])
        kind = "false positive" if studies.false_positive[i, k] else "right"
        assert row["call"] == ("false negative" if studies.false_negative[i, k] else kind)
        assert row["probability"] == studies.calls.probabilities[i, k]
        assert row["raw_label"] == pytest.approx(studies.raw_labels[i, k], nan_ok=True)


def test_the_draw_is_the_seeds():
    studies = random_judged(60, 3)
    first, again, other = sheet_of(studies), sheet_of(studies), sheet_of(studies, seed=1)
    assert first[0].equals(again[0])
    assert not first[0].equals(other[0])


def test_an_error_without_a_partner_is_not_taken_and_odd_counts_are_rounded_down():
    raw, p = np.zeros((3, K)), np.full((3, K), 0.1)
    raw[:, 0] = 1  # all missed: no right call says present
    p[0, 1] = 0.9
    sheet, key = sheet_of(judged(raw, p))
    assert set(key["label"]) == {LABELS[1]}
    assert len(sheet) == 2
    assert len(sheet_of(random_judged(60, 4), count=7)[0]) == 6
    nothing = judged(np.zeros((3, K)), np.full((3, K), 0.1))
    sheet, key = sheet_of(nothing)
    assert (len(sheet), tuple(sheet)) == (0, SHEET_COLUMNS)
    assert len(key) == 0
