"""One image on one page, to keep or to print: image, map, the 14 findings, the report's reading, and what they rest on.

Nothing of the image's file but the name that it is given is on the page.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from scipy.special import logit

from mlx_cxr import __version__
from mlx_cxr.core.formatting import NOT_CLINICAL
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, STATE_WORDS, OperatingPoints
from mlx_cxr.explain.word_scores import TextExplanation, signed
from mlx_cxr.inference.answers import ImageAnswer, ReportAnswer
from mlx_cxr.pages.figures import BLUE, GREEN, VERMILION
from mlx_cxr.pages.overlay import MAX_OPACITY, colour_scale, map_tile
from mlx_cxr.pages.withheld_maps import METHOD_NAMES, Reading

_INK, _DIM, _BAND, _WARNING = "#16181c", "#5b616b", "#d5d9e0", "#7a4b00"
_COLOURS = (BLUE, VERMILION, GREEN)
_MARKERS = ("o", "D", "^")
_WIDTH, _HEIGHT = 8.27, 11.69
_DPI = 144
_NOTE_LINES = 11


@dataclass(frozen=True)
class Disagreement:
    """A finding that one of image and report is called present by, and the other absent.

    Attributes:
        finding: its name.
        image_state: PRESENT or ABSENT.
        report_state: the other one.
        image_probability, report_probability: calibrated, in [0, 1].
    """

    finding: str
    image_state: int
    report_state: int
    image_probability: float
    report_probability: float

    def words(self) -> str:
        """`Edema: image absent (p 0.12), report present (p 0.93)`.

        Of a report, absent means denied or not mentioned: labels do not tell the two apart where empty counts as 0.
        """
        report = "present" if self.report_state == PRESENT else "denies it or does not mention it"
        return (
            f"{self.finding}: film {STATE_WORDS[self.image_state]} (p {self.image_probability:.2f}), "
            f"report {report} (p {self.report_probability:.2f})"
        )


@dataclass(frozen=True)
class ModelReading:
    """An image model's answer for the image.

    Attributes:
        name: of the run.
        answer: for the image; of an image that could be read.
        points: the run's.
    """

    name: str
    answer: ImageAnswer
    points: OperatingPoints


@dataclass(frozen=True)
class CasePage:
    """Content of the page.

    Attributes:
        models: one or two; the map is the first one's.
        finding: that the map is of.
        heat: float (h, w) of `Predictor.maps`; None draws no map.
        method: which map, a key of `withheld_maps.METHOD_NAMES`.
        show_withheld: draw a map that is withheld too; the page says so.
        opacity: of the map at full strength, in [0, 1].
        report: the teacher's answer, or None.
        report_points: the teacher's.
        reads: what the teacher may read, in words.
        words: the report's words for a finding, or None.
        synthetic: a model on the page was trained on the synthetic cohort.
    """

    models: tuple[ModelReading, ...]
    finding: str
    heat: np.ndarray | None = None
    method: str = "contrast_cam"
    show_withheld: bool = False
    opacity: float = MAX_OPACITY
    report: ReportAnswer | None = None
    report_points: OperatingPoints | None = None
    reads: str = ""
    words: TextExplanation | None = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.models) <= 2:
            raise ValueError(f"{len(self.models)} models; a page has one or two")
        if any(model.answer.probabilities is None for model in self.models):
            raise ValueError("a film that cannot be read has no page")
        if self.report is not None and self.report_points is None:
            raise ValueError("a report's answer needs its operating points")


def disagreements(image: ImageAnswer, report: ReportAnswer) -> list[Disagreement]:
    """The findings that both call, and call differently; where either abstains there is no call to differ."""
    if image.states is None or image.probabilities is None:
        return []
    return [
        Disagreement(label, int(a), int(b), float(image.probabilities[k]), float(report.probabilities[k]))
        for k, (label, a, b) in enumerate(zip(LABELS, image.states, report.states, strict=True))
        if {int(a), int(b)} == {PRESENT, ABSENT}
    ]


def by_margin(probabilities: np.ndarray, points: OperatingPoints) -> list[int]:
    """Columns of the 14 findings, those furthest above their thresholds first, by the difference of log odds.

    A threshold of 0.1 is as much of a hurdle for a rare finding as 0.5 for a common one, so that probabilities alone
    would put common findings first on every image.
    """

    def log_odds(p: np.ndarray) -> np.ndarray:
        return logit(np.clip(p, 1e-9, 1 - 1e-9))

    return np.argsort(log_odds(points.thresholds.values) - log_odds(probabilities), kind="stable").tolist()


def draw_case(case: CasePage, format: Literal["png", "pdf"] = "png", made: datetime | None = None) -> bytes:
    """The page, A4 upright, as a file's content: a PNG of 1190 x 1683 pixels, or a PDF with text in it.

    Args:
        case: what stands on it.
        format: of the file.
        made: printed on it; None takes the present.

    Raises:
        ValueError: another format.
    """
    if format not in ("png", "pdf"):
        raise ValueError(f"format {format!r}: choose 'png' or 'pdf'")
    made = made or datetime.now()
    figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor="white")
    _head(figure, case, made)
    _pictures(figure, case)
    _chart(figure, case)
    _notes(figure, case)
    warning = _warning(case.synthetic)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names and reports may hold dollar signs
    details = {"Title": "mlx_cxr case page", "Keywords" if format == "pdf" else "Description": warning}
    out = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(out, format=format, dpi=_DPI, metadata=details)
    return out.getvalue()


def _warning(synthetic: bool) -> str:
    return f"{NOT_CLINICAL}." + " Trained on a synthetic cohort: the models know drawn films only." * synthetic


def _head(figure: Figure, case: CasePage, made: datetime) -> None:
    image = case.models[0].answer.image
    figure.text(0.06, 0.968, "Chest film, read by a research model", size=15, weight="bold", color=_INK, va="center")
    figure.text(0.94, 0.968, made.strftime("%Y-%m-%d %H:%M"), size=8.5, color=_DIM, ha="right", va="center")
    named = " and ".join(model.name for model in case.models)
    figure.text(0.06, 0.948, _short(f"{image.name}   ·   {named}", 110), size=9, color=_DIM, va="center")
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#fff3d6", "edgecolor": "#e0a72e"}
    figure.text(0.065, 0.923, _warning(case.synthetic), size=8.5, weight="bold", color=_WARNING, va="center", bbox=box)
    if image.concerns:
        concerns = f"The film {'; '.join(image.concerns)}."
        figure.text(0.06, 0.903, _short(concerns, 118), size=8.5, color=_WARNING, va="center")


def _pictures(figure: Figure, case: CasePage) -> None:
    side, base, reading = 0.40, 0.606, case.models[0]
    height = side * _WIDTH / _HEIGHT
    image = reading.answer.image.pixels
    _picture(figure, (0.06, base, side, height), image, "the film as the model sees it")
    why = Reading.of(reading.points, case.finding, reading.answer.probabilities).withheld(case.heat)
    drawable = case.heat is not None and np.isfinite(case.heat).all() and (not why or case.show_withheld)
    at = (0.50, base, side, height)
    if not drawable:
        _picture(figure, at, (image * 0.3).astype(np.uint8), f"{case.finding}: map withheld")
        reason = f"map withheld:\n{textwrap.fill(why, 36)}"
        figure.text(0.70, base + height / 2, reason, color="white", ha="center", va="center", size=10)
        return
    caption = f"{case.finding}: {METHOD_NAMES[case.method]}, peak {np.max(case.heat):.2f}"
    caption += ", withheld, shown on request" * bool(why)
    _picture(figure, at, np.asarray(map_tile(image, case.heat, 640, case.opacity)), caption)
    _scale(figure, (0.912, base, 0.014, height), case.opacity)


def _picture(figure: Figure, at: tuple[float, float, float, float], pixels: np.ndarray, caption: str) -> None:
    ax = figure.add_axes(at)
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bicubic" if pixels.ndim == 2 else "none")
    ax.set_axis_off()
    figure.text(at[0], at[1] - 0.012, caption, size=8.5, color=_DIM, va="center")


def _scale(figure: Figure, at: tuple[float, float, float, float], opacity: float) -> None:
    """The map's colours as they look on a mid-gray image."""
    ax = figure.add_axes(at)
    colours = colour_scale(256, 256, opacity).swapaxes(0, 1)
    ax.imshow(colours, origin="lower", aspect="auto", extent=(0, 1, 0, 1))
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([0, 0.5, 1], ["0", ".5", "≥1"], size=7.5, color=_INK)
    ax.tick_params(length=2, pad=2)
    middle = at[1] + at[3] / 2
    figure.text(0.968, middle, "share of the reference activation", size=7, color=_DIM, rotation=90, va="center")


def _chart(figure: Figure, case: CasePage) -> None:
    """The 14 findings: each reader's probability and threshold, and the first model's band in which it abstains."""
    readers = [(model.name, model.answer.probabilities, model.answer.states, model.points) for model in case.models]
    if case.report is not None:
        readers.append((f"report ({case.reads})", case.report.probabilities, case.report.states, case.report_points))
    first = readers[0]
    order = by_margin(first[1], first[3])
    ax = figure.add_axes((0.285, 0.285, 0.305 if len(readers) == 3 else 0.4, 0.265))
    apart, reach = 0.52 / len(readers), 0.34 / len(readers)
    for row, k in enumerate(order):
        low, high = first[3].abstention_zone(k)
        ax.barh(row, high - low, left=low, height=0.7, color=_BAND, zorder=1)
        for i, (_, probabilities, states, points) in enumerate(readers):
            y = row + (i - (len(readers) - 1) / 2) * apart
            if points.tuned[k]:
                ax.plot([points.thresholds.values[k]] * 2, [y - reach, y + reach], color=_COLOURS[i], lw=1.6, zorder=3)
            filled = {PRESENT: _COLOURS[i], ABSENT: "white", ABSTAIN: "#9aa1ac"}[int(states[k])]
            ax.plot(
                probabilities[k], y, _MARKERS[i], ms=5.5, mfc=filled, mec=_COLOURS[i], mew=1.2, zorder=4, clip_on=False
            )
    ax.set_yticks(range(len(order)), [LABELS[k] for k in order], size=9, color=_INK)
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks(np.linspace(0, 1, 5), ["0", ".25", ".5", ".75", "1"], size=8)
    ax.set_xlabel("calibrated probability", size=8.5, color=_DIM, labelpad=2)
    ax.tick_params(length=0)
    ax.grid(axis="x", color="#eceef2", zorder=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    _columns(figure, ax, readers, order)
    key = "filled: called present   open: called absent   gray: abstains   tick: threshold"
    key += f"\ngray band: where {first[0]} abstains"
    figure.text(0.06, 0.243, key, size=7.5, color=_DIM, va="center", linespacing=1.4)


def _columns(figure: Figure, ax: Axes, readers: Sequence[tuple], order: Sequence[int]) -> None:
    """Each reader's call and probability in words, beside the chart's rows."""
    left, bottom, width, height = ax.get_position().bounds
    place, top = left + width + 0.025, bottom + height + 0.012
    for i, (name, probabilities, states, points) in enumerate(readers):
        x = place + i * 0.112
        mark, text = _MARKERS[i], _short(name, 17)
        figure.text(x, top, text, size=7, color=_COLOURS[i], va="center")
        figure.add_artist(Line2D([x - 0.008], [top], marker=mark, ms=4, color=_COLOURS[i]))
        for row, k in enumerate(order):
            y = bottom + height * (1 - (row + 0.5) / len(order))
            state = int(states[k])
            weight = "bold" if state == PRESENT else "normal"
            words = f"{probabilities[k]:.2f} {STATE_WORDS[state] if state != ABSTAIN else 'abstains'}"
            words = words if points.tuned[k] else "untested"
            figure.text(x, y, words, size=8, weight=weight, color=_DIM if state == ABSENT else _INK, va="center")


def _notes(figure: Figure, case: CasePage) -> None:
    """Abstentions with their reasons, the report, and what the page rests on."""
    model = case.models[0]
    lines: list[tuple[str, str]] = []
    reasons: dict[str, list[str]] = {}
    for k in np.flatnonzero(model.answer.states == ABSTAIN).tolist():
        reasons.setdefault(model.points.reason(k, float(model.answer.probabilities[k])), []).append(LABELS[k])
    lines += [(f"{model.name} abstains:", f"{', '.join(names)}: {reason}.") for reason, names in reasons.items()]
    if case.report is not None:
        found = disagreements(model.answer, case.report)
        lines += [("Film and report disagree on", one.words()) for one in found[:4]]
        if len(found) > 4:
            lines.append(("… and on", f"{', '.join(one.finding for one in found[4:])}."))
        if not found:
            same = f"no finding is called differently by {model.name} and the report's reader"
            lines.append(("Film and report:", same))
        text = " ".join(words for _, words in case.report.sections)
        head = "The report as read, its beginning:" if len(text) > 300 else "The report as read:"
        lines.append((head, textwrap.shorten(text, 300, placeholder=" …")))
    if case.words is not None:
        lines.append((f"Words that moved {case.words.finding}:", _moved(case.words)))
    wrapped = [
        (line, _INK if number % 2 else _DIM)
        for number, (head, body) in enumerate(lines, start=1)
        for line in textwrap.wrap(f"{head} {body}", 128)
    ]
    if len(wrapped) > _NOTE_LINES:
        cut = ("… There was no room for the rest, which the page on the screen has.", _DIM)
        wrapped = [*wrapped[: _NOTE_LINES - 1], cut]
    for i, (line, colour) in enumerate(wrapped):
        figure.text(0.06, 0.218 - 0.014 * i, line, size=8, color=colour, va="top")
    rests = (
        f"mlx_cxr {__version__}. Thresholds, temperatures and abstention (alpha {model.points.bands.alpha:g}) of "
        f"{' and '.join(one.name for one in case.models)} were fitted on validation, per study.\n"
        "A map says which parts of the film raise the finding's score, not that the finding is there."
    )
    figure.text(0.06, 0.038, rests, size=7.5, color=_DIM, va="center", linespacing=1.5)


def _moved(words: TextExplanation, most: int = 4) -> str:
    """The words of the largest effects, raising and lowering, with the effect in logits."""
    effects = np.asarray(words.scores.shown)
    order = np.argsort(-np.abs(effects), kind="stable")[:most]
    return ", ".join(f"“{words.scores.words[i]}” {signed(float(effects[i]))}" for i in order) + " logits"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
