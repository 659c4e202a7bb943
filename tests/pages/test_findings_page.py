import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from simulated_predictions import simulated

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.operating_points import ABSTAIN
from mlx_cxr.evaluation.results import fit_operating_points
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.pages.findings_page import (
    OUTCOMES,
    Case,
    FindingSummary,
    finding_summaries,
    findings_markdown,
    keep_filled_in,
    outcomes,
    remove_stale,
    spread,
    write_pictures,
)
from mlx_cxr.pages.withheld_maps import Reading

IMAGE = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
POINTS = fit_operating_points(simulated(60, "validate", 0), "empty_negative", "f1", 0.1)


def case(outcome="true positive", rank=1, study="s1", probability=0.9, label=1.0, text="", synthetic=True, why=""):
    reading = Reading("Pleural Effusion", probability, 0.4, label, "film-1", "grad_cam", synthetic, why)
    return Case(outcome, rank, study, reading, IMAGE, np.full((4, 4), 0.5, np.float32), IMAGE > 100, text)


def page(*cases, threshold=0.4, sections=(), synthetic=True):
    counts = {"true positive": 5, "false positive": 0, "false negative": 2, "true negative": 7}
    abstained = {"true positive": 2, "false positive": 0, "false negative": 1, "true negative": 6}
    summary = FindingSummary("Pleural Effusion", threshold, counts, abstained, cases)
    settings = {"synthetic": synthetic, "method": "grad_cam", "protocol": "empty counts as absent"}
    return findings_markdown("demo_cnn", [summary], sections=sections, **settings)


def test_outcomes_are_ordered_by_confidence():
    y = np.array([1, 1, 1, 0, 0, 0, math.nan, 1, 0])
    p = np.array([0.5, 0.9, 0.1, 0.6, 0.8, 0.3, 0.99, 0.3, 0.2])
    got = outcomes(y, p, 0.5)
    assert {name: rows.tolist() for name, rows in got.items()} == {
        "true positive": [1, 0],
        "false positive": [4, 3],
        "false negative": [2, 7],
        "true negative": [8, 5],
    }


def test_spread_takes_even_ranks_with_both_ends():
    rows = np.arange(10) * 11
    assert spread(rows, 3).tolist() == [0, 44, 99]
    assert spread(rows, 1).tolist() == [0]
    assert spread(rows, 2).tolist() == [0, 99]
    assert spread(rows[:2], 3).tolist() == [0, 11]
    assert spread(rows, 0).tolist() == []
    assert spread(rows[:0], 3).tolist() == []


def test_every_link_opens_and_stale_pictures_go(tmp_path):
    cases = [case(), case("false negative", probability=0.1), case("true positive", 2, study="../a b/*s2")]
    (tmp_path / "grad_cam").mkdir()
    old = tmp_path / "grad_cam" / "old.png"
    old.write_bytes(b"old")
    paths = write_pictures(tmp_path, cases)
    links = re.findall(r"!\[.*?\]\((.*?)\)", page(*cases))
    assert [tmp_path / link for link in links] == [paths[0], paths[2], paths[1]]
    for link in links:
        assert link.startswith("grad_cam/")
        assert ".." not in Path(link).parts
        with Image.open(tmp_path / link) as picture:
            picture.load()
    assert old.exists(), "an earlier page's pictures stay until the new page is written"
    remove_stale(tmp_path, cases)
    assert sorted((tmp_path / "grad_cam").iterdir()) == sorted(paths)


@pytest.mark.parametrize(
    "written",
    [("☐ cannot tell", "☒ cannot tell"), ("&nbsp;", "the map lies on the scapula")],
    ids=["a box", "a comment"],
)
def test_a_page_that_somebody_filled_in_is_kept_with_its_pictures(tmp_path, written):
    path, cases = tmp_path / "findings.md", [case(), case("false negative", probability=0.1)]
    path.write_text(page(*cases))
    keep_filled_in(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["findings.md"], "nothing was filled in"
    write_pictures(tmp_path, cases)
    comments = path.read_text().replace(*written, 1)
    path.write_text(comments)
    keep_filled_in(tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("findings_filled_in_")
    assert (kept / "findings.md").read_text() == comments
    for link in re.findall(r"!\[.*?\]\((.*?)\)", comments):
        Image.open(kept / link).load()


def test_page_says_what_was_predicted_and_reported_and_leaves_room():
    text = page(case(label=math.nan, probability=0.912), case("false negative", 1, probability=0.1))
    assert "| 0.912 | 0.400 | present | not mentioned | ☐ yes ☐ in part ☐ no ☐ cannot tell | &nbsp; |" in text
    assert "| 0.100 | 0.400 | absent | present | ☐ yes" in text
    counts = "5 true positive (2), 0 false positive (0), 2 false negative (1), 7 true negative (6)."
    assert f"Threshold 0.400; studies (of them abstained on): {counts}" in text
    assert "### Pleural Effusion: false positives\n\nThere is none." in text
    assert "clinician's comment" in text
    assert "empty counts as absent" in text
    assert text.index("not for clinical use") < text.index("## Pleural Effusion")
    assert "Synthetic cohort" in text
    assert "Synthetic cohort" not in page(case(), synthetic=False)
    assert "None is shown." in page()
    assert [text.index(outcome + "s\n") for outcome in OUTCOMES] == sorted(text.index(o + "s\n") for o in OUTCOMES)


def test_a_call_that_is_not_made_says_why():
    text = page(case(why="both present and absent are plausible at 90 %"))
    assert "| 0.900 | 0.400 | abstains: both present and absent are plausible at 90 % | present | ☐ yes" in text
    assert text.index("where the model abstains") < text.index("## Pleural Effusion")


def test_without_a_threshold_nothing_is_shown():
    text = page(threshold=None)
    assert "no threshold could be chosen" in text
    assert "true positive" not in text.split("## Pleural Effusion")[1]


def test_sections_come_before_the_findings():
    text = page(case(), sections=["## Do the maps find it?", ""])
    assert text.index("## Do the maps find it?") < text.index("## Pleural Effusion")


def test_report_text_is_cut_between_words_and_cannot_become_markup():
    text = page(case(text="# No *acute*\n\n| process | <img src=x> " + "effusion " * 60))
    quote = next(line for line in text.splitlines() if line.startswith("> \\"))
    assert quote.startswith(r"> \# No \*acute\* \| process \| \<img src=x\> effusion")
    assert quote.endswith("effusion …")
    assert len(quote) < 330
    assert "\n> \n" not in page(case(text="  "))


@pytest.mark.parametrize("synthetic", [True, False])
def test_pictures_of_missed_findings_are_drawn_below_the_threshold(tmp_path, synthetic):
    """A false negative's map is shown: the panel right of the image has colour."""
    (path,) = write_pictures(tmp_path, [case("false negative", probability=0.1, synthetic=synthetic)], side=256)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    right = pixels[92 : 92 + 256, 20 + 256 + 14 : 20 + 256 + 14 + 256]
    assert (right.max(axis=-1) - right.min(axis=-1)).mean() > 30


def split_of(test, images_per_study=2, cells=4):
    """Images of each study in turn, their maps and the logits of each image."""
    rng = np.random.default_rng(0)
    studies = np.repeat(test.study_ids, images_per_study)
    n = len(studies)
    texts = [f"report of {study}" for study in studies]
    frame = pd.DataFrame({"study_id": studies, "image_id": [f"i{k}" for k in range(n)], "text": texts})
    raw = rng.random((2, n, cells, cells), dtype=np.float32)
    logits = rng.normal(size=(n, len(LABELS))).astype(np.float32)
    maps = ScaledMaps(("Edema", "Fracture"), raw, logits, np.full(2, 2, np.float32), "grad_cam")
    return frame, rng.integers(0, 255, (n, 32, 32), dtype=np.uint8), maps


def test_cases_show_the_image_with_the_highest_score_of_the_finding():
    test = simulated(25, "test", 1)
    frame, pixels, maps = split_of(test)
    masks = [{"Edema": np.full((32, 32), True)} for _ in range(len(frame))]
    summaries = finding_summaries(maps, frame, pixels.__getitem__, test, POINTS, 2, True, masks)
    decided = POINTS.decide(test.logits)
    probabilities = decided.probabilities
    assert [summary.finding for summary in summaries] == ["Edema", "Fracture"]
    for k, summary in enumerate(summaries):
        column = label_index(summary.finding)
        assert sum(summary.counts.values()) == len(test)
        assert sum(summary.abstained.values()) == (decided.states[:, column] == ABSTAIN).sum() > 0
        assert all(summary.abstained[name] <= count for name, count in summary.counts.items())
        assert {case.outcome for case in summary.cases} >= {"true positive", "false positive"}
        for case in summary.cases:
            row = test.study_ids.tolist().index(case.study_id)
            both = maps.logits[2 * row : 2 * row + 2, column]
            image = 2 * row + int(np.argmax(both))
            assert case.reading.image == f"i{image}"
            assert case.reading.probability == pytest.approx(probabilities[row, column])
            assert case.reading.abstention == POINTS.reason(column, probabilities[row, column])
            assert bool(case.reading.abstention) == (decided.states[row, column] == ABSTAIN)
            assert case.text == f"report of {case.study_id}"
            np.testing.assert_array_equal(case.heat, maps.raw[k, image] / 2)
            np.testing.assert_array_equal(case.image, pixels[image])
            assert (case.mask is None) == (summary.finding == "Fracture")
            positive = test.raw_labels[row, column] == 1
            called = probabilities[row, column] >= POINTS.thresholds.values[column]
            words = {(True, True): "true positive", (False, True): "false positive", (True, False): "false negative"}
            assert case.outcome == words[positive, called]


def test_a_finding_without_a_threshold_has_no_cases():
    test = simulated(10, "test", 1)
    frame, pixels, maps = split_of(test)
    sources = list(POINTS.thresholds.sources)
    sources[label_index("Edema")] = "default"
    points = replace(POINTS, thresholds=replace(POINTS.thresholds, sources=tuple(sources)))
    edema, fracture = finding_summaries(maps, frame, pixels.__getitem__, test, points, 1, True)
    assert (edema.threshold, len(edema.cases)) == (None, 0)
    assert fracture.cases
