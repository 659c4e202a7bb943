"""Answers of a trained run for an image or a report, as plain data: pages show them without MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlx_cxr.teacher.prompt import Prompt

LONGEST = 20_000
"""Characters of a report; MIMIC-CXR's longest have about 5,000."""


@dataclass(frozen=True)
class ImageInput:
    """An image as the network will see it, or why there is none.

    Attributes:
        name: to tell it by.
        pixels: uint8 (S, S), or None.
        notes: what a user may want to know of it, in words, such as `16-bit`.
        concerns: why it does not look like a frontal chest image, in words; its answer should not be relied on.
        error: why it cannot be read, in a sentence, or None.
    """

    name: str
    pixels: np.ndarray | None
    notes: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class ImageAnswer:
    """A network's answer for one image.

    Attributes:
        image: that it was asked about.
        logits: float32 (14,), or None where the image cannot be read.
        probabilities: float64 (14,) in [0, 1], calibrated, or None.
        states: int8 (14,), each PRESENT, ABSENT or ABSTAIN of `evaluation.operating_points`, or None.
        features: float32 (h, w, 512), the last feature map, which maps are made from, or None.
        ignore_gate: answer for an image that does not look like a frontal chest image too.
    """

    image: ImageInput
    logits: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    states: np.ndarray | None = None
    features: np.ndarray | None = field(default=None, repr=False)
    ignore_gate: bool = False

    @property
    def answered(self) -> bool:
        """The figures are to be shown."""
        return self.status == "answered" or (self.ignore_gate and self.status == "questionable")

    @property
    def status(self) -> str:
        """`answered`; `questionable` where the image does not look like a frontal chest image; `unreadable`."""
        return "unreadable" if self.image.error else "questionable" if self.image.concerns else "answered"


@dataclass(frozen=True)
class ReportAnswer:
    """A teacher's answer for one report.

    Attributes:
        sections: (name, text) of what it read, in the order read.
        cut: tokens of the report that the prompt had no room for.
        note: what a user may want to know of the reading, in a sentence, or empty.
        logits: float32 (14,).
        probabilities: float64 (14,) in [0, 1], calibrated.
        states: int8 (14,), each PRESENT, ABSENT or ABSTAIN of `evaluation.operating_points`.
    """

    sections: tuple[tuple[str, str], ...]
    cut: int
    note: str
    logits: np.ndarray
    probabilities: np.ndarray
    states: np.ndarray
    _prompt: Prompt = field(repr=False)
    _image: np.ndarray | None = field(repr=False)
