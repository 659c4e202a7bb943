"""The reports of a manifest's studies, cut into sections.

They are read from MIMIC-CXR's folder or `mimic-cxr-reports.zip` in threads and cut in processes, or taken from columns
of a table.
"""

from __future__ import annotations

import logging
import lzma
import os
import stat
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pandas as pd

from mlx_cxr.core.config_schema import DataConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.workers import available_cores, lean_start, worker_pool
from mlx_cxr.data.reports import decode, has_headings, is_no_report, joined_text, section_texts, texts_of_sections
from mlx_cxr.data.tables import DataError

log = logging.getLogger("mlx_cxr")

ZIP_NAME = "mimic-cxr-reports.zip"
LONGEST = 1_000_000
"""Bytes of a report; the longest of MIMIC-CXR has about 11,000."""
_THREADS = 8
_PER_THREAD = 64
_WORTH_A_WORKER = 4_000
"""Reports that take about two seconds, longer than a worker takes to start."""
_BATCHES_PER_WORKER = 2
"""Submitted at a time: none waits, and reports do not pile up."""

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError)
"""Of a zip that is damaged, encrypted, or packed in a way that Python does not know (NotImplementedError)."""

Cut = tuple[dict[str, str], bool]
"""A report's text for each of `reports.SECTIONS`, and whether it was UTF-8."""


class UnreadableReportError(UserError):
    """A report that is there and cannot be read; names it and says why."""


class ReportWorkerDiedError(UserError, RuntimeError):
    """The operating system ended a process that cut reports."""


@dataclass(frozen=True)
class ReportTexts:
    """The reports of some studies.

    Attributes:
        texts: study id (of a table: image id) -> cleaned text by `data.report_sections`, "" where there is none.
        sections: study id -> each of `reports.SECTIONS`, cleaned, of the studies that have a report.
        counts: of texts `found`, `missing`, `unreadable`, `not UTF-8` (decoded even so). A file without a word in it,
            or with one for nothing ("nan"), is missing.
        served: section that the texts came from, such as `impression` -> studies; `none` for reports without any of
            the sections wanted.
        where: the folder or zip, for the summary; None when there are no reports.
        unreadable: study id -> the report that could not be read, and why; such a study has no report.
    """

    texts: dict[str, str]
    sections: dict[str, dict[str, str]]
    counts: dict[str, int]
    served: dict[str, int]
    where: str | None
    unreadable: dict[str, str] = field(default_factory=dict)


def read_reports(data: DataConfig, patients: Sequence[str], studies: Sequence[str], workers: int = 0) -> ReportTexts:
    """Read the reports of the given studies, in threads, and cut them, in processes where there are very many.

    Args:
        data: `reports` (None looks under `root`), `root`, `report_sections` and `report_mode` are used.
        patients, studies: ids of each study and its patient; each study once.
        workers: processes; 0 takes one per core. The result does not depend on it.

    Raises:
        DataError: `data.reports` is set but is not there, is not a zip, or holds none of these studies' reports, or
            none of those that it holds can be read.
        ReportWorkerDiedError: a process was killed.
    """
    with _stores(data) as (stores, where), ThreadPoolExecutor(_THREADS) as threads:
        workers = min(workers or available_cores(), len(studies) // _WORTH_A_WORKER) if stores else 1

        unreadable: dict[str, str] = {}

        def read(pairs: Sequence[tuple[str, str]]) -> list[bytes | None]:
            return [_read(stores, patient, study, unreadable) for patient, study in pairs]

        def batches() -> Iterator[list[bytes | None]]:
            pairs = list(zip(patients, studies, strict=True))
            for start in range(0, len(pairs), _THREADS * _PER_THREAD):
                parts = [pairs[start + t * _PER_THREAD : start + (t + 1) * _PER_THREAD] for t in range(_THREADS)]
                yield [raw for part in threads.map(read, parts) for raw in part]

        reports = [report for batch in cut_all(batches(), workers) for report in batch]
    found = {study: report for study, report in zip(studies, reports, strict=True) if report is not None}
    unreadable = {study: unreadable[study] for study in studies if study in unreadable and study not in found}
    if unreadable:
        first = next(iter(unreadable.values()))
        log.warning("%d reports cannot be read; these studies have none: %s", len(unreadable), first)
        if not found:
            raise DataError(f"none of the {len(unreadable)} reports found can be read: {first}")
    if data.reports is not None and len(studies) and not found:
        raise DataError(
            f"data.reports {data.reports} holds none of {len(studies)} reports; the first one looked for is "
            f"files/{_member(patients[0], studies[0])}. Set it to the folder or zip that this path starts from"
        )
    counts = {
        "found": len(found),
        "missing": len(studies) - len(found) - len(unreadable),
        "unreadable": len(unreadable),
        "not UTF-8": sum(not utf8 for _, utf8 in found.values()),
    }
    texts, served_by = dict.fromkeys(studies, ""), Counter()
    for study, (sections, _) in found.items():
        texts[study], served = joined_text(sections, data.report_sections, data.report_mode)
        served_by[" + ".join(served) or "none"] += 1
    by_study = {study: sections for study, (sections, _) in found.items()}
    return ReportTexts(texts, by_study, counts, dict(served_by.most_common()), where if found else None, unreadable)


def reports_of_table(data: DataConfig, frame: pd.DataFrame) -> ReportTexts:
    """The same as `read_reports`, from a table that has the reports in columns of its own.

    Where the columns are sections, each is cleaned. A text with a findings or impression heading is cut like a report;
    in a manifest's text any other is taken whole. The report of a study of several images is the text of all of them,
    the same text once.

    Args:
        data: `report_sections`, `report_mode` and `csv.sections` are used.
        frame: a row per image (or per report): `image_id`, `study_id`, and `text` or a column per section, as written.
    """
    columns = list(data.csv.sections) if data.csv is not None and data.csv.sections else ["text"]
    written: dict[str, dict[str, list[str]]] = {}
    texts, served_by = {}, Counter()
    for image, study, *cells in frame[["image_id", "study_id", *columns]].itertuples(index=False):
        row = dict(zip(columns, cells, strict=True))
        report = _report_of(row)
        wanted = ("whole",) if "text" in row and not has_headings(row["text"]) else data.report_sections
        texts[image], served = joined_text(report, wanted, data.report_mode)
        if any(cells):
            served_by[" + ".join(served) or "none"] += 1
            parts = written.setdefault(study, {name: [] for name in columns})
            for name, text in row.items():
                parts[name] += [text] if text and text not in parts[name] else []
    by_study = {
        study: _report_of({name: "\n\n".join(cells) for name, cells in parts.items()})
        for study, parts in written.items()
    }
    found = served_by.total()
    counts = {"found": found, "missing": len(texts) - found, "unreadable": 0, "not UTF-8": 0}
    where = "the table's text column" if columns == ["text"] else "the table's section columns"
    return ReportTexts(texts, by_study, counts, dict(served_by.most_common()), where if found else None)


def _report_of(cells: dict[str, str]) -> dict[str, str]:
    return section_texts(cells["text"]) if "text" in cells else texts_of_sections(cells)


def cut_all(batches: Iterable[Sequence[bytes | None]], workers: int) -> Iterator[list[Cut | None]]:
    """Cut batches of reports into sections, and yield each in its turn.

    Args:
        batches: the content of report files; None stands for one that is not there, and stays None.
        workers: processes beside this one; below 2 this process does it alone.

    Raises:
        ReportWorkerDiedError: a worker was killed, as happens when memory runs out.
    """
    if workers < 2:
        yield from map(cut_batch, batches)
        return
    pool = worker_pool(workers)
    under_way: deque[Future[list[Cut | None]]] = deque()
    try:
        for batch in batches:
            with lean_start():
                under_way.append(pool.submit(cut_batch, batch))
            if len(under_way) > _BATCHES_PER_WORKER * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ReportWorkerDiedError(
            "a process that read reports was ended by the system, perhaps for lack of memory; run the same command "
            "again with --workers 1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cut_batch(batch: Sequence[bytes | None]) -> list[Cut | None]:
    """Cut some reports into sections; the work of a worker process."""
    decoded = (None if data is None else decode(data) for data in batch)
    return [
        None if report is None or is_no_report(report[0]) else (section_texts(report[0]), report[1])
        for report in decoded
    ]


@contextmanager
def _stores(data: DataConfig) -> Iterator[tuple[list[_Folder | _Zip], str]]:
    """The folders and zips to search, in order; a study's report is taken from the first that has it."""
    named = data.reports
    if named is not None and not named.exists():
        raise DataError(f"data.reports {named}: no such folder or zip; leave it out to do without reports")
    if named is not None and not named.is_dir() and not named.is_file():
        raise DataError(f"data.reports {named} is neither a folder nor a file; name the folder or zip of the reports")
    with ExitStack() as open_files:
        stores: list[_Folder | _Zip] = []
        wheres: list[Path] = []
        for place in [data.root, data.root / "reports"] if named is None else [named]:
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
    """Reports as files in MIMIC's folders."""

    def __init__(self, top: Path) -> None:
        self._top = top

    def read(self, patient: str, study: str) -> bytes | None:
        try:
            return read_report_file(self._top / _member(patient, study))
        except (FileNotFoundError, NotADirectoryError):
            return None


class _Zip:
    """Reports in an archive of MIMIC's folders."""

    def __init__(self, path: Path, open_files: ExitStack) -> None:
        self._path = path
        try:
            self._archive = open_files.enter_context(zipfile.ZipFile(path))
        except _ZIP_ERRORS as error:
            raise DataError(f"{path} is not a zip or is cut short ({error}); download it again") from None
        names = (name for name in self._archive.namelist() if name.endswith(".txt"))
        # By the last three parts, whatever folder the archive starts with.
        self._members = {"/".join(name.split("/")[-3:]): name for name in names}

    def read(self, patient: str, study: str) -> bytes | None:
        member = self._members.get(_member(patient, study))
        if member is None:
            return None
        try:
            with self._archive.open(member) as file:
                return _capped(file, f"{self._path}: {member}")
        except _ZIP_ERRORS as error:  # RuntimeError: it is encrypted
            reason = f"{self._path}: {member} cannot be read ({error}); download the zip again, or unpack and repack it"
            raise UnreadableReportError(reason) from None


def read_report_file(path: Path) -> bytes:
    """The bytes of a report's file.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        UnreadableReportError: it is no file but a folder, pipe or device, has more than `LONGEST` bytes, or the system
            refuses to read it.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableReportError(f"{path} is no file but a pipe or device; put the report there")
            return _capped(file, str(path))
    except (FileNotFoundError, NotADirectoryError, UnreadableReportError):
        raise
    except OSError as error:
        raise UnreadableReportError(f"{path} cannot be read ({error.strerror or error}); mend or remove it") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _capped(file: IO[bytes], name: str) -> bytes:
    data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise UnreadableReportError(f"{name} has more than {LONGEST:,} bytes and is no report; remove or replace it")
    return data


def _read(stores: Sequence[_Folder | _Zip], patient: str, study: str, unreadable: dict[str, str]) -> bytes | None:
    """A study's report from the first place that has it; what cannot be read is noted and looked for elsewhere."""
    for store in stores:
        try:
            if (raw := store.read(patient, study)) is not None:
                return raw
        except UnreadableReportError as error:
            unreadable.setdefault(study, str(error))
    return None


def _member(patient: str, study: str) -> str:
    return f"p{patient[:2]}/p{patient}/s{study}.txt"


def _has_patient_groups(folder: Path) -> bool:
    """True for a folder that has MIMIC's `p10` … `p19` in it."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(len(entry.name) == 3 and entry.name[0] == "p" and entry.name[1:].isdigit() for entry in entries)
