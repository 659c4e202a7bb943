"""The whole pipeline on a very small cohort: what runs, what is skipped and why, what stops it, what it refuses."""

import logging
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mlx_cxr import pipeline
from mlx_cxr.core.config import load_config
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record, sha256_file
from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.core.runs import RunExistsError
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.make_demo_data import CohortExistsError
from mlx_cxr.teacher.base_model import BaseUnavailableError

pytestmark = pytest.mark.usefixtures("without_plots")

YAML = """
name: tiny
run_name: tiny
outputs: {here}/outputs
data: {{synthetic: true, root: {here}/raw, work_dir: {here}/work}}
demo: {{patients: 24, image_size: 128}}
pixels: {{size: 32, workers: 2}}
model: {{weights: scratch, output_stride: 16}}
training: {{epochs: 2, batch_size: 8, save_every: 2, learning_rate: 1e-3}}
evaluation: {{bootstrap_samples: 50}}
explain: {{labels: [Support Devices, Pleural Effusion], examples_per_outcome: 1}}
pipeline: {{min_val_auc: 0.0, teacher: false}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    here = tmp_path_factory.mktemp("tiny")
    path = here / "tiny.yaml"
    path.write_text(YAML.format(here=here))
    pipeline.main(["--config", str(path)])
    return path


def _ran(caplog):
    """Stage -> the reason it ran, or `skipped`, from the log."""
    stages = {}
    for record in caplog.records:
        text = record.getMessage()
        if text.startswith("[") and ": runs (" in text:
            stages[text.split("] ")[1].split(":")[0]] = text.split(": runs (")[1].rstrip(")")
        elif text.startswith("[") and "skipped" in text:
            stages[text.split("] ")[1].split(":")[0]] = "skipped"
    return stages


def _run(path, caplog, overrides=(), **options):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mlx_cxr"):
        folder = pipeline.run(load_config(path, overrides), **options)
    return folder, _ran(caplog)


def test_results_are_those_of_the_predictions_it_leaves(tiny):
    folder = load_config(tiny).run_dir()
    results = read_record(folder / "test_results.json")
    test = read_predictions(folder / "predictions.csv").predictions.of_split("test")
    targets = SCORING_PROTOCOLS["empty_negative"].apply(test.raw_labels)
    scored = [k for k in range(14) if len(np.unique(targets[:, k])) == 2]
    expected = np.mean([roc_auc_score(targets[:, k], test.logits[:, k]) for k in scored])
    assert results["protocols"]["empty_negative"]["macro"]["roc_auc"]["value"] == pytest.approx(expected, abs=1e-9)
    assert results["synthetic"] is True
    assert "synthetic" in (folder / "findings.md").read_text().lower()


def test_a_second_call_skips_every_stage_and_changes_no_file(tiny, caplog):
    folder = load_config(tiny).run_dir()
    before = {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    _, stages = _run(tiny, caplog)
    assert set(stages.values()) == {"skipped"}
    assert len(stages) == 5
    assert {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_made_with_other_settings_is_not_replaced_unless_asked(tiny, caplog):
    weights = load_config(tiny).run_dir() / "best_model.safetensors"
    before = sha256_file(weights)
    with pytest.raises(RunExistsError, match=r"training\.learning_rate.*--overwrite"):
        _run(tiny, caplog, ["training.learning_rate=2e-3"])
    assert sha256_file(weights) == before
    _, stages = _run(tiny, caplog)
    assert set(stages.values()) == {"skipped"}


def test_a_missing_base_of_the_teacher_is_said_before_anything_runs(tiny, caplog):
    overrides = ["pipeline.teacher=true", "run_name=never"]
    with pytest.raises(BaseUnavailableError, match=r"fetch_weights --what lfm.*pipeline\.teacher=false"):
        _run(tiny, caplog, [*overrides, "weights_dir=nowhere"])
    assert _ran(caplog) == {}
    assert not load_config(tiny, overrides).run_dir().exists()


def test_start_at_runs_that_stage_and_those_after_it(tiny, caplog):
    _, stages = _run(tiny, caplog, start_at="evaluate_cnn")
    assert stages["evaluate_cnn"] == "asked for"
    assert stages["train_cnn"] == "skipped"
    with pytest.raises(UserError, match=r"--start_at evaluate: the stages .* evaluate_cnn"):
        _run(tiny, caplog, start_at="evaluate")


def test_a_gate_that_is_not_met_stops_with_status_3_unless_ignored(tiny, caplog):
    arguments = ["--config", str(tiny), "--set", "pipeline.min_val_auc=1.0"]
    with pytest.raises(SystemExit) as stopped:
        pipeline.main(arguments)
    assert stopped.value.code == 3
    with caplog.at_level(logging.WARNING, logger="mlx_cxr"):
        pipeline.main([*arguments, "--ignore_gates"])
    assert "gate not met" in caplog.text


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_and_ends_with_the_weights_of_an_unbroken_one(tiny):
    outputs = load_config(tiny).outputs
    command = [sys.executable, "-m", "mlx_cxr.pipeline", "--config", str(tiny), "--run_name"]
    # Both in processes of their own: another process's memory layout may round a matrix product differently.
    alone = [sys.executable, "-m", "mlx_cxr.train_cnn", *command[3:]]
    subprocess.run([*alone, "unbroken"], check=True, capture_output=True)
    state = outputs / "killed" / "last" / "state.safetensors"
    process = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (outputs / "killed" / "training.json").exists()
    subprocess.run([*command, "killed"], check=True, capture_output=True)
    ours, theirs = (mx.load(str(outputs / run / "best_model.safetensors")) for run in ("killed", "unbroken"))
    assert {name for name in ours if not mx.array_equal(ours[name], theirs[name])} == set()


def test_a_changed_evaluation_setting_runs_evaluation_only_and_says_which(tiny, caplog):
    _, stages = _run(tiny, caplog, ["evaluation.threshold_rule=youden"])
    assert stages.pop("evaluate_cnn") == "changed: evaluation.threshold_rule"
    assert set(stages.values()) == {"skipped"}


def test_a_cohort_made_again_reaches_the_pixel_store_though_its_tables_are_the_same(tiny, caplog):
    config = load_config(tiny)
    marker = config.data.root / "cohort.json"
    marker.write_text(marker.read_text().replace('"hash": "', '"hash": "0'))  # as one of another version of the code
    with pytest.raises(CohortExistsError, match="were trained on it; pass --overwrite"):
        _run(tiny, caplog, start_at="make_demo_data")
    _, stages = _run(tiny, caplog, start_at="make_demo_data", overwrite=True)
    assert stages["build_manifest"] == stages["prepare_images"] == "asked for"
    marker.unlink()
    (config.data.root / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    for path in sorted(config.data.root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    _, stages = _run(tiny, caplog)
    assert "is missing" in stages["make_demo_data"]
    assert stages["build_manifest"] == stages["prepare_images"] == "an earlier stage ran"
