"""Reading tables of text and labels, with errors that name the file, the row and the value found there.

Everything is read as text, so that ids keep their leading zeros. Rows are named as a spreadsheet numbers them: the
header is row 1.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import atomic_path

log = logging.getLogger("mlx_cxr")

LABEL_VALUES: Mapping[str, float] = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": np.nan}
NOTHING = frozenset(("nan", "<na>", "nat", "null", "n/a", "#n/a"))
"""Cells, whatever their case, that programs write for an empty one; they are read as "" everywhere."""
NOTHING_WRITTEN = NOTHING | {"none", "na", "-"}
"""The same for ids, reports and labels, where these words mean nothing else."""
MOST_BYTES = 2 << 30
"""Largest table that is read, unpacked: 377,110 reports take 0.4 GB, MIMIC-CXR's largest table 0.1 GB."""
LONGEST_LINE = 16 << 20
LONGEST_CELL = 1 << 20
"""Characters; the longest report of MIMIC-CXR has some ten thousand."""
_ROWS_AT_ONCE = 20_000
"""Turned into columns at a time, so that no second copy of the table is held as Python's lists."""
_OTHER_SEPARATORS = (",", ";", "\t", "|")
_UNPACKERS: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_NO_TABLES: Mapping[bytes, str] = {
    b"PK\x03\x04": "a workbook or an archive; save its sheet as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel 97; save its sheet as CSV",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"PAR1": "a Parquet file; save it as CSV",
    b"SQLite format 3": "a database; export its table as CSV",
    b"%PDF-": "a PDF",
}
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
    exact: bool = False,
) -> pd.DataFrame:
    """Read a CSV file (RFC 4180), packed by gzip, bzip2, xz or not, as text.

    UTF-8 with or without a byte-order mark and UTF-16 are recognized; anything else is read as Windows-1252, with a
    warning. Surrounding blanks are removed, cells of `NOTHING` are empty, empty lines are skipped.

    Args:
        columns: columns that must be there; None takes all that there are.
        optional: columns that are read where they are there.
        renamed: name in the file -> name to know the column by, where the latter is not there as well.
        separator: between cells.
        separator_key: configuration key that sets the separator, for the error message.
        exact: give the texts back that were `guarded` when this package wrote the table, with nothing removed.

    Returns:
        str columns, in the order asked for; one row per row of the table; `row_number` gives the row of the file.

    Raises:
        DataError: the file is missing, no regular file, too large, empty, cut short, not a table, has a row of more or
            fewer cells than the header, a quote that is not closed or a column twice, or lacks a column (the message
            lists those there).
    """
    path = Path(path)
    if (encoding := _look_through(path)) == "cp1252":
        log.warning("%s is not UTF-8; read as Windows-1252", path)
    table = _read_csv(path, separator, encoding)
    table = table.rename(columns={old: new for old, new in (renamed or {}).items() if new not in table.columns})
    header = [str(name) for name in table.columns]
    _refuse_missing(path, columns or (), header, _separator_hint(header, separator, separator_key))
    wanted = header if columns is None else [*columns, *(name for name in optional if name in header)]
    table = table[list(dict.fromkeys(wanted))].copy()
    if table.empty:
        raise DataError(f"{path} has a header but no rows; download or export it again")
    for name in table.columns:
        table[name] = unguarded_cells(table[name]) if exact else without(NOTHING, table[name].str.strip())
    return table


def without(words: frozenset[str], cells: pd.Series) -> pd.Series:
    """Text cells, those that are one of the words in whatever case made empty."""
    return cells.mask(cells.str.lower().isin(words), "")


def read_json_lines(path: str | Path, columns: Sequence[str], *, separator: str) -> pd.DataFrame:
    """Read a `.jsonl`, UTF-8 with an object per line, packed or not, as a table of text; blank lines are skipped.

    Texts lose surrounding blanks, numbers stay as written, a list of these is joined by `separator`. Keys that hold an
    object somewhere, or a list with one in it, are left out.

    Args:
        columns: keys that must be there, in some line at least.
        separator: put between the items of a list.

    Returns:
        A str column per key of any line. A cell is missing (NaN) where the line lacks the key, or has null, "" or a
        word of `NOTHING` for it, and "" where it has an empty list. `row_number` gives the line of the file.

    Raises:
        DataError: the file is missing, no regular file, too large or empty, a line is not a JSON object or has a key
            twice, a key of `columns` is in no line or holds an object; names file, line and key.
    """
    path = Path(path)
    _look_through(path)
    records: dict[int, dict[str, Any]] = {}
    with _opened(path) as data:
        for number, line in enumerate(data, 1):
            if line.strip():
                record = _json_object(line, f"{path}, line {number}")
                records[number] = {name: _json_cell(value, separator) for name, value in record.items()}
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


def guarded(text: str) -> str:
    """Text as a cell that no spreadsheet takes for a formula: `'` stands before what begins like one.

    `unguarded` gives the text back exactly.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(cell: str) -> str:
    """The text that `guarded` made a cell of."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


def guarded_cells(texts: pd.Series) -> pd.Series:
    """A column of texts, each `guarded`."""
    marked = texts.str.match(_FORMULA.pattern)
    return texts.mask(marked, texts[marked].map(guarded)) if marked.any() else texts


def unguarded_cells(cells: pd.Series) -> pd.Series:
    """The texts that `guarded_cells` made a column of."""
    marked = cells.str.startswith("'")
    return cells.mask(marked, cells[marked].map(unguarded)) if marked.any() else cells


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


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The table's bytes, unpacked where they are packed, whatever the file is called."""
    # A pipe or device would be read for ever.
    if path.exists() and not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is no regular file; save the table as one")
    try:
        with path.open("rb") as data:
            start = data.read(16)
        for magic, what in _NO_TABLES.items():
            if start.startswith(magic):
                raise DataError(f"{path} is {what}")
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), open)
        with unpack(path, "rb") as data:
            yield data
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: no such table; {_neighbours(path)}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is cut short or not {unpack.__module__} ({error}); download it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _look_through(path: Path) -> str:
    """`utf-8-sig`, `utf-16` or `cp1252`, found by decoding the file in pieces; refuses what is no text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    encoding, size, line = "utf-8-sig", 0, 0
    with _opened(path) as data:
        while chunk := data.read(1 << 20):
            if size == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "utf-16"
            elif encoding != "utf-16" and b"\0" in chunk:
                raise DataError(f"{path} has NUL bytes: it is no table, or not in UTF-8; save it as CSV in UTF-8")
            size += len(chunk)
            ended = max(chunk.rfind(b"\n"), chunk.rfind(b"\r"))
            line = line + len(chunk) if ended < 0 else len(chunk) - ended
            if size > MOST_BYTES or line > LONGEST_LINE:
                what, most = ("text", MOST_BYTES) if size > MOST_BYTES else ("text in one line", LONGEST_LINE)
                raise DataError(
                    f"{path} has more than {most >> 20:,} MB of {what}: that is no table of images or reports"
                )
            if encoding == "utf-8-sig":
                encoding = _still_utf8(decoder, chunk)
    return _still_utf8(decoder, b"") if encoding == "utf-8-sig" else encoding


def _still_utf8(decoder: codecs.IncrementalDecoder, chunk: bytes) -> str:
    try:
        decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"


def _read_csv(path: Path, separator: str, encoding: str) -> pd.DataFrame:
    """All columns as written; the index counts the rows of the file, with those that are empty lines.

    pandas would cut, fill or join rows that are not as long as the header, rename the second of two columns, and read
    on over the ends of rows to the next quote.
    """
    errors = "replace" if encoding == "cp1252" else "strict"
    limit = csv.field_size_limit(LONGEST_CELL)
    parts: list[pd.DataFrame] = []
    chunk: list[list[str]] = []
    sample: list[list[str]] = []
    suspects: list[tuple[int, int, list[str]]] = []
    places: list[int] = []
    number = begun = 0
    try:
        with _opened(path) as data, io.TextIOWrapper(data, encoding, errors, newline="") as text:
            # The module `csv` takes one character: a rare one stands for a longer separator.
            mark = separator if len(separator) == 1 else "\x1f"
            lines = text if mark == separator else (line.replace(separator, mark) for line in text)
            header: list[str] = []
            rows = csv.reader(lines, delimiter=mark, strict=True)
            for number, row in enumerate(rows, 1):
                row = row if mark == separator else [cell.replace(mark, separator) for cell in row]
                first, begun = begun + 1, rows.line_num
                if not row or (len(row) == 1 != len(header) and not row[0].strip()):
                    continue
                if not header:
                    header = _header(path, row)
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path} is not a readable table separated by {separator!r}: row {number} (line {first} of the "
                        f"file) has {len(row)} cells and the header {len(header)}; a separator or line break inside a "
                        "cell wants quotes around it"
                    )
                if begun > first and (swallowed := _like_rows(row, separator)):
                    suspects.append((number, first, swallowed))
                places.append(number - 2)
                chunk.append(row)
                if len(sample) < _SAMPLE:
                    sample.append(row)
                if len(chunk) == _ROWS_AT_ONCE:
                    parts.append(pd.DataFrame(chunk, columns=header, dtype="str"))
                    chunk = []
    except csv.Error as error:
        raise DataError(
            f"{path}, row {number + 1} (line {begun + 1} of the file): a quote is opened and not closed where its cell "
            f"ends, so rows after it would be taken for a part of it ({error}); close it, or double it inside a cell"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a readable table: {error}; save it as CSV in UTF-8") from None
    finally:
        csv.field_size_limit(limit)
    if not header:
        raise DataError(f"{path} is empty (0 bytes of text); download or export it again")
    _refuse_swallowed_rows(path, suspects, sample, separator)
    parts.append(pd.DataFrame(chunk, columns=header, dtype="str"))
    return pd.concat(parts).set_axis(places)


def _header(path: Path, row: list[str]) -> list[str]:
    """Names of the columns, none there twice; one without a name is called by its place."""
    header = [name.strip() or f"(column {place})" for place, name in enumerate(row, 1)]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        places = listed([str(place) for place, name in enumerate(header, 1) if name == twice[0]], 5)
        raise DataError(
            f"{path}: column {twice[0]!r} is there {header.count(twice[0])} times (columns {places}); rename or remove "
            "one"
        )
    return header


_SAMPLE = 1000
"""Rows that tell what the cells of a column look like."""


def _like_rows(row: list[str], separator: str) -> list[str]:
    """The lines that a row of several lines goes on with, if each of them could be a row of its own; else none."""
    lines = separator.join(row).splitlines()[1:]
    return lines if len(row) > 1 and all(line.count(separator) >= len(row) - 1 for line in lines) else []


def _refuse_swallowed_rows(
    path: Path, suspects: list[tuple[int, int, list[str]]], sample: list[list[str]], separator: str
) -> None:
    """Refuse a cell whose further lines all look like rows: a quote is open there that one in a later row closes.

    They do where each has as many cells as the table, and cells of the same pattern in the columns that have one,
    with a number and no blank in it. As far as the syntax goes, such a table is sound.
    """
    if not suspects:
        return
    patterns = {}
    for place, column in enumerate(zip(*sample, strict=True)):
        (pattern, count), *_ = Counter(_pattern(cell) for cell in column).most_common(1)
        if "0" in pattern and not re.search(r"\s", pattern) and count >= 0.8 * len(column):
            patterns[place] = pattern
    for number, line, swallowed in suspects:
        rows = list(csv.reader(swallowed, delimiter=separator)) if len(separator) == 1 else []
        alike = all(
            len(row) > max(patterns, default=0) and all(_pattern(row[at]) == wanted for at, wanted in patterns.items())
            for row in rows
        )
        if rows and alike and patterns and len(rows) + len(patterns) > 2:
            raise DataError(
                f"{path}, row {number} (line {line}): a quote is opened and not closed where its cell ends, "
                f"so {len(rows)} rows after it would be taken for a part of it, "
                f"first {swallowed[0][:60]!r}; close it, or double it inside a cell"
            )


def _pattern(cell: str) -> str:
    """A cell with `0` for each word that has a digit in it and `a` for each that has none."""
    return re.sub(r"\w+", lambda word: "0" if re.search(r"\d", word[0]) else "a", cell.strip())


_NESTED: Any = object()
"""Stands for a value that is, or has in it, an object."""


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(
            line, parse_int=str, parse_float=str, parse_constant=lambda _: None, object_pairs_hook=_each_key_once
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object in braces; mend or remove the line")
    return record


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return values


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
    text = value.encode("utf-8", "replace").decode().strip()
    return None if text.lower() in NOTHING else text or None


def _refuse_missing(path: Path, wanted: Sequence[str], header: Sequence[str], hint: str = "") -> None:
    if missing := [name for name in wanted if name not in header]:
        near = {name: close for name in missing for close in difflib.get_close_matches(name, header, n=1, cutoff=0.75)}
        if near and not hint:
            name, close = next(iter(near.items()))
            hint = f"did you mean {close!r} by {name!r}? "
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; {hint}columns there: {listed(header)}")


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
    return f"tables in {path.parent}: {listed(tables)}"


def listed(names: Sequence[str], most: int = 30) -> str:
    """Names for a message, the first of them where there are very many."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
