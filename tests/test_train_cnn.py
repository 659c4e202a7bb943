"""The training stage, from a small table of images on disk to a run's folder, by its command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_cohort import make_cohort

from mlx_cxr import train_cnn
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import read_record, sha256_file
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.models.convert import load_model
from mlx_cxr.training.classifier_run import settings_hash, validator
from mlx_cxr.training.cohort import Cohort
from mlx_cxr.training.loop import TrainingDataError, TrainingDivergedError
from mlx_cxr.training.scoring import predict_logits


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A folder with images, their table, and what `build_manifest` and `prepare_images` make of them."""
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def command(cohort: Path, *options: str, **popen: object) -> subprocess.Popen:
    line = [sys.executable, "-m", "mlx_cxr.train_cnn", "--config", str(cohort / "trial.yaml"), *options]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the command prints before it ends with status 2; nothing on standard output."""
    with pytest.raises(SystemExit) as end:
        train_cnn.main(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


@pytest.fixture(scope="module")
def finished(cohort) -> Path:
    """An unbroken run of the stage."""
    return train_cnn.run(load_config(cohort / "trial.yaml"), "whole")


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without what the clock and the machine say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def test_a_run_leaves_what_it_promises(cohort, finished):
    assert finished == cohort / "outputs" / "whole"
    record = read_record(finished / "config.json")
    assert record["stage"] == "train_cnn"
    assert record["inputs"]["manifest"]["sha256"] == sha256_file(cohort / "made" / "manifest.csv")
    assert record["inputs"]["pixel_index"]["sha256"] == sha256_file(cohort / "made" / "images_32.json")
    assert record["device"]["cores"] == os.cpu_count()
    summary = read_record(finished / "training.json")
    assert (summary["epochs"], summary["steps"], summary["stopped_early"]) == (2, 6, False)
    assert summary["initial_weights"]["weights"] == "scratch"
    # torchvision's resnet18 with one input channel and 14 classes.
    assert summary["parameters"]["total"] == 11_689_512 - 2 * 3136 - 513 * 1000 + 513 * 14
    assert summary["parameters"]["trainable"] == summary["parameters"]["total"]
    assert not (finished / "last").exists(), "there is nothing to resume"


def test_the_best_weights_reproduce_the_figure_that_chose_them(cohort, finished):
    validation = Cohort.open(load_config(cohort / "trial.yaml")).split("validate")
    assert len(validation) == 8
    logits = predict_logits(load_model(finished / "best_model.safetensors"), validation.images, 3)
    targets = np.nan_to_num(validation.raw_labels)
    best = read_record(finished / "training.json")["best_auc"]
    assert macro_auc(roc_auc_per_label(targets, logits)) == pytest.approx(best, abs=1e-9)
    epochs = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in epochs if line["kind"] == "epoch"]
    assert best == max(line["val_macro_auc"] for line in epochs)
    chosen = next(line for line in epochs if line["val_macro_auc"] == best)
    cross_entropy = np.logaddexp(0, logits) - targets * logits
    assert chosen["val_loss"] == pytest.approx(cross_entropy.mean(), rel=1e-5)


def test_a_command_killed_and_resumed_ends_with_the_weights_of_an_unbroken_one(cohort):
    """SIGKILL of the real command in the middle of its second epoch; then `--resume`.

    Both in processes of their own: one in which much else is loaded may round a matrix product differently.
    """
    run_dir, finished = cohort / "outputs" / "killed", cohort / "outputs" / "unbroken"
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    unbroken = command(cohort, "--run_name", "unbroken")
    unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0
    # A line of metrics for each of three steps, one for the epoch, and steps 4 and 5: killed before the latter's.
    killer = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), "train_cnn", "6"]
    settings = ["--config", str(cohort / "trial.yaml"), "--run_name", "killed"]
    killed = subprocess.run([*killer, *settings], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (run_dir / "training.json").exists()
    resumed = command(cohort, "--run_name", "killed", "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert "resumed from the last saved state" in errors
    ours, theirs = (mx.load(str(folder / "best_model.safetensors")) for folder in (run_dir, finished))
    assert set(ours) == set(theirs)
    # Equal bit by bit on the CPU; another device may add up in another order.
    slack = 0 if on_cpu else 1e-3
    for key in ours:
        np.testing.assert_allclose(np.array(ours[key]), np.array(theirs[key]), rtol=slack, atol=slack, err_msg=key)
    if on_cpu:
        assert metrics(run_dir) == metrics(finished), "the last weights validate alike"
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


def test_a_run_that_exists_is_refused_and_untouched(cohort, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--run_name", "whole")
    assert len(message.splitlines()) == 1
    for word in (str(finished), "--run_name", "--resume", "--overwrite"):
        assert word in message
    message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--run_name", "whole", "--resume", "--seed", "7")
    assert "training.json is of a run that was made with other data or settings" in message
    train_cnn.main(["--config", str(cohort / "trial.yaml"), "--run_name", "whole", "--resume"])
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_only_one_process_writes_a_run(cohort, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    code = "import sys, time\nfrom mlx_cxr.core.claim import claimed\nwith claimed(sys.argv[1]):\n"
    code += "    print(1, flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(finished)], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        for option in ("--resume", "--overwrite"):
            message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--run_name", "whole", option)
            assert f"{finished} is being written by process {holder.pid}" in message
    finally:
        holder.kill()
        holder.wait()
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".claim"}
    assert after == before


@pytest.mark.parametrize("name", ["../elsewhere", "a/b"])
def test_a_run_name_that_leaves_the_outputs_is_refused(cohort, capsys, name):
    message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--run_name", name)
    assert f"run name '{name}'" in message
    assert not (cohort / "elsewhere").exists()
    assert not (cohort / "outputs" / "elsewhere").exists()


def test_a_begun_run_without_state_is_made_anew_on_resume(cohort):
    """Killed before its first save; the record is then that of the new life."""
    folder = cohort / "outputs" / "early"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"seed": 99}')
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 9.0}\n')
    config = load_config(cohort / "trial.yaml", ["training.epochs=1"])
    train_cnn.run(config, "early", resume=True)
    assert read_record(folder / "config.json")["seed"] == 0
    assert "9.0" not in (folder / "metrics.jsonl").read_text()


def test_weights_of_another_shape_are_named(cohort, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    save_file({"conv1.weight": np.zeros((64, 3, 3, 3), np.float32), "fc.weight": np.zeros((7, 9), np.float32)}, path)
    message = failure(
        capsys, "--config", str(cohort / "trial.yaml"), "--run_name", "shape", "--set", f"model.weights={path}"
    )
    for word in (str(path), "conv1.weight", "fc.weight", "missing", "layer1.0.conv1.weight"):
        assert word in message
    assert not (cohort / "outputs" / "shape").exists(), "the name is still free once the file is put right"
    message = failure(
        capsys,
        "--config",
        str(cohort / "trial.yaml"),
        "--run_name",
        "shape",
        "--set",
        "model.weights=absent.safetensors",
    )
    assert "absent.safetensors" in message


def test_a_checkpoint_of_this_package_is_gone_on_from(cohort, finished):
    best = finished / "best_model.safetensors"
    config = load_config(cohort / "trial.yaml", [f"model.weights={best}", "training.epochs=1"])
    folder = train_cnn.run(config, "from_checkpoint")
    origin = read_record(folder / "training.json")["initial_weights"]
    assert (origin["weights"], origin["sha256"]) == ("file", sha256_file(best))


def test_a_split_without_both_classes_is_refused_before_training(cohort):
    config = load_config(cohort / "trial.yaml")
    split = Cohort.open(config).split("validate")
    split.raw_labels[:] = 0
    with pytest.raises(TrainingDataError, match=r"split 'validate' has 8 films and both classes of no label"):
        validator(split, 4)


def test_missing_inputs_name_the_file(cohort, tmp_path, capsys):
    message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--set", f"data.work_dir={tmp_path}")
    assert str(tmp_path / "manifest.csv") in message
    message = failure(capsys, "--config", str(cohort / "trial.yaml"), "--set", "pixels.size=64")
    assert "images_64" in message
    message = failure(capsys, "--config", str(tmp_path / "typo.yaml"))
    assert "typo.yaml: no such file" in message


def test_only_what_decides_the_weights_forbids_a_resumption(cohort):
    def hash_with(*overrides: str) -> str:
        config = load_config(cohort / "trial.yaml", overrides)
        return settings_hash(config, config.training, "m")

    same = (
        "evaluation.batch_size=8",
        "explain.method=hires_cam",
        "training.pixel_budget_gb=0.5",
        "run_name=b",
        "outputs=o",
    )
    for override in same:
        assert hash_with(override) == hash_with()
    other = (
        "seed=1",
        "training.epochs=3",
        "labels.uncertain=ones",
        "augment.shift=0.1",
        "model.dropout=0.1",
        "pixels.size=64",
    )
    for override in other:
        assert hash_with(override) != hash_with()
    config = load_config(cohort / "trial.yaml")
    assert settings_hash(config, config.training, "n") != hash_with()
    assert settings_hash(config, config.training, "m", teacher="t") != hash_with()


def test_resume_and_overwrite_exclude_each_other(cohort, capsys):
    with pytest.raises(SystemExit):
        train_cnn.main(["--config", str(cohort / "trial.yaml"), "--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_overwriting_replaces_the_run(cohort):
    config = load_config(cohort / "trial.yaml", ["training.epochs=1"])
    folder = train_cnn.run(config, "again")
    train_cnn.run(config.model_copy(update={"seed": 5}), "again", overwrite=True)
    assert read_record(folder / "config.json")["seed"] == 5
    assert read_record(folder / "training.json")["epochs"] == 1
    # One that fails has not left the old one's end behind, which says that a run is finished.
    diverging = load_config(cohort / "trial.yaml", ["training.learning_rate=1e30", "training.warmup_fraction=0.0"])
    with pytest.raises(TrainingDivergedError, match=r"lower (training.learning_rate|the learning rate)"):
        train_cnn.run(diverging, "again", overwrite=True)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"config.json", "metrics.jsonl"}
