"""Run folders and atomic writes, with real kills and a disk that really is full."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import mlx_cxr
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.runs import (
    RunExistsError,
    RunFormatError,
    RunNameError,
    append_jsonl,
    atomic_path,
    create_run,
    git_state,
    hash_of,
    open_run,
    package_versions,
    provenance,
    read_json,
    run_folder,
    sha256_file,
    write_json,
    write_text,
)


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A Python process with the package on its path, its output piped."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_new_file_and_replacement(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    write_text(path, "old")
    assert write_text(path, "néw") == path
    assert path.read_bytes() == "néw".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_the_suffix_is_kept_for_writers_that_look_at_it(tmp_path):
    with atomic_path(tmp_path / "a.npy") as temporary:
        assert temporary.parent == tmp_path
        np.save(temporary, np.arange(3))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), [0, 1, 2])
    assert len(list(tmp_path.iterdir())) == 1


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "private", "x")
        os.umask(0o022)
        write_text(tmp_path / "usual", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "usual").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_a_failing_writer_keeps_the_old_file(tmp_path, error):
    path = write_text(tmp_path / "a.txt", "old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"could not write .*file/a.json: .*; what was there before is kept"):
        write_text(tmp_path / "file" / "a.json", "x")
    with (
        pytest.raises(FileNotFoundError, match=r"could not write .*a.json: No such file.*absent.csv"),
        atomic_path(tmp_path / "a.json"),
    ):
        (tmp_path / "absent.csv").read_text()


def test_an_error_with_its_own_words_passes(tmp_path):
    class GoneError(UserError, FileNotFoundError):
        pass

    with pytest.raises(GoneError) as caught, atomic_path(tmp_path / "a"):
        raise GoneError("film 7 is gone")
    assert str(caught.value) == "film 7 is gone"


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path):
    path = write_text(tmp_path / "a.bin", "old")
    writer = python(
        """
        import sys
        from mlx_cxr.core.runs import atomic_path
        with atomic_path(sys.argv[1]) as temporary, temporary.open("wb") as out:
            while True:
                out.write(b"x" * 100_000)
                print("wrote", flush=True)
        """,
        path,
    )
    for _ in range(3):
        assert writer.stdout.readline() == "wrote\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=20)
    assert writer.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


FULL_DISK = """
    import resource, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    import numpy as np
    import mlx_cxr
    from mlx_cxr.core.errors import readable_errors
    from mlx_cxr.core.runs import atomic_path, write_text
    {imports}
    # Files may grow to 100 kB: what a full disk does, by the same system call failing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with readable_errors():
        {action}
    """
WRITERS = {
    "a.txt": ("", "write_text(sys.argv[1], 'x' * 1_000_000)"),
    "a.npy": (
        "",
        "exec('with atomic_path(sys.argv[1]) as t:\\n np.save(t.open(\"wb\"), np.zeros(10**6, np.uint8))')",
    ),
    "weights.safetensors": (
        "import mlx.core as mx; from mlx_cxr.models.weight_files import write_safetensors",
        "write_safetensors(sys.argv[1], {'a': mx.zeros((10**6,))}, {})",
    ),
    "state.safetensors": (
        "import mlx.nn as nn, mlx.optimizers as optim; from pathlib import Path; "
        "from mlx_cxr.training.checkpoint import Progress, save_state",
        "save_state(Path(sys.argv[1]), nn.Linear(500, 500), optim.SGD(0.1), Progress())",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, name):
    imports, action = WRITERS[name]
    path = write_text(tmp_path / name, "old")
    process = python(FULL_DISK.format(imports=imports, action=action), path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert f"could not write {path}" in errors
    assert "what was there before is kept" in errors
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_plain_data(tmp_path):
    value = {
        "path": Path("a/b"),
        "array": np.array([[1.5, math.nan]]),
        "scalar": np.float32(0.25),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "infinite": math.inf,
        3: (1, 2),
        "none": None,
    }
    path = write_json(tmp_path / "a.json", value)
    assert read_json(path) == {
        "path": "a/b",
        "array": [[1.5, None]],
        "scalar": 0.25,
        "count": 3,
        "flag": True,
        "infinite": None,
        "3": [1, 2],
        "none": None,
    }
    assert list(json.loads(path.read_text())) == [str(key) for key in value]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(RunFormatError, match=r"absent.json is missing"):
        read_json(tmp_path / "absent.json")
    for content in (b'{"a": ', b"\xff\xfe\x00", b""):
        (tmp_path / "cut.json").write_bytes(content)
        with pytest.raises(RunFormatError, match=r"cut.json is not readable JSON"):
            read_json(tmp_path / "cut.json")


def test_one_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": np.float32(0.5)})
    append_jsonl(path, {"step": 2, "loss": math.nan, "note": "a\nb"})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "note": "a\nb"},
    ]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_file_hash_is_sha256(tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_hash_of_a_value_does_not_depend_on_key_order_or_container():
    text = b'{"a":[1,2.5,null],"b":"x/y"}'
    assert hash_of({"b": Path("x/y"), "a": (1, 2.5, None)}) == hashlib.sha256(text).hexdigest()
    assert hash_of({"a": [1.0, 2.5, math.nan], "b": "x/y"}) == hash_of({"b": "x/y", "a": np.array([1, 2.5, np.nan])})
    assert hash_of({"a": 1}) != hash_of({"a": 2})


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
            write_json(folder / "config.json", {key: value for key, value in record.items() if key not in drop})
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
        with pytest.raises(RunFormatError, match=r"config\.json lacks 'config\.distillation\.targets'"):
            open_run(write("distillation")).kind  # noqa: B018

    def test_no_such_run(self, tmp_path):
        with pytest.raises(RunFormatError, match=r"nowhere.config\.json is missing: there is no such run"):
            open_run(tmp_path / "nowhere")

    @pytest.mark.parametrize("stage", ["benchmark", None])
    def test_a_folder_of_no_stage_that_trains(self, write, stage):
        with pytest.raises(RunFormatError, match=f"made by the stage {stage!r}; a run of train_cnn or distillation or"):
            open_run(write(stage))

    def test_a_run_of_another_stage_than_is_asked_for(self, write):
        with pytest.raises(RunFormatError, match="by the stage 'lfm_finetune'; a run of train_cnn or distillation is"):
            open_run(write("lfm_finetune"), "train_cnn", "distillation")

    @pytest.mark.parametrize("key", ["config", "inputs"])
    def test_a_record_without_a_key(self, write, key):
        with pytest.raises(RunFormatError, match=r"config\.json lacks 'config' or 'inputs\.manifest\.sha256'"):
            open_run(write(drop=(key,)))

    def test_a_run_whose_training_has_not_ended(self, write):
        folder = write()
        assert not open_run(folder).finished
        with pytest.raises(RunFormatError, match=r"has not ended; resume it: .*mlx_cxr\.train_cnn --run_name trial"):
            open_run(folder, finished=True)
        for name in ("best_model.safetensors", "training.json"):
            (folder / name).touch()
        assert open_run(folder, finished=True).finished

    def test_the_folder_one_stands_in(self, write, monkeypatch):
        monkeypatch.chdir(write())
        assert open_run(".").folder.name == "trial"
