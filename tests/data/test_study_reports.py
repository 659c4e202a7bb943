"""`reports.csv`: exact bytes, the way back, and files that do not go with the manifest."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlx_cxr.core.config_schema import DataConfig, TeacherConfig
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.reports import SECTIONS, section_texts, select
from mlx_cxr.data.study_reports import load_reports, write_reports
from mlx_cxr.data.tables import DataError

REPORTS = {
    "02": section_texts(' INDICATION: "Cough", NA\n\n FINDINGS: Clear.\n\n IMPRESSION: Röntgen normal.'),
    "01": section_texts(" ______"),
    "10": section_texts("NA"),
}


def manifest(*rows):
    frame = pd.DataFrame(rows, columns=["study_id", "text"], dtype=str)
    return Manifest(frame, np.zeros((len(rows), 14), np.float32), "a" * 64)


def test_the_bytes_and_back(tmp_path):
    path = tmp_path / "reports.csv"
    sha256 = write_reports(path, REPORTS)
    assert path.read_bytes().decode() == (
        "study_id,indication,findings,impression,last_paragraph,whole\n"
        "01,,,,,\n"
        '02,"""Cough"", NA",Clear.,Röntgen normal.,Röntgen normal.,'
        '"INDICATION: ""Cough"", NA. FINDINGS: Clear. IMPRESSION: Röntgen normal."\n'
        "10,,,,NA,NA\n"
    )
    reports = load_reports(path)
    assert reports.sha256 == sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reports.sections == REPORTS
    assert len(reports.sections) == 3
    assert select(reports.sections["02"], ["impression", "findings"], "all") == [
        ("impression", "Röntgen normal."),
        ("findings", "Clear."),
    ]


def test_the_order_of_studies_does_not_matter(tmp_path):
    turned = dict(reversed(REPORTS.items()))
    assert write_reports(tmp_path / "a.csv", REPORTS) == write_reports(tmp_path / "b.csv", turned)


def test_no_reports_remove_a_stale_file(tmp_path):
    path = tmp_path / "reports.csv"
    write_reports(path, REPORTS)
    assert write_reports(path, {}) is None
    assert not path.exists()
    assert write_reports(path, {}) is None
    with pytest.raises(DataError, match=r"reports\.csv is missing: run build_manifest"):
        load_reports(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n10,", "\n02,", r"study '02' appears twice, in rows 3 and 4"),
        ("\n10,", "\n,", r"row 4: column 'study_id' is empty"),
        ("findings,impression", "finding,impression", r"lacks the column\(s\) findings; did you mean 'finding'"),
    ],
)
def test_an_edited_file_is_refused(tmp_path, old, new, message):
    path = tmp_path / "reports.csv"
    write_reports(path, REPORTS)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_reports(path)


def test_reports_of_another_manifest(tmp_path):
    path = tmp_path / "reports.csv"
    write_reports(path, REPORTS)
    mine = [("01", ""), ("02", "Clear."), ("02", "Clear."), ("10", "NA")]
    assert len(load_reports(path, manifest(*mine, ("11", ""))).sections) == 3
    with pytest.raises(DataError, match=r"reports\.csv: study '10' is not in the manifest \(1 such in all\); .*again"):
        load_reports(path, manifest(*mine[:3]))
    with pytest.raises(DataError, match=r"study '11' has a text in the manifest and no report here \(1 such"):
        load_reports(path, manifest(*mine, ("11", "Edema.")))


def test_what_may_be_asked_for_in_a_configuration_is_what_is_written():
    assert DataConfig(root=Path("r"), work_dir=Path("w"), report_sections=SECTIONS).report_sections == SECTIONS
    assert TeacherConfig(sections=SECTIONS).sections == SECTIONS


def test_texts_are_no_formulas_and_come_back_exactly(tmp_path):
    texts = ["- No edema", "=1+1", "'=1", "'", "NA", "nan", "", "+", "Clear."]
    reports = {f"={place}": dict.fromkeys(SECTIONS, text) for place, text in enumerate(texts)}
    path = tmp_path / "reports.csv"
    write_reports(path, reports)
    assert load_reports(path).sections == reports
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if line[0] in "=+-@"] == []
