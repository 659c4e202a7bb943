"""The stage: what it writes, what it takes from a run, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr import benchmark
from mlx_cxr.bench import SECTIONS, contenders, grad_cam, run_all
from mlx_cxr.bench.torch_side import TorchMissingError
from mlx_cxr.core.config import config_from_plain
from mlx_cxr.core.files import RecordError


@pytest.fixture
def config(tmp_path):
    """Small, with outputs in a folder of the test's own."""
    plain = {
        "name": "toy",
        "seed": 3,
        "outputs": str(tmp_path / "outputs"),
        "data": {"root": str(tmp_path), "work_dir": str(tmp_path)},
        "pixels": {"size": 32},
        "teacher": {"batch_size": 2, "training": {"batch_size": 1}, "tiny": {"hidden_size": 64, "layers": 2}},
    }
    return config_from_plain(plain, "test")


@pytest.fixture
def patient(monkeypatch):
    """Nothing is left out, however busy the machine; maps one by one are of two findings."""
    monkeypatch.setattr(contenders, "_too_slow", lambda seconds, budget: "")
    monkeypatch.setattr(grad_cam, "maps_one_by_one", partial(grad_cam.maps_one_by_one, labels=(0, 1)))


def test_images_without_pytorch(config, tmp_path, patient):
    readme = tmp_path / "README.md"
    readme.write_text(
        "above\n<!-- begin benchmark -->\nstale figures\n<!-- end benchmark -->\nbelow\n", encoding="utf-8"
    )
    options = {"only": ("inference", "training", "grad_cam", "data"), "batch_sizes": (8, 1), "minutes": 0.02}
    path = benchmark.run(config, **options, update_readme=readme)
    folder = tmp_path / "outputs" / "benchmark"
    assert path == folder / "benchmark.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["torch"] is None
    assert found["settings"]["batch_sizes"] == [1, 8]
    assert found["settings"]["weights"] == "random"
    assert found["provenance"]["stage"] == "benchmark"
    assert found["before"]["reference_gflops"] > 0
    assert found["peak"]["gflops"]["mlx, float32"] > 0
    sections = {row["section"] for row in found["rows"]}
    assert sections == {"inference", "training", "epoch", "grad_cam", "store", "pipeline"}
    assert not {row["status"] for row in found["rows"]} & {"wrong", "failed"}, found["rows"]
    assert {row["framework"] for row in found["rows"]} == {"mlx", "none"}
    with (folder / "benchmark.csv").open(encoding="utf-8") as lines:
        assert len(list(csv.DictReader(lines))) == len(found["rows"])
    assert (folder / "benchmark.png").stat().st_size > 10_000
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "stale figures" not in text
    assert "| forward, batch 8 |" in text
    assert "14-label Grad-CAM" in (folder / "benchmark.md").read_text(encoding="utf-8")


def test_only_what_is_asked_for(config, tmp_path):
    path = benchmark.run(config, only=("teacher",), tokens=32, teacher_size="tiny", quantize=4)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {row["section"] for row in found["rows"]} == {"teacher"}
    assert found["peak"] is None
    assert found["teacher"]["bits"] == 4
    assert not (tmp_path / "outputs" / "benchmark" / "benchmark.png").exists()


def test_against_pytorch(config, torch, monkeypatch, patient):
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    path = benchmark.run(config, against="torch", only=("inference",), minutes=0.05, batch_sizes=(8,))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["torch"]["version"] == torch.__version__
    assert {row["framework"] for row in found["rows"]} == {"mlx", "torch"}
    forward = {entry["what"]: entry for entry in found["ratios"]}["forward, batch 8"]
    timed = {row["contender"]: row["ms_per_sample"] for row in found["rows"]}
    assert forward["at_most"] == 2.0
    assert forward["ratio"] == pytest.approx(timed[forward["mlx"]] / timed[forward["against"]])
    assert forward["met"] is (forward["ratio"] <= 2.0)


def test_a_run_gives_weights_and_size(config, monkeypatch, tmp_path):
    from types import SimpleNamespace

    model = run_all.random_network(run_all.ResNetConfig(3, 14), 9)
    weights = tmp_path / "best_model.safetensors"
    weights.write_bytes(b"weights")
    opened = []
    trained = SimpleNamespace(model=model, config=config, checkpoint=weights)
    monkeypatch.setattr(run_all.TrainedRun, "open", lambda folder: opened.append(folder) or trained)
    seen = []
    monkeypatch.setattr(
        run_all, "measure_all", lambda network, *rest: seen.append((network, rest[1].size)) or ([], {"teacher": None})
    )
    for name, size in (("some_run", None), (tmp_path, 64)):
        with pytest.raises(benchmark.BenchmarkError, match="nothing was measured"):
            benchmark.run(config, name, size=size)
    assert opened == [config.outputs / "some_run", tmp_path]
    assert seen == [(model, 32), (model, 64)]


def test_random_networks_are_the_seeds():
    x = mx.array(np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32))
    one, same, other = (np.array(run_all.random_network(run_all.ResNetConfig(), seed)(x)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("inference", "trainig")}, "trainig: sections are inference, training"),
        ({"batch_sizes": (0, 8)}, "--batch_sizes 0,8"),
        ({"size": 16}, "--size 16"),
        ({"tokens": 13}, "a position for each of 14"),
    ],
)
def test_options_that_cannot_be(config, options, message):
    with pytest.raises(benchmark.BenchmarkError, match=message):
        benchmark.run(config, **options)


def test_without_pytorch_it_says_how_to_get_it(config, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    with pytest.raises(TorchMissingError, match=r'pip install -e "\.\[bench\]"'):
        benchmark.run(config, against="torch")


def test_a_run_that_is_not_there(config):
    with pytest.raises(RecordError, match="no_such_run"):
        benchmark.run(config, "no_such_run")


def test_the_command_line(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(benchmark, "run", lambda config, **options: seen.append((config, options)))
    benchmark.main([])
    config, options = seen[0]
    assert config is None
    assert options["only"] == SECTIONS
    assert options["teacher_size"] == "tiny"
    mimic = Path(__file__).parents[1] / "configs" / "mimic.yaml"
    monkeypatch.setenv("MIMIC_CXR_JPG", str(tmp_path))
    benchmark.main(["--config", str(mimic), "--teacher_size", "full", "--only", "teacher,data", "--batch_sizes", "1,8"])
    config, options = seen[1]
    assert config.name
    assert (options["teacher_size"], options["only"], options["batch_sizes"]) == ("full", ("teacher", "data"), (1, 8))
    with pytest.raises(SystemExit):
        benchmark.main(["--set", "seed=1"])
    assert "give --config too" in capsys.readouterr().err
