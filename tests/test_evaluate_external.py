"""The stage that scores a frozen run on another cohort: films, reports, and what is refused."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from evaluated_runs import change
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import polynomial_kernel
from toy_cohort import prepared
from toy_teacher import ToyTeacher, shared
from toy_training import square_images

from mlx_cxr import bag_of_words, build_manifest, evaluate_cnn, evaluate_external, train_cnn
from mlx_cxr.core.config import Config
from mlx_cxr.core.config_schema import BoxesConfig
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file
from mlx_cxr.core.labels import label_index
from mlx_cxr.core.runs import open_run
from mlx_cxr.data.tables import DataError
from mlx_cxr.evaluation.external import read_external
from mlx_cxr.evaluation.operating_points import read_operating_points
from mlx_cxr.evaluation.predictions import read_predictions
from mlx_cxr.inference.evaluated_run import EvaluatedRun
from mlx_cxr.models.convert import load_model
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.publishing.model_card import model_card
from mlx_cxr.publishing.model_card_page import card_markdown

pytestmark = pytest.mark.usefixtures("without_plots")

COUNT = 32
FINDINGS = ("Atelectasis", "Cardiomegaly")
PARTS = {"validate": slice(10, 20), "test": slice(20, 32)}


def cohort(
    folder,
    name,
    seed,
    brighter=0,
    patients="q{:02}".format,
    value=None,
    stored=None,
    findings=FINDINGS,
    **columns,
) -> Config:
    """Films with a square whose place two findings tell; `columns` are further ones of the table.

    `stored` makes the picture that is written of uint8 (64, 64).
    """
    (folder / "films").mkdir(parents=True)
    images, targets = square_images(COUNT, 64, seed)
    rows = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        file = f"{name}{i:02}.png"
        pixels = np.clip(image.astype(int) + brighter, 0, 255).astype(np.uint8)
        Image.fromarray(stored(pixels) if stored else pixels).save(folder / "films" / file)
        answers = dict(zip(findings, target, strict=False)) if value is None else {"Atelectasis": value}
        rows.append({"patient_id": patients(i), "study_id": f"{name}{i:02}", "image_file": file, **answers})
    return prepared(folder, pd.DataFrame(rows).assign(**columns), name)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Config:
    splits = ["train"] * 10 + ["validate"] * 10 + ["test"] * 12
    config = cohort(tmp_path_factory.mktemp("own"), "home", 0, patients="p{:02}".format, split=splits)
    train_cnn.run(config)
    evaluate_cnn.run(config, maps=False)
    return config


@pytest.fixture
def cnn(own, tmp_path):
    return shutil.copytree(own.run_dir(), tmp_path / "outputs" / "first")


def elsewhere(folder, **options) -> Config:
    """Brighter films of another place; the first patient has an id that the run's own cohort has too."""
    patients = options.pop("patients", lambda number: f"q{number:02}" if number else "p00")
    return cohort(folder, "elsewhere", 7, brighter=60, patients=patients, **options)


def pooled(run, config):
    """Features of all films of a cohort, by the network alone."""
    model, store = load_model(run / "best_model.safetensors"), np.load(config.pixels_path)
    return np.array(mx.mean(model.features(preprocess(mx.array(store), model.config.in_channels)), axis=(1, 2)))


def kernel_distance(first, second):
    kernel = {"degree": 3, "gamma": 1 / first.shape[1], "coef0": 1}
    among = (polynomial_kernel(part, **kernel)[~np.eye(len(part), dtype=bool)].mean() for part in (first, second))
    return sum(among) - 2 * polynomial_kernel(first, second, **kernel).mean()


def test_films_of_another_cohort_by_the_run_s_own_weights_and_points(cnn, own, tmp_path, caplog):
    config = elsewhere(tmp_path / "other")
    before = {path.name: sha256_file(path) for path in cnn.glob("*.*") if path.is_file()}
    folder = evaluate_external.run(cnn, config)
    assert folder == cnn / "external" / "elsewhere"
    assert {path.name for path in folder.iterdir()} == {"external_results.json", "external.md", "predictions.csv"}
    assert {path.name: sha256_file(path) for path in cnn.glob("*.*") if path.is_file()} == before, "nothing is fitted"
    results, scored = read_record(folder / "external_results.json"), read_predictions(folder / "predictions.csv")
    assert results["counts"] == {"studies": COUNT - 1, "patients": COUNT - 1, "shared_patients": 1}
    assert "1 patients have ids that the run's own cohort has too, such as 'p00'" in caplog.text
    # Every logit by the network alone.
    model, store = load_model(cnn / "best_model.safetensors"), np.load(config.pixels_path)
    expected = np.array(model(preprocess(mx.array(store), model.config.in_channels)))[1:]
    order = np.argsort(scored.predictions.study_ids)
    np.testing.assert_allclose(scored.predictions.logits[order], expected, atol=1e-4)
    _, targets = square_images(COUNT, 64, 7)
    for column, label in enumerate(("Atelectasis", "Cardiomegaly")):
        y, k = targets[1:, column], label_index(label)
        found = results["against_own"]["per_label"][label]["external"]["value"]
        assert found == pytest.approx(roc_auc_score(y, expected[:, k]))
    assert results["against_own"]["findings"] == ["Atelectasis", "Cardiomegaly"]
    points = read_operating_points(cnn / "operating_points.json")[0]
    np.testing.assert_array_equal(scored.thresholds, points.thresholds.values)
    assert results["shift"]["per_statistic"]["brightness"]["difference"] > 1
    # The films are squares: the gate objects to all of them, and says so.
    assert results["objections"] == COUNT
    page = (folder / "external.md").read_text()
    # The features that the last layer makes these logits of, and the distance between them by scikit-learn's kernel.
    features = {"external": pooled(cnn, config)[1:]} | {name: pooled(cnn, own)[rows] for name, rows in PARTS.items()}
    np.testing.assert_allclose(
        features["external"] @ np.array(model.fc.weight).T + np.array(model.fc.bias), expected, atol=1e-4
    )
    for name, entry in results["shift"]["features"].items():
        first, second = features["validate" if name == "own" else "external"], features["test"]
        assert entry["patients"] == [len(first), len(second)]
        assert entry["value"] == pytest.approx(kernel_distance(first, second), rel=1e-3, abs=1e-6)
    apart = results["shift"]["features"]
    assert apart["external"]["value"] > 5 * abs(apart["own"]["value"])
    assert apart["external"]["p_value"] == 0.001 < 0.05 < apart["own"]["p_value"]
    assert (
        f"the films differ: {apart['external']['value']:.3g} (KID, p 0.001) from the films of its own test split"
        in page
    )
    assert f"| own validation split | {apart['own']['value']:.3g} | " in page
    assert "Left out: 1 patients" in page
    assert "The gate objects to 32 of the films" in page


def test_the_model_card_says_where_it_was_tested(cnn, tmp_path):
    assert any("Never seen outside its own cohort" in limit for limit in model_card(EvaluatedRun.open(cnn))["limits"])
    evaluate_external.run(cnn, elsewhere(tmp_path / "other"))
    card = model_card(EvaluatedRun.open(cnn))
    assert list(card["external"]) == ["elsewhere"]
    assert not any("Never seen outside" in limit for limit in card["limits"])
    (said,) = (limit for limit in card["limits"] if limit.startswith("On 31 studies of 31 patients of elsewhere"))
    value = card["external"]["elsewhere"]["against_own"]["macro"]["external"]["value"]
    assert f"macro ROC-AUC {value:.3f}" in said
    answers = {row["item"]: row["answer"] for row in card["claim_2024"]}
    assert answers[33].startswith(f"elsewhere: macro ROC-AUC {value:.3f}")
    page = card_markdown(card)
    assert f"| mean ROC-AUC on the cohort `elsewhere` | {value:.3f}" in page
    assert "| not tested | cohorts other than its own and `elsewhere`; prospective use; " in page


def test_the_run_s_own_cohort_is_refused(cnn, own):
    with pytest.raises(UserError, match="is the run's own manifest; give the configuration of another cohort"):
        evaluate_external.run(cnn, own)


def test_results_of_other_weights_do_not_count(cnn, tmp_path):
    evaluate_external.run(cnn, elsewhere(tmp_path / "other"))
    path = cnn / "external" / "elsewhere" / "external_results.json"
    change(path, "provenance", "inputs", "weights", "sha256", value="0" * 64)
    card = model_card(EvaluatedRun.open(cnn))
    assert card["external"] == {}
    assert any("Never seen outside its own cohort" in limit for limit in card["limits"])
    with pytest.raises(RecordError, match=r"best_model\.safetensors was 000000000000, is .*--run first --config …` "):
        read_external(open_run(cnn), "elsewhere")


def test_films_are_not_compared_with_others_in_the_place_of_the_run_s_own(cnn, tmp_path):
    config = elsewhere(tmp_path / "other")
    # Another manifest lies where the record says that its own one is.
    change(cnn / "config.json", "config", "data", "work_dir", value=config.plain()["data"]["work_dir"])
    results = read_record(evaluate_external.run(cnn, config) / "external_results.json")
    assert results["shift"] is None
    assert results["counts"]["shared_patients"] is None


@pytest.mark.parametrize(
    "stored",
    [
        lambda image: image.astype(np.uint16) * 257,
        lambda image: np.stack([image] * 3, axis=2),
        lambda image: image.repeat(2, axis=0).repeat(2, axis=1),
    ],
    ids=["16 bits", "colour", "twice as large"],
)
def test_films_of_another_depth_or_size_are_the_same_films(cnn, tmp_path, stored):
    plain, config = (elsewhere(tmp_path / name, stored=how) for name, how in (("plain", None), ("other", stored)))
    stores = [np.load(one.pixels_path).reshape(COUNT, -1) for one in (plain, config)]
    assert min(np.corrcoef(*films)[0, 1] for films in zip(*stores, strict=True)) > 0.99
    folder = evaluate_external.run(cnn, config)
    scored, results = read_predictions(folder / "predictions.csv"), read_record(folder / "external_results.json")
    head = load_model(cnn / "best_model.safetensors").fc
    expected = (pooled(cnn, config) @ np.array(head.weight).T + np.array(head.bias))[1:]
    order = np.argsort(scored.predictions.study_ids)
    np.testing.assert_allclose(scored.predictions.logits[order], expected, atol=1e-4)
    assert results["counts"]["studies"] == COUNT - 1
    assert results["shift"]["features"]["external"]["p_value"] < 0.05


def test_a_cohort_without_a_finding_in_common_is_refused(cnn, tmp_path):
    """Its one finding was never labelled in the run's own cohort."""
    config = elsewhere(tmp_path / "other", findings=("Edema",))
    with pytest.raises(DataError, match=r"test split has Atelectasis, Cardiomegaly, the other cohort Edema; are its"):
        evaluate_external.run(cnn, config)
    assert not (cnn / "external").exists()


def test_pixels_for_another_transform_are_refused(cnn, tmp_path):
    config = elsewhere(tmp_path / "other")
    shutil.rmtree(config.pixels_path.parent)
    build_manifest.run(config)
    way = "prepare_images --config … --set pixels.size=32 --set pixels.fit=letterbox --set pixels.dicom_recipe=window"
    with pytest.raises(DataError, match=way):
        evaluate_external.run(cnn, config)


def test_a_cohort_of_one_class_or_of_the_same_patients_is_refused(cnn, tmp_path):
    config = elsewhere(tmp_path / "one", value=1)
    with pytest.raises(DataError, match="no finding is both present and absent in both cohorts"):
        evaluate_external.run(cnn, config)
    config = elsewhere(tmp_path / "same", patients=lambda number: f"p{number:02}")
    with pytest.raises(DataError, match="no study of all is left to score"):
        evaluate_external.run(cnn, config)
    assert not (cnn / "external").exists()


def test_maps_are_scored_by_the_boxes_of_another_cohort(own, tmp_path):
    """By the run's own baseline; the studies of patients that both have are left out here too."""
    run_dir = shutil.copytree(own.run_dir(), tmp_path / "outputs" / "first")
    evaluate_cnn.run(own.model_copy(update={"outputs": tmp_path / "outputs"}))
    config = elsewhere(tmp_path / "other")
    rows = [f"elsewhere{i:02}.png,{name},8,8,40,40" for i in range(COUNT) for name in ("Cardiomegaly", "Shadow")]
    table = tmp_path / "boxes.csv"
    table.write_text("image_id,class_name,x_min,y_min,x_max,y_max\n" + "\n".join(rows))
    config = config.model_copy(update={"data": config.data.model_copy(update={"boxes": BoxesConfig(table=table)})})
    folder = evaluate_external.run(run_dir, config)
    places = read_record(folder / "localization.json")
    assert (places["truth"], places["left_out"]["unmapped"]) == ("boxes", {"Shadow": COUNT})
    labels = pd.read_csv(config.manifest_path)
    entry = places["per_label"]["Cardiomegaly"]
    assert list(places["per_label"]) == ["Cardiomegaly"]
    assert entry["films"] == ((labels["Cardiomegaly"] == 1) & (labels["patient_id"] != "p00")).sum()
    assert entry["hit"]["chance"]["mean"]["value"] == pytest.approx(1 / 4)
    assert entry["hit"]["usual"]["mean"]["value"] in (0.0, 1.0), "one fixed place against one fixed box"
    assert "Do the maps find the finding?" in (folder / "external.md").read_text()
    (run_dir / "map_fit.npz").unlink()
    with pytest.raises(RecordError, match=r"map_fit\.npz cannot be used .* run evaluate_cnn --run_name first again"):
        evaluate_external.run(run_dir, config)


def test_reports_of_another_cohort_by_a_bag_of_words_and_a_teacher(tmp_path_factory, tmp_path):
    toy: ToyTeacher = shared(tmp_path_factory)
    outputs = f"outputs={tmp_path}"
    own = toy.config(outputs, "teacher.run_name=lora")
    words = bag_of_words.run(own)
    table = pd.read_csv(toy.folder / "table.csv", keep_default_na=False)
    for name in ("patient_id", "study_id"):
        table[name] = "other-" + table[name].astype(str)
    table.to_csv(tmp_path / "table.csv", index=False)
    other = toy.config(
        *(f"data.csv.table={tmp_path / 'table.csv'}", f"data.work_dir={tmp_path / 'made'}", "name=new", outputs)
    )
    build_manifest.run(other)
    folder = evaluate_external.run(words, other, split="test")
    results = read_record(folder / "external_results.json")
    # The same reports under other names: the same figures.
    of_its_own = read_record(words / "test_results.json")["protocols"][results["against_own"]["protocol"]]
    for label in results["against_own"]["findings"]:
        external = results["against_own"]["per_label"][label]["external"]["value"]
        assert external == pytest.approx(of_its_own["per_label"][label]["roc_auc"]["value"])
    assert results["shift"] is None
    assert results["objections"] is None
    assert results["against_own"]["macro"]["external"]["value"] == results["against_own"]["macro"]["own"]["value"]
