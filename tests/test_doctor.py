"""What the doctor finds on a machine that lacks things, and that it says what to do about each."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_training import arrays

from mlx_cxr import doctor
from mlx_cxr.core.config import load_config
from mlx_cxr.core.files import write_record
from mlx_cxr.data.pixel_store import SHARDED_SCHEMA
from mlx_cxr.models import hub
from mlx_cxr.models.resnet import ResNet18, ResNetConfig

CONFIG = "name: trial\noutputs: {0}/outputs\nweights_dir: {0}/weights\ndata:\n  root: {0}/raw\n  work_dir: {0}/made\n"


@pytest.fixture
def config_path(tmp_path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG.format(tmp_path))
    return path


@pytest.fixture
def quick(monkeypatch):
    """The measurements of speed, which have tests of their own, take no time."""
    monkeypatch.setattr(doctor.device, "measure_gflops", lambda: 123.0)
    monkeypatch.setattr(doctor, "_forward_ms", lambda: 4.5)


def finding(findings: list[doctor.Finding], name: str) -> doctor.Finding:
    (found,) = [f for f in findings if f.name == name]
    return found


def stand_in_resnet(path: Path) -> Path:
    """A file with torchvision's names and shapes, 3 channels and 1000 classes."""
    model = ResNet18(ResNetConfig(in_channels=3, num_classes=1000))
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {n: a.transpose(0, 3, 1, 2) if a.ndim == 4 else a for n, a in arrays(model).items()}
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path)
    return path


def test_the_command_on_a_bare_machine(config_path, tmp_path):
    """The real command: JSON that parses, real measurements, status 0 as nothing is broken, a remedy for each lack."""
    line = [sys.executable, "-m", "mlx_cxr.doctor", "--config", str(config_path), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["healthy"] is True
    assert report["config"] == str(config_path)
    findings = [doctor.Finding(**entry) for entry in report["findings"]]
    assert {f.area for f in findings} == {"machine", "software", "weights", "data"}
    missing = {f.name: f.remedy for f in findings if f.mark == "missing"}
    assert {"ImageNet", "LFM base", "metadata table", "films", "manifest", "pixel store", "trained CNN"} <= set(missing)
    assert "fetch_weights --what resnet18" in missing["ImageNet"]
    assert "fetch_weights --what lfm" in missing["LFM base"]
    assert "physionet.org" in missing["metadata table"]
    for name, stage in (
        ("manifest", "build_manifest"),
        ("pixel store", "prepare_images"),
        ("trained CNN", "train_cnn"),
    ):
        assert missing[name] == f"python -m mlx_cxr.{stage} --config {config_path}"
    gflops = float(finding(findings, "speed").detail.split()[0])
    assert 0.1 < gflops < 1e6
    assert all(f.remedy for f in findings if f.mark in ("missing", "broken", "slow"))


def test_versions_are_those_installed(quick):
    packages = finding(doctor.check_software(), "packages")
    assert f"numpy {np.__version__}" in packages.detail
    assert f"mlx {importlib.metadata.version('mlx')}" in packages.detail
    assert finding(doctor.check_software(), "Python").detail == sys.version.split()[0]


def test_a_missing_or_old_package_is_broken(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["numpy>=99", "no-such-package", 'x; extra == "test"']
    )
    broken = [f for f in doctor.check_software() if f.mark == "broken"]
    assert len(broken) == 1
    assert f"numpy: {np.__version__}, needs >=99" in broken[0].detail
    assert "no-such-package: not installed" in broken[0].detail
    assert "pip install" in broken[0].remedy


def test_a_package_run_without_installation_is_broken_not_a_crash(monkeypatch):
    def unknown(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", unknown)
    broken = [f for f in doctor.check_software() if f.mark == "broken"]
    assert [f.detail for f in broken] == ["mlx-cxr: not installed"]


@pytest.mark.parametrize(
    ("kind", "gflops", "blas", "mark", "words"),
    [
        ("cpu", 220.0, "OpenBLAS (libopenblas.so.0)", "ok", ""),
        ("cpu", 7.0, "reference BLAS (slow)", "slow", "libopenblas0"),
        ("cpu", 20.0, "OpenBLAS (libopenblas.so.0)", "slow", "other programs"),
        ("metal", 2900.0, None, "ok", ""),
    ],
)
def test_speed(kind, gflops, blas, mark, words):
    found = doctor.judge_speed(kind, gflops, blas)
    assert found.mark == mark
    assert f"{gflops:.0f} GFLOP/s" in found.detail
    assert words in found.remedy
    assert bool(found.remedy) == bool(words)


def test_little_memory_and_disk_are_noted(quick, monkeypatch, tmp_path):
    device = {"kind": "cpu", "name": "x", "cores": 2, "memory_bytes": 4e9, "blas": "OpenBLAS"}
    usage = doctor.shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    findings = doctor.check_machine(device)
    assert "training.batch_size" in finding(findings, "memory").remedy
    assert "3.0 GB free" in finding(findings, "disk").detail
    assert "data.work_dir" in finding(findings, "disk").remedy


def test_a_broken_configuration_ends_with_status_1(quick, config_path, capsys):
    config_path.write_text(config_path.read_text() + "traning: {}\n")
    with pytest.raises(SystemExit) as end:
        doctor.main(["--config", str(config_path)])
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "did you mean 'training'?" in shown
    assert "something is broken" in shown


def test_without_a_configuration(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    doctor.main([])
    shown = capsys.readouterr().out
    assert "none given" in shown
    assert "pass --config" in shown
    assert "nothing is broken" in shown


def test_weights_that_are_there_changed_or_not_the_ones(tmp_path):
    path = stand_in_resnet(hub.IMAGENET.path(tmp_path))
    assert finding(doctor.check_weights(tmp_path, None), "ImageNet").mark == "ok"
    assert "placed by hand" in finding(doctor.check_weights(tmp_path, None), "ImageNet").detail
    hub.fetch_file(hub.IMAGENET, tmp_path, lambda _: None, path)
    path.write_bytes(path.read_bytes()[:-8])
    broken = finding(doctor.check_weights(tmp_path, None), "ImageNet")
    assert broken.mark == "broken"
    assert str(path) in broken.detail
    assert "fetch_weights" in broken.remedy
    (tmp_path / "LFM2.5-VL-1.6B").mkdir()
    assert finding(doctor.check_weights(tmp_path, None), "LFM base").mark == "broken"


def test_the_weights_that_a_configuration_names(config_path, tmp_path):
    config = load_config(config_path, [f"model.weights={tmp_path / 'mine.safetensors'}"])
    assert finding(doctor.check_weights(tmp_path, config), "model.weights").mark == "missing"
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    assert finding(doctor.check_weights(tmp_path, config), "model.weights").mark == "ok"


def test_data_that_are_there_are_found(config_path, tmp_path):
    raw = tmp_path / "raw"
    (raw / "files").mkdir(parents=True)
    for table in ("metadata", "split", "chexpert"):
        (raw / f"mimic-cxr-2.0.0-{table}.csv.gz").write_bytes(b"")
    config = load_config(config_path, [f"data.reports={tmp_path / 'reports.zip'}"])
    write_record(config.manifest_path, {})
    findings = doctor.check_data(config, config_path)
    for name in ("metadata table", "split table", "chexpert table", "films", "manifest"):
        assert finding(findings, name).mark == "ok", name
    assert finding(findings, "reports").mark == "missing"
    synthetic = load_config(config_path, ["data.synthetic=true", f"data.root={tmp_path / 'none'}"])
    assert "make_demo_data" in finding(doctor.check_data(synthetic, config_path), "films").remedy


def test_a_table_of_images(config_path, tmp_path):
    overrides = ["data.source=csv", f"data.csv={{table: {tmp_path / 't.csv'}}}"]
    findings = doctor.check_data(load_config(config_path, overrides), config_path)
    assert finding(findings, "table").mark == "missing"
    assert finding(findings, "table").remedy == "put it there, or correct data.csv.table"


def test_each_remedy_is_said_once_and_lines_are_not_too_long(quick, config_path):
    report = doctor.run(config_path)
    text = doctor.render(report)
    after = text[text.index("what to do") :]
    remedies = {f["remedy"] for f in report["findings"] if f["remedy"]}
    for remedy in remedies:
        assert after.count(remedy) == 1
    assert max(len(line) for line in text[: text.index("what to do")].splitlines()) <= doctor.TEXT_WIDTH + 60
    for entry in report["findings"]:
        assert entry["name"] in text


def test_a_pixel_store_in_shards_is_whole_or_missing(tmp_path):
    """Of its files the one that is not there is named."""
    path = tmp_path / "c.yaml"
    path.write_text(f"name: t\ndata: {{root: {tmp_path}, work_dir: {tmp_path}}}\n")
    config, names = load_config(path), ["images_224-1-of-2.npy", "images_224-2-of-2.npy"]
    index = dict.fromkeys(("manifest", "transform", "films", "unreadable", "notes", "image_ids"), "")
    shards = [{"file": name, "films": 1, "pixels": ""} for name in names]
    whole = {"schema": SHARDED_SCHEMA, **index, "shape": [2, 224, 224], "shards": shards}
    write_record(config.pixels_path.with_suffix(".json"), whole)
    (tmp_path / names[0]).touch()
    store = finding(doctor.check_data(config, path), "pixel store")
    assert (store.mark, store.detail) == ("missing", str(tmp_path / names[1]))
    assert store.remedy == f"python -m mlx_cxr.prepare_images --config {path}"
    (tmp_path / names[1]).touch()
    assert finding(doctor.check_data(config, path), "pixel store").mark == "ok"


def test_a_small_base_whose_making_was_stopped_is_made_again(config_path, tmp_path):
    folder = tmp_path / "tiny"
    config = load_config(config_path, [f"teacher.base={folder}"])
    found = finding(doctor.check_weights(tmp_path, config), "teacher.base")
    assert (found.mark, "make_tiny_teacher" in found.remedy) == ("missing", True)
    folder.mkdir()
    write_record(folder / "made_by_mlx_cxr.json", {"stage": "make_tiny_teacher"})
    found = finding(doctor.check_weights(tmp_path, config), "teacher.base")
    assert found.mark == "broken"
    assert "make_tiny_teacher" in found.remedy
    assert "fetch" not in found.remedy + found.detail
