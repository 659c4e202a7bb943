"""The source `mimic-cxr-jpg`: MIMIC-CXR-JPG 2.0.0 and 2.1.0 as PhysioNet ships them, whole or in part.

Johnson et al., MIMIC-CXR-JPG, arXiv:1901.07042. Images lie at `files/p10/p10000032/s50414267/<dicom_id>.jpg` under the
root; the tables are `mimic-cxr-2.x.y-{metadata,split,chexpert,negbio}.csv.gz`, unpacked or not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.config_schema import DataConfig
from mlx_cxr.core.labels import LABEL_ALIASES, LABELS
from mlx_cxr.data.ids import id_key, ids_of
from mlx_cxr.data.source_rows import (
    OLDEST,
    TEXT_COLUMNS,
    SourceRows,
    normalized_sexes,
    normalized_splits,
    normalized_words,
    refuse_inconsistent_studies,
)
from mlx_cxr.data.tables import (
    DataError,
    label_values,
    read_table,
    refuse_blank,
    refuse_duplicates,
    row_number,
)

_TABLE = re.compile(r"mimic-cxr-(2\.\d+\.\d+)-(metadata|split|chexpert|negbio)\.csv(\.gz)?")
_TOP_CODED_AGE = 91
"""MIMIC-IV's `anchor_age` of everyone older than 89."""


def find_tables(root: Path, labeler: str) -> dict[str, Path]:
    """The tables of the newest version that has all three: role (`metadata`, `split`, `labels`) -> path.

    Of a table that is there both ways the unpacked one is taken.

    Raises:
        DataError: no version has all three; names those missing and the tables there.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(root.glob("mimic-cxr-2.*.csv*"), reverse=True):
        if match := _TABLE.fullmatch(path.name):
            found.setdefault(match[1], {})[match[2]] = path
    roles = {"metadata": "metadata", "split": "split", "labels": labeler}
    for version in sorted(found, key=lambda text: [int(part) for part in text.split(".")], reverse=True):
        if all(name in found[version] for name in roles.values()):
            return {role: found[version][name] for role, name in roles.items()}
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder; it should hold files/ and the mimic-cxr-2.*.csv.gz tables")
    there = sorted(path.name for tables in found.values() for path in tables.values())
    missing = [f"mimic-cxr-2.*-{name}.csv.gz" for name in roles.values() if not any(name in v for v in found.values())]
    what = f"lacks {', '.join(missing)}" if missing else "has no version with all of metadata, split and labels"
    listed = ", ".join(there) or "none"
    raise DataError(f"{root} {what}; tables there: {listed}. They come with MIMIC-CXR-JPG on PhysioNet")


def read_mimic(data: DataConfig) -> SourceRows:
    """Every image in metadata and split, of the views wanted, be its file there or not; labels are empty without a row.

    Args:
        data: `root`, `labeler`, `views` and `patients_table` are used.

    Raises:
        DataError: a table or column is missing, an id is blank, not a number or there twice, a label is outside
            {1, 0, -1, empty}, tables contradict each other; names file, row, column and value.
    """
    paths = find_tables(data.root, data.labeler)
    metadata = _read(paths["metadata"], ["dicom_id", "subject_id", "study_id", "ViewPosition"], optional=["StudyDate"])
    refuse_duplicates(metadata, "dicom_id", paths["metadata"], "image")
    image, patient, study = (metadata[name] for name in ("dicom_id", "subject_id", "study_id"))
    frame = pd.DataFrame(
        {
            "image_id": image,
            "patient_id": patient,
            "study_id": study,
            "view": normalized_words(metadata["ViewPosition"]),
            "path": "files/p" + patient.str.slice(0, 2) + "/p" + patient + "/s" + study + "/" + image + ".jpg",
            "date": metadata.get("StudyDate", ""),
        }
    )
    rows = SourceRows(frame, read=len(frame), inputs=paths).of_views(data.views)
    labels = _read(paths["labels"], ["subject_id", "study_id", *LABELS])
    refuse_duplicates(labels, "study_id", paths["labels"], "study")
    values = label_values(labels, {label: label for label in LABELS}, paths["labels"])
    rows = _joined(rows, ("study_id", "study_id"), labels, values, paths["labels"])
    splits = _read(paths["split"], ["dicom_id", "subject_id", "study_id", "split"])
    refuse_duplicates(splits, "dicom_id", paths["split"], "image")
    refuse_blank(splits, "split", paths["split"])
    values = normalized_splits(splits["split"], paths["split"]).to_frame()
    rows = _joined(rows, ("image_id", "dicom_id"), splits, values, paths["split"], "no split row")
    rows = _join_patients(rows, data.patients_table)
    frame = rows.frame.assign(text="")[[*TEXT_COLUMNS, *LABELS]]
    refuse_inconsistent_studies(frame, paths["split"], "download the tables again")
    return replace(rows, frame=frame)


def _read(path: Path, columns: list[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """A MIMIC table whose `subject_id` and `study_id` are digits; "10000032.0" and "010000032" are repaired."""
    table = read_table(path, columns, optional=optional, renamed=LABEL_ALIASES)
    for column, kind, pattern in (
        ("dicom_id", "image", r"[\w.-]+"),
        ("subject_id", "subject", "[0-9]+"),
        ("study_id", "study", "[0-9]+"),
    ):
        if column not in table:
            continue
        table[column] = ids_of(table, column, path, kind)
        wrong = np.flatnonzero(~table[column].str.fullmatch(pattern).to_numpy(dtype=bool))
        if wrong.size:
            value, row = table[column].iloc[wrong[0]], row_number(table, wrong[0])
            is_not = "a number" if column != "dicom_id" else "the name of a file"
            raise DataError(f"{path}, row {row}: {column} {value!r} is not {is_not}")
        if column != "dicom_id":
            table[column] = table[column].str.lstrip("0")
    return table


def _joined(
    rows: SourceRows, ids: tuple[str, str], table: pd.DataFrame, values: pd.DataFrame, path: Path, lacking: str = ""
) -> SourceRows:
    """Rows with further columns, found by an id (its name in the rows, in the table).

    Args:
        table: ids, of the file at `path`.
        values: the columns to add, a row per row of `table`.
        lacking: reason under which rows that the table lacks are dropped and counted; "" keeps them, empty.

    Raises:
        DataError: a row of the table is of another patient or study.
    """
    place = _place(rows.frame[ids[0]], table[ids[1]])
    for ours, theirs in (("patient_id", "subject_id"), ("study_id", "study_id")):
        other = table[theirs].to_numpy()[np.maximum(place, 0)]
        wrong = np.flatnonzero((rows.frame[ours].to_numpy() != other) & (place >= 0))
        if wrong.size:
            known = rows.frame.iloc[wrong[0]]
            raise DataError(
                f"{path}, row {row_number(table, place[wrong[0]])}: {theirs} {other[wrong[0]]!r}, but the metadata "
                f"table has {known[ours]!r} for image {known['image_id']}; take both of one version"
            )
    kept = rows.keep(place >= 0, lacking) if lacking else rows
    values = values.reset_index(drop=True).reindex(place[place >= 0] if lacking else place).reset_index(drop=True)
    return replace(kept, frame=pd.concat([kept.frame, values], axis=1))


def _join_patients(rows: SourceRows, path: Path | None) -> SourceRows:
    """Sex, and age at the study: the anchor age moved by the years between `anchor_year` and the study, where given."""
    if path is None:
        return replace(rows, frame=rows.frame.assign(age="", sex=""))
    table = _read(path, ["subject_id"], optional=["gender", "sex", "anchor_age", "age", "anchor_year"])
    sex = next((name for name in ("gender", "sex") if name in table), None)
    age = next((name for name in ("anchor_age", "age") if name in table), None)
    if sex is None and age is None:
        raise DataError(f"{path} has no column gender, sex, anchor_age or age; is it MIMIC-IV's patients.csv.gz?")
    refuse_duplicates(table, "subject_id", path, "patient")
    place = _place(rows.frame["patient_id"], table["subject_id"])
    own = table.iloc[np.maximum(place, 0)].reset_index(drop=True)
    known = pd.Series(place >= 0)
    years = pd.to_numeric(own[age], errors="coerce") if age else pd.Series(np.nan, index=own.index)
    if "anchor_year" in own and age == "anchor_age":
        passed = pd.to_numeric(rows.frame["date"].str.slice(0, 4), errors="coerce") - pd.to_numeric(own["anchor_year"])
        years = (years + passed.fillna(0)).where(years < _TOP_CODED_AGE, years)  # years beyond are not known
    years = years.where(known & years.between(0, OLDEST))
    frame = rows.frame.assign(
        age=years.fillna(-1).astype(int).astype(str).where(years.notna(), ""),
        sex=normalized_sexes(own[sex]).where(known, "") if sex else "",
    )
    rows = replace(rows, frame=frame, inputs={**rows.inputs, "patients": path})
    return rows.noted(images_of_patients_absent_from_the_patients_table=int((~known).sum()))


def _place(ids: pd.Series, of: pd.Series) -> np.ndarray:
    """Row of each id in `of`, -1 where absent; int (N,)."""
    return pd.Index(id_key(of)).get_indexer(pd.Index(id_key(ids)))
