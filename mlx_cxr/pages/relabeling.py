"""A sheet for reading test images anew, blind to label and model, and the key that is opened when it is filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.failures import FALSE_NEGATIVE, FALSE_POSITIVE, Judged

SHEET_COLUMNS = ("item", "study_id", "films", "question", "answer", "comment")
RIGHT = "right"
QUESTIONS: Mapping[str, str] = {
    "No Finding": "Are the films free of findings, devices aside?",
    "Pleural Other": "Is there pleural disease other than effusion and pneumothorax?",
    "Support Devices": "Are there support devices?",
}
"""In place of `Is there <finding>?`."""


def question(label: str) -> str:
    """Question to the reader about a finding."""
    return QUESTIONS.get(label, f"Is there {label.lower()}?")


def relabel_sheet(
    judged: Judged, category: np.ndarray, images: Mapping[str, Sequence[str]], count: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The sheet, and its key.

    Half of the items are errors drawn at random, half are right calls: to each error one with the same finding and the
    same label, so that to be asked a question says nothing of its answer. An error without such a partner is not taken.
    The order is drawn too.

    Args:
        judged: the N studies.
        category: (N, 14) of `failures.categorize`.
        images: study to the paths of its images.
        count: items at most; an odd one is rounded down.
        seed: of the draws.

    Returns:
        `SHEET_COLUMNS` with `films` joined by ` | `, and `answer` and `comment` empty; and with the same `item` numbers
        the key: `study_id`, `label`, `raw_label`, `call` (a kind of error, or `right`), `category`, `probability`,
        `threshold`.
    """
    rng = np.random.default_rng(seed)
    right = judged.scored & ~judged.error
    free = {
        (column, value): rng.permutation(
            np.flatnonzero(right[:, column] & (judged.targets[:, column] == value))
        ).tolist()
        for column in range(len(LABELS))
        for value in (0, 1)
    }
    cells: list[tuple[int, int]] = []
    for row, column in rng.permutation(np.argwhere(judged.error)).tolist():
        partners = free[column, int(judged.targets[row, column])]
        if len(cells) + 2 <= count and partners:
            cells += [(row, column), (partners.pop(), column)]
    cells = [cells[place] for place in rng.permutation(len(cells))]
    rows, columns = np.array(cells, dtype=np.intp).reshape(-1, 2).T
    item, study_ids, labels = np.arange(1, len(cells) + 1), judged.study_ids[rows], np.array(LABELS)[columns]
    sheet = {
        "item": item,
        "study_id": study_ids,
        "films": [" | ".join(images[study]) for study in study_ids.tolist()],
        "question": [question(label) for label in labels.tolist()],
        "answer": "",
        "comment": "",
    }
    kind = np.where(judged.false_positive, FALSE_POSITIVE, np.where(judged.false_negative, FALSE_NEGATIVE, RIGHT))
    key = {
        "item": item,
        "study_id": study_ids,
        "label": labels,
        "raw_label": judged.raw_labels[rows, columns],
        "call": kind[rows, columns],
        "category": category[rows, columns],
        "probability": judged.calls.probabilities[rows, columns],
        "threshold": judged.calls.thresholds[columns],
    }
    return pd.DataFrame(sheet, columns=list(SHEET_COLUMNS)), pd.DataFrame(key)
