"""`reports.csv` beside the manifest: the sections of each study's report, from which a teacher reads those it may.

Columns: study_id, then each of `reports.SECTIONS` as cleaned text of one line, empty where the report lacks it. A study
without a report has no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mlx_cxr.core.files import atomic_path, sha256_file
from mlx_cxr.data.manifest import Manifest, check_made_together
from mlx_cxr.data.reports import SECTIONS
from mlx_cxr.data.tables import DataError, guarded_cells, read_table, refuse_blank, refuse_duplicates

_STUDIES_AT_ONCE = 20_000
"""Written at a time, so that no second copy of all reports is held."""


@dataclass(frozen=True)
class StudyReports:
    """Reports as read from disk.

    Attributes:
        sections: study id -> section -> cleaned text, "" where the report lacks it; of the studies with a report.
        sha256: of the bytes of `reports.csv`.
    """

    sections: Mapping[str, Mapping[str, str]]
    sha256: str


def write_reports(path: str | Path, reports: Mapping[str, Mapping[str, str]]) -> str | None:
    """Write `reports.csv` atomically, in the order of the study ids; where there are no reports, remove an old one.

    Texts are `tables.guarded`; `load_reports` gives them back exactly.

    Args:
        reports: study id -> each of `reports.SECTIONS`.

    Returns:
        Hex SHA-256 of the file; None when there was nothing to write.
    """
    if not reports:
        Path(path).unlink(missing_ok=True)
        return None
    studies = sorted(reports)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        for start in range(0, len(studies), _STUDIES_AT_ONCE):
            chosen = studies[start : start + _STUDIES_AT_ONCE]
            rows = [(s, *(reports[s][name] for name in SECTIONS)) for s in chosen]
            table = pd.DataFrame(rows, columns=["study_id", *SECTIONS], dtype="str").apply(guarded_cells)
            table.to_csv(out, index=False, header=start == 0, lineterminator="\n")
    return sha256_file(path)


def load_reports(path: str | Path, manifest: Manifest | None = None) -> StudyReports:
    """Read and check a file of `write_reports`.

    Args:
        manifest: the one beside it, if the two are to be checked against each other.

    Raises:
        DataError: the file is missing or lacks a column, a study is there twice, it is not the one that `splits.json`
            was made with, or the manifest and it are of different studies; names file, row and study.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} is missing: run build_manifest. If its summary says that no reports were found, set data.reports"
        )
    table = read_table(path, ["study_id", *SECTIONS], exact=True)
    refuse_blank(table, "study_id", path)
    refuse_duplicates(table, "study_id", path, "study")
    texts = table[list(SECTIONS)].to_dict("records")
    sections = dict(zip(table["study_id"].tolist(), texts, strict=True))
    sha256 = sha256_file(path)
    check_made_together(path, "reports_sha256", sha256)
    if manifest is None:
        return StudyReports(sections, sha256)
    # Every report is of a study of the manifest, and every study with a text has one.
    frame, again = manifest.frame, "they were not made together: run build_manifest again"
    known = set(frame["study_id"])
    if strange := [study for study in sections if study not in known]:
        raise DataError(f"{path}: study {strange[0]!r} is not in the manifest ({len(strange)} such in all); {again}")
    with_text = frame.loc[frame["text"] != "", "study_id"].drop_duplicates()
    if lacking := [study for study in with_text if study not in sections]:
        raise DataError(
            f"{path}: study {lacking[0]!r} has a text in the manifest and no report here "
            f"({len(lacking)} such in all); {again}"
        )
    return StudyReports(sections, sha256)
