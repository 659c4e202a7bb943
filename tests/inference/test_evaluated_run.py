"""Which runs count as evaluated, and what of other folders is taken for theirs."""

from __future__ import annotations

import shutil

import pytest
from evaluated_runs import CNN, STUDENT, TEACHER, change, evaluated_run

from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.evaluation import comparison, results
from mlx_cxr.inference.evaluated_run import EvaluatedRun


@pytest.fixture
def cnn(tmp_path):
    return evaluated_run(tmp_path)


@pytest.fixture
def student(tmp_path):
    return evaluated_run(tmp_path, STUDENT)


def remove(*names):
    def change_it(folder):
        for name in names:
            (folder / name).unlink()

    return change_it


def set_to(name, *keys, value):
    return lambda folder: change(folder / name, *keys, value=value)


def change_weights(folder):
    """One byte of the last weight."""
    path = folder / "best_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), r"config\.json is missing: there is no such run"),
        (set_to("config.json", "stage", value="lfm_finetune"), r"made by the stage 'lfm_finetune'; a run of train_cnn"),
        (set_to("config.json", "stage", value="build_manifest"), r"made by the stage 'build_manifest'"),
        (set_to("config.json", "inputs", value={}), r"lacks 'config' or 'inputs\.manifest\.sha256'"),
        (
            remove("training.json"),
            r"training of .*first has not ended; .* mlx_cxr\.train_cnn --run_name first --resume",
        ),
        (remove("best_model.safetensors"), r"has not ended"),
        (remove("test_results.json"), r"test_results\.json is missing.* mlx_cxr\.evaluate_cnn --run_name first"),
        (remove("inference.json"), r"inference\.json is missing.*evaluate_cnn"),
        (remove("operating_points.json"), r"operating_points\.json is missing.*evaluate_cnn"),
        (set_to("test_results.json", "schema", value=0), rf"test_results\.json is not of schema {results.SCHEMA}"),
        (set_to("test_results.json", "provenance", "inputs", value={}), r"evaluation lacks 'checkpoint'"),
        (change_weights, r"the weights changed since they were evaluated; run python -m mlx_cxr\.evaluate_cnn"),
        (set_to("inference.json", "checkpoint", "sha256", value="0" * 64), r"inference\.json is of 000000000000"),
        (
            set_to(
                "inference.json", "preprocessing", "transform", value={"version": 0, "size": 32, "fit": "letterbox"}
            ),
            r"films are no longer prepared as they were",
        ),
    ],
)
def test_what_is_no_evaluated_run_is_refused_and_says_what_to_do(cnn, spoil, message):
    EvaluatedRun.open(cnn)
    spoil(cnn)
    with pytest.raises(RecordError, match=message):
        EvaluatedRun.open(cnn)


def test_the_records_are_those_of_the_folder(cnn):
    run = EvaluatedRun.open(cnn)
    assert run.name == CNN
    assert run.checkpoint_sha256 == sha256_file(cnn / "best_model.safetensors")
    assert run.results == read_record(cnn / "test_results.json")
    assert run.cost == read_record(cnn / "cost.json")
    assert (
        run.points.thresholds.values[1]
        == read_record(cnn / "operating_points.json")["labels"]["Cardiomegaly"]["threshold"]
    )
    assert (run.localization, run.failures, run.comparison, run.teacher) == (None, None, None, None)
    assert not run.synthetic
    assert not run.credentialed


@pytest.mark.parametrize(
    ("synthetic", "source", "credentialed"),
    [(False, "mimic-cxr-jpg", True), (True, "mimic-cxr-jpg", False), (False, "csv", False)],
)
def test_only_weights_of_real_mimic_images_are_credentialed(cnn, synthetic, source, credentialed):
    change(cnn / "config.json", "config", "data", "synthetic", value=synthetic)
    change(cnn / "config.json", "config", "data", "source", value=source)
    if source != "csv":
        change(cnn / "config.json", "config", "data", "csv", value=None)
        change(cnn / "config.json", "config", "pixels", "dicom_recipe", value="window")
    run = EvaluatedRun.open(cnn)
    assert (run.synthetic, run.credentialed) == (synthetic, credentialed)


def test_the_summary_counts_only_for_the_manifest_that_the_run_was_trained_on(cnn):
    summary = EvaluatedRun.open(cnn).manifest_summary
    assert summary["splits"]["train"] == {"patients": 12, "studies": 12, "images": 12}
    change(cnn / "config.json", "inputs", "manifest", "sha256", value="0" * 64)
    assert EvaluatedRun.open(cnn).manifest_summary is None


def test_where_maps_point_counts_only_where_this_evaluation_made_maps(cnn):
    write_record(cnn / "localization.json", {"schema": 1})
    assert EvaluatedRun.open(cnn).localization is None
    change(cnn / "inference.json", "map_references", "methods", value={"grad_cam": {}})
    assert EvaluatedRun.open(cnn).localization == {"schema": 1}


def test_a_comparison_counts_only_while_it_is_of_these_results_and_the_latest_does(cnn):
    def compare(name, sha256, started, schema=comparison.SCHEMA):
        inputs = {f"{CNN}/test_results.json": {"path": "", "sha256": sha256}}
        path = cnn.parent / f"comparison_{name}" / "final_comparison.json"
        about = {"schema": schema, "experiment": name}
        return write_record(path, {**about, "provenance": {"inputs": inputs, "started": started}})

    now = sha256_file(cnn / "test_results.json")
    compare("other", "0" * 64, "2026-03-01T00:00:00+00:00")
    # Of an older version, with other keys.
    compare("old", now, "2026-04-01T00:00:00+00:00", schema=1)
    assert EvaluatedRun.open(cnn).comparison is None
    compare("a_late", now, "2026-02-01T00:00:00+00:00")
    compare("b_early", now, "2026-01-01T00:00:00+00:00")
    assert EvaluatedRun.open(cnn).comparison["experiment"] == "a_late"


def test_a_failure_analysis_counts_only_while_it_is_of_these_predictions(cnn):
    path = cnn / "failure_analysis" / "failures.json"
    inputs = {f"{CNN}/predictions.csv": {"path": "", "sha256": sha256_file(cnn / "predictions.csv")}}
    write_record(path, {"provenance": {"inputs": inputs}})
    assert EvaluatedRun.open(cnn).failures is not None
    with (cnn / "predictions.csv").open("a") as predictions:
        predictions.write("\n")
    assert EvaluatedRun.open(cnn).failures is None


def test_a_student_names_its_teacher_and_describes_it_while_the_soft_labels_are_the_same(student):
    write_record(student.parent / TEACHER / "teacher.json", {"schema": 1, "reads": "findings"})
    soft = student.parent / TEACHER / "teacher_soft_labels.npy"
    teacher = EvaluatedRun.open(student).teacher
    assert teacher == {
        "run": TEACHER,
        "soft_labels_sha256": sha256_file(soft),
        "record": {"schema": 1, "reads": "findings"},
    }
    soft.write_bytes(b"others")
    assert EvaluatedRun.open(student).teacher == {**teacher, "record": None}
    shutil.rmtree(soft.parent)
    assert EvaluatedRun.open(student).teacher == {**teacher, "record": None}
