"""The source `csv`: any table of images, or of reports alone, as `data.csv` of the configuration describes it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.config_schema import CsvSource, DataConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.source_rows import (
    SourceRows,
    normalized_ages,
    normalized_sexes,
    normalized_splits,
    refuse_inconsistent_studies,
)
from mlx_cxr.data.tables import (
    DataError,
    label_of_name,
    label_values,
    read_json_lines,
    read_table,
    refuse_blank,
    refuse_duplicates,
)


def read_csv_source(data: DataConfig) -> SourceRows:
    """Every image of the table that passes the row filter, of the views wanted, be its file there or not.

    Of a table of reports alone, every report: `image_id` is then that of the study, and `path` is "".

    Args:
        data: `csv`, `root` and `views` are used. `views` is not applied where no view column is named.

    Returns:
        Rows with `split` "" where no split column is named, and the text column, if any, as written; for columns of
        sections the frame has a column of the section's name each, as written.

    Raises:
        DataError: table or column missing, another separator, a filter that lets nothing through, a blank patient,
            study or image, an image (a study, where there are none) twice, a label or split that is none, images of one
            study that disagree; names file, row, column and value.
    """
    source = data.csv
    if source is None:
        raise DataError("source 'csv' needs the section data.csv of the configuration")
    id_column = source.image or source.study
    columns = {
        "image_id": id_column,
        "patient_id": source.patient,
        "study_id": source.study or source.image,
        "split": source.split,
        "view": source.view,
        "age": source.age,
        "sex": source.sex,
        "path": source.image,
        "text": source.text,
        **source.sections,
    }
    # The rows wanted, each with its ids.
    table = _read(source, {*filter(None, columns.values()), *source.where})
    read = len(table)
    table = _matching(table, source.where, source.table)
    dropped = {"not matching data.csv.where": read - len(table)} if len(table) < read else {}
    for name in (source.patient, columns["study_id"], id_column):
        refuse_blank(table, name, source.table)
    refuse_duplicates(table, id_column, source.table, "study" if source.text_only else "image")
    # Their labels, and the other columns under the manifest's names.
    labels, notes = _listed_findings(table, source) if source.findings else _label_columns(table, source)
    text = pd.DataFrame({role: table[name] if name else "" for role, name in columns.items()}, index=table.index)
    ages, odd_ages = normalized_ages(text["age"])
    frame = text.assign(
        path=_relative(text["path"], data.root, source),
        view=text["view"].str.upper(),
        sex=normalized_sexes(text["sex"]),
        split=normalized_splits(text["split"], source.table),
        age=ages,
    )
    frame = pd.concat([frame, labels.reindex(columns=LABELS).astype(np.float32)], axis=1)
    notes |= {"ages not usable": odd_ages} if odd_ages else {}
    rows = SourceRows(frame.reset_index(drop=True), read, dropped, notes, {"table": source.table})
    if source.findings:
        rows = rows.keep(table[source.findings].notna().to_numpy(), "no findings given")
    refuse_inconsistent_studies(rows.frame, source.table, "set data.csv.study: null to take each film as its own study")
    return rows.of_views(data.views if source.view else None)


def _read(source: CsvSource, needed: set[str]) -> pd.DataFrame:
    """All columns as text; only a cell of `source.findings` can be missing (NaN), where no list is given."""
    needed |= {source.findings} if source.findings else set(source.label_map)
    if source.table.suffix == ".jsonl":
        table = read_json_lines(source.table, sorted(needed), separator=source.findings_separator)
        return table.fillna({name: "" for name in table.columns if name != source.findings})
    table = read_table(source.table, None, separator=source.separator)
    if needed - set(table.columns):
        # Once more with names, for an error that says which are missing and what is there.
        read_table(source.table, sorted(needed), separator=source.separator, separator_key="data.csv.separator")
    if source.findings:
        table[source.findings] = table[source.findings].replace("", np.nan)
    return table


def _matching(table: pd.DataFrame, where: dict[str, str], path: Path) -> pd.DataFrame:
    """The rows whose cells match the patterns from their beginning; row numbers of the file are kept in the index."""
    for column, pattern in where.items():
        try:
            matching = table[column].fillna("").str.match(re.compile(pattern)).to_numpy(dtype=bool)
        except re.error as error:
            raise DataError(f"data.csv.where: {pattern!r} for {column!r} is no regular expression: {error}") from None
        if not matching.any():
            seen = ", ".join(repr(value) for value in table[column].drop_duplicates().tolist()[:5])
            raise DataError(f"{path}: no {column!r} matches {pattern!r} of data.csv.where; the column holds {seen}")
        table = table[matching]
    return table


def _listed_findings(table: pd.DataFrame, source: CsvSource) -> tuple[pd.DataFrame, dict[str, int]]:
    """Labels from a column that lists findings, and notes with the counts of names that gave no label.

    A label that the source covers is 1 where listed, else 0; the others are empty. A name that is one of the 14 counts
    as itself without being mapped.
    """
    lists = table[source.findings].fillna("").str.split(re.escape(source.findings_separator), regex=True)
    names = lists.explode().str.strip()
    names = names[names != ""]
    mapped = {name: source.label_map.get(name) or label_of_name(name) for name in names.unique()}
    label = names.map(mapped)
    covered = source.labels_covered or {*source.label_map.values(), *(x for x in mapped.values() if x)}
    present = pd.DataFrame(0.0, index=table.index, columns=[name for name in LABELS if name in covered])
    for name in present.columns:
        present.loc[label.index[label == name].unique(), name] = 1.0
    unused = {"not mapped": names[label.isna()], "of a label not covered": names[label.notna() & ~label.isin(covered)]}
    return present, {
        f"finding {why}: {name}": count
        for why, of_them in unused.items()
        for name, count in Counter(of_them.tolist()).most_common()
    }


def _label_columns(table: pd.DataFrame, source: CsvSource) -> tuple[pd.DataFrame, dict[str, int]]:
    """Labels from one column each; of several columns for one label, 1 wins over -1 over 0 over empty."""
    columns = {name: label for name in table.columns if (label := label_of_name(name))} | source.label_map
    if source.labels_covered is not None:
        columns = {name: label for name, label in columns.items() if label in source.labels_covered}
    # A label without a column may have one by a name that is nearly its own.
    unserved = [label for label in source.labels_covered or LABELS if label not in columns.values()]
    spare = [name for name in table.columns if name not in columns]
    for label in unserved:
        if near := difflib.get_close_matches(label, spare, n=1, cutoff=0.85):
            raise DataError(
                f"{source.table}: column {near[0]!r} looks like the label {label!r} but is not that name; map it in "
                "data.csv.label_map, or list the labels to be read in data.csv.labels_covered"
            )
    if source.labels_covered and unserved:
        raise DataError(
            f"{source.table}: no column for {', '.join(unserved)} of data.csv.labels_covered; map one in "
            f"data.csv.label_map. Columns there: {', '.join(table.columns)}"
        )
    if not columns:
        raise DataError(
            f"{source.table}: no column is one of the 14 labels; set data.csv.findings to the column that lists them, "
            f"or map columns in data.csv.label_map. Columns there: {', '.join(table.columns)}"
        )
    labels, rank = pd.DataFrame(index=table.index), {1.0: 3, -1.0: 2, 0.0: 1}
    for name, label in columns.items():
        values = label_values(table, {label: name}, source.table)[label]
        if label in labels:
            other = labels[label]
            values = other.where(other.map(rank).fillna(0) >= values.map(rank).fillna(0), values)
        labels[label] = values
    return labels, {}


def _relative(paths: pd.Series, root: Path, source: CsvSource) -> pd.Series:
    """Paths relative to `data.root`, so that a manifest can be moved with its images."""
    absolute = paths.str.startswith("/")
    if not absolute.any():
        return paths
    start = str(root.resolve()).rstrip("/") + "/"
    outside = absolute & ~paths.str.startswith(start)
    if outside.any():
        raise DataError(
            f"{source.table}, column {source.image!r}: {paths[outside].iloc[0]!r} does not lie under data.root {root}; "
            "set data.root to a folder above the films"
        )
    return paths.str.removeprefix(start)
