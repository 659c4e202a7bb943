"""The command on folders of images: the table's figures, files that cannot be used, overlays and contact sheets."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from chest_images import chest_image
from dicom_files import dicom_bytes
from mutated_files import write_mutations
from PIL import Image
from toy_cohort import make_cohort

from mlx_cxr import evaluate_cnn, predict, train_cnn
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import STATE_WORDS
from mlx_cxr.explain.grad_cam import Method
from mlx_cxr.inference.predictor import Predictor, PredictorError
from mlx_cxr.models.convert import load_model, save_model
from mlx_cxr.pages import prediction_files
from mlx_cxr.pages.prediction_files import COLUMNS, called_findings, cell_of, shown_name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """An evaluated run with maps whose head was then turned towards positives, so that images are called present."""
    folder = make_cohort(tmp_path_factory.mktemp("cohort"))
    config = load_config(folder / "trial.yaml", ["evaluation.abstention_alpha=0.4"])
    run_dir = train_cnn.run(config)
    model = load_model(run_dir / "best_model.safetensors")
    model.fc.bias = model.fc.bias + 2
    save_model(run_dir / "best_model.safetensors", model)
    evaluate_cnn.run(config)
    return run_dir


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three images in three formats, one of them a negative, a report, an empty file, and a hidden one."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "inside").mkdir()
    Image.fromarray(chest_image(0)).save(folder / "a.jpg", quality=95)
    (folder / "b").write_bytes(dicom_bytes(chest_image(1), "MONOCHROME1", 12))
    Image.fromarray(255 - chest_image(2)).save(folder / "inside" / "c.png")
    (folder / "report.txt").write_text("FINDINGS: No pneumothorax.")
    (folder / "z.png").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_a_row_for_each_file_with_the_predictor_s_figures(run_dir, images, tmp_path):
    path = predict.run(run_dir, [images], tmp_path / "out")
    rows = table(path)
    assert tuple(rows[0]) == COLUMNS
    assert len(COLUMNS) == 4 + 14 * 4
    assert [Path(row["file"]).relative_to(images).as_posix() for row in rows] == [
        *("a.jpg", "b", "inside/c.png", "report.txt", "z.png")
    ]
    statuses = ["answered", "answered", "questionable", "unreadable", "unreadable"]
    assert [row["status"] for row in rows] == statuses
    assert "inverted" in rows[2]["reason"]
    assert "0 bytes" in rows[4]["reason"]
    predictor = Predictor.from_run(run_dir)
    answers = predictor.predict([predictor.read(images / name) for name in ("a.jpg", "b")])
    for row, answer in zip(rows, answers, strict=False):
        for k, label in enumerate(LABELS):
            assert float(row[f"{label} probability"]) == pytest.approx(answer.probabilities[k], abs=2e-6)
            assert row[f"{label} call"] == STATE_WORDS[int(answer.states[k])]
            tuned = predictor.points.tuned[k]
            threshold = f"{predictor.points.thresholds.values[k]:.6f}" if tuned else ""
            assert row[f"{label} threshold"] == threshold
            above = str(int(answer.probabilities[k] >= predictor.points.thresholds.values[k])) if tuned else ""
            assert row[f"{label} above_threshold"] == above
    for row in rows[2:]:
        assert {row[name] for name in COLUMNS[4:]} == {""}, "no figure for what is not answered"
    record = read_record(tmp_path / "out" / "predict.json")
    assert record["status"] == {"answered": 2, "questionable": 1, "unreadable": 2}
    assert sum(record["findings"].values()) == 28
    assert record["stage"] == "predict"
    assert record["inputs"]["checkpoint"]["sha256"] == read_record(run_dir / "inference.json")["checkpoint"]["sha256"]


def test_the_gate_can_be_left_out(run_dir, images, tmp_path):
    rows = table(predict.run(run_dir, [images / "inside" / "c.png"], tmp_path, ignore_gate=True))
    assert rows[0]["status"] == "questionable"
    assert 0 < float(rows[0]["Edema probability"]) < 1


def test_overlays_and_contact_sheets_show_the_called_findings(run_dir, images, tmp_path):
    many = [images / name for name in ("a.jpg", "b", "z.png", "inside/c.png")]
    for i in range(46):
        many.append(tmp_path / f"copy{i:02}.jpg")
        many[-1].write_bytes((images / "a.jpg").read_bytes())
    out = tmp_path / "out"
    predict.run(run_dir, many, out, overlays=2, contact_sheet=True)
    predictor = Predictor.from_run(run_dir)
    (answer,) = predictor.predict([predictor.read(images / "a.jpg")])
    called = called_findings(answer, predictor.points)
    assert called, "the fixture's head calls something"
    assert "No Finding" not in called
    shown = [label.replace(" ", "_") for label in called[:2]]
    assert sorted((out / "overlays").glob("00001_*")) == sorted(out / "overlays" / f"00001_a_{x}.png" for x in shown)
    assert not list((out / "overlays").glob("00003_*")), "nothing was answered for an empty file"
    sheets = sorted(out.glob("contact_sheet_*.png"))
    assert [sheet.name for sheet in sheets] == ["contact_sheet_01.png", "contact_sheet_02.png"]
    first, second = (np.asarray(Image.open(sheet).convert("RGB")).astype(int) for sheet in sheets)
    assert first.shape[1] > second.shape[1] / 2
    # The map of the first image is in colour, the image of the fourth, not answered, is gray and dark.
    tile = slice(62 + 20, 62 + 200)
    coloured, gray = (np.ptp(first[tile, x + 10 : x + 190], axis=-1).mean() for x in (20, 20 + 3 * 222))
    assert coloured > 10 > gray


def test_names_of_all_kinds_have_a_row_and_pictures(run_dir, images, tmp_path):
    """Names that spreadsheets, file systems, UTF-8 or a font have no room for."""
    folder = tmp_path / "odd"
    folder.mkdir()
    content = (images / "a.jpg").read_bytes()
    names = [b"=1+1.jpg", b"caf\xe9.jpg", b"two\nlines.jpg", b"x" * 240 + b".jpg", "\u80f8.jpg".encode()]
    for name in names:
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(content)
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    (folder / "again").symlink_to(folder)
    out = tmp_path / "out"
    rows = table(predict.run(run_dir, [folder], out, overlays=1, contact_sheet=True))
    assert len(rows) == 6
    assert [row["status"] for row in rows].count("answered") == 5
    assert {row["reason"] for row in rows} == {"", "no such file"}
    assert any(row["file"].endswith("caf\\udce9.jpg") for row in rows)
    assert len(list((out / "overlays").glob("*.png"))) == 5
    assert cell_of("=1+1.jpg") == "./=1+1.jpg"
    assert cell_of("a=1.jpg") == "a=1.jpg"
    assert shown_name("some/two\nlines.jpg") == "two?lines.jpg"
    long = predict.run(run_dir, [Path("y" * 300), images / "a.jpg"], tmp_path / "long")
    assert [row["status"] for row in table(long)] == ["unreadable", "answered"]


def test_a_second_call_leaves_no_pictures_of_the_first(run_dir, images, tmp_path):
    out = tmp_path / "out"
    predict.run(run_dir, [images / "a.jpg"], out, overlays=1, contact_sheet=True)
    mine = out / "overlays" / "mine.png"
    mine.write_bytes(b"kept")
    predict.run(run_dir, [images / "b"], out)
    assert [path.name for path in (out / "overlays").iterdir()] == ["mine.png"]
    assert not list(out.glob("contact_sheet_*"))
    predict.run(run_dir, [images / "b"], out / "other", overlays=1)


def test_ctrl_c_keeps_the_rows_that_are_there(run_dir, images, tmp_path, monkeypatch):
    row_of = prediction_files.row_of

    def stop_at_second(answer, points):
        if answer.image.name.endswith("b"):
            raise KeyboardInterrupt
        return row_of(answer, points)

    monkeypatch.setattr(prediction_files, "row_of", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        predict.run(run_dir, [images], tmp_path)
    assert [Path(row["file"]).name for row in table(tmp_path / "films.csv")] == ["a.jpg"]


def test_a_batch_of_none_is_refused(run_dir, images, tmp_path):
    with pytest.raises(PredictorError, match="batch size 0"):
        predict.run(run_dir, [images], tmp_path, batch_size=0)


def test_results_inside_the_folder_are_not_read_again(run_dir, images, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "a.jpg").write_bytes((images / "a.jpg").read_bytes())
    for _ in range(2):
        rows = table(predict.run(run_dir, [folder, folder / "a.jpg"], folder / "results", contact_sheet=True))
        assert [Path(row["file"]).name for row in rows] == ["a.jpg"]


@pytest.mark.slow
def test_of_damaged_files_none_is_lost(run_dir, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    paths = write_mutations(folder, chest_image(3), rounds=2)
    assert len(paths) >= 100
    rows = table(predict.run(run_dir, [folder], tmp_path / "out", contact_sheet=True))
    assert {Path(row["file"]).name for row in rows} == {path.name for path in paths}
    for row in rows:
        assert (row["status"] == "answered") == (row["reason"] == "")
        assert (row["status"] == "answered") == bool(row["Edema probability"])
    assert {row["status"] for row in rows} >= {"answered", "unreadable"}
    assert {row["status"] for row in rows if "renamed" in row["file"]} == {"answered"}, "the content tells the type"


def test_the_command_itself(run_dir, images, tmp_path):
    line = [sys.executable, "-m", "mlx_cxr.predict", "--run", str(run_dir), str(images), "--out", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "5 files" in done.stderr
    assert "2 answered, 2 unreadable, 1 questionable" in done.stderr
    assert "not for clinical use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "nowhere", "x.png", "--out", "out"], "nowhere/config.json is missing"),
        (["--run", "RUN", "EMPTY", "--out", "out"], "no files in"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run_dir, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    given = [{"RUN": str(run_dir), "EMPTY": str(tmp_path / "empty")}.get(a, a) for a in arguments]
    with pytest.raises(SystemExit) as end:
        predict.main(given)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "films.csv").exists()


def test_maps_that_the_run_does_not_have_are_refused(run_dir, images, tmp_path):
    record = run_dir / "inference.json"
    kept = record.read_text()
    plain = read_record(record)
    plain["map_references"]["methods"] = {}
    try:
        write_record(record, plain)
        with pytest.raises(predict.PredictError, match="no scale for grad_cam maps"):
            predict.run(run_dir, [images], tmp_path, overlays=1)
    finally:
        record.write_text(kept)


def test_the_methods_offered_are_those_of_the_maps():
    assert get_args(Method) == predict.METHODS
