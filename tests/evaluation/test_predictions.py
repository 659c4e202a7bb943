import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit
from simulated_predictions import simulated

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds
from mlx_cxr.evaluation.operating_points import OperatingPoints
from mlx_cxr.evaluation.predictions import (
    Predictions,
    PredictionsError,
    join,
    read_predictions,
    study_level,
    study_views,
    write_predictions,
)

K = len(LABELS)
NAN = math.nan


def frame(rows):
    return pd.DataFrame(rows, columns=["split", "patient_id", "study_id", "view"])


IMAGES = frame(
    [
        ("test", "p1", "s2", "PA"),
        ("test", "p1", "s1", "AP"),
        ("test", "p1", "s2", "AP"),
        ("test", "p2", "s3", ""),
        ("test", "p1", "s2", "AP"),
    ]
)


def calibration(temperatures=2.0) -> Calibration:
    return Calibration(np.full(K, temperatures), ("validation",) * K)


def points_at(cut=0.4, temperature=2.0, lower=0.2, upper=0.5) -> OperatingPoints:
    many = np.full(K, 50)
    return OperatingPoints(
        calibration(temperature),
        Thresholds(np.full(K, cut), ("validation",) * K, "f1"),
        "empty_negative",
        ConformalBands(0.1, np.full(K, lower), np.full(K, upper), many, many),
    )


def test_images_of_a_study_are_averaged_in_logit_space_in_order_of_appearance():
    logits = np.arange(5.0)[:, None] * np.ones(K)
    raw = np.zeros((5, K))
    raw[[0, 2, 4], 3] = NAN
    raw[1, 3] = 1
    got = study_level(IMAGES, raw, logits)
    assert got.study_ids.tolist() == ["s2", "s1", "s3"]
    assert got.patient_ids.tolist() == ["p1", "p1", "p2"]
    assert got.views.tolist() == ["AP+PA", "AP", "missing"]
    assert got.view_groups().tolist() == ["mixed", "AP", "other"]
    np.testing.assert_array_equal(got.logits[:, 0], [2.0, 1.0, 3.0])
    np.testing.assert_array_equal(got.raw_labels[:, 3], [NAN, 1, 0])


def test_view_groups_look_at_the_frontal_images():
    part = simulated(4, "test", 0)
    views = np.resize(["AP+LATERAL", "LATERAL+PA", "LATERAL", "missing", "AP+PA", "AP+missing"], len(part))
    groups = replace(part, views=views).view_groups()
    assert groups[:6].tolist() == ["AP", "PA", "other", "other", "mixed", "AP"][: len(groups)]
    assert study_views(IMAGES.assign(study_id="s")).tolist() == ["AP+PA+missing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patient_id": "p9"}, "study s2: its films disagree in patient_id"),
        ({"split": "train"}, "study s2: its films disagree in split"),
        ({}, "study s2: its films disagree in labels"),
    ],
)
def test_images_of_a_study_must_agree(change, message):
    images, raw = IMAGES.copy(), np.zeros((5, K))
    for column, value in change.items():
        images.loc[2, column] = value
    if not change:
        raw[2, 5] = NAN
    with pytest.raises(PredictionsError, match=message):
        study_level(images, raw, np.zeros((5, K)))


def test_study_level_names_what_lacks():
    with pytest.raises(PredictionsError, match=r"lack the column\(s\) view"):
        study_level(IMAGES.drop(columns="view"), np.zeros((5, K)), np.zeros((5, K)))
    with pytest.raises(PredictionsError, match="5 manifest rows, 5 labels and 4 logits"):
        study_level(IMAGES, np.zeros((5, K)), np.zeros((4, K)))


def test_a_patient_in_two_splits_is_refused_and_named():
    test, validation = simulated(5, "test", 0), simulated(5, "validate", 1)
    assert len(join(validation, test)) == len(test) + len(validation)
    ids = validation.patient_ids.copy()
    ids[0] = test.patient_ids[0]
    with pytest.raises(PredictionsError, match=rf"1 patients are in more than one split, such as {ids[0]}"):
        join(replace(validation, patient_ids=ids), test)
    with pytest.raises(PredictionsError, match=r"test-s00000 appears 2 times"):
        join(test, test)


def test_predictions_refuse_what_cannot_be_scored():
    part = simulated(3, "test", 0)
    logits = part.logits.copy()
    logits[1, 2] = np.inf
    with pytest.raises(PredictionsError, match="study test-s00001, Consolidation: logit inf is not finite"):
        replace(part, logits=logits)
    with pytest.raises(PredictionsError, match="study ids, but logits"):
        replace(part, logits=logits[1:])
    with pytest.raises(ValueError, match=r"row 0, Atelectasis: label 2\.0"):
        replace(part, raw_labels=np.full_like(part.raw_labels, 2))
    with pytest.raises(PredictionsError, match="no predictions of split 'train'; splits here: test"):
        part.of_split("train")


def test_the_file_has_a_row_per_study_and_label_and_says_what_it_means(tmp_path):
    part = simulated(3, "test", 0)
    path = write_predictions(tmp_path / "predictions.csv", part, points_at())
    table = pd.read_csv(path, dtype={"patient_id": str, "study_id": str})
    assert len(table) == len(part) * K
    assert table["label"].tolist() == list(LABELS) * len(part)
    np.testing.assert_allclose(table["probability"], expit(table["logit"].astype(np.float32) / 2.0), rtol=1e-6)
    np.testing.assert_array_equal(table["above_threshold"], (table["probability"] >= 0.4).astype(int))
    unsure = table["probability"].between(0.2, 0.5)
    assert 0 < unsure.mean() < 1
    sure = np.where(table["probability"] > 0.5, "present", "absent")
    assert table["call"].tolist() == np.where(unsure, "abstain", sure).tolist()
    np.testing.assert_array_equal(table["raw_label"], part.raw_labels.ravel())
    assert [item.name for item in tmp_path.iterdir()] == ["predictions.csv"]


identifiers = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    logits=hnp.arrays(np.float32, (3, K), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    raw=hnp.arrays(np.float32, (3, K), elements=st.sampled_from([1.0, 0.0, -1.0, NAN])),
    studies=st.lists(identifiers, min_size=3, max_size=3, unique=True),
    patient=identifiers,
    cut=hnp.arrays(np.float64, K, elements=st.floats(0, 1)),
    temperature=st.floats(0.05, 20),
)
def test_what_is_written_reads_back_exactly(tmp_path, logits, raw, studies, patient, cut, temperature):
    split, views = np.array(["test"] * 3), np.array(["AP", "AP+PA", "missing"])
    part = Predictions(split, np.array([patient] * 3), np.array(studies), views, raw, logits)
    points = points_at(cut, temperature)
    back = read_predictions(write_predictions(tmp_path / "p.csv", part, points))
    for name in Predictions.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(back.predictions, name), getattr(part, name), err_msg=name)
    np.testing.assert_array_equal(back.probabilities, calibration(temperature).probabilities(logits))
    np.testing.assert_array_equal(back.thresholds, cut)
    np.testing.assert_array_equal(back.states, points.decide(logits).states)


def test_ids_keep_leading_zeros_and_words_that_look_like_nothing(tmp_path):
    part = simulated(2, "test", 0).select(np.array([0]))
    part = replace(part, study_ids=np.array(["007"]), patient_ids=np.array(["NA"]))
    back = read_predictions(write_predictions(tmp_path / "p.csv", part, points_at())).predictions
    assert (back.study_ids[0], back.patient_ids[0]) == ("007", "NA")


@pytest.fixture
def written(tmp_path):
    return write_predictions(tmp_path / "predictions.csv", simulated(3, "test", 0), points_at())


def damaged(path, line, column, value):
    """The file with one cell changed; lines are counted from 1, the header's."""
    lines = path.read_text().splitlines()
    names, cells = lines[0].split(","), lines[line - 1].split(",")
    cells[names.index(column)] = value
    lines[line - 1] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "column", "value", "message"),
    [
        (5, "label", "Oedema", r"line 5: label 'Oedema' is out of place"),
        (6, "logit", "high", r"line 6, study test-s00000, Enlarged Cardiomediastinum: logit 'high' is not usable"),
        (6, "logit", "nan", r"line 6.*logit 'nan' is not usable"),
        (3, "probability", "1.5", r"line 3.*probability '1\.5' is not usable"),
        (3, "probability", "", r"line 3.*probability '' is not usable"),
        (4, "raw_label", "2", r"line 4.*raw_label '2' is not usable"),
        (4, "threshold", "0.9", r"line 18: threshold differs from that of line 4"),
        (17, "threshold", "0.9", r"line 17: threshold differs from that of line 3"),
        (18, "patient_id", "p", r"line 18: patient_id differs from that of line 16"),
        (18, "view", "PA+x", r"line 18: view differs from that of line 16"),
        (7, "above_threshold", "2", r"line 7.*above_threshold '2' is not usable"),
        (8, "call", "1", r"line 8.*call '1' is not usable; run evaluate_cnn again"),
    ],
)
def test_a_damaged_cell_is_named_by_line(written, line, column, value, message):
    with pytest.raises(PredictionsError, match=rf"predictions\.csv, {message}"):
        read_predictions(damaged(written, line, column, value))


def test_a_damaged_file_is_named(written):
    lines = written.read_text().splitlines()

    def refused(text, message):
        written.write_text(text)
        with pytest.raises(PredictionsError, match=rf"predictions\.csv.*{message}"):
            read_predictions(written)

    refused("\n".join(lines[:-1]), "is out of place; each study has the 14")
    refused("\n".join([*lines[:-1], lines[-1][:30]]), rf"line {len(lines)}")
    refused("\n".join([*lines[:9], "", *lines[9:]]), "line 10: label '' is out of place")
    refused("\n".join([*lines, lines[1] + ",extra"]), "not a readable table")
    refused("\n".join([*lines, *lines[1 : K + 1]]), "test-s00000 appears 2 times")
    refused(lines[0], "has no rows")
    refused("", "not a readable table")
    refused(lines[0].replace("logit", "score") + "\n" + lines[1], r"lacks the column\(s\) logit")
    older = "\n".join([lines[0].replace("above_threshold,call", "call,abstain"), *lines[1:]])
    again = r"run evaluate_cnn again \(for a teacher cache_teacher_outputs\)"
    refused(older, rf"lacks the column\(s\) above_threshold; {again}")
    written.write_bytes(b"\xff\xfe\x00" + b"x" * 9)
    with pytest.raises(PredictionsError, match="not a readable table"):
        read_predictions(written)
    written.unlink()
    with pytest.raises(PredictionsError, match="is missing; run evaluate_cnn first"):
        read_predictions(written)
