import math

import numpy as np
import pytest
from judged_studies import K, judged, random_judged

from mlx_cxr.core.labels import label_index
from mlx_cxr.evaluation import confusions as c
from mlx_cxr.evaluation.bootstrap import patient_resamples

EDEMA, EFFUSION, FRACTURE = (label_index(name) for name in ("Edema", "Pleural Effusion", "Fracture"))


def resamples_of(studies, samples=200):
    return patient_resamples(studies.patient_ids, samples, 0)


def planted():
    """100 studies, an effusion in the first 20; edema is called in 8 of these and in 2 of the others."""
    raw, p = np.zeros((100, K)), np.full((100, K), 0.1)
    raw[:20, EFFUSION] = 1
    raw[95:, EDEMA] = 1  # not in the base
    p[:8, EDEMA] = p[40:42, EDEMA] = 0.9
    return judged(raw, p)


def test_a_lift_is_the_share_among_false_positives_over_the_share_anyway():
    studies = planted()
    entry = c.confusions(studies, resamples_of(studies))["Edema"]
    assert entry["false_positives"] == 10
    cell = entry["present"]["Pleural Effusion"]
    assert cell["count"] == 8
    assert cell["base_rate"] == pytest.approx(20 / 95)
    assert cell["lift"]["value"] == pytest.approx(0.8 / (20 / 95))
    assert cell["lift"]["low"] > 1
    assert math.isnan(entry["present"]["Fracture"]["lift"]["value"]), "no study has one"
    assert "Edema" not in entry["present"]


def test_too_few_false_positives_or_too_few_in_the_base_have_no_lift():
    studies = planted()
    found = c.confusions(studies, resamples_of(studies))
    assert found["Fracture"]["false_positives"] == 0
    assert math.isnan(found["Fracture"]["present"]["Pleural Effusion"]["lift"]["value"])
    raw = studies.raw_labels.copy()
    raw[4:20, EFFUSION] = 0
    few = judged(raw, studies.calls.probabilities)
    assert math.isnan(c.confusions(few, resamples_of(few))["Edema"]["present"]["Pleural Effusion"]["lift"]["value"])


def test_only_a_label_of_1_is_present_and_findings_go_by_their_raw_labels():
    studies = planted()
    raw = studies.raw_labels.copy()
    raw[:4, EFFUSION] = -1
    found = c.confusions(judged(raw, studies.calls.probabilities), resamples_of(studies, 0))
    assert found["Edema"]["present"]["Pleural Effusion"]["count"] == 4


def test_pairs_in_words_are_those_above_1_and_the_highest_first():
    studies = planted()
    pairs = c.confused_pairs(c.confusions(studies, resamples_of(studies)))
    assert [(pair["called"], pair["present"], pair["count"]) for pair in pairs] == [("Edema", "Pleural Effusion", 8)]
    noise = random_judged(200, 0)
    found = c.confusions(noise, resamples_of(noise, 100))
    looked_at = c.lifts_with_an_interval(found)
    assert looked_at == K * (K - 1)
    assert len(c.confused_pairs(found)) < 0.08 * looked_at, "errors at random go with nothing"
