"""Where reports are found: beside the images, in a folder, in a zip; and what is missing or in another encoding."""

import os
import re
import tracemalloc
import zipfile
from collections import Counter
from concurrent.futures.process import BrokenProcessPool

import pandas as pd
import pytest

from mlx_cxr.core.config_schema import CsvSource, DataConfig
from mlx_cxr.core.workers import worker_pool
from mlx_cxr.data import report_files
from mlx_cxr.data.report_files import LONGEST, read_reports, reports_of_table
from mlx_cxr.data.reports import decode, section_texts
from mlx_cxr.data.tables import DataError
from mlx_cxr.synthetic.cohort import plan_cohort

IDS = (["10000032", "10000032", "11000045"], ["50414267", "53189527", "50000001"])
MEMBERS = ["files/p10/p10000032/s50414267.txt", "files/p10/p10000032/s53189527.txt"]
REPORT = " FINAL REPORT\n INDICATION: Cough.\n\n FINDINGS: Clear lungs.\n\n IMPRESSION: No pneumonia."


def data(root, **changes):
    root.mkdir(exist_ok=True)
    return DataConfig(root=root, work_dir=root / "work", **changes)


def put(top, content=None):
    for member in MEMBERS:
        (top / member).parent.mkdir(parents=True, exist_ok=True)
        (top / member).write_bytes(content or REPORT.encode())


def put_zip(path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for member in MEMBERS:
            archive.writestr(prefix + member, REPORT)


@pytest.mark.parametrize(
    "place",
    [
        lambda root: (put(root), None),
        lambda root: (put(root / "reports"), None),
        lambda root: (put_zip(root / "mimic-cxr-reports.zip"), None),
        lambda root: (put(root.parent / "r"), root.parent / "r"),
        lambda root: (put(root.parent / "r"), root.parent / "r" / "files"),
        lambda root: (put_zip(root.parent / "mimic-cxr-reports.zip"), root.parent),
        lambda root: (put_zip(root.parent / "any.zip", "mimic-cxr/"), root.parent / "any.zip"),
    ],
)
def test_reports_are_found(tmp_path, place):
    root = tmp_path / "raw"
    root.mkdir()
    reports = read_reports(data(root, reports=place(root)[-1]), *IDS)
    assert reports.texts == {"50414267": "No pneumonia.", "53189527": "No pneumonia.", "50000001": ""}
    assert reports.sections == dict.fromkeys(IDS[1][:2], section_texts(REPORT))
    assert reports.counts == {"found": 2, "missing": 1, "unreadable": 0, "not UTF-8": 0}
    assert reports.served == {"impression": 2}
    assert str(tmp_path) in reports.where


def test_processes_cut_as_one_does(tmp_path, monkeypatch):
    studies = plan_cohort(40, 5).studies
    patients = [str(study.patient.subject_id) for study in studies] + ["10000032"]
    ids = [str(study.study_id) for study in studies] + ["50414267"]
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for patient, study_id, study in zip(patients, ids, studies, strict=False):
            text = study.report.text.replace("chest", "ch\xe9st")
            archive.writestr(f"files/p{patient[:2]}/p{patient}/s{study_id}.txt", text.encode("latin-1"))
    config = data(tmp_path / "raw", reports=tmp_path / "r.zip")
    alone = read_reports(config, patients, ids, 1)
    assert alone.counts["found"] == len(studies) > 60
    assert 0 < alone.counts["not UTF-8"] < len(studies)
    # Batches of eight reports, handed out to three processes.
    for name, value in (("_WORTH_A_WORKER", 10), ("_THREADS", 2), ("_PER_THREAD", 4)):
        monkeypatch.setattr(report_files, name, value)
    started = []
    monkeypatch.setattr(report_files, "worker_pool", lambda n: started.append(n) or worker_pool(n))
    assert read_reports(config, patients, ids, 3) == alone
    assert started == [3]


def test_a_killed_process_is_said(monkeypatch):
    class Killed:
        def submit(self, *arguments):
            raise BrokenProcessPool("a child is gone")

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(report_files, "worker_pool", lambda workers: Killed())
    with pytest.raises(report_files.ReportWorkerDiedError, match="--workers 1"):
        list(report_files.cut_all([[b"FINDINGS: Clear."]], 2))


def test_each_report_is_read_once(tmp_path, monkeypatch):
    put(tmp_path / "raw")
    read = Counter()

    def counting(raw):
        read[raw] += 1
        return decode(raw)

    for member, text in zip(MEMBERS, ("IMPRESSION: One.", "FINDINGS: Two."), strict=True):
        (tmp_path / "raw" / member).write_text(text)
    monkeypatch.setattr(report_files, "decode", counting)
    reports = read_reports(data(tmp_path / "raw"), *IDS)
    assert read == {b"IMPRESSION: One.": 1, b"FINDINGS: Two.": 1}
    assert reports.texts == {"50414267": "One.", "53189527": "Two.", "50000001": ""}
    assert reports.sections["53189527"]["findings"] == "Two."


def test_no_reports_is_a_cohort_without_text(tmp_path):
    reports = read_reports(data(tmp_path / "raw"), *IDS)
    assert set(reports.texts.values()) == {""}
    assert reports.sections == {}
    assert (reports.counts["found"], reports.where) == (0, None)


def test_sections_and_mode_follow_the_configuration(tmp_path):
    put(tmp_path / "raw")
    wanted = data(tmp_path / "raw", report_sections=("indication", "findings"), report_mode="all")
    reports = read_reports(wanted, *IDS)
    assert reports.texts["50414267"] == "Cough. Clear lungs."
    assert reports.served == {"indication + findings": 2}


def test_another_encoding_is_decoded_and_counted(tmp_path):
    put(tmp_path / "raw", " IMPRESSION: Röntgen – 2 cm.".encode("cp1252"))
    reports = read_reports(data(tmp_path / "raw"), *IDS)
    assert reports.texts["50414267"] == "Röntgen – 2 cm."
    assert reports.counts["not UTF-8"] == 2


def test_named_reports_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data\.reports .*gone: no such folder or zip"):
        read_reports(data(tmp_path / "raw", reports=tmp_path / "gone"), *IDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds none of 3 reports; .*files/p10/p10000032/s50414267\.txt"):
        read_reports(data(tmp_path / "raw", reports=tmp_path / "empty"), *IDS)


def test_a_zip_cut_short(tmp_path):
    path = tmp_path / "r.zip"
    put_zip(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"r\.zip is not a zip or is cut short"):
        read_reports(data(tmp_path / "raw", reports=path), *IDS)
    path.write_bytes(whole.replace(b"Clear lungs", b"Clear_lungs"))
    with pytest.raises(
        DataError, match=r"none of the 2 reports found can be read: .*r\.zip: files/p10/.*txt cannot be read"
    ):
        read_reports(data(tmp_path / "raw", reports=path), *IDS)


UNREADABLE = {
    "a pipe": (lambda file: os.mkfifo(file), "is no file but a pipe or device"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is no file but a pipe or device"),
    "a folder": (lambda file: file.mkdir(), r"cannot be read \(Is a directory\)"),
    "too long": (lambda file: file.write_bytes(b"x" * (LONGEST + 1)), "has more than 1,000,000 bytes"),
    "a circle of links": (lambda file: file.symlink_to(file), r"cannot be read \(.*symbolic links"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_report_that_cannot_be_read_costs_its_study_the_report_and_no_more(tmp_path, kind):
    make, reason = UNREADABLE[kind]
    put(tmp_path / "raw")
    bad = tmp_path / "raw" / MEMBERS[1]
    bad.unlink()
    make(bad)
    reports = read_reports(data(tmp_path / "raw"), *IDS)
    assert reports.texts == {"50414267": "No pneumonia.", "53189527": "", "50000001": ""}
    assert reports.counts == {"found": 1, "missing": 1, "unreadable": 1, "not UTF-8": 0}
    assert list(reports.unreadable) == ["53189527"]
    assert re.search(rf"s53189527\.txt {reason}", reports.unreadable["53189527"])
    # Where the zip beside it has that report, it is taken from there.
    put_zip(tmp_path / "raw" / "mimic-cxr-reports.zip")
    again = read_reports(data(tmp_path / "raw"), *IDS)
    assert (again.texts["53189527"], again.counts["unreadable"]) == ("No pneumonia.", 0)


def encrypted(data):
    """Set the flag of encryption in the second member's headers."""
    for head, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.rindex(head)
        data[place + at] |= 1


def packed_as_deflate64(data):
    for head, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = data.rindex(head)
        data[place + at] = 9


def damaged(data):
    place = data.rindex(b"Clear lungs")
    data[place] ^= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [(encrypted, "encrypted"), (packed_as_deflate64, "compression method"), (damaged, "CRC-32")],
)
def test_a_member_of_a_zip_that_cannot_be_read(tmp_path, change, reason):
    put_zip(tmp_path / "r.zip")
    raw = bytearray((tmp_path / "r.zip").read_bytes())
    change(raw)
    (tmp_path / "r.zip").write_bytes(raw)
    reports = read_reports(data(tmp_path / "raw", reports=tmp_path / "r.zip"), *IDS)
    assert reports.texts == {"50414267": "No pneumonia.", "53189527": "", "50000001": ""}
    assert re.search(rf"r\.zip: {MEMBERS[1]} cannot be read \(.*{reason}", reports.unreadable["53189527"])


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    put_zip(tmp_path / "r.zip")
    with zipfile.ZipFile(tmp_path / "r.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("files/p11/p11000045/s50000001.txt", bytes(300_000_000))
    assert (tmp_path / "r.zip").stat().st_size < 400_000
    tracemalloc.start()
    reports = read_reports(data(tmp_path / "raw", reports=tmp_path / "r.zip"), *IDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reports.counts["found"] == 2
    assert "has more than 1,000,000 bytes" in reports.unreadable["50000001"]
    assert peak < 20_000_000


@pytest.mark.parametrize(
    "nothing", ["", " \r\n", "nan", "None\n", "NA", "N/A", "null", "\ufeff <NA>", "&nbsp;", 60 * " " + "N/A"]
)
def test_a_word_for_nothing_is_no_report(tmp_path, nothing):
    put(tmp_path / "raw")
    (tmp_path / "raw" / MEMBERS[0]).write_text(nothing, encoding="utf-8")
    reports = read_reports(data(tmp_path / "raw"), *IDS)
    assert list(reports.sections) == ["53189527"]
    assert (reports.counts["found"], reports.counts["missing"]) == (1, 2)


def test_none_as_a_sections_whole_text_stays(tmp_path):
    put(tmp_path / "raw", b"INDICATION: None.\n\nIMPRESSION: Nan")
    assert read_reports(data(tmp_path / "raw"), *IDS).sections["50414267"]["indication"] == "None."


def test_a_pipe_in_place_of_the_zip(tmp_path):
    os.mkfifo(tmp_path / "r.zip")
    with pytest.raises(DataError, match=r"r\.zip is neither a folder nor a file"):
        read_reports(data(tmp_path / "raw", reports=tmp_path / "r.zip"), *IDS)


def table(*rows, columns=("text",)):
    return pd.DataFrame(rows, columns=["image_id", "study_id", *columns], dtype=str)


def test_a_text_column_is_cut_where_it_is_a_report_and_cleaned_anyway(tmp_path):
    note = "1. Tube in place\n2. ___ No effusion"
    reports = reports_of_table(data(tmp_path), table(("a", "1", REPORT), ("b", "2", note), ("c", "3", "")))
    assert reports.texts == {"a": "No pneumonia.", "b": "Tube in place. No effusion", "c": ""}
    assert reports.served == {"impression": 1, "whole": 1}
    assert reports.counts == {"found": 2, "missing": 1, "unreadable": 0, "not UTF-8": 0}
    assert reports.sections == {"1": section_texts(REPORT), "2": section_texts(note)}


def test_the_report_of_a_study_is_what_stands_at_its_images(tmp_path):
    images = table(("a", "1", "Old tube."), ("b", "1", "New tube."), ("c", "1", "Old tube."), ("d", "2", ""))
    reports = reports_of_table(data(tmp_path), images)
    assert reports.texts == {"a": "Old tube.", "b": "New tube.", "c": "Old tube.", "d": ""}
    assert {study: report["whole"] for study, report in reports.sections.items()} == {"1": "Old tube. New tube."}


def test_columns_of_sections(tmp_path):
    csv = CsvSource(table=tmp_path / "t.csv", sections={"impression": "x", "findings": "y"})
    columns = ("impression", "findings")
    rows = table(
        ("a", "1", "1. Normal.", "XXXX lungs clear."), ("b", "2", "", "Effusion."), ("c", "3", "", ""), columns=columns
    )
    settings = data(tmp_path, source="csv", csv=csv)
    reports = reports_of_table(settings, rows)
    assert reports.texts == {"a": "Normal.", "b": "Effusion.", "c": ""}
    assert reports.sections["1"] == {
        "indication": "",
        "findings": "lungs clear.",
        "impression": "Normal.",
        "last_paragraph": "Normal.",
        "whole": "FINDINGS: lungs clear. IMPRESSION: Normal.",
    }
    assert list(reports.sections) == ["1", "2"]
    assert (reports.served, reports.counts["missing"]) == ({"impression": 1, "findings": 1}, 1)
    assert reports.where == "the table's section columns"
    both = settings.model_copy(update={"report_mode": "all"})
    assert reports_of_table(both, rows).texts["a"] == "Normal. lungs clear."
