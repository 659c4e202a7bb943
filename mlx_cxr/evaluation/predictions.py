"""Predictions per study, and `predictions.csv`: one row per study and label, never only aggregates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import atomic_path
from mlx_cxr.core.labels import LABELS, check_raw_labels
from mlx_cxr.data.tables import guarded, unguarded
from mlx_cxr.evaluation.operating_points import STATE_WORDS, OperatingPoints

COLUMNS: tuple[str, ...] = (
    "split",
    "patient_id",
    "study_id",
    "view",
    "label",
    "raw_label",
    "logit",
    "probability",
    "threshold",
    "above_threshold",
    "call",
)
VIEW_GROUPS: tuple[str, ...] = ("AP", "PA", "mixed", "other")

_FIELDS = {"split": "split", "patient_id": "patient_ids", "study_id": "study_ids", "view": "views"}
"""Text columns to the fields of `Predictions`."""
_AGAIN = "run evaluate_cnn again (for a teacher cache_teacher_outputs)"
_STATES = {word: state for state, word in STATE_WORDS.items()}
_RAW_TEXT = {"1": 1.0, "0": 0.0, "-1": -1.0, "": np.nan}


class PredictionsError(UserError, ValueError):
    """Predictions that do not hang together, or a file of them that cannot be used; names where."""


@dataclass(frozen=True)
class Predictions:
    """A model's answers, one row per study.

    Attributes:
        split: (N,) str, such as `validate` or `test`.
        patient_ids: (N,) str.
        study_ids: (N,) str, each once.
        views: (N,) str: the distinct view positions of the study's images, sorted and joined by `+`.
        raw_labels: float32 (N, 14), each 1, 0, -1 or NaN, as the source has them.
        logits: float32 (N, 14), finite, before temperature scaling.

    Raises:
        PredictionsError: lengths differ, a study appears twice, a patient in two splits, a logit is not finite.
        ValueError: a raw label outside {1, 0, -1, NaN}.
    """

    split: np.ndarray
    patient_ids: np.ndarray
    study_ids: np.ndarray
    views: np.ndarray
    raw_labels: np.ndarray
    logits: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.study_ids)
        check_raw_labels(self.raw_labels)
        if self.logits.shape != (n, len(LABELS)) or {
            len(x) for x in (self.split, self.patient_ids, self.views, self.raw_labels)
        } != {n}:
            raise PredictionsError(
                f"{n} study ids, but logits {self.logits.shape}, labels {self.raw_labels.shape}, "
                f"{len(self.split)} splits, {len(self.patient_ids)} patients, {len(self.views)} views"
            )
        if not np.isfinite(self.logits).all():
            row, column = np.argwhere(~np.isfinite(self.logits))[0]
            raise PredictionsError(
                f"study {self.study_ids[row]}, {LABELS[column]}: logit {self.logits[row, column]} is not finite"
            )
        ids, counts = np.unique(self.study_ids, return_counts=True)
        if (counts > 1).any():
            raise PredictionsError(f"study {ids[counts > 1][0]} appears {counts.max()} times; score each once")
        pairs = pd.DataFrame({"patient": self.patient_ids, "split": self.split}).drop_duplicates()
        leaked = pairs.loc[pairs["patient"].duplicated(), "patient"].unique()
        if len(leaked):
            raise PredictionsError(
                f"{len(leaked)} patients are in more than one split, such as {', '.join(map(str, leaked[:5]))}; "
                "run build_manifest again"
            )

    def __len__(self) -> int:
        return len(self.study_ids)

    def select(self, rows: np.ndarray) -> Predictions:
        """The studies at `rows`: a boolean mask (N,) or indices."""
        return Predictions(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def of_split(self, name: str) -> Predictions:
        """The studies of one split.

        Raises:
            PredictionsError: there are none; names the splits that there are.
        """
        rows = self.split == name
        if not rows.any():
            there = ", ".join(sorted(set(self.split.tolist()))) or "none"
            raise PredictionsError(f"no predictions of split {name!r}; splits here: {there}")
        return self.select(rows)

    def view_groups(self) -> np.ndarray:
        """(N,) str of `VIEW_GROUPS`, by the frontal images: `AP`, `PA`, `mixed` with both, else `other`."""
        groups = []
        for view in self.views.tolist():
            frontal = {"AP", "PA"} & set(view.split("+"))
            groups.append("mixed" if len(frontal) == 2 else next(iter(frontal), "other"))
        return np.array(groups, dtype=str)


@dataclass(frozen=True)
class ScoredPredictions:
    """Content of `predictions.csv`: predictions with the thresholds and calls fitted on validation.

    Attributes:
        predictions: one row per study.
        probabilities: float64 (N, 14) in [0, 1], calibrated.
        thresholds: float64 (14,) in [0, 1].
        states: int8 (N, 14), each PRESENT, ABSENT or ABSTAIN of `operating_points`.
    """

    predictions: Predictions
    probabilities: np.ndarray
    thresholds: np.ndarray
    states: np.ndarray


def study_level(frame: pd.DataFrame, raw_labels: np.ndarray, image_logits: np.ndarray) -> Predictions:
    """Average the images of a study in logit space.

    Args:
        frame: manifest rows, one per image, with `patient_id`, `study_id`, `split` and `view`.
        raw_labels: (N images, 14), each 1, 0, -1 or NaN; the same for all images of a study.
        image_logits: (N images, 14).

    Returns:
        One row per study in order of first appearance; the logit is the mean over its images.

    Raises:
        PredictionsError: a column is missing, lengths differ, or a study's images disagree in patient, split or labels.
    """
    missing = [name for name in _FIELDS if name not in frame.columns]
    if missing:
        raise PredictionsError(f"manifest rows lack the column(s) {', '.join(missing)}; run build_manifest again")
    raw, logits = np.asarray(raw_labels, dtype=np.float32), np.asarray(image_logits, dtype=np.float64)
    if not len(frame) == len(raw) == len(logits):
        raise PredictionsError(f"{len(frame)} manifest rows, {len(raw)} labels and {len(logits)} logits")
    columns = {name: frame[name].to_numpy(dtype=str) for name in _FIELDS}
    study_of_image, studies = pd.factorize(columns["study_id"])
    first = np.unique(study_of_image, return_index=True)[1]
    for name in ("patient_id", "split"):
        _refuse_disagreement(columns[name] != columns[name][first][study_of_image], studies, study_of_image, name)
    same = (raw == raw[first][study_of_image]) | (np.isnan(raw) & np.isnan(raw[first][study_of_image]))
    _refuse_disagreement(~same.all(axis=1), studies, study_of_image, "labels")
    sums = np.zeros((len(studies), logits.shape[1]))
    np.add.at(sums, study_of_image, logits)
    counts = np.bincount(study_of_image, minlength=len(studies))
    return Predictions(
        split=columns["split"][first],
        patient_ids=columns["patient_id"][first],
        study_ids=np.asarray(studies, dtype=str),
        views=study_views(frame).to_numpy(dtype=str),
        raw_labels=raw[first],
        logits=(sums / counts[:, None]).astype(np.float32),
    )


def study_views(frame: pd.DataFrame) -> pd.Series:
    """Each study's distinct views, sorted and joined by `+`, `missing` for none; in order of first appearance."""
    views = pd.Series(frame["view"].to_numpy(dtype=str)).replace("", "missing")
    studies = frame["study_id"].to_numpy(dtype=str)
    return views.groupby(studies, sort=False).agg(lambda images: "+".join(sorted(set(images))))


def join(*parts: Predictions) -> Predictions:
    """Predictions of several splits as one, in the order given.

    Raises:
        PredictionsError: a study appears twice, or a patient in two splits.
    """
    names = Predictions.__dataclass_fields__
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write_predictions(path: str | Path, predictions: Predictions, points: OperatingPoints) -> Path:
    """Write `predictions.csv` atomically and return its path: UTF-8, a row per study and label, by `LABELS`.

    Columns:
        split: `validate` or `test`.
        patient_id, study_id: text, `tables.guarded` from spreadsheets; leading zeros are kept.
        view: view positions of the study's images, joined by `+`.
        label: one of `labels.LABELS`.
        raw_label: 1 present, 0 absent, -1 uncertain, empty not mentioned.
        logit: float32, before temperature scaling; shortest text that reads back the same.
        probability: float64 in [0, 1], sigmoid(logit / temperature).
        threshold: float64 in [0, 1], the label's operating point, chosen on validation.
        above_threshold: 1 where probability >= threshold, else 0.
        call: `present`, `absent` or `abstain`, as `OperatingPoints.decide`.
    """
    n, k = predictions.logits.shape
    decided, thresholds = points.decide(predictions.logits), points.thresholds.values
    per_study = {
        name: np.repeat([guarded(text) for text in getattr(predictions, field).tolist()], k)
        for name, field in _FIELDS.items()
    }
    raw = predictions.raw_labels.ravel()
    table = pd.DataFrame(
        {
            **per_study,
            "label": np.tile(LABELS, n),
            "raw_label": ["" if np.isnan(value) else str(int(value)) for value in raw],
            "logit": [str(value) for value in predictions.logits.astype(np.float32).ravel()],
            "probability": [repr(value) for value in decided.probabilities.ravel().tolist()],
            "threshold": np.tile([repr(value) for value in thresholds.tolist()], n),
            "above_threshold": (decided.probabilities >= thresholds).ravel().astype(int),
            "call": [STATE_WORDS[state] for state in decided.states.ravel().tolist()],
        },
        columns=list(COLUMNS),
    )
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return Path(path)


def read_predictions(path: str | Path) -> ScoredPredictions:
    """Read and check what `write_predictions` wrote; ids, logits, probabilities and thresholds come back exactly.

    Raises:
        PredictionsError: the file is missing or not such a table: a column lacks, a study has not each label once, a
            value is out of range, a study's rows disagree, a patient is in two splits; names the file and row.
    """
    path = Path(path)
    table = _read_table(path)
    k = len(LABELS)
    wrong = np.flatnonzero(table["label"].to_numpy() != np.resize(LABELS, len(table)))
    if len(wrong) or len(table) % k:
        row = wrong[0] if len(wrong) else len(table) - 1
        raise PredictionsError(
            f"{path}, line {row + 2}: label {table['label'].iloc[row]!r} is out of place; "
            "each study has the 14 in the order of labels.LABELS"
        )
    for name in (*_FIELDS, "threshold"):
        blocks = table[name].to_numpy().reshape(-1, k)
        reference = blocks[0] if name == "threshold" else blocks[:, :1]
        if len(bad := np.argwhere(blocks != reference)):
            study, label = bad[0]
            other = label if name == "threshold" else study * k
            where = f"{path}, line {study * k + label + 2}"
            raise PredictionsError(f"{where}: {name} differs from that of line {other + 2}; {_AGAIN}")
    numbers = {name: _numbers(path, table, name) for name in ("logit", "probability", "threshold")}
    for name in ("probability", "threshold"):
        _refuse(path, table, name, (numbers[name] < 0) | (numbers[name] > 1))
    _refuse(path, table, "raw_label", ~table["raw_label"].isin(_RAW_TEXT).to_numpy())
    above = np.where(numbers["probability"] >= numbers["threshold"], "1", "0")
    _refuse(path, table, "above_threshold", table["above_threshold"].to_numpy() != above)
    _refuse(path, table, "call", ~table["call"].isin(_STATES).to_numpy())
    heads = table.iloc[::k]
    try:
        predictions = Predictions(
            **{field: heads[name].map(unguarded).to_numpy(dtype=str) for name, field in _FIELDS.items()},
            raw_labels=table["raw_label"].map(_RAW_TEXT).to_numpy(dtype=np.float32).reshape(-1, k),
            logits=numbers["logit"].astype(np.float32).reshape(-1, k),
        )
    except PredictionsError as error:
        raise PredictionsError(f"{path}: {error}") from None
    return ScoredPredictions(
        predictions,
        numbers["probability"].reshape(-1, k),
        numbers["threshold"][:k],
        table["call"].map(_STATES).to_numpy(dtype=np.int8).reshape(-1, k),
    )


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", skip_blank_lines=False)
    except FileNotFoundError:
        raise PredictionsError(f"{path} is missing; run evaluate_cnn first") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise PredictionsError(f"{path} is not a readable table: {error}") from None
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise PredictionsError(f"{path} lacks the column(s) {', '.join(missing)}; {_AGAIN}")
    if table.empty:
        raise PredictionsError(f"{path} has no rows; {_AGAIN}")
    return table


def _numbers(path: Path, table: pd.DataFrame, name: str) -> np.ndarray:
    values = np.full(len(table), np.nan)
    for row, text in enumerate(table[name].tolist()):
        try:
            values[row] = float(text)
        except ValueError:
            break
    _refuse(path, table, name, ~np.isfinite(values))
    return values


def _refuse(path: Path, table: pd.DataFrame, name: str, bad: np.ndarray) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        where = f"{path}, line {row + 2}, study {table['study_id'].iloc[row]}, {table['label'].iloc[row]}"
        raise PredictionsError(f"{where}: {name} {table[name].iloc[row]!r} is not usable; {_AGAIN}")


def _refuse_disagreement(bad: np.ndarray, studies: Sequence[str], study_of_image: np.ndarray, what: str) -> None:
    if bad.any():
        study = studies[study_of_image[int(np.argmax(bad))]]
        raise PredictionsError(f"study {study}: its films disagree in {what}; run build_manifest again")
