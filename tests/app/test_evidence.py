"""Sentences of the page on a run's maps: those that follow from its `localization.json`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cxr_page.explain import verdict
from cxr_page.viewer import _peak, evidence

from mlx_cxr.core.files import write_record


def entry(maps: float, swapped: float, low: float, centre: float = 0.0) -> dict:
    def control(mean: float) -> dict:
        return {"mean": {"value": mean}, "difference": {"value": maps - mean, "low": low, "high": 1.0}}

    return {"films": 40, "hit": {"maps": {"value": maps}, "swapped": control(swapped), "centre": control(centre)}}


@pytest.fixture
def run(tmp_path):
    table = {"Edema": entry(0.8, 0.5, 0.1), "Fracture": entry(0.1, 0.15, -0.2), "Pneumonia": entry(0.5, 0.5, 0.0)}
    table["Cardiomegaly"] = entry(0.9, 0.5, -0.1, centre=0.95)
    write_record(tmp_path / "localization.json", {"per_label": table})
    return SimpleNamespace(model=SimpleNamespace(trained=SimpleNamespace(folder=tmp_path)))


def test_a_map_comes_with_what_is_known_of_such_maps(run):
    good, bad = evidence(run, "Edema"), evidence(run, "Fracture")
    assert good == "On 40 test films with the finding, maps peaked on it in 80%, other patients' maps of it in 50%."
    assert bad.startswith(
        "On 40 test films with the finding, maps peaked on it in 10%, other patients' maps of it in 15%"
    )
    assert bad.endswith("do not take it as evidence of the place.")
    heart = "maps peaked on it in 90%, a guess at the film's centre in 95%: do not take it as evidence of the place."
    assert evidence(run, "Cardiomegaly").endswith(heart)
    assert "not tested" in evidence(run, "Lung Lesion")


def test_a_run_without_masks_or_with_a_damaged_table_says_no_more_than_it_knows(run):
    path = run.model.trained.folder / "localization.json"
    path.write_text("{")
    assert evidence(run, "Edema") == ""
    path.unlink()
    assert "not tested" in evidence(run, "Edema")
    assert "not tested" in verdict(run.model.trained.folder)


def test_the_verdict_names_the_findings_whose_maps_beat_their_strongest_control(run):
    said = verdict(run.model.trained.folder)
    better, rest = said.split(". That they do")
    assert better.endswith("for: Edema")
    assert "not shown for: Fracture, Pneumonia, Cardiomegaly." in rest


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        (0, 0, "on the left of the picture (the patient's right), in the upper third"),
        (3, 5, "on the right of the picture (the patient's left), at mid height"),
        (5, 2, "in the middle, in the lower third"),
    ],
)
def test_sides_are_the_patients_too(row, column, words):
    heat = np.zeros((6, 6), np.float32)
    heat[row, column] = 1
    assert _peak(heat) == words
