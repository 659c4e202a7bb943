"""Tables: encodings, and an error that names file, row, column and what is there."""

import gzip
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_cxr.data.tables import (
    DataError,
    guarded,
    ids_of,
    label_of_name,
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
