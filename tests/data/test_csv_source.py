"""The source `csv`: findings in a list or a column each, filters, and tables at odds with the configuration."""

import os
from pathlib import Path

import numpy as np
import pytest

from mlx_cxr.config_sections import CsvSource, DataConfig
from mlx_cxr.data.csv_source import read_csv_source
from mlx_cxr.data.tables import DataError
from mlx_cxr.labels import LABELS

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


def labels(rows, name):
    return rows.frame[name].fillna(9).tolist()


def test_listed_findings(tmp_path):
    rows = read_csv_source(source(tmp_path, where={"patient_id": "nih-"}))
    frame = rows.frame
    assert (rows.read, rows.dropped) == (5, {"not matching data.csv.where": 1, "no findings given": 1})
    assert frame["image_id"].tolist() == frame["path"].tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert frame[["view", "age", "sex"]].to_numpy().tolist() == [["PA", "58", "M"], ["AP", "", "M"], ["AP", "", "F"]]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0]
    assert labels(rows, "Lung Lesion") == [1, 0, 1]
    assert labels(rows, "No Finding") == [0, 1, 0]
    assert labels(rows, "Edema") == [0, 0, 1]  # one of the 14 counts as itself, and so is covered
    assert labels(rows, "Fracture") == [9, 9, 9]  # not covered: no information
    assert rows.notes == {"finding not mapped: Hernia": 1, "ages not usable": 1}
    assert frame["split"].tolist() == ["", "", ""]
    assert list(frame.columns[-14:]) == list(LABELS)
    assert frame["Edema"].dtype == np.float32


def test_labels_covered_are_zero_where_not_listed(tmp_path):
    rows = read_csv_source(source(tmp_path, labels_covered=("Fracture", "Pleural Effusion")))
    assert labels(rows, "Fracture") == [0, 0, 0, 0]
    assert labels(rows, "Pleural Effusion") == [1, 0, 0, 0]
    assert labels(rows, "Lung Lesion") == [9, 9, 9, 9]


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
    assert frame[["patient_id", "study_id"]].to_numpy().tolist() == [["007", "1.0"]] * 2
    with pytest.raises(DataError, match=r"image 'a\.jpg' appears twice, in rows 2 and 3"):
        read_csv_source(source(tmp_path, content.replace("b.jpg", "a.jpg"), **dict.fromkeys(COLUMNS)))
    with pytest.raises(DataError, match="row 3: column 'patient_id' is empty"):
        read_csv_source(source(tmp_path, content.replace("\n007,1.0,b", "\n,1.0,b"), **dict.fromkeys(COLUMNS)))


def test_films_of_a_study_that_disagree(tmp_path):
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


def test_the_real_films():
    """381 films of 348 patients of ChestX-ray14, counted from the table's own list of findings."""
    root = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[3] / "shared" / "realcxr"))
    if not (root / "metadata.csv").is_file():
        pytest.skip("the real films (shared/realcxr) are not on this machine")
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
    assert rows.notes == {
        f"finding not mapped: {name}": count for name, count in (("Emphysema", 10), ("Fibrosis", 8), ("Hernia", 3))
    }
