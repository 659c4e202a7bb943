"""The exported folder: the same answers in PyTorch, nothing private, nothing half, nothing of others deleted."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from evaluated_runs import CNN, STUDENT, TEACHER, change, evaluated_run, replace_model, replace_points
from few_images import image
from PIL import Image

from mlx_cxr import export
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import RecordError, read_json, read_record, sha256_file, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.decoding import Transform, decode
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.operating_points import STATE_WORDS, read_operating_points
from mlx_cxr.inference.predictor import Predictor
from mlx_cxr.models.convert import load_model
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess
from mlx_cxr.publishing.model_card import model_card

REAL = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[2] / "shared" / "realcxr")) / "images"


@pytest.fixture
def cnn(tmp_path):
    return evaluated_run(tmp_path)


def listing(folder):
    """Every file below a folder to its hash."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def lively_model(in_channels: int, output_stride: int, seed: int) -> ResNet18:
    from torch_reference import randomize_batchnorm

    model = ResNet18(ResNetConfig(in_channels=in_channels, output_stride=output_stride))
    initialize(model, seed)
    randomize_batchnorm(model, seed)
    return model.eval()


def script_of(folder: Path):
    """The exported script as a module."""
    spec = importlib.util.spec_from_file_location("use_with_pytorch", folder / "use_with_pytorch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_what_it_promises_and_its_sums_are_right(cnn, tmp_path):
    folder = export.run(cnn, tmp_path / "deep" / "shared")
    assert {path.name for path in folder.iterdir()} == set(export.FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["shared"]
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == set(export.FILES) - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert sha256_file(folder / "model.safetensors") == sha256_file(cnn / "best_model.safetensors")
    assert read_record(folder / "operating_points.json") == read_record(cnn / "operating_points.json")
    assert (folder / "use_with_pytorch.py").read_bytes() == export.PYTORCH_SCRIPT.read_bytes()


@pytest.mark.parametrize("output_stride", [16, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_torchvisions_layout_gives_the_same_logits_in_pytorch(cnn, tmp_path, torch, in_channels, output_stride):
    """Of 224 px images, through a ResNet-18 written for torchvision's names, and through the script's own."""
    from safetensors.torch import load_file
    from torch_reference import TorchResNet18

    replace_model(cnn, lively_model(in_channels, output_stride, seed=in_channels), 224)
    folder = export.run(cnn, tmp_path / "out")
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224)).astype(np.uint8)
    ours = np.array(load_model(folder / "model.safetensors")(preprocess(mx.array(images), in_channels)))
    assert ours.std() > 0.1

    about = read_json(folder / "preprocessing.json")["normalization"]
    mean, std = (np.array(about[key], np.float32)[:, None, None] for key in ("mean", "std"))
    x = torch.from_numpy((np.repeat(images[:, None], in_channels, axis=1).astype(np.float32) / 255 - mean) / std)
    reference = TorchResNet18(in_channels, 14, output_stride)
    reference.load_state_dict(load_file(folder / "model.torchvision.safetensors"), strict=True)
    with torch.inference_mode():
        np.testing.assert_allclose(reference.eval()(x).numpy(), ours, rtol=0, atol=1e-4)
        script = script_of(folder)
        theirs = [script.load_model()(script.network_input(image, about["mean"], about["std"])) for image in images]
    np.testing.assert_allclose(torch.cat(theirs).numpy(), ours, rtol=0, atol=1e-4)


def scattered_points(folder: Path, probabilities: np.ndarray):
    """Operating points for which the images get calls of all kinds: bounds between their probabilities."""
    points, _ = read_operating_points(folder / "operating_points.json")
    rng = np.random.default_rng(0)
    low, high = probabilities.min(axis=0), probabilities.max(axis=0)
    lower, upper, threshold = (low + rng.random((3, 14)) * (high - low)).clip(0, 1)
    # For the first three findings nothing is ruled out; of the first no threshold was chosen either.
    lower[:3], upper[:3], threshold[0] = 0, 1, 0.5
    positives = np.array([0, *[20] * 13])
    bands = replace(points.bands, lower=lower, upper=upper, positives=positives, negatives=np.full(14, 20))
    sources = ("default", *["validation"] * 13)
    return replace(points, bands=bands, thresholds=replace(points.thresholds, values=threshold, sources=sources))


@pytest.mark.parametrize("fit", ["letterbox", "center_crop"])
def test_the_script_prints_our_probabilities_and_calls(cnn, tmp_path, torch, fit):
    replace_model(cnn, lively_model(1, 16, seed=3), 64, fit)
    paths = [tmp_path / f"film{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        image(number, 90 + 20 * number, 120).save(path)
    predictor = Predictor.from_run(cnn)
    probabilities = np.stack([a.probabilities for a in predictor.predict([predictor.read(path) for path in paths])])
    replace_points(cnn, scattered_points(cnn, probabilities))
    predictor = Predictor.from_run(cnn)
    answers = predictor.predict([predictor.read(path) for path in paths])
    assert set(np.concatenate([answer.states for answer in answers]).tolist()) == {1, 0, -1}

    folder = export.run(cnn, tmp_path / "out")
    command = [sys.executable, str(folder / "use_with_pytorch.py"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path)
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines() if re.search(r" [01]\.\d{4}  \w+$", line)]
    assert [row[0].strip() for row in rows] == list(LABELS) * len(paths)
    for row, answer, k in zip(rows, np.repeat(np.arange(6), 14), list(range(14)) * 6, strict=True):
        assert float(row[1]) == pytest.approx(answers[answer].probabilities[k], abs=1e-4)
        assert row[2] == STATE_WORDS[int(answers[answer].states[k])]
    assert done.stdout.splitlines()[-1] == "Research only, not for clinical use."


def test_the_script_calls_what_we_call_at_every_probability(cnn, tmp_path, torch):
    """Also of findings with too few validation studies of a class, and with bands on either side of the threshold."""
    rng = np.random.default_rng(0)
    points = read_operating_points(cnn / "operating_points.json")[0]
    positives = np.array([0, 1, 8, 9, 10, *[50] * 9])
    bands = ConformalBands(0.1, rng.random(14), rng.random(14), positives, np.full(14, 50))
    sources = tuple("default" if n == 0 else "validation" for n in positives)
    thresholds = replace(points.thresholds, values=rng.random(14), sources=sources)
    points = replace(points, bands=bands, thresholds=thresholds)
    replace_points(cnn, points)
    folder = export.run(cnn, tmp_path / "out")
    plain, decide = read_record(folder / "operating_points.json"), script_of(folder).decide
    logits = np.repeat(np.linspace(-6, 6, 401)[:, None], 14, axis=1)
    ours = points.decide(logits)
    for k, label in enumerate(LABELS):
        theirs = [decide(z, plain["labels"][label], plain["alpha"]) for z in logits[:, k]]
        np.testing.assert_allclose([p for p, _ in theirs], ours.probabilities[:, k], rtol=1e-12)
        assert [call for _, call in theirs] == [STATE_WORDS[int(state)] for state in ours.states[:, k]], label
    assert {STATE_WORDS[int(state)] for state in ours.states.ravel()} == {"present", "absent", "abstain"}


def saved(image: Image.Image, name: str, **options) -> tuple[str, bytes]:
    content = io.BytesIO()
    image.save(content, name.rsplit(".", 1)[-1].replace("jpg", "jpeg"), **options)
    return name, content.getvalue()


def images_of_all_kinds() -> list[tuple[str, bytes]]:
    """Name and content."""
    rng = np.random.default_rng(5)
    gray = image(1, 300, 260)
    large = image(2, 700, 450)
    colour = Image.merge("RGB", [image(number, 700, 450) for number in (3, 4, 5)])
    see_through = Image.merge("RGBA", [*(image(number, 150, 90) for number in (3, 4, 5)), image(6, 150, 90)])
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 16 + rng.integers(0, 16, gray.size[::-1], np.uint16))
    turned = Image.Exif()
    turned[274] = 6
    return [
        saved(gray, "gray.png"),
        saved(image(7, 45, 40), "small.png"),
        saved(image(8, 101, 67), "odd.bmp"),
        saved(deep, "deep.png"),
        saved(deep, "deep.tiff"),
        saved(deep, "white_is_zero.tiff", tiffinfo={262: 0}),
        saved(Image.fromarray(np.asarray(gray).astype(np.float32) / 7), "float.tiff"),
        saved(colour, "colour.png"),
        saved(colour.quantize(64), "palette.png"),
        saved(see_through, "see_through.png"),
        saved(gray.convert("1"), "black_and_white.png"),
        saved(large, "reduced.jpg", quality=90),
        saved(colour, "colour.jpg", quality=90),
        saved(large, "turned.jpg", exif=turned),
    ]


@pytest.mark.parametrize(
    "transform", [Transform(64), Transform(64, "center_crop"), Transform(97)], ids=lambda t: t.key()
)
def test_the_script_prepares_images_of_all_kinds_as_training_did(cnn, tmp_path, torch, transform):
    folder = export.run(cnn, tmp_path / "out")
    script = script_of(folder)
    for name, content in images_of_all_kinds():
        path = tmp_path / name
        path.write_bytes(content)
        ours = np.asarray(decode(path, transform).gray)
        theirs = script.read_image(path, transform.size, transform.fit)
        np.testing.assert_array_equal(theirs, ours, err_msg=name)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real films are not on this machine")
def test_the_script_prepares_real_images_as_training_did(cnn, tmp_path, torch):
    script = script_of(export.run(cnn, tmp_path / "out"))
    transform = Transform(224)
    for path in sorted(REAL.iterdir())[::40]:
        np.testing.assert_array_equal(
            script.read_image(path, 224, "letterbox"), np.asarray(decode(path, transform).gray)
        )


@pytest.mark.parametrize(("photometric", "slope"), [("MONOCHROME1", 1), ("MONOCHROME2", 1), ("MONOCHROME2", -1)])
def test_the_script_reads_dicoms_by_the_same_recipe(cnn, tmp_path, torch, photometric, slope):
    """12 bits that are no multiples of 16, so that fractions are cut off."""
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    from dicom_files import as_bytes, dicom_dataset

    pixels = np.asarray(image(4, 150, 110))
    stored = (pixels.astype(np.uint16) * 11 + 300).tobytes()
    path = tmp_path / "film"
    path.write_bytes(as_bytes(dicom_dataset(pixels, photometric, 12, PixelData=stored, RescaleSlope=str(slope))))
    theirs = script_of(export.run(cnn, tmp_path / "out")).read_image(path, 64, "letterbox")
    np.testing.assert_array_equal(theirs, np.asarray(decode(path, Transform(64)).gray))


def test_the_steps_in_words_have_the_numbers_of_this_run(cnn, tmp_path, torch):
    replace_model(cnn, lively_model(3, 32, seed=1), 96, "center_crop")
    about = read_json(export.run(cnn, tmp_path / "out") / "preprocessing.json")
    recorded = read_record(cnn / "inference.json")["preprocessing"]
    assert {key: about[key] for key in recorded} == recorded
    assert about["input"] == {"dtype": "float32", "torchvision": ["N", 3, 96, 96], "mlx": ["N", 96, 96, 3]}
    steps = {step["name"]: step["how"] for step in about["steps"]}
    assert list(steps)[:2] == ["decode", "gray levels"]
    assert "resize it to 96 x 96" in steps["geometry"]
    assert "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]. Three channels" in steps["normalization"]


def test_labels_say_what_the_sources_values_counted_as(cnn, tmp_path):
    policy = {"uncertain": "soft", "empty": "masked", "soft_value": 0.6, "uncertain_per_label": {"Edema": "ones"}}
    change(cnn / "config.json", "config", "labels", value=policy)
    about = read_json(export.run(cnn, tmp_path / "out") / "labels.json")
    assert about["labels"] == list(LABELS)
    targets = about["target_in_training"]["per_label"]
    assert targets["Edema"] == {"1": 1, "0": 0, "-1": 1, "": None}
    assert targets["Fracture"] == {"1": 1, "0": 0, "-1": pytest.approx(0.6), "": None}


def test_no_path_and_no_user_is_in_any_exported_file(tmp_path):
    """Planted wherever a run records a path, in the way of three systems."""
    student = evaluated_run(tmp_path, STUDENT)
    places = [
        "/home/alice/films",
        "C:\\Users\\alice\\films",
        "/Users/alice/my films/films",
        "~alice/films",
        "../alice/films",
    ]
    record = read_record(student / "config.json")
    config = record["config"]
    config["outputs"], config["weights_dir"], config["data"]["root"], config["data"]["reports"] = places[:4]
    config["data"]["patients_table"] = config["data"]["csv"]["table"] = places[4]
    config["model"]["weights"] = config["teacher"]["base"] = places[0]
    record["command"] = ["distillation.py", "--config", "/home/alice/trial.yaml", *places]
    record["command"] += [f"data.root={place}" for place in places] + [f"--config={place}" for place in places]
    for role, entry in record["inputs"].items():
        entry["path"] = f"/home/alice/{role}/{Path(entry['path']).name}"
    record["inputs"]["initial_weights"] = {
        "path": "/home/alice/outputs/first/best_model.safetensors",
        "sha256": "0" * 64,
    }
    record["inputs"]["soft_labels"]["path"] = f"/home/alice/outputs/{TEACHER}/teacher_soft_labels.npy"
    write_record(student / "config.json", record)
    change(student / "training.json", "initial_weights", "path", value="/home/alice/w.safetensors")
    change(student / "training.json", "initial_weights", "requested", value="/home/alice/w.safetensors")
    change(student / "training.json", "initial_weights", "reason", value="no /home/alice/w.safetensors")
    change(student / "test_results.json", "provenance", "command", value=["evaluate_cnn.py", "/home/alice/x.yaml"])
    base = {"schema": 1, "base": "/home/alice/base", "reads": "findings", "modality": "text", "bits": None}
    write_record(student.parent / TEACHER / "teacher.json", {**base, "zero_shot_auc": 0.5, "tuned_auc": 0.9})

    folder = export.run(student, tmp_path / "out")
    private = [b"alice", b"Users", str(tmp_path).encode(), str(Path.home()).encode() + b"/", b"evaluated_runs"]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [word for word in private if word in content], path.name
    exported = read_json(folder / "config.json")
    assert exported["command"][-1] == "--config=films"
    assert config_from_plain(exported["config"], "exported").data.root == Path("films")
    card = read_json(folder / "model_card.json")
    assert card["model"]["initial_weights"]["run"] == CNN
    assert (card["model"]["teacher"]["run"], card["model"]["teacher"]["base"]) == (TEACHER, "base")


def test_a_hub_id_stays(tmp_path):
    student = evaluated_run(tmp_path, STUDENT)
    change(student / "config.json", "config", "teacher", "base", value="LiquidAI/LFM2.5-VL-1.6B")
    exported = read_json(export.run(student, tmp_path / "out") / "config.json")
    assert exported["config"]["teacher"]["base"] == "LiquidAI/LFM2.5-VL-1.6B"


def test_what_the_weights_derive_from_is_said_on_the_terminal(cnn, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    export.run(cnn, tmp_path / "own")
    assert "institution's rules" in caplog.records[-1].getMessage()
    change(cnn / "config.json", "config", "data", "csv", value=None)
    change(cnn / "config.json", "config", "data", "source", value="mimic-cxr-jpg")
    change(cnn / "config.json", "config", "pixels", "dicom_recipe", value="window")
    caplog.clear()
    folder = export.run(cnn, tmp_path / "mimic")
    assert caplog.records[-1].levelname == "WARNING"
    assert "DO NOT UPLOAD OR PASS ON" in caplog.records[-1].getMessage()
    assert "DO NOT UPLOAD OR PASS ON" in "".join((folder / "MODEL_CARD.md").read_text().splitlines()[:6])
    change(cnn / "config.json", "config", "data", "synthetic", value=True)
    caplog.clear()
    folder = export.run(cnn, tmp_path / "synthetic")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert "synthetic" in (folder / "MODEL_CARD.md").read_text().splitlines()[0]


@pytest.mark.parametrize("inside", ["", "shared", "deep/er"])
def test_a_place_in_the_run_is_refused(cnn, inside):
    before = listing(cnn)
    with pytest.raises(export.ExportError, match="is in the run's folder"):
        export.run(cnn, cnn / inside)
    assert listing(cnn) == before


def test_a_link_into_the_run_is_followed_and_refused(cnn, tmp_path):
    (tmp_path / "link").symlink_to(cnn, target_is_directory=True)
    with pytest.raises(export.ExportError, match="is in the run's folder"):
        export.run(cnn, tmp_path / "link" / "shared")


def test_an_export_that_is_there_stays_unless_it_is_to_be_replaced(cnn, tmp_path):
    folder = export.run(cnn, tmp_path / "out")
    (folder / "labels.json").write_text("mine now")
    before = listing(tmp_path)
    with pytest.raises(export.ExportError, match="holds an export already; give another folder, or --overwrite"):
        export.run(cnn, folder)
    assert listing(tmp_path) == before
    (folder / ".DS_Store").write_text("")
    export.run(cnn, folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == set(export.FILES)
    assert read_json(folder / "labels.json")["labels"] == list(LABELS)
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_never_deleted(cnn, tmp_path, overwrite):
    folder = export.run(cnn, tmp_path / "out")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    before = listing(tmp_path)
    with pytest.raises(export.ExportError, match=r"holds what no export wrote \(thesis\)"):
        export.run(cnn, folder, overwrite=overwrite)
    with pytest.raises(export.ExportError, match="outputs"):
        export.run(cnn, tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("text")
    with pytest.raises(export.ExportError, match="is a file"):
        export.run(cnn, tmp_path / "file", overwrite=overwrite)
    assert listing(tmp_path) == {**before, "file": sha256_file(tmp_path / "file")}


def test_an_empty_folder_is_taken(cnn, tmp_path):
    (tmp_path / "out").mkdir()
    assert {path.name for path in export.run(cnn, tmp_path / "out").iterdir()} == set(export.FILES)


def test_a_run_that_is_not_evaluated_leaves_nothing(cnn, tmp_path):
    (cnn / "test_results.json").unlink()
    with pytest.raises(RecordError, match="not evaluated"):
        export.run(cnn, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


KILLED = """
import os, signal, sys
from mlx_cxr import export
name, at = sys.argv[1], int(sys.argv[2])
write, calls = getattr(export, name), 0
def killing(*arguments):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
setattr(export, name, killing)
export.main(["--run", sys.argv[3], "--to", sys.argv[4], "--overwrite"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), [("write_json", 2), ("write_text", 2)])
def test_a_killed_export_leaves_the_old_one_or_none(cnn, tmp_path, name, at):
    folder = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, name, str(at), str(cnn), str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    before = listing(export.run(cnn, folder))
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert listing(folder) == before
    export.run(cnn, folder, overwrite=True)
    assert set(listing(folder)) == set(export.FILES)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_that_cannot_take_its_place_puts_the_old_one_back(cnn, tmp_path, monkeypatch):
    folder = export.run(cnn, tmp_path / "out")
    before, rename = listing(folder), Path.rename

    def fail_second(path, target):
        if Path(target) == folder and (path / "SHA256SUMS").exists() and path.name != "old" and not fail_second.done:
            fail_second.done = True
            raise OSError(28, "No space left on device")
        return rename(path, target)

    fail_second.done = False
    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="No space"):
        export.run(cnn, folder, overwrite=True)
    assert listing(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "out"}


def test_weights_that_change_while_they_are_exported_are_noticed(cnn, tmp_path, monkeypatch, torch):
    card = model_card

    def retrain(run):
        replace_model(cnn, lively_model(1, 32, seed=9), 32)
        return card(run)

    monkeypatch.setattr("mlx_cxr.publishing.model_card.model_card", retrain)
    with pytest.raises(export.ExportError, match="changed while it was exported"):
        export.run(cnn, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_the_command_says_what_is_wrong_and_ends_with_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["--run", str(tmp_path / "nobody"), "--to", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert re.search(r"error: .*nobody/config\.json is missing", capsys.readouterr().err)
