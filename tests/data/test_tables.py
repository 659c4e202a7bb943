"""Tables: encodings, and an error that names file, row, column and what is there."""

import bz2
import gzip
import lzma
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cxr.core.labels import label_of_name, resembled
from mlx_cxr.data import tables
from mlx_cxr.data.ids import ids_of
from mlx_cxr.data.tables import (
    DataError,
    guarded,
    label_values,
    read_json_lines,
    read_table,
    refuse_blank,
    refuse_duplicates,
    unguarded,
    write_table,
)


def test_ids_stay_text_and_blanks_are_removed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,view,none\n007, PA ,\n1.0,NA,\n", encoding="utf-8")
    table = read_table(path, ["view", "id"], optional=["none", "absent"])
    assert table.columns.tolist() == ["view", "id", "none"]
    assert table.to_numpy().tolist() == [["PA", "007", ""], ["NA", "1.0", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_encodings(tmp_path, encoding, suffix, caplog):
    path = tmp_path / f"a{suffix}"
    data = "id,name\n1,Müller\n".encode(encoding)
    path.write_bytes(gzip.compress(data) if suffix == ".csv.gz" else data)
    assert read_table(path, ["id", "name"]).to_numpy().tolist() == [["1", "Müller"]]
    assert ("Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_missing_table_lists_its_neighbours(tmp_path):
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(DataError, match=r"meta\.csv: no such table; tables in .*: metadata\.csv"):
        read_table(tmp_path / "meta.csv", ["a"])
    with pytest.raises(DataError, match="does not exist either"):
        read_table(tmp_path / "no" / "meta.csv", ["a"])


def test_missing_column_lists_those_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("subject_id,Viewposition\n1,PA\n")
    with pytest.raises(DataError) as error:
        read_table(path, ["subject_id", "ViewPosition"])
    assert str(error.value) == (
        f"{path} lacks the column(s) ViewPosition; did you mean 'Viewposition' by 'ViewPosition'? "
        "columns there: subject_id, Viewposition"
    )


@pytest.mark.parametrize("separator", [";", "\t"])
def test_wrong_separator_is_recognized(tmp_path, separator):
    path = tmp_path / "a.csv"
    path.write_text(separator.join("abc") + "\n" + separator.join("123") + "\n")
    with pytest.raises(DataError, match=r"look separated by .*not by ',': set data\.csv\.separator: "):
        read_table(path, ["a"], separator_key="data.csv.separator")
    assert read_table(path, ["b"], separator=separator)["b"].tolist() == ["2"]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_table(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv is empty"):
        read_table(path, ["a"])


def test_header_without_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match="no rows"):
        read_table(path, ["a"])


def test_download_cut_short(tmp_path):
    path = tmp_path / "a.csv.gz"
    rng = np.random.default_rng(0)
    whole = gzip.compress(("a,b\n" + "\n".join(f"{x},1" for x in rng.integers(0, 1 << 40, 9000))).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz is cut short or not gzip .*download it again"):
        read_table(path, ["a"])


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.txt"])
@pytest.mark.parametrize("packed", [True, False])
def test_gzip_is_known_by_its_bytes(tmp_path, name, packed):
    content = "a,b\n1,\u00e4\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert read_table(tmp_path / name, None).to_dict("list") == {"a": ["1"], "b": ["\u00e4"]}


def test_a_workbook_and_a_pipe_are_no_tables(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as book:
        book.writestr("xl/workbook.xml", "x")
    with pytest.raises(DataError, match=r"a\.csv is a workbook or an archive"):
        read_table(tmp_path / "a.csv", None)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"pipe\.csv is no regular file"):
        read_table(tmp_path / "pipe.csv", None)
    with pytest.raises(DataError, match=r"/dev/zero is no regular file"):
        read_json_lines("/dev/zero", [], separator="|")


def reports(broken: str) -> str:
    """Sixty rows of quoted reports; of one of them the cell is what is given."""
    cells = [f'"Heart normal, lungs {number} clear.\nNo effusion, no edema."' for number in range(60)]
    cells[20] = broken
    return "id,report,Edema\n" + "".join(f"{number},{cell},1\n" for number, cell in enumerate(cells))


def test_a_quote_that_is_not_closed_takes_no_rows_with_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(reports('"Heart normal, ""clear"" lungs."'))
    assert len(read_table(path, None)) == 60
    for broken in ('"Heart normal.', '"Heart "normal".', '"Heart normal." Lungs clear'):
        path.write_text(reports(broken))
        with pytest.raises(DataError, match=r"a\.csv, row 22 \(line 42 of the file\): a quote is opened"):
            read_table(path, None)
    # Nothing but the one quote in the whole table: the end of the file is in the cell.
    path.write_text('id,report\n1,"open\n' + "2,b\n" * 50)
    with pytest.raises(DataError, match=r"a\.csv"):
        read_table(path, None)


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "a.csv"
    for header in ("id,Edema,Edema", 'id,"Edema",Edema ', "Edema,id,Edema"):
        path.write_text(f"{header}\n1,0,1\n")
        with pytest.raises(DataError, match=r"column 'Edema' is there 2 times \(columns [12], 3\)"):
            read_table(path, None)
    path.write_text("id,Edema,\n1,0,\n")
    assert read_table(path, ["id", "Edema"])["Edema"].tolist() == ["0"]


def test_words_for_nothing_are_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,view,Edema\n1,nan,NaN\n2,NULL,None\n3,<NA>,1\n4,AP,NA\n")
    table = read_table(path, None)
    assert table["view"].tolist() == ["", "", "", "AP"]
    values = label_values(table, {"Edema": "Edema"}, path)["Edema"].tolist()
    assert np.isnan(values).tolist() == [True, True, False, True]


class TestIds:
    def ids(self, tmp_path, *cells):
        path = tmp_path / "a.csv"
        path.write_text("patient\n" + "".join(f"{cell}\n" for cell in cells))
        return ids_of(read_table(path, None), "patient", path, "patient").tolist()

    def test_one_form(self, tmp_path):
        written = ("10000.0", "\u00a010001 ", "\uff11\uff10\uff10\uff10\uff12", "'10003", "1\u200b0004", "007", "aB")
        assert self.ids(tmp_path, *written) == ["10000", "10001", "10002", "10003", "10004", "007", "aB"]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("10000", "10000.0"),
            ("7", "007"),
            ("p1", "P1"),
            ("10000", "\uff11\uff10\uff10\uff10\uff10"),
            ("a b", "a\u00a0b"),
        ],
    )
    def test_two_spellings_of_one_are_shown_with_their_rows(self, tmp_path, one, other):
        with pytest.raises(DataError) as error:
            self.ids(tmp_path, "x", one, "y", "z", other)
        for words in ("a.csv", repr(one), "row 3", repr(other), "row 6"):
            assert words in str(error.value)

    @pytest.mark.parametrize("word", ["nan", "None", "NA", "null", "\u00a0"])
    def test_a_word_for_nothing_is_no_patient(self, tmp_path, word):
        with pytest.raises(DataError, match=r"row 3: column 'patient' is empty \(2 such"):
            self.ids(tmp_path, "1", word, "2", word)


@pytest.mark.parametrize("rows", ["1,2,3\n1,2\n", "1,2\n1,2,3\n"])
def test_a_row_with_too_many_cells_is_not_cut_silently(tmp_path, rows):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + rows)
    with pytest.raises(DataError, match="not a readable table"):
        read_table(path, ["a"])


def test_label_values_and_the_first_wrong_one():
    table = pd.DataFrame({"Edema": ["1.0", "0", "-1.0", ""], "Fracture": ["", "1", "2", "1"]})
    values = label_values(table, {"Edema": "Edema"}, "t.csv")["Edema"].to_numpy()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [1, 0, -1, np.nan])
    with pytest.raises(DataError, match=r"t\.csv, row 4, column 'Fracture': label '2' is not 1, 0, -1 or empty"):
        label_values(table, {"Fracture": "Fracture"}, "t.csv")


def test_rows_are_numbered_as_in_the_file_after_filtering():
    table = pd.DataFrame({"id": ["a", "b", "c", "b"]})[1:]
    with pytest.raises(DataError, match=r"image 'b' appears twice, in rows 3 and 5 \(1 such row"):
        refuse_duplicates(table, "id", "t.csv", "image")


@pytest.mark.parametrize(
    ("name", "label"),
    [("pleural_effusion", "Pleural Effusion"), ("Airspace Opacity", "Lung Opacity"), ("Hernia", None)],
)
def test_names_of_labels(name, label):
    assert label_of_name(name) == label


LINES = """{"id": "007", "n": 1.0, "age": 58, "list": ["b", " a ", 2], "box": {"x": 1}, "flag": true}

{"id": " x\\u2028y ", "n": -1e3, "age": NaN, "list": [], "box": null}
{"list": null, "id": "", "cut": "\\ud83d", "more": ["", [1]], "boxes": [1, {"x": 1}]}
"""


def test_json_lines_as_a_table_of_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + LINES, encoding="utf-8")
    table = read_json_lines(path, ["id", "more"], separator="|")
    assert table.index.tolist() == [-1, 1, 2]
    got = {name: [None if cell != cell else cell for cell in table[name]] for name in table.columns}
    assert got == {
        "id": ["007", "x\u2028y", None],
        "n": ["1.0", "-1e3", None],
        "age": ["58", None, None],
        "list": ["b|a|2", "", None],
        "flag": ["true", None, None],
        "cut": [None, None, "?"],
        "more": [None, None, "1"],
    }
    with pytest.raises(DataError, match=r"a\.jsonl, row 4: column 'id' is empty"):
        refuse_blank(table.fillna(""), "id", path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b"', r"a\.jsonl, line 3 is not JSON \(Expecting ',' delimiter"),
        ('{"id": "b"} {"id": "c"}', r"line 3 is not JSON \(Extra data"),
        ('["b"]', r"line 3 is not a JSON object in braces"),
        ('"b"', r"line 3 is not a JSON object"),
        ("[" * 20000, r"line 3 is not JSON"),
        (b'{"id": "M\xfcller"}', r"line 3 is not JSON \(.utf-8. codec"),
        ('{"id": {"is": "b"}}', r"a\.jsonl, line 3: 'id' holds an object"),
        ('{"id": ["b", {}]}', r"line 3: 'id' holds an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"id": "a"}\n\n' + line + b'\n{"id": "d"}\n')
    with pytest.raises(DataError, match=message):
        read_json_lines(path, ["id"], separator="|")


def test_json_lines_that_are_no_table(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        read_json_lines(path, [], separator="|")
    with pytest.raises(DataError, match=r"b\.jsonl: no such table; tables in .*: a\.jsonl"):
        read_json_lines(tmp_path / "b.jsonl", [], separator="|")
    path.write_text('{"uid": "1", "gold": []}\n')
    with pytest.raises(DataError, match=r"lacks the column\(s\) golds; did you mean 'gold' .*there: uid, gold"):
        read_json_lines(path, ["uid", "golds"], separator="|")


HOSTILE = (
    "=1+1",
    "+1",
    "-1",
    "@a",
    "\t=1",
    "\r=1",
    "'=1",
    "''=1",
    "'a",
    "'",
    "",
    "plain",
    "\uff1d1",
    "nan",
    "007",
    "- a",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_guarded_text_is_no_formula_and_comes_back(text):
    cell = guarded(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d")
    assert unguarded(cell) == text
    assert (cell == text) == (text in ("'a", "'", "", "plain", "nan", "007"))


@given(st.lists(st.text(alphabet="'=+-@\t\r\n a,\"", max_size=6), min_size=2, max_size=20, unique=True))
def test_guarding_is_one_to_one(texts):
    assert len({*map(guarded, texts)}) == len(texts)
    assert [unguarded(guarded(text)) for text in texts] == texts


def test_a_table_for_people_has_a_line_per_row_and_numbers_as_they_are(tmp_path):
    names = ["=1", "a\rb", None, 'say "x, y"']
    table = pd.DataFrame({"name": names, "value": [-1.5, 0.25, np.nan, 3.0], "n": [-1, 2, 3, 4]})
    path = write_table(tmp_path / "t.csv", table, "%.6g")
    assert path.read_bytes() == b'name,value,n\n\'=1,-1.5,-1\na\\rb,0.25,2\n,,3\n"say ""x, y""",3,4\n'


def quiet_rows(number: int) -> list[dict[str, str]]:
    """Rows of short reports without a quote anywhere."""
    return [
        {"patient": f"p{i:03d}", "report": f"Lungs {i} clear", "image": f"x/{i}.jpg", "Edema": str(i % 2)}
        for i in range(number)
    ]


def written(rows, order, separator=","):
    return "\n".join([separator.join(order), *(separator.join(row[name] for name in order) for row in rows)]) + "\n"


@pytest.mark.parametrize("order", ["patient report image Edema", "patient image Edema report", "report image patient"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(("opened", "closed"), [(20, 40), (0, 59), (58, 59)])
def test_a_quote_that_a_later_row_closes_takes_no_rows_with_it(tmp_path, order, separator, opened, closed):
    """Sound by the syntax: as many rows fewer as lie between the two, with an answer of another patient."""
    rows = quiet_rows(60)
    rows[opened]["report"] = f'"{rows[opened]["report"]}'
    rows[closed]["report"] += '"'
    path = tmp_path / "a.csv"
    path.write_text(written(rows, order.split(), separator))
    with pytest.raises(
        DataError, match=rf"a\.csv, row {opened + 2} .*not closed .* so {closed - opened} rows after it"
    ):
        read_table(path, None, separator=separator)


def test_reports_of_several_lines_are_no_rows(tmp_path):
    """Commas, numbers and tables inside of reports; as many rows as were written, each cell as it was."""
    report = 'Lungs, clear, 1.\n1,2 cm nodule\n"PA", lateral, 2\nLeft: 3,4,5\n\n10, 11, 12, 13'
    rows = [["0", report, "1"], ["1", "12, 13", "0"], ["2", "1,2 cm\n3,4 cm", ""]]
    for columns in (["uid", "report", "Edema"], ["uid", "report"]):
        path = tmp_path / "a.csv"
        frame = pd.DataFrame([row[: len(columns)] for row in rows], columns=columns)
        frame.to_csv(path, index=False)
        if len(columns) == 3:
            assert read_table(path, None).to_numpy().tolist() == rows
    for ending in ("\r\n", "\r", "\n\n"):
        path.write_text(f'uid,report{ending}007,"a{ending}b"{ending}8,c{ending}', newline="")
        table = read_table(path, None)
        assert table.to_numpy().tolist() == [["007", f"a{ending}b"], ["8", "c"]]


@pytest.mark.parametrize(
    ("rows", "row", "cells"),
    [("1,2\n3\n4,5\n", 3, 1), ("1,2\n3,Lungs\nclear,4,5\n", 4, 3), ("1,two, three\n", 2, 3), ("1,2\n\n3\n", 4, 1)],
)
def test_a_row_of_fewer_or_more_cells_is_named(tmp_path, rows, row, cells):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + rows)
    with pytest.raises(
        DataError, match=rf"row {row} \(line {row} of the file\) has {cells} cells and the header 2; .*quotes"
    ):
        read_table(path, ["a"])


def test_empty_lines_are_skipped_and_rows_keep_their_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\nid,Edema\n\n1,0\n   \n2,x\n")
    table = read_table(path, None)
    assert table["id"].tolist() == ["1", "2"]
    with pytest.raises(DataError, match=r"row 6, column 'Edema': label 'x'"):
        label_values(table, {"Edema": "Edema"}, path)


@pytest.mark.parametrize("separator", ["||", "\t", "; "])
def test_separators_of_any_length(tmp_path, separator):
    path = tmp_path / "a.csv"
    path.write_text(separator.join(["id", "report"]) + "\n" + separator.join(["1", f'"a{separator}b"']) + "\n")
    assert read_table(path, None, separator=separator).to_dict("list") == {"id": ["1"], "report": [f"a{separator}b"]}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_tables_of_either_kind(tmp_path, pack):
    path = tmp_path / "a.csv"
    path.write_bytes(pack("a,b\n1,\u00e4\n".encode()))
    assert read_table(path, None).to_dict("list") == {"a": ["1"], "b": ["\u00e4"]}
    path.write_bytes(pack(b'{"a": "1"}\n'))
    assert read_json_lines(path, ["a"], separator="|")["a"].tolist() == ["1"]
    path.write_bytes(pack(b"a,b\n" + b"1,2\n" * 99999)[:-20])
    with pytest.raises(DataError, match=r"a\.csv is cut short or not (gzip|bz2|lzma)"):
        read_table(path, None)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x28\xb5\x2f\xfd", "packed by zstd"),
        (b"PAR1", "a Parquet file"),
        (b"\xd0\xcf\x11\xe0", "a workbook of Excel 97"),
        (b"a,b\n\x00,1\n", "has NUL bytes"),
        ("a,b\n1,2\n".encode("utf-16-le"), "has NUL bytes"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, start, what):
    path = tmp_path / "a.csv"
    path.write_bytes(start + b"x" * 100)
    with pytest.raises(DataError, match=what):
        read_table(path, None)


def test_a_column_called_bz_is_no_archive(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("BZ,b\n1,2\n")
    assert read_table(path, None)["BZ"].tolist() == ["1"]


def test_tables_have_a_size(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 100_000))
    monkeypatch.setattr(tables, "MOST_BYTES", 300_000)
    for read in (lambda: read_table(path, None), lambda: read_json_lines(path, [], separator="|")):
        with pytest.raises(DataError, match=r"a\.csv has more than 0 MB of text: that is no table"):
            read()
    monkeypatch.undo()
    path.write_bytes(gzip.compress(b"a,b\n" + b"x" * (tables.LONGEST_LINE + 1)))
    with pytest.raises(DataError, match=r"a\.csv has more than 16 MB of text in one line"):
        read_table(path, None)
    path.write_bytes(b'a,b\n1,"' + b"x" * (tables.LONGEST_CELL + 1) + b'"\n')
    with pytest.raises(DataError, match=r"row 2 \(line 2 of the file\): a quote is opened .*field larger"):
        read_table(path, None)


def test_a_key_that_is_there_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b", "id": "c"}\n')
    with pytest.raises(DataError, match=r"line 2 is not JSON \(key 'id' is there twice\)"):
        read_json_lines(path, ["id"], separator="|")


def test_words_for_nothing_in_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1", "view": "nan"}\n{"id": "2", "view": "NULL"}\n{"id": "3", "view": "AP"}\n')
    assert read_json_lines(path, ["view"], separator="|")["view"].fillna("").tolist() == ["", "", "AP"]


class TestSpellings:
    ids = TestIds.ids

    @pytest.mark.parametrize("cell", ['"=""0012"""', '"""0012"""', "'0012", " '0012 ", '="0012"', "0012"])
    def test_quotes_of_excel(self, tmp_path, cell):
        assert self.ids(tmp_path, cell, "13") == ["0012", "13"]

    @pytest.mark.parametrize(
        ("one", "other"), [("p007", "p7"), ("nih-01", "NIH-1"), ("'0012", "12"), ("s1_01", "s1_1")]
    )
    def test_zeros_case_and_quotes(self, tmp_path, one, other):
        with pytest.raises(DataError, match="look like one, spelled in two ways"):
            self.ids(tmp_path, one, "x", other)

    def test_ids_that_differ_stay_apart(self, tmp_path):
        apart = ["1-1", "11", "1.10", "1.1", "a01b1", "a1b01", "10", "100", "p10", "p1", "02aa804e", "2aa804e1"]
        assert self.ids(tmp_path, *apart) == apart

    def test_ids_that_a_spreadsheet_rounded(self, tmp_path):
        with pytest.raises(DataError, match=r"row 3: patient '1\.23457E\+11' was rounded by a spreadsheet"):
            self.ids(tmp_path, "5E3", "1.23457E+11")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("effusion", "Pleural Effusion"),
        ("Left_Pneumothorax", "Pneumothorax"),
        ("pneumonia?", "Pneumonia"),
        ("Normal", "No Finding"),
        ("lung nodules", "Lung Lesion"),
        ("Suport Devics", "Support Devices"),
        ("view", None),
        ("body mass index", None),
        ("Hernia", None),
    ],
)
def test_names_that_resemble_a_finding(name, label):
    assert resembled(name) == label
