import shutil
from dataclasses import replace

import numpy as np
import pytest
from simulated_runs import NOISE, model, write_run, write_three

from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.predictions import COLUMNS
from mlx_cxr.evaluation.results import SCHEMA
from mlx_cxr.evaluation.scored_runs import (
    ComparisonError,
    check_teacher,
    open_scored_run,
    shared_studies,
)

EDEMA = LABELS.index("Edema")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_three(folder)
    return folder


@pytest.fixture
def copy(outputs, tmp_path):
    return shutil.copytree(outputs, tmp_path / "outputs")


def other_cnn(outputs, test_changes, **settings):
    """The CNN's predictions with the test split changed, as the run `other`."""
    predictions = model(NOISE["cnn"], 10)
    rows = np.flatnonzero(predictions.split == "test")
    write_run(outputs, "other", test_changes(predictions, rows), **settings)
    return [open_scored_run(outputs / name, role) for name, role in (("cnn", "cnn"), ("other", "student"))]


def test_a_run_is_read_as_it_was_scored(outputs):
    run = open_scored_run(outputs / "teacher", "teacher")
    results = read_record(outputs / "teacher" / "test_results.json")
    expected = model(NOISE["teacher"], 11).of_split("test")
    np.testing.assert_array_equal(run.test.logits, expected.logits)
    np.testing.assert_array_equal(run.test.study_ids, expected.study_ids)
    point = results["operating_points"]["Edema"]
    assert run.points.thresholds.values[EDEMA] == point["threshold"]
    assert run.points.calibration.temperatures[EDEMA] == point["temperature"]
    assert run.points.protocol == "empty_negative"
    assert [getattr(run.points.bands, key)[EDEMA] for key in ("lower", "upper", "positives", "negatives")] == [
        point[key] for key in ("lower", "upper", "positives", "negatives")
    ]
    assert run.points.bands.alpha == 0.1
    assert (run.name, run.title) == ("teacher", "teacher, reads: findings")
    assert run.cost["ms_per_sample"] == 812.0
    assert open_scored_run(outputs / "student", "student").soft_labels["path"].startswith("outputs/teacher/")
    assert open_scored_run(outputs / "cnn", "cnn").soft_labels is None


@pytest.mark.parametrize(
    ("sections", "modality", "source", "findings"),
    [
        (("findings",), "text", False, True),
        (("indication",), "text", False, False),
        (("findings", "impression"), "text", True, False),
        (("whole",), "image_text", True, False),
        (("last_paragraph",), "text", True, False),
        (("impression",), "image", False, False),
    ],
)
def test_what_a_teacher_may_read_is_told_from_its_configuration(copy, sections, modality, source, findings):
    config = read_record(copy / "teacher" / "config.json")
    config["config"]["teacher"]["sections"] = list(sections)
    write_record(copy / "teacher" / "config.json", config)
    write_record(copy / "teacher" / "teacher.json", {"reads": "something", "modality": modality})
    run = open_scored_run(copy / "teacher", "teacher")
    assert (run.reads_label_source, run.reads_findings) == (source, findings)
    assert run.title == "teacher, reads: something" + (" (the labels' source)" if source else "")


@pytest.mark.parametrize(
    ("role", "run", "file", "command"),
    [
        ("cnn", "cnn", "config.json", "train_cnn --run_name cnn"),
        ("cnn", "cnn", "predictions.csv", "evaluate_cnn --run_name cnn"),
        ("student", "student", "config.json", "distillation --run_name student"),
        ("control", "student", "test_results.json", "evaluate_cnn --run_name student"),
        ("teacher", "teacher", "teacher.json", "lfm_finetune --run_name teacher"),
        ("graded teacher", "teacher", "predictions.csv", "cache_teacher_outputs --teacher_run teacher"),
    ],
)
def test_a_missing_file_names_the_command_that_makes_it(copy, role, run, file, command):
    (copy / run / file).unlink()
    with pytest.raises(ComparisonError, match=rf"{run}/{file} is missing.*python -m mlx_cxr\.{command} "):
        open_scored_run(copy / run, role)


def test_a_run_that_was_not_timed_is_still_read(copy):
    (copy / "cnn" / "cost.json").unlink()
    run = open_scored_run(copy / "cnn", "cnn")
    assert run.cost is None
    assert run.command("cost.json") == "python -m mlx_cxr.evaluate_cnn --run_name cnn --config …"


def test_predictions_and_results_of_different_evaluations_are_refused(copy):
    path = copy / "cnn" / "predictions.csv"
    content = path.read_text()
    # A logit's last digit, which no other check could see.
    logit = content.splitlines()[1].split(",")[list(COLUMNS).index("logit")]
    other = f"{logit[:-1]}{(int(logit[-1]) + 1) % 10}"
    for changed in (content.replace(logit, other, 1), content[:-1], (copy / "student" / "predictions.csv").read_text()):
        path.write_text(changed)
        with pytest.raises(
            ComparisonError, match=r"predictions\.csv is not what .*test_results\.json was computed from"
        ):
            open_scored_run(copy / "cnn", "cnn")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_results.json", lambda x: x.update(schema=9), f"has schema 9, not {SCHEMA}"),
        ("test_results.json", lambda x: x.pop("provenance"), r"test_results\.json lacks 'provenance'"),
        ("test_results.json", lambda x: x["operating_points"].pop("Edema"), r"test_results\.json lacks 'Edema'"),
        ("test_results.json", lambda x: x.pop("abstention"), r"test_results\.json lacks 'abstention'"),
        ("teacher.json", lambda x: x.pop("reads"), r"teacher\.json lacks 'reads'"),
        ("cost.json", lambda x: x.pop("parameters"), r"cost\.json lacks 'parameters'"),
        ("config.json", lambda x: x["config"].pop("teacher"), r"config\.json lacks 'teacher'"),
    ],
)
def test_a_file_that_lacks_a_key_is_named(copy, file, change, message):
    content = read_record(copy / "teacher" / file)
    change(content)
    write_record(copy / "teacher" / file, content)
    with pytest.raises((ComparisonError, RecordError), match=message):
        open_scored_run(copy / "teacher", "teacher")


def test_a_control_is_no_student(copy):
    write_run(copy, "shuffled", model(1, 1), targets="shuffled")
    with pytest.raises(ComparisonError, match=r"learned from 'shuffled' targets.*--control_run"):
        open_scored_run(copy / "shuffled", "student")
    assert open_scored_run(copy / "shuffled", "control").title == "control: shuffled"


def test_a_student_of_another_teacher_is_refused(copy):
    write_run(copy, "second", model(1, 1), taught_by="lora_2")
    runs = [open_scored_run(copy / name, role) for name, role in (("teacher", "teacher"), ("second", "student"))]
    with pytest.raises(ComparisonError, match="'second' learned from the soft labels of 'lora_2', not of 'teacher'"):
        check_teacher(runs)
    runs[1] = open_scored_run(copy / "student", "student")
    check_teacher(runs)
    (copy / "teacher" / "teacher_soft_labels.npy").write_bytes(b"cached again")
    with pytest.raises(
        ComparisonError, match=r"'student' learned from soft labels [0-9a-f]{64}, .*distillation --run_n"
    ):
        check_teacher(runs)
    (copy / "teacher" / "teacher_soft_labels.npy").unlink()
    check_teacher(runs)


def test_shared_studies_are_those_of_all_and_runs_give_them_in_one_order(copy):
    runs = other_cnn(copy, lambda p, rows: p.select(np.r_[rows[5:][::-1], np.flatnonzero(p.split == "validate")]))
    shared = shared_studies(runs)
    assert shared.tolist() == sorted(runs[0].test.study_ids[5:].tolist())
    tests = [run.on(shared) for run in runs]
    for test in tests:
        np.testing.assert_array_equal(test.study_ids, shared)
    np.testing.assert_array_equal(tests[0].logits, tests[1].logits)
    with pytest.raises(KeyError, match="test-s00000"):
        runs[1].on(np.array(["test-s00000"]))


def test_runs_without_a_common_study_are_refused(copy):
    def renamed(p, rows):
        ids = p.study_ids.copy()
        ids[rows] = np.char.add("x", ids[rows])
        return replace(p, study_ids=ids)

    with pytest.raises(ComparisonError, match=r"scored by all of the runs \(cnn \d+, other \d+ studies\)"):
        shared_studies(other_cnn(copy, renamed))


def test_differing_labels_and_patients_of_a_study_are_refused(copy):
    def relabelled(p, rows):
        raw = p.raw_labels.copy()
        raw[rows[2], EDEMA] = 1 if raw[rows[2], EDEMA] != 1 else np.nan
        return replace(p, raw_labels=raw)

    def moved(p, rows):
        patients = p.patient_ids.astype("U20")
        patients[rows[2]] = "test-p9999"
        return replace(p, patient_ids=patients)

    with pytest.raises(
        ComparisonError, match=r"study test-s00002, Edema: label .* in .*cnn/pred.*, .* in .*other/pred"
    ):
        shared_studies(other_cnn(copy, relabelled))
    with pytest.raises(ComparisonError, match=r"study test-s00002: patient .* in .*cnn/pred.*, test-p9999 in .*other/"):
        shared_studies(other_cnn(copy, moved))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"manifest": "b" * 64}, "manifest: .*cnn/test_results.json has a{64}, .*other/test_results.json has b{64}"),
        ({"synthetic": False}, "synthetic: .*cnn/test_results.json has True, .*other/test_results.json has False"),
        ({"protocol": "empty_masked"}, "fitted_under: .* has empty_negative, .* has empty_masked"),
    ],
)
def test_runs_of_other_data_or_another_fit_are_refused(copy, settings, message):
    with pytest.raises(ComparisonError, match=message):
        shared_studies(other_cnn(copy, lambda p, _: p, **settings))


def test_a_run_named_twice_is_refused(outputs):
    run = open_scored_run(outputs / "cnn", "cnn")
    with pytest.raises(ComparisonError, match="run 'cnn' is named 2 times"):
        shared_studies([run, run])
