"""From a drawn finding to a label: the radiologist who reads the image, and the labeler that reads the report.

Labels of MIMIC-CXR are two readings away from the image. A radiologist misses or hedges what is subtle, and now and
then suspects what is not there. The labeler then takes the Impression, or the Findings where there is none, and
marks each finding as present (1), uncertain (-1), negated (0) or not mentioned (empty), with errors of its own
(Irvin et al., arXiv:1901.07031; Johnson et al., arXiv:1901.07042).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_cxr.core.labels import LABELS
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.devices import BYSTANDERS
from mlx_cxr.synthetic.devices import LABEL as DEVICE_LABEL
from mlx_cxr.synthetic.findings import LOBES

Change = Literal["first", "new", "worse", "better", "stable", "resolved"]

SUSPECTED: dict[str, float] = {
    "Atelectasis": 0.35,
    "Pneumonia": 0.3,
    "Lung Opacity": 0.15,
    "Pleural Effusion": 0.1,
    "Edema": 0.1,
}
"""Share of each finding among those suspected where there is nothing."""


@dataclass(frozen=True)
class Reader:
    """The errors of a radiologist.

    Attributes:
        missed: chance that a finding at the edge of the visible goes unseen; falls to 0 at severity 0.5.
        hedged: chance that a finding at the edge of the visible is put as a possibility; falls with severity.
        suspected: chance per study of suspecting a finding that is not there (always hedged).
    """

    missed: float
    hedged: float
    suspected: float


@dataclass(frozen=True)
class Seen:
    """A finding as the radiologist will state it.

    Attributes:
        finding: the finding; for devices the names are in `finding.kind`.
        value: 1 present, -1 possible, 0 gone since the prior study.
        change: against the prior study; `first` when there is none to compare with.
    """

    finding: Finding
    value: int
    change: Change


def read_study(
    truth: Mapping[str, Finding], before: Mapping[str, Finding] | None, reader: Reader, rng: np.random.Generator
) -> list[Seen]:
    """Findings that a radiologist sees in a study, with the errors of `reader`.

    Args:
        truth: findings of this study, by label.
        before: those of the patient's study before it; None for the first.
    """
    seen = []
    for label in LABELS:
        finding = truth.get(label)
        if finding is None:
            continue
        s = finding.severity
        if label == DEVICE_LABEL:
            # Wires and leads are no support devices to CheXpert.
            if any(name not in BYSTANDERS for name in finding.kind.split("|")):
                seen.append(Seen(finding, 1, _change(finding, before)))
            continue
        if rng.random() < reader.missed * max(0.0, 1 - s / 0.5):
            continue
        unsure = rng.random() < reader.hedged * max(0.0, 1.15 - s) ** 1.5
        seen.append(Seen(finding, -1 if unsure else 1, _change(finding, before)))
    if rng.random() < reader.suspected:
        names = list(SUSPECTED)
        label = str(rng.choice(names, p=np.array(list(SUSPECTED.values())) / sum(SUSPECTED.values())))
        if label not in truth:
            lobe = str(rng.choice(list(LOBES)))
            seen.append(Seen(Finding(label, 0.2, LOBES[lobe][0], lobe), -1, "first"))
    for label, finding in (before or {}).items():
        if label not in truth and label != DEVICE_LABEL and finding.severity > 0.3 and rng.random() < 0.6:
            seen.append(Seen(finding, 0, "resolved"))
    return seen


def _change(finding: Finding, before: Mapping[str, Finding] | None) -> Change:
    if before is None:
        return "first"
    old = before.get(finding.label)
    if old is None:
        return "new"
    if finding.label == DEVICE_LABEL:
        return "stable" if old.kind == finding.kind else "new"
    if finding.severity > 1.18 * old.severity:
        return "worse"
    return "better" if finding.severity < 0.85 * old.severity else "stable"


def merge(mentions: list[Mapping[str, int]]) -> dict[str, int]:
    """Several mentions of a finding in one text: present wins over uncertain, uncertain over negated."""
    merged: dict[str, int] = {}
    rank = {1: 2, -1: 1, 0: 0}
    for mention in mentions:
        for label, value in mention.items():
            merged[label] = max(value, merged.get(label, value), key=rank.__getitem__)
    return merged


def labels_of(mentions: Mapping[str, int]) -> np.ndarray:
    """The 14 labels that a faultless labeler gives a text: float64 (14,), NaN where nothing is mentioned.

    No Finding is 1 when nothing but devices is present or uncertain, and empty otherwise; never 0.
    """
    row = np.full(len(LABELS), np.nan)
    for label, value in mentions.items():
        row[LABELS.index(label)] = value
    ill = any(value != 0 for label, value in mentions.items() if label != DEVICE_LABEL)
    row[LABELS.index("No Finding")] = np.nan if ill else 1.0
    return row


def spoil(
    row: np.ndarray, error: Mapping[str, float], share: Mapping[str, float], rng: np.random.Generator
) -> np.ndarray:
    """A labeler's own errors.

    Args:
        row: (14,) faultless labels.
        error: by label, the share of its positives that the labeler gets wrong; it also invents so many, so
            that precision and recall are each about 1 - error.
        share: by label, how frequent positives are.

    Returns:
        (14,) labels, each 1, 0, -1 or NaN.
    """
    wrong = row.copy()
    draws, kinds = rng.random(len(LABELS)), rng.random(len(LABELS))
    for column, label in enumerate(LABELS):
        rate, common = error[label], share[label]
        if row[column] == 1:
            if draws[column] < rate:
                wrong[column] = np.nan if kinds[column] < 0.7 or label == "No Finding" else -1.0
        elif draws[column] < rate * common / (1 - common):
            wrong[column] = 1.0
        elif (row[column] == -1 and draws[column] < 2 * rate) or (row[column] == 0 and draws[column] < rate):
            wrong[column] = np.nan
    none = LABELS.index("No Finding")
    others = [column for column, label in enumerate(LABELS) if label not in ("No Finding", DEVICE_LABEL)]
    if wrong[none] == 1 and np.isin(wrong[others], (1, -1)).any():
        wrong[none] = np.nan
    return wrong
