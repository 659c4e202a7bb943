"""`manifest.csv`, one row per image (per report, where there are no images), and `splits.json`, for all later stages.

Labels are written exactly as the source has them, 1 / 0 / -1 / empty; their meaning is decided where they are read
(`labels.LabelPolicy`). The same input and seed give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.files import RecordError, atomic_path, read_record, sha256_file, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.ids import id_key
from mlx_cxr.data.sampling import drawn_rank
from mlx_cxr.data.source_rows import SPLITS, TEXT_COLUMNS
from mlx_cxr.data.tables import (
    DataError,
    guarded_cells,
    label_values,
    read_table,
    refuse_blank,
    refuse_duplicates,
)

SCHEMA = 1
_TEXT_OF_LABEL = {1.0: "1", 0.0: "0", -1.0: "-1"}


@dataclass(frozen=True)
class Manifest:
    """A manifest as read from disk.

    Attributes:
        frame: a row per image, or per report: str columns `TEXT_COLUMNS`, then a float32 column per label.
        raw_labels: float32 (N, 14), 1 / 0 / -1 / NaN, in the order of `LABELS`.
        sha256: of the bytes of `manifest.csv`.
        withheld: bool (N,), the rows whose labels a budget took away; None without one.
    """

    frame: pd.DataFrame
    raw_labels: np.ndarray
    sha256: str
    withheld: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def text_only(self) -> bool:
        """True if its rows are reports without images: no row has a path."""
        return _without_images(self.frame)

    @property
    def labelled(self) -> np.ndarray:
        """bool (N,): True for a row that has a value for any of the 14."""
        return ~np.isnan(self.raw_labels).all(axis=1)

    def within_budget(self, budget: float | int | None, seed: int) -> Manifest:
        """The manifest with the labels of so many training patients only; the others' are as if never given.

        The patients are drawn by the seed and their ids alone, so that a smaller budget is part of a larger one.

        Args:
            budget: below 1 a share of the training patients that have a label, at least one of them; else their number;
                None takes all.

        Raises:
            DataError: there are fewer of them.
        """
        if budget is None:
            return self
        training = (self.frame["split"] == "train").to_numpy() & self.labelled
        patients = sorted(self.frame.loc[training, "patient_id"].unique(), key=lambda name: drawn_rank(name, seed))
        count = max(1, round(budget * len(patients))) if isinstance(budget, float) else budget
        if count > len(patients):
            raise DataError(
                f"labels.budget is {budget}, and {len(patients)} training patients have labels; set it to fewer, or to "
                "null for all"
            )
        withheld = training & ~self.frame["patient_id"].isin(patients[:count]).to_numpy()
        labels = np.where(withheld[:, None], np.float32(np.nan), self.raw_labels)
        frame = self.frame.assign(**dict(zip(LABELS, labels.T, strict=True)))
        return replace(self, frame=frame, raw_labels=labels, withheld=withheld)


def labelled_in_turn(raw_labels: np.ndarray, withheld: np.ndarray | None) -> np.ndarray:
    """Rows with labels, in turn as often as makes up for those that a budget withholds.

    So an epoch has as many steps at every budget, and a model of few labels is not one that was trained less.

    Args:
        raw_labels: (N, 14), all NaN where nobody labelled.
        withheld: bool (N,), or None without a budget.

    Returns:
        int (M,), rows: M is the number of those labelled or withheld, and 0 where none is labelled.
    """
    there = np.flatnonzero(~np.isnan(raw_labels).all(axis=1))
    more = 0 if withheld is None or not len(there) else int(withheld.sum())
    return np.resize(there, len(there) + more)


def write_manifest(path: str | Path, frame: pd.DataFrame, agree: Callable[[str], None] = lambda _: None) -> str:
    """Write `manifest.csv` atomically: UTF-8, a header, rows in the order of patient, study and image id.

    Columns:
        image_id, patient_id, study_id: text, as in the source; leading zeros are kept.
        split: `train`, `validate` or `test`.
        view: view position in capitals, such as `AP`, `PA`, `LATERAL`; empty when missing.
        age: whole years, or empty.
        sex: `M`, `F`, empty, or another value of the source.
        path: the image's file, relative to `data.root`; empty in all rows of a manifest of reports without images,
            where the image id is that of the study.
        text: cleaned text of the report, by `data.report_sections`; empty when there is none.
        the 14 labels: 1 present, 0 absent, -1 uncertain, empty not mentioned.

    Texts are `guarded` from spreadsheets; `load_manifest` gives them back exactly.

    Args:
        frame: str columns `TEXT_COLUMNS`, and 14 label columns of 1 / 0 / -1 / NaN.
        agree: called with the hash of the new file before it takes the place of an old one; may raise to keep that.

    Returns:
        Hex SHA-256 of the file.

    Raises:
        DataError: no rows, an image twice, a path in some rows only, a line break in a text, or a patient in two
            splits.
    """
    if frame.empty:
        raise DataError(f"{path}: there is no film to write; see the counts of dropped images")
    if not _without_images(frame):
        refuse_blank(frame.reset_index(drop=True), "path", path)
    refuse_duplicates(frame.reset_index(drop=True), "image_id", path, "image")
    check_patient_splits(frame)
    table = frame.sort_values(["patient_id", "study_id", "image_id"], kind="stable")[[*TEXT_COLUMNS, *LABELS]]
    for name in TEXT_COLUMNS:
        # Readers take a carriage return for the end of a row, and the writer puts no quotes around it.
        if (broken := np.flatnonzero(table[name].str.contains("[\r\n]", regex=True).to_numpy())).size:
            row = table.iloc[broken[0]]
            raise DataError(
                f"{path}: {name} {row[name]!r} of image {row['image_id']!r} has a line break in it; mend it"
            )
    table = table.assign(
        **{name: guarded_cells(table[name]) for name in TEXT_COLUMNS},
        **{name: table[name].map(_TEXT_OF_LABEL).fillna("") for name in LABELS},
    )
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
        sha256 = sha256_file(temporary)
        agree(sha256)
    return sha256


def load_manifest(path: str | Path) -> Manifest:
    """Read and check a file of `write_manifest`.

    Raises:
        DataError: the file is missing, or not a manifest: a column lacks, an image is there twice, a split or label
            is none, a patient is in two splits; or it is not the one that `splits.json` beside it was made with. Names
            file, row, column and value.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing; run build_manifest first")
    table = read_table(path, [*TEXT_COLUMNS, *LABELS], exact=True)
    for name in ("image_id", "patient_id", "study_id", *([] if _without_images(table) else ["path"])):
        refuse_blank(table, name, path)
    refuse_duplicates(table, "image_id", path, "image")
    if (wrong := np.flatnonzero(~table["split"].isin(SPLITS).to_numpy())).size:
        value = table["split"].iloc[wrong[0]]
        raise DataError(f"{path}, row {wrong[0] + 2}: split {value!r} is not one of {', '.join(SPLITS)}")
    check_patient_splits(table)
    sha256 = sha256_file(path)
    check_made_together(path, "manifest_sha256", sha256)
    labels = label_values(table, {name: name for name in LABELS}, path)
    frame = pd.concat([table[list(TEXT_COLUMNS)], labels], axis=1)
    return Manifest(frame, np.ascontiguousarray(labels.to_numpy(dtype=np.float32)), sha256)


def check_made_together(path: Path, key: str, sha256: str) -> None:
    """Compare a file's hash with `splits.json` beside it, where that is.

    Args:
        key: of the hash in `splits.json`.

    Raises:
        DataError: it holds another hash, or is damaged.
    """
    beside = path.with_name("splits.json")
    if not beside.exists():
        return
    try:
        recorded = read_record(beside).get(key)
    except RecordError as error:
        raise DataError(f"{error}: run build_manifest again") from None
    if recorded != sha256:
        raise DataError(
            f"{path} is not the file that {beside} was made with: it was changed or damaged, or build_manifest was "
            "stopped; run build_manifest again"
        )


def check_patient_splits(frame: pd.DataFrame) -> None:
    """Raise DataError, naming patients, when a `patient_id`, however spelled, is in more than one `split`."""
    pairs = frame[["patient_id", "split"]].drop_duplicates()
    key = id_key(pairs["patient_id"])
    pairs = pairs.assign(key=key)[key.isin(key[key.duplicated()])]
    splits = pairs.groupby("key", sort=False)["split"].agg(lambda split: " and ".join(sorted(set(split))))
    leaked = splits[splits.str.contains(" and ")]
    if len(leaked):
        spelled = pairs.groupby("key")["patient_id"].agg(lambda ids: " or ".join(dict.fromkeys(ids)))
        named = "; ".join(f"{spelled[patient]} in {where}" for patient, where in leaked.head(5).items())
        raise DataError(
            f"{len(leaked)} patient(s) are in more than one split: {named}. Scores would be of films much like those "
            "trained on: mend the source's split, or leave it out to have one made by patient"
        )


def _without_images(frame: pd.DataFrame) -> bool:
    return bool((frame["path"] == "").all())


def split_counts(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Patients, studies and images of each split."""
    return {
        name: {
            "patients": int(rows["patient_id"].nunique()),
            "studies": int(rows["study_id"].nunique()),
            "images": len(rows),
        }
        for name, rows in ((name, frame[frame["split"] == name]) for name in SPLITS)
    }


def write_splits(path: str | Path, frame: pd.DataFrame, sha256: str, about: Mapping[str, Any]) -> Path:
    """Write `splits.json`: `manifest_sha256`, the entries of `about`, and patient ids and counts of each split.

    Args:
        frame: the manifest's rows.
        sha256: of the manifest.
        about: such as source, seed and whether the split is the source's.
    """
    counts = split_counts(frame)
    patients = {name: sorted(frame.loc[frame["split"] == name, "patient_id"].unique().tolist()) for name in SPLITS}
    splits = {name: {**counts[name], "patient_ids": patients[name]} for name in SPLITS}
    return write_record(path, {"schema": SCHEMA, "manifest_sha256": sha256, **about, "splits": splits})
