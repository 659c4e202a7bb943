"""The sentences of a report that mention a finding, for a reader to look at: a search for words, not a labeler.

It does not tell a finding stated from one denied, and misses other wordings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlx_cxr.core.labels import LABELS

WORDS: Mapping[str, str] = {
    "Atelectasis": r"atelecta|collapse|volume loss",
    "Cardiomegaly": r"cardiomegaly|\bheart\b|cardiac (?:silhouette|enlargement|size)",
    "Consolidation": r"consolidat",
    "Edema": r"o?edema|congestion|fluid overload|heart failure",
    "Enlarged Cardiomediastinum": r"mediastin",
    "Fracture": r"fractur",
    "Lung Lesion": r"nodul|\bmass(?:es)?\b|lesion",
    "Lung Opacity": r"opaci|infiltrat|airspace",
    "No Finding": r"\bno acute\b|\bnormal\b|unremarkable|\bclear\b|no evidence",
    "Pleural Effusion": r"effusion|pleural fluid",
    "Pleural Other": r"pleural (?:thick|plaque|scar)|plaque|fibrothorax",
    "Pneumonia": r"pneumonia|infect",
    "Pneumothorax": r"pneumothora",
    "Support Devices": r"tube|catheter|pacemaker|drain|device|\b(?:lines?|pacer|picc|port|wires?|leads?)\b",
}
"""Finding -> pattern of the words that reports name it by."""
LONGEST = 400
"""Characters of an excerpt."""

_PATTERNS = {label: re.compile(WORDS[label], re.IGNORECASE) for label in LABELS}
_SENTENCE = re.compile(r"(?<=[.;!?])\s+")


def mentions(text: str, label: str) -> str:
    """The sentences of a text that name a finding, in their order, joined by spaces; cut between words at `LONGEST`.

    Raises:
        KeyError: the finding is none of the 14.
    """
    pattern = _PATTERNS[label]
    found = dict.fromkeys(sentence for sentence in _SENTENCE.split(" ".join(text.split())) if pattern.search(sentence))
    line = " ".join(found)
    return line if len(line) <= LONGEST else line[:LONGEST].rsplit(" ", 1)[0] + " …"
