"""Two real processes on a ring of this machine: they end as one does, and a rank that dies ends the run."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from ranks import TESTS, by_hand, launched, together
from safetensors.numpy import load_file
from toy_cohort import make_cohort
from toy_training import metrics
from toy_training import run_tiny as run_alone

from mlx_cxr import cache_teacher_outputs, lfm_finetune, train_cnn
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import read_record
from mlx_cxr.data.soft_labels import load_soft_labels
from mlx_cxr.evaluation.predictions import read_predictions

pytestmark = pytest.mark.usefixtures("without_plots")

TINY = str(TESTS / "ranked_tiny.py")


def assert_alike(got: Path, wanted: Path, *names: str, tolerance: float = 2e-5) -> None:
    """Weights of two runs, within what adding up in another order does; and the lines that they logged."""
    for name in names:
        ours, theirs = load_file(got / name), load_file(wanted / name)
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-3, atol=tolerance, err_msg=f"{name}: {key}")
    ours, theirs = metrics(got), metrics(wanted)
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process, in a program of its own as the ranks are."""
    from ranked_tiny import uneven_targets

    folder = tmp_path_factory.mktemp("alone")
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    run_alone(folder, targets=uneven_targets())
    mx.set_default_device(before)
    return folder


def test_two_ranks_end_as_one_process_does(alone, tmp_path):
    """BatchNorm over the whole batch, labels known unevenly, dropout and augmentation alike, shared validation."""
    done = launched(TINY, str(tmp_path / "run"))
    assert "rank 0 done" in done.stdout
    assert "rank 1 done" in done.stdout
    assert_alike(tmp_path / "run", alone, "best_model.safetensors", "last/state.safetensors")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_under_the_launcher_ends_the_run_which_one_process_goes_on_with(alone, tmp_path, victim):
    """Killed after epoch 1 of 2, whose state is on the disk; two go on with it as well."""
    from ranked_tiny import uneven_targets

    folder = tmp_path / "run"
    started = time.monotonic()
    done = launched(TINY, str(folder), f"kill={victim},8", timeout=90)
    assert time.monotonic() - started < 85, "much less where nothing else runs"
    assert f"Node with rank {victim} exited with code -9" in done.stderr
    assert "done" not in done.stdout
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    run_alone(folder, targets=uneven_targets(), resume=True)
    assert_alike(folder, alone, "best_model.safetensors", "last/state.safetensors")
    if victim == 1:
        launched(TINY, str(again), "resume")
        assert_alike(again, alone, "best_model.safetensors", "last/state.safetensors")


def test_a_rank_that_dies_unwatched_ends_the_other_in_bounded_time(tmp_path):
    """MLX's ring would wait for ever."""
    processes = by_hand(tmp_path, TINY, str(tmp_path / "run"), "kill=1,8", MLX_CXR_RANK_TIMEOUT="5")
    out, err = processes[0].communicate(timeout=120)
    processes[1].communicate(timeout=10)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode != 0
    assert "rank 0 of 2 waits in vain for another rank at " in err
    assert "--resume" in err
    assert (tmp_path / "run" / "last" / "state.safetensors").exists()
    assert "done" not in out


def test_ranks_with_other_settings_are_refused(tmp_path):
    code = "import sys, mlx_cxr; from mlx_cxr.core import device; from mlx_cxr.training.distributed import World\n"
    code += "from mlx_cxr.core.errors import readable_errors\n"
    code += "w = World.join()\n"
    code += "with readable_errors(): w.check_same('settings', f'{w.rank}')"
    processes = by_hand(tmp_path, "-c", code)
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "error: rank 1 has other settings than rank 0" in err


@pytest.mark.slow
def test_the_stage_on_two_ranks_is_the_run_of_one(tmp_path):
    """ResNet-18 from the command line: same weights, one writer, and the number of processes in the record."""
    folder = make_cohort(tmp_path)
    config = load_config(folder / "trial.yaml", ["model.dropout=0.2", "training.epochs=1"])
    train_cnn.run(config, "one")
    arguments = ("--config", str(folder / "trial.yaml"), "--set", "model.dropout=0.2", "--set", "training.epochs=1")
    done = together(tmp_path, "-m", "mlx_cxr.train_cnn", *arguments, "--run_name", "two")
    one, two = folder / "outputs" / "one", folder / "outputs" / "two"
    assert_alike(two, one, "best_model.safetensors", tolerance=3e-4)
    assert read_record(two / "config.json")["device"]["processes"] == 2
    assert [rank.returncode for rank in done] == [0, 0]
    assert [rank.stdout.count("epoch") for rank in done] == [1, 0]
    assert {path.name for path in two.rglob("*")} == {path.name for path in one.rglob("*")}
    of_three = (*arguments, "--run_name", "three", "--set", "training.batch_size=3")
    refused = together(tmp_path, "-m", "mlx_cxr.train_cnn", *of_three)[0]
    assert "error: training.batch_size is 3 here, which 2 processes cannot share equally; 2 or 4" in refused.stderr
    refused = together(tmp_path, "-m", "mlx_cxr.evaluate_cnn", *arguments, "--run_name", "two")[0]
    assert "error: evaluate_cnn runs as one process; start it without mlx.launch" in refused.stderr


@pytest.mark.slow
def test_a_teacher_tuned_and_asked_by_two_ranks_is_that_of_one(tmp_path_factory, tmp_path):
    from toy_teacher import shared

    toy = shared(tmp_path_factory)
    settings = ("teacher.training.epochs=1", "teacher.training.batch_size=4", "teacher.batch_size=12")
    config = toy.config(*settings)
    arguments = ("--config", str(toy.folder / "trial.yaml"), *(part for one in settings for part in ("--set", one)))
    lfm_finetune.run(config, "one_rank")
    tuned = together(tmp_path, "-m", "mlx_cxr.lfm_finetune", *arguments, "--run_name", "two_ranks")
    assert [rank.returncode for rank in tuned] == [0, 0]
    one, two = (config.run_dir(name) for name in ("one_rank", "two_ranks"))
    assert_alike(two, one, "adapter_weights/adapters.safetensors", tolerance=1e-4)

    shutil.rmtree(two)
    shutil.copytree(one, two)
    cache_teacher_outputs.run(config, "one_rank", zero_shot=True)
    asked = (*arguments, "--teacher_run", "two_ranks", "--zero_shot")
    assert [rank.returncode for rank in together(tmp_path, "-m", "mlx_cxr.cache_teacher_outputs", *asked)] == [0, 0]
    ours, theirs = load_soft_labels(two), load_soft_labels(one)
    assert ours.study_ids == theirs.study_ids
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
    for folder in (".", "zero_shot"):
        ours, theirs = (read_predictions(run / folder / "predictions.csv").predictions for run in (two, one))
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
