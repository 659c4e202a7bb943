"""The card's content and page: every figure is the records', what is not known says so, and the limits follow."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_runs import NOISE, model, write_run, write_three

from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.core.formatting import interval_text, number
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.comparison import compare
from mlx_cxr.evaluation.failure_results import analyse
from mlx_cxr.evaluation.localization_table import ImageScores, localization_table
from mlx_cxr.evaluation.operating_points import ABSTAIN
from mlx_cxr.evaluation.results import evaluate, fit_operating_points
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.inference.evaluated_run import EvaluatedRun
from mlx_cxr.publishing.claim_checklist import ITEMS, NOT_RECORDED
from mlx_cxr.publishing.model_card import model_card, public_name
from mlx_cxr.publishing.model_card_page import card_markdown

DEVICE = {"kind": "metal", "name": "Apple M4", "cores": 10, "memory_bytes": 16_000_000_000, "blas": None}
PACKAGES = {"mlx": "0.32.4", "pillow": "12.0.0"}
SUMMARY = {
    "splits": {split: {"patients": 7, "studies": 11, "images": 13} for split in ("train", "validate", "test")},
    "labels": {k: {s: {"1": 3, "0": 4, "-1": 1, "empty": 3} for s in ("train", "validate", "test")} for k in LABELS},
    "views": {"AP": {"train": 9, "validate": 8, "test": 7}, "missing": {"train": 4, "validate": 5, "test": 6}},
    "sex": {"unknown": {"train": 11, "validate": 11, "test": 11}},
    "age": {"0-19": {"train": 2, "validate": 0, "test": 1}, "20-39": {"train": 9, "validate": 11, "test": 10}},
    "dropped": {"view not wanted": 21},
    "notes": {},
    "images_read": 60,
    "split_from": "of the source",
    "sample": {"studies_before": 500},
}


def written_and_read(path: Path, value):
    """As the file has it: NaN is null."""
    return read_record(write_record(path, value))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Operating points and `test_results.json` of a simulated model, with intervals and metadata."""
    predictions = model(3.0, 12, patients=90)
    points = fit_operating_points(predictions.of_split("validate"), "empty_negative", "f1", 0.1)
    validation, test = predictions.of_split("validate"), predictions.of_split("test")

    def metadata(part):
        ages = np.random.default_rng(0).integers(20, 90, len(part)).astype(float)
        return pd.DataFrame({"view": part.view_groups(), "age": ages, "sex": np.full(len(part), "F")})

    content = evaluate(
        predictions,
        points,
        run="student",
        synthetic=False,
        samples=80,
        seed=0,
        bins=15,
        provenance={"started": "2026-02-03T04:05:06+00:00"},
        train=(metadata(validation), validation.raw_labels),
        test_metadata=metadata(test),
    )
    return points, written_and_read(tmp_path_factory.mktemp("results") / "test_results.json", content)


@pytest.fixture
def run(results):
    return run_of(*results)


def run_of(points, results, **parts) -> EvaluatedRun:
    """A CNN of MIMIC-CXR-JPG, of which nothing optional is recorded."""
    plain = {"name": "trial", "data": {"root": "films", "work_dir": "work"}, "distillation": {"targets": "teacher"}}
    record = {
        "stage": "train_cnn",
        "command": ["train_cnn.py"],
        "started": "2026-01-02T03:04:05+00:00",
        "seed": 5,
        "commit": "c0ffee",
        "tree_dirty": True,
        "python": "3.12.1",
        "platform": "Darwin arm64",
        "packages": PACKAGES,
        "device": DEVICE,
        "inputs": {"manifest": {"path": "work/manifest.csv", "sha256": "a" * 64}},
    }
    training = {
        "parameters": {"total": 11_177_422, "trainable": 7_182},
        "initial_weights": {"weights": "imagenet", "head": "fresh", "source": "timm/resnet18.tv_in1k"},
        "best_auc": 0.8765,
        "best_epoch": 4,
        "epochs": 6,
        "steps": 600,
        "seconds": 90.0,
        "stopped_early": True,
    }
    optional = dict.fromkeys(("cost", "localization", "failures", "comparison", "manifest_summary", "teacher")) | {
        "external": {}
    }
    one = EvaluatedRun(
        folder=Path("outputs/student"),
        record=record,
        config=config_from_plain(plain, "test"),
        checkpoint=Path("outputs/student/best_model.safetensors"),
        checkpoint_sha256="b" * 64,
        training=training,
        results=results,
        points=points,
        inference={},
        **optional,
    )
    return replace(one, **parts)


def with_config(run: EvaluatedRun, **sections) -> EvaluatedRun:
    plain = run.config.plain()
    for name, values in sections.items():
        plain[name] |= values
    return replace(run, config=config_from_plain(plain, "test"))


def section_of(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of the same level."""
    mark = heading.split()[0]
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(mark)}}} |\Z)", page, re.M | re.S)
    assert found, heading
    return found.group(1)


def tables_of(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table."""
    tables, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            tables.append((lines[0], lines[2:]))
            lines = []
    return tables


def figures(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"-?\d+\.\d+", cell)]


def assert_shows(cell: str, interval) -> None:
    """A cell has an interval's three numbers, rounded to three digits; nothing where it is undefined."""
    wanted = [interval[key] for key in ("value", "low", "high") if interval[key] is not None]
    assert figures(cell) == pytest.approx(wanted, abs=0.00051), (cell, interval)
    assert wanted or cell == "–"


def test_every_figure_of_the_result_tables_is_that_of_the_results(run, results):
    page = card_markdown(model_card(run))
    for name, protocol in results[1]["protocols"].items():
        text = section_of(page, f"### Protocol `{name}`")
        assert protocol["meaning"] in text
        (_, ranked), (_, called) = tables_of(text)
        entries = [*protocol["per_label"].items(), (f"**mean of {len(protocol['macro_labels'])}**", protocol["macro"])]
        for (title, entry), rank, call in zip(entries, ranked, called, strict=True):
            assert rank[0] == call[0] == title
            if title in LABELS:
                assert [rank[1], rank[2]] == [str(entry["positives"]), str(entry["negatives"])]
                assert float(call[1]) == pytest.approx(results[1]["operating_points"][title]["threshold"], abs=0.00051)
            for key, cell in zip(("roc_auc", "average_precision", "brier"), rank[3:6], strict=True):
                assert_shows(cell, entry[key])
            assert figures(rank[6]) == pytest.approx([entry["ece_uncalibrated"], entry["ece"]], abs=0.00051)
            for key, cell in zip(("sensitivity", "specificity", "precision", "f1"), call[2:], strict=True):
                assert_shows(cell, entry[key])


def test_every_figure_of_coverage_calls_and_subgroups_is_that_of_the_results(run, results):
    page, content = card_markdown(model_card(run)), results[1]
    (_, coverage), (_, calls) = tables_of(section_of(page, "## Calls and abstention"))
    section = content["abstention"]["protocols"]["empty_negative"]
    entries = [*section["per_label"].values(), section["macro"]]
    keys = ("called", "risk_called", "risk", "sensitivity_called", "specificity_called")
    for entry, covered, call in zip(entries, coverage, calls, strict=True):
        for key, cell in zip(("positive_coverage", "negative_coverage"), covered[2:], strict=True):
            assert_shows(cell, entry[key])
        for key, cell in zip(keys, call[1:], strict=True):
            assert_shows(cell, entry[key])

    text = section_of(page, "## Subgroups and shortcuts")
    rows = {row[0]: row for row in tables_of(text)[0][1]}
    for view, group in content["by_view"].items():
        assert rows[f"view {view}"][1] == str(group["studies"])
        assert_shows(rows[f"view {view}"][3], group["macro"]["roc_auc"])
    for key, entry in content["pneumothorax_by_support_devices"].items():
        assert_shows(rows[key.replace("_", " ")][3], entry["roc_auc"])
    for key in ("roc_auc", "model_minus_it"):
        assert interval_text(content["metadata_only"]["macro"][key]) in text


def test_no_call_is_made_between_the_bounds_and_one_everywhere_outside(run):
    """By the run's own decisions over all probabilities."""
    text = section_of(card_markdown(model_card(run)), "## Calls and abstention")
    grid = np.linspace(0, 1, 20001)
    states = run.points.states(np.repeat(grid[:, None], 14, axis=1))
    for k, (_, between, *_) in enumerate(tables_of(text)[0][1][:14]):
        low, high = figures(between)
        inside, outside = (grid > low + 0.001) & (grid < high - 0.001), (grid < low - 0.001) | (grid > high + 0.001)
        assert (states[inside, k] == ABSTAIN).all()
        assert (states[outside, k] != ABSTAIN).all()


def test_at_a_glance_and_training_say_what_the_records_do(run):
    page = card_markdown(model_card(replace(run, manifest_summary=SUMMARY)))
    glance = dict(tables_of(section_of(page, "## At a glance"))[0][1])
    assert glance["trained on"] == "11 studies of 7 patients"
    test = run.results["counts"]["test"]
    assert glance["tested on"] == f"{test['studies']} studies of {test['patients']} patients, none of them in training"
    macro = run.results["protocols"]["empty_masked"]["macro"]["roc_auc"]
    assert glance["mean ROC-AUC of 14 findings, `empty_masked`"] == interval_text(macro)
    training = dict(tables_of(section_of(page, "## Training"))[0][1])
    assert training["epochs"] == "6 of 10, 600 steps"
    assert training["weights kept"] == "epoch 4, validation macro ROC-AUC 0.876 per film"
    assert training["time"] == "1.5 min on Apple M4 (metal)"
    about = dict(tables_of(section_of(page, "## Model"))[0][1])
    assert about["parameters"] == "11,177,422 (7,182 trained)"
    assert about["commit"] == "`c0ffee`, with uncommitted changes"
    assert about["weights, SHA-256"] == f"`{'b' * 64}`"


def test_the_data_section_has_the_manifests_counts(run):
    text = section_of(card_markdown(model_card(replace(run, manifest_summary=SUMMARY))), "## Data")
    counts, views, age, labels = (rows for _, rows in tables_of(text))
    assert counts[0] == ["patients", "7", "7", "7"]
    assert views == [["AP", "9", "8", "7"], ["missing", "4", "5", "6"]]
    assert age[0] == ["0-19", "2", "0", "1"]
    assert labels[0] == ["Atelectasis", *["3 / 4 / 1 / 3"] * 3]
    assert "By sex: not recorded." in text, "as every study's is unknown"


def test_what_is_not_recorded_says_so_and_nothing_fails(run):
    results = {**run.results, "metadata_only": None}
    del results["abstention"]
    page = card_markdown(model_card(replace(run, results=results)))
    assert tables_of(section_of(page, "## Data"))[0][1][0] == ["patients", NOT_RECORDED, "90", "90"]
    for heading, words in {
        "## Calls and abstention": "Coverage and risk on test: not recorded.",
        "## Subgroups and shortcuts": "By sex, age and support devices: not recorded",
        "## Maps": "Whether its maps point at the findings: not recorded.",
        "## Cost": "Not recorded.",
    }.items():
        assert words in section_of(page, heading)
    assert "What view, age and sex alone would tell: not recorded." in page
    assert "How often it abstains, and how often its calls are then wrong, is not recorded." in page


def test_the_file_makes_the_same_page_as_the_card(run, tmp_path):
    card = model_card(replace(run, manifest_summary=SUMMARY))
    assert card_markdown(written_and_read(tmp_path / "model_card.json", card)) == card_markdown(card)


def test_the_first_lines_say_synthetic_or_that_weights_stay(run):
    assert card_markdown(model_card(run)).splitlines()[:5] == [
        "# Model card: `student`",
        "",
        "> **Research only, not for clinical use.**",
        "",
        "> **DO NOT UPLOAD OR PASS ON. These weights derive from MIMIC-CXR, which is open only to those who signed "
        "PhysioNet's data use agreement. Weights, maps, soft labels and predictions count as derived data.**",
    ]
    page = card_markdown(model_card(with_config(run, data={"synthetic": True})))
    assert page.splitlines()[0] == "# Model card: `student`, a model of synthetic films"
    assert "drawn by a program" in page.splitlines()[3]
    assert "DO NOT UPLOAD" not in page


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({}, "not mentioned counted as absent, an uncertain one as absent. No"),
        (
            {"uncertain": "ones", "empty": "masked"},
            "counted as unknown, and was left out of the loss, an uncertain one as",
        ),
        ({"uncertain": "soft", "soft_value": 0.7}, "an uncertain one as a target of 0.7. No"),
        ({"uncertain_per_label": {"Edema": "ones"}}, "an uncertain one as absent, of Edema as present. No"),
    ],
)
def test_the_label_policy_is_in_words(run, labels, words):
    assert words in section_of(card_markdown(model_card(with_config(run, labels=labels))), "## Data")


def test_a_student_names_its_teacher_and_a_control_is_none(run):
    teacher = {
        "run": "lora",
        "soft_labels_sha256": "d" * 64,
        "record": {
            "base": "/home/someone/bases/tiny",
            "reads": "findings",
            "modality": "text",
            "bits": None,
            "zero_shot_auc": 0.512,
            "tuned_auc": 0.934,
        },
    }
    soft = {"with_soft_label": 900, "studies": 957, "teacher_agreement": 0.91}
    taught = replace(
        run,
        record={**run.record, "stage": "distillation"},
        training={**run.training, "soft_labels": soft},
        teacher=teacher,
    )
    card = model_card(taught)
    page = card_markdown(card)
    about = dict(tables_of(section_of(page, "## Model"))[0][1])
    assert (about["kind"], about["taught by"]) == ("student", "`lora`; tiny, reads: findings")
    assert about["teacher's validation macro ROC-AUC"] == "0.512 untrained, 0.934 trained"
    assert "900 of 957 studies; agree with the labels for 0.910" in page
    assert any("taught by the answers of `lora` (reads: findings)" in limit for limit in card["limits"])
    control = with_config(taught, distillation={"targets": "shuffled"})
    about = dict(tables_of(section_of(card_markdown(model_card(control)), "## Model"))[0][1])
    assert about["kind"] == "control: a student with shuffled targets in its teacher's place"
    assert "soft labels of" in about
    assert "taught by" not in about
    gone = model_card(replace(taught, teacher={**teacher, "record": None}))
    assert "what it is and reads is not recorded" in card_markdown(gone)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("LiquidAI/LFM2.5-VL-1.6B", "LiquidAI/LFM2.5-VL-1.6B"),
        ("/home/alice/base", "base"),
        ("data/demo/tiny", "tiny"),
        ("~/base", "base"),
        ("../base", "base"),
        ("C:\\Users\\alice\\base", "base"),
        ("base/", "base"),
    ],
)
def test_a_hub_id_is_told_from_a_path(text, name):
    assert public_name(text) == name


def test_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice" / "base").mkdir(parents=True)
    assert public_name("alice/base") == "base"


def test_claim_has_its_44_items_each_answered_or_not_recorded(run):
    bare, full = (model_card(one)["claim_2024"] for one in (run, replace(run, manifest_summary=SUMMARY)))
    assert [row["item"] for row in bare] == list(range(1, 45)) == sorted(ITEMS)
    for row in (*bare, *full):
        assert row["recorded"] == (row["answer"] != NOT_RECORDED)
        assert "|" not in row["answer"], "it would break the table"
    answers = {row["item"]: row["answer"] for row in full}
    assert answers[8] == "Views AP, PA. Left out, in images: view not wanted: 21"
    assert answers[10] == "33 of 500 studies, sampled by patient with the seed"
    assert answers[26] == "Epoch 4 of 6, by validation macro ROC-AUC per film (0.876)"
    assert answers[35] == "60 images read, 39 kept; see Data"
    assert answers[36] == "By split: age, view; see Data"
    validation = number(run.results["validation"]["empty_negative"]["roc_auc"])
    assert f"validation {validation}, test" in answers[32]
    unknown = {row["item"] for row in bare if not row["recorded"]}
    assert unknown == {3, 4, 10, 13, 15, 19, 35, 36, 39, 44}
    page = section_of(card_markdown(model_card(run)), "## CLAIM 2024")
    assert "34 of 44 items" in page


def test_of_a_users_table_claim_answers_less(run):
    csv = {"source": "csv", "csv": {"table": "films.csv", "label_map": {"Effusion": "Pleural Effusion"}}}
    card = model_card(with_config(run, data=csv))
    unknown = {row["item"] for row in card["claim_2024"] if not row["recorded"]}
    assert {5, 7, 11, 14, 16, 18} <= unknown
    assert "Effusion -> Pleural Effusion" in card["data"]["label_origin"]
    assert not card["sharing"]["credentialed"]


def changed_results(run, **changes):
    """Results with entries replaced, by a path of keys."""
    results = dict(run.results)
    results.update(changes)
    return replace(run, results=results)


def limits_of(run) -> str:
    return "\n".join(model_card(run)["limits"])


def with_roc_auc(run, label, **interval):
    protocols = {name: dict(protocol) for name, protocol in run.results["protocols"].items()}
    section = protocols["empty_negative"]
    entry = {**section["per_label"][label], "roc_auc": {"value": 0.7, "replicates": 80, **interval}}
    section["per_label"] = {**section["per_label"], label: entry}
    return changed_results(run, protocols=protocols)


def test_findings_that_may_be_ranked_by_chance_are_named(run):
    said = r"better than chance is not shown \(the interval of ROC-AUC reaches 0\.5\): [^.]*Fracture"
    assert not re.search(said, limits_of(with_roc_auc(run, "Fracture", low=0.501, high=0.9)))
    assert re.search(said, limits_of(with_roc_auc(run, "Fracture", low=0.5, high=0.9)))
    assert not re.search(said, limits_of(with_roc_auc(run, "Fracture", low=None, high=None)))


def test_findings_with_few_positives_are_named_with_their_count(run):
    entries = run.results["protocols"]["empty_negative"]["per_label"]
    few = [f"{k} ({entries[k]['positives']})" for k in LABELS if entries[k]["positives"] < 50]
    assert 0 < len(few) < 14
    assert f"Fewer than 50 positive test studies, so wide intervals: {', '.join(few)}." in limits_of(run)


def test_drains_metadata_and_children_are_named_where_the_figures_say_so(run):
    def drains(with_devices, without):
        entries = {"with_devices": with_devices, "without_devices": without}
        entry = {"positives": 9, "negatives": 9}
        return {
            name: {**entry, "roc_auc": {"value": value, "low": 0.6, "high": 0.9, "replicates": 80}}
            for name, value in entries.items()
        }

    worse = changed_results(run, pneumothorax_by_support_devices=drains(0.9, 0.7))
    assert "without support devices (0.700 [0.600, 0.900]) than with them (0.900 [0.600, 0.900])" in limits_of(worse)
    assert "the drain" not in limits_of(changed_results(run, pneumothorax_by_support_devices=drains(0.7, 0.9)))
    assert "the drain" not in limits_of(changed_results(run, pneumothorax_by_support_devices=drains(0.7, None)))

    def metadata(low):
        macro = run.results["metadata_only"]["macro"]
        gain = {"value": 0.1, "low": low, "high": 0.2, "replicates": 80}
        return {**run.results["metadata_only"], "macro": {**macro, "model_minus_it": gain}}

    assert "0.100 [-0.010, 0.200]" in limits_of(changed_results(run, metadata_only=metadata(-0.01)))
    assert "do together is not shown" not in limits_of(changed_results(run, metadata_only=metadata(0.01)))
    assert "2 of 11 training studies are known to be of patients under 20" in limits_of(
        replace(run, manifest_summary=SUMMARY)
    )
    assert "under 20" not in limits_of(run)


def test_findings_without_calls_or_with_mostly_wrong_ones_are_named(run):
    points = run.points
    sources = tuple("default" if label == "Fracture" else "validation" for label in LABELS)
    bands = replace(points.bands, positives=np.where(np.array(LABELS) == "Fracture", 0, points.bands.positives))
    thresholds = replace(points.thresholds, sources=sources)
    untuned = replace(run, points=replace(points, thresholds=thresholds, bands=bands))
    assert "No threshold could be chosen: Fracture." in limits_of(untuned)
    row = tables_of(section_of(card_markdown(model_card(untuned)), "## Calls and abstention"))[0][1]
    assert row[label_index("Fracture")][1] == "everywhere"

    abstention = run.results["abstention"]
    section = abstention["protocols"]["empty_negative"]
    entry = section["per_label"]["Edema"]
    figures = {"value": 0.6, "low": 0.55, "high": 0.7, "replicates": 80}
    edema = {**entry, "risk_called": figures, "positive_coverage": {**figures, "high": 0.899}}
    changed = {**section, "per_label": {**section["per_label"], "Edema": edema}}
    changed = {**abstention, "protocols": {**abstention["protocols"], "empty_negative": changed}}
    said = limits_of(changed_results(run, abstention={**changed, "too_few": ["Edema"], "needed": 9}))
    assert "More than half of the calls that it makes on test are wrong for Edema 0.600 [0.550, 0.700]" in said
    assert re.search(r"less often than 90 % for studies with [^.]*Edema 0\.600 \[0\.550, 0\.899\]", said)
    assert "(fewer than 9 of a class), so no call is ever made: Edema." in said


def test_maps_are_evidence_only_for_findings_on_which_they_beat_the_strongest_control(run, tmp_path):
    rng = np.random.default_rng(0)

    def scores(label, hits, others):
        control = {"hit": others.astype(float)}
        half = {"hit": others * 0.5}
        controls = {"random": half, "swapped": control, "usual": half, "centre": half, "chance": half}
        patients = np.array([f"p{i}" for i in range(len(hits))])
        return ImageScores(label, patients, {"hit": hits.astype(float)}, controls)

    good, bad = rng.random(80) < 0.9, rng.random(80) < 0.3
    table = localization_table(
        [scores("Edema", good, bad), scores("Fracture", bad, bad)], 100, 0, synthetic=False, method="grad_cam"
    )
    table = written_and_read(tmp_path / "localization.json", {**table, "selection": "films with a mask"})
    located = replace(run, localization=table)
    assert "is shown for Edema, of 2 tested." in limits_of(located)
    assert "Whether its maps point at the findings was not tested" in limits_of(run)
    (_, rows), *_ = tables_of(section_of(card_markdown(model_card(located)), "## Maps"))
    assert [row[0] for row in rows] == ["Edema", "Fracture", "**mean of 2**"]
    assert_shows(rows[0][2], table["per_label"]["Edema"]["hit"]["maps"])
    assert figures(rows[0][4])[0] == pytest.approx(bad.mean(), abs=0.00051)
    assert rows[0][8] == "other patients' maps"
    assert_shows(rows[0][9], table["per_label"]["Edema"]["hit"]["swapped"]["difference"])


def test_the_comparison_is_that_of_the_models_it_names(run, tmp_path):
    write_three(tmp_path)
    write_run(tmp_path, "student_hard", model(NOISE["hard"], 14), targets="hard")
    roles = {"cnn": "cnn", "teacher": "teacher", "student": "student", "student_hard": "control"}
    comparison = compare(
        [open_scored_run(tmp_path / name, role) for name, role in roles.items()],
        experiment="trial",
        min_retention=0.9,
        samples=60,
        seed=0,
        bins=15,
        provenance={"started": ""},
    )
    comparison = written_and_read(tmp_path / "final_comparison.json", comparison)
    card = model_card(replace(run, comparison=comparison))
    text = section_of(card_markdown(card), "### Beside other models")
    section = comparison["protocols"]["empty_negative"]
    (_, models), (_, differences) = tables_of(text)
    assert [row[1] for row in models] == [f"`{name}`" for name in roles]
    for row in models:
        assert_shows(row[2], section["models"][row[1].strip("`")]["macro"]["roc_auc"])
    named = {row[0]: row for row in differences}
    pair = section["differences"]["student_minus_cnn"]
    assert_shows(named["student minus cnn"][1], pair["macro"]["roc_auc"])
    assert named["student minus cnn"][2] == pair["verdict"]
    assert_shows(named["student minus `student_hard`"][1], section["controls"]["student_hard"]["macro"]["roc_auc"])
    assert interval_text(section["retention"]["share"]) in text
    answers = {row["item"]: row["answer"] for row in card["claim_2024"]}
    assert "paired differences" in answers[29]


def test_groups_of_the_failure_analysis_are_shown_and_their_largest_gap_is_a_limit(run, tmp_path):
    write_three(tmp_path)
    student = open_scored_run(tmp_path / "student", "student")
    count = len(student.test.study_ids)
    sex = np.where(np.arange(count) % 2, "F", "M")
    studies = pd.DataFrame({"view": "AP", "sex": sex, "age": 50.0, "age_band": "40-59"}, index=range(count))
    analysis = analyse(
        student,
        {},
        studies,
        np.full(14, 0.2),
        teacher_margin=0.5,
        rare_share=0.05,
        samples=60,
        seed=0,
        provenance={},
    )
    failures = written_and_read(tmp_path / "failures.json", analysis.results)
    largest = {"attribute": "sex", "group": "F", "value": 0.2, "low": 0.1, "high": 0.3, "replicates": 60}
    failures["gaps"]["largest"] = largest
    card = model_card(replace(run, failures=failures))
    assert any(
        "go unseen more often than in all studies together where sex is F: false-negative rate 0.200 [0.100, 0.300]"
        in limit
        for limit in card["limits"]
    )
    text = section_of(card_markdown(card), "## Subgroups and shortcuts")
    rows = {(row[0], row[1].removesuffix(" (few)")): row for row in tables_of(text)[1][1]}
    for group in ("F", "M"):
        entry = failures["subgroups"]["sex"][group]
        assert rows["sex", group][2] == str(entry["studies"])
        for key, cell in zip(("roc_auc", "sensitivity", "specificity", "fnr_gap"), rows["sex", group][4:], strict=True):
            assert_shows(cell, entry[key])
    wrong = next(row["answer"] for row in card["claim_2024"] if row["item"] == 39)
    assert wrong.startswith(
        f"{failures['counts']['false_positives']} false positives and {failures['counts']['false_negatives']} false neg"
    )
