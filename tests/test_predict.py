"""The command on folders of images: the table's figures, files that cannot be used, overlays and contact sheets."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from chest_images import chest_image
from dicom_files import dicom_bytes
from mutated_files import write_mutations
from PIL import Image
from toy_cohort import make_cohort

from mlx_cxr import evaluate_cnn, predict, train_cnn
from mlx_cxr.core.claim import FolderBusyError
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import STATE_WORDS
from mlx_cxr.explain.grad_cam import Method
from mlx_cxr.inference.predictor import Predictor, PredictorError
from mlx_cxr.models.convert import load_model, save_model
from mlx_cxr.pages import prediction_files
from mlx_cxr.pages.prediction_files import COLUMNS, call_lines, called_findings, cell_of, shown_name
from mlx_cxr.predict import PredictError

pytestmark = pytest.mark.usefixtures("without_plots")

ANNOTATED = ("Cardiomegaly", "Atelectasis")
"""The findings that the toy cohort has."""


@contextmanager
def stopped_after(rows: int) -> Iterator[None]:
    """Within it, Ctrl-C is pressed while the row after so many is made."""
    row_of, made = prediction_files.row_of, iter(range(rows))

    def stopping(*arguments: object) -> dict[str, str]:
        if next(made, None) is None:
            raise KeyboardInterrupt
        return row_of(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prediction_files, "row_of", stopping)
        yield


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
            if label not in ANNOTATED:
                # The cohort has no study with it: what the network says of it is no answer.
                said = [row[f"{label} {what}"] for what in ("probability", "threshold", "above_threshold", "call")]
                assert said == ["", "", "", "untested"]
                continue
            assert float(row[f"{label} probability"]) == pytest.approx(answer.probabilities[k], abs=2e-6)
            assert row[f"{label} call"] == STATE_WORDS[int(answer.states[k])]
            threshold = predictor.points.thresholds.values[k]
            assert row[f"{label} threshold"] == f"{threshold:.6f}"
            assert row[f"{label} above_threshold"] == str(int(answer.probabilities[k] >= threshold))
    for row in rows[2:]:
        assert {row[name] for name in COLUMNS[4:]} == {""}, "no figure for what is not answered"
    record = read_record(tmp_path / "out" / "predict.json")
    assert record["status"] == {"answered": 2, "questionable": 1, "unreadable": 2}
    assert sum(record["findings"].values()) == 28
    assert record["findings"]["untested"] == 2 * (14 - len(ANNOTATED))
    assert record["stage"] == "predict"
    assert record["inputs"]["checkpoint"]["sha256"] == read_record(run_dir / "inference.json")["checkpoint"]["sha256"]


def test_the_gate_can_be_left_out(run_dir, images, tmp_path):
    rows = table(predict.run(run_dir, [images / "inside" / "c.png"], tmp_path, ignore_gate=True))
    assert rows[0]["status"] == "questionable"
    assert 0 < float(rows[0]["Cardiomegaly probability"]) < 1


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
    names += [
        b"Icon\r",
        b"a\\nb.jpg",
        b"a\nb.jpg",
        b'say "a, b".jpg',
        "\u2028.jpg".encode(),
        b"tab\t.jpg",
        b"\x1b[3m.jpg",
    ]
    for name in names:
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(content)
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    (folder / "again").symlink_to(folder)
    out = tmp_path / "out"
    path = predict.run(run_dir, [folder], out, overlays=1, contact_sheet=True)
    rows = table(path)
    assert [row["status"] for row in rows].count("answered") == len(names)
    assert {row["reason"] for row in rows} == {"", "no such file"}
    assert path.read_bytes().count(b"\n") == len(path.read_text("utf-8").splitlines()) == len(names) + 2
    read = pd.read_csv(path, keep_default_na=False)
    assert list(read["file"]) == [row["file"] for row in rows]
    # A cell gives the very name back, as a Python literal without its quotes.
    given = {cell.removeprefix(f"{folder}/") for cell in read["file"]}
    assert given == {
        *("=1+1.jpg", "caf\\xe9.jpg", "two\\nlines.jpg", "x" * 240 + ".jpg", "\u80f8.jpg", "Icon\\r", "a\\\\nb.jpg"),
        *("a\\nb.jpg", 'say "a, b".jpg', "\\u2028.jpg", "tab\\t.jpg", "\\x1b[3m.jpg", "nowhere.jpg"),
    }
    assert len(list((out / "overlays").glob("*.png"))) == len(names)
    for begins in ("=1+1.jpg", "+1.jpg", "-1.jpg", "@a.jpg", "'=1.jpg", "\uff1d1.jpg"):
        assert cell_of(begins) == f"./{begins}"
    assert cell_of("a=1.jpg") == "a=1.jpg"
    assert cell_of("\t=1") == "\\t=1"
    assert shown_name("some/two\nlines.jpg") == "two?lines.jpg"
    long = predict.run(run_dir, [Path("y" * 300), images / "a.jpg"], tmp_path / "long")
    assert [row["status"] for row in table(long)] == ["unreadable", "answered"]


def everything(folder: Path) -> dict[str, bytes]:
    """Each file of a folder but the record, which holds times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "predict.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_answers_that_are_there_are_replaced_when_asked_to_and_whole(run_dir, images, tmp_path):
    out = tmp_path / "out"
    predict.run(run_dir, [images / "a.jpg"], out, overlays=1, contact_sheet=True)
    before = everything(out)
    for again in ({}, {"resume": True}):
        with pytest.raises(PredictError, match="--overwrite"):
            predict.run(run_dir, [images / "b"], out, **again)
    assert everything(out) == before
    mine = out / "overlays" / "mine.png"
    mine.write_bytes(b"kept")
    (out / "overlays" / "123456_of_a_long_table_Edema.png").write_bytes(b"stale")
    predict.run(run_dir, [images / "b"], out, overwrite=True)
    assert [path.name for path in (out / "overlays").iterdir()] == ["mine.png"]
    assert not list(out.glob("contact_sheet_*"))
    assert [Path(row["file"]).name for row in table(out / "films.csv")] == ["b"]
    # A table of which nothing could be read protects nothing.
    with pytest.raises(PredictError):
        predict.run(run_dir, [images / "z.png"], out, overwrite=True)
    predict.run(run_dir, [images / "b"], out)


@pytest.fixture(scope="module")
def many(images, tmp_path_factory) -> Path:
    """60 images, a third of them in a folder below, some of them not to be read."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "below").mkdir()
    for number in range(60):
        place = folder / "below" if number % 3 == 0 else folder
        name = ("a.jpg", "b", "z.png")[(number % 7 == 0) + (number % 11 == 0)]
        shutil.copy(images / name, place / f"{number:03}.jpg")
    return folder


WANTED = ("--overlays", "2", "--contact_sheet", "--batch_size", "8")


@pytest.fixture(scope="module")
def unbroken(run_dir, many, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken")
    predict.main(["--run", str(run_dir), str(many), "--out", str(out), *WANTED])
    return everything(out)


@pytest.mark.parametrize("rows", [30, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (0, 3, 50))])
def test_a_killed_call_keeps_its_rows_and_is_gone_on_with(run_dir, many, unbroken, tmp_path, rows):
    out = tmp_path / "out"
    line = [sys.executable, "-m", "mlx_cxr.predict", "--run", str(run_dir), str(many), "--out", str(out), *WANTED]
    part = out / "films.part.csv"
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not part.exists() or part.read_bytes().count(b"\n") < rows + 1:
            assert running.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    done = len(pd.read_csv(part, keep_default_na=False))
    assert rows <= done < 60
    assert not (out / "films.csv").exists(), "half a table is not called by the name of a whole one"
    assert part.read_bytes() == unbroken["films.csv"][: part.stat().st_size]
    # As a kill may leave them: half a row, and pictures that no row is of.
    with part.open("ab") as end:
        end.write(b"/half/a/r")
    (out / "overlays").mkdir(exist_ok=True)
    (out / "overlays" / "00111_of_a_dead_run_Edema.png").write_bytes(b"stale")
    if done:
        with pytest.raises(PredictError, match=f"holds {done} rows .* that was stopped: give --resume"):
            predict.run(run_dir, [many], out, overlays=2, contact_sheet=True, batch_size=8)
    predict.main([*line[3:], "--resume"])
    assert everything(out) == unbroken
    counted = read_record(out / "predict.json")
    statuses = [row["status"] for row in table(out / "films.csv")]
    assert counted["status"] == {status: statuses.count(status) for status in set(statuses)}


def test_a_call_killed_before_its_last_step_is_gone_on_with(run_dir, many, tmp_path, monkeypatch):
    from mlx_cxr.pages.prediction_files import ImagesTable

    def killed(_: ImagesTable) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(ImagesTable, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            predict.run(run_dir, [many], out)
    assert not (out / "films.csv").exists()
    statuses = [row["status"] for row in table(predict.run(run_dir, [many], out, resume=True))]
    assert len(statuses) == 60
    assert read_record(out / "predict.json")["status"] == {kind: statuses.count(kind) for kind in set(statuses)}


def test_a_call_is_gone_on_with_only_where_it_is_the_same(run_dir, many, tmp_path):
    out, films = tmp_path / "out", tmp_path / "films"
    shutil.copytree(many, films)
    with stopped_after(20), pytest.raises(KeyboardInterrupt):
        predict.run(run_dir, [films], out)
    kept = everything(out)
    assert len(table(out / "films.part.csv")) == 20
    with pytest.raises(PredictError, match="had other options"):
        predict.run(run_dir, [films], out, ignore_gate=True, resume=True)
    with pytest.raises(PredictError, match="was of other files"):
        predict.run(run_dir, [films / "below"], out, resume=True)
    os.utime(films / "below" / "057.jpg", (1, 1))
    with pytest.raises(PredictError, match="or they changed since"):
        predict.run(run_dir, [films], out, resume=True)
    assert everything(out) == kept


def test_two_calls_do_not_share_a_folder(run_dir, images, tmp_path):
    out = tmp_path / "out"
    hold = "import sys; from mlx_cxr.core.claim import claimed\nwith claimed(sys.argv[1]): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FolderBusyError, match=f"is being written by process {other.pid}"):
            predict.run(run_dir, [images / "a.jpg"], out)
        other.communicate(b"\n")
    predict.run(run_dir, [images / "a.jpg"], out)
    assert not (out / ".claim").exists()


def test_what_a_folder_holds_has_a_row_or_is_named(run_dir, images, tmp_path, caplog):
    """A folder that cannot be listed, as one whose path is too long; a pipe; macOS's companions."""
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(images / "a.jpg", folder)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7" + bytes(4000))
    (folder / ".cache").mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(17):
        os.mkdir("n" * 250, dir_fd=here)
        here, above = os.open("n" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    with caplog.at_level(logging.INFO, "mlx_cxr"):
        rows = table(predict.run(run_dir, [folder], tmp_path / "out"))
    reasons = {Path(row["file"]).name: row["reason"] for row in rows}
    assert reasons == {
        "a.jpg": "",
        "pipe.jpg": "no ordinary file; copy the film to one",
        "n" * 250: "cannot be read: File name too long",
    }
    assert f"left out as hidden: {folder}/._a.jpg and 1 more" in caplog.text
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_has_a_row(run_dir, images, tmp_path):
    shut = tmp_path / "films" / "shut"
    shut.mkdir(parents=True)
    shutil.copy(images / "a.jpg", shut.parent)
    shut.chmod(0)
    rows = table(predict.run(run_dir, [shut.parent], tmp_path / "out"))
    shut.chmod(0o700)
    assert [row["reason"] for row in rows] == ["", "cannot be read: Permission denied"]


def test_the_findings_of_a_few_images_are_printed(run_dir, images, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mlx_cxr"):
        predict.run(run_dir, [images / "a.jpg", images / "inside" / "c.png", Path("gone.jpg")], tmp_path)
    predictor = Predictor.from_run(run_dir)
    (answer,) = predictor.predict([predictor.read(images / "a.jpg")])
    lines = caplog.text.splitlines()
    for label in ANNOTATED:
        k = LABELS.index(label)
        call = STATE_WORDS[int(answer.states[k])]
        (line,) = (line for line in lines if f"  {label} " in line)
        assert line.split()[0] == call
        assert f" {answer.probabilities[k]:.2f}  (threshold {predictor.points.thresholds.values[k]:.2f})" in line
        assert line.endswith(predictor.points.reason(k, answer.probabilities[k]) or ")")
    (untested,) = (line for line in lines if "untested" in line)
    assert set(untested.split(": ")[1].split(", ")) == {*LABELS} - {*ANNOTATED}
    assert f"{images}/inside/c.png: not answered, as the film looks inverted" in caplog.text
    assert "gone.jpg: no such file" in lines[lines.index(next(x for x in lines if "c.png" in x)) + 1]
    assert call_lines(answer.probabilities, answer.states, predictor.points)[-1] in caplog.text


def test_a_batch_of_none_is_refused(run_dir, images, tmp_path):
    with pytest.raises(PredictorError, match="batch size 0"):
        predict.run(run_dir, [images], tmp_path, batch_size=0)


def test_results_inside_the_folder_are_not_read_again(run_dir, images, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    (folder / "a.jpg").write_bytes((images / "a.jpg").read_bytes())
    for _ in range(2):
        wanted = {"contact_sheet": True, "overwrite": True}
        rows = table(predict.run(run_dir, [folder, folder / "a.jpg"], folder / "results", **wanted))
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
        assert (row["status"] == "answered") == bool(row["Cardiomegaly probability"])
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
        (["--run", "nowhere", "EMPTY", "--out", "out"], "nowhere/config.json is missing"),
        (["--run", "RUN", "EMPTY", "--out", "out"], "no files in"),
        (["--run", "RUN", "x.png", "--out", "out"], "error: not found: x.png\n"),
        (["--run", "RUN", "x.png", "y.png", "--out", "out"], "error: not found: x.png and 1 more\n"),
        (["--run", "RUN", "EMPTY", "--out", "out", "--overlays", "-1"], "--overlays -1: give 0"),
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


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo; convert it to PNG"),
        (b"%PDF-1.7 ...", "a PDF document; save the film in it as PNG or JPEG"),
        (b"\0\0\1\xba...", "a video, not a film; save one picture of it as PNG"),
        (b"", "empty (0 bytes); download or copy it again"),
    ],
)
def test_a_file_of_another_kind_is_named_and_nothing_else_said(run_dir, tmp_path, capsys, content, kind):
    (tmp_path / "film.jpg").write_bytes(content)
    with pytest.raises(SystemExit):
        predict.main(["--run", str(run_dir), str(tmp_path / "film.jpg"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/film.jpg: {kind}\n")


def test_maps_that_the_run_does_not_have_are_refused(run_dir, images, tmp_path):
    record = run_dir / "inference.json"
    kept = record.read_text()
    plain = read_record(record)
    plain["map_references"]["methods"] = {}
    try:
        write_record(record, plain)
        with pytest.raises(predict.PredictError, match="no scale for contrast_cam maps"):
            predict.run(run_dir, [images], tmp_path, overlays=1)
    finally:
        record.write_text(kept)


def test_the_methods_offered_are_those_of_the_maps():
    assert get_args(Method) == predict.METHODS
