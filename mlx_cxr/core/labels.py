"""The 14 CheXpert findings, their order, and the policies for uncertain and empty labels.

Source values are kept as MIMIC-CXR-JPG ships them: 1 present, 0 absent, -1 uncertain, empty (NaN here) not
mentioned. A policy turns them into training or scoring targets; it is applied when labels are read and never
stored in a manifest (Irvin et al., CheXpert, arXiv:1901.07031, section 3, names the policies).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mlx_cxr.core.errors import UserError

LABELS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
"""Column order of `mimic-cxr-2.0.0-chexpert.csv`; the order of every (N, 14) array in this package."""
FINDING_STEMS: Mapping[str, str] = {
    "atelecta": "Atelectasis",
    "cardiomeg": "Cardiomegaly",
    "consolid": "Consolidation",
    "edema": "Edema",
    "mediastin": "Enlarged Cardiomediastinum",
    "fractur": "Fracture",
    "lesion": "Lung Lesion",
    "nodul": "Lung Lesion",
    "opaci": "Lung Opacity",
    "infiltra": "Lung Opacity",
    "effusion": "Pleural Effusion",
    "pleura": "Pleural Other",
    "pneumothora": "Pneumothorax",
    "pneumon": "Pneumonia",
    "device": "Support Devices",
}
"""Part of a name, in lower case -> the finding that it may stand for, the first that fits: to ask, never to answer."""
FINDING_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("normal", "no findings", "healthy"), "No Finding"),
    **dict.fromkeys(("mass", "masses"), "Lung Lesion"),
    "ptx": "Pneumothorax",
    "enlarged heart": "Cardiomegaly",
}
"""The same of whole names."""
LABEL_ALIASES: Mapping[str, str] = {"Airspace Opacity": "Lung Opacity"}
"""Other names of the 14 in published tables (`mimic-cxr-2.1.0-test-set-labeled.csv`)."""
MAPPED = tuple(label for label in LABELS if label != "No Finding")
"""The findings that have maps: where nothing is, there is nothing to point at."""

Uncertain = Literal["zeros", "ones", "ignore", "soft"]
Empty = Literal["negative", "masked"]


def label_index(name: str) -> int:
    """Position of a finding in `LABELS`.

    Raises:
        KeyError: the name is not one of the 14, with the list of those that are.
    """
    try:
        return LABELS.index(name)
    except ValueError:
        raise KeyError(f"unknown finding {name!r}; the 14 are: {', '.join(LABELS)}") from None


def plain_name(name: str) -> str:
    """A name of a column or finding as it is compared: without regard to case, underscores and runs of blanks."""
    return " ".join(name.replace("_", " ").casefold().split())


_LABEL_OF_PLAIN = {plain_name(name): label for name, label in (*((x, x) for x in LABELS), *LABEL_ALIASES.items())}


def label_of_name(name: str) -> str | None:
    """The one of the 14 that a column or finding name stands for, whatever its case and underscores; None if none."""
    return _LABEL_OF_PLAIN.get(plain_name(name))


def resembled(name: str) -> str | None:
    """The one of the 14 that a name which is none of them is most like, such as `effusion_left`; None if none."""
    plain = plain_name(name)
    stem = next((label for stem, label in FINDING_STEMS.items() if stem in plain), None)
    near = difflib.get_close_matches(plain, _LABEL_OF_PLAIN, n=1, cutoff=0.8)
    return stem or FINDING_WORDS.get(plain) or (_LABEL_OF_PLAIN[near[0]] if near else None)


def finding_name(text: str) -> str:
    """As `label_of_name`, of a name that somebody gave.

    Raises:
        UserError: none of the 14; offers the nearest and lists them.
    """
    if label := label_of_name(text):
        return label
    near = difflib.get_close_matches(plain_name(text), _LABEL_OF_PLAIN, n=1)
    hint = f"did you mean {_LABEL_OF_PLAIN[near[0]]!r}? The" if near else "the"
    raise UserError(f"{text!r} is no finding; {hint} 14 are: {', '.join(LABELS)}")


def label_word(value: float) -> str:
    """A source value in words: `present` (1), `absent` (0), `uncertain` (-1) or `not mentioned` (NaN)."""
    return {1: "present", 0: "absent", -1: "uncertain"}.get(value, "not mentioned")


@dataclass(frozen=True)
class LabelPolicy:
    """Rule for the source values -1 (uncertain) and empty (not mentioned).

    Attributes:
        uncertain: `zeros`, `ones`, `ignore` (masked) or `soft` (the value `soft_value`).
        empty: `negative` (0) or `masked` (NaN).
        soft_value: target of an uncertain label under `soft`, in [0, 1].
        uncertain_per_label: exceptions from `uncertain`, by finding.
    """

    uncertain: Uncertain = "zeros"
    empty: Empty = "negative"
    soft_value: float = 0.5
    uncertain_per_label: Mapping[str, Uncertain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.uncertain_per_label:
            label_index(name)

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Targets for training or scoring.

        Args:
            raw: (N, 14) float, each 1, 0, -1 or NaN, columns in the order of `LABELS`.

        Returns:
            float32 (N, 14) in [0, 1], NaN where there is no information.

        Raises:
            ValueError: wrong number of columns, or a value outside {1, 0, -1, NaN}, with its row and finding.
        """
        raw = np.asarray(raw, dtype=np.float32)
        check_raw_labels(raw)
        targets = raw.copy()
        if self.empty == "negative":
            targets[np.isnan(raw)] = 0.0
        values = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan, "soft": self.soft_value}
        for column, name in enumerate(LABELS):
            rule = self.uncertain_per_label.get(name, self.uncertain)
            targets[raw[:, column] == -1, column] = values[rule]
        return targets


SCORING_PROTOCOLS: Mapping[str, LabelPolicy] = {
    "empty_negative": LabelPolicy(uncertain="zeros", empty="negative"),
    "empty_masked": LabelPolicy(uncertain="ignore", empty="masked"),
}
"""The two protocols that published MIMIC-CXR results differ by; every table names the one it follows.

`empty_negative` scores -1 and empty as 0 (CheXclusion, arXiv:2003.00827); `empty_masked` scores explicit 1 and
0 only (TorchXRayVision, arXiv:2111.00595).
"""


def check_raw_labels(raw: np.ndarray) -> None:
    """Raise ValueError unless `raw` is (N, 14) with values in {1, 0, -1, NaN}; names the first bad row and finding."""
    if raw.ndim != 2 or raw.shape[1] != len(LABELS):
        raise ValueError(f"labels have shape {raw.shape}, expected (N, {len(LABELS)})")
    bad = ~(np.isnan(raw) | np.isin(raw, (-1.0, 0.0, 1.0)))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"row {row}, {LABELS[column]}: label {raw[row, column]} is not 1, 0, -1 or empty")
