"""The source `mimic-cxr-jpg`: joins, views, partial downloads, versions, and tables that contradict themselves."""

import gzip
import re

import pytest
from mimic_tree import Study, read_lines, write_table, write_tree

from mlx_cxr.core.config_schema import DataConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data import mimic
from mlx_cxr.data.mimic import find_tables
from mlx_cxr.data.source_rows import labelled
from mlx_cxr.data.tables import DataError

STUDIES = [
    Study("10000032", "50414267", ["PA", "LATERAL"], labels={"Edema": "1.0", "No Finding": "-1.0"}),
    Study("10000032", "53189527", ["PA", "pa"], labels={"Edema": "0.0"}),
    Study("11000045", "50000001", ["AP", ""], "validate", {"Fracture": "1.0"}),
    Study("19000099", "59999999", ["AP"], "test", None),
]


@pytest.fixture
def root(tmp_path):
    return write_tree(tmp_path / "raw", STUDIES)


def data(root, **changes):
    return DataConfig(root=root, work_dir=root.parent / "work", **changes)


def rewrite(path, old, new):
    """Replace text in a table, once, wherever it stands."""
    lines = read_lines(path)
    place = next(i for i, line in enumerate(lines) if old in line)
    lines[place] = lines[place].replace(old, new, 1)
    write_table(path, lines)
    return place + 1


def read_mimic(data):
    """The labelled rows; a study without a label row has a test of its own."""
    rows = mimic.read_mimic(data)
    return rows.keep(labelled(rows.frame), "no label row")


def test_a_study_without_a_label_row_is_kept_without_an_answer(root):
    rows = mimic.read_mimic(data(root))
    assert rows.dropped == {"view not wanted": 2}
    frame = rows.frame.set_index("image_id")
    assert frame.loc["59999999-0", list(LABELS)].isna().all()
    assert frame.loc["59999999-0", "patient_id"] == "19000099"
    assert frame["Edema"].fillna(9).tolist() == [1.0, 0.0, 0.0, 9.0, 9.0]


def test_rows_paths_labels_and_counts(root):
    rows = read_mimic(data(root))
    frame = rows.frame.set_index("image_id")
    assert rows.read == 7
    assert rows.dropped == {"view not wanted": 2, "no label row": 1}
    assert frame.index.tolist() == ["50414267-0", "53189527-0", "53189527-1", "50000001-0"]
    first = frame.loc["50414267-0"]
    assert first["path"] == "files/p10/p10000032/s50414267/50414267-0.jpg"
    assert (first["patient_id"], first["split"], first["view"], first["age"]) == ("10000032", "train", "PA", "")
    assert (first["Edema"], first["No Finding"]) == (1.0, -1.0)
    assert first[["Fracture"]].isna().all()
    assert frame["Edema"].fillna(9).tolist() == [1.0, 0.0, 0.0, 9.0]
    assert frame["split"].tolist() == ["train", "train", "train", "validate"]


def test_missing_views_on_request(root):
    assert read_mimic(data(root, views=("missing", "lateral"))).frame["view"].tolist() == ["LATERAL", ""]
    assert len(read_mimic(data(root, views=None)).frame) == 6
    with pytest.raises(DataError, match=r"no film has a view of data\.views \['LL'\].*PA \(3\).*missing \(1\)"):
        read_mimic(data(root, views=("LL",)))


def test_partial_download(root):
    (root / "files/p10/p10000032/s53189527/53189527-1.jpg").unlink()
    for image in (root / "files/p11").rglob("*.jpg"):
        image.unlink()
    rows = read_mimic(data(root)).on_disk(root)
    assert rows.dropped["no film on disk"] == 2
    assert rows.frame["image_id"].tolist() == ["50414267-0", "53189527-0"]


def test_no_image_at_all_names_the_first_looked_for(root):
    (root / "files").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"none of 4 films is on disk.*files/p10/p10000032/s50414267/50414267-0\.jpg"):
        read_mimic(data(root)).on_disk(root)


def test_the_newest_version_that_is_whole_is_taken(root):
    assert {path.name[:15] for path in find_tables(root, "chexpert").values()} == {"mimic-cxr-2.0.0"}
    for name in ("metadata", "split"):
        write_table(root / f"mimic-cxr-2.1.0-{name}.csv", read_lines(root / f"mimic-cxr-2.0.0-{name}.csv.gz"))
    assert {path.name[:15] for path in find_tables(root, "chexpert").values()} == {"mimic-cxr-2.0.0"}
    write_table(root / "mimic-cxr-2.1.0-chexpert.csv", read_lines(root / "mimic-cxr-2.0.0-chexpert.csv.gz"))
    assert find_tables(root, "chexpert") == {
        "metadata": root / "mimic-cxr-2.1.0-metadata.csv",
        "split": root / "mimic-cxr-2.1.0-split.csv",
        "labels": root / "mimic-cxr-2.1.0-chexpert.csv",
    }
    assert len(read_mimic(data(root)).frame) == 4


def test_missing_tables_are_named(root):
    with pytest.raises(DataError, match=r"lacks mimic-cxr-2\.\*-negbio\.csv\.gz; tables there: .*chexpert"):
        read_mimic(data(root, labeler="negbio"))
    with pytest.raises(DataError, match="is not a folder"):
        read_mimic(data(root / "nowhere"))


def test_missing_column_names_those_there(root):
    rewrite(root / "mimic-cxr-2.0.0-metadata.csv.gz", "ViewPosition", "View")
    with pytest.raises(DataError, match=r"metadata\.csv\.gz lacks the column\(s\) ViewPosition.*View, Rows"):
        read_mimic(data(root))


def test_a_misspelt_label_column(root):
    rewrite(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "Pleural Effusion", "Pleural Efusion")
    with pytest.raises(DataError, match="did you mean 'Pleural Efusion' by 'Pleural Effusion'"):
        read_mimic(data(root))


def test_airspace_opacity_is_lung_opacity(root):
    rewrite(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "Lung Opacity", "Airspace Opacity")
    assert "Lung Opacity" in read_mimic(data(root)).frame


def test_label_outside_its_values(root):
    row = rewrite(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "1.0", "2.0")
    with pytest.raises(DataError, match=rf"chexpert\.csv\.gz, row {row}, column 'Edema': label '2.0' is not 1, 0, -1"):
        read_mimic(data(root))


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("metadata", 1, r"metadata\.csv\.gz: image '50414267-0' appears twice, in rows 2 and 9"),
        ("chexpert", 2, r"chexpert\.csv\.gz: study '53189527' appears twice, in rows 3 and 5"),
        ("split", 1, r"split\.csv\.gz: image '50414267-0' appears twice"),
    ],
)
def test_duplicated_ids(root, table, line, message):
    path = root / f"mimic-cxr-2.0.0-{table}.csv.gz"
    lines = read_lines(path)
    write_table(path, [*lines, lines[line]])
    with pytest.raises(DataError, match=message):
        read_mimic(data(root))


def test_ids_saved_as_floats_are_mended_and_others_refused(root):
    path = root / "mimic-cxr-2.0.0-chexpert.csv.gz"
    header, *lines = read_lines(path)
    write_table(path, [header, *(re.sub(r"^(\d+),(\d+)", r"\1.0,\2.0", line) for line in lines)])
    assert read_mimic(data(root)).frame["Edema"].iloc[0] == 1.0
    row = rewrite(path, "53189527.0", "s53189527")
    with pytest.raises(DataError, match=rf"row {row}: study_id 's53189527' is not a number"):
        read_mimic(data(root))


def test_a_table_that_writes_an_id_in_two_ways(root):
    rewrite(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "10000032,50414267", "10000032.0,50414267")
    with pytest.raises(DataError, match=r"subject '10000032\.0' in row \d+ and '10000032' in row \d+ look like one"):
        read_mimic(data(root))


def test_tables_that_disagree_about_a_patient(root):
    rewrite(root / "mimic-cxr-2.0.0-split.csv.gz", "53189527,10000032", "53189527,10000033")
    with pytest.raises(DataError, match=r"subject_id '10000033', but the metadata table has '10000032' for image"):
        read_mimic(data(root))


def test_images_without_a_split_row_are_counted(root):
    path = root / "mimic-cxr-2.0.0-split.csv.gz"
    write_table(path, [line for line in read_lines(path) if not line.startswith("50000001-0")])
    assert read_mimic(data(root)).dropped["no split row"] == 1


def test_a_study_in_two_splits(root):
    row = "53189527-1,53189527,10000032"
    rewrite(root / "mimic-cxr-2.0.0-split.csv.gz", f"{row},train", f"{row},test")
    with pytest.raises(DataError, match=r"films of study '53189527' disagree in split: \['train', 'test'\]"):
        read_mimic(data(root))


def test_an_unknown_split_name(root):
    row = rewrite(root / "mimic-cxr-2.0.0-split.csv.gz", ",validate", ",holdout")
    with pytest.raises(DataError, match=rf"row {row}: split 'holdout' is not train, validate or test"):
        read_mimic(data(root))


def test_age_at_the_study_and_sex(root):
    table = root.parent / "patients.csv.gz"
    # Anchored at 52 in 2180, where the studies are; at 91, MIMIC-IV's code for everyone over 89; and one absent.
    write_table(table, ["subject_id,gender,anchor_age,anchor_year", "10000032,F,50,2178", "11000045,M,91,2170"])
    rows = read_mimic(data(root, views=None, patients_table=table))
    frame = rows.frame.drop_duplicates("patient_id").set_index("patient_id")
    assert frame[["age", "sex"]].to_numpy().tolist() == [["52", "F"], ["91", "M"]]
    write_table(table, ["subject_id,sex,age", "11000045,male,40"])
    rows = read_mimic(data(root, patients_table=table))
    assert rows.frame[["age", "sex"]].drop_duplicates().to_numpy().tolist() == [["", ""], ["40", "M"]]
    assert rows.notes == {"images of patients absent from the patients table": 4}
    write_table(table, ["subject_id,race", "11000045,x"])
    with pytest.raises(DataError, match=r"patients\.csv\.gz has no column gender, sex, anchor_age or age"):
        read_mimic(data(root, patients_table=table))
    with pytest.raises(DataError, match="no such table"):
        read_mimic(data(root, patients_table=root / "gone.csv"))


def test_an_empty_table(root):
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"split\.csv\.gz is empty"):
        read_mimic(data(root))
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"split\.csv\.gz is empty"):
        read_mimic(data(root))


def test_ids_of_all_tables_are_compared_in_one_form(root):
    """Labels with leading zeros, a split list in capitals, patients as floats: nothing is lost."""
    chexpert, split = (root / f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("chexpert", "split"))
    before = read_mimic(data(root))
    header, *lines = read_lines(chexpert)
    write_table(chexpert, [header, *(f"00{line}".replace(",5", ",005", 1) for line in lines)])
    header, *lines = read_lines(split)
    write_table(split, [header, *(re.sub(r"^(\S+?),(\d+),(\d+)", r"'\1,\2.0,\3.0", line) for line in lines)])
    after = read_mimic(data(root))
    assert after.frame.equals(before.frame)
    assert (after.read, after.dropped, after.examples) == (before.read, before.dropped, before.examples)
    assert after.examples["no label row"] == ["59999999-0"]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b"])
def test_an_image_id_leads_nowhere_else(root, name):
    row = rewrite(root / "mimic-cxr-2.0.0-metadata.csv.gz", "53189527-0", name)
    with pytest.raises(DataError, match=rf"metadata\.csv\.gz, row {row}: dicom_id '{name}' is not the name of a file"):
        read_mimic(data(root))


@pytest.mark.parametrize("word", ["nan", "None", "NULL"])
def test_a_word_for_nothing_is_no_view(root, word):
    rewrite(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        "50000001-1,11000045,50000001,CHEST,,",
        f"50000001-1,11000045,50000001,CHEST,{word},",
    )
    assert read_mimic(data(root, views=("missing",))).frame["image_id"].tolist() == ["50000001-1"]
