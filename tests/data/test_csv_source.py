"""The source `csv`: findings in a list or a column each, filters, and tables at odds with the configuration."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlx_cxr.core.config import load_config
from mlx_cxr.core.config_schema import CsvSource, DataConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data import csv_source
from mlx_cxr.data.source_rows import labelled
from mlx_cxr.data.tables import DataError

LISTED = """patient_id,study_id,image_file,view,age,sex,findings,text,fold
nih-01,s1,a.jpg,PA,058Y,M,Effusion|Mass,,training
nih-01,s2,b.jpg,ap,411,Male,No Finding,,training
nih-02,s3,c.jpg,AP,,f,Hernia| Edema |Nodule,"A note,
in two lines",val
nih-03,s4,d.jpg,,7,,,,test
mhh-04,s5,e.jpg,PA,30,F,COVID-19,,test
"""
COLUMNS = {"view": "view", "age": "age", "sex": "sex", "text": "text"}
MAP = {"Effusion": "Pleural Effusion", "Mass": "Lung Lesion", "Nodule": "Lung Lesion", "No Finding": "No Finding"}


def source(tmp_path, content=LISTED, views=None, **csv):
    table = tmp_path / "films.csv"
    table.write_text(content, encoding="utf-8")
    csv = CsvSource(**{"table": table, **COLUMNS, "findings": "findings", "label_map": MAP, **csv})
    return DataConfig(source="csv", root=tmp_path, work_dir=tmp_path / "work", views=views, csv=csv)


def wide(tmp_path, header, *rows, **csv):
    lines = [f"p{i},s{i},{i}.jpg,{cells}" for i, cells in enumerate(rows)]
    content = "\n".join([f"patient_id,study_id,image_file,{header}", *lines])
    return source(tmp_path, content, **{**dict.fromkeys(COLUMNS), "findings": None, "label_map": {}, **csv})


def read_csv_source(data):
    """The labelled rows; those that nobody labelled are read too, and have tests of their own."""
    rows = csv_source.read_csv_source(data)
    return rows.keep(labelled(rows.frame), "not labelled")


def labels(rows, name):
    return rows.frame[name].fillna(9).tolist()


def test_listed_findings(tmp_path):
    rows = read_csv_source(source(tmp_path, where={"patient_id": "nih-"}))
    frame = rows.frame
    assert (rows.read, rows.dropped) == (5, {"not matching data.csv.where": 1, "not labelled": 1})
    assert frame["image_id"].tolist() == frame["path"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert frame[["view", "age", "sex"]].to_numpy().tolist() == [["PA", "58", "M"], ["AP", "", "M"], ["AP", "", "F"]]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0]
    assert labels(rows, "Lung Lesion") == [1, 0, 1]
    assert labels(rows, "No Finding") == [0, 1, 0]
    assert labels(rows, "Edema") == [0, 0, 1]  # one of the 14 counts as itself, and so is covered
    assert labels(rows, "Fracture") == [9, 9, 9]  # not covered: no information
    assert rows.notes == {"finding not mapped: Hernia": 1, "ages not usable": 1, "columns not used: fold": 1}
    assert frame["split"].tolist() == ["", "", ""]
    assert list(frame.columns[-14:]) == list(LABELS)
    assert frame["Edema"].dtype == np.float32


def test_a_separator_alone_is_an_empty_list_and_an_empty_cell_none(tmp_path):
    rows = read_csv_source(source(tmp_path, LISTED.replace("d.jpg,,7,,,,", "d.jpg,,7,,|,,")))
    assert rows.frame["image_id"].tolist() == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0, 0, 0]


def test_labels_covered_are_zero_where_not_listed(tmp_path):
    rows = read_csv_source(source(tmp_path, labels_covered=("Fracture", "Pleural Effusion")))
    assert labels(rows, "Fracture") == [0, 0, 0, 0]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0, 0]
    assert labels(rows, "Lung Lesion") == [9, 9, 9, 9]
    assert rows.notes == {
        **{f"finding not mapped: {name}": 1 for name in ("Hernia", "COVID-19")},
        **{f"finding of a label not covered: {name}": 1 for name in ("Mass", "No Finding", "Edema", "Nodule")},
        "ages not usable": 1,
        "columns not used: fold": 1,
    }


def test_split_column_with_usual_names(tmp_path):
    assert read_csv_source(source(tmp_path, split="fold")).frame["split"].tolist() == [
        *("train", "train", "validate", "test")
    ]
    with pytest.raises(DataError, match=r"films\.csv, row 4: split 'hold-out' is not train, validate or test"):
        read_csv_source(source(tmp_path, LISTED.replace("val\n", "hold-out\n"), split="fold"))


def test_views_apply_only_where_a_view_column_is_named(tmp_path):
    assert read_csv_source(source(tmp_path, views=("AP",))).frame["image_id"].tolist() == ["b.jpg", "c.jpg"]
    assert len(read_csv_source(source(tmp_path, views=("AP",), view=None)).frame) == 4


def test_a_filter_that_lets_nothing_through(tmp_path):
    with pytest.raises(DataError, match=r"no 'patient_id' matches 'xyz' of data\.csv\.where; .* holds 'nih-01', "):
        read_csv_source(source(tmp_path, where={"patient_id": "xyz"}))
    with pytest.raises(DataError, match=r"'\(' for 'patient_id' is no regular expression"):
        read_csv_source(source(tmp_path, where={"patient_id": "("}))


@pytest.mark.parametrize("csv", [{"age": "years"}, {"where": {"years": "x"}}, {"findings": "years"}])
def test_columns_that_are_not_there(tmp_path, csv):
    with pytest.raises(DataError, match=r"films\.csv lacks the column\(s\) years; .*patient_id, study_id, image_file"):
        read_csv_source(source(tmp_path, **csv))


def test_another_separator(tmp_path):
    content = "patient_id;study_id;image_file;findings\np;s;a.jpg;Edema\n"
    nothing_else = dict.fromkeys(COLUMNS)
    with pytest.raises(DataError, match=r"look separated by ';', not by ',': set data\.csv\.separator: ';'"):
        read_csv_source(source(tmp_path, content, **nothing_else))
    assert labels(read_csv_source(source(tmp_path, content, separator=";", **nothing_else)), "Edema") == [1]


def test_ids_keep_their_zeros_and_may_not_repeat_or_be_blank(tmp_path):
    content = "patient_id,study_id,image_file,findings\n007,1.0,a.jpg,Edema\n007,1.0,b.jpg,Edema\n"
    frame = read_csv_source(source(tmp_path, content, **dict.fromkeys(COLUMNS))).frame
    assert frame[["patient_id", "study_id"]].to_numpy().tolist() == [["007", "1"]] * 2
    with pytest.raises(DataError, match=r"image 'a\.jpg' appears twice, in rows 2 and 3"):
        read_csv_source(source(tmp_path, content.replace("b.jpg", "a.jpg"), **dict.fromkeys(COLUMNS)))
    with pytest.raises(DataError, match="row 3: column 'patient_id' is empty"):
        read_csv_source(source(tmp_path, content.replace("\n007,1.0,b", "\n,1.0,b"), **dict.fromkeys(COLUMNS)))


def test_images_of_a_study_that_disagree(tmp_path):
    content = "patient_id,study_id,image_file,findings\np,s,a.jpg,Edema\np,s,b.jpg,No Finding\n"
    with pytest.raises(DataError, match=r"study 's' disagree in Edema: \[1\.0, 0\.0\]; set data\.csv\.study: null"):
        read_csv_source(source(tmp_path, content, **dict.fromkeys(COLUMNS)))
    frame = read_csv_source(source(tmp_path, content, **dict.fromkeys(COLUMNS), study=None)).frame
    assert frame["study_id"].tolist() == ["a.jpg", "b.jpg"]


def test_a_column_per_label(tmp_path):
    cells = ("1.0,-1,0,,x", ",0,0,-1.0,y", "0,1,1,-1,z")
    lesions = {"Mass": "Lung Lesion", "Nodule": "Lung Lesion"}
    rows = read_csv_source(wide(tmp_path, "edema,Pleural_Effusion,Mass,Nodule,note", *cells, label_map=lesions))
    assert labels(rows, "Edema") == [1, 9, 0]
    assert labels(rows, "Pleural Effusion") == [-1, 0, 1]
    assert labels(rows, "Lung Lesion") == [0, -1, 1]  # present over uncertain over absent over empty
    assert labels(rows, "Fracture") == [9, 9, 9]


def test_label_columns_that_are_wrong(tmp_path):
    with pytest.raises(DataError, match=r"films\.csv, row 3, column 'Edema': label '2' is not 1, 0, -1 or empty"):
        read_csv_source(wide(tmp_path, "Edema", "1", "2"))
    with pytest.raises(DataError, match="column 'Pleural Efusion' looks like the label 'Pleural Effusion'"):
        read_csv_source(wide(tmp_path, "Edema,Pleural Efusion", "1,1"))
    with pytest.raises(DataError, match=r"no column is one of the 14 labels; set data\.csv\.findings"):
        read_csv_source(wide(tmp_path, "dx", "1"))
    with pytest.raises(DataError, match=r"lacks the column\(s\) Effusion"):
        read_csv_source(wide(tmp_path, "Edema", "1", label_map={"Effusion": "Pleural Effusion"}))
    with pytest.raises(DataError, match=r"no column for Fracture of data\.csv\.labels_covered"):
        read_csv_source(wide(tmp_path, "Edema", "1", labels_covered=("Edema", "Fracture")))
    rows = read_csv_source(wide(tmp_path, "Edema,Pleural Efusion", "1,1", labels_covered=("Edema",)))
    assert labels(rows, "Edema") == [1]


def test_absolute_paths_become_relative_to_the_root(tmp_path):
    content = f"patient_id,study_id,image_file,findings\np,s,{tmp_path.resolve()}/x/a.jpg,Edema\n"
    assert read_csv_source(source(tmp_path, content, **dict.fromkeys(COLUMNS))).frame["path"].tolist() == ["x/a.jpg"]
    elsewhere = source(tmp_path, content.replace(str(tmp_path.resolve()), "/elsewhere"), **dict.fromkeys(COLUMNS))
    with pytest.raises(DataError, match=r"'/elsewhere/x/a\.jpg' does not lie under data\.root"):
        read_csv_source(elsewhere)


RECORDS = [
    {"uid": 1, "note": " Edema. ", "gold": ["Edema", "Mass"], "sex": "f", "box": {"a": 1}},
    {"uid": 2, "note": "Clear.", "gold": []},
    {"uid": 3, "note": "Not read."},
    {"uid": 4, "note": "Not read.", "gold": None},
    {"uid": 5, "gold": "No Finding|Hernia"},
]
REPORTS = {"patient": "uid", "study": "uid", "image": None, "view": None, "age": None, "text": "note"}


def json_lines(tmp_path, records, **csv):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    config = source(tmp_path, lines, **{**REPORTS, "findings": "gold", **csv})
    table = tmp_path / "films.csv"
    table.rename(table.with_suffix(".jsonl"))
    return config.model_copy(update={"csv": config.csv.model_copy(update={"table": table.with_suffix(".jsonl")})})


def test_json_lines_of_reports_without_images(tmp_path):
    rows = read_csv_source(json_lines(tmp_path, RECORDS))
    frame = rows.frame
    assert (rows.read, rows.dropped) == (5, {"not labelled": 2})
    for column in ("image_id", "patient_id", "study_id"):
        assert frame[column].tolist() == ["1", "2", "5"]
    assert frame["path"].tolist() == ["", "", ""]
    assert frame["text"].tolist() == ["Edema.", "Clear.", ""]
    assert frame["sex"].tolist() == ["F", "", ""]
    assert labels(rows, "Edema") == [1, 0, 0]
    assert labels(rows, "Lung Lesion") == [1, 0, 0]
    assert labels(rows, "No Finding") == [0, 0, 1]
    assert labels(rows, "Fracture") == [9, 9, 9]
    assert rows.notes == {"finding not mapped: Hernia": 1}


def test_a_json_line_per_image_and_a_key_per_label(tmp_path):
    records = [{"uid": "p", "film": "a.jpg", "edema": 1.0}, {"uid": "q", "film": "b.jpg", "edema": -1, "note": "x"}]
    rows = read_csv_source(json_lines(tmp_path, records, image="film", findings=None, label_map={}, sex=None))
    assert labels(rows, "Edema") == [1, -1]
    assert rows.frame["path"].tolist() == ["a.jpg", "b.jpg"]
    records[1]["edema"] = 2
    with pytest.raises(DataError, match=r"films\.jsonl, row 2, column 'edema': label '2' is not"):
        read_csv_source(json_lines(tmp_path, records, image="film", findings=None, label_map={}, sex=None))


def test_lists_can_be_filtered_by(tmp_path):
    rows = read_csv_source(json_lines(tmp_path, RECORDS, where={"gold": "(?!No Finding)"}))
    assert rows.dropped == {"not matching data.csv.where": 1, "not labelled": 2}
    assert rows.frame["image_id"].tolist() == ["1", "2"]


def test_reports_without_images_are_told_apart_by_their_study(tmp_path):
    with pytest.raises(DataError, match=r"films\.jsonl: study '1' appears twice, in rows 1 and 2"):
        read_csv_source(json_lines(tmp_path, [RECORDS[0], RECORDS[0]]))
    with pytest.raises(DataError, match=r"films\.jsonl, row 2: column 'uid' is empty"):
        read_csv_source(json_lines(tmp_path, [RECORDS[0], {"uid": None, "note": "x", "gold": []}]))
    with pytest.raises(DataError, match=r"line 1: 'box' holds an object"):
        read_csv_source(json_lines(tmp_path, RECORDS, text="box"))


def test_columns_of_sections(tmp_path):
    records = [{"uid": 1, "gold": [], "why": "Cough?", "said": "1. Clear."}, {"uid": 2, "gold": [], "said": None}]
    sections = {"impression": "said", "indication": "why"}
    frame = read_csv_source(json_lines(tmp_path, records, text=None, sections=sections, sex=None)).frame
    assert frame[["indication", "impression", "text"]].to_numpy().tolist() == [
        ["Cough?", "1. Clear.", ""],
        ["", "", ""],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": None}, "'study' has to name the report's id"),
        ({"text": None}, "name their column in 'text' or 'sections'"),
        (
            {"sections": {"findings": "said"}},
            "'text' is a column of whole reports, 'sections' are columns of their parts",
        ),
        ({"text": None, "sections": {"comparison": "x"}}, "'indication', 'findings' or 'impression'"),
    ],
)
def test_columns_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        CsvSource(**{"table": tmp_path / "t.jsonl", **REPORTS, **changes})


def real_data():
    root = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[3] / "shared" / "realcxr"))
    if not (root / "metadata.csv").is_file():
        pytest.skip("the real films and reports (shared/realcxr) are not on this machine")
    return root


def test_the_real_reports(monkeypatch):
    """The configuration that comes with the package, against counts from the file itself."""
    root = real_data()
    monkeypatch.setenv("REALCXR", str(root))
    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "real_reports.yaml")
    rows = read_csv_source(config.data)
    everything = [json.loads(line) for line in config.data.csv.table.read_text(encoding="utf-8").splitlines()]
    indexed = [record for record in everything if record["mesh_major"] != ["No Indexing"]]
    assert (rows.read, rows.dropped) == (3059, {"not matching data.csv.where": 72})
    assert rows.frame["study_id"].tolist() == [record["uid"] for record in indexed]
    assert rows.frame["findings"].tolist() == [record["findings"].strip() for record in indexed]
    names = {name: name for name in LABELS} | {"No Finding": "normal", "Pleural Effusion": "Effusion"}
    names |= {"Pleural Other": "Pleural_Thickening", "Lung Lesion": ("Mass", "Nodule")}
    for label in LABELS:
        there = rows.frame[label].to_numpy()
        if label in ("Enlarged Cardiomediastinum", "Fracture", "Lung Opacity", "Support Devices"):
            assert np.isnan(there).all(), label
            continue
        wanted = names[label] if isinstance(names[label], tuple) else (names[label],)
        listed = [float(any(name in record["gold14"] for name in wanted)) for record in indexed]
        np.testing.assert_array_equal(there, listed, err_msg=label)
    counts = Counter(name for record in indexed for name in record["gold14"])
    unused = "comparison, mesh_automatic, image_ids, image_caption, gold_split, license"
    assert rows.notes == {
        **{f"finding not mapped: {name}": counts[name] for name in ("Emphysema", "Infiltration", "Fibrosis")},
        f"columns not used: {unused}": 6,
    }
    assert rows.notes["finding not mapped: Infiltration"] == 43


def test_the_real_images():
    """381 images of 348 patients of ChestX-ray14, counted from the table's own list of findings."""
    root = real_data()
    mapping = {"Effusion": "Pleural Effusion", "Infiltration": "Lung Opacity", "Pleural_Thickening": "Pleural Other"}
    csv = CsvSource(
        table=root / "metadata.csv",
        **COLUMNS,
        where={"patient_id": "nih-"},
        findings="findings",
        label_map={**mapping, "Mass": "Lung Lesion", "Nodule": "Lung Lesion"},
    )
    rows = read_csv_source(DataConfig(source="csv", root=root, work_dir=root, csv=csv)).on_disk(root)
    assert len(rows) == 381
    assert rows.frame["patient_id"].nunique() == 348
    positives = {name: int((rows.frame[name] == 1).sum()) for name in LABELS if rows.frame[name].notna().any()}
    lines = (root / "metadata.csv").read_text(encoding="utf-8").splitlines()
    lists = [line.split(",")[6].split("|") for line in lines if line.startswith("nih-")]
    lesions = sum("Mass" in names or "Nodule" in names for names in lists)
    assert positives == {
        **{name: sum(name in names for names in lists) for name in positives},
        **{label: sum(name in names for names in lists) for name, label in mapping.items()},
        "Lung Lesion": lesions,
    }
    assert positives["Pneumonia"] == 251
    (unused,) = (note for note in rows.notes if note.startswith("columns not used: license, source_url"))
    assert rows.notes == {
        **{f"finding not mapped: {name}": count for name, count in (("Emphysema", 10), ("Fibrosis", 8), ("Hernia", 3))},
        unused: 10,
    }


def test_a_column_that_looks_like_a_findings_is_asked_about(tmp_path):
    for name in ("effusion", "Pleural_Thickening", "Lung opacities?", "lung nodule"):
        with pytest.raises(DataError, match=r"column '.*' holds 0, 1 like a finding's and is none of the 14 labels"):
            read_csv_source(wide(tmp_path, f"Edema,{name}", "1,0", "0,1"))
        assert labels(read_csv_source(wide(tmp_path, f"Edema,{name}", "1,0", "0,1", ignore=(name,))), "Edema") == [1, 0]
        mapped = read_csv_source(
            wide(tmp_path, f"Edema,{name}", "1,0", "0,1", label_map={name.upper(): "Pleural Other"})
        )
        assert labels(mapped, "Pleural Other") == [0, 1]
    # Other values, or another name, are no finding's; they are told of.
    rows = read_csv_source(wide(tmp_path, "Edema,effusion side,follow_up", "1,left,1", "0,,0"))
    assert rows.notes == {"columns not used: effusion side, follow_up": 2}
    with pytest.raises(DataError, match=r"lacks the column\(s\) nodule of data\.csv\.ignore"):
        read_csv_source(wide(tmp_path, "Edema", "1", ignore=("nodule",)))


def listed(tmp_path, *cells, **changes):
    content = "patient_id,study_id,image_file,findings\n"
    content += "".join(f"p{n},s{n},{n}.jpg,{cell}\n" for n, cell in enumerate(cells))
    return read_csv_source(source(tmp_path, content, **dict.fromkeys(COLUMNS), **changes))


def test_findings_as_lists_of_python(tmp_path):
    rows = listed(tmp_path, "\"['Edema', 'pleural effusion']\"", "[]", '"[""Fracture""]"', "Edema|Fracture")
    assert labels(rows, "Edema") == [1, 0, 0, 1]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0, 0]
    assert labels(rows, "Fracture") == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"row 3, column 'findings': '\[Edema\]' is no list of texts in quotes"):
        listed(tmp_path, "Edema", "[Edema]")


def test_findings_of_which_none_is_known(tmp_path):
    with pytest.raises(DataError, match=r"none of its 2 names is one of the 14 labels: 'Edema;Fracture', 'dx'"):
        listed(tmp_path, "Edema;Fracture", "dx")
    assert labels(listed(tmp_path, "Edema;Fracture", "dx;", findings_separator=";"), "Edema") == [1, 0]


def test_names_are_mapped_whatever_their_case(tmp_path):
    rows = listed(tmp_path, "EFFUSION|edema", "effusion", label_map={"Effusion": "Pleural Effusion"})
    assert labels(rows, "Pleural Effusion") == [1, 1]
    assert labels(rows, "Edema") == [1, 0]


def test_no_image_lies_outside_the_root(tmp_path):
    content = "patient_id,study_id,image_file,findings\np,s,a/../b.jpg,Edema\nq,t,{},Edema\n"
    for path in ("../secret.jpg", "a/../../secret.jpg", "..", "/etc/passwd", f"{tmp_path}/../x.jpg"):
        with pytest.raises(DataError, match=r"row 3, column 'image_file': '.*' does not lie under data\.root"):
            read_csv_source(source(tmp_path, content.format(path), **dict.fromkeys(COLUMNS)))
    frame = read_csv_source(source(tmp_path, content.format("x..y/c.jpg"), **dict.fromkeys(COLUMNS))).frame
    assert frame["path"].tolist() == ["a/../b.jpg", "x..y/c.jpg"]


def test_a_name_with_a_carriage_return_is_refused(tmp_path):
    line = {"patient_id": "p", "study_id": "s", "image_file": "Icon\rx.jpg", "findings": "Edema"}
    path = tmp_path / "films.jsonl"
    path.write_text(json.dumps(line) + "\n")
    csv = CsvSource(table=path, findings="findings", image="image_file")
    with pytest.raises(DataError, match=r"row 1, column 'image_file': 'Icon.rx\.jpg' has a control character"):
        read_csv_source(DataConfig(source="csv", root=tmp_path, work_dir=tmp_path, csv=csv))


def test_dropped_rows_are_counted_with_examples(tmp_path):
    rows = read_csv_source(source(tmp_path, where={"patient_id": "nih-"}))
    assert rows.examples == {"not matching data.csv.where": ["e.jpg"], "not labelled": ["d.jpg"]}
    assert rows.read == len(rows) + sum(rows.dropped.values()) == 5


@pytest.mark.parametrize("word", ["nan", "None", "NA", "NULL", "n/a", "<NA>"])
def test_a_word_for_nothing_is_no_report_view_or_list(tmp_path, word):
    content = LISTED.replace("A note,\nin two lines", word).replace(",AP,,f", f",{word},,{word}")
    content = content.replace(",,,,test", f",,{word},,test")
    rows = read_csv_source(source(tmp_path, content))
    assert rows.frame["text"].tolist() == ["", "", "", ""]
    assert rows.frame["view"].tolist() == ["PA", "AP", "", "PA"]
    assert rows.frame["sex"].tolist() == ["M", "M", "", "F"]
    assert rows.dropped == {"not labelled": 1}
    record = {"uid": "1", "note": word, "gold": ["Edema"]}
    assert read_csv_source(json_lines(tmp_path, [record], sex=None)).frame["text"].tolist() == [""]
    for column in ("patient_id", "study_id"):
        with pytest.raises(DataError, match=rf"row 3: column '{column}' is empty"):
            read_csv_source(
                source(tmp_path, LISTED.replace("nih-01,s2", {"patient_id": f"{word},s2"}.get(column, f"x,{word}")))
            )


def test_a_word_for_nothing_may_be_mapped(tmp_path):
    rows = listed(tmp_path, "None", "Edema", label_map={"none": "No Finding"})
    assert labels(rows, "No Finding") == [1, 0]


@pytest.mark.parametrize(
    "cell",
    [
        "\"['Edema' 'Fracture']\"",
        "\"('Edema', 'Fracture')\"",
        "\"{'Fracture', 'Edema'}\"",
        "\"['edema',\n 'FRACTURE',]\"",
    ],
)
def test_findings_as_other_lists_of_texts(tmp_path, cell):
    rows = listed(tmp_path, cell, "Edema", "[]", "()")
    assert labels(rows, "Edema") == [1, 1, 0, 0]
    assert labels(rows, "Fracture") == [1, 0, 0, 0]


@pytest.mark.parametrize("separator", [";", ", ", "/", "; "])
def test_names_separated_otherwise_are_no_absence(tmp_path, separator):
    cell = f'"Edema{separator}Fracture"'
    with pytest.raises(DataError, match=r"row 3, column 'findings': 'Edema.*Fracture' looks like several findings"):
        listed(tmp_path, "Edema", cell)
    rows = listed(tmp_path, "Edema", cell, findings_separator=separator.strip())
    assert labels(rows, "Edema") == [1, 1]


@pytest.mark.parametrize(
    ("name", "label"),
    [("effusion", "Pleural Effusion"), ("left pneumothorax", "Pneumothorax"), ("Normal", "No Finding")],
)
def test_a_name_like_a_label_is_no_absence_of_it(tmp_path, name, label):
    with pytest.raises(DataError, match=rf"row 2, column 'findings': '{name}' looks like the label '{label}'"):
        listed(tmp_path, name, label, label_map={})
    assert labels(listed(tmp_path, name, label, label_map={name: label}), label) == [1, 1]
    assert labels(listed(tmp_path, name, label, label_map={}, ignore=(name,)), label) == [0, 1]
    rows = listed(tmp_path, f"{name}|Edema", "Edema", label_map={})  # of a label that is not covered: empty in all rows
    assert labels(rows, label) == [9, 9]
    assert rows.notes == {f"finding not mapped: {name}": 1}


@pytest.mark.parametrize(("yes", "no"), [("yes", "no"), ("TRUE", "FALSE"), ("Positive", "Negative"), ("1", "")])
def test_a_finding_answered_in_words_is_asked_about(tmp_path, yes, no):
    with pytest.raises(
        DataError, match=r"column 'effusion' holds .* it looks like 'Pleural Effusion': say which it is"
    ):
        read_csv_source(wide(tmp_path, "Edema,effusion", f"1,{yes}", f"0,{no}"))


def test_a_column_of_texts_that_sounds_like_a_finding_is_told_of(tmp_path, caplog):
    rows = read_csv_source(wide(tmp_path, "Edema,effusion side,scanner", "1,left,A", "0,,B"))
    assert "column 'effusion side' sounds like 'Pleural Effusion' and is not read" in caplog.text
    assert "'scanner'" not in caplog.text
    assert rows.notes == {"columns not used: effusion side, scanner": 2}
    caplog.clear()
    rows = read_csv_source(wide(tmp_path, "Edema,effusion side,scanner", "1,left,A", "0,,B", ignore=("effusion side",)))
    assert caplog.text == ""
    assert rows.notes == {"columns not used: scanner": 1}


def test_two_columns_for_one_label(tmp_path):
    for one, other in (("Edema", "EDEMA"), ("Lung Opacity", "airspace_opacity")):
        with pytest.raises(DataError, match=rf"columns '{one}' and '{other}' both stand for"):
            read_csv_source(wide(tmp_path, f"{one},{other}", "1,0"))
        label = one
        assert labels(read_csv_source(wide(tmp_path, f"{one},{other}", "0,1", ignore=(other,))), label) == [0]
    with pytest.raises(DataError, match="in two spellings, for two labels"):
        listed(tmp_path, "x", label_map={"x": "Edema", "X": "Fracture"})


def test_one_image_under_two_names(tmp_path):
    content = "patient_id,study_id,image_file,findings\np,s,x/a.jpg,Edema\nq,t,{},Edema\n"
    for path in ("./x/a.jpg", "x//a.jpg", "x/../x/a.jpg", f"{tmp_path.resolve()}/x/a.jpg"):
        with pytest.raises(DataError, match=r"image 'x/a\.jpg' in row 2 and '.*' in row 3 are one file"):
            read_csv_source(source(tmp_path, content.format(path), **dict.fromkeys(COLUMNS)))
    # Where case counts these are two files; where it does not, or one links to the other, one.
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").touch()
    if not (tmp_path / "x" / "A.jpg").exists():
        assert len(read_csv_source(source(tmp_path, content.format("x/A.jpg"), **dict.fromkeys(COLUMNS)))) == 2
        (tmp_path / "x" / "A.jpg").symlink_to("a.jpg")
    with pytest.raises(DataError, match="are one file"):
        read_csv_source(source(tmp_path, content.format("x/A.jpg"), **dict.fromkeys(COLUMNS)))


def test_line_breaks_in_values_are_blanks(tmp_path):
    record = {"uid": "1", "film": "a.jpg", "edema": 1, "view": "PA\r\nerect", "sex": "f\r"}
    rows = read_csv_source(
        json_lines(tmp_path, [record], image="film", findings=None, label_map={}, view="view", text=None)
    )
    assert rows.frame[["view", "sex"]].to_numpy().tolist() == [["PA ERECT", "F"]]


def test_json_lines_may_be_packed(tmp_path):
    config = json_lines(tmp_path, RECORDS)
    packed = tmp_path / "films.jsonl.gz"
    packed.write_bytes(gzip.compress(config.csv.table.read_bytes()))
    rows = read_csv_source(config.model_copy(update={"csv": config.csv.model_copy(update={"table": packed})}))
    assert rows.frame["image_id"].tolist() == ["1", "2", "5"]


def test_rows_that_nobody_labelled_are_kept_without_an_answer(tmp_path):
    rows = csv_source.read_csv_source(source(tmp_path, where={"patient_id": "nih-"}))
    assert rows.dropped == {"not matching data.csv.where": 1}
    frame = rows.frame.set_index("image_id")
    assert frame.loc["d.jpg", list(LABELS)].isna().all()
    assert frame.loc["a.jpg", "Pleural Effusion"] == 1
    rows = csv_source.read_csv_source(json_lines(tmp_path, RECORDS))
    assert rows.frame["Edema"].fillna(9).tolist() == [1, 0, 9, 9, 0]


@pytest.mark.parametrize(
    ("column", "meaning", "expected"),
    [
        ("No Finding", None, [1, 9, 0]),
        ("No Finding", "absent", [1, 0, 0]),
        ("Edema", "not labelled", [1, 9, 0]),
        ("Edema", "absent", [1, 0, 0]),
    ],
)
def test_a_row_of_empty_cells_is_what_the_table_says_or_the_user(tmp_path, column, meaning, expected):
    got = csv_source.read_csv_source(wide(tmp_path, column, "1", "", "0", blank_rows=meaning))
    assert labels(got, column) == expected


def test_a_row_of_empty_cells_is_asked_about_where_no_column_says_that_nothing_is_there(tmp_path):
    with pytest.raises(DataError, match=r"2 row\(s\), such as row 3, have no value .* set data\.csv\.blank_rows"):
        csv_source.read_csv_source(wide(tmp_path, "Edema", "1", "", ""))
