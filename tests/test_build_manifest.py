"""The stage: from raw tables to a manifest that the next stage reads, with everything left out accounted for."""

import json
import shutil

import numpy as np
import pytest
from mimic_tree import Study, write_tree

from mlx_cxr import build_manifest
from mlx_cxr.core.config import load_config
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import RunExistsError, create_run
from mlx_cxr.data.manifest import check_patient_splits, load_manifest
from mlx_cxr.data.reports import section_texts
from mlx_cxr.data.study_reports import load_reports
from mlx_cxr.data.tables import DataError


def studies(n=60):
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        patient = str(10000000 + 97 * (i // 2))
        split = ("train", "train", "train", "validate", "test")[(i // 2) % 5]
        labels = {name: rng.choice(["1.0", "0.0", "-1.0", ""]) for name in LABELS}
        report = f" FINDINGS: Film {i}.\n\n IMPRESSION: 1. No edema in film {i}." if i % 4 else None
        out.append(Study(patient, str(50000000 + i), ["PA", "LATERAL"][: 1 + i % 2], split, labels, report))
    # Of the training with a report, of the training without one, and of validation.
    out[3].labels = out[4].labels = out[7].labels = None
    return out


@pytest.fixture
def config_file(tmp_path):
    root = write_tree(tmp_path / "raw", studies())
    path = tmp_path / "c.yaml"
    path.write_text(f"name: t\ndata:\n  synthetic: true\n  root: {root}\n  work_dir: {tmp_path / 'work'}\n")
    return path


def summary_of(path):
    return json.loads(path.with_name("manifest_summary.json").read_text())


def test_from_tables_to_manifest(config_file, caplog):
    caplog.set_level("INFO", "mlx_cxr")
    path = build_manifest.run(load_config(config_file))
    manifest = load_manifest(path)
    check_patient_splits(manifest.frame)
    assert len(manifest) == 58
    assert not manifest.labelled[manifest.frame["study_id"] == "50000003"].any()
    assert manifest.labelled.sum() == 57
    row = manifest.frame.set_index("study_id").loc["50000005"]
    assert row["text"] == "No edema in film 5."
    source = studies()[5]
    assert [row[name] for name in LABELS if source.labels[name]] == [
        float(value) for value in source.labels.values() if value
    ]
    summary = summary_of(path)
    assert summary["images_read"] == 90 == len(manifest) + sum(summary["dropped"].values())
    assert summary["dropped"] == {
        "view not wanted": 30, "no labels to score by": 1, "no labels and no report": 1,
    }  # fmt: skip
    assert summary["notes"] == {"images without labels kept for their reports": 1}
    assert summary["dropped_examples"] == {
        "view not wanted": ["50000001-1", "50000003-1", "50000005-1"],
        "no labels to score by": ["50000007-0"],
        "no labels and no report": ["50000004-0"],
    }
    assert summary["manifest_sha256"] == manifest.sha256
    assert summary["reports"]["found"] == 44
    assert summary["reports"]["text_from"] == {"impression": 44}
    reports = load_reports(path.with_name("reports.csv"), manifest)
    assert dict(reports.sections) == {
        study.study: section_texts(study.report) for study in studies() if study.report and study.study != "50000007"
    }
    assert summary["reports_sha256"] == reports.sha256
    assert json.loads(path.with_name("splits.json").read_text())["reports_sha256"] == reports.sha256
    split_of = dict(zip(manifest.frame["study_id"], manifest.frame["split"], strict=True))
    in_train = sum(split_of[study] == "train" for study in reports.sections)
    for name in ("any", "findings", "impression", "last_paragraph", "whole"):
        assert summary["report_sections"][name]["train"] == in_train
    for name in ("indication", "findings and impression in one"):
        assert set(summary["report_sections"][name].values()) == {0}
    edema = summary["labels"]["Edema"]["train"]
    train = manifest.raw_labels[(manifest.frame["split"] == "train").to_numpy(), LABELS.index("Edema")]
    assert edema == {
        **{text: int((train == value).sum()) for text, value in (("1", 1), ("0", 0), ("-1", -1))},
        "empty": int(np.isnan(train).sum()),
    }
    assert set(summary["provenance"]["inputs"]) == {"metadata", "split", "labels"}
    text = path.with_name("manifest_summary.md").read_text()
    assert "Synthetic" in text
    assert "Not for clinical use" in text
    assert "| no labels and no report |      1 |                         50000004-0 |" in text
    assert text in caplog.text


def test_same_input_and_seed_same_bytes_and_a_moved_cohort_too(config_file, tmp_path):
    first = build_manifest.run(load_config(config_file, data__n_studies=30)).read_bytes()
    assert build_manifest.run(load_config(config_file, data__n_studies=30)).read_bytes() == first
    shutil.move(tmp_path / "raw", tmp_path / "moved")
    moved = load_config(config_file, [f"data.root={tmp_path / 'moved'}"], data__n_studies=30)
    assert build_manifest.run(moved).read_bytes() == first
    assert build_manifest.run(load_config(config_file, [f"data.root={tmp_path / 'moved'}"])).read_bytes() != first


def test_a_sample_keeps_patients_whole(config_file):
    everything = load_manifest(build_manifest.run(load_config(config_file))).frame
    path = build_manifest.run(load_config(config_file, data__n_studies=30, seed=4))
    sample = load_manifest(path).frame
    assert abs(sample["study_id"].nunique() - 30) <= 3
    whole = everything[everything["patient_id"].isin(sample["patient_id"])]
    assert sorted(whole["image_id"]) == sorted(sample["image_id"])
    summary = summary_of(path)
    # Study 4, without labels and report, is in the sample or is not.
    dropped = summary["dropped"]
    assert dropped["not in the sample"] + dropped.get("no labels and no report", 0) == len(everything) + 1 - len(sample)
    assert summary["sample"]["studies_before"] == 59
    splits = json.loads(path.with_name("splits.json").read_text())
    assert splits["seed"] == 4
    assert splits["split_from"] == "of the source"
    assert splits["manifest_sha256"] == summary["manifest_sha256"]
    assert splits["splits"]["train"]["patient_ids"] == sorted(set(sample.loc[sample["split"] == "train", "patient_id"]))


def test_a_patient_in_two_splits_of_the_source(tmp_path, config_file):
    leaky = studies()
    leaky[6].split = "test"
    shutil.rmtree(tmp_path / "raw")
    write_tree(tmp_path / "raw", leaky)
    with pytest.raises(DataError, match="10000291 in "):
        build_manifest.run(load_config(config_file))
    assert not (tmp_path / "work" / "manifest.csv").exists()


def csv_config(tmp_path, n=40):
    said = [("Edema" if i % 3 else "No Finding", "1. No edema" if i % 5 else "") for i in range(n)]
    rows = [f"p{i // 2},{i}.jpg,{finding},{note}" for i, (finding, note) in enumerate(said)]
    (tmp_path / "t.csv").write_text("\n".join(["patient_id,image_file,findings,note", *rows]) + "\n")
    for i in range(n - 1):
        (tmp_path / f"{i}.jpg").touch()
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: t\ndata:\n  source: csv\n  root: {tmp_path}\n  work_dir: {tmp_path / 'work'}\n"
        f"  csv: {{table: {tmp_path / 't.csv'}, study: null, text: note, findings: findings}}\n"
    )
    return path


def test_a_table_without_split(tmp_path):
    path = build_manifest.run(load_config(csv_config(tmp_path)))
    frame = load_manifest(path).frame
    check_patient_splits(frame)
    by_split = frame.groupby("split")["patient_id"].nunique()
    assert by_split.to_dict() == {"train": 13, "validate": 3, "test": 4}
    assert frame.set_index("image_id").loc["1.jpg", "text"] == "No edema"
    summary = summary_of(path)
    assert summary["dropped"] == {"no film on disk": 1}
    assert summary["split_from"] == "made by patient"
    assert summary["reports"]["found"] == 31


def test_a_cohort_that_loses_its_reports_loses_reports_csv(config_file, tmp_path):
    path = build_manifest.run(load_config(config_file))
    assert path.with_name("reports.csv").exists()
    for report in (tmp_path / "raw").rglob("s*.txt"):
        report.unlink()
    build_manifest.run(load_config(config_file))
    assert not path.with_name("reports.csv").exists()
    assert summary_of(path)["reports_sha256"] is None
    assert "Sections of the reports" not in path.with_name("manifest_summary.md").read_text()


def test_reports_without_images(tmp_path):
    said = ["Edema." if i % 3 else "" for i in range(30)]
    records = [
        {"uid": f"r{i}", "impression": text, "why": "XXXX.", "gold": ["Edema"] * (i % 3)} for i, text in enumerate(said)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: t\ndata:\n  source: csv\n  root: {tmp_path / 'nowhere'}\n  work_dir: {tmp_path / 'work'}\n"
        f"  csv:\n    table: {tmp_path / 't.jsonl'}\n    patient: uid\n    study: uid\n    image: null\n"
        "    findings: gold\n    sections: {indication: why, impression: impression}\n"
    )
    config = load_config(path)
    manifest = load_manifest(build_manifest.run(config))
    assert manifest.text_only
    assert manifest.frame["split"].value_counts().to_dict() == {"train": 19, "test": 6, "validate": 5}
    assert manifest.frame["text"].value_counts().to_dict() == {"Edema.": 20, "": 10}
    reports = load_reports(config.reports_path, manifest)
    # "XXXX." in the indication of the others is a report, in which nothing is left.
    assert len(reports.sections) == 30
    assert [reports.sections["r0"][name] for name in ("indication", "impression", "whole")] == ["", "", ""]
    assert reports.sections["r1"]["whole"] == "IMPRESSION: Edema."
    summary = summary_of(config.manifest_path)
    assert summary["text_only"]
    assert sum(summary["report_sections"]["impression"].values()) == 20
    text = config.manifest_path.with_name("manifest_summary.md").read_text()
    assert "30 reports read, 30 kept." in text
    assert "images" not in text
    assert "Views" not in text


def test_another_seed_another_split(tmp_path):
    config = csv_config(tmp_path)
    first, second = (
        load_manifest(build_manifest.run(load_config(config, seed=seed))).frame["split"].tolist() for seed in (0, 1)
    )
    assert first != second


def test_the_command_line(config_file, tmp_path, capsys):
    build_manifest.main(["--config", str(config_file), "--n_studies", "20", "--seed", "7"])
    sample = tmp_path / "work" / "sample_20_seed7"
    summary = summary_of(sample / "manifest.csv")
    assert summary["provenance"]["config"]["data"]["n_studies"] == 20
    assert summary["seed"] == 7
    (tmp_path / "raw" / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(SystemExit) as stopped:
        build_manifest.main(["--config", str(config_file)])
    assert stopped.value.code == 2
    assert "lacks mimic-cxr-2.*-split.csv.gz; tables there:" in capsys.readouterr().err
    assert (sample / "manifest.csv").exists()


def test_samples_live_side_by_side(config_file, tmp_path):
    for arguments in (["--n_studies", "20"], ["--n_studies", "10"], ["--n_studies", "20", "--seed", "3"], []):
        build_manifest.main(["--config", str(config_file), *arguments])
    folders = [path.parent.relative_to(tmp_path / "work").as_posix() for path in tmp_path.glob("work/**/manifest.csv")]
    assert sorted(folders) == [".", "sample_10_seed0", "sample_20_seed0", "sample_20_seed3"]
    assert len({path.read_bytes() for path in tmp_path.glob("work/**/manifest.csv")}) == 4


def test_a_manifest_that_runs_were_trained_on_is_kept(config_file, tmp_path):
    config = load_config(config_file, [f"outputs={tmp_path / 'outputs'}"])
    path = build_manifest.run(config)
    create_run(config.outputs, "trained", stage="train_cnn", config={}, inputs={"manifest": path})
    before = path.read_bytes()
    build_manifest.run(config)
    other = config.model_copy(update={"data": config.data.model_copy(update={"views": None})})
    with pytest.raises(RunExistsError, match=r"manifest\.csv is what .*outputs/trained were trained on.*--overwrite"):
        build_manifest.run(other)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.glob(".*")] == []
    build_manifest.run(other, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("name", ["manifest.csv", "reports.csv", "splits.json"])
def test_files_that_were_not_made_together_are_refused(config_file, name):
    path = build_manifest.run(load_config(config_file)).with_name(name)
    content = path.read_bytes()
    place = content.rindex(b"e")
    path.write_bytes(content[:place] + b"a" + content[place + 1 :])
    with pytest.raises(DataError, match="run build_manifest again"):
        load_reports(path.with_name("reports.csv"), load_manifest(path.with_name("manifest.csv")))


def test_source_tables(config_file, tmp_path):
    names = [path.name for path in build_manifest.source_tables(load_config(config_file))]
    assert names == [f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("metadata", "split", "chexpert")]
    assert build_manifest.source_tables(load_config(csv_config(tmp_path))) == [tmp_path / "t.csv"]


def test_an_empty_split_is_said(tmp_path, caplog):
    root = write_tree(tmp_path / "raw", [study for study in studies() if study.split != "validate"])
    path = tmp_path / "c.yaml"
    path.write_text(f"name: t\ndata:\n  root: {root}\n  work_dir: {tmp_path / 'work'}\n")
    build_manifest.run(load_config(path))
    assert "no film is in split 'validate'" in caplog.text


def test_a_split_can_be_made_where_the_source_leaves_one_empty(tmp_path):
    only_train = [study for study in studies() if study.split == "train"]
    root = write_tree(tmp_path / "raw", only_train)
    path = tmp_path / "c.yaml"
    path.write_text(f"name: t\ndata:\n  root: {root}\n  work_dir: {tmp_path / 'work'}\n  split: made\n")
    manifest = load_manifest(build_manifest.run(load_config(path)))
    check_patient_splits(manifest.frame)
    patients = manifest.frame.drop_duplicates("patient_id")["split"].value_counts()
    assert patients.sum() == 18
    # 15 % and 20 % of 18, to within a patient, as labels are spread too.
    assert abs(patients["validate"] - 2.7) <= 1
    assert abs(patients["test"] - 3.6) <= 1
