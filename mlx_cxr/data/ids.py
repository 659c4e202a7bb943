"""Ids of patients, studies and images, as they are kept and as they are compared."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from mlx_cxr.data.tables import NOTHING_WRITTEN, DataError, refuse_blank, row_number

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_QUOTED_ID = re.compile(r"""=?(["'])(.*)\1|'(.*)""", re.DOTALL)
"""An id as Excel is made to keep it (`="0012"`, `'0012`), or quoted twice."""
_FLOAT_ID = re.compile(r"([0-9]+)\.0+")
_ROUNDED_ID = r"^[0-9][.,]?[0-9]*[eE]\+[0-9]+$"
_LAST_NUMBER = re.compile(r"(?<![0-9])0+(?=[0-9]+$)")


def ids_of(table: pd.DataFrame, column: str, path: str | Path, what: str) -> pd.Series:
    """A column of ids as text, with the leading zeros and the case that the table has.

    Blanks, characters that nobody sees and the quotes that make Excel keep zeros are removed, full-width digits become
    plain, and "10000.0", which pandas makes of a column of whole numbers with a gap, becomes "10000".

    Args:
        what: such as `patient`, for the message.

    Raises:
        DataError: an id is empty, has a control character, was rounded by a spreadsheet, or the same id (`id_key`) is
            spelled in two ways; names the rows.
    """
    written = table[column]
    kinds = pd.Series(written.unique(), dtype="str")
    plain = kinds.map(_plain_id)
    ids = plain.iloc[pd.Index(kinds).get_indexer(pd.Index(written))].set_axis(written.index)
    refuse_blank(ids.to_frame(column), column, path)
    for pattern, wrong in (
        (r"[\x00-\x1f\x7f]", "has a control character in it; mend it"),
        (_ROUNDED_ID, "was rounded by a spreadsheet, and others with it; export the table with ids as text"),
    ):
        if (odd := np.flatnonzero(ids.str.contains(pattern, regex=True).to_numpy())).size:
            row = row_number(table, odd[0])
            raise DataError(f"{path}, row {row}: {what} {written.iloc[odd[0]]!r} {wrong}")
    key = id_key(plain)
    if (again := np.flatnonzero(key.duplicated().to_numpy())).size:
        spellings = kinds[key == key.iloc[again[0]]].tolist()[:2]
        first, second = (int(np.flatnonzero((written == spelling).to_numpy())[0]) for spelling in spellings)
        raise DataError(
            f"{path}: {what} {spellings[0]!r} in row {row_number(table, first)} and {spellings[1]!r} in row "
            f"{row_number(table, second)} look like one, spelled in two ways ({key.iloc[again].nunique()} such in "
            f"all); write each {what} in one way"
        )
    return ids


def id_key(ids: pd.Series) -> pd.Series:
    """Ids in the one form in which they are compared: without regard to case and to zeros that lead the last number."""
    return ids.map(lambda text: _LAST_NUMBER.sub("", _plain_id(text).casefold(), count=1))


def _plain_id(written: str) -> str:
    text = written if written.isascii() else unicodedata.normalize("NFKC", written).translate(_INVISIBLE)
    text = text.strip()
    if match := _QUOTED_ID.fullmatch(text):
        text = (match[2] or match[3] or "").strip()
    text = match[1] if (match := _FLOAT_ID.fullmatch(text)) else text
    return "" if text.lower() in NOTHING_WRITTEN else text
