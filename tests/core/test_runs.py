"""Run folders and their records."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import mlx_cxr
from mlx_cxr.core.files import (
    RecordError,
    read_json,
    write_record,
)
from mlx_cxr.core.runs import (
    RunExistsError,
    RunNameError,
    create_run,
    git_state,
    open_run,
    package_versions,
    provenance,
    run_folder,
)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python process with the package on its path, its output piped."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def make(outputs: Path, name: str = "first", **options: object) -> Path:
    table = outputs.parent / "manifest.csv"
    table.write_text("a,b\n1,2\n")
    config = {"seed": 7, "data": {"root": Path("raw")}}
    return create_run(outputs, name, stage="train_cnn", config=config, inputs={"manifest": table}, **options)


def test_a_run_begins_with_its_provenance(tmp_path):
    folder = make(tmp_path / "outputs", device={"kind": "cpu"})
    assert folder == tmp_path / "outputs" / "first"
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    record = read_json(folder / "config.json")
    assert record["inputs"]["manifest"]["sha256"] == hashlib.sha256(b"a,b\n1,2\n").hexdigest()
    assert record["inputs"]["manifest"]["path"] == str(tmp_path / "manifest.csv")
    assert (record["stage"], record["seed"], record["device"]) == ("train_cnn", 7, {"kind": "cpu"})
    assert record["config"] == {"seed": 7, "data": {"root": "raw"}}
    assert record["packages"]["numpy"] == np.__version__
    assert record["started"].endswith("+00:00")
    assert record["command"][0] == Path(sys.argv[0]).name


def test_a_run_that_exists_is_not_touched(tmp_path):
    folder = make(tmp_path / "outputs")
    before = (folder / "config.json").read_bytes()
    (folder / "best_model.safetensors").write_text("weights")
    with pytest.raises(RunExistsError, match=r"outputs/first exists; .*--run_name.*--resume.*--overwrite"):
        make(tmp_path / "outputs")
    assert (folder / "config.json").read_bytes() == before
    make(tmp_path / "outputs", overwrite=True)
    assert (folder / "best_model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("name", ["../x", "x/../../y", "/tmp/x", ".", "..", "", "a b", "-a", "a\n", "é", "x" * 101])
def test_names_that_are_no_folder_of_their_own_are_refused(tmp_path, name):
    with pytest.raises(RunNameError, match="use up to 100 letters"):
        make(tmp_path / "outputs", name)
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(RunNameError):
        run_folder(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "0", "cnn_baseline-2.1", "x" * 100])
def test_usable_names(tmp_path, name):
    assert run_folder(tmp_path, name) == tmp_path / name


def test_an_input_that_is_missing_leaves_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.csv"):
        create_run(tmp_path, "x", stage="s", config={}, inputs={"manifest": tmp_path / "absent.csv"})
    assert not (tmp_path / "x" / "config.json").exists()


def test_versions_say_what_is_not_there(monkeypatch):
    monkeypatch.setattr("mlx_cxr.core.runs._PACKAGES", ("numpy", "no-such-package"))
    assert package_versions() == {"numpy": np.__version__, "no-such-package": "not installed"}


def test_commit_is_this_checkouts_or_none():
    checkout = Path(mlx_cxr.__file__).parents[1]
    commit, dirty = git_state()
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
    if asked.returncode:
        assert (commit, dirty) == (None, None)
    else:
        assert commit == asked.stdout.strip()
        assert isinstance(dirty, bool)


def test_commit_of_a_strangers_checkout_is_not_taken(tmp_path, monkeypatch):
    """A package installed into an environment inside another repository is no part of it."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "runs.py").write_text("")
    monkeypatch.setattr("mlx_cxr.core.runs.__file__", str(tmp_path / ".venv" / "runs.py"))
    assert git_state() == (None, None)


def test_provenance_without_seed_or_inputs():
    record = provenance("doctor", {}, {})
    assert record["seed"] is None
    assert record["inputs"] == {}
    json.dumps(record, allow_nan=False)


class TestOpening:
    """`open_run`, each fault with the sentence that names the file and the way out."""

    @pytest.fixture
    def write(self, tmp_path):
        def write(stage="train_cnn", drop=(), **config):
            folder = tmp_path / "trial"
            folder.mkdir(exist_ok=True)
            record = {"stage": stage, "config": config, "inputs": {"manifest": {"path": "m.csv", "sha256": "ab"}}}
            write_record(folder / "config.json", {key: value for key, value in record.items() if key not in drop})
            return folder

        return write

    @pytest.mark.parametrize(
        ("stage", "weights", "kind"),
        [
            ("train_cnn", "best_model.safetensors", "CNN"),
            ("lfm_finetune", "adapter_weights/adapters.safetensors", "teacher"),
            ("distillation", "best_student.safetensors", "student"),
        ],
    )
    def test_every_kind(self, write, stage, weights, kind):
        run = open_run(write(stage, distillation={"targets": "teacher"}))
        assert (run.stage, run.weights, run.kind) == (stage, run.folder / weights, kind)
        assert run.inputs["manifest"]["sha256"] == "ab"

    def test_a_student_of_other_targets_is_a_control(self, write):
        assert open_run(write("distillation", distillation={"targets": "shuffled"})).kind == "control"
        with pytest.raises(RecordError, match=r"config\.json lacks 'config\.distillation\.targets'"):
            open_run(write("distillation")).kind  # noqa: B018

    def test_no_such_run(self, tmp_path):
        with pytest.raises(RecordError, match=r"nowhere.config\.json is missing: there is no such run"):
            open_run(tmp_path / "nowhere")

    @pytest.mark.parametrize("stage", ["benchmark", None])
    def test_a_folder_of_no_stage_that_trains(self, write, stage):
        with pytest.raises(RecordError, match=f"made by the stage {stage!r}; a run of train_cnn or distillation or"):
            open_run(write(stage))

    def test_a_run_of_another_stage_than_is_asked_for(self, write):
        with pytest.raises(RecordError, match="by the stage 'lfm_finetune'; a run of train_cnn or distillation is"):
            open_run(write("lfm_finetune"), "train_cnn", "distillation")

    @pytest.mark.parametrize("key", ["config", "inputs"])
    def test_a_record_without_a_key(self, write, key):
        with pytest.raises(RecordError, match=r"config\.json lacks 'config' or 'inputs\.manifest\.sha256'"):
            open_run(write(drop=(key,)))

    def test_a_run_whose_training_has_not_ended(self, write):
        folder = write()
        assert not open_run(folder).finished
        with pytest.raises(RecordError, match=r"has not ended; resume it: .*mlx_cxr\.train_cnn --run_name trial"):
            open_run(folder, finished=True)
        for name in ("best_model.safetensors", "training.json"):
            (folder / name).touch()
        assert open_run(folder, finished=True).finished

    def test_the_folder_one_stands_in(self, write, monkeypatch):
        monkeypatch.chdir(write())
        assert open_run(".").folder.name == "trial"
