"""From a model's maps of the test images to pictures, localization scores and `findings.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cxr.core.config_schema import ExplainConfig
from mlx_cxr.core.formatting import number
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS, label_index
from mlx_cxr.core.runs import write_text
from mlx_cxr.evaluation.localization_table import ImageScores, localization_markdown, localization_table
from mlx_cxr.evaluation.operating_points import ABSTAIN, OperatingPoints
from mlx_cxr.evaluation.predictions import Predictions
from mlx_cxr.evaluation.results import MEANINGS
from mlx_cxr.explain.faithfulness import randomization_check
from mlx_cxr.explain.localization import Localization, Scores, localize
from mlx_cxr.explain.maps import fit_reference, scale_maps
from mlx_cxr.inference.trained_run import image_maps
from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.pages import findings_page as page
from mlx_cxr.pages.overlay import Reading
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.cohort import SplitData

SELECTION = "test films with a mask of the finding (it was drawn, within the frame) and the report label 1"
ARMS = ("random", "swapped", "centre", "chance")
SCORE_NAMES = {
    "hit": "Pointing game: share of films whose map peaks on the finding",
    "hit_half_cell": "Pointing game, a miss by half a cell of the map allowed",
    "iou": "IoU of the map's strongest pixels with the mask",
    "mass": "Share of the map's sum on the finding",
}
RANDOMIZATION_IMAGES, RANDOMIZATION_DRAWS = 8, 3


@dataclass(frozen=True)
class TestMaps:
    """Maps of all test images, and their scale.

    Attributes:
        labels: K findings.
        raw: float32 (K, N, h, w).
        logits: float32 (N, 14), per image.
        reference: float32 (K,), fitted on validation; NaN where the maps are zero on all of it.
        method: which maps.
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    labels: tuple[str, ...]
    raw: np.ndarray
    logits: np.ndarray
    reference: np.ndarray
    method: str


def map_test(
    model: ResNet18, validation: ImageSource, test: ImageSource, explain: ExplainConfig, batch_size: int
) -> TestMaps:
    """Maps of every test image for the requested findings, with their reference activations from validation."""
    labels = explain.labels or tuple(label for label in LABELS if label != "No Finding")
    reference = fit_reference(image_maps(model, validation, labels, explain.method, batch_size)[0])
    raw, logits = image_maps(model, test, labels, explain.method, batch_size)
    return TestMaps(labels, raw, logits, reference, explain.method)


def finding_summaries(
    maps: TestMaps,
    data: SplitData,
    test: Predictions,
    points: OperatingPoints,
    per_outcome: int,
    synthetic: bool,
    masks: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[page.FindingSummary]:
    """The cases that `findings.md` shows, chosen by its rule, with their images and maps.

    Args:
        maps: of the test images.
        data: the test split, a row per image.
        test: its predictions, a row per study.
        points: what was fitted on validation.
        per_outcome: cases per finding and outcome.
        synthetic: whether the cohort is.
        masks: per image, finding to mask; None without masks.
    """
    targets = SCORING_PROTOCOLS[points.protocol].apply(test.raw_labels)
    decided = points.decide(test.logits)
    studies, ids = data.frame["study_id"].to_numpy(dtype=str), data.frame["image_id"].to_numpy(dtype=str)
    texts = data.frame["text"].fillna("").to_numpy(dtype=str) if "text" in data.frame else np.full(len(ids), "")
    summaries = []
    for k, label in enumerate(maps.labels):
        column = label_index(label)
        p, threshold = decided.probabilities[:, column], float(points.thresholds.values[column])
        rows = page.outcomes(targets[:, column], p, threshold)
        counts = {name: len(found) for name, found in rows.items()}
        abstained = {name: int((decided.states[found, column] == ABSTAIN).sum()) for name, found in rows.items()}
        if not points.tuned[column]:
            summaries.append(page.FindingSummary(label, None, counts, abstained, ()))
            continue
        shown = _image_to_show(studies, maps.logits[:, column])
        cases = []
        for outcome in page.OUTCOMES:
            for rank, row in enumerate(page.spread(rows[outcome], per_outcome), start=1):
                image = shown[test.study_ids[row]]
                raw_label = float(test.raw_labels[row, column])
                reading = Reading(
                    label,
                    float(p[row]),
                    threshold,
                    raw_label,
                    ids[image],
                    maps.method,
                    synthetic,
                    points.reason(column, float(p[row])),
                )
                pixels = np.array(data.images.batch(np.array([image])))[0]
                heat = scale_maps(maps.raw[k : k + 1, image], maps.reference[k : k + 1])[0]
                mask = masks[image].get(label) if masks else None
                cases.append(
                    page.Case(outcome, rank, str(test.study_ids[row]), reading, pixels, heat, mask, texts[image])
                )
        summaries.append(page.FindingSummary(label, threshold, counts, abstained, cases))
    return summaries


def localization(
    maps: TestMaps,
    data: SplitData,
    masks: Sequence[Mapping[str, np.ndarray]],
    test: Predictions,
    points: OperatingPoints,
    *,
    fraction: float,
    half_cell: float,
    samples: int,
    seed: int,
    synthetic: bool,
) -> dict[str, Any] | None:
    """The content of `localization.json`: `localization_table` of every finding that has images to score.

    Args:
        maps: of the test images.
        data: the test split.
        masks: per image, finding to bool (S, S).
        test: its predictions, a row per study.
        points: what was fitted on validation.
        fraction: of a map's pixels that count as its extent.
        half_cell: pixels by which `hit_half_cell` may miss.
        samples: bootstrap resamples.
        seed: of controls and resamples.
        synthetic: whether the cohort is.

    Returns:
        The table, with `selection` (which images), `fraction`, `half_cell_px` and per finding `mask_area` (mean share
        of the image), `films_with_mask`, `empty_maps` (of the images scored; an empty map counts as a miss), `called`
        (of the images scored, those whose study was called positive) and `hit_when_called` (the pointing game on
        those, null without any). None when no finding has images.
    """
    patients, studies = (data.frame[name].to_numpy(dtype=str) for name in ("patient_id", "study_id"))
    called = points.calibration.probabilities(test.logits) >= points.thresholds.values
    row_of_study = {study: row for row, study in enumerate(test.study_ids.tolist())}
    study_rows = np.array([row_of_study[study] for study in studies.tolist()])
    findings, extra = [], {}
    for k, label in enumerate(maps.labels):
        drawn = np.array([label in found and bool(found[label].any()) for found in masks])
        rows = np.flatnonzero(drawn & (data.raw_labels[:, label_index(label)] == 1))
        if not len(rows):
            continue
        targets = np.stack([masks[row][label] for row in rows])
        strict, near = (localize(maps.raw[k, rows], targets, fraction, reach, seed=seed) for reach in (0.0, half_cell))
        findings.append(_image_scores(label, patients[rows], strict, near))
        hits = strict.maps.hit[called[study_rows[rows], label_index(label)]]
        extra[label] = {
            "films_with_mask": int(drawn.sum()),
            "mask_area": float(strict.mask_area.mean()),
            "empty_maps": int((maps.raw[k, rows].max(axis=(1, 2)) == 0).sum()),
            "called": len(hits),
            "hit_when_called": float(hits.mean()) if len(hits) else None,
        }
    if not findings:
        return None
    table = localization_table(findings, samples, seed, synthetic, maps.method)
    for label, entry in extra.items():
        table["per_label"][label] |= entry
    return {**table, "selection": SELECTION, "fraction": fraction, "half_cell_px": half_cell}


def localization_section(table: Mapping[str, Any]) -> list[str]:
    """`localization` as a section of `findings.md`."""
    lines = [
        "## Do the maps find the finding?",
        "",
        f"Films: {table['selection']}, called positive or not. Controls on the same films: random maps of the same "
        "resolution; the maps of other films of the finding (`swapped`: what its usual place alone explains); a guess "
        f"at the film's centre; and chance, from the mask's area. IoU takes the strongest {table['fraction']:.0%} of "
        f"the pixels; half a cell is {table['half_cell_px']:g} px. A map is empty where no part of the film raises the "
        "score, as for a film that the model finds no sign on; it counts as a miss.",
        "",
        localization_markdown(table, SCORE_NAMES),
        "**The films scored**",
        "",
        "| finding | films | mean mask area | empty maps | called positive | pointing game when called |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, entry in table["per_label"].items():
        figures = (entry["films"], f"{entry['mask_area']:.1%}", entry["empty_maps"], entry["called"])
        lines.append(f"| {name} | {' | '.join(map(str, figures))} | {number(entry['hit_when_called'])} |")
    return [*lines, ""]


def randomization_section(model: ResNet18, maps: TestMaps, images: ImageSource, seed: int) -> list[str]:
    """Whether the maps depend on what was learned, as a section of `findings.md`; of a few images, evenly spaced."""
    items = np.unique(np.linspace(0, len(images) - 1, min(RANDOMIZATION_IMAGES, len(images))).astype(int))
    x = preprocess(images.batch(items), model.config.in_channels)
    mx.eval(x)
    check = randomization_check(model, x, maps.labels, method=maps.method, draws=RANDOMIZATION_DRAWS, seed=seed)
    header = ["finding", *(f"randomized: {step}" for step in check)]
    lines = [
        "## Do the maps depend on what was learned?",
        "",
        "Rank correlation of each map with that of the network whose last layers were shuffled (Adebayo et al., 2018), "
        f"mean over {RANDOMIZATION_DRAWS} shuffles of {len(items)} test films. Near 0: they do. Near 1: the maps would "
        "look the same without the training.",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
    ]
    for k, label in enumerate(maps.labels):
        cells = [number(_mean(values[:, k]), 2) for values in check.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    overall = [number(_mean(values), 2) for values in check.values()]
    return [*lines, f"| **mean of {len(maps.labels)}** | " + " | ".join(overall) + " |", ""]


def write_findings(
    folder: Path,
    run: str,
    summaries: Sequence[page.FindingSummary],
    sections: Sequence[str],
    points: OperatingPoints,
    synthetic: bool,
    method: str,
) -> Path:
    """Write the pictures, then `findings.md`, then remove pictures it no longer links to; return the page's path.

    In this order every link of the page works at any moment, also when the command is killed.
    """
    cases = [case for summary in summaries for case in summary.cases]
    page.write_pictures(folder, cases)
    text = page.findings_markdown(
        run, summaries, synthetic=synthetic, method=method, protocol=MEANINGS[points.protocol], sections=sections
    )
    path = write_text(folder / "findings.md", text)
    page.remove_stale(folder, cases)
    return path


def _image_to_show(studies: np.ndarray, logits: np.ndarray) -> dict[str, int]:
    """Study to its image with the highest logit; of equal ones the first."""
    order = np.argsort(-logits, kind="stable")
    shown: dict[str, int] = {}
    for image in order.tolist():
        shown.setdefault(str(studies[image]), image)
    return shown


def _image_scores(label: str, patients: np.ndarray, strict: Localization, near: Localization) -> ImageScores:
    def scores(arm: str) -> dict[str, np.ndarray]:
        columns = {field.name: getattr(getattr(strict, arm), field.name) for field in fields(Scores)}
        return {**columns, "hit_half_cell": getattr(near, arm).hit}

    return ImageScores(label, patients, scores("maps"), {arm: scores(arm) for arm in ARMS})


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
