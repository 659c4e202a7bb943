"""The whole chain with teacher, student, controls and comparison on a very small cohort."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from mlx_cxr import pipeline
from mlx_cxr.compare_models import comparison_dir
from mlx_cxr.core.config import load_config
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record, sha256_file
from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.data.soft_labels import load_soft_labels
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.pipeline_steps import steps

pytestmark = pytest.mark.slow

YAML = """
name: chain
run_name: chain_cnn
outputs: {here}/outputs
data: {{synthetic: true, root: {here}/raw, work_dir: {here}/made}}
demo: {{patients: 40, image_size: 128}}
pixels: {{size: 32, workers: 2}}
model: {{weights: scratch, output_stride: 16}}
training: {{epochs: 1, batch_size: 8, learning_rate: 1e-3}}
teacher:
  base: {here}/made/tiny-base
  training: {{epochs: 1, batch_size: 8, accumulate: 2, learning_rate: 3e-3}}
  tiny: {{hidden_size: 32, layers: 2, vocabulary: 1024, epochs: 1}}
distillation: {{init: cnn}}
comparison: {{controls: [shuffled], graded: [[indication]], min_retention: 0.0}}
evaluation: {{bootstrap_samples: 60}}
explain: {{labels: [Support Devices], examples_per_outcome: 1}}
failure: {{examples: 2}}
pipeline: {{min_val_auc: 0.0}}
"""
STAGES = [
    "make_demo_data",
    "build_manifest",
    "prepare_images",
    "train_cnn",
    "evaluate_cnn",
    "make_tiny_teacher",
    "lfm_finetune",
    "cache_teacher_outputs",
    "bag_of_words",
    "distillation",
    "evaluate_cnn@student_v1",
    "distillation@student_v1_shuffled",
    "evaluate_cnn@student_v1_shuffled",
    "lfm_finetune@lora_teacher_phase1_reads_indication",
    "cache_teacher_outputs@lora_teacher_phase1_reads_indication",
    "compare_models",
    "failure_analysis",
    "explain_report",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    here = tmp_path_factory.mktemp("chain")
    path = here / "chain.yaml"
    path.write_text(YAML.format(here=here))
    pipeline.main(["--config", str(path), "--ignore_gates"])
    return path


def _stages(caplog, path, overrides=(), **options):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mlx_cxr"):
        pipeline.run(load_config(path, overrides), ignore_gates=True, **options)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("[")]
    return {line.split("] ")[1].split(": ")[0]: line.split(": ", 1)[1] for line in lines}


def test_a_second_call_skips_every_stage_and_changes_nothing(chain, caplog):
    outputs = load_config(chain).outputs
    before = {path: sha256_file(path) for path in outputs.rglob("*") if path.is_file()}
    stages = _stages(caplog, chain)
    assert list(stages) == STAGES
    assert {text.split(" (")[0] for text in stages.values()} == {"up to date, skipped"}
    assert {path: sha256_file(path) for path in outputs.rglob("*") if path.is_file()} == before


def test_the_table_is_made_of_the_predictions_that_the_runs_left(chain):
    config = load_config(chain)
    comparison = read_record(comparison_dir(config) / "final_comparison.json")
    runs = {"chain_cnn", "lora_teacher_phase1", "student_v1", "student_v1_shuffled"}
    assert {model["run"] for model in comparison["models"]} >= runs
    parts = {
        run: read_predictions(config.run_dir(run) / "predictions.csv").predictions.of_split("test") for run in runs
    }
    shared = sorted(set.intersection(*(set(part.study_ids.tolist()) for part in parts.values())))
    for run, part in parts.items():
        place = {study: row for row, study in enumerate(part.study_ids.tolist())}
        rows = [place[study] for study in shared]
        y, z = SCORING_PROTOCOLS["empty_negative"].apply(part.raw_labels[rows]), part.logits[rows]
        expected = np.mean([roc_auc_score(y[:, k], z[:, k]) for k in range(14) if len(set(y[:, k])) == 2])
        shown = comparison["protocols"]["empty_negative"]["models"][run]["macro"]["roc_auc"]["value"]
        assert shown == pytest.approx(expected, abs=1e-9)


def test_the_bag_of_words_stands_beside_the_teacher_and_is_judged(chain):
    config = load_config(chain)
    comparison = read_record(comparison_dir(config) / "final_comparison.json")
    (words,) = (model for model in comparison["graded_teachers"]["models"] if model["role"] == "bag of words")
    assert words["run"] == "lora_teacher_phase1_bag_of_words"
    runs = [model["run"] for model in comparison["graded_teachers"]["models"]]
    parts = {run: read_predictions(config.run_dir(run) / "predictions.csv").predictions for run in runs}
    tests = {run: part.of_split("test") for run, part in parts.items()}
    shared = set.intersection(*(set(part.study_ids.tolist()) for part in tests.values()))

    def macro(run):
        part = tests[run]
        rows = [row for row, study in enumerate(part.study_ids.tolist()) if study in shared]
        y, z = SCORING_PROTOCOLS["empty_negative"].apply(part.raw_labels[rows]), part.logits[rows]
        return np.mean([roc_auc_score(y[:, k], z[:, k]) for k in range(14) if len(set(y[:, k])) == 2])

    difference = macro(words["run"]) - macro("lora_teacher_phase1")
    assert words["minus_teacher"]["value"] == pytest.approx(difference, abs=1e-9)
    page = (comparison_dir(config) / "final_comparison.md").read_text()
    assert "| `lora_teacher_phase1_bag_of_words` | bag of words: findings" in page
    said = {
        "better": "counting words is better than the language model",
        "worse": "the language model is worth more than counting words",
        "within noise": "that the language model is worth more than counting words is not shown",
        "no interval": "whether the language model is worth more cannot be told without an interval",
    }
    assert said[words["minus_teacher"]["verdict"]] in page


def test_no_test_study_is_in_what_the_student_learned_from(chain):
    config = load_config(chain)
    manifest = pd.read_csv(config.manifest_path, dtype=str)
    soft = load_soft_labels(config.run_dir(config.teacher.run_name))
    test = set(manifest.loc[manifest["split"] == "test", "study_id"])
    assert test
    assert not test & set(soft.study_ids)
    recorded = json.loads((config.run_dir("student_v1") / "config.json").read_text())["inputs"]
    assert recorded["soft_labels"]["sha256"] == sha256_file(
        config.run_dir("lora_teacher_phase1") / "teacher_soft_labels.npy"
    )


def test_a_teacher_that_looks_at_images_only_asks_for_no_reports(chain):
    for modality, asked in (("image", False), ("image_text", True), ("text", True)):
        config = load_config(chain, [f"teacher.modality={modality}"])
        chained = {step.name: step for step in steps(config)}
        assert (config.reports_path in chained["lfm_finetune"].inputs()) is asked
        assert (config.reports_path in chained["build_manifest"].outputs) is asked
        assert ("explain_report" in chained) is asked


def test_what_a_stage_does_not_read_does_not_make_it_run_again(chain, caplog):
    config = load_config(chain)
    before = config.splits_path.read_bytes()
    config.splits_path.write_bytes(before[:100])
    stages = _stages(caplog, chain)
    assert config.splits_path.read_bytes() == before
    assert {name for name, text in stages.items() if text.startswith("runs")} == {"build_manifest", "prepare_images"}


def test_another_control_reuses_the_rest(chain, caplog):
    stages = _stages(caplog, chain, ["comparison.controls=[shuffled,hard]"])
    ran = {name for name, text in stages.items() if text.startswith("runs")}
    assert ran == {"distillation@student_v1_hard", "evaluate_cnn@student_v1_hard", "compare_models"}


def test_a_gate_of_the_comparison_ends_with_status_3_when_all_is_written(chain):
    code = 0
    try:
        pipeline.main(["--config", str(chain), "--set", "comparison.min_retention=1.0", "--start_at", "compare_models"])
    except SystemExit as stopped:
        code = stopped.code
    config = load_config(chain)
    comparison = read_record(comparison_dir(config) / "final_comparison.json")
    cnn, teacher, student = (
        macro_auc(roc_auc_per_label(SCORING_PROTOCOLS["empty_negative"].apply(part.raw_labels), part.logits))
        for part in (
            read_predictions(config.run_dir(run) / "predictions.csv").predictions.of_split("validate")
            for run in ("chain_cnn", "lora_teacher_phase1", "student_v1")
        )
    )
    met = {name: gate["met"] for name, gate in comparison["gates"].items()}
    assert met == {"teacher_beats_cnn": teacher > cnn, "retention": student >= teacher}
    assert code == (0 if all(met.values()) else 3)
    assert (config.run_dir("student_v1") / "failure_analysis" / "summary.md").exists()


def test_a_label_budget_is_an_experiment_of_its_own_on_the_same_data(chain):
    """Half of the patients' labels: CNN, teacher and words see no other; the student sees all films."""
    settings = ["comparison.controls=[words]", "comparison.graded=[]", "explain.examples_per_outcome=0"]
    config = load_config(chain, settings)
    data = {path: sha256_file(path) for path in config.sample_dir.glob("*.csv")}
    folder = pipeline.run_budgets(config, [0.5])
    assert folder == config.outputs / "label_budgets_chain"
    assert {path: sha256_file(path) for path in data} == data
    runs = folder / "0.5"
    assert read_record(runs / "chain_cnn" / "config.json")["config"]["labels"]["budget"] == 0.5
    told = read_record(runs / "student_v1" / "training.json")["soft_labels"]
    # As many studies as half of the patients' have no hard label, and those with a report are learned from.
    manifest = pd.read_csv(config.manifest_path, dtype=str)
    training = manifest[manifest["split"] == "train"]
    assert told["studies"] == training["study_id"].nunique()
    assert 0.25 < told["without_hard_label"] / told["studies"] < 0.75
    words = read_record(runs / "student_v1_words" / "config.json")
    assert "lora_teacher_phase1_bag_of_words" in words["inputs"]["soft_labels"]["path"]
    comparison = read_record(runs / "comparison_chain" / "final_comparison.json")
    rows = read_record(folder / "label_budgets.json")["rows"]
    (student,) = [row for row in rows if row["what"] == "student"]
    section = comparison["protocols"][comparison["fitted_under"]]
    assert student["roc_auc"] == section["models"]["student_v1"]["macro"]["roc_auc"]
    page = (folder / "label_budgets.md").read_text()
    assert "| 50 % | student minus the answers of a bag of words |" in page
    table = pd.read_csv(folder / "label_budgets.csv")
    assert set(table["budget"]) == {0.5}
    assert {"CNN", "student", "bag of words, reads: findings"} <= set(table["what"])
    with Image.open(folder / "label_budgets.png") as picture:
        assert "Synthetic" in picture.text["Warning"]


@pytest.mark.parametrize("budgets", [[0.0], [0.5, 10.0]])
def test_a_budget_that_is_no_share_is_refused_before_anything_runs(chain, budgets):
    with pytest.raises(UserError, match=r"--label_budgets: \S+ is no share of the patients"):
        pipeline.run_budgets(load_config(chain), budgets)
