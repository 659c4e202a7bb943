"""Effect of each word of a report on an answer, and its colour.

A word's colour is its effect on the finding's logit, on one scale that all pages of a run share: orange raised
it, blue lowered it. The two ends are of one lightness, far enough from black for text to be read on them, and told
apart under the common colour deficiencies (Okabe and Ito's palette). The scale has a floor, so that a report in which
nothing moved the answer stays white.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from mlx_cxr.core.formatting import number

RAISES, LOWERS, WHITE = (230, 159, 0), (86, 180, 233), (255, 255, 255)
SMALLEST_SCALE = 0.5
"""In logits: what takes a probability of 0.50 to 0.62."""
MOST_LEFT_OVER, LEAST_CORRELATION = 0.05, 0.5
"""Contributions are shown where they pass both; see `WordScores.trusted`."""
READING = (
    "The figures say what moved this model's answer, not what is true, nor what a radiologist would weigh. A "
    "negation often carries the weight of what it negates, and words act together: leaving out two is not the sum of "
    "leaving out each."
)
_NICE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)


@dataclass(frozen=True)
class WordScores:
    """Effect of each word of a report on one logit.

    The logit is `blank`, plus `image`, plus the sum of `contributions`, plus `left_over`.

    Attributes:
        words: as they were read, punctuation with its word.
        line_starts: indices of words that begin a section.
        contributions: float64 (W,), integrated gradients, in logits.
        gradient_x_input: float64 (W,), in logits; they need not sum to anything.
        left_out: float64 (W,), the logit less what it is without the word.
        logit: the teacher's.
        blank: the logit without report and image: what instruction, chat and the findings' lines alone give.
        image: contribution of the image's tokens, taken together; 0 without an image.

    Raises:
        ValueError: scores are not one for each word.
    """

    words: tuple[str, ...]
    line_starts: tuple[int, ...]
    contributions: np.ndarray
    gradient_x_input: np.ndarray
    left_out: np.ndarray
    logit: float
    blank: float
    image: float = 0.0

    def __post_init__(self) -> None:
        sizes = [np.shape(x) for x in (self.contributions, self.gradient_x_input, self.left_out)]
        if set(sizes) != {(len(self.words),)}:
            raise ValueError(f"{len(self.words)} words, but scores of shapes {sizes}")

    @property
    def report(self) -> float:
        """Sum of the words' contributions."""
        return float(np.sum(self.contributions))

    @property
    def left_over(self) -> float:
        """The part of the logit that numerical integration left unexplained."""
        return self.logit - self.blank - self.image - self.report

    def agreement(self) -> dict[str, dict[str, float]]:
        """`rank` and `linear` correlation with leave-one-out of `integrated_gradients` and of `gradient_x_input`.

        Ranks weigh the many words that moved next to nothing as much as the few that decided; the linear one is ruled
        by the latter. NaN where undefined.
        """
        methods = {"integrated_gradients": self.contributions, "gradient_x_input": self.gradient_x_input}
        return {
            name: {"rank": rank_correlation(x, self.left_out), "linear": linear_correlation(x, self.left_out)}
            for name, x in methods.items()
        }

    @property
    def trusted(self) -> bool:
        """True where the contributions add up and agree with leave-one-out.

        At most `MOST_LEFT_OVER` of the report's effect is left over, and the linear correlation is at least
        `LEAST_CORRELATION`.
        """
        adds_up = abs(self.left_over) <= MOST_LEFT_OVER * abs(self.report + self.image + self.left_over)
        return adds_up and linear_correlation(self.contributions, self.left_out) >= LEAST_CORRELATION

    @property
    def shown(self) -> np.ndarray:
        """(W,) what colours show: the contributions, or leave-one-out where these are not to be trusted."""
        return self.contributions if self.trusted else self.left_out


@dataclass(frozen=True)
class TextExplanation:
    """One finding in one report.

    Attributes:
        study_id: of the study, or what stands in its place.
        finding: its name.
        scores: of the report's words.
        probability: calibrated, in [0, 1].
        threshold: tuned on validation, on the calibrated probability; NaN where none could be.
        label: the source's value in words, such as `present`; empty where there is none.
        reads: what the teacher may read, such as `findings`.
        cut: tokens of the report that the prompt had no room for.
        synthetic: the report is from the synthetic cohort.
        abstention: why the teacher makes no call, in words; empty where it makes one.
    """

    study_id: str
    finding: str
    scores: WordScores
    probability: float
    threshold: float
    label: str = ""
    reads: str = "report"
    cut: int = 0
    synthetic: bool = False
    abstention: str = ""

    def summary(self) -> str:
        """One line: probability against threshold, and the report's label."""
        sign = "≥" if self.probability >= self.threshold else "<"
        digits = 4 if f"{self.probability:.2f}" == f"{self.threshold:.2f}" else 2
        against = (
            f"{sign} threshold {self.threshold:.{digits}f}" if self.threshold == self.threshold else "(no threshold)"
        )
        text = f"calibrated p = {self.probability:.{digits}f} {against}"
        return f"{text}   ·   report label: {self.label}" if self.label else text

    def account(self) -> list[tuple[str, float]]:
        """The terms of the logit, line by line; the last is the logit."""
        scores = self.scores
        image = [("film", scores.image)] if "film" in self.reads else []
        return [
            (f"without the report{' and the film' * bool(image)}: instruction, chat and findings' lines", scores.blank),
            *image,
            (f"{len(scores.words)} words of the report", scores.report),
            ("left over by numerical integration", scores.left_over),
            ("logit", scores.logit),
        ]

    def check(self) -> str:
        """The scores that the colours show, and their agreement with leaving words out, in words."""
        ours, other = (self.scores.agreement()[name] for name in ("integrated_gradients", "gradient_x_input"))
        words = f"{len(self.scores.words)} words"
        figures = (
            f"rank correlation {number(ours['rank'], 2)}, linear {number(ours['linear'], 2)} over {words} "
            f"(gradient × input: {number(other['rank'], 2)}, {number(other['linear'], 2)})"
        )
        if self.scores.trusted:
            return f"Colours show integrated gradients. Checked against leave-one-out: {figures}."
        return (
            "Colours show leave-one-out: the logit less what it is without the word; what nearly all words share is "
            f"the effect of a shorter report. Integrated gradients failed the check against it: {figures}, "
            f"{signed(self.scores.left_over)} logits left over."
        )

    def abstention_note(self) -> str:
        """Why the teacher makes no call, or an empty string."""
        return f"The teacher abstains: {self.abstention}." if self.abstention else ""

    def cut_note(self) -> str:
        """The count of tokens that were not read, in words, or an empty string."""
        return f"The prompt had no room for {self.cut} more tokens of the report; they were not read." * (self.cut > 0)

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        scores = self.scores
        return {
            "study_id": self.study_id,
            "finding": self.finding,
            "reads": self.reads,
            "probability": self.probability,
            "threshold": self.threshold,
            "abstention": self.abstention,
            "label": self.label,
            "logit": scores.logit,
            "blank": scores.blank,
            "film": scores.image,
            "report": scores.report,
            "left_over": scores.left_over,
            "cut": self.cut,
            "agreement": scores.agreement(),
            "colours": "integrated_gradients" if scores.trusted else "leave_one_out",
            "words": list(scores.words),
            "scores": {
                "integrated_gradients": scores.contributions,
                "gradient_x_input": scores.gradient_x_input,
                "leave_one_out": scores.left_out,
            },
        }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; NaN for fewer than three words, or where either is constant."""
    return _correlation(a, b, lambda a, b: spearmanr(a, b).statistic)


def linear_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; undefined as `rank_correlation`."""
    return _correlation(a, b, lambda a, b: np.corrcoef(a, b)[0, 1])


def _correlation(a: np.ndarray, b: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], float]) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float("nan") if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0 else float(statistic(a, b))


def shared_scale(shown: Sequence[np.ndarray]) -> float:
    """The effect of a word, in logits, at which colours are full: for all pages of a run.

    Returns:
        The 99th percentile of the absolute effects, rounded up to 1, 1.5, 2, 3, 5 or 7 times a power of ten; at
        least `SMALLEST_SCALE`.
    """
    sizes = np.abs(np.concatenate([np.ravel(c) for c in shown])) if len(shown) else np.zeros(0)
    top = float(np.percentile(sizes, 99)) if sizes.size else 0.0
    if top <= SMALLEST_SCALE:
        return SMALLEST_SCALE
    power = 10.0 ** np.floor(np.log10(top))
    return float(next(power * nice for nice in _NICE if power * nice >= top * (1 - 1e-9)))


def shade(effect: float, scale: float) -> tuple[int, int, int]:
    """RGB of a word's ground: white at 0, the full colour from `scale` on."""
    share = min(abs(effect) / scale, 1.0)
    end = RAISES if effect > 0 else LOWERS
    red, green, blue = (round(w + share * (e - w)) for w, e in zip(WHITE, end, strict=True))
    return red, green, blue


def signed(value: float, digits: int = 2) -> str:
    """`+1.23`, `−0.40`, and `0.00` without a sign."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"
