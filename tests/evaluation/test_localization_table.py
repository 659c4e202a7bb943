import math

import numpy as np
import pytest

from mlx_cxr.evaluation.localization_table import ImageScores, localization_table
from mlx_cxr.evaluation.map_verdict import map_verdict

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


def entry_of(maps, **controls):
    """An entry of `per_label` of 40 patients with one image each; controls at constant rates."""
    hit, patients = np.asarray(maps, float), np.array([f"p{k}" for k in range(len(maps))])
    arms = {name: {"hit": np.full(len(hit), rate)} for name, rate in controls.items()}
    finding = ImageScores("Edema", patients, {"hit": hit}, arms)
    return localization_table([finding], 200, 0, False, "grad_cam")["per_label"]["Edema"]


def test_the_verdict_is_against_the_strongest_control_not_the_weakest():
    """Maps that beat random ones and other images', yet not the guess that the finding lies in the middle."""
    entry = entry_of([1, 0] * 20, random=0.1, swapped=0.2, centre=0.6, chance=0.9)
    assert all(entry["hit"][control]["difference"]["low"] > 0 for control in ("random", "swapped"))
    verdict = map_verdict(entry)
    assert (verdict.control, verdict.mean, verdict.better) == ("centre", pytest.approx(0.6), False)
    assert verdict.difference == entry["hit"]["centre"]["difference"]
    assert verdict.difference["value"] == pytest.approx(-0.1)
    better = map_verdict(entry_of([1, 1, 1, 0] * 10, random=0.1, swapped=0.3, centre=0.2))
    assert (better.control, better.better) == ("swapped", True)
    usual = map_verdict(entry_of([1, 1, 1, 0] * 10, random=0.1, swapped=0.3, usual=0.74, centre=0.2))
    assert (usual.control, usual.better) == ("usual", False)


def test_of_equal_controls_the_first_is_taken_and_maps_that_equal_it_are_not_better():
    verdict = map_verdict(entry_of([1] * 40, centre=1.0, swapped=1.0, random=0.5))
    assert (verdict.control, verdict.difference["low"], verdict.better) == ("swapped", 0.0, False)


@pytest.mark.parametrize("undefined", [None, math.nan])
def test_a_control_that_is_undefined_is_passed_over(undefined):
    entry = entry_of([1, 1, 1, 0] * 10, random=0.1, swapped=math.nan, centre=0.2)
    entry["hit"]["swapped"]["mean"]["value"] = undefined
    verdict = map_verdict(entry)
    assert (verdict.control, verdict.better) == ("centre", True)
    with pytest.raises(KeyError, match="none of the controls"):
        map_verdict({"hit": {"maps": entry["hit"]["maps"], "swapped": entry["hit"]["swapped"]}})


@pytest.mark.parametrize("undefined", [None, math.nan])
def test_a_difference_without_an_interval_shows_nothing(undefined):
    entry = entry_of([1] * 40, random=0.1)
    entry["hit"]["random"]["difference"] |= {"low": undefined, "high": undefined}
    verdict = map_verdict(entry)
    assert (verdict.difference["value"], verdict.better) == (pytest.approx(0.9), False)
