"""Reports say what they are recorded as saying, look like MIMIC's, and vary."""

import re
from collections import Counter

import numpy as np
import pytest

from mlx_cxr.synthetic import phrases
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.cohort import plan_cohort
from mlx_cxr.synthetic.grammar import spin
from mlx_cxr.synthetic.labeler import Seen
from mlx_cxr.synthetic.narrative import BRIEF, FULL, state

# A labeler written for this test from the mention lists of the CheXpert labeler; it knows nothing of the grammars.
MENTION = {
    "Atelectasis": r"atelecta|collapse",
    "Cardiomegaly": r"cardiomegaly|\bheart\b(?! border)|cardiac (silhouette|enlargement)|cardiac shadow",
    "Consolidation": r"consolidat",
    "Edema": r"edema|vascular congestion|indistinctness",
    "Enlarged Cardiomediastinum": r"mediastin",
    "Fracture": r"fracture",
    "Lung Lesion": r"nodul|\bmass(es)?\b",
    "Lung Opacity": r"opaci",
    "Pleural Effusion": r"effusion|pleural fluid",
    "Pleural Other": r"pleural thickening",
    "Pneumonia": r"pneumonia|infectious process",
    "Pneumothorax": r"pneumothora",
    "Support Devices": r"\b(tubes?|lines?|picc|pacemaker|catheter|port-a-cath|port|drain|support devices)\b",
}
NEGATION = re.compile(
    r"^(there is )?no\b|has resolved|have resolved|^(interval )?resolution of|^resolved|no longer"
    r"|(normal|unremarkable|within normal limits)( in size)?\.?$|are normal",
    re.IGNORECASE,
)
AFTER = re.compile(r"may (represent|reflect)|could represent|concerning for|suspicious for", re.IGNORECASE)
UNSURE = re.compile(r"possibl|probabl|questionabl|excluded|difficult to exclude|may be", re.IGNORECASE)


def read(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for sentence in re.split(r"(?<=\.)\s+|\n\s*\d\.\s", re.sub(r"\s+", " ", re.sub(r"\n\s*\d\. ", "\n ", text))):
        forward = AFTER.search(sentence)
        for label, pattern in MENTION.items():
            for match in re.finditer(pattern, sentence, re.IGNORECASE):
                if NEGATION.search(sentence.strip()):
                    value = 0
                elif forward:
                    value = -1 if match.start() > forward.start() else 1
                else:
                    value = -1 if UNSURE.search(sentence) else 1
                rank = {1: 2, -1: 1, 0: 0}
                if label not in found or rank[value] > rank[found[label]]:
                    found[label] = value
    return found


def section(text: str) -> str:
    """The Impression, else the Findings, else the last paragraph, without line breaks."""
    for heading in (r"(?:IMPRESSION|CONCLUSION):", r"FINDINGS?:"):
        if match := re.search(heading + r"(.*)\Z", text, re.DOTALL):
            return match.group(1)
    return text.rstrip().split("\n \n")[-1]


@pytest.fixture(scope="module")
def studies():
    return plan_cohort(220, 11).studies


def test_an_independent_labeler_reads_what_was_recorded(studies):
    wrong = []
    for study in studies:
        said = read(section(study.report.text))
        if said != study.report.mentions:
            wrong.append((said, study.report.mentions, section(study.report.text)))
    assert len(wrong) <= 0.02 * len(studies), wrong[0]


def test_every_wording_of_every_finding_is_read_as_meant():
    rng = np.random.default_rng(0)
    for label in phrases.HEDGED:
        for kind, side in (
            ("", 0),
            ("single", 1),
            ("acute", -1),
            ("lobar", 1),
            ("right lower lobe", -1),
            ("multiple", 0),
        ):
            for change in FULL:
                for brief in (False, True):
                    for value in (1, -1) if change != "resolved" else (0,):
                        severity = float(rng.uniform(0.2, 1))
                        sentence, mentions = state(
                            Seen(Finding(label, severity, side, kind), value, change), rng, brief
                        )
                        assert read(sentence) == mentions, sentence


def test_no_grammar_is_left_unfilled(studies):
    assert set(FULL) == set(BRIEF)
    for study in studies:
        body = study.report.text
        assert not re.search(r"[<>@\[\]|]|  +\.| ,|\.\.", body.replace(" ___", "")), body


def test_reports_look_like_mimic(studies):
    headings = Counter()
    for study in studies:
        lines = study.report.text.splitlines()
        assert lines[0] == " " * 33 + "FINAL REPORT"
        assert all(line.startswith(" ") and len(line) <= 80 for line in lines)
        headings.update(set(re.findall(r"^ ([A-Z ]+):", study.report.text, re.MULTILINE)))
    assert {"EXAMINATION", "INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"} <= set(headings)
    share = headings["IMPRESSION"] + headings["CONCLUSION"]
    assert 0.70 < share / len(studies) < 0.92
    assert any("FINDINGS" not in s.report.text and "IMPRESSION" not in s.report.text for s in studies)
    assert sum("___" in s.report.text for s in studies) > 0.8 * len(studies)


def test_no_two_reports_alike(studies):
    texts = [re.sub(r"\s+", " ", s.report.text) for s in studies]
    assert len(set(texts)) == len(texts)
    bodies = Counter(re.sub(r"\s+", " ", section(t)) for t in texts)
    longer = {body: count for body, count in bodies.items() if len(body) > 60}
    assert max(longer.values()) <= 3


def test_only_studies_with_a_prior_speak_of_change(studies):
    first, later = [], []
    seen = set()
    for study in studies:
        (later if study.patient.subject_id in seen else first).append(study.report.text)
        seen.add(study.patient.subject_id)
    change = re.compile(
        r"unchanged since|since (the )?prior|has (increased|decreased|improved|worsened)|Interval (incr|improv)",
        re.IGNORECASE,
    )
    assert not any(change.search(text) for text in first)
    assert sum(bool(change.search(re.sub(r"\s+", " ", text))) for text in later) > 0.1 * len(later)


def test_spin_chooses_fills_and_sets_articles():
    rng = np.random.default_rng(1)
    assert {spin("[a|b[c|d]]", rng) for _ in range(60)} == {"a", "bc", "bd"}
    assert spin("There is @<what> here .", rng, {"what": "effusion"}) == "There is an effusion here."
    assert spin("@[|] small one", rng) == "a small one"
