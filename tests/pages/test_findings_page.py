import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_cxr.pages.findings_page import (
    OUTCOMES,
    Case,
    FindingSummary,
    findings_markdown,
    outcomes,
    remove_stale,
    spread,
    write_pictures,
)
from mlx_cxr.pages.overlay import Reading

IMAGE = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))


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
