"""One finding on one image in words, and the one reason why its map is withheld."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_cxr.core.labels import MAPPED, label_index, label_word
from mlx_cxr.evaluation.operating_points import OperatingPoints

METHOD_NAMES = {
    "contrast_cam": "Grad-CAM against the mean film",
    "grad_cam": "Grad-CAM",
    "grad_cam_pp": "Grad-CAM++",
    "hires_cam": "HiResCAM",
    "random": "random map",
}


@dataclass(frozen=True)
class Reading:
    """One finding on one image by the model and by the report.

    Attributes:
        finding: its name.
        probability: calibrated, in [0, 1].
        threshold: tuned on validation, in [0, 1]; NaN where none could be tuned, and then the map is
            withheld.
        label: the source's value: 1, 0, -1 or NaN for not mentioned.
        image: id to print, or empty.
        method: which map, a key of `METHOD_NAMES`.
        synthetic: the model was trained on the synthetic cohort; the picture then says so.
        abstention: why the model makes no call, in words (`OperatingPoints.reason`); empty where it makes one.
        own_image: the image is a user's, not one of the cohort.

    Raises:
        ValueError: a probability or threshold out of range, or a label of another value.
        KeyError: an unknown method.
    """

    finding: str
    probability: float
    threshold: float
    label: float = math.nan
    image: str = ""
    method: str = "grad_cam"
    synthetic: bool = False
    abstention: str = ""
    own_image: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{self.image} {self.finding}: probability is {self.probability}; it lies in [0, 1]")
        if not (math.isnan(self.threshold) or 0 <= self.threshold <= 1):
            raise ValueError(f"{self.image} {self.finding}: threshold is {self.threshold}; it lies in [0, 1]")
        if not (math.isnan(self.label) or self.label in (1, 0, -1)):
            raise ValueError(f"{self.image} {self.finding}: label is {self.label}; it is 1, 0, -1 or NaN")
        if self.method not in METHOD_NAMES:
            raise KeyError(f"unknown method {self.method!r}; there are: {', '.join(METHOD_NAMES)}")

    @classmethod
    def of(cls, points: OperatingPoints, finding: str, probabilities: np.ndarray, **known: Any) -> Reading:
        """One finding of calibrated probabilities (14,) by a run's operating points; `known` are further attributes."""
        k = label_index(finding)
        probability, threshold = float(probabilities[k]), float(points.tuned_thresholds[k])
        return cls(finding, probability, threshold, abstention=points.reason(k, probability), **known)

    @property
    def above_threshold(self) -> bool:
        """The probability reaches the threshold; False where there is none."""
        return self.probability >= self.threshold

    @property
    def call_words(self) -> str:
        """Present or absent by the threshold alone."""
        return "present" if self.above_threshold else "absent"

    @property
    def label_words(self) -> str:
        """The label in words: present, absent, uncertain or not mentioned."""
        return label_word(self.label)

    def summary(self) -> str:
        """One line: probability against threshold, and the report's label of a cohort's image."""
        probability, threshold = self._numbers()
        verdict = f"{'≥' if self.above_threshold else '<'} threshold {threshold}" if threshold else "no threshold"
        text = f"calibrated p = {probability} {verdict}"
        return text if self.own_image else f"{text}   ·   report label: {self.label_words}"

    def withheld(self, heat: np.ndarray | None) -> str:
        """Reason for not showing a map (h, w) unasked, or an empty string; None is a map that was not made.

        Abstention comes before the threshold, as a call needs more than the threshold.
        """
        if heat is None:
            if self.finding not in MAPPED:
                return "No Finding has no map: where nothing is, there is nothing to point at"
            return "this run was evaluated without maps (evaluate_cnn --without_maps)"
        if self.abstention:
            return f"the model abstains on {self.finding}: {self.abstention}"
        if not np.isfinite(heat).all():
            return "no scale: this finding never activated on validation"
        if math.isnan(self.threshold):
            return "no threshold could be tuned for this finding"
        if not self.above_threshold:
            return "p = {} is below the threshold {}".format(*self._numbers())
        return ""

    def _numbers(self) -> tuple[str, str]:
        """Probability and threshold as text, with more digits where two would make them look equal."""
        if math.isnan(self.threshold):
            return f"{self.probability:.2f}", ""
        equal = f"{self.probability:.2f}" == f"{self.threshold:.2f}" and self.probability != self.threshold
        digits = 4 if equal else 2
        return f"{self.probability:.{digits}f}", f"{self.threshold:.{digits}f}"
