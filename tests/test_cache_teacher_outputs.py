"""The stage that stores the teacher's answers: which studies are where, what the header holds, kills and refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from toy_teacher import SPLITS, WITHOUT_REPORT, ToyTeacher, copied_base, shared

from mlx_cxr import build_manifest, cache_teacher_outputs
from mlx_cxr.core.files import hash_of, read_json, read_record, sha256_file, write_json, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.soft_labels import SoftLabelError, load_soft_labels
from mlx_cxr.teacher import scoring, soft_label_cache
from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher

pytestmark = pytest.mark.usefixtures("without_plots")

SOFT = ("teacher_soft_labels.npy", "teacher_study_ids.json")
SHORT = ("teacher.training.epochs=1",)
LEARNED = [f"s{i:03}" for i, split in enumerate(SPLITS) if split != "test" and i not in WITHOUT_REPORT]
TEST = [f"s{i:03}" for i, split in enumerate(SPLITS) if split == "test"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def cached(toy) -> Path:
    run_dir = toy.tuned()
    return cache_teacher_outputs.run(toy.config(), run_dir.name)


def copied_run(run_dir: Path, name: str) -> Path:
    """A copy without what the stage has made."""
    copy = run_dir.with_name(name)
    copy.mkdir()
    for kept in ("config.json", "teacher.json", "training.json"):
        shutil.copy(run_dir / kept, copy / kept)
    shutil.copytree(run_dir / "adapter_weights", copy / "adapter_weights")
    return copy


def failure(capsys, toy: ToyTeacher, run: str, *overrides: str) -> str:
    arguments = ["--config", str(toy.folder / "trial.yaml"), "--teacher_run", run]
    with pytest.raises(SystemExit) as end:
        cache_teacher_outputs.main(arguments + [part for value in overrides for part in ("--set", value)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.split("error: ", 1)[1]


def test_every_study_that_can_be_read_has_a_soft_label_and_no_other(cached):
    soft = load_soft_labels(cached)
    assert list(soft.study_ids) == LEARNED
    assert soft.splits.count("train") == SPLITS.count("train") - 1
    assert soft.logits.std(axis=0).max() > 0.1
    counts = {"studies": 88, "read": 86, "without_text": 2, "cut": 0}
    assert {key: soft.header[key] for key in counts} == counts


def test_test_studies_are_in_no_file_that_the_student_sees(cached):
    """Their ids as bytes, and rows beyond those of the others. (Here many reports, and so logits, are alike.)"""
    table = pd.read_csv(cached / "predictions.csv")
    assert set(table["split"]) == {"validate", "test"}
    assert sorted(table.loc[table["split"] == "test", "study_id"].unique()) == TEST
    written = {name: (cached / name).read_bytes() for name in SOFT}
    for study in TEST:
        for name, data in written.items():
            assert study.encode() not in data, f"{study} in {name}"
    assert load_soft_labels(cached).logits.shape == (len(LEARNED), 14)


def test_predictions_of_validation_are_the_soft_labels(cached):
    soft = load_soft_labels(cached)
    table = pd.read_csv(cached / "predictions.csv")
    assert not set(table["study_id"]) & {
        s for s, split in zip(soft.study_ids, soft.splits, strict=True) if split == "train"
    }
    validation = table[table["split"] == "validate"].pivot(index="study_id", columns="label", values="logit")
    rows = soft.logits[soft.place(validation.index)]
    np.testing.assert_allclose(validation[list(LABELS)].to_numpy(), rows, rtol=1e-5, atol=1e-6)


def test_temperatures_are_fitted_on_validation_only(toy, cached):
    """Against scikit-learn's loss on a grid, for the planted label."""
    from sklearn.metrics import log_loss
    from toy_teacher import HEART

    soft = load_soft_labels(cached)
    rows = [i for i, split in enumerate(soft.splits) if split == "validate"]
    manifest = Material.open(toy.config()).manifest.frame.drop_duplicates("study_id").set_index("study_id")
    raw = Material.open(toy.config()).manifest.raw_labels
    where = [manifest.index.get_loc(soft.study_ids[i]) for i in rows]
    labels, logits = raw[where, HEART], soft.logits[rows, HEART].astype(np.float64)

    def loss(temperature: float) -> float:
        return log_loss(labels, 1 / (1 + np.exp(-logits / temperature)), labels=[0, 1])

    fitted = loss(float(soft.temperatures[HEART]))
    assert fitted <= min(loss(t) for t in np.geomspace(0.2, 5, 60)) + 1e-3


def test_the_cost_is_that_of_a_study(cached):
    cost = read_record(cached / "cost.json")
    assert cost["parameters"] == read_record(cached / "training.json")["parameters"]
    assert cost["samples"] == len(TEST)
    assert 0 < cost["ms_per_sample"] < 10_000


def test_zero_shot_answers_are_kept_apart(toy, cached):
    copy = copied_run(cached, "with_zero_shot")
    cache_teacher_outputs.run(toy.config(), copy.name, zero_shot=True)
    for name in SOFT:
        assert sha256_file(copy / name) == sha256_file(cached / name) or name == SOFT[1]
    tuned, base = (pd.read_csv(folder / "predictions.csv") for folder in (copy, copy / "zero_shot"))
    assert base["study_id"].tolist() == tuned["study_id"].tolist()
    assert np.abs(base["logit"] - tuned["logit"]).max() > 0.1
    about = read_record(copy / "teacher.json")
    validation = base[base["split"] == "validate"]
    aucs = []
    for _, part in validation.groupby("label"):
        present = part["raw_label"] == 1
        if 0 < present.sum() < len(part):
            pairs = part.loc[present, "logit"].to_numpy()[:, None] - part.loc[~present, "logit"].to_numpy()
            aucs.append(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    assert np.mean(aucs) == pytest.approx(about["zero_shot_auc"], abs=0.01)


def test_the_effect_of_the_order_of_lines_is_measured_on_validation(toy, cached):
    copy = copied_run(cached, "with_orders")
    cache_teacher_outputs.run(toy.config(), copy.name, line_orders=2)
    effect = read_record(copy / "order_effect.json")
    assert (effect["split"], effect["orders"], effect["studies"]) == ("validate", 2, SPLITS.count("validate") - 1)
    assert effect["macro_auc"]["usual"] == pytest.approx(read_record(copy / "teacher.json")["tuned_auc"], abs=0.01)
    assert effect["macro_auc"]["least"] <= effect["macro_auc"]["largest"]
    assert effect["mean_abs_logit_shift"] > 1e-4


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(toy):
    """SIGKILL at the seventh batch of features and logits; another process goes on."""
    run_dir = toy.tuned("image_text", "teacher.modality=image_text", *SHORT)
    killed, whole = copied_run(run_dir, "cache_killed"), copied_run(run_dir, "cache_whole")
    settings = ["--config", str(toy.folder / "trial.yaml"), "--teacher_run"]
    stage = [sys.executable, "-m", "mlx_cxr.cache_teacher_outputs", *settings]
    killer = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), "cache_teacher_outputs", "7", *settings]
    unbroken = subprocess.Popen([*stage, whole.name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stopped = subprocess.run([*killer, killed.name], capture_output=True, timeout=120)
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    partial = np.load(killed / "teacher_soft_labels.partial.npy")
    assert np.isfinite(partial).all(axis=1).sum() == 6 * 6
    with pytest.raises(SoftLabelError, match="is not complete, cache_teacher_outputs was stopped"):
        load_soft_labels(killed)
    _, errors = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, errors
    resumed = subprocess.run([*stage, killed.name], capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on: 36 of 86 studies are done" in resumed.stderr
    ours, theirs = load_soft_labels(killed), load_soft_labels(whole)
    assert ours.study_ids == theirs.study_ids
    if mx.default_device().type == mx.DeviceType.cpu:
        for name in ("teacher_soft_labels.npy", "teacher_features.npy"):
            assert sha256_file(killed / name) == sha256_file(whole / name)
        assert (killed / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    np.testing.assert_allclose(ours.temperatures, theirs.temperatures, rtol=1e-4)


def test_a_second_run_has_nothing_left_to_score(toy, cached, monkeypatch):
    before = {name: sha256_file(cached / name) for name in SOFT}
    scored = []
    real = scoring.score

    def counting(base, form, prompts, *rest, **named):
        scored.append(len(prompts))
        return real(base, form, prompts, *rest, **named)

    for module in (soft_label_cache, scoring):
        monkeypatch.setattr(module, "score", counting)
    cache_teacher_outputs.run(toy.config(), cached.name)
    assert scored == [len(TEST)]
    assert {name: sha256_file(cached / name) for name in SOFT} == before


def test_images_are_encoded_once_for_fine_tuning_and_caching(toy, monkeypatch):
    """Only those of the test split are new; they need the vision tower, the others don't."""
    from mlx_cxr.teacher import image_embeddings

    run_dir = toy.tuned("image", "teacher.modality=image", *SHORT)
    for path in (toy.folder / "made").glob("film_embeddings_64_*.npy"):
        if np.load(path, mmap_mode="r").shape[0] == len(TEST):
            path.unlink()
    encoded = []
    real = image_embeddings.encode_images

    def counting(base, batch, size):
        encoded.append(len(batch))
        return real(base, batch, size)

    monkeypatch.setattr(image_embeddings, "encode_images", counting)
    cache_teacher_outputs.run(toy.config(), copied_run(run_dir, "films_once").name)
    assert sum(encoded) == len(TEST)
    features = load_soft_labels(run_dir.with_name("films_once")).features
    assert features.shape == (88, 64)


def header_of(toy: ToyTeacher, run_dir: Path) -> dict:
    teacher = TrainedTeacher.open(run_dir)
    return teacher.header(Material.open(teacher.config))


def changed(toy: ToyTeacher, run_dir: Path, name: str, **settings: object) -> dict:
    """The header of a copy of a run whose recorded teacher settings differ."""
    copy = copied_run(run_dir, name)
    record = read_record(copy / "config.json")
    record["config"]["teacher"] |= settings
    write_record(copy / "config.json", record)
    return header_of(toy, copy)


def differing(a: dict, b: dict) -> set[str]:
    return {key for key in a if hash_of(a[key]) != hash_of(b[key])} - {"run"}


def test_the_header_follows_all_that_the_answers_depend_on(toy, cached, tmp_path):
    plain = header_of(toy, cached)
    assert read_record(cached / SOFT[1])["header"].items() >= json.loads(json.dumps(plain)).items()
    assert plain["manifest"] == sha256_file(toy.config().manifest_path)
    assert plain["reports"] == sha256_file(toy.config().reports_path)
    assert plain["adapter"] == sha256_file(cached / "adapter_weights" / "adapters.safetensors")
    assert differing(plain, changed(toy, cached, "h_tokens", max_tokens=400)) == {"prompt", "text"}
    assert differing(plain, changed(toy, cached, "h_sections", sections=["findings", "impression"])) == {"text"}
    assert differing(plain, changed(toy, cached, "h_mode", section_mode="first")) == {"text"}
    assert differing(plain, changed(toy, cached, "h_batch", batch_size=3)) == set()
    # Another adapter.
    copy = copied_run(cached, "h_adapter")
    path = copy / "adapter_weights" / "adapters.safetensors"
    arrays = mx.load(str(path))
    mx.save_safetensors(str(path), {name: value * 0.5 for name, value in arrays.items()})
    assert differing(plain, header_of(toy, copy)) == {"adapter"}
    # Another base, which the adapter says that it is for.
    folder = copied_base(tmp_path / "base", toy.base)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "note": "other"})
    copy = copied_run(cached, "h_base")
    record = read_record(copy / "config.json")
    record["config"]["teacher"]["base"] = str(folder)
    write_record(copy / "config.json", record)
    from mlx_cxr.teacher.base_model import base_sha256

    settings = read_json(copy / "adapter_weights" / "adapter_config.json")
    settings["base"]["sha256"] = base_sha256(folder)
    write_json(copy / "adapter_weights" / "adapter_config.json", settings)
    assert differing(plain, header_of(toy, copy)) == {"base"}


def test_another_manifest_labels_or_reports_are_refused(toy, cached, tmp_path, capsys):
    build_manifest.run(toy.config(f"data.work_dir={tmp_path / 'made'}"))
    message = failure(capsys, toy, cached.name, f"data.work_dir={tmp_path / 'made'}")
    assert "was trained for something else" in message
    assert "folder of manifest and reports" in message
    message = failure(capsys, toy, cached.name, "labels.empty=masked")
    assert "labels: the run has" in message
    assert "data.synthetic" in failure(capsys, toy, cached.name, "data.synthetic=false")
    # The same place, with another content.
    made, kept = toy.folder / "made", tmp_path / "kept"
    for name in ("reports.csv", "manifest.csv"):
        shutil.copy(made / name, kept)
        try:
            (made / name).write_text(kept.read_text().replace("Edema.", "Oedema."))
            message = failure(capsys, toy, cached.name)
        finally:
            shutil.copy(kept, made / name)
        assert name.removesuffix(".csv") in message
    cache_teacher_outputs.run(toy.config(), cached.name)


def test_a_run_that_is_none_or_unfinished_or_of_another_stage_is_refused(toy, cached, capsys):
    assert "there is no such run; make it with lfm_finetune" in failure(capsys, toy, "absent")
    unfinished = copied_run(cached, "unfinished")
    (unfinished / "training.json").unlink()
    message = failure(capsys, toy, "unfinished")
    assert "has not ended" in message
    assert "--run_name unfinished --resume" in message
    assert not (unfinished / "teacher_soft_labels.partial.npy").exists()
    other = copied_run(cached, "of_a_cnn")
    write_record(other / "config.json", {**read_record(other / "config.json"), "stage": "train_cnn"})
    assert "was made by the stage 'train_cnn'; a run of lfm_finetune is asked for here" in failure(
        capsys, toy, "of_a_cnn"
    )


def test_a_damaged_or_foreign_adapter_is_refused(toy, cached, capsys):
    copy = copied_run(cached, "foreign")
    settings = read_json(copy / "adapter_weights" / "adapter_config.json")
    write_record(
        copy / "adapter_weights" / "adapter_config.json", {**settings, "base": {"sha256": "0" * 64, "bits": 4}}
    )
    message = failure(capsys, toy, "foreign")
    assert "belongs to another base" in message
    assert "bits: 4 there, None here" in message


def test_the_tokens_that_a_prompt_per_finding_would_take_are_counted_right(cached):
    """Each of the 14 would read the report again."""
    header = load_soft_labels(cached).header
    teacher = TrainedTeacher.open(cached)
    studies = Material.open(teacher.config).studies(teacher.config, teacher.form, "train", "validate")
    lines = [len(line) for line in teacher.form.lines]
    by_hand = sum(sum(len(p.ids) - sum(lines) + line for line in lines) for p in studies.prompts)
    assert header["tokens_one_by_one"] == by_hand
    assert header["tokens"] == sum(len(p.ids) for p in studies.prompts)
