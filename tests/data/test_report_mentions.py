import re

import pytest

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.report_mentions import LONGEST, WORDS, mentions
from mlx_cxr.synthetic.phrases import NOUN

REPORT = (
    "The heart is normal in size. No pleural effusion or pneumothorax. A 2.5 cm nodule in the right lung; "
    "the PICC line ends in the SVC. No focal consolidation."
)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Pneumothorax", "No pleural effusion or pneumothorax."),
        ("Lung Lesion", "A 2.5 cm nodule in the right lung;"),
        ("Support Devices", "the PICC line ends in the SVC."),
        ("Cardiomegaly", "The heart is normal in size."),
        ("Fracture", ""),
    ],
)
def test_sentences_that_name_the_finding_are_returned(label, expected):
    assert mentions(REPORT, label) == expected


def test_sentences_keep_their_order_and_repeats_are_given_once():
    text = "Edema is worse. Clear lungs. Pulmonary oedema persists.\nEdema is worse."
    assert mentions(text, "Edema") == "Edema is worse. Pulmonary oedema persists."


def test_words_inside_other_words_do_not_count():
    assert mentions("The outline is massive. Misleading support.", "Support Devices") == ""
    assert mentions("Massively enlarged.", "Lung Lesion") == ""


def test_a_long_excerpt_is_cut_between_words():
    got = mentions("effusion " * 100, "Pleural Effusion")
    assert got.endswith("effusion …")
    assert len(got) <= LONGEST + 2


def test_every_finding_has_words_and_an_unknown_one_is_refused():
    assert tuple(WORDS) == LABELS
    with pytest.raises(KeyError):
        mentions(REPORT, "Hernia")


@pytest.mark.parametrize("label", NOUN)
def test_the_words_find_what_synthetic_reports_say(label):
    """Every phrase of the grammar that states a finding, each choice in it spelt out at least once."""
    phrases = [p for variant in NOUN[label].values() for p in variant]
    missed = [phrase for phrase in phrases if not re.search(WORDS[label], phrase, re.IGNORECASE)]
    assert not missed
