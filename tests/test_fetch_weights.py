"""The command that fetches weights ahead; `models/test_hub.py` holds the fetching itself against a small hub."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_training import arrays

from mlx_cxr import fetch_weights
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_json
from mlx_cxr.models import hub
from mlx_cxr.models.resnet import ResNet18, ResNetConfig


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A safetensors file with torchvision's names, layout and shapes, and random numbers."""
    model = ResNet18(ResNetConfig(in_channels=3, num_classes=1000))
    weights = {name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for name, value in arrays(model).items()}
    path = tmp_path_factory.mktemp("source") / "downloaded.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path)
    return path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network by decision, and an empty hub cache."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        fetch_weights.main(list(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    return error[error.index("error: ") :]


def test_a_file_from_this_machine_is_checked_copied_and_recorded(resnet, tmp_path, offline, caplog):
    caplog.set_level(logging.INFO, logger="mlx_cxr")
    weights = tmp_path / "weights"
    record = fetch_weights.run(weights, from_file=resnet)["resnet18"]
    copy = weights / "resnet18.tv_in1k.safetensors"
    assert copy.read_bytes() == resnet.read_bytes()
    sha256 = hashlib.sha256(resnet.read_bytes()).hexdigest()
    assert record["files"] == {copy.name: {"sha256": sha256, "bytes": resnet.stat().st_size}}
    assert read_json(weights / "resnet18.tv_in1k.json") == record
    assert (record["source"], record["licence"]) == ("local file", "BSD-3-Clause")
    assert sha256 in caplog.text
    assert "BSD-3-Clause" in caplog.text
    # Asked again, offline, what is there is checked and kept.
    assert fetch_weights.run(weights)["resnet18"] == record


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-100], "cut short"),
        (lambda data: data[:3], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: b"PK\x03\x04" + data, "pickle"),
        (lambda data: b"<html>not found</html>" * 50, "not safetensors"),
    ],
    ids=["cut", "three bytes", "empty", "pickle", "a web page"],
)
def test_a_damaged_file_is_refused_by_name_and_nothing_is_kept(resnet, tmp_path, capsys, damage, words):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damage(resnet.read_bytes()))
    message = failure(capsys, "--weights_dir", str(tmp_path / "weights"), "--from_file", str(bad))
    assert str(bad) in message
    assert words in message
    assert len(message.splitlines()) == 1
    assert not [path for path in (tmp_path / "weights").rglob("*") if path.is_file()]


def test_another_network_is_refused_and_its_parameters_named(resnet, tmp_path, capsys):
    weights = load_file(resnet)
    weights["layer3.0.conv1.weight"] = weights["layer3.0.conv1.weight"][:, :5]
    del weights["bn1.bias"]
    save_file(weights, tmp_path / "other.safetensors")
    message = failure(capsys, "--weights_dir", str(tmp_path / "w"), "--from_file", str(tmp_path / "other.safetensors"))
    for word in ("other.safetensors", "layer3.0.conv1.weight", "bn1.bias", "missing", "of another shape"):
        assert word in message


def test_a_refused_file_leaves_the_good_one(resnet, tmp_path, capsys):
    fetch_weights.run(tmp_path, from_file=resnet)
    (tmp_path / "bad").write_bytes(b"x")
    failure(capsys, "--weights_dir", str(tmp_path), "--from_file", str(tmp_path / "bad"))
    assert (tmp_path / "resnet18.tv_in1k.safetensors").read_bytes() == resnet.read_bytes()
    assert fetch_weights.run(tmp_path)["resnet18"]["source"] == "local file"


def test_weights_changed_since_they_were_fetched_are_found(resnet, tmp_path, capsys):
    fetch_weights.run(tmp_path, from_file=resnet)
    path = tmp_path / "resnet18.tv_in1k.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    message = failure(capsys, "--weights_dir", str(tmp_path))
    assert f"{path} has SHA-256" in message
    assert "fetch it again" in message


def test_offline_says_what_to_do(tmp_path, capsys, offline):
    for what, repo in (("resnet18", "timm/resnet18.tv_in1k"), ("lfm", "LiquidAI/LFM2.5-VL-1.6B")):
        message = failure(capsys, "--weights_dir", str(tmp_path / "w"), "--what", what)
        for word in (repo, "HF_HUB_OFFLINE is set", f"fetch_weights --what {what}", "--from_file"):
            assert word in message
        assert len(message.splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path, capsys):
    message = failure(capsys, "--weights_dir", str(tmp_path), "--from_file", str(tmp_path / "absent"))
    assert f"{tmp_path / 'absent'}: no such file or folder" in message


def test_options_that_do_not_go_together(tmp_path, resnet, capsys):
    message = failure(capsys, "--weights_dir", str(tmp_path), "--what", "all", "--from_file", str(resnet))
    assert "say which with --what" in message
    with pytest.raises(UserError, match="--what lmf: resnet18, lfm or all"):
        fetch_weights.run(tmp_path, "lmf")


def test_the_command_itself_prints_one_line_and_ends_with_2(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    line = [sys.executable, "-m", "mlx_cxr.fetch_weights", "--weights_dir", str(tmp_path / "w")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: timm/resnet18.tv_in1k could not be fetched")
    assert hub.IMAGENET.path(tmp_path / "w").exists() is False
