"""The stage that explains a teacher's answers: which studies it picks, what it writes, and what it refuses."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from toy_teacher import SPLITS, WITHOUT_REPORT, ToyTeacher, shared

from mlx_cxr import cache_teacher_outputs, explain_report
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.operating_points import STATE_WORDS, read_operating_points
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.inference.asked_reports import ExplainReportError, read_report
from mlx_cxr.inference.report_reader import ReportReader

pytestmark = pytest.mark.usefixtures("without_plots")

TEST = [f"s{i:03}" for i, split in enumerate(SPLITS) if split == "test"]
ANOTHER = "FINDINGS: Edema. Edema. Edema. Edema. Normal. Normal. Normal.\nIMPRESSION: Unread."


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def scored(toy) -> str:
    """The name of a run with predictions, that is no other test's."""
    run_dir = toy.tuned()
    copy = run_dir.with_name("explained")
    if not copy.exists():
        shutil.copytree(run_dir, copy)
        cache_teacher_outputs.run(toy.config(), copy.name)
    return copy.name


@pytest.fixture(scope="module")
def pages(toy, scored) -> Path:
    return explain_report.run(toy.config(), scored, examples=2)


def run_of(asked: Path) -> Path:
    """The run that a folder of asked explanations lies in."""
    return asked.parents[1]


def failure(capsys, toy: ToyTeacher, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        explain_report.main(["--config", str(toy.folder / "trial.yaml"), *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_most_confident_true_positives_of_the_test_split_are_shown(pages):
    saved = read_record(pages / "explanations.json")
    scored = read_predictions(run_of(pages) / "predictions.csv")
    test = scored.predictions.split == "test"
    expected = []
    for k, label in enumerate(LABELS):
        p = np.where(scored.predictions.raw_labels[:, k] == 1, scored.probabilities[:, k], -1)
        p[~test | (p < scored.thresholds[k])] = -1
        best = np.argsort(-p, kind="stable")[:2]
        expected += [(label, str(scored.predictions.study_ids[i])) for i in best if p[i] >= 0]
    assert len(expected) >= 3
    assert [(e["finding"], e["study_id"]) for e in saved["explanations"]] == expected
    assert {study for _, study in expected} <= set(TEST)


def test_probabilities_and_logits_are_those_of_the_predictions(pages):
    scored = read_predictions(run_of(pages) / "predictions.csv")
    points, _ = read_operating_points(run_of(pages) / "operating_points.json")
    rows = {study: i for i, study in enumerate(scored.predictions.study_ids.tolist())}
    for e in read_record(pages / "explanations.json")["explanations"]:
        row, k = rows[e["study_id"]], LABELS.index(e["finding"])
        assert e["logit"] == pytest.approx(float(scored.predictions.logits[row, k]), abs=1e-3)
        assert e["probability"] == pytest.approx(scored.probabilities[row, k], abs=1e-2)
        assert e["threshold"] == scored.thresholds[k]
        assert e["abstention"] == points.reason(k, e["probability"])
        assert e["label"] == "present"
        assert e["blank"] + e["film"] + e["report"] + e["left_over"] == pytest.approx(e["logit"])


def test_every_page_is_linked_and_says_what_it_is(pages):
    saved = read_record(pages / "explanations.json")
    names = {e["file"] for e in saved["explanations"]}
    pictures = {name.replace(".html", ".png") for name in names}
    assert {path.name for path in pages.iterdir()} == names | pictures | {"index.html", "explanations.json"}
    index = (pages / "index.html").read_text("utf-8")
    assert all(f'href="{name}"' in index for name in names | pictures)
    for text in (index, *((pages / name).read_text("utf-8") for name in names)):
        assert "Synthetic cohort. Research only, not for clinical use." in text
    assert {"adapter", "predictions", "manifest", "reports"} <= set(saved["provenance"]["inputs"])


@pytest.fixture
def folder(toy, scored, tmp_path) -> tuple[ToyTeacher, str]:
    """A copy of the run, to be written into."""
    name = f"copy_{tmp_path.name}"
    shutil.copytree(toy.folder / "outputs" / scored, toy.folder / "outputs" / name)
    return toy, name


def test_a_study_is_explained_for_what_is_asked(folder):
    toy, name = folder
    pages = explain_report.run(toy.config(), name, study_ids=["s001"], findings=["Cardiomegaly", "Edema"])
    saved = read_record(pages / "explanations.json")
    assert [(e["study_id"], e["finding"]) for e in saved["explanations"]] == [
        ("s001", "Cardiomegaly"),
        ("s001", "Edema"),
    ]
    assert len(list(pages.glob("*.png"))) == 2


@pytest.mark.parametrize("kind", ["text", "file"])
def test_a_text_is_explained_as_the_same_report_of_a_study_would_be(folder, tmp_path, kind):
    toy, name = folder
    given = ANOTHER
    if kind == "file":
        (tmp_path / "report.txt").write_text(ANOTHER)
        given = str(tmp_path / "report.txt")
    pages = explain_report.run(toy.config(), name, text=given)
    saved = read_record(pages / "explanations.json")
    scored = read_predictions(toy.folder / "outputs" / name / "predictions.csv")
    for e in saved["explanations"]:
        assert " ".join(e["words"]) == "Findings: Edema. Edema. Edema. Edema. Normal. Normal. Normal."
        assert e["label"] == ""
        called = e["probability"] >= scored.thresholds[LABELS.index(e["finding"])]
        assert called or len(saved["explanations"]) == 1
    # A text without headings counts as what the teacher reads.
    bare = explain_report.run(toy.config(), name, text="Edema. Edema. Edema. Edema. Normal. Normal. Normal.")
    again = read_record(bare / "explanations.json")["explanations"]
    assert [e["logit"] for e in again] == pytest.approx([e["logit"] for e in saved["explanations"]], abs=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_question_takes_away_the_answer_to_another(folder):
    toy, name = folder
    run_dir = toy.folder / "outputs" / name
    explain_report.run(toy.config(), name)
    questions = (
        {"text": ANOTHER},
        {"text": "Normal. Normal."},
        {"study_ids": ["s001"]},
        {"study_ids": ["s001"], "findings": ["Edema"]},
        {"study_ids": ["s001", "s002"]},
        {"findings": ["Edema"]},
        {"examples": 3},
    )
    places = set()
    for question in questions:
        before = contents(run_dir)
        place = explain_report.run(toy.config(), name, **question)
        after = contents(run_dir)
        assert {file: after.get(file) for file in before} == before
        assert set(after) > set(before)
        places.add(place)
    assert len(places) == len(questions)
    assert explain_report.run(toy.config(), name, text=ANOTHER) in places, "the same question has the same place"
    assert set(contents(run_dir)) == set(after)


def test_the_answer_to_a_question_is_printed(folder, caplog):
    toy, name = folder
    with caplog.at_level(logging.INFO, "mlx_cxr"):
        pages = explain_report.run(toy.config(), name, text=ANOTHER)
    reader = ReportReader.from_run(toy.folder / "outputs" / name)
    answer = reader.read(ANOTHER)
    said = caplog.text
    for k, label in enumerate(LABELS):
        if reader.points.tuned[k]:
            call = STATE_WORDS[int(answer.states[k])]
            (line,) = (line for line in said.splitlines() if f"  {label} " in line)
            assert line.split()[0] == call
            assert f" {answer.probabilities[k]:.2f}  (threshold " in line
    for e in read_record(pages / "explanations.json")["explanations"]:
        shown = np.abs(e["scores"][e["colours"]])
        strongest = e["words"][int(np.argmax(shown))]
        assert f"{e['finding']} was moved most, in logits, by: {strongest!r} " in said
    assert "not for clinical use" in said


def test_a_teacher_that_is_never_right_gets_an_index_that_says_so(folder):
    toy, name = folder
    path = toy.folder / "outputs" / name / "operating_points.json"
    points = read_record(path)
    for point in points["labels"].values():
        point |= {"threshold_source": "default", "positives": 0}
    write_record(path, points)
    pages = explain_report.run(toy.config(), name)
    assert "There is none." in (pages / "index.html").read_text("utf-8")


def test_bad_requests_are_refused_with_what_to_do(toy, scored, capsys):
    run = ("--teacher_run", scored)
    assert "'Oedema' is no finding; did you mean 'Edema'? The 14 are: Atelectasis" in failure(
        capsys, toy, *run, "--finding", "Oedema"
    )
    assert "study 's999' is not in" in failure(capsys, toy, *run, "--study_id", "s001", "s999")
    without = f"s{WITHOUT_REPORT[0]:03}"
    error = failure(capsys, toy, *run, "--study_id", without)
    assert f"study '{without}' has not what this teacher reads (findings)" in error
    assert "none of what this teacher reads" in failure(capsys, toy, *run, "--text", "IMPRESSION: Edema.")
    assert "there is no such file" in failure(capsys, toy, *run, "--text", "reports/none.txt")
    assert "give at least 1" in failure(capsys, toy, *run, "--examples", "0")
    assert "there is no such run" in failure(capsys, toy, "--teacher_run", "nobody")
    assert "not allowed with" in failure(capsys, toy, *run, "--text", "x", "--study_id", "s001")
    with pytest.raises(ExplainReportError, match="exclude each other"):
        explain_report.run(toy.config(), scored, study_ids=["s001"], text="x")


def test_a_run_that_is_not_scored_or_sees_images_only_is_refused(folder):
    toy, name = folder
    run_dir = toy.folder / "outputs" / name
    (run_dir / "operating_points.json").unlink()
    with pytest.raises(RecordError, match=r"operating_points\.json is missing.*cache_teacher_outputs"):
        explain_report.run(toy.config(), name)
    record = read_record(run_dir / "config.json")
    for modality, options, words in (
        ("image", {}, "sees films only"),
        ("image_text", {"text": "Edema."}, "reads films too"),
    ):
        record["config"]["teacher"]["modality"] = modality
        write_record(run_dir / "config.json", record)
        shutil.copy(toy.folder / "outputs" / "explained" / "operating_points.json", run_dir)
        with pytest.raises(UserError, match=words):
            explain_report.run(toy.config(), name, **options)


def test_an_image_is_one_part_of_the_account(folder):
    toy, name = folder
    run_dir = toy.folder / "outputs" / name
    record = read_record(run_dir / "config.json")
    record["config"]["teacher"]["modality"] = "image_text"
    record["inputs"]["pixel_index"] = {
        "path": "x",
        "sha256": sha256_file(toy.config().pixels_path.with_suffix(".json")),
    }
    write_record(run_dir / "config.json", record)
    pages = explain_report.run(toy.config(), name, study_ids=["s001"], findings=["Edema"])
    (e,) = read_record(pages / "explanations.json")["explanations"]
    assert e["reads"] == "film + findings"
    assert e["film"] != 0
    assert "<td>film</td>" in (pages / e["file"]).read_text("utf-8")


def test_other_data_are_refused(folder):
    toy, name = folder
    with pytest.raises(RecordError, match=r"data\.synthetic"):
        explain_report.run(toy.config("data.synthetic=false"), name)


def test_a_long_line_is_a_report_and_no_file_name(tmp_path):
    text = "No edema. " * 500
    assert read_report(text) == text
    assert read_report("Edema.") == "Edema."
    with pytest.raises(ExplainReportError, match="no such file"):
        read_report("missing.txt")
    long = tmp_path / "long.txt"
    long.write_bytes(b"Edema. " * 200_000)
    with pytest.raises(ExplainReportError, match=r"--text .*long\.txt has more than 1,000,000 bytes"):
        read_report(str(long))
