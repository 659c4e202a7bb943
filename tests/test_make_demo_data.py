"""The stage: exact layout, same bytes for any number of workers, restart, refusal to overwrite."""

import gzip
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mlx_cxr import build_manifest, make_demo_data
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import sha256_file
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import create_run
from mlx_cxr.make_demo_data import CohortExistsError, main, run

PATIENTS = 10


def config_file(folder: Path, patients: int = PATIENTS, seed: int = 3, size: int = 128) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "demo.yaml"
    path.write_text(
        f"name: tiny\nseed: {seed}\ndemo: {{patients: {patients}, image_size: {size}}}\n"
        f"data: {{synthetic: true, root: {folder / 'raw'}, work_dir: {folder}}}\n"
    )
    return path


def hashes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    return run(load_config(config_file(folder)), workers=1)


def test_tables_have_mimics_names_and_columns(root):
    columns = {
        "metadata": [
            "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows",
            "Columns", "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
            "PatientOrientationCodeSequence_CodeMeaning",
        ],
        "split": ["dicom_id", "study_id", "subject_id", "split"],
        "chexpert": ["subject_id", "study_id", *LABELS],
        "negbio": ["subject_id", "study_id", *LABELS],
    }  # fmt: skip
    for name, wanted in columns.items():
        assert list(pd.read_csv(root / f"mimic-cxr-2.0.0-{name}.csv.gz").columns) == wanted
    assert list(pd.read_csv(root / "patients.csv.gz").columns) == ["subject_id", "gender", "anchor_age"]
    assert tuple(sorted(LABELS)) == LABELS
    text = gzip.decompress((root / "mimic-cxr-2.0.0-chexpert.csv.gz").read_bytes()).decode()
    values = {value for line in text.splitlines()[1:] for value in line.split(",")[2:]}
    assert values <= {"1.0", "0.0", "-1.0", ""}
    # No time stamp in the gzip header, or two runs would differ.
    assert (root / "patients.csv.gz").read_bytes()[4:8] == b"\0\0\0\0"


def test_every_row_has_its_image_report_and_label(root):
    metadata = pd.read_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", dtype={"StudyDate": str})
    labels = pd.read_csv(root / "mimic-cxr-2.0.0-chexpert.csv.gz")
    split = pd.read_csv(root / "mimic-cxr-2.0.0-split.csv.gz")
    patients = pd.read_csv(root / "patients.csv.gz")
    assert len(list((root / "files").rglob("*.jpg"))) == len(metadata) == len(split)
    assert len(list((root / "files").rglob("*.txt"))) == len(labels) == metadata.study_id.nunique()
    assert set(patients.subject_id) == set(metadata.subject_id)
    assert metadata.StudyDate.str.fullmatch(r"2[12]\d{6}").all()
    assert (split.groupby("subject_id").split.nunique() == 1).all()
    for row in metadata.itertuples():
        study = root / "files" / f"p{str(row.subject_id)[:2]}" / f"p{row.subject_id}" / f"s{row.study_id}"
        assert "FINAL REPORT" in study.with_suffix(".txt").read_text()
        with Image.open(study / f"{row.dicom_id}.jpg") as radiograph:
            assert (radiograph.mode, radiograph.size, radiograph.format) == ("L", (row.Columns, row.Rows), "JPEG")
            assert min(radiograph.size) == 128


def test_without_laterals_all_else_is_the_same(root, tmp_path):
    config = load_config(config_file(tmp_path))
    demo = config.demo.model_copy(update={"laterals": False})
    frontal = run(config.model_copy(update={"demo": demo}), workers=1)
    metadata = pd.read_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz")
    left = pd.read_csv(frontal / "mimic-cxr-2.0.0-metadata.csv.gz")
    known = {"AP", "PA", "LATERAL", "LL"}
    assert set(left.ViewPosition.dropna()) == {"AP", "PA"} < set(metadata.ViewPosition.dropna()) <= known
    wide = metadata[~metadata.ViewPosition.isin(["LATERAL", "LL"])].set_index("dicom_id")
    pd.testing.assert_frame_equal(left.set_index("dicom_id"), wide.loc[left.dicom_id])
    assert wide.drop(left.dicom_id).ViewPosition.isna().all()
    all_of, some = hashes(root), hashes(frontal)
    assert {path: some[path] for path in some if path.startswith(("files", "masks"))}.items() <= all_of.items()
    assert len([path for path in some if path.endswith(".jpg")]) == len(left)


def test_masks_are_image_sized_and_two_valued(root):
    images = {path.stem: path for path in (root / "files").rglob("*.jpg")}
    masks = sorted((root / "masks").rglob("*.png"))
    assert len(masks) > PATIENTS
    for path in masks:
        assert path.stem.replace("_", " ") in LABELS
        radiograph = images[path.parent.name]
        assert path.parent.parent.relative_to(root / "masks") == radiograph.parent.relative_to(root / "files")
        with Image.open(path) as mask, Image.open(radiograph) as image:
            assert mask.mode == "L"
            assert mask.size == image.size
            assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_it_says_what_it_is(root):
    notice = (root / "SYNTHETIC.txt").read_text()
    assert "SYNTHETIC" in notice
    assert "Not for clinical use" in notice


def test_same_bytes_with_two_workers(root, tmp_path):
    other = run(load_config(config_file(tmp_path)), workers=2)
    assert hashes(other) == hashes(root)


def test_up_to_date_is_left_alone_and_other_settings_are_refused(root, caplog):
    caplog.set_level("INFO", "mlx_cxr")
    folder, before = root.parent, (root / "cohort.json").stat().st_mtime_ns
    run(load_config(config_file(folder)))
    assert "up to date" in caplog.text
    assert (root / "cohort.json").stat().st_mtime_ns == before
    with pytest.raises(CohortExistsError, match=re.escape(str(root)) + r".*seed 3.*--overwrite"):
        run(load_config(config_file(folder, seed=4)))
    assert hashes(root)


def test_other_code_and_overwrite_replace_it_whole(tmp_path, monkeypatch, caplog):
    root = run(load_config(config_file(tmp_path, patients=2)), workers=1)
    stray = root / "files" / "stray.txt"
    stray.write_text("left over")
    monkeypatch.setattr(make_demo_data, "code_hash", lambda: "newer")
    caplog.set_level("INFO", "mlx_cxr")
    run(load_config(config_file(tmp_path, patients=2)), workers=1)
    assert "another version of the code" in caplog.text
    assert not stray.exists()
    run(load_config(config_file(tmp_path, patients=2, seed=9)), overwrite=True, workers=1)
    assert '"seed": 9' in (root / "cohort.json").read_text()


def test_a_failed_run_leaves_the_old_cohort(tmp_path, monkeypatch):
    root = run(load_config(config_file(tmp_path, patients=2)), workers=1)
    before = hashes(root)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_cxr.synthetic.layout.write_tables", full)
    with pytest.raises(OSError, match="No space left"):
        run(load_config(config_file(tmp_path, patients=2, seed=9)), overwrite=True, workers=1)
    assert hashes(root) == before


def test_a_disk_that_is_full_is_told_by_name(tmp_path):
    """The kernel refuses to let files grow, as a full disk would: at images, reports, masks or tables."""

    for limit in (0, 500, 1500):

        def bounded(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        # -B: what it compiles would be cut short for all others.
        command = [sys.executable, "-B", "-m", "mlx_cxr.make_demo_data", "--workers", "1"]
        command += ["--config", str(config_file(tmp_path, patients=2))]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=bounded)
        assert done.returncode == 2, done.stderr
        assert re.search(rf"^error: .*could not write {tmp_path}/\.raw-being-made/new.*", done.stderr, re.MULTILINE)
        assert "Traceback" not in done.stderr
    assert len(hashes(run(load_config(config_file(tmp_path, patients=2)), workers=1))) > 10


def test_a_folder_of_other_files_is_never_replaced(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mimic.csv").write_text("real data")
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config_file(tmp_path)), "--overwrite"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "raw") in message
    assert "data.root" in message
    assert (tmp_path / "raw" / "mimic.csv").read_text() == "real data"


def test_a_killed_run_leaves_no_process_and_no_cohort(tmp_path):
    command = [sys.executable, "-m", "mlx_cxr.make_demo_data", "--config", str(config_file(tmp_path, 200))]
    process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    wait_for_images(tmp_path)
    process.kill()
    process.wait()
    while is_there(process.pid):
        assert time.monotonic() < deadline, "processes that render outlive the run"
        time.sleep(0.1)
    assert not (tmp_path / "raw").exists()


KILLED = """
import os, signal, sys
sys.argv[:] = sys.argv[:1] + sys.argv[3:]
event, left = sys.orig_argv[3], int(sys.orig_argv[4])

def hook(name, arguments):
    global left
    if name == event:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
from mlx_cxr.make_demo_data import main
main()
"""
"""Kills itself before its n-th renaming or removal of a file."""


@pytest.mark.parametrize(
    ("event", "at", "left"),
    [
        ("os.rename", 1, "old"),  # the marker of the new one is not there yet
        ("os.rename", 2, "old"),  # the old one is still in place
        ("os.rename", 3, "none"),  # between the two
        ("os.remove", 6, "new"),  # while the old one is removed
        ("os.remove", 10, "new"),
    ],
)
def test_whenever_it_is_killed_the_next_run_makes_the_same_bytes(tmp_path, event, at, left):
    before = hashes(run(load_config(config_file(tmp_path, patients=2)), workers=1))
    wanted = hashes(run(load_config(config_file(tmp_path / "other", patients=2, seed=9)), workers=1))
    options = ["--config", str(config_file(tmp_path, patients=2, seed=9)), "--workers", "1"]
    command = [sys.executable, "-c", KILLED, event, str(at), *options, "--overwrite"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == -9
    root = tmp_path / "raw"
    assert hashes(root) == {"old": before, "new": wanted, "none": {}}[left]
    if left != "new":
        # What was there before is not lost by a call that may not replace it.
        with pytest.raises(CohortExistsError, match="made with patients 2, image_size 128, laterals True, seed 3"):
            run(load_config(Path(options[1])), workers=1)
        assert hashes(root) == before
    run(load_config(Path(options[1])), overwrite=True, workers=1)
    assert hashes(root) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.yaml", "other", "raw"]


@pytest.mark.parametrize("pattern", ["files/**/*.jpg", "files/**/*.txt", "masks/**/*.png", "*-split.csv.gz"])
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_cohort_that_is_not_whole_is_made_again(tmp_path, caplog, pattern, damage):
    root = run(load_config(config_file(tmp_path, patients=2)), workers=1)
    before = hashes(root)
    victim = sorted(root.glob(pattern))[-1]
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1])
    caplog.set_level("INFO", "mlx_cxr")
    run(load_config(config_file(tmp_path, patients=2)), workers=1)
    assert f"has {len(before) - 2 - (damage == 'removed')} files of" in caplog.text
    assert "making it again" in caplog.text
    assert hashes(root) == before


def test_a_damaged_marker_says_the_way_out(tmp_path):
    root = run(load_config(config_file(tmp_path, patients=2)), workers=1)
    before = hashes(root)
    (root / "cohort.json").write_text('{"schema": 1, "hash')
    with pytest.raises(CohortExistsError, match=r"cohort\.json is not readable JSON.*--overwrite"):
        run(load_config(config_file(tmp_path, patients=2)), workers=1)
    run(load_config(config_file(tmp_path, patients=2)), overwrite=True, workers=1)
    assert hashes(root) == before


def test_a_cohort_that_runs_were_trained_on_is_kept_when_the_code_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(config_file(tmp_path, patients=2))
    root = run(config, workers=1)
    before = hashes(root)
    build_manifest.run(config)
    create_run("outputs", "one", stage="train_cnn", config={}, inputs={"manifest": config.manifest_path})
    monkeypatch.setattr(make_demo_data, "code_hash", lambda: "newer")
    with pytest.raises(CohortExistsError, match=r"outputs/one were trained on it; pass --overwrite"):
        run(config, workers=1)
    assert hashes(root) == before
    run(config, overwrite=True, workers=1)
    assert hashes(root).keys() == before.keys()


def test_two_calls_at_once_do_not_share_a_folder(tmp_path):
    command = [sys.executable, "-m", "mlx_cxr.make_demo_data", "--config", str(config_file(tmp_path, 200))]
    first = subprocess.Popen([*command, "--workers", "1"], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for_images(tmp_path)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert f"is being written by process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_ctrl_c_ends_it_within_seconds(tmp_path):
    """Of 200 patients some minutes were left to render: none is waited for."""
    command = [sys.executable, "-m", "mlx_cxr.make_demo_data", "--config", str(config_file(tmp_path, 200, size=1024))]
    process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for_images(tmp_path)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert time.monotonic() - begun < 10
    assert process.returncode == 130
    assert "stopped; what was written so far is kept" in said
    assert "Traceback" not in said
    assert not is_there(process.pid)


def wait_for_images(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not any((folder / ".raw-being-made" / "new").rglob("*.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_there(group: int) -> bool:
    """True if a process of the group is still at work after some seconds; one that only waits to be reaped is not."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        if not any(int(g) == group and not stat.startswith("Z") for g, stat in map(str.split, listed.splitlines())):
            return False
        time.sleep(0.2)
    return True
