"""The stage on a cohort of noise images with masks and reports, and runs whose predictions are simulated."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from simulated_runs import NOISE, model, write_run

from mlx_cxr import failure_analysis
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.core.formatting import escaped
from mlx_cxr.core.labels import LABELS, MAPPED, label_index
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import load_manifest, write_manifest
from mlx_cxr.data.places import Places
from mlx_cxr.data.reports import SECTIONS
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.data.study_reports import load_reports, write_reports
from mlx_cxr.data.tables import DataError, unguarded
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.evaluation.scored_runs import ComparisonError
from mlx_cxr.explain.maps import ScaledMaps
from mlx_cxr.inference import explanation
from mlx_cxr.inference.map_fit import MapFit
from mlx_cxr.inference.predictor import write_inference_record
from mlx_cxr.inference.trained_run import TrainedRun
from mlx_cxr.models.convert import save_model
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize
from mlx_cxr.pages import failure_pictures

SIZE, PATIENTS = 32, 16
FILES = {
    *("failures.csv", "failures.json", "relabel.csv", "relabel_key.csv", "confusions.png", "images", "summary.md"),
}
NOTHING, DEVICES = label_index("No Finding"), label_index("Support Devices")


def drawn_in(raw, seed=3):
    """What is truly there: mostly what the label says. No Finding follows from the rest."""
    there = (raw == 1) ^ (np.random.default_rng(seed).random(raw.shape) < 0.1)
    there[:, NOTHING] = ~np.delete(there, (NOTHING, DEVICES), axis=1).any(axis=1)
    return there


def make_cohort(root):
    """Images of the simulated studies, every third study with two; masks by `drawn_in`, on the first image."""
    rng = np.random.default_rng(0)
    predictions = model(NOISE["student"], 12, PATIENTS)
    drawn = drawn_in(predictions.raw_labels)
    rows, reports = [], {}

    def add(ids, split, view, raw, masks, images):
        for image in range(images):
            name = f"{ids[1]}-{image}"
            (root / "files").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (SIZE, SIZE), dtype=np.uint8)).save(root / "files" / f"{name}.png")
            for label in masks if image == 0 else ():
                path = root / "masks" / name / f"{label.replace(' ', '_')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 12)).save(path)
            known = {"age": str(30 + len(rows) % 60), "sex": "FM"[len(rows) % 2], "text": ""}
            row = {"image_id": name, "patient_id": ids[0], "study_id": ids[1], "split": split, "view": view}
            rows.append(row | known | {"path": f"files/{name}.png"} | dict(zip(LABELS, raw, strict=True)))

    for i, study in enumerate(predictions.study_ids.tolist()):
        ids = predictions.patient_ids[i], study
        labels = [label for k, label in enumerate(LABELS) if drawn[i, k] and k != NOTHING]
        add(ids, predictions.split[i], predictions.views[i], predictions.raw_labels[i], labels, 1 + (i % 3 == 0))
        if i % 4:
            said = "Small pleural effusion. " * (i % 2) + "There is no edema. No pneumothorax | fracture."
            reports[study] = dict.fromkeys(SECTIONS, "") | {"findings": said, "whole": said}
    for i in range(20):
        raw = np.where(np.arange(len(LABELS)) == i % 2, 1.0, 0.0)
        add((f"train-p{i}", f"train-s{i}"), "train", "AP", raw, (), 1)
    write_manifest(root / "work" / "manifest.csv", pd.DataFrame(rows))
    write_reports(root / "work" / "reports.csv", reports)


def config_in(root, **changes):
    plain = {
        "name": "toy",
        "run_name": "cnn",
        "outputs": str(root / "outputs"),
        "data": {"synthetic": True, "root": str(root), "work_dir": str(root / "work")},
        "pixels": {"size": SIZE, "workers": 1},
        "model": {"weights": "scratch", "output_stride": 16},
        "evaluation": {"bootstrap_samples": 60, "batch_size": 16},
        "explain": {"method": "grad_cam"},
        "teacher": {"run_name": "teacher"},
        "distillation": {"run_name": "student"},
        "failure": {"examples": 4, "relabel": 20},
    }
    for section, values in changes.items():
        plain[section] = plain.get(section, {}) | values if isinstance(values, dict) else values
    return config_from_plain(plain, "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Cohort and runs; the student has weights (any will do for a map) and what its stage records."""
    root = tmp_path_factory.mktemp("made")
    make_cohort(root)
    config = config_in(root)
    build_store(config.pixels_path, load_manifest(config.manifest_path), Transform(SIZE), root, workers=1)
    sha256 = sha256_file(config.manifest_path)
    for name, seed, more in (("cnn", 10, {}), ("student", 12, {}), ("teacher", 11, {"reads": "findings"})):
        write_run(config.outputs, name, model(NOISE[name], seed, PATIENTS), manifest=sha256, **more)
    network = ResNet18(ResNetConfig(output_stride=16))
    initialize(network, 0)
    save_model(config.run_dir("student") / "best_student.safetensors", network)
    record = {
        "stage": "distillation",
        "config": config.plain(),
        "inputs": {"manifest": {"path": "m", "sha256": sha256}},
    }
    write_record(config.run_dir("student") / "config.json", record)
    references = {"grad_cam": {label: 1 + k for k, label in enumerate(MAPPED)}}
    student = TrainedRun.open(config.run_dir("student"))
    write_inference_record(student, references, images=9)
    fit = MapFit(np.zeros((1, 1, 1)), {"grad_cam": np.zeros((13, 1, 1))}, references, sha256_file(student.checkpoint))
    fit.save(student.folder)
    return root


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "root")


@pytest.fixture(scope="module")
def analysed(made, tmp_path_factory):
    root = shutil.copytree(made, tmp_path_factory.mktemp("analysed") / "root")
    config = config_in(root)
    assert failure_analysis.run(config) == root / "outputs" / "student" / "failure_analysis"
    return config


def folder_of(config):
    return config.run_dir("student") / "failure_analysis"


def without_threshold(config):
    return read_record(folder_of(config) / "failures.json")["counts"]["without_threshold"]


def test_every_file_is_there_and_every_picture_opens_and_is_linked(analysed):
    folder = folder_of(analysed)
    assert {item.name for item in folder.iterdir()} == FILES
    text = (folder / "summary.md").read_text()
    assert "not for clinical use" in text.splitlines()[2]
    links = {folder / link for link in re.findall(r"\]\(([^)]*\.png)\)", text)}
    assert links == {folder / "confusions.png", *folder.glob("images/*.png")}
    assert len(links) == 5
    for path in links:
        with Image.open(path) as picture:
            picture.load()
            assert "not for clinical use" in picture.text["Warning"]


def test_the_table_of_errors_is_that_of_the_predictions(analysed):
    table = pd.read_csv(folder_of(analysed) / "failures.csv", keep_default_na=False)
    scored = pd.read_csv(analysed.run_dir("student") / "predictions.csv", keep_default_na=False)
    validation = scored[scored["split"] == "validate"]
    positives = (validation["raw_label"] == "1").groupby(validation["label"]).sum()
    single = sorted(positives.index[positives == 0])
    assert without_threshold(analysed) == single != []
    wrong = (scored["above_threshold"] == 1) != (scored["raw_label"] == "1")
    scored = scored[(scored["split"] == "test") & wrong & ~scored["label"].isin(single)]
    assert set(zip(table["study_id"], table["label"], strict=True)) == set(
        zip(scored["study_id"], scored["label"], strict=True)
    )
    both = table.merge(scored, on=["study_id", "label"], suffixes=("", "_of_run"))
    assert (both["raw_label"] == both["raw_label_of_run"]).all()
    assert both["probability"].to_numpy() == pytest.approx(both["probability_of_run"].to_numpy(), rel=1e-5)
    teacher = read_predictions(analysed.run_dir("teacher") / "predictions.csv")
    row = table.iloc[0]
    place = teacher.predictions.study_ids.tolist().index(row["study_id"])
    expected = teacher.probabilities[place, label_index(row["label"])]
    assert float(row["teacher_probability"]) == pytest.approx(expected, rel=1e-5)
    frame = load_manifest(analysed.manifest_path).frame.drop_duplicates("study_id").set_index("study_id")
    for row in table.head(20).to_dict("records"):
        known = frame.loc[row["study_id"]]
        assert (row["patient_id"], row["sex"]) == (known["patient_id"], known["sex"])
        assert str(row["age"]) == known["age"]
        low = int(row["age"]) // 20 * 20
        assert row["age_band"] == ("80+" if low == 80 else f"{low}-{low + 19}")


def test_labels_are_checked_against_what_was_drawn(analysed):
    check = read_record(folder_of(analysed) / "failures.json")["drawing"]
    scored = read_predictions(analysed.run_dir("student") / "predictions.csv").predictions
    drawn, test = drawn_in(scored.raw_labels), scored.split == "test"
    wrong = drawn[test] != (scored.raw_labels[test] == 1)
    wrong[:, [label_index(label) for label in without_threshold(analysed)]] = False
    assert check["categories"]["all pairs"]["wrong_labels"] == wrong.sum() > 20
    table = pd.read_csv(folder_of(analysed) / "failures.csv")
    row_of = {study: row for row, study in enumerate(scored.study_ids.tolist())}
    there = [drawn[row_of[s], label_index(k)] for s, k in zip(table["study_id"], table["label"], strict=True)]
    assert (table["drawn"] == np.array(there)).all()
    noise = table[table["category"] == "likely label noise"]
    entry = check["categories"]["likely label noise"]
    assert (entry["errors"], entry["wrong_labels"]) == (len(noise), (noise["drawn"] != (noise["raw_label"] == 1)).sum())


def test_the_sheet_gives_nothing_away_and_its_key_is_apart(analysed):
    folder = folder_of(analysed)
    sheet = pd.read_csv(folder / "relabel.csv", keep_default_na=False)
    key = pd.read_csv(folder / "relabel_key.csv", keep_default_na=False)
    assert list(sheet) == ["item", "study_id", "films", "question", "answer", "comment"]
    assert len(sheet) == len(key) == 20
    assert (key["call"] == "right").sum() == 10
    frame = load_manifest(analysed.manifest_path).frame
    for row in sheet.to_dict("records"):
        assert row["films"].split(" | ") == frame.loc[frame["study_id"] == row["study_id"], "path"].tolist()
    text = (folder / "relabel.csv").read_text()
    assert not re.search(r"positive|negative|right|noise|0\.\d", text)


def test_a_sheet_that_was_filled_in_is_kept_with_its_key(copy):
    config = config_in(copy)
    folder = failure_analysis.run(config)
    names = ("relabel.csv", "relabel_key.csv")
    empty = {name: (folder / name).read_bytes() for name in names}
    failure_analysis.run(config)
    assert not list(folder.glob("*filled_in*")), "nobody wrote into it"
    for filled in (empty["relabel.csv"].replace(b",,\n", b",yes,\n", 1), empty["relabel.csv"].replace(b",", b";")):
        (folder / "relabel.csv").write_bytes(filled)
        failure_analysis.run(config_in(copy, seed=len(filled)))
        (kept,) = (path for path in folder.glob("relabel_filled_in_*.csv") if path.read_bytes() == filled)
        key = folder / kept.name.replace("relabel_", "relabel_key_")
        assert key.read_bytes() == empty["relabel_key.csv"]
        empty["relabel_key.csv"] = (folder / "relabel_key.csv").read_bytes()


def test_texts_of_data_are_no_formulas_and_no_markup(copy):
    """The sex is free text of a source."""
    config = config_in(copy)
    hostile = "=1+1|<img src=x>$x$`![a](http://b)"
    manifest = config.manifest_path.read_text()
    assert manifest.count(",F,") > 5
    config.manifest_path.write_text(manifest.replace(",F,", f",{hostile},"))
    sha256 = sha256_file(config.manifest_path)
    for name in ("cnn", "student", "teacher"):
        record = read_record(config.run_dir(name) / "config.json")
        record["inputs"]["manifest"]["sha256"] = sha256
        write_record(config.run_dir(name) / "config.json", record)
    build_store(config.pixels_path, load_manifest(config.manifest_path), Transform(SIZE), copy, workers=1)
    folder = failure_analysis.run(config)
    table = pd.read_csv(folder / "failures.csv", keep_default_na=False)
    assert set(table["sex"]) - {"M", ""} == {f"'{hostile}"}
    assert set(table["sex"].map(unguarded)) - {"M", ""} == {hostile}
    text = (folder / "summary.md").read_text()
    assert hostile not in text
    assert escaped(hostile) in text
    assert not re.search(r"(?<!\\)(<img|\$x|!\[a)", text)


def test_reports_are_quoted_where_they_name_the_finding(copy):
    """Every error is shown, so that each of the three cases is among them."""
    config = config_in(copy, failure={"examples": 40})
    text = (failure_analysis.run(config) / "summary.md").read_text()
    reports = load_reports(config.reports_path).sections
    cases = re.findall(r"### \d+\. ([A-Za-z ]+): false.*?Study ([^,]+),.*?\.png\)\n\n(.*?)\n", text, re.DOTALL)
    expected = []
    for label, study, said in cases:
        report = reports.get(study)
        names = {"Edema": "> There is no edema.", "Fracture": "> No pneumothorax \\| fracture."}
        names |= {"Pneumothorax": names["Fracture"]}
        if report and report["findings"].startswith("Small"):
            names["Pleural Effusion"] = "> Small pleural effusion."
        wanted = "There is no report." if report is None else names.get(label, "The report does not name it.")
        assert said == wanted, (label, study)
        expected.append(wanted)
    assert len(set(expected)) >= 3


def test_a_run_of_its_own_names_and_hashes_what_it_read(analysed):
    results = read_record(folder_of(analysed) / "failures.json")
    inputs = results["provenance"]["inputs"]
    assert set(inputs) == {
        *("student/predictions.csv", "cnn/predictions.csv", "teacher/predictions.csv"),
        *("student/inference.json", "manifest", "checkpoint", "reports"),
    }
    assert inputs["reports"]["sha256"] == sha256_file(analysed.reports_path)
    assert results["relabel"] == {"items": 20}
    # Of 20 training studies, 10 have each of the first two findings and none another.
    assert results["settings"]["rare"] == list(LABELS[2:])
    assert results["per_label"][LABELS[0]]["training_share"] == 0.5


def test_the_closing_lines_are_read_from_the_folder(analysed):
    said = failure_analysis.closing_lines(folder_of(analysed)).splitlines()
    steps = (folder_of(analysed) / "summary.md").read_text().split("## What to look at next\n\n")[1].splitlines()
    assert said[1:-2] == steps
    with pytest.raises(RecordError, match=r"failures\.json is missing"):
        failure_analysis.closing_lines(analysed.outputs)


def test_without_the_others_their_columns_are_left_out(copy):
    for name in ("cnn", "teacher"):
        shutil.rmtree(copy / "outputs" / name)
    (copy / "work" / "reports.csv").unlink()
    shutil.rmtree(copy / "masks")
    config = config_in(copy, failure={"examples": 2, "relabel": 0})
    stale = folder_of(config) / "images" / "01_of_an_earlier_analysis.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    folder = failure_analysis.run(config)
    table = pd.read_csv(folder / "failures.csv")
    assert not [name for name in table if name.startswith(("cnn", "teacher", "drawn"))]
    assert "likely label noise" not in set(table["category"])
    text = (folder / "summary.md").read_text()
    assert text.count("There is no report.") == 2
    assert "No teacher was given" in text
    assert "Is it the label that is wrong?" not in text
    assert len(list((folder / "images").glob("*.png"))) == 2
    assert not stale.exists()
    assert (folder / "relabel.csv").read_text().splitlines() == ["item,study_id,films,question,answer,comment"]


def test_a_run_that_was_named_and_lacks_predictions_is_an_error(copy):
    (copy / "outputs" / "cnn" / "predictions.csv").unlink()
    config = config_in(copy)
    with pytest.raises(ComparisonError, match=r"cnn/predictions\.csv is missing.*evaluate_cnn --run_name cnn"):
        failure_analysis.run(config, cnn_run="cnn")
    (copy / "outputs" / "student" / "predictions.csv").unlink()
    with pytest.raises(ComparisonError, match=r"student/predictions\.csv is missing.*evaluate_cnn --run_name student"):
        failure_analysis.run(config)
    with pytest.raises(ComparisonError, match=r"nobody/config\.json is missing.*distillation --run_name nobody"):
        failure_analysis.run(config, student_run="nobody")
    assert not folder_of(config).exists()


def test_runs_of_another_manifest_are_refused(copy):
    write_run(copy / "outputs", "teacher", model(0.5, 11, PATIENTS), manifest="b" * 64, reads="findings")
    with pytest.raises(ComparisonError, match=r"manifest: .*student/test_results\.json has .* has b{64}"):
        failure_analysis.run(config_in(copy))


def test_a_manifest_made_anew_is_refused(copy):
    frame = load_manifest(copy / "work" / "manifest.csv").frame
    write_manifest(copy / "work" / "manifest.csv", frame.iloc[1:])
    with pytest.raises(RecordError, match=r"student was trained for something else:\s+manifest"):
        failure_analysis.run(config_in(copy))


def test_reports_of_other_studies_are_refused(copy):
    write_reports(copy / "work" / "reports.csv", {"somebody": dict.fromkeys(SECTIONS, "text")})
    with pytest.raises(DataError, match="study 'somebody' is not in the manifest"):
        failure_analysis.run(config_in(copy))


def test_tables_stay_when_the_pictures_fail(copy, monkeypatch):
    def fail(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failure_pictures, "save_picture", fail)
    config = config_in(copy)
    with pytest.raises(OSError, match="No space left"):
        failure_analysis.run(config)
    assert {item.name for item in folder_of(config).iterdir()} >= {"failures.csv", "relabel.csv", "relabel_key.csv"}


def test_maps_are_on_the_scale_that_the_evaluation_recorded(analysed):
    """That of `inference.json`, which belongs to the weights; validation is not looked at again."""
    from mlx_cxr.training.cohort import Cohort

    trained = TrainedRun.open(analysed.run_dir("student"))
    test = Cohort.open(analysed).split("test")
    table = pd.read_csv(folder_of(analysed) / "failures.csv", dtype={"study_id": str})
    table = table[table["label"].isin(MAPPED)].head(5)
    frame, pixels, maps = explanation.study_maps(trained, test, table, "grad_cam", 4)
    assert set(frame["study_id"]) == set(table["study_id"])
    assert maps.labels == tuple(dict.fromkeys(table["label"]))
    assert maps.reference.tolist() == [1 + MAPPED.index(label) for label in maps.labels]
    assert maps.raw.shape[:2] == (len(maps.labels), len(frame)) == (len(maps.labels), len(pixels))
    for image, path in zip(pixels, frame["path"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(analysed.data.root / path)))
    with pytest.raises(RecordError, match="has no film of study nobody"):
        explanation.study_maps(trained, test, pd.concat([table, table.assign(study_id="nobody")]), "grad_cam", 4)
    with pytest.raises(RecordError, match="without hires_cam maps; run evaluate_cnn --run_name student again"):
        explanation.study_maps(trained, test, table, "hires_cam", 4)


def test_a_scale_of_other_weights_is_refused(copy):
    network = ResNet18(ResNetConfig(output_stride=16))
    initialize(network, 7)
    save_model(copy / "outputs" / "student" / "best_student.safetensors", network)
    with pytest.raises(RecordError, match=r"best_student\.safetensors changed since .*inference\.json was written"):
        failure_analysis.run(config_in(copy))


def test_the_image_shown_is_the_one_with_the_highest_score_and_the_outline_its_mask(analysed, monkeypatch, tmp_path):
    """The second image of a study scores higher."""
    table = pd.read_csv(folder_of(analysed) / "failures.csv", dtype={"study_id": str})
    frame = load_manifest(analysed.manifest_path).frame
    doubles = frame["study_id"].value_counts().loc[lambda n: n == 2].index
    case = table[table["study_id"].isin(doubles) & (table["error"] == "false positive")].iloc[[0]]
    study = case["study_id"].iloc[0]
    rows = frame[frame["study_id"] == study]
    pixels = np.stack([np.asarray(Image.open(analysed.data.root / path)) for path in rows["path"]])
    maps = ScaledMaps(
        (case["label"].iloc[0],),
        np.ones((1, 2, 2, 2), np.float32),
        np.tile(np.arange(2, dtype=np.float32)[:, None], (1, 14)),
        np.full(1, 2, np.float32),
        "grad_cam",
    )
    shown = {}

    def draw(image, heat, reading, mask, side, show_withheld):
        shown.update(image=image, reading=reading, mask=mask, heat=heat)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(failure_pictures, "draw_overlay", draw)
    names = failure_pictures.draw_failures(tmp_path, case, rows, pixels, maps, Places.of(analysed.data, []), analysed)
    assert [path.name for path in (tmp_path / "images").iterdir()] == [names[0].removeprefix("images/")]
    assert shown["reading"].image == rows.iloc[1]["image_id"]
    np.testing.assert_array_equal(shown["image"], pixels[1])
    assert shown["mask"] is None, "only the first image has masks"
    assert shown["reading"].probability == case["probability"].iloc[0]
    np.testing.assert_array_equal(shown["heat"], np.full((2, 2), 0.5))


def test_the_command_takes_the_runs_names_and_ends_with_a_readable_message(copy, tmp_path, capsys):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config_in(copy).plain()))))
    (copy / "outputs" / "student").rename(copy / "outputs" / "other")
    failure_analysis.main(f"--config {path} --student_run other --set failure.examples=0".split())
    assert "None is shown." in (copy / "outputs" / "other" / "failure_analysis" / "summary.md").read_text()
    with pytest.raises(SystemExit) as ended:
        failure_analysis.main(["--config", str(path)])
    assert ended.value.code == 2
    assert "student/config.json is missing" in capsys.readouterr().err
