"""`findings.md`: maps of studies where the model was right and where it was wrong, for a clinician to comment.

The studies are chosen by rule: those of an outcome are ranked by how confident the model was of its call, and those at
evenly spaced ranks are taken, from the most to the least confident one. The best-looking maps alone would say little.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.files import sha256_file, write_text
from mlx_cxr.core.formatting import escaped, notice_lines, number
from mlx_cxr.core.labels import SCORING_PROTOCOLS, label_index
from mlx_cxr.evaluation.operating_points import ABSTAIN, OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import MEANINGS
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.pages.overlay import draw_overlay, save_picture
from mlx_cxr.pages.tables import markdown_table
from mlx_cxr.pages.withheld_maps import METHOD_NAMES, Reading

log = logging.getLogger("mlx_cxr")

OUTCOMES = ("true positive", "false positive", "false negative")
PAGE = "findings.md"
PICTURES = "grad_cam"
"""The folder of the pictures, beside the page."""
QUESTIONS = ("map lies on the finding?", "clinician's comment")
"""Columns that a clinician fills in, and what stands there until then."""
UNANSWERED = ("☐ yes ☐ in part ☐ no ☐ cannot tell", "&nbsp;")
EXCERPT = 300
"""Characters of the report that are quoted."""


@dataclass(frozen=True)
class Case:
    """One study shown for one finding.

    Attributes:
        outcome: one of `OUTCOMES`.
        rank: 1, 2, … within finding and outcome.
        study_id: of the study.
        reading: the picture's text; its `image` is the image shown.
        image: uint8 (S, S), as in the pixel store.
        heat: float (h, w) of `scale_maps`.
        mask: bool (S, S) of the finding, or None.
        text: of the manifest, or empty.
    """

    outcome: str
    rank: int
    study_id: str
    reading: Reading
    image: np.ndarray
    heat: np.ndarray
    mask: np.ndarray | None = None
    text: str = ""

    @property
    def picture(self) -> str:
        """Its path relative to `findings.md`; finding, outcome and rank make it unique."""
        words = f"{self.reading.finding} {self.outcome} {self.rank} {self.study_id}"
        return f"{PICTURES}/{re.sub(r'[^A-Za-z0-9.-]+', '_', words)[:120]}.png"


@dataclass(frozen=True)
class FindingSummary:
    """One finding's section.

    Attributes:
        finding: its name.
        threshold: on the calibrated probability; None where validation gave none, and then nothing is shown.
        counts: outcome to studies, all of them; with `true negative`.
        abstained: outcome to how many of them the model abstains on.
        cases: those shown.
    """

    finding: str
    threshold: float | None
    counts: Mapping[str, int]
    abstained: Mapping[str, int]
    cases: Sequence[Case]


def outcomes(targets: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Rows of each outcome, most confident call first.

    Args:
        targets: (N,), each 1, 0 or NaN (left out).
        probabilities: (N,), calibrated.
        threshold: a study is called positive at or above it.

    Returns:
        The three of `OUTCOMES` and `true negative` to int arrays. Positive calls are ordered by falling, negative
        ones by rising probability; equal ones by row.
    """
    called = probabilities >= threshold
    rows = {
        "true positive": called & (targets == 1),
        "false positive": called & (targets == 0),
        "false negative": ~called & (targets == 1),
        "true negative": ~called & (targets == 0),
    }
    confidence = np.where(called, -probabilities, probabilities)
    return {
        name: np.flatnonzero(chosen)[np.argsort(confidence[chosen], kind="stable")] for name, chosen in rows.items()
    }


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows at evenly spaced ranks, the first and (from two on) the last among them."""
    if len(rows) <= count:
        return rows
    if count == 1:
        return rows[:1]
    return rows[np.round(np.linspace(0, len(rows) - 1, count)).astype(int)] if count else rows[:0]


def finding_summaries(
    maps: ScaledMaps,
    frame: pd.DataFrame,
    pixels: Callable[[int], np.ndarray],
    test: Predictions,
    points: OperatingPoints,
    per_outcome: int,
    synthetic: bool,
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[FindingSummary]:
    """The cases that the page shows, chosen by its rule, with their images and maps.

    Args:
        maps: of the N test images.
        frame: their manifest rows.
        pixels: from an image's row to its uint8 (S, S) pixels.
        per_outcome: cases per finding and outcome.
        masks: per image, finding to mask; None without masks.
    """
    targets = SCORING_PROTOCOLS[points.protocol].apply(test.raw_labels)
    decided = points.decide(test.logits)
    studies, ids = frame["study_id"].to_numpy(dtype=str), frame["image_id"].to_numpy(dtype=str)
    texts = frame["text"].fillna("").to_numpy(dtype=str) if "text" in frame else np.full(len(ids), "")
    summaries = []
    for label in maps.labels:
        column = label_index(label)
        p, threshold = decided.probabilities[:, column], float(points.thresholds.values[column])
        rows = outcomes(targets[:, column], p, threshold)
        counts = {name: len(found) for name, found in rows.items()}
        abstained = {name: int((decided.states[found, column] == ABSTAIN).sum()) for name, found in rows.items()}
        if not points.tuned[column]:
            summaries.append(FindingSummary(label, None, counts, abstained, ()))
            continue
        cases = []
        for outcome in OUTCOMES:
            for rank, row in enumerate(spread(rows[outcome], per_outcome), start=1):
                study = str(test.study_ids[row])
                # Of a study's images the one with the highest score of the finding.
                images = np.flatnonzero(studies == study)
                image = int(images[np.argmax(maps.logits[images, column])])
                reading = Reading(
                    label,
                    float(p[row]),
                    threshold,
                    float(test.raw_labels[row, column]),
                    ids[image],
                    maps.method,
                    synthetic,
                    points.reason(column, float(p[row])),
                )
                mask = masks[image].get(label) if masks else None
                heat = maps.heat(label, image)
                cases.append(Case(outcome, rank, study, reading, pixels(image), heat, mask, texts[image]))
        summaries.append(FindingSummary(label, threshold, counts, abstained, cases))
    return summaries


def write_findings(
    folder: Path,
    run: str,
    summaries: Sequence[FindingSummary],
    sections: Sequence[str],
    points: OperatingPoints,
    synthetic: bool,
    method: str,
) -> Path:
    """Write the pictures, then `findings.md`, then remove pictures it no longer links to; return the page's path.

    In this order every link of the page works at any moment, also when the command is killed. A page that somebody
    filled in is kept, see `keep_filled_in`.
    """
    keep_filled_in(folder)
    cases = [case for summary in summaries for case in summary.cases]
    write_pictures(folder, cases)
    known = {"synthetic": synthetic, "method": method, "protocol": MEANINGS[points.protocol], "sections": sections}
    path = write_text(folder / PAGE, findings_markdown(run, summaries, **known))
    remove_stale(folder, cases)
    return path


def keep_filled_in(folder: Path) -> None:
    """Move a `findings.md` that somebody wrote comments into, with its pictures, to a folder beside it."""
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(" | ".join(QUESTIONS)) == text.count(" | ".join(UNANSWERED)):
        return
    kept = folder / f"findings_filled_in_{sha256_file(page)[:8]}"
    kept.mkdir()
    if (folder / PICTURES).exists():
        (folder / PICTURES).rename(kept / PICTURES)
    page.rename(kept / PAGE)
    log.warning("the page that was filled in is kept as %s", kept / PAGE)


def write_pictures(folder: str | Path, cases: Sequence[Case], side: int = 320) -> list[Path]:
    """Draw each case into the folder that holds `findings.md`, one atomic write per picture, and return the paths.

    The map of a negative call is shown although it lies below the threshold, and the picture says so.
    """
    paths = []
    for case in cases:
        picture = draw_overlay(case.image, case.heat, case.reading, case.mask, side, show_withheld=True)
        paths.append(save_picture(Path(folder) / case.picture, picture))
    return paths


def remove_stale(folder: str | Path, cases: Sequence[Case]) -> None:
    """Remove pictures of an earlier evaluation that `findings.md` no longer links to."""
    linked = {Path(folder) / case.picture for case in cases}
    for path in (Path(folder) / PICTURES).glob("*.png"):
        if path not in linked:
            path.unlink()


def findings_markdown(
    run: str,
    findings: Sequence[FindingSummary],
    *,
    synthetic: bool,
    method: str,
    protocol: str,
    sections: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        findings: in the order of their sections.
        method: a key of `withheld_maps.METHOD_NAMES`.
        protocol: in words, the policy on uncertain and empty labels.
        sections: Markdown to put before the findings, such as the localization table.
    """
    lines = [
        f"# Where `{run}` looks",
        "",
        *notice_lines(synthetic),
        f"Maps by {METHOD_NAMES[method]} on test films. A map shows which cells raise the finding's score, not that "
        "the finding is there; one against the mean film, which cells raise it above what they do on the validation "
        "films on average. Its scale is the finding's reference activation, the 99th percentile of the maximum "
        "over validation films, the same for every film; it is not stretched film by film. The probability is the "
        "study's, calibrated, and the threshold was chosen on validation; of a study's films the one with the highest "
        f"score of the finding is shown. Right and wrong are judged by the report's label, and {protocol}: a false "
        "positive may be a finding that the report does not mention. Outcomes are those of the threshold; where the "
        "model abstains, as validation leaves it unsure, the table says why.",
        "",
        "Which studies are shown follows a rule: ranked by the confidence of the call, at evenly spaced ranks from the "
        "most to the least confident. They are examples, not a sample to estimate from. A false negative's map lies "
        "below the threshold, where maps are otherwise withheld; it is drawn here to show what there was to see.",
        "",
        *sections,
    ]
    for finding in findings:
        lines += _section(finding)
    return "\n".join(lines).rstrip() + "\n"


def _section(finding: FindingSummary) -> list[str]:
    lines = [f"## {finding.finding}", ""]
    if finding.threshold is None:
        none = "Validation has only one class of it, so no threshold could be chosen, and no call is shown."
        return [*lines, none, ""]
    counts = ", ".join(f"{n} {name} ({finding.abstained[name]})" for name, n in finding.counts.items())
    lines += [f"Threshold {number(finding.threshold)}; studies (of them abstained on): {counts}.", ""]
    for outcome in OUTCOMES:
        cases = [case for case in finding.cases if case.outcome == outcome]
        lines += [f"### {finding.finding}: {outcome}s", ""]
        if not cases:
            lines += ["None is shown." if finding.counts[outcome] else "There is none.", ""]
        for case in cases:
            lines += _case(case)
    return lines


def _case(case: Case) -> list[str]:
    reading = case.reading
    title = f"{reading.finding}, {case.outcome} {case.rank}"
    call = f"abstains: {reading.abstention}" if reading.abstention else reading.call_words
    facts = [f"{reading.probability:.3f}", number(reading.threshold), call, reading.label_words]
    header = ["probability", "threshold", "call", "report label", *QUESTIONS]
    empty = ["The map is empty: no part of the film raises the score.", ""] if not np.any(case.heat > 0) else []
    quote = [f"> {_excerpt(case.text)}", ""] if case.text.strip() else []
    return [
        f"**{case.rank}.** study {escaped(case.study_id)}, film {escaped(reading.image)}",
        "",
        f"![{title}]({case.picture})",
        "",
        *empty,
        *quote,
        *markdown_table(header, [[*facts, *UNANSWERED]]),
    ]


def _excerpt(text: str) -> str:
    """The beginning of a report on one line, cut between words, with Markdown's own characters escaped."""
    line = " ".join(text.split())
    if len(line) > EXCERPT:
        line = line[:EXCERPT].rsplit(" ", 1)[0] + " …"
    return escaped(line)
