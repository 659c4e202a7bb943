"""Several processes as one run: parts, means and draws against one process. For real ranks: tests/test_distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.core.config_schema import AugmentConfig, TrainingConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.ops import streams
from mlx_cxr.teacher.scoring import own_rows
from mlx_cxr.training import classifier_run, distributed
from mlx_cxr.training.augment import augment
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.classifier_task import TrainingData, classifier_task
from mlx_cxr.training.distributed import ALONE, PartialDropout, World, share_dropout
from mlx_cxr.training.loop import TrainingResult
from mlx_cxr.training.losses import distillation_loss, masked_bce


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(cpu_only):
    """As the other tests of training."""


@pytest.mark.parametrize(("count", "ranks"), [(12, 1), (12, 2), (12, 3), (12, 12), (7, 7)])
def test_parts_leave_nothing_out_and_do_not_overlap(count, ranks):
    taken = [list(range(count))[World(rank, ranks).part(count, "x")] for rank in range(ranks)]
    assert [i for part in taken for i in part] == list(range(count))
    assert len({len(part) for part in taken}) == 1


@pytest.mark.parametrize(("count", "ranks", "fitting"), [(10, 4, "8 or 12"), (2, 3, "3"), (33, 2, "32 or 34")])
def test_a_batch_that_cannot_be_shared_says_which_could(count, ranks, fitting):
    with pytest.raises(UserError, match=f"training.batch_size is {count} here, which {ranks} .* {fitting} would do"):
        World(0, ranks).part(count, "training.batch_size")


class Half(SimpleNamespace):
    """One of two ranks, told what the mean over both would be."""

    size = 2

    def mean(self, x: mx.array) -> mx.array:
        return self.means.pop(0)


def mean_of_halves(loss_for, outputs: mx.array, targets: mx.array) -> float:
    """The mean over two ranks of their losses, each on its half of the batch."""
    counts: list[list[mx.array]] = []
    halves = [slice(0, len(outputs) // 2), slice(len(outputs) // 2, None)]
    for half in halves:
        seen: list[mx.array] = []
        recorder = SimpleNamespace(size=2, mean=lambda x, seen=seen: (seen.append(x), x)[1])
        loss_for(recorder)(outputs[half], targets[half])
        counts.append(seen)
    means = [(a + b) / 2 for a, b in zip(*counts, strict=True)]
    return sum(loss_for(Half(means=list(means)))(outputs[half], targets[half]).item() for half in halves) / 2


def test_the_mean_of_the_ranks_losses_is_the_loss_of_the_whole_batch():
    """Also where the known labels are spread unevenly, down to a half that has none."""
    rng = np.random.default_rng(0)
    outputs = mx.array(rng.normal(size=(8, 14 + 5)).astype(np.float32))
    targets = rng.normal(size=(8, 28 + 5)).astype(np.float32)
    targets[:, :14] = rng.random((8, 14)) < 0.3
    targets[:, :28][rng.random((8, 28)) < 0.2] = np.nan
    targets[4:, :14] = np.nan
    targets[5:, 28:] = np.nan
    weight = np.linspace(0.5, 3, 14)
    for loss_for in (
        lambda world: masked_bce(weight, world),
        lambda world: distillation_loss(0.3, 4.0, weight, 0.7, world),
    ):
        columns = 14 if loss_for(ALONE).__qualname__.startswith("masked") else 19
        given = outputs[:, :columns], mx.array(targets if columns == 19 else targets[:, :14])
        assert mean_of_halves(loss_for, *given) == pytest.approx(loss_for(ALONE)(*given).item(), rel=1e-6)
    one_known = np.full((8, 14), np.nan, np.float32)
    one_known[2, 3] = 1
    given = outputs[:, :14], mx.array(one_known)
    loss_for = lambda world: masked_bce(None, world)  # noqa: E731
    assert mean_of_halves(loss_for, *given) == pytest.approx(loss_for(ALONE)(*given).item(), rel=1e-6)


def test_images_are_changed_as_they_are_in_the_whole_batch():
    images = mx.random.uniform(shape=(6, 20, 20))
    key, config = mx.random.key(3), AugmentConfig(shift=0.1, scale=0.1, rotate=8, brightness=0.1, contrast=0.1)
    whole = augment(images, key, config)
    parts = [augment(images[2 * i : 2 * i + 2], key, config, (i, 3)) for i in range(3)]
    np.testing.assert_array_equal(np.array(mx.concatenate(parts)), np.array(whole))


def test_dropout_is_drawn_for_the_whole_batch():
    x = mx.ones((6, 50))
    mx.random.seed(4)
    whole = nn.Dropout(0.3)(x)
    parts = []
    for rank in range(3):
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
        share_dropout(model, World(rank, 3))
        mx.random.seed(4)
        parts.append(model.layers[1](x[2 * rank : 2 * rank + 2]))
        assert isinstance(model.layers[1], PartialDropout)
        np.testing.assert_array_equal(np.array(model.layers[1].eval()(x)), np.array(x))
    np.testing.assert_allclose(np.array(mx.concatenate(parts)), np.array(whole), rtol=1e-6)


def test_each_rank_reads_its_images_only_and_they_make_the_batches(tmp_path):
    """From disk: what is read is what the rank's part of each batch has."""
    from toy_training import NO_AUGMENTATION, TINY, TinyNet, TrainingConfig, source

    read: list[np.ndarray] = []

    class Recorder(ImageSource):
        def _read(self, items):
            read.append(items)
            return super()._read(items)

    seen = []
    for world in (ALONE, World(0, 2), World(1, 2)):
        read.clear()
        images = Recorder(TINY[0], np.arange(20), 0.0)
        model = TinyNet(dropout=0.0)
        task = classifier_task(
            model,
            masked_bce(),
            TrainingData(images, TINY[1]),
            lambda _: {},
            training=TrainingConfig(batch_size=4),
            augmentation=NO_AUGMENTATION,
            seed=1,
            world=world,
        )
        batches = list(task.batches(3, 1))
        np.testing.assert_array_equal(np.array(batches[0][0]), TINY[0][read[0]])
        np.testing.assert_array_equal(np.array(batches[0][1]), TINY[1][read[0]])
        seen.append(np.stack(read))
        assert task.samples(3, 1) == 16, "the rate is that of all ranks"
    np.testing.assert_array_equal(np.concatenate(seen[1:], axis=1), seen[0])
    assert source(TINY[0]).resident


def test_studies_go_to_one_rank_each_in_whole_batches():
    prompts = [SimpleNamespace(ids=[0] * length) for length in (5, 9, 1, 7, 7, 3, 2, 8, 6, 4, 1)]
    mine = np.stack([own_rows(prompts, 3, World(rank, 2)) for rank in range(2)])
    np.testing.assert_array_equal(mine.sum(axis=0), 1)
    longest_first = np.argsort([-len(prompt.ids) for prompt in prompts], kind="stable")
    np.testing.assert_array_equal(mine[0][longest_first], [True] * 3 + [False] * 3 + [True] * 3 + [False] * 2)


def test_one_process_is_what_there_is_without_a_launcher(tmp_path, monkeypatch):
    for name in ("MLX_RANK", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    assert World.join() == ALONE
    # As `mlx.launch -n 1` leaves it.
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "empty"))
    assert World.join() == ALONE
    rows = np.arange(6.0).reshape(3, 2)
    assert ALONE.rows_of_all(rows, np.ones(3, bool)) is rows
    assert ALONE.agree(lambda: {"a": 1}) == {"a": 1}


def test_a_wait_without_end_ends_the_process():
    """Where no exception can reach, as in MLX's ring behind an exchange that has failed."""
    code = "import time, mlx_cxr; from mlx_cxr.training.distributed import World\n"
    code += "with World(1, 3).waiting('step 12'): time.sleep(0.1)\n"
    code += "time.sleep(2)\nprint('alive', flush=True)\n"
    code += "with World(1, 3).waiting('step 13'): time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MLX_CXR_RANK_TIMEOUT": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "alive\n")
    assert "error: rank 1 of 3 waits in vain for another rank at step 13" in done.stderr


def test_ranks_cut_their_batches_into_as_many_parts_as_the_one_with_the_fewest(monkeypatch, tmp_path):
    """Where they did not, two of BatchNorm's exchanges changed places, and wrong sums were added without a word."""
    found = []

    def train(*_, **__) -> TrainingResult:
        found.append(len(streams.split(mx.zeros((8, 1)))))
        return TrainingResult(0.9, 1, 1, 1, 1.0, False)

    monkeypatch.setattr(classifier_run, "train", train)
    monkeypatch.setenv("MLX_CXR_STREAMS", "4")
    for others, parts in ((2, 2), (8, 4), (1, 1)):
        world = SimpleNamespace(
            writes=False, check_same=lambda *_: None, gather=lambda mine, n=others: np.stack([mine, [n]])
        )
        task = SimpleNamespace(world=world, best_name="best")
        classifier_run.fit(task, TrainingConfig(), seed=0, run_dir=tmp_path, settings="", resume=False, summary={})
        assert found.pop() == parts


@pytest.mark.parametrize("asked", ["soon", "0", "-5"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("MLX_CXR_RANK_TIMEOUT", asked)
    with pytest.raises(UserError, match="MLX_CXR_RANK_TIMEOUT"):
        distributed._seconds_to_wait()


def test_a_rank_of_a_launcher_that_mlx_cannot_reach_does_not_write_alone():
    code = "import mlx_cxr; from mlx_cxr.core import device; from mlx_cxr.core.errors import readable_errors\n"
    code += "with readable_errors(): device.start('train_cnn', parallel=True)"
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "started as one of several" in done.stderr


def test_a_rank_whose_peer_never_starts_says_so(tmp_path):
    (tmp_path / "hosts.json").write_text('[["127.0.0.1:9"], ["256.0.0.1:9"]]')
    code = "import mlx_cxr; from mlx_cxr.core import device; from mlx_cxr.core.errors import readable_errors\n"
    code += "with readable_errors(): device.start('train_cnn', parallel=True)"
    environment = {**os.environ, "MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "error: the other processes of this run cannot be reached" in done.stderr
