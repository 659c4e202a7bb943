import json
import math

import numpy as np
import pytest

from mlx_cxr.evaluation.localization_table import ImageScores, localization_markdown, localization_table

PATIENTS = np.array(["a", "a", "b", "c", "d", "e"])


def scores(label, patients, hit, random):
    return ImageScores(label, patients, {"hit": np.asarray(hit, float)}, {"random": {"hit": np.asarray(random, float)}})


@pytest.fixture
def table():
    findings = [
        scores("Edema", PATIENTS, [1, 1, 0, 1, 1, 0], [0.2, 0.4, 0.1, 0.3, 0.0, 0.2]),
        scores("Pneumothorax", PATIENTS[:2], [0, 0.5], [0.1, math.nan]),
    ]
    return localization_table(findings, samples=400, seed=0, synthetic=True, method="grad_cam")


def test_means_and_paired_differences_by_hand(table):
    edema, pneumothorax = table["per_label"]["Edema"], table["per_label"]["Pneumothorax"]
    assert (edema["films"], edema["patients"], pneumothorax["patients"]) == (6, 5, 1)
    assert edema["hit"]["maps"]["value"] == pytest.approx(4 / 6)
    assert edema["hit"]["random"]["mean"]["value"] == pytest.approx(0.2)
    assert edema["hit"]["random"]["difference"]["value"] == pytest.approx(4 / 6 - 0.2)
    assert pneumothorax["hit"]["maps"]["value"] == pytest.approx(0.25)
    assert pneumothorax["hit"]["random"]["difference"]["value"] == pytest.approx(-0.1)
    macro = table["macro"]
    assert macro["labels"] == 2
    assert macro["hit"]["maps"]["value"] == pytest.approx((4 / 6 + 0.25) / 2)
    assert macro["hit"]["random"]["difference"]["value"] == pytest.approx((4 / 6 - 0.2 - 0.1) / 2)


def test_intervals_draw_a_patient_for_all_labels_at_once():
    """Two labels that are each other's complement on the same images: their mean is 1/2 in every resample."""
    hit = np.array([1.0, 0, 1, 1, 0, 1])
    findings = [scores("Edema", PATIENTS, hit, hit * 0), scores("Fracture", PATIENTS, 1 - hit, hit * 0)]
    macro = localization_table(findings, 300, 0, False, "grad_cam")["macro"]["hit"]["maps"]
    assert (macro["value"], macro["low"], macro["high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_is_that_of_the_loop_over_patients(table):
    rng = np.random.default_rng(0)
    names = np.array(["a", "b", "c", "d", "e"])
    hit = np.array([1, 1, 0, 1, 1, 0])
    rows = {name: hit[name == PATIENTS] for name in names}
    replicates = [np.concatenate([rows[name] for name in names[rng.integers(5, size=5)]]).mean() for _ in range(400)]
    got = table["per_label"]["Edema"]["hit"]["maps"]
    assert (got["low"], got["high"]) == pytest.approx(np.percentile(replicates, [2.5, 97.5]), abs=1e-9)


def test_markdown_shows_the_figures_and_survives_json(table):
    text = localization_markdown(json.loads(json.dumps(table)), {"hit": "Pointing game"}, against=("random",))
    rows = [line for line in text.splitlines() if line.startswith("| Edema")]
    assert rows[0].startswith("| Edema | 6 | 0.667 [")
    assert "| 0.200 | 0.467 [" in rows[0]
    assert "**Pointing game**" in text
    assert "**mean of 2**" in text
    with pytest.raises(KeyError, match="swapped"):
        localization_markdown(table, {"hit": "Pointing game"})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no finding has films"):
        localization_table([], 10, 0, False, "grad_cam")
    with pytest.raises(ValueError, match="Edema: no films"):
        localization_table([scores("Edema", PATIENTS[:0], [], [])], 10, 0, False, "grad_cam")
    with pytest.raises(ValueError, match=r"Edema, random, hit: shape \(1,\), expected \(2,\)"):
        scores("Edema", PATIENTS[:2], [1, 0], [1])
    with pytest.raises(ValueError, match=r"Edema, random: scores \['iou'\], but the maps have \['hit'\]"):
        ImageScores("Edema", PATIENTS[:1], {"hit": np.ones(1)}, {"random": {"iou": np.ones(1)}})
    one = scores("Edema", PATIENTS[:1], [1], [1])
    other = ImageScores("Fracture", PATIENTS[:1], {"hit": np.ones(1)}, {"centre": {"hit": np.ones(1)}})
    with pytest.raises(ValueError, match="Fracture: other scores or controls than Edema has"):
        localization_table([one, other], 10, 0, False, "grad_cam")
