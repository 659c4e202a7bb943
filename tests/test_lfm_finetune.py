"""The fine-tuning stage on the toy cohort, by its command line: what it leaves, learns, refuses, and resumes to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toy_teacher import EDEMA, HEART, SPLITS, ToyTeacher, copied_base, quantized_copy, shared

from mlx_cxr import lfm_finetune
from mlx_cxr.core.config import Config
from mlx_cxr.core.files import read_record, sha256_file, write_record
from mlx_cxr.evaluation.metrics import roc_auc_per_label
from mlx_cxr.teacher import fine_tuning_run
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.scoring import score
from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher, what_it_reads
from mlx_cxr.training.loop import TrainingDivergedError

SHORT = ("teacher.training.epochs=1",)
LONG = ("teacher.training.epochs=12", "teacher.training.learning_rate=3e-3")
TRAINED = SPLITS.count("train") - 1
VALIDATED = SPLITS.count("validate") - 1


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def tuned(toy) -> Path:
    return toy.tuned()


def lines(run_dir: Path, kind: str) -> list[dict]:
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def failure(capsys, toy: ToyTeacher, name: str, *overrides: str, options: tuple[str, ...] = ()) -> str:
    arguments = ["--config", str(toy.folder / "trial.yaml"), "--run_name", name, *options]
    with pytest.raises(SystemExit) as end:
        lfm_finetune.main(arguments + [part for value in overrides for part in ("--set", value)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.split("error: ", 1)[1]


def test_a_run_leaves_what_it_promises(toy, tuned):
    record = read_record(tuned / "config.json")
    assert record["stage"] == "lfm_finetune"
    config = toy.config()
    assert record["inputs"]["reports"]["sha256"] == sha256_file(config.reports_path)
    assert set(record["inputs"]) == {"manifest", "reports"}, "a text teacher reads no films"
    about = read_record(tuned / "teacher.json")
    assert about["reads"] == "findings"
    assert about["studies"]["train"] == {
        **{"studies": TRAINED + 1, "read": TRAINED, "without_text": 1},
        **{"cut": 0, "cut_tokens": 0},
    }
    summary = read_record(tuned / "training.json")
    # Rank 8; widths as in `test_lora`.
    trainable = 8 * ((64 + 192) + 3 * (64 + 64) + 2 * (64 + 32) + 2 * 3 * (64 + 192))
    assert summary["parameters"]["trainable"] == trainable
    base = Base.open(config.teacher, config.weights_dir)
    assert summary["parameters"]["total"] == base.parameters + trainable
    # Passes of 2, 2 a step.
    assert summary["steps"] == 10 * (TRAINED // 2 // 2)
    assert summary["peak_memory_bytes"] > 0
    assert summary["memory_estimate_bytes"] > 0
    assert not (tuned / "last").exists()
    epoch = lines(tuned, "epoch")[-1]
    assert {"samples_per_second", "tokens_per_second", "peak_memory_bytes", "train_loss", "val_macro_auc"} <= set(epoch)


def test_zero_shot_and_tuned_auc_are_those_of_the_answers(toy, tuned):
    """Scored again here: the base alone, and the base with the saved adapter."""
    config = toy.config()
    material = Material.open(config)
    teacher = TrainedTeacher.open(tuned)
    studies = material.studies(config, teacher.form, "validate")
    targets = np.nan_to_num(studies.raw_labels)
    base = Base.open(config.teacher, config.weights_dir, vision=False)
    about = read_record(tuned / "teacher.json")
    for model, recorded in ((base, about["zero_shot_auc"]), (teacher.base, about["tuned_auc"])):
        logits = score(model, teacher.form, studies.prompts, None, config.teacher).logits
        assert np.nanmean(roc_auc_per_label(targets, logits)) == pytest.approx(recorded, abs=0.01)
    assert about["tuned_auc"] == max(line["val_macro_auc"] for line in lines(tuned, "epoch"))


def separation(teacher: Base, form, config: Config, label: int) -> tuple[float, float]:
    """ROC-AUC, and difference of the mean logits, of validation and test studies with and without a finding."""
    material = Material.open(config)
    studies = material.studies(config, form, "validate", "test")
    images = material.images(teacher, studies, config)
    logits = score(teacher, form, studies.prompts, images, config.teacher).logits[:, label]
    with_it, without = logits[studies.raw_labels[:, label] == 1], logits[studies.raw_labels[:, label] == 0]
    auc = np.mean(with_it[:, None] > without) + np.mean(with_it[:, None] == without) / 2
    return float(auc), float(with_it.mean() - without.mean())


def test_the_tuned_teacher_separates_the_label_that_the_report_names(toy):
    config = toy.config()
    teacher = TrainedTeacher.open(toy.tuned("tuned_long", *LONG))
    auc, margin = separation(teacher.base, teacher.form, config, HEART)
    assert auc > 0.9
    assert margin > 1.0
    zero_shot = Base.open(config.teacher, config.weights_dir, vision=False)
    assert separation(zero_shot, teacher.form, config, HEART)[1] < 0.5


def test_the_tuned_image_teacher_separates_the_label_that_the_image_shows(toy):
    run_dir = toy.tuned("tuned_image", "teacher.modality=image", *LONG)
    teacher = TrainedTeacher.open(run_dir)
    auc, margin = separation(teacher.base, teacher.form, teacher.config, EDEMA)
    assert auc > 0.9
    assert margin > 1.0


def test_the_base_is_bit_identical_after_training(toy, tuned):
    before = mx.load(str(toy.base / "model.safetensors"))
    teacher = TrainedTeacher.open(tuned)
    after = {name.replace(".linear.", "."): value for name, value in tree_flatten(teacher.base.model.parameters())}
    shared_names = set(before) & set(after)
    assert len(shared_names) == len([name for name in before if name.startswith("language_model")])
    for name in shared_names:
        np.testing.assert_array_equal(np.array(after[name]), np.array(before[name]), err_msg=name)


@pytest.mark.parametrize("modality", ["image", "image_text"])
def test_a_teacher_of_images_trains_on_stored_embeddings(toy, modality):
    """And its answers follow the image: swapped between two studies, they differ."""
    run_dir = toy.tuned(modality, f"teacher.modality={modality}", *SHORT)
    record = read_record(run_dir / "config.json")
    assert set(record["inputs"]) == {"manifest", "pixel_index", *(["reports"] if modality == "image_text" else [])}
    assert read_record(run_dir / "teacher.json")["reads"] == what_it_reads(toy.config(f"teacher.modality={modality}"))
    stored = list((toy.folder / "made").glob("film_embeddings_64_*.npy"))
    assert sorted(np.load(path, mmap_mode="r").shape for path in stored)[-1][1:] == (4, 64)
    teacher = TrainedTeacher.open(run_dir, vision=False)
    assert "vision_tower" not in teacher.base.model
    material = Material.open(teacher.config)
    studies = material.studies(teacher.config, teacher.form, "validate")
    images = material.images(teacher.base, studies, teacher.config)
    straight = score(teacher.base, teacher.form, studies.prompts, images, teacher.config.teacher).logits
    swapped = score(teacher.base, teacher.form, studies.prompts, images[::-1], teacher.config.teacher).logits
    assert np.abs(swapped - straight).max() > 1e-3


def test_a_quantized_base_is_fine_tuned(toy, tmp_path):
    folder = quantized_copy(tmp_path / "q4", toy.base, 4)
    run_dir = toy.tuned("qlora", f"teacher.base={folder}", *SHORT)
    about = read_record(run_dir / "teacher.json")
    assert about["bits"] == 4
    first, *_, last = lines(run_dir, "step")
    assert last["loss"] < first["loss"]
    teacher = TrainedTeacher.open(run_dir)
    assert teacher.base.bits == 4
    whole, adapted = (read_record(folder / "training.json")["parameters"] for folder in (toy.tuned(), run_dir))
    assert adapted == whole, "4-bit weights count as what they stand for"


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_bytes_of_an_unbroken_run(toy):
    """SIGKILL in the middle of the second epoch, at the step after a save; each run in a process of its own."""
    settings = ["--config", str(toy.folder / "trial.yaml"), "--set", "teacher.training.epochs=2"]
    stage = [sys.executable, "-m", "mlx_cxr.lfm_finetune", *settings, "--run_name"]
    killer = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), "lfm_finetune", "22", *settings]
    unbroken = subprocess.Popen([*stage, "unbroken"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = subprocess.run([*killer, "--run_name", "killed"], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    run_dir, whole = (toy.folder / "outputs" / name for name in ("killed", "unbroken"))
    assert not (run_dir / "training.json").exists()
    state, header = mx.load(str(run_dir / "last" / "state.safetensors"), return_metadata=True)
    # 15 steps an epoch; a line of metrics for each step and epoch, and every 2 steps saved. Line 22 would be step 21's.
    assert json.loads(header["progress"])["step"] == 20
    assert len(state) > 24
    _, errors = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, errors
    resumed = subprocess.run([*stage, "killed", "--resume"], capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from the last saved state" in resumed.stderr
    assert "zero-shot validation macro AUC" in resumed.stderr
    if mx.default_device().type == mx.DeviceType.cpu:
        for name in ("adapters.safetensors", "adapter_config.json"):
            assert sha256_file(run_dir / "adapter_weights" / name) == sha256_file(whole / "adapter_weights" / name)
    for name in ("best_auc", "steps", "best_epoch"):
        assert read_record(run_dir / "training.json")[name] == pytest.approx(read_record(whole / "training.json")[name])
    assert [line["loss"] for line in lines(run_dir, "step")] == pytest.approx(
        [line["loss"] for line in lines(whole, "step")]
    )
    zero_shot = [read_record(folder / "teacher.json")["zero_shot_auc"] for folder in (run_dir, whole)]
    assert zero_shot[0] == zero_shot[1], "zero-shot is the base's, not that of a half-trained adapter"


def test_a_run_that_exists_is_refused_and_untouched(toy, tuned, capsys):
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    message = failure(capsys, toy, "tuned")
    for word in (str(tuned), "--run_name", "--resume", "--overwrite"):
        assert word in message
    for override in ("teacher.lora.rank=4", "seed=5", "labels.uncertain=ones", "teacher.sections=[impression]"):
        message = failure(capsys, toy, "tuned", override, options=("--resume",))
        assert "was made with other data or settings" in message
    assert before == {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}


def test_overwriting_leaves_nothing_of_the_old_run_to_be_taken_for_the_new(toy, monkeypatch):
    """Stopped before its first step: neither adapter, nor state to resume, nor soft labels of the old one are left."""
    run_dir = toy.tuned("replaced", *SHORT)
    write_record(run_dir / "teacher_study_ids.json", {})

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fine_tuning_run, "validator", stopped)
        with pytest.raises(KeyboardInterrupt):
            lfm_finetune.run(toy.config(*SHORT), "replaced", overwrite=True)
    left = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert left <= {"config.json", "metrics.jsonl", "adapter_weights/adapter_config.json"}
    lfm_finetune.run(toy.config(*SHORT), "replaced", resume=True)
    assert (run_dir / "training.json").exists()


def test_what_cannot_fit_is_refused_with_settings_that_run(toy, capsys):
    """The message's own `--set` are passed on, and the run goes through."""
    run_dir = toy.tuned("roomy", *SHORT)
    needed = read_record(run_dir / "training.json")["memory_estimate_bytes"] / 1e9
    limit = f"teacher.memory_limit_gb={0.8 * needed}"
    message = failure(capsys, toy, "tight", limit, *SHORT)
    assert "fine-tuning would take about" in message
    assert not (toy.folder / "outputs" / "tight").exists(), "the name is still free"
    named = [f"{key}={value}" for key, value in re.findall(r"--set (\S+?)=(\S+)", message)]
    assert named
    again = lfm_finetune.run(toy.config(limit, *SHORT, *named), "tight")
    assert read_record(again / "training.json")["memory_estimate_bytes"] <= 0.8 * needed * 1e9
    assert "4-bit copy" in failure(capsys, toy, "tighter", "teacher.memory_limit_gb=1e-6", *SHORT)


def test_a_room_too_small_for_the_report_names_the_setting(toy, capsys):
    message = failure(capsys, toy, "small", "teacher.modality=image_text", "teacher.image_size=512")
    assert "teacher.max_tokens" in message
    assert not (toy.folder / "outputs" / "small").exists()


def test_bad_modules_layers_and_bases_are_refused_before_a_run_is_made(toy, capsys, tmp_path):
    message = failure(capsys, toy, "bad", "teacher.lora.modules=[self_attn.o_proj]")
    assert "the base has no self_attn.o_proj" in message
    assert "teacher.lora.layers 9" in failure(capsys, toy, "bad", "teacher.lora.layers=9")
    folder = copied_base(tmp_path / "base", toy.base, "tokenizer.json")
    assert "tokenizer.json is missing" in failure(capsys, toy, "bad", f"teacher.base={folder}")
    assert "no such folder" in failure(capsys, toy, "bad", "teacher.base=./absent/base")
    assert not (toy.folder / "outputs" / "bad").exists()


def test_sections_that_no_report_has_are_named(toy, capsys, tmp_path):
    message = failure(capsys, toy, "bad", f"data.work_dir={tmp_path}")
    assert str(tmp_path / "manifest.csv") in message


def test_only_what_decides_the_adapter_forbids_a_resumption(toy):
    config = toy.config()
    inputs = Material.open(config).inputs(config)
    base = Base.open(config.teacher, config.weights_dir, vision=False)

    def hashed(*overrides: str) -> str:
        return fine_tuning_run.settings_hash(toy.config(*overrides), base, inputs)

    same = ("teacher.batch_size=3", "teacher.memory_limit_gb=9", "outputs=o", "evaluation.bootstrap_samples=3")
    other = (
        *("seed=1", "labels.empty=masked", "teacher.lora.dropout=0.2", "teacher.training.accumulate=3"),
        *("teacher.max_tokens=500", "teacher.section_mode=first", "teacher.training.bucket=64"),
    )
    assert {hashed(override) for override in same} == {hashed()}
    assert len({hashed(override) for override in other} | {hashed()}) == len(other) + 1
    other_inputs = inputs | {"first_adapter": config.manifest_path}
    assert fine_tuning_run.settings_hash(config, base, other_inputs) != hashed()


def test_a_second_phase_begins_where_the_first_ended(toy, tuned):
    """With a step of next to nothing its adapter is still that of the first, though it looks at images as well."""
    still = ("teacher.training.learning_rate=1e-12", "teacher.training.final_learning_rate=0.0")
    run_dir = lfm_finetune.run(
        toy.config("teacher.modality=image_text", "teacher.start_from=tuned", *SHORT, *still), "phase2"
    )
    ours, theirs = (mx.load(str(folder / "adapter_weights" / "adapters.safetensors")) for folder in (run_dir, tuned))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(value), atol=1e-6, err_msg=name)
    record = read_record(run_dir / "config.json")["inputs"]["first_adapter"]
    assert record["sha256"] == sha256_file(tuned / "adapter_weights" / "adapters.safetensors")


def test_a_first_phase_that_does_not_fit_is_refused(toy, tuned, capsys, tmp_path):
    message = failure(capsys, toy, "phase3", "teacher.start_from=absent")
    assert str(toy.folder / "outputs" / "absent") in message
    for setting, named in (
        ("teacher.lora.rank=4", "rank, alpha / rank"),
        ("teacher.lora.alpha=8.0", "alpha / rank"),
        ("teacher.lora.layers=1", "modules or layers"),
    ):
        message = failure(capsys, toy, "phase3", "teacher.start_from=tuned", setting)
        assert f"has other {named} than teacher.lora" in message
    folder = quantized_copy(tmp_path / "q8", toy.base, 8)
    message = failure(capsys, toy, "phase3", "teacher.start_from=tuned", f"teacher.base={folder}")
    assert "belongs to another base" in message
    assert not (toy.folder / "outputs" / "phase3").exists(), "the name is still free"


def test_divergence_is_named_and_keeps_what_there_was(toy):
    config = toy.config("teacher.training.learning_rate=1e30", "teacher.training.warmup_fraction=0.0")
    with pytest.raises(TrainingDivergedError, match=r"lower teacher.training.learning_rate"):
        lfm_finetune.run(config, "diverged")
    run_dir = toy.folder / "outputs" / "diverged"
    assert not (run_dir / "training.json").exists()
    assert read_record(run_dir / "teacher.json")["zero_shot_auc"] > 0


def test_resume_and_overwrite_exclude_each_other(toy, capsys):
    with pytest.raises(SystemExit):
        lfm_finetune.main(["--config", str(toy.folder / "trial.yaml"), "--resume", "--overwrite"])
    assert "not allowed with argument" in capsys.readouterr().err
