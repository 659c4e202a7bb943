"""Where MIMIC-CXR's reports lie (a folder, `mimic-cxr-reports.zip`, or neither), and the text of the studies chosen."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlx_cxr.config_sections import DataConfig
from mlx_cxr.data.reports import decode, has_headings, report_text
from mlx_cxr.data.tables import DataError

ZIP_NAME = "mimic-cxr-reports.zip"
_THREADS = 8


@dataclass(frozen=True)
class ReportTexts:
    """The text that goes with each study.

    Attributes:
        texts: study id -> cleaned text, "" where there is none.
        counts: `found`, `missing`, `not UTF-8` (decoded even so).
        served: what the texts came from, such as `impression` -> studies; `none` for reports without any of the
            sections wanted.
        where: the folder or zip, for the summary; None when there are no reports.
    """

    texts: dict[str, str]
    counts: dict[str, int]
    served: dict[str, int]
    where: str | None


class _Store(Protocol):
    def read(self, patient: str, study: str) -> bytes | None: ...


def read_reports(data: DataConfig, patients: Sequence[str], studies: Sequence[str]) -> ReportTexts:
    """Read and cut the reports of the given studies, in threads.

    Args:
        data: `reports` (None looks under `root`), `root`, `report_sections` and `report_mode` are used.
        patients: patient id of each study.
        studies: study ids, each once.

    Raises:
        DataError: `data.reports` is set but is not there, is not a zip, or holds none of these studies' reports.
    """
    with _stores(data) as (stores, where):

        def one(patient: str, study: str) -> tuple[str, str, bool] | None:
            for store in stores:
                if (raw := store.read(patient, study)) is not None:
                    report, utf8 = decode(raw)
                    text, served = report_text(report, data.report_sections, data.report_mode)
                    return text, " + ".join(served) or "none", utf8
            return None

        with ThreadPoolExecutor(_THREADS) as pool:
            answers = list(pool.map(one, patients, studies, chunksize=256)) if stores else [None] * len(studies)
    found = [answer for answer in answers if answer is not None]
    if data.reports is not None and len(studies) and not found:
        raise DataError(
            f"data.reports {data.reports} holds none of {len(studies)} reports; the first one looked for is "
            f"{_member(patients[0], studies[0])}. Set it to the folder or zip that this path starts from"
        )
    counts = {
        "found": len(found),
        "missing": len(studies) - len(found),
        "not UTF-8": sum(not utf8 for _, _, utf8 in found),
    }
    texts = {study: answer[0] if answer else "" for study, answer in zip(studies, answers, strict=True)}
    return ReportTexts(texts, counts, _counted(served for _, served, _ in found), where if found else None)


def texts_of_column(data: DataConfig, studies: Sequence[str], column: Sequence[str]) -> ReportTexts:
    """What `read_reports` gives, for a table that brings the reports in a column of its own.

    A text with a findings or impression heading is cut like a report; any other is taken whole. Either is cleaned.

    Args:
        data: `report_sections` and `report_mode` are used.
        studies: id of each text.
        column: the texts, "" where there is none.
    """
    texts, served_by = {}, []
    for study, report in zip(studies, column, strict=True):
        wanted = data.report_sections if has_headings(report) else ("whole",)
        texts[study], served = report_text(report, wanted, data.report_mode)
        if report:
            served_by.append(" + ".join(served) or "none")
    counts = {"found": len(served_by), "missing": len(texts) - len(served_by), "not UTF-8": 0}
    return ReportTexts(texts, counts, _counted(served_by), "the table's text column" if served_by else None)


@contextmanager
def _stores(data: DataConfig) -> Iterator[tuple[list[_Store], str]]:
    """The places to look in, in order; a study's report is taken from the first that has it."""
    named = data.reports
    if named is not None and not named.exists():
        raise DataError(f"data.reports {named}: no such folder or zip; leave it out to do without reports")
    with ExitStack() as open_files:
        places = [named] if named is not None else [data.root, data.root / "reports"]
        stores: list[_Store] = []
        wheres: list[Path] = []
        for place in places:
            if place.is_dir():
                tops = [top for top in (place / "files", place) if _has_patient_groups(top)]
                stores += [_Folder(top) for top in tops]
                wheres += tops
            archive = place / ZIP_NAME if place.is_dir() else place
            if archive.is_file():
                stores.append(_Zip(archive, open_files))
                wheres.append(archive)
        yield stores, ", ".join(map(str, wheres))


class _Folder:
    def __init__(self, top: Path) -> None:
        self._top = top

    def read(self, patient: str, study: str) -> bytes | None:
        try:
            return (self._top / f"p{patient[:2]}" / f"p{patient}" / f"s{study}.txt").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


class _Zip:
    def __init__(self, path: Path, open_files: ExitStack) -> None:
        self._path = path
        try:
            self._archive = open_files.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is not a zip or is cut short ({error}); download it again") from None
        names = (name for name in self._archive.namelist() if name.endswith(".txt"))
        # By the last three parts, whatever folder the archive starts with.
        self._members = {"/".join(name.split("/")[-3:]): name for name in names}

    def read(self, patient: str, study: str) -> bytes | None:
        member = self._members.get(_member(patient, study).removeprefix("files/"))
        try:
            return None if member is None else self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self._path}: {member} cannot be read ({error}); download the zip again") from None


def _member(patient: str, study: str) -> str:
    return f"files/p{patient[:2]}/p{patient}/s{study}.txt"


def _has_patient_groups(folder: Path) -> bool:
    """Whether a folder has MIMIC's `p10` … `p19` in it."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(len(entry.name) == 3 and entry.name[0] == "p" and entry.name[1:].isdigit() for entry in entries)


def _counted(names: Iterator[str] | Sequence[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
