"""Reading tables of text and labels, with errors that name the file, the row and the value found there.

Everything is read as text, so that ids keep their leading zeros. Rows are named as a spreadsheet numbers them: the
header is row 1.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import logging
import re
import unicodedata
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import atomic_path
from mlx_cxr.core.labels import LABELS

log = logging.getLogger("mlx_cxr")

LABEL_ALIASES: Mapping[str, str] = {"Airspace Opacity": "Lung Opacity"}
"""Other names of the 14 in published tables (`mimic-cxr-2.1.0-test-set-labeled.csv`)."""
LABEL_VALUES: Mapping[str, float] = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": np.nan}
NOTHING = frozenset(("nan", "<na>", "nat", "null", "n/a", "#n/a"))
"""Cells, whatever their case, that programs write for an empty one; they are read as "" everywhere."""
NOTHING_WRITTEN = NOTHING | {"none", "na", "-"}
"""The same for ids, reports and labels, where these words mean nothing else."""
MOST_BYTES = 8 << 30
"""Largest table that is read, unpacked: what is larger is no table of images or reports."""
_OTHER_SEPARATORS = (",", ";", "\t", "|")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_FLOAT_ID = re.compile(r"([0-9]+)\.0+")
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""Beginnings that make a spreadsheet compute a cell (OWASP, "CSV Injection"), after any `'` of `guarded`."""


class DataError(UserError, ValueError):
    """Raw data, a manifest or a pixel store that cannot be used; the message names file, row or key and the way out."""


def read_table(
    path: str | Path,
    columns: Sequence[str] | None,
    *,
    optional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    separator: str = ",",
    separator_key: str | None = None,
) -> pd.DataFrame:
    """Read a CSV file, packed by gzip or not, as text, surrounding blanks removed, empty cells as "".

    UTF-8 with or without a byte-order mark and UTF-16 are recognized; anything else is read as Windows-1252, with a
    warning. Cells of `NOTHING` are empty.

    Args:
        columns: columns that must be there; None takes all that there are.
        optional: columns that are read where they are there.
        renamed: name in the file -> name to know the column by, where the latter is not there as well.
        separator: between cells.
        separator_key: configuration key that sets the separator, for the error message.

    Returns:
        str columns, in the order asked for; one row per row of the table, numbered from 0.

    Raises:
        DataError: the file is missing, empty, cut short, not a table, has a quote that is not closed or a column twice,
            or lacks a column (the message lists those there).
    """
    path = Path(path)
    # Not `usecols`: with it pandas no longer notices rows with too many cells.
    table = _read_csv(path, separator, *_look_through(path))
    table = table.rename(columns={old: new for old, new in (renamed or {}).items() if new not in table.columns})
    header = [str(name) for name in table.columns]
    _refuse_missing(path, columns or (), header, _separator_hint(header, separator, separator_key))
    wanted = header if columns is None else [*columns, *(name for name in optional if name in header)]
    table = table[list(dict.fromkeys(wanted))].copy()
    if table.empty:
        raise DataError(f"{path} has a header but no rows; download or export it again")
    for name in table.columns:
        cells = table[name].str.strip()
        table[name] = cells.mask(cells.str.casefold().isin(NOTHING), "")
    return table


def read_json_lines(path: str | Path, columns: Sequence[str], *, separator: str) -> pd.DataFrame:
    """Read a `.jsonl`, UTF-8 with an object per line, as a table of text; blank lines are skipped.

    Texts lose surrounding blanks, numbers stay as written, a list of these is joined by `separator`. Keys that hold an
    object somewhere, or a list with one in it, are left out.

    Args:
        columns: keys that must be there, in some line at least.
        separator: put between the items of a list.

    Returns:
        A str column per key of any line. A cell is missing (NaN) where the line lacks the key, or has null, NaN or ""
        for it, and "" where it has an empty list. `row_number` gives the line of the file.

    Raises:
        DataError: the file is missing or empty, a line is not a JSON object, a key of `columns` is in no line or holds
            an object; names file, line and key.
    """
    path = Path(path)
    _refuse_other_than_a_file(path)
    records: dict[int, dict[str, Any]] = {}
    try:
        with path.open("rb") as data:
            for number, line in enumerate(data, 1):
                if line.strip():
                    record = _json_object(line, f"{path}, line {number}")
                    records[number] = {name: _json_cell(value, separator) for name, value in record.items()}
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: no such table; {_neighbours(path)}") from None
    if not records:
        raise DataError(f"{path} has no rows; download or export it again")
    names = dict.fromkeys(name for cells in records.values() for name in cells)
    values = {name: [cells.get(name) for cells in records.values()] for name in names}
    _refuse_missing(path, columns, list(values))
    for name in columns:
        if _NESTED in values[name]:
            line = list(records)[values[name].index(_NESTED)]
            raise DataError(
                f"{path}, line {line}: {name!r} holds an object; text, numbers and lists of them can be read"
            )
    rows = [line - 2 for line in records]  # as `row_number` counts, with a header
    plain = {name: cells for name, cells in values.items() if _NESTED not in cells}
    return pd.DataFrame(plain, rows, dtype="str")


def label_values(table: pd.DataFrame, columns: Mapping[str, str], path: str | Path) -> pd.DataFrame:
    """The label columns of a text table as numbers.

    Args:
        table: text columns, one row per row of the file at `path`.
        columns: label (one of the 14) -> its column in `table`.

    Returns:
        float32 columns, one per label asked for, index as in `table`: 1, 0, -1 or NaN for an empty cell.

    Raises:
        DataError: a value outside {1, 0, -1, empty}; names file, row, column and value.
    """
    values = {}
    for label, column in columns.items():
        codes, kinds = pd.factorize(table[column])
        known = np.array([LABEL_VALUES.get(str(kind), np.inf) for kind in kinds], dtype=np.float32)
        known[[str(kind).casefold() in NOTHING_WRITTEN for kind in kinds]] = np.nan
        values[label] = known[codes]
        if (wrong := np.flatnonzero(np.isinf(values[label]))).size:
            raise DataError(
                f"{path}, row {row_number(table, wrong[0])}, column {column!r}: "
                f"label {table[column].iloc[wrong[0]]!r} is not 1, 0, -1 or empty"
            )
    return pd.DataFrame(values, index=table.index)


def ids_of(table: pd.DataFrame, column: str, path: str | Path, what: str) -> pd.Series:
    """A column of ids in the one form that they are compared in: text, leading zeros and case as the table has them.

    Blanks and characters that nobody sees are removed, full-width digits become plain, and "10000.0", which pandas
    makes of a column of whole numbers with a gap, becomes "10000".

    Args:
        what: such as `patient`, for the message.

    Raises:
        DataError: an id is empty or has a control character, or the same id is spelled in two ways; names the rows.
    """
    written = table[column]
    kinds = pd.Series(written.unique(), dtype="str")
    plain = kinds.map(_plain_id)
    ids = written.map(dict(zip(kinds, plain, strict=True)))
    if (blank := np.flatnonzero((ids == "").to_numpy())).size:
        row = row_number(table, blank[0])
        raise DataError(f"{path}, row {row}: column {column!r} is empty ({len(blank)} such row(s) in all)")
    if (odd := np.flatnonzero(ids.str.contains(r"[\x00-\x1f\x7f]", regex=True).to_numpy())).size:
        row = row_number(table, odd[0])
        raise DataError(f"{path}, row {row}: {what} {written.iloc[odd[0]]!r} has a control character in it")
    compared = plain.str.casefold().str.replace(r"^0+(?=[0-9]+$)", "", regex=True)
    same = kinds.groupby(compared).agg(list)
    for spellings in same[same.str.len() > 1]:
        first, second = (int(np.flatnonzero((written == spelling).to_numpy())[0]) for spelling in spellings[:2])
        raise DataError(
            f"{path}: {what} {spellings[0]!r} in row {row_number(table, first)} and {spellings[1]!r} in row "
            f"{row_number(table, second)} look like one, spelled in two ways ({(same.str.len() > 1).sum()} such in "
            f"all); write each {what} in one way"
        )
    return ids


def _plain_id(written: str) -> str:
    text = unicodedata.normalize("NFKC", written).translate(_INVISIBLE).strip().removeprefix("'").strip()
    text = match[1] if (match := _FLOAT_ID.fullmatch(text)) else text
    return "" if text.casefold() in NOTHING_WRITTEN else text


def refuse_duplicates(table: pd.DataFrame, column: str, path: str | Path, what: str) -> None:
    """Raise DataError, naming the id and two of its rows, when a value of `column` appears twice."""
    if (again := np.flatnonzero(table[column].duplicated().to_numpy())).size:
        value = table[column].iloc[again[0]]
        rows = " and ".join(str(row_number(table, i)) for i in np.flatnonzero((table[column] == value).to_numpy())[:2])
        raise DataError(
            f"{path}: {what} {value!r} appears twice, in rows {rows} "
            f"({len(again)} such row(s) in all); remove the wrong one"
        )


def refuse_blank(table: pd.DataFrame, column: str, path: str | Path) -> None:
    """Raise DataError, naming the first row, when a cell of `column` is empty."""
    if (blank := np.flatnonzero((table[column] == "").to_numpy())).size:
        row = row_number(table, blank[0])
        raise DataError(f"{path}, row {row}: column {column!r} is empty ({len(blank)} such row(s) in all)")


def row_number(table: pd.DataFrame | pd.Series, position: int) -> int:
    """Row of the file that a table's row came from, whatever was filtered out before; the header is row 1."""
    return int(table.index[position]) + 2


def label_of_name(name: str) -> str | None:
    """The one of the 14 that a column or finding name stands for, whatever its case and underscores; None if none."""
    return _LABEL_OF_PLAIN.get(plain_name(name))


def guarded(text: str) -> str:
    """Text as a cell that no spreadsheet takes for a formula: `'` stands before what begins like one.

    `unguarded` gives the text back exactly.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(cell: str) -> str:
    """The text that `guarded` made a cell of."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


def write_table(path: str | Path, table: pd.DataFrame, float_format: str | None = None) -> Path:
    """Write a table for people atomically, as CSV in UTF-8 with a header, and return its path.

    Texts are `guarded`, and a carriage return in one, which readers would take for the end of the row, is written as
    `\\r`. Numbers stay as they are.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    texts = {
        name: [guarded(cell).replace("\r", "\\r") if isinstance(cell, str) else cell for cell in table[name]]
        for name in table.columns
        if not pd.api.types.is_numeric_dtype(table[name])
    }
    with atomic_path(path) as temporary:
        table.assign(**texts).to_csv(
            temporary, index=False, float_format=float_format, lineterminator="\n", encoding="utf-8"
        )
    return Path(path)


def plain_name(name: str) -> str:
    """A name of a column or finding as it is compared: without regard to case, underscores and runs of blanks."""
    return " ".join(name.replace("_", " ").casefold().split())


_LABEL_OF_PLAIN = {plain_name(name): label for name, label in (*((x, x) for x in LABELS), *LABEL_ALIASES.items())}


def _refuse_other_than_a_file(path: Path) -> None:
    """A pipe or device would be read for ever."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is no regular file; save the table as one")


def _opened(path: Path) -> BinaryIO:
    """The table's bytes, unpacked where they are gzip's, whatever the file is called."""
    with path.open("rb") as data:
        start = data.read(4)
    if start == b"PK\x03\x04" or start[:2] == b"BZ" or start == b"\xfd7zX":
        raise DataError(f"{path} is a workbook or an archive, not a CSV table; save it as CSV, or unpack it")
    return gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else path.open("rb")  # type: ignore[return-value]


def _look_through(path: Path) -> tuple[str, bool]:
    """(`utf-8-sig`, `utf-16` or `cp1252`; True if a quote is in it), found by decoding the whole file in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    encoding, quotes, size = "utf-8-sig", False, 0
    _refuse_other_than_a_file(path)
    try:
        with _opened(path) as data:
            chunk = data.read(1 << 20)
            if not chunk.strip():
                raise DataError(f"{path} is empty (0 bytes of text); download or export it again")
            if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "utf-16"
            while chunk:
                size += len(chunk)
                if size > MOST_BYTES:
                    raise DataError(f"{path} has more than {MOST_BYTES >> 30} GB of text: that is no such table")
                quotes = quotes or b'"' in chunk
                if encoding == "utf-8-sig":
                    try:
                        decoder.decode(chunk)
                    except UnicodeDecodeError:
                        encoding = "cp1252"
                chunk = data.read(1 << 20)
            if encoding == "utf-8-sig":
                try:
                    decoder.decode(b"", final=True)
                except UnicodeDecodeError:
                    encoding = "cp1252"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: no such table; {_neighbours(path)}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is cut short or not gzip ({error}); download it again") from None
    if encoding == "cp1252":
        log.warning("%s is not UTF-8; read as Windows-1252", path)
    return encoding, quotes


def _read_csv(path: Path, separator: str, encoding: str, quotes: bool) -> pd.DataFrame:
    errors = "replace" if encoding == "cp1252" else "strict"
    try:
        with warnings.catch_warnings(), _opened(path) as data:
            # Rows longer than the header would otherwise be cut, or shift every column.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                data,
                sep=separator,
                dtype=str,
                keep_default_na=False,
                encoding=encoding,
                encoding_errors=errors,
                engine="c" if len(separator) == 1 else "python",
                index_col=False,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable table separated by {separator!r}: {error}") from None
    if len(separator) == 1:
        with _opened(path) as data, io.TextIOWrapper(data, encoding, errors, newline="") as text:
            _refuse_swallowed_rows(path, text, separator, whole=quotes)
    # Rows that end early give missing cells even so.
    return table.fillna("")


def _refuse_swallowed_rows(path: Path, text: io.TextIOWrapper, separator: str, whole: bool) -> None:
    """Refuse a column that is there twice and, if `whole`, a quote that is not closed where its cell ends.

    pandas renames the one, and reads on to the next quote, over the ends of rows, in the other.
    """
    limit = csv.field_size_limit(_LONGEST_CELL)
    rows = csv.reader(text, delimiter=separator, strict=True)
    begun = number = 0
    try:
        header = [name.strip() for name in next(rows, [])]
        if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
            places = ", ".join(str(place + 1) for place, name in enumerate(header) if name == twice[0])
            raise DataError(
                f"{path}: column {twice[0]!r} is there {header.count(twice[0])} times (columns {places}); rename or "
                "remove one"
            )
        while whole:
            number, begun = number + 1, rows.line_num + 1
            if next(rows, None) is None:
                return
    except csv.Error as error:
        raise DataError(
            f"{path}, row {number + 1} (line {begun} of the file): a quote is opened and not closed where its cell "
            f"ends, so rows after it would be taken for a part of it ({error}); close it, or double it inside a cell"
        ) from None
    finally:
        csv.field_size_limit(limit)


_LONGEST_CELL = 1 << 20

_NESTED: Any = object()
"""Stands for a value that is, or has in it, an object."""


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object in braces; mend or remove the line")
    return record


def _json_cell(value: Any, separator: str) -> str | None:
    if isinstance(value, dict):
        return _NESTED
    if isinstance(value, list):
        cells = [_json_cell(item, separator) for item in value]
        return _NESTED if _NESTED in cells else separator.join(cell for cell in cells if cell)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return None
    # Half a character, as where another program cut a text, cannot be written as UTF-8.
    return value.encode("utf-8", "replace").decode().strip() or None


def _refuse_missing(path: Path, wanted: Sequence[str], header: Sequence[str], hint: str = "") -> None:
    if missing := [name for name in wanted if name not in header]:
        near = {name: close for name in missing for close in difflib.get_close_matches(name, header, n=1, cutoff=0.75)}
        if near and not hint:
            name, close = next(iter(near.items()))
            hint = f"did you mean {close!r} by {name!r}? "
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; {hint}columns there: {_listed(header)}")


def _separator_hint(header: Sequence[str], separator: str, key: str | None) -> str:
    if len(header) != 1:
        return ""
    for other in _OTHER_SEPARATORS:
        if other != separator and other in header[0]:
            way_out = f"set {key}: {other!r}" if key else f"save it separated by {separator!r}"
            return f"its cells look separated by {other!r}, not by {separator!r}: {way_out}; "
    return ""


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    tables = sorted(item.name for item in path.parent.iterdir() if ".csv" in item.name or item.suffix == ".jsonl")
    return f"tables in {path.parent}: {_listed(tables)}"


def _listed(names: Sequence[str], most: int = 30) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
