"""The student's stage, from soft labels on disk to a run's folder, and whether a teacher is worth having."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from scipy.special import expit
from toy_cohort import SPLITS, make_cohort, soft_labels
from toy_training import NO_AUGMENTATION, TinyNet, source, square_images, train_images, validator

from mlx_cxr import distillation, evaluate_cnn, train_cnn
from mlx_cxr.core.config import Config, load_config
from mlx_cxr.core.config_schema import TrainingConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.core.runs import RunExistsError
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.data.soft_labels import INDEX_NAME, LOGITS_NAME, SoftLabelError, SoftLabels, load_soft_labels
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.training.batches import epoch_order
from mlx_cxr.training.classifier_run import initial_network
from mlx_cxr.training.classifier_task import TrainingData
from mlx_cxr.training.cohort import Cohort
from mlx_cxr.training.loop import TrainingDivergedError
from mlx_cxr.training.losses import distillation_loss, masked_bce
from mlx_cxr.training.student_soft_labels import make_student_soft_labels

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A cohort whose teacher `teacher` lacks a soft label for the first two training studies; `sees` has features."""
    folder = make_cohort(tmp_path_factory.mktemp("cohort"))
    config = config_of(folder)
    soft_labels(config, "teacher", left_out=2)
    soft_labels(config, "sees", features=6)
    return folder


def config_of(cohort: Path, *overrides: str) -> Config:
    return load_config(cohort / "trial.yaml", ["teacher.run_name=teacher", *overrides])


def command(cohort: Path, *options: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "mlx_cxr.distillation", "--config", str(cohort / "trial.yaml"), *options]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without what the clock and the machine say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def weights(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(path)).items()}


def assert_same(ours: Path, theirs: Path, slack: float = 0.0) -> None:
    a, b = weights(ours), weights(theirs)
    assert set(a) == set(b)
    for name, value in b.items():
        np.testing.assert_allclose(a[name], value, rtol=slack, atol=slack, err_msg=name)


@pytest.fixture(scope="module")
def finished(cohort) -> Path:
    """An unbroken student."""
    return distillation.run(config_of(cohort))


def test_a_run_leaves_what_it_promises(cohort, finished):
    assert finished == cohort / "outputs" / "student_v1"
    record = read_record(finished / "config.json")
    assert record["stage"] == "distillation"
    assert record["inputs"]["manifest"]["sha256"] == sha256_file(cohort / "made" / "manifest.csv")
    for role, name in (("soft_labels", LOGITS_NAME), ("soft_label_index", INDEX_NAME)):
        assert record["inputs"][role]["sha256"] == sha256_file(cohort / "outputs" / "teacher" / name)
    assert record["config"]["distillation"]["targets"] == "teacher"
    summary = read_record(finished / "training.json")
    assert (summary["epochs"], summary["steps"]) == (2, 6)
    assert summary["parameters"]["total"] == 11_689_512 - 2 * 3136 - 513 * 1000 + 513 * 14
    told = summary["soft_labels"]
    assert (told["studies"], told["with_soft_label"], told["without_soft_label"]) == (12, 10, 2)

    # |p - y| on the ten studies that have both, from the files themselves.
    soft, manifest = load_soft_labels(cohort / "outputs" / "teacher"), load_manifest(cohort / "made" / "manifest.csv")
    frame = manifest.frame.set_index("study_id")
    rows = [i for i, split in enumerate(soft.splits) if split == "train"]
    assert len(rows) == 10
    y = np.nan_to_num(manifest.raw_labels[[frame.index.get_loc(soft.study_ids[i]) for i in rows]])
    assert told["teacher_distance"] == pytest.approx(np.abs(expit(soft.logits[rows] / 2) - y).mean(), rel=1e-6)
    assert {path.name for path in finished.iterdir()} >= {"best_student.safetensors", "metrics.jsonl"}
    assert not (finished / "last").exists()
    assert not (finished / "best_model.safetensors").exists()


def test_the_first_loss_is_the_formulas(cohort, finished):
    """The weights before the first step are the CNN's; their loss on the first batch, by NumPy, image by image."""
    config = config_of(cohort).model_copy(update={"augment": NO_AUGMENTATION})
    folder = distillation.run(config, "plain")
    train = Cohort.open(config).split("train")
    hard = np.nan_to_num(train.raw_labels)
    model, _, _ = initial_network(config, config.model, hard)
    items = epoch_order(12, 4, 0, 0)[0]
    logits = np.array(model.train()(preprocess(train.images.batch(items), 1))).astype(np.float64)
    soft = load_soft_labels(cohort / "outputs" / "teacher")
    teacher = soft.logits[soft.place(train.frame["study_id"].iloc[items])].astype(np.float64) / 2
    y = hard[items]

    def cross_entropy(z: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, z) - q * z

    temperature, alpha = config.distillation.temperature, config.distillation.alpha
    soft = np.nanmean(cross_entropy(logits / temperature, expit(teacher / temperature)))
    wanted = alpha * cross_entropy(logits, y).mean() + (1 - alpha) * temperature**2 * soft
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_student_is_scored_by_evaluate_cnn(cohort, finished):
    config = config_of(cohort, "explain.examples_per_outcome=0", "explain.labels=[Cardiomegaly]")
    evaluate_cnn.run(config, "student_v1")
    scored = read_predictions(finished / "predictions.csv")
    assert len(scored.predictions.of_split("test")) == SPLITS.count("test")
    cost, summary = read_record(finished / "cost.json"), read_record(finished / "training.json")
    assert cost["parameters"] == summary["parameters"]


def rows_of(folder: Path) -> dict:
    return read_record(folder / "training.json")["soft_labels"]


def test_beyond_the_budget_a_student_learns_from_soft_labels_alone(cohort):
    """Of 12 training patients 3 keep their labels, and two of the 12 have no soft label."""
    config = config_of(cohort, "labels.budget=3", "teacher.run_name=thrifty")
    manifest = load_manifest(config.manifest_path)
    soft_labels(config, "thrifty", left_out=2)
    kept = manifest.within_budget(3, config.seed)
    labelled = set(kept.frame.loc[kept.labelled & (kept.frame["split"] == "train"), "study_id"])
    without = {"s00", "s01"}
    folder = distillation.run(config, "thrifty_student")
    told = rows_of(folder)
    assert told["studies"] == 12
    assert told["with_soft_label"] == 10
    assert told["without_soft_label"] == len(labelled & without)
    assert told["without_hard_label"] == 10 - len(labelled - without)
    # The hard control sees three studies, as often as makes up for the other nine: as many steps as without a budget.
    hard = distillation.run(config_of(cohort, "labels.budget=3", "distillation.targets=hard"), "thrifty_hard")
    assert read_record(hard / "training.json")["steps"] == 6
    split = Cohort.open(config).split("train")
    assert set(split.labelled().frame["study_id"]) == labelled
    assert len(split.labelled()) == len(split) == 12
    trained = train_cnn.run(config_of(cohort, "labels.budget=3"), "thrifty_cnn")
    assert read_record(trained / "training.json")["steps"] == 6


def test_soft_labels_made_under_another_budget_are_refused(cohort):
    with pytest.raises(SoftLabelError, match=r"labels\.budget: None there, 3 here"):
        distillation.run(config_of(cohort, "labels.budget=3"), "other_budget")


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_weights_of_an_unbroken_one(cohort):
    """SIGKILL of the real command at step 5 of 6, in its second epoch; both in processes of their own."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    options = ("--teacher_run", "sees", "--targets", "shuffled", "--set", "distillation.feature_weight=0.5")
    unbroken = command(cohort, *options, "--run_name", "unbroken")
    _, errors = unbroken.communicate(timeout=120)
    assert unbroken.returncode == 0, errors
    killer = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), "distillation", "6"]
    settings = ["--config", str(cohort / "trial.yaml"), *options, "--run_name", "killed"]
    killed = subprocess.run([*killer, *settings], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    outputs = cohort / "outputs"
    assert not (outputs / "killed" / "training.json").exists()
    resumed = command(cohort, *options, "--run_name", "killed", "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    name = "best_student.safetensors"
    assert_same(outputs / "killed" / name, outputs / "unbroken" / name, 0 if on_cpu else 1e-3)
    if on_cpu:
        assert metrics(outputs / "killed") == metrics(outputs / "unbroken"), "the last weights validate alike"
    record = read_record(outputs / "killed" / "config.json")["config"]
    assert record["distillation"]["targets"] == "shuffled"
    assert record["teacher"]["run_name"] == "sees"


def test_features_train_a_projection_that_the_student_is_saved_without(cohort, monkeypatch):
    with_features = config_of(cohort, "teacher.run_name=sees", "distillation.feature_weight=0.5")
    with monkeypatch.context() as patch:
        patch.setattr("mlx_cxr.training.classifier_run.forget_state", lambda _: None)
        folder = distillation.run(with_features, "featured")
    state, best = weights(folder / "last" / "state.safetensors"), weights(folder / "best_student.safetensors")
    assert state["model.projection.weight"].shape == (6, 512)
    assert not [name for name in best if "projection" in name]
    assert "teacher_features" in read_record(folder / "config.json")["inputs"]
    plain = distillation.run(config_of(cohort, "teacher.run_name=sees"), "unfeatured")
    other = weights(plain / "best_student.safetensors")
    assert np.abs(best["conv1.weight"] - other["conv1.weight"]).max() > 0, "the term reaches the student's own weights"
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in (folder, plain)]
    # 1 - cosine of a fresh projection with a random direction in 6 dimensions lies between 0 and 2.
    assert 0 < losses[0] - losses[1] < 0.5 * 2
    with pytest.raises(SoftLabelError, match="soft labels come without features"):
        distillation.run(config_of(cohort, "distillation.feature_weight=0.5"), "blind")
    smoothed = config_of(cohort, "distillation.feature_weight=0.5", "distillation.targets=smoothed")
    assert distillation.run(smoothed, "smooth_blind").exists(), "smoothing has no use for features"


def test_hard_targets_are_the_cnn_and_need_no_teacher(cohort):
    config = config_of(cohort, "distillation.targets=hard", "teacher.run_name=absent")
    hard, cnn = distillation.run(config, "hard"), train_cnn.run(config, "cnn")
    ours, theirs = weights(hard / "best_student.safetensors"), weights(cnn / "best_model.safetensors")
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    assert read_record(hard / "training.json")["soft_labels"] is None
    assert "soft_labels" not in read_record(hard / "config.json")["inputs"]


def test_smoothed_and_shuffled_are_recorded_as_what_they_are(cohort):
    distances = {}
    for targets in ("smoothed", "shuffled"):
        folder = distillation.run(config_of(cohort, f"distillation.targets={targets}", "training.epochs=1"), targets)
        told = read_record(folder / "training.json")["soft_labels"]
        assert told["targets"] == targets
        distances[targets] = told["target_distance"] / told["teacher_distance"]
    assert distances["smoothed"] == pytest.approx(1, rel=1e-4)
    assert distances["shuffled"] > 1.02


def test_it_can_start_from_the_cnn_and_train_for_its_own_time(cohort):
    cnn = train_cnn.run(config_of(cohort), "start")
    config = config_of(cohort, "run_name=start", "distillation.init=cnn", "distillation.epochs=1")
    slow = config.model_copy(update={"distillation": config.distillation.model_copy(update={"learning_rate": 1e-12})})
    folder = distillation.run(slow, "from_cnn")
    summary = read_record(folder / "training.json")
    assert summary["epochs"] == 1
    assert summary["initial_weights"]["sha256"] == sha256_file(cnn / "best_model.safetensors")
    inputs = read_record(folder / "config.json")["inputs"]
    assert inputs["initial_weights"]["sha256"] == summary["initial_weights"]["sha256"]
    # The rate ends at 1e-6, so hardly anything but the running statistics moves in three steps.
    ours, theirs = weights(folder / "best_student.safetensors"), weights(cnn / "best_model.safetensors")
    for name, value in theirs.items():
        if "running" not in name:
            np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
    with pytest.raises(RecordError, match=r"absent/config\.json is missing: there is no such run"):
        distillation.run(config_of(cohort, "run_name=absent", "distillation.init=cnn"), "nobody")
    other = config.model_copy(update={"model": config.model.model_copy(update={"output_stride": 16})})
    with pytest.raises(RecordError, match=r"model\.output_stride: the run has 32, this is 16"):
        distillation.run(other, "stride")
    assert not (cohort / "outputs" / "stride").exists()


def test_soft_labels_of_something_else_are_refused(cohort, tmp_path):
    config = config_of(cohort, "labels.uncertain=ones")
    with pytest.raises(SoftLabelError, match=r"labels\.uncertain: zeros there, ones here"):
        distillation.run(config, "refused")
    soft_labels(config_of(cohort), "stranger", manifest="0" * 64)
    with pytest.raises(SoftLabelError, match=r"manifest: 000000000000 there, "):
        distillation.run(config_of(cohort, "teacher.run_name=stranger"), "refused")
    with pytest.raises(SoftLabelError, match=r"absent/teacher_study_ids\.json is missing"):
        distillation.run(config_of(cohort, "teacher.run_name=absent"), "refused")
    assert not (cohort / "outputs" / "refused").exists(), "the name is still free once it is put right"


def test_a_test_study_among_the_soft_labels_is_refused_whatever_it_says_of_itself(cohort):
    folder = soft_labels(config_of(cohort), "leaky")
    index = read_record(folder / INDEX_NAME)
    frame = load_manifest(cohort / "made" / "manifest.csv").frame
    index["study_ids"][3] = frame.loc[frame["split"] == "test", "study_id"].iloc[0]
    write_record(folder / INDEX_NAME, index)
    with pytest.raises(SoftLabelError, match=rf"1 soft labels are of test studies, such as '{index['study_ids'][3]}'"):
        distillation.run(config_of(cohort, "teacher.run_name=leaky"), "refused")


def test_other_soft_labels_or_settings_forbid_a_resumption(cohort):
    folder = distillation.run(config_of(cohort, "teacher.run_name=sees"), "fixed")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change in ("distillation.alpha=0.5", "distillation.targets=shuffled", "teacher.run_name=teacher"):
        with pytest.raises(RecordError, match="made with other data or settings"):
            distillation.run(config_of(cohort, "teacher.run_name=sees", change), "fixed", resume=True)
    with pytest.raises(RunExistsError, match="--resume or --overwrite"):
        distillation.run(config_of(cohort), "fixed")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_read_is_not_replaced(cohort):
    with pytest.raises(UserError, match=r"outputs/teacher is the teacher's run"):
        distillation.run(config_of(cohort), "teacher", overwrite=True)
    with pytest.raises(UserError, match=r"outputs/first is the CNN's run"):
        distillation.run(config_of(cohort, "distillation.init=cnn"), "first", overwrite=True)


def test_a_diverged_student_names_its_own_learning_rate(cohort):
    config = config_of(cohort, "distillation.learning_rate=1e30", "training.warmup_fraction=0.0")
    with pytest.raises(TrainingDivergedError, match=r"lower (distillation\.learning_rate|the learning rate)"):
        distillation.run(config, "diverging")


def test_the_command_ends_with_status_2_and_a_readable_message(cohort, capsys):
    for arguments, word in (
        (["--teacher_run", "absent"], "absent/teacher_study_ids.json is missing"),
        (["--set", "distillation.alpha=2"], "distillation.alpha"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit) as ended:
            distillation.main(["--config", str(cohort / "trial.yaml"), "--run_name", "no", *arguments])
        assert ended.value.code == 2
        assert word in capsys.readouterr().err


def planted(side: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, hard labels of which two in five are wrong, and the teacher's logits, which are all right but unsure."""
    images, truth = square_images(120, side, 0)
    rng = np.random.default_rng(0)
    hard = truth.copy()
    wrong = rng.random(len(hard)) < 0.4
    hard[wrong, :2] = 1 - hard[wrong, :2]
    return images, hard, (4 * truth - 2 + rng.normal(0, 0.5, truth.shape)).astype(np.float32)


def student_auc(run_dir: Path, kind: str) -> float:
    """Held-out AUC, on labels without noise, of a student after 12 epochs; no epoch is chosen by it."""
    images, hard, logits = planted()
    ids = [f"s{i:03}" for i in range(len(images))]
    soft = SoftLabels(tuple(ids), ("train",) * len(ids), logits, None, {}, np.ones(14, np.float32))
    if kind == "hard":
        loss, targets = masked_bce(), hard
    else:
        made = make_student_soft_labels(kind, soft, ids, hard, calibrated=True, seed=0)
        loss, targets = distillation_loss(0.3, 2.0), np.concatenate([hard, made.logits], axis=1)
    aucs = []
    judge = validator(*square_images(200, 16, 1))

    def validate(model: nn.Module) -> dict[str, float]:
        aucs.append(judge(model)["macro_auc"])
        return {"loss": 0.0, "macro_auc": 0.5}

    training = TrainingConfig(epochs=12, batch_size=12, learning_rate=1e-2)
    train_images(
        TinyNet(),
        loss,
        TrainingData(source(images), targets),
        validate,
        training=training,
        augmentation=NO_AUGMENTATION,
        seed=0,
        run_dir=run_dir,
    )
    return aucs[-1]


def test_a_teacher_that_knows_more_than_noisy_labels_makes_a_better_student(tmp_path):
    """Than a shuffled one, smoothing of the same strength, or the hard labels: so it is what it knows of each image."""
    aucs = {kind: student_auc(tmp_path / kind, kind) for kind in ("teacher", "shuffled", "smoothed", "hard")}
    assert aucs["teacher"] > 0.95
    for control in ("shuffled", "smoothed", "hard"):
        assert aucs["teacher"] > aucs[control] + 0.1, aucs
