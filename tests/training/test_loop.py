"""The training loop: kills and resumption, what it logs and keeps, what stops it; on images and on adapters."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toy_training import (
    TINY_VALIDATION,
    TinyNet,
    arrays,
    assert_same_weights,
    metrics,
    run_tiny,
    validator,
)

from mlx_cxr.core.files import RecordError
from mlx_cxr.models.weight_files import write_safetensors
from mlx_cxr.training import classifier_task, loop
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.checkpoint import Progress, load_state
from mlx_cxr.training.loop import Task, TrainingDataError, TrainingDivergedError, train
from mlx_cxr.training.optimizer import make_optimizer

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(cpu_only):
    """Resumed runs are equal bit by bit on the CPU; other devices are exercised by the stage's test."""


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def count_moments(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[str]:
    """Note every moment at which a run reads images, validates or writes, and end it at one of them.

    Before and after each write of the loop counts as a moment of its own. Returns the list that fills up.
    """
    moments: list[str] = []

    def moment(what: str) -> None:
        if len(moments) == kill_at:
            raise Killed
        moments.append(what)

    def surrounded(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def around(*args: object, **kwargs: object) -> object:
            moment(f"before {name}")
            result = real(*args, **kwargs)
            moment(f"after {name}")
            return result

        return around

    for module, name in ((loop, "save_state"), (classifier_task, "save_model"), (loop, "append_jsonl")):
        monkeypatch.setattr(module, name, surrounded(name, getattr(module, name)))
    real_batches = ImageSource.batches

    def batches(self, batches_of_items):
        for images in real_batches(self, batches_of_items):
            moment("film batch")
            yield images

    monkeypatch.setattr(ImageSource, "batches", batches)
    return moments


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An unbroken run: folder, trained model, result, and the moments at which it could be killed."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as monkeypatch:
        moments = count_moments(monkeypatch)
        model, result = run_tiny(folder)
    return folder, model, result, moments


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(unbroken, tmp_path):
    """Every moment of the run in turn: killed there, resumed by a new process's worth of fresh objects."""
    folder, wanted, result, moments = unbroken
    assert moments.count("after save_state") == 5  # steps 3, 6 and 9, and the epochs' ends, 5 and 10
    best = (folder / "best_model.safetensors").read_bytes()
    for kill_at in range(len(moments)):
        run_dir = tmp_path / str(kill_at)
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_moments(monkeypatch, kill_at)
            with pytest.raises(Killed):
                run_tiny(run_dir)
        state = run_dir / "last" / "state.safetensors"
        model, again = run_tiny(run_dir, model=TinyNet(seed=99 if state.exists() else 0), resume=state.exists())
        assert_same_weights(model, wanted)
        assert (run_dir / "best_model.safetensors").read_bytes() == best, moments[kill_at]
        assert metrics(run_dir) == metrics(folder), f"killed at {kill_at}: {moments[kill_at]}"
        assert (again.best_auc, again.best_epoch, again.steps) == (result.best_auc, result.best_epoch, result.steps)
        assert not list(run_dir.rglob(".*")), "no temporary file is left"


def test_a_kill_loses_at_most_the_steps_since_the_last_save(unbroken, tmp_path):
    _, _, _, moments = unbroken
    steps_done, done, in_validation = [], 0, 0
    for what in moments:
        steps_done.append(done)
        # Two batches of the validation split follow each epoch of five training batches.
        if what == "film batch":
            in_validation = (in_validation + 1) % 7
            done += 1 <= in_validation <= 5
    for kill_at in range(len(moments)):
        run_dir = tmp_path / str(kill_at)
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_moments(monkeypatch, kill_at)
            with pytest.raises(Killed):
                run_tiny(run_dir)
        state = run_dir / "last" / "state.safetensors"
        saved = saved_progress(state).step if state.exists() else 0
        assert saved <= steps_done[kill_at] <= saved + 3, (kill_at, moments[kill_at])


def saved_progress(state: Path) -> Progress:
    optimizer = optim.MultiOptimizer([optim.AdamW(1e-3), optim.AdamW(1e-3)], [lambda _, w: w.ndim > 1])
    model = TinyNet()
    optimizer.init(model.trainable_parameters())
    return load_state(state, model, optimizer, "same")


SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import mlx_cxr, mlx.core as mx
    mx.set_default_device(mx.cpu)
    from toy_training import TINY_VALIDATION, run_tiny, validator
    inner = validator(*TINY_VALIDATION)
    def validate(model):
        print("validating", flush=True)
        time.sleep({nap})
        return inner(model)
    run_tiny(Path(sys.argv[1]), validate=validate, resume={resume}, epochs=6)
    print("done", flush=True)
    """


def start(run_dir: Path, resume: bool, nap: float) -> subprocess.Popen:
    code = textwrap.dedent(SCRIPT.format(tests=str(TESTS), resume=resume, nap=nap))
    return subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE, text=True)


def test_a_process_really_killed_resumes_to_the_same_weights(tmp_path):
    """SIGKILL at a different time in each of three lives, and a fourth that ends by itself; against one of one life."""
    run_dir, whole = tmp_path / "killed", tmp_path / "whole"
    for life in range(3):
        process = start(run_dir, resume=life > 0, nap=0.2)
        assert any("validating" in line for line in process.stdout)
        time.sleep(0.05 + 0.11 * life)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
    for folder, resume in ((run_dir, True), (whole, False)):
        out, _ = start(folder, resume, nap=0).communicate(timeout=60)
        assert out.endswith("done\n")
    assert metrics(run_dir) == metrics(whole)
    for name in ("best_model.safetensors", "last/state.safetensors"):
        if name.startswith("best"):
            assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
        ours, theirs = mx.load(str(run_dir / name)), mx.load(str(whole / name))
        assert set(ours) == set(theirs)
        for key in ours:
            np.testing.assert_array_equal(np.array(ours[key]), np.array(theirs[key]), err_msg=key)


def test_steps_and_epochs_are_logged_once_and_in_order(unbroken):
    folder, _, result, _ = unbroken
    lines = metrics(folder, timed=True)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [2, 4, 6, 8, 10]
    assert [(line["epoch"], line["step"]) for line in lines if line["kind"] == "epoch"] == [(1, 5), (2, 10)]
    assert result.steps == 10
    assert result.epochs == 2
    assert result.best_auc == max(line["val_macro_auc"] for line in lines if line["kind"] == "epoch")
    for line in lines:
        if line["kind"] == "epoch":
            assert line["samples_per_second"] > 0
            assert line["peak_memory_bytes"] > 0


def test_logged_losses_are_means_over_their_steps(tmp_path, monkeypatch):
    """Against the losses of single steps, which a logging interval of 1 gives."""
    run_tiny(tmp_path / "each", log_every=1)
    run_tiny(tmp_path / "three", log_every=3)
    each = {line["step"]: line for line in metrics(tmp_path / "each") if line["kind"] == "step"}
    by_three = {line["step"]: line for line in metrics(tmp_path / "three") if line["kind"] == "step"}
    assert list(by_three) == [3, 6, 9]
    for key in ("loss", "grad_norm"):
        assert by_three[3][key] == pytest.approx(np.mean([each[i][key] for i in (1, 2, 3)]), rel=1e-6)
        assert by_three[6][key] == pytest.approx(each[6][key], rel=1e-6), "an interval begins with its epoch"
        assert by_three[9][key] == pytest.approx(np.mean([each[i][key] for i in (7, 8, 9)]), rel=1e-6)
    first = next(line for line in metrics(tmp_path / "three") if line["kind"] == "epoch")
    assert first["train_loss"] == pytest.approx(np.mean([each[i]["loss"] for i in range(1, 6)]), rel=1e-6)


def test_a_step_ahead_of_the_host_makes_no_difference(unbroken, tmp_path, monkeypatch):
    """As on a GPU: a step is begun before the last one is done."""
    folder, wanted, _, _ = unbroken
    monkeypatch.setattr(loop, "_device_runs_ahead", lambda: True)
    assert_same_weights(run_tiny(tmp_path)[0], wanted)
    assert metrics(tmp_path) == metrics(folder)


def test_seeds_decide_everything(unbroken, tmp_path):
    _, wanted, _, _ = unbroken
    mx.random.seed(12345)
    assert_same_weights(run_tiny(tmp_path / "a")[0], wanted)
    other, _ = run_tiny(tmp_path / "b", seed=4)
    assert np.abs(np.array(other.fc.weight) - np.array(wanted.fc.weight)).max() > 1e-4


def test_a_network_in_evaluation_mode_is_trained_all_the_same(unbroken, tmp_path):
    """As `load_model` returns one; and a validation may leave it in that mode."""
    _, wanted, _, _ = unbroken
    inner = validator(*TINY_VALIDATION)

    def validate(model: nn.Module) -> dict[str, float]:
        figures = inner(model)
        model.eval()
        return figures

    assert_same_weights(run_tiny(tmp_path, model=TinyNet().eval(), validate=validate)[0], wanted)


def test_other_settings_are_refused_and_nothing_is_lost(unbroken, tmp_path):
    run_tiny(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RecordError, match=r"state.safetensors was made with other data or settings"):
        run_tiny(tmp_path, resume=True, settings="others")
    with pytest.raises(RecordError, match="nothing to resume"):
        run_tiny(tmp_path / "absent", resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    _, wanted, _, _ = unbroken
    _, first = run_tiny(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    model, again = run_tiny(tmp_path, resume=True, model=TinyNet(seed=5))
    assert_same_weights(model, wanted)
    assert (again.best_auc, again.steps, again.stopped_early) == (first.best_auc, 10, False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_does_not_inherit_an_old_ones_files(tmp_path):
    """Else a kill before its first save would let `--resume` go on with the old one."""
    run_tiny(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        count_moments(monkeypatch, 0)
        with pytest.raises(Killed):
            run_tiny(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_line_cut_by_a_kill_is_dropped(unbroken, tmp_path):
    folder, _, _, _ = unbroken
    with pytest.MonkeyPatch.context() as monkeypatch:
        count_moments(monkeypatch, 10)
        with pytest.raises(Killed):
            run_tiny(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"kind": "step", "step": 4, "lo')
    run_tiny(tmp_path, resume=True)
    assert metrics(tmp_path) == metrics(folder)


@pytest.mark.parametrize("lost", [b"\0" * 20, b"\xff\xfe{", b"[]"])
def test_a_damaged_line_is_left_out_and_said(unbroken, tmp_path, lost, caplog):
    folder, _, _, _ = unbroken
    with pytest.MonkeyPatch.context() as monkeypatch:
        count_moments(monkeypatch, 10)
        with pytest.raises(Killed):
            run_tiny(tmp_path)
    first, *others = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lost + first[len(lost) :] + b"".join(others))
    with caplog.at_level("WARNING", logger="mlx_cxr"):
        run_tiny(tmp_path, resume=True)
    assert f"{tmp_path / 'metrics.jsonl'}: left out 1 of {1 + len(others)} lines" in caplog.text
    assert metrics(tmp_path) == metrics(folder)[1:]


def test_early_stopping_at_patience(tmp_path):
    aucs = iter([0.6, 0.8, 0.7, 0.8, 0.9, 0.95])
    seen = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append(arrays(model))
        return {"loss": 0.0, "macro_auc": next(aucs)}

    _, result = run_tiny(tmp_path, validate=validate, epochs=6, patience=2)
    assert (result.best_auc, result.best_epoch, result.epochs, result.stopped_early) == (0.8, 2, 4, True)
    best = mx.load(str(tmp_path / "best_model.safetensors"))
    np.testing.assert_array_equal(np.array(best["fc.weight"]), seen[1]["fc.weight"])
    assert [line["val_macro_auc"] for line in metrics(tmp_path) if line["kind"] == "epoch"] == [0.6, 0.8, 0.7, 0.8]
    _, again = run_tiny(tmp_path, validate=validate, epochs=6, patience=2, resume=True)
    assert again.stopped_early
    assert again.steps == result.steps


def test_patience_zero_never_stops(tmp_path):
    _, result = run_tiny(tmp_path, validate=lambda _: {"loss": 0.0, "macro_auc": 0.5}, epochs=5)
    assert (result.epochs, result.best_epoch, result.stopped_early) == (5, 1, False)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_best(tmp_path, value):
    """The weights go bad after epoch 1's best was kept; found by the next log line, before any save of them."""
    inner, bad = validator(*TINY_VALIDATION), {}

    def validate(network: nn.Module) -> dict[str, float]:
        figures = inner(network)
        bad["best"] = arrays(network)
        return figures

    model = TinyNet()
    real = loop.save_state

    def save_then_poison(path, network, optimizer, progress, trainable_only):
        real(path, network, optimizer, progress, trainable_only)
        if progress.step == 5:
            network.fc.weight = mx.full(network.fc.weight.shape, value)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "save_state", save_then_poison)
        with pytest.raises(TrainingDivergedError, match=r"was (nan|inf) by step 6; lower training.learning_rate"):
            run_tiny(tmp_path, model=model, validate=validate, save_every=1, log_every=4)
    best = mx.load(str(tmp_path / "best_model.safetensors"))
    np.testing.assert_array_equal(np.array(best["fc.weight"]), bad["best"]["fc.weight"])
    state = mx.load(str(tmp_path / "last" / "state.safetensors"))
    assert all(np.isfinite(np.array(value)).all() for value in state.values())
    # What was kept can be gone on with.
    _, result = run_tiny(tmp_path, model=TinyNet(), save_every=1, log_every=4, resume=True)
    assert result.steps == 10


def test_a_learning_rate_far_too_high_ends_the_run(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"lower training.learning_rate"):
        run_tiny(tmp_path, learning_rate=1e30, warmup_fraction=0.0, log_every=1)


def test_undefined_validation_auc_ends_the_first_epoch(tmp_path):
    with pytest.raises(TrainingDataError, match="no label has both classes"):
        run_tiny(tmp_path, validate=lambda _: {"loss": 0.0, "macro_auc": float("nan")})


class Adapter(nn.Module):
    """A frozen linear base and a low-rank update of it: no image, no BatchNorm, no weight of one dimension."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.base = nn.Linear(8, 14, bias=False)
        self.base.weight = mx.array(rng.normal(size=(14, 8)).astype(np.float32))
        self.base.freeze()
        self.a = mx.array(np.random.default_rng(seed).normal(size=(8, 2)).astype(np.float32))
        self.b = mx.zeros((2, 14))

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + x @ self.a @ self.b


def adapter_task(model: Adapter, sizes: tuple[int, ...] = (4, 4, 2)) -> Task:
    """Batches of different sizes, each in two halves whose gradients are added up, as the teacher's are."""
    optimizer = make_optimizer(
        learning_rate=0.05, final_learning_rate=0.01, warmup_fraction=0.2, weight_decay=0.1, total_steps=2 * len(sizes)
    )
    optimizer.init(model.trainable_parameters())
    wanted = mx.array(np.random.default_rng(1).normal(size=(8, 14)).astype(np.float32))
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*halves: mx.array) -> tuple[mx.array, mx.array]:
        noise = mx.random.normal((8,))
        value, gradients = nn.value_and_grad(
            model, lambda: sum(((model(x + 0.1 * noise) - x @ wanted) ** 2).sum() for x in halves)
        )()
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return value, norm

    def batches(epoch, skip):
        rng = np.random.default_rng(epoch)
        drawn = [rng.normal(size=(size, 8)).astype(np.float32) for size in sizes]
        for x in drawn[skip:]:
            yield mx.array(x[: len(x) // 2]), mx.array(x[len(x) // 2 :])

    def validate(model: Adapter) -> dict[str, float]:
        error = ((model(mx.eye(8)) - wanted) ** 2).mean().item()
        return {"loss": error, "macro_auc": 1 / (1 + error), "brier": error / 2}

    return Task(
        model=model,
        optimizer=optimizer,
        step=step,
        batches=batches,
        steps_per_epoch=len(sizes),
        samples=lambda _, skip: sum(sizes[skip:]),
        validate=validate,
        keep=lambda path: write_safetensors(path, dict(tree_flatten(model.trainable_parameters())), {}),
        best_name="adapter_weights/adapters.safetensors",
        trainable_only=True,
        tokens=lambda _, skip: 100 * sum(sizes[skip:]),
        unit="study",
        remedy="lower teacher.training.learning_rate",
    )


def run_adapter(run_dir: Path, model: Adapter, resume: bool = False, **changes: object) -> loop.TrainingResult:
    options = {"epochs": 2, "seed": 5, "patience": 0, "save_every": 1, "log_every": 2} | changes
    return train(adapter_task(model), run_dir=run_dir, settings="same", resume=resume, **options)


def test_adapters_are_trained_and_the_base_is_neither_moved_nor_saved(tmp_path):
    model = Adapter()
    result = run_adapter(tmp_path, model)
    assert result.steps == 6
    np.testing.assert_array_equal(np.array(model.base.weight), np.array(Adapter().base.weight))
    assert np.abs(np.array(model.b)).max() > 0.01
    state = mx.load(str(tmp_path / "last" / "state.safetensors"))
    assert {name for name in state if name.startswith("model.")} == {"model.a", "model.b"}
    best = mx.load(str(tmp_path / "adapter_weights" / "adapters.safetensors"))
    np.testing.assert_array_equal(np.array(best["b"]), np.array(model.b))
    epochs = [line for line in metrics(tmp_path, timed=True) if line["kind"] == "epoch"]
    assert epochs[1]["val_brier"] == pytest.approx(epochs[1]["val_loss"] / 2)
    for line in epochs:
        assert line["tokens_per_second"] == pytest.approx(100 * line["samples_per_second"])


def test_adapters_killed_and_resumed_end_the_same_and_count_what_they_did(tmp_path, monkeypatch):
    wanted = Adapter()
    run_adapter(tmp_path / "whole", wanted)
    real = loop.append_jsonl

    def dying(path, record):
        if record["step"] == 6:
            raise Killed
        real(path, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "append_jsonl", dying)
        with pytest.raises(Killed):
            run_adapter(tmp_path / "cut", Adapter())
    assert mx.load(str(tmp_path / "cut" / "last" / "state.safetensors"))["optimizer.states.0.step"].item() == 5
    now = iter(range(1000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    model = Adapter(seed=9)
    run_adapter(tmp_path / "cut", model, resume=True)
    assert_same_weights(model, wanted)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    # One batch of two samples was left of the epoch, and the clock moves by a second whenever it is read.
    assert metrics(tmp_path / "cut", timed=True)[-1]["samples_per_second"] == 2


def test_an_adapters_remedy_is_its_own(tmp_path):
    model = Adapter()
    model.b = mx.full((2, 14), 1e30)
    with pytest.raises(TrainingDivergedError, match=r"by step 1; lower teacher\.training\.learning_rate\. The last"):
        run_adapter(tmp_path, model)
