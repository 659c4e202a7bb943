"""Rows of a source on their way to the manifest, with a count of the images dropped for each reason."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.tables import NOTHING_WRITTEN, DataError, row_number, without

SPLITS: tuple[str, ...] = ("train", "validate", "test")
TEXT_COLUMNS: tuple[str, ...] = ("image_id", "patient_id", "study_id", "split", "view", "age", "sex", "path", "text")
"""The columns of `manifest.csv` before the 14 labels; all of them text, empty where the source has nothing."""
MISSING_VIEW = "missing"
OLDEST = 120.0
_EXAMPLES = 3
"""Rows named for each reason that some are dropped for."""

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val", "dev"), "validate"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SEXES = {"m": "M", "male": "M", "f": "F", "female": "F", "u": "", "unknown": ""}


@dataclass(frozen=True)
class SourceRows:
    """Images of a source, a row per image.

    Attributes:
        frame: str columns `TEXT_COLUMNS` (`split` is "" where the source brings none), one for each section of the
            reports that the source has in a column of its own, then one float32 column per label: 1, 0, -1 or NaN.
        read: images that the source's table lists; of a table of reports alone, reports.
        dropped: reason -> images left out.
        examples: reason -> ids of the first of them.
        notes: anything a reader of the summary should know -> its count.
        inputs: role -> table that was read.
    """

    frame: pd.DataFrame
    read: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.read != len(self) + sum(self.dropped.values()):
            raise ValueError(f"{self.read} rows were read, {len(self)} kept, and dropped: {dict(self.dropped)}")

    def __len__(self) -> int:
        return len(self.frame)

    def keep(self, rows: np.ndarray, reason: str) -> SourceRows:
        """The rows where the boolean mask (N,) is true; the others are counted under `reason`."""
        rows = np.asarray(rows, dtype=bool)
        if rows.all():
            return self
        kept = replace(self, frame=self.frame[rows].reset_index(drop=True), read=self.read - int((~rows).sum()))
        return kept.with_dropped(self.frame.loc[~rows, "image_id"], reason)

    def with_dropped(self, ids: pd.Series, reason: str) -> SourceRows:
        """The same rows, with those of these ids counted as read and dropped."""
        if ids.empty:
            return self
        dropped = {**self.dropped, reason: self.dropped.get(reason, 0) + len(ids)}
        examples = [*self.examples.get(reason, ()), *ids.head(_EXAMPLES).astype(str)][:_EXAMPLES]
        return replace(self, read=self.read + len(ids), dropped=dropped, examples={**self.examples, reason: examples})

    def noted(self, **notes: int) -> SourceRows:
        """The same rows with further notes; those that count nothing are left out."""
        more = {name.replace("_", " "): count for name, count in notes.items() if count}
        return replace(self, notes={**self.notes, **more})

    def of_views(self, views: Sequence[str] | None) -> SourceRows:
        """Only images of the given view positions; `missing` stands for images without one, None keeps all.

        Raises:
            DataError: no image is left; names the views that there are.
        """
        if views is None:
            return self
        wanted = {"" if view.lower() == MISSING_VIEW else view.upper() for view in views}
        kept = self.keep(self.frame["view"].isin(wanted).to_numpy(), "view not wanted")
        if len(self) and not len(kept):
            there = self.frame["view"].replace("", MISSING_VIEW).value_counts().head(12)
            listed = ", ".join(f"{view} ({count})" for view, count in there.items())
            raise DataError(f"no film has a view of data.views {list(views)}; the views there are: {listed}")
        return kept

    def on_disk(self, root: Path) -> SourceRows:
        """Only images whose file lies under `root`: a partial download is a cohort of its own.

        Raises:
            DataError: `root` is not a folder, or none of the images is there; names the first that was looked for.
        """
        if not root.is_dir():
            raise DataError(f"data.root {root} is not a folder; set data.root to the one that the films lie in")
        kept = self.keep(images_on_disk(root, self.frame["path"].tolist()), "no film on disk")
        if len(self) and not len(kept):
            first = root / self.frame["path"].iloc[0]
            raise DataError(
                f"none of {len(self)} films is on disk; the first one looked for is {first}. "
                "Set data.root to the folder that these paths start from"
            )
        return kept


def labelled(frame: pd.DataFrame) -> np.ndarray:
    """bool (N,): True for a row with a value for any of the 14 labels."""
    return frame[list(LABELS)].notna().any(axis=1).to_numpy()


def images_on_disk(root: Path, paths: Sequence[str]) -> np.ndarray:
    """bool (N,): True for each of the files at `paths`, relative to `root`, that exists."""
    # Asking for each is four times faster than listing MIMIC's folders of one or two images, and `Path` three times
    # slower than `os.path` for 377,110 of them.
    start = os.path.join(root, "")  # noqa: PTH118
    return np.fromiter((os.path.isfile(start + path) for path in paths), dtype=bool, count=len(paths))  # noqa: PTH113


def normalized_splits(values: pd.Series, path: str | Path) -> pd.Series:
    """`train`, `validate` or `test` for each of a source's split names, "" where the cell is empty.

    Raises:
        DataError: another name; names file, row and value.
    """
    names = values.str.lower()
    unknown = np.flatnonzero(~names.isin({*_SPLIT_NAMES, ""}).to_numpy())
    if unknown.size:
        value, row = values.iloc[unknown[0]], row_number(values, unknown[0])
        raise DataError(f"{path}, row {row}: split {value!r} is not train, validate or test")
    return names.map({**_SPLIT_NAMES, "": ""})


def normalized_ages(values: pd.Series) -> tuple[pd.Series, int]:
    """Ages in whole years as text ("058Y" and "58.0" become "58"), and how many were given but not usable.

    Anything but a number from 0 to 120 becomes "": ChestX-ray14, for one, lists a patient of 411 years.
    """
    years = pd.to_numeric(values.str.removesuffix("Y"), errors="coerce")
    usable = years.between(0, OLDEST)
    text = years.where(usable, 0).astype(int).astype(str).where(usable, "")
    return text, int(((values != "") & ~usable).sum())


def normalized_sexes(values: pd.Series) -> pd.Series:
    """`M`, `F`, "" where unknown, or another value of the source in capitals."""
    values = normalized_words(values)
    return values.str.lower().map(_SEXES).fillna(values)


def normalized_words(values: pd.Series) -> pd.Series:
    """Values of a few words in capitals and on one line, "" where a program or a person wrote that there is none."""
    kinds = pd.Series(values.unique(), dtype="str")
    words = without(NOTHING_WRITTEN, kinds.str.split().str.join(" ").str.upper())
    return values.map(dict(zip(kinds, words, strict=True)))


def refuse_inconsistent_studies(frame: pd.DataFrame, path: str | Path, way_out: str) -> None:
    """Raise DataError when the images of a study disagree in patient, split or a label; names the study and column."""
    studies, first = pd.factorize(frame["study_id"])[0], ~frame["study_id"].duplicated().to_numpy()
    for column in ("patient_id", "split", *LABELS):
        codes = pd.factorize(frame[column], use_na_sentinel=False)[0]
        if (differs := np.flatnonzero(codes != codes[first][studies])).size:
            study = frame["study_id"].iloc[differs[0]]
            values = frame.loc[frame["study_id"] == study, column].drop_duplicates().tolist()[:3]
            raise DataError(f"{path}: the films of study {study!r} disagree in {column}: {values}; {way_out}")
