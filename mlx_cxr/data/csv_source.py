"""The source `csv`: any table of images, or of reports alone, as `data.csv` of the configuration describes it."""

from __future__ import annotations

import difflib
import logging
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.core.config_schema import CsvSource, DataConfig
from mlx_cxr.core.labels import LABELS, label_of_name, plain_name, resembled
from mlx_cxr.data.ids import ids_of
from mlx_cxr.data.source_rows import (
    SourceRows,
    normalized_ages,
    normalized_sexes,
    normalized_splits,
    normalized_words,
    refuse_inconsistent_studies,
)
from mlx_cxr.data.tables import (
    LABEL_VALUES,
    NOTHING_WRITTEN,
    DataError,
    label_values,
    listed,
    read_json_lines,
    read_table,
    refuse_blank,
    refuse_duplicates,
    row_number,
    without,
)

log = logging.getLogger("mlx_cxr")

_CALLS = frozenset(
    (
        "yes",
        "no",
        "true",
        "false",
        "y",
        "n",
        "t",
        "f",
        "present",
        "absent",
        "positive",
        "negative",
        "pos",
        "neg",
        "uncertain",
    )
)
"""Values of a column that answers for a finding, beside those of a label."""
_LIST = re.compile(r"""[\[({]\s*(?:(?:'[^']*'|"[^"]*")[\s,]*)*[\])}]""")
_LIST_ITEM = re.compile(r"""'([^']*)'|"([^"]*)\"""")
"""A list of texts as Python, JSON or NumPy writes it, and one of them."""
_NO_MATCH = "not matching data.csv.where"
_SEPARATORS = re.compile(r"\s*[|;,/\n]\s*")


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
            study or image, an id spelled in two ways, an image (a study, where there are none) twice, an image outside
            `data.root`, a label or split that is none, a column that looks like a finding's and is not said to be one,
            findings of which none is known, images of one study that disagree; names file, row, column and value.
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
    everything = table
    table = _matching(table, source.where, source.table)
    ids = {source.patient: ids_of(table, source.patient, source.table, "patient")}
    if source.study:
        ids[source.study] = ids_of(table, source.study, source.table, "study")
    if source.image:
        refuse_blank(table, source.image, source.table)
    table = table.assign(**ids)
    refuse_duplicates(table, id_column, source.table, "study" if source.text_only else "image")
    paths = _relative(table[source.image], data.root, source) if source.image else ""
    # Their labels, and the other columns under the manifest's names.
    labels, notes = _listed_findings(table, source) if source.findings else _label_columns(table, source)
    notes |= _unused_columns(table, source, {*filter(None, columns.values()), *source.where})
    text = pd.DataFrame({role: table[name] if name else "" for role, name in columns.items()}, index=table.index)
    ages, odd_ages = normalized_ages(text["age"])
    frame = text.assign(
        **{role: without(NOTHING_WRITTEN, text[role]) for role in ("text", *source.sections)},
        path=paths,
        view=normalized_words(text["view"]),
        sex=normalized_sexes(text["sex"]),
        split=normalized_splits(text["split"], source.table),
        age=ages,
    )
    frame = pd.concat([frame, labels.reindex(columns=LABELS).astype(np.float32)], axis=1)
    notes |= {"ages not usable": odd_ages} if odd_ages else {}
    rows = SourceRows(frame.reset_index(drop=True), len(frame), notes=notes, inputs={"table": source.table})
    rows = rows.with_dropped(everything.loc[~everything.index.isin(table.index), id_column], _NO_MATCH)
    refuse_inconsistent_studies(rows.frame, source.table, "set data.csv.study: null to take each film as its own study")
    return rows.of_views(data.views if source.view else None)


def _read(source: CsvSource, needed: set[str]) -> pd.DataFrame:
    """All columns as text; only a cell of `source.findings` can be missing (NaN), where no list is given."""
    needed |= {source.findings} if source.findings else set()
    if ".jsonl" in source.table.suffixes:
        table = read_json_lines(source.table, sorted(needed), separator=source.findings_separator)
        table = table.fillna({name: "" for name in table.columns if name != source.findings})
    else:
        table = read_table(source.table, None, separator=source.separator)
        if needed - set(table.columns):
            # Once more with names, for an error that says which are missing and what is there.
            read_table(source.table, sorted(needed), separator=source.separator, separator_key="data.csv.separator")
        if source.findings:
            table[source.findings] = table[source.findings].replace("", np.nan)
    if source.findings:
        nothing = NOTHING_WRITTEN - {name.casefold() for name in source.label_map}
        table[source.findings] = table[source.findings].mask(table[source.findings].str.lower().isin(nothing))
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
    names = _items(table, source).explode().str.strip()
    names = names[names.fillna("") != ""]
    declared = _declared(source)
    mapped = {name: declared.get(plain_name(name)) or label_of_name(name) for name in names.unique()}
    label = names.map(mapped)
    if len(names) and label.isna().all():
        raise DataError(
            f"{source.table}, column {source.findings!r}: none of its {len(mapped)} names is one of the 14 labels: "
            f"{', '.join(repr(name) for name in list(mapped)[:3])}, …; map them in data.csv.label_map, or set "
            f"data.csv.findings_separator (now {source.findings_separator!r})"
        )
    covered = source.labels_covered or {*source.label_map.values(), *(x for x in mapped.values() if x)}
    _refuse_likely_names(names, [name for name, own in mapped.items() if own is None], covered, source)
    present = pd.DataFrame(0.0, index=table.index, columns=[name for name in LABELS if name in covered])
    present[table[source.findings].isna()] = np.nan
    for name in present.columns:
        present.loc[label.index[label == name].unique(), name] = 1.0
    unused = {"not mapped": names[label.isna()], "of a label not covered": names[label.notna() & ~label.isin(covered)]}
    return present, {
        f"finding {why}: {name}": count
        for why, of_them in unused.items()
        for name, count in Counter(of_them.tolist()).most_common()
    }


def _declared(source: CsvSource) -> dict[str, str]:
    """Plain name -> label, of `source.label_map`."""
    declared: dict[str, str] = {}
    for name, label in source.label_map.items():
        if declared.setdefault(plain_name(name), label) != label:
            raise DataError(f"data.csv.label_map has {name!r} in two spellings, for two labels; leave one out")
    return declared


def _items(table: pd.DataFrame, source: CsvSource) -> pd.Series:
    """The list of names in each cell of `source.findings`, which may also be written as Python or JSON writes one.

    Raises:
        DataError: a cell in square brackets is no list of texts in quotes; names its row.
    """
    cells = table[source.findings].fillna("")
    lists = []
    for place, cell in enumerate(cells):
        if _LIST.fullmatch(cell):
            lists.append([one or other for one, other in _LIST_ITEM.findall(cell)] or [""])
        elif cell.startswith("[") and cell.endswith("]"):
            raise DataError(
                f"{source.table}, row {row_number(table, place)}, column {source.findings!r}: "
                f"{cell[:80]!r} is no list of texts in quotes, such as ['Edema', 'Fracture']"
            )
        else:
            lists.append(cell.split(source.findings_separator))
    return pd.Series(lists, index=cells.index, dtype=object)


def _refuse_likely_names(names: pd.Series, unknown: list[str], covered: Collection[str], source: CsvSource) -> None:
    """Raise DataError when a name that no label is known for would be an answer: 0 for a label that it may mean.

    Args:
        names: of all rows, index as in the table.
        unknown: those that are not mapped.
        covered: labels that are 0 where nothing stands for them.
    """
    declared = _declared(source)
    for name in unknown:
        if name in source.ignore:
            continue
        row = row_number(names, int(np.flatnonzero((names == name).to_numpy())[0]))
        where = f"{source.table}, row {row}, column {source.findings!r}: {name!r}"
        parts = _SEPARATORS.split(name)
        if len(parts) > 1 and any(declared.get(plain_name(part)) or label_of_name(part) for part in parts):
            raise DataError(
                f"{where} looks like several findings, which are separated by {source.findings_separator!r}; set "
                "data.csv.findings_separator, or map the name as a whole in data.csv.label_map"
            )
        if (like := resembled(name)) in covered:
            raise DataError(
                f"{where} looks like the label {like!r} but is not that name, and {like!r} would be 0; map it in "
                "data.csv.label_map, or list it in data.csv.ignore"
            )


def _label_columns(table: pd.DataFrame, source: CsvSource) -> tuple[pd.DataFrame, dict[str, int]]:
    """Labels from one column each; of several columns for one label, 1 wins over -1 over 0 over empty."""
    columns = _columns_of_labels(table, source)
    if source.labels_covered is not None:
        columns = {name: label for name, label in columns.items() if label in source.labels_covered}
    # A label without a column may have one by a name that is nearly its own.
    unserved = [label for label in source.labels_covered or LABELS if label not in columns.values()]
    spare = [name for name in table.columns if name not in columns and name not in source.ignore]
    for label in unserved:
        if near := difflib.get_close_matches(label, spare, n=1, cutoff=0.85):
            raise DataError(
                f"{source.table}: column {near[0]!r} looks like the label {label!r} but is not that name; map it in "
                "data.csv.label_map, list it in data.csv.ignore, or the labels to be read in data.csv.labels_covered"
            )
    if source.labels_covered and unserved:
        raise DataError(
            f"{source.table}: no column for {', '.join(unserved)} of data.csv.labels_covered; map one in "
            f"data.csv.label_map. Columns there: {listed([*table.columns])}"
        )
    if not columns:
        raise DataError(
            f"{source.table}: no column is one of the 14 labels; set data.csv.findings to the column that lists them, "
            f"or map columns in data.csv.label_map. Columns there: {listed([*table.columns])}"
        )
    labels, rank = pd.DataFrame(index=table.index), {1.0: 3, -1.0: 2, 0.0: 1}
    for name, label in columns.items():
        values = label_values(table, {label: name}, source.table)[label]
        if label in labels:
            other = labels[label]
            values = other.where(other.map(rank).fillna(0) >= values.map(rank).fillna(0), values)
        labels[label] = values
    return _with_blank_rows(labels, source), {}


def _with_blank_rows(labels: pd.DataFrame, source: CsvSource) -> pd.DataFrame:
    """The labels, with 0 in rows without any value where `source.blank_rows` says that this is what they mean."""
    blank = np.flatnonzero(labels.isna().all(axis=1).to_numpy())
    if not blank.size or source.blank_rows == "not labelled":
        return labels
    if source.blank_rows is None and "No Finding" in labels:
        return labels
    if source.blank_rows is None:
        raise DataError(
            f"{source.table}: {blank.size} row(s), such as row {row_number(labels, blank[0])}, have no value in any "
            "column of a label, and there is no column for No Finding: set data.csv.blank_rows to 'not labelled', "
            "or to 'absent' if an empty cell says that the finding is not there"
        )
    labels.iloc[blank] = 0.0
    return labels


def _columns_of_labels(table: pd.DataFrame, source: CsvSource) -> dict[str, str]:
    """Column -> label: those named like one of the 14, and those of `source.label_map`, in whatever case."""
    named = {plain_name(name): name for name in table.columns}
    declared = _declared(source)
    if absent := [name for name in source.label_map if plain_name(name) not in named]:
        raise DataError(
            f"{source.table} lacks the column(s) {', '.join(absent)} of data.csv.label_map; columns there: "
            f"{listed([*table.columns])}"
        )
    own: dict[str, str] = {}
    for name in table.columns:
        if name in source.ignore or plain_name(name) in declared or (label := label_of_name(name)) is None:
            continue
        if label in own.values():
            other = next(first for first in own if own[first] == label)
            raise DataError(
                f"{source.table}: columns {other!r} and {name!r} both stand for {label!r}; list one in "
                "data.csv.ignore, or map both in data.csv.label_map to have one value of them"
            )
        own[name] = label
    return own | {named[name]: label for name, label in declared.items()}


def _unused_columns(table: pd.DataFrame, source: CsvSource, used: set[str]) -> dict[str, int]:
    """A note with the columns that nothing is read from, and a warning of those that sound like a finding's.

    Raises:
        DataError: one of these has a finding's values, for a label that no other column is read for.
    """
    known = {*table.columns} if source.findings is None else {*table.columns, *_items(table, source).explode()}
    if absent := [name for name in source.ignore if name not in known]:
        raise DataError(f"{source.table} lacks the column(s) {', '.join(absent)} of data.csv.ignore")
    labels = {} if source.findings else _columns_of_labels(table, source)
    spare = [name for name in table.columns if name not in {*used, *labels, *source.ignore, source.findings}]
    for name in spare:
        like = resembled(name)
        if like is None or like not in (source.labels_covered or LABELS):
            continue
        kinds = {str(kind).casefold() for kind in table[name].dropna().unique()} - NOTHING_WRITTEN - {""}
        values = ", ".join(sorted(kinds)[:5])
        way_out = "say which it is in data.csv.label_map, or list it in data.csv.ignore"
        if kinds and kinds <= LABEL_VALUES.keys() | _CALLS and source.findings is None:
            raise DataError(
                f"{source.table}: column {name!r} holds {values} like a finding's and is none of the 14 labels; it "
                f"looks like {like!r}: {way_out}"
            )
        if kinds:
            log.warning("%s: column %r sounds like %r and is not read; %s", source.table, name, like, way_out)
    if not spare:
        return {}
    log.info("%s: columns that nothing is read from: %s", source.table, listed(spare))
    return {f"columns not used: {listed(spare)}": len(spare)}


def _relative(paths: pd.Series, root: Path, source: CsvSource) -> pd.Series:
    """Paths relative to `data.root`, so that a manifest can be moved with its images; none leads out of it."""
    start = str(root.resolve()).rstrip("/") + "/"
    absolute = paths.str.startswith("/")
    inside = paths.where(~absolute, paths.str.removeprefix(start))
    for place in np.flatnonzero(paths.str.contains("..", regex=False).to_numpy()):
        normal = posixpath.normpath(inside.iloc[place])
        inside.iloc[place] = inside.iloc[place] if normal != ".." and not normal.startswith(("../", "/")) else "/"
    if (outside := np.flatnonzero(inside.str.startswith("/").to_numpy())).size:
        row = row_number(paths, outside[0])
        raise DataError(
            f"{source.table}, row {row}, column {source.image!r}: {paths.iloc[outside[0]]!r} does not lie under "
            f"data.root {root}; set data.root to a folder above the films"
        )
    if (odd := np.flatnonzero(paths.str.contains(r"[\x00-\x1f\x7f]", regex=True).to_numpy())).size:
        row = row_number(paths, odd[0])
        raise DataError(
            f"{source.table}, row {row}, column {source.image!r}: {paths.iloc[odd[0]]!r} has a control character in "
            "its name; rename the file"
        )
    _refuse_same_files(inside, root, source)
    return inside


def _refuse_same_files(paths: pd.Series, root: Path, source: CsvSource) -> None:
    """Raise DataError when two paths lead to one file: `./a.jpg`, or on disks that know no case, `A.jpg`."""
    normal = paths.map(lambda path: posixpath.normpath(unicodedata.normalize("NFC", path)))
    folded = normal.str.casefold()
    alike = np.flatnonzero(folded.duplicated(keep=False).to_numpy())
    first: dict[str, int] = {}
    for place in alike:
        other = first.setdefault(folded.iloc[place], int(place))
        same = normal.iloc[other] == normal.iloc[place]
        files = root / paths.iloc[other], root / paths.iloc[place]
        if other != place and (same or (all(file.exists() for file in files) and os.path.samefile(*files))):  # noqa: PTH121
            raise DataError(
                f"{source.table}: image {paths.iloc[other]!r} in row {row_number(paths, other)} and "
                f"{paths.iloc[place]!r} in row {row_number(paths, int(place))} are one file; remove the wrong row"
            )
