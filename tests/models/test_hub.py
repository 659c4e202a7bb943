"""Fetching base weights: the real hub client against a small hub on this machine, and against no network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save

from mlx_cxr.models import hub
from mlx_cxr.models.resnet import ResNet18, ResNetConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Serves repositories given as {repo: {file: bytes}} over the hub's HTTP interface, as far as it is used here."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.lie_about_checksums = False
        self.large: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                outer.requests.append(f"{self.command} {self.path}")
                status, headers, body = outer.answer(self.path.split("?")[0])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for repo, files in self.repos.items():
            if path.startswith(f"/api/models/{repo}"):
                return self._describe(repo, files, path)
            head = f"/{repo}/resolve/"
            if path.startswith(head):
                _, _, name = path.removeprefix(head).partition("/")
                if name in files:
                    digest = hashlib.sha256(files[name]).hexdigest()
                    etag = "f" * 64 if self.lie_about_checksums else digest
                    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[name]
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _describe(self, repo: str, files: dict[str, bytes], path: str) -> tuple[int, dict[str, str], bytes]:
        if "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        info = {"id": repo, "sha": COMMIT, "siblings": [self._sibling(name) for name in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _sibling(self, name: str) -> dict[str, object]:
        large = {"lfs": {"sha256": self.large[name], "size": 1, "pointerSize": 1}} if name in self.large else {}
        return {"rfilename": name, **large}


@pytest.fixture
def small_hub() -> Iterator[SmallHub]:
    served = SmallHub()
    yield served
    served.server.shutdown()


def resnet_bytes(num_classes: int = 1000, channels: int = 3) -> bytes:
    model = ResNet18(ResNetConfig(in_channels=channels, num_classes=num_classes))
    arrays = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    arrays = {n: np.ascontiguousarray(np.moveaxis(a, 3, 1)) if a.ndim == 4 else a for n, a in arrays.items()}
    return save(arrays, metadata={"format": "pt"})


def language_model_files() -> dict[str, bytes]:
    """The files of an LFM2-VL folder, with two tiny shards for weights."""
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return {
        "config.json": json.dumps({"model_type": "lfm2_vl"}).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "processor_config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-1.safetensors": save({"a": np.zeros(4, np.float32)}),
        "model-2.safetensors": save({"b": np.zeros(4, np.float32)}),
        "onnx/model.onnx": b"not wanted",
    }


def fetch(endpoint: str, weights: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The stage in its own process, because the hub's client reads its environment when it is imported."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    environment = {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(weights.parent / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    command = [sys.executable, "-m", "mlx_cxr.fetch_weights", "--weights_dir", str(weights), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_imagenet_is_fetched_checked_and_recorded(small_hub, tmp_path):
    data = resnet_bytes()
    small_hub.repos["timm/resnet18.tv_in1k"] = {"model.safetensors": data}
    weights = tmp_path / "weights"
    done = fetch(small_hub.url, weights)
    assert done.returncode == 0, done.stderr
    assert (weights / "resnet18.tv_in1k.safetensors").read_bytes() == data
    record = json.loads((weights / "resnet18.tv_in1k.json").read_text())
    sha256 = hashlib.sha256(data).hexdigest()
    assert record["files"] == {"resnet18.tv_in1k.safetensors": {"sha256": sha256, "bytes": len(data)}}
    assert record["revision"] == COMMIT
    assert record["licence"] == "BSD-3-Clause"
    assert record["source"] == "https://huggingface.co/timm/resnet18.tv_in1k"
    assert record["pinned"] is False
    assert sha256 in done.stderr
    assert sorted(p.name for p in weights.iterdir()) == [
        "resnet18.tv_in1k.json",
        "resnet18.tv_in1k.safetensors",
    ]
    before = len(small_hub.requests)
    assert fetch(small_hub.url, weights).returncode == 0
    assert len(small_hub.requests) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: resnet_bytes(num_classes=10), "10 classes"),
        (lambda: resnet_bytes()[:-1000], "damaged"),
        (lambda: save({"w": np.zeros(3, np.float32)}), "missing (102)"),
    ],
    ids=["another head", "cut short", "another model"],
)
def test_wrong_content_is_refused_and_not_kept(small_hub, tmp_path, content, words):
    small_hub.repos["timm/resnet18.tv_in1k"] = {"model.safetensors": content()}
    weights = tmp_path / "weights"
    done = fetch(small_hub.url, weights)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(weights.iterdir()) == []


def test_checksum_of_the_hub_is_compared(small_hub, tmp_path):
    small_hub.repos["timm/resnet18.tv_in1k"] = {"model.safetensors": resnet_bytes()}
    small_hub.lie_about_checksums = True
    done = fetch(small_hub.url, tmp_path / "weights")
    assert done.returncode == 2
    assert "the hub says ffff" in done.stderr


@pytest.mark.parametrize("what", ["resnet18", "lfm"])
def test_unreachable_hub_is_one_clear_message(tmp_path, what):
    done = fetch("http://127.0.0.1:9", tmp_path / "weights", "--what", what)
    assert done.returncode == 2
    assert "could not be fetched" in done.stderr
    assert f"--what {what}" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_setting_is_respected(small_hub, tmp_path):
    small_hub.repos["timm/resnet18.tv_in1k"] = {"model.safetensors": resnet_bytes()}
    done = fetch(small_hub.url, tmp_path / "weights", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert small_hub.requests == []


def test_repository_that_is_gone(small_hub, tmp_path):
    done = fetch(small_hub.url, tmp_path / "weights")
    assert done.returncode == 2
    assert "timm/resnet18.tv_in1k could not be fetched" in done.stderr


def test_language_model_folder_is_fetched(small_hub, tmp_path):
    small_hub.repos["LiquidAI/LFM2.5-VL-1.6B"] = language_model_files()
    weights = tmp_path / "weights"
    done = fetch(small_hub.url, weights, "--what", "lfm")
    assert done.returncode == 0, done.stderr
    record = json.loads((weights / "LFM2.5-VL-1.6B.json").read_text())
    wanted = {name for name in language_model_files() if not name.startswith("onnx")}
    assert set(record["files"]) == wanted
    assert record["revision"] == COMMIT
    assert not (weights / "LFM2.5-VL-1.6B" / "onnx").exists()
    assert fetch("http://127.0.0.1:9", weights, "--what", "lfm").returncode == 0
    (weights / "LFM2.5-VL-1.6B" / "model-2.safetensors").write_bytes(save({"b": np.ones(4, np.float32)}))
    changed = fetch("http://127.0.0.1:9", weights, "--what", "lfm")
    assert changed.returncode == 2
    assert "model-2.safetensors has SHA-256" in changed.stderr


def test_losing_the_network_does_not_lose_the_record(tmp_path):
    """A complete folder stays complete when a fetch again cannot reach the hub."""
    source = write_folder(tmp_path / "copy", language_model_files())
    hub.fetch_folder(hub.LFM, tmp_path / "w", hub.check_language_model, source)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with pytest.raises(hub.WeightsUnavailableError):
            hub.fetch_folder(hub.LFM, tmp_path / "w", hub.check_language_model)
    finally:
        del os.environ["HF_HUB_OFFLINE"]
    assert hub.check_record(hub.LFM, tmp_path / "w")["source"] == "local folder"


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_from_file(tmp_path):
    local = tmp_path / "mine.safetensors"
    local.write_bytes(resnet_bytes())
    done = fetch("http://127.0.0.1:9", tmp_path / "w", "--from_file", str(local))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "w" / "resnet18.tv_in1k.json").read_text())["source"] == "local file"
    for options, words in (
        (("--what", "all", "--from_file", str(local)), "--from_file gives one thing"),
        (("--from_file", str(tmp_path / "absent")), "no such file or folder"),
    ):
        failed = fetch("http://127.0.0.1:9", tmp_path / "w2", *options)
        assert failed.returncode == 2
        assert words in failed.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "model_type is 'llama'"),
        ({"config.json": b"[]"}, "config.json"),
        ({"config.json": None}, "config.json is missing"),
        ({"tokenizer.json": None}, "tokenizer.json is missing"),
        ({"processor_config.json": None}, "preprocessor_config.json"),
        ({"model-2.safetensors": None}, "model-2.safetensors"),
        ({"model-2.safetensors": save({"b": np.zeros(4, np.float32)})[:-4]}, "its header says"),
        ({"model-2.safetensors": b"\xff" * 40}, "no safetensors header"),
        ({"model-2.safetensors": save({"c": np.zeros(4, np.float32)})}, "such as b"),
        ({"model.safetensors.index.json": b"{}"}, "weight_map"),
    ],
)
def test_each_fault_of_a_language_model_folder_is_named(tmp_path, change, words):
    files = {name: data for name, data in (language_model_files() | change).items() if data is not None}
    folder = write_folder(tmp_path / "lfm", files)
    with pytest.raises(hub.WeightsCorruptError) as error:
        hub.check_language_model(folder)
    assert words in str(error.value)
    assert "fetch_weights --what lfm" in str(error.value)


def test_record_that_is_no_record(tmp_path):
    hub.IMAGENET.path(tmp_path).write_bytes(b"x")
    hub.IMAGENET.record_path(tmp_path).write_text('{"files": []}')
    with pytest.raises(hub.WeightsCorruptError, match="not a record"):
        hub.check_record(hub.IMAGENET, tmp_path)


def test_weights_placed_by_hand_are_described(tmp_path):
    hub.IMAGENET.path(tmp_path).write_bytes(b"x")
    record = hub.check_record(hub.IMAGENET, tmp_path)
    assert record["source"] == "placed by hand"
    assert record["files"]["resnet18.tv_in1k.safetensors"]["sha256"] == hashlib.sha256(b"x").hexdigest()


def base_folder(weights: Path, files: dict[str, bytes] | None = None) -> Path:
    """A base that was fetched from a folder, with its record."""
    source = write_folder(weights.parent / "copy", files or language_model_files())
    hub.fetch_folder(hub.LFM, weights, hub.check_language_model, source)
    return hub.LFM.path(weights)


@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_a_base_that_changed_since_it_was_fetched_is_refused_when_it_is_opened(tmp_path, name):
    folder = base_folder(tmp_path / "w")
    hub.check_base(folder)
    data = (folder / name).read_bytes()
    # As long as before, and as whole to the eye.
    (folder / name).write_bytes(data.replace(b"\0\0\0\0", b"\0\0\0\1", 1) if b"\0" in data else data + b" ")
    with pytest.raises(hub.WeightsCorruptError, match=rf"{name} has SHA-256 .*fetch_weights --what lfm"):
        hub.check_base(folder)


def test_a_base_whose_record_lacks_a_file_or_is_none_is_refused(tmp_path):
    folder = base_folder(tmp_path / "w")
    path = hub.LFM.record_path(tmp_path / "w")
    record = json.loads(path.read_text())
    del record["files"]["model-1.safetensors"]
    path.write_text(json.dumps(record))
    with pytest.raises(hub.WeightsCorruptError, match=r"model-1\.safetensors is not in .*LFM2\.5-VL-1\.6B\.json"):
        hub.check_base(folder)
    path.write_text("[]")
    with pytest.raises(hub.WeightsCorruptError, match="is not a record of whole weights"):
        hub.check_base(folder)
    path.unlink()
    hub.check_base(folder)


def test_companions_of_macos_are_not_taken_for_weights(tmp_path):
    folder = base_folder(tmp_path / "w")
    before = [path.name for path in hub.base_files(folder)]
    for name in ("._model-1.safetensors", "._model-2.safetensors", "._config.json", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5\26\7" + bytes(60))
    hub.check_base(folder)
    assert [path.name for path in hub.base_files(folder)] == before
    hub.fetch_folder(hub.LFM, tmp_path / "again", hub.check_language_model, folder)
    assert not [name for name in hub.check_record(hub.LFM, tmp_path / "again")["files"] if name.startswith(".")]
    hub.LFM.record_path(tmp_path / "w").unlink()
    assert sorted(hub.check_record(hub.LFM, tmp_path / "w")["files"]) == ["model-1.safetensors", "model-2.safetensors"]


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        hub, "sha256_file", lambda path: calls.append(path) or hashlib.sha256(path.read_bytes()).hexdigest()
    )
    path = tmp_path / "w"
    path.write_bytes(b"one")
    assert hub.file_sha256(path) == hub.file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert hub.file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    path.write_bytes(b"six")
    os.utime(path, ns=(0, 0))
    assert hub.file_sha256(path) == hashlib.sha256(b"six").hexdigest()


def test_a_folder_that_differs_from_the_hubs_checksums_is_not_recorded(small_hub, tmp_path):
    small_hub.repos["LiquidAI/LFM2.5-VL-1.6B"] = language_model_files()
    small_hub.large = {"model-2.safetensors": "f" * 64}
    done = fetch(small_hub.url, tmp_path / "weights", "--what", "lfm")
    assert done.returncode == 2, done.stderr
    assert "model-2.safetensors has SHA-256" in done.stderr
    assert "recorded was ffffffffffff" in done.stderr
    assert not (tmp_path / "weights" / "LFM2.5-VL-1.6B.json").exists()
    files = language_model_files()
    small_hub.large = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if "safe" in name}
    done = fetch(small_hub.url, tmp_path / "weights", "--what", "lfm")
    assert done.returncode == 0, done.stderr


def test_a_base_with_lost_blocks_is_not_fetched_from_a_copy(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(64, 64)).astype(np.float32), "b": rng.normal(size=(64, 64)).astype(np.float32)}
    files = language_model_files() | {
        f"model-{i + 1}.safetensors": save({n: a}) for i, (n, a) in enumerate(weights.items())
    }
    whole = write_folder(tmp_path / "whole", files)
    assert fetch("http://127.0.0.1:9", tmp_path / "w", "--what", "lfm", "--from_file", str(whole)).returncode == 0
    data = files["model-2.safetensors"]
    broken = write_folder(tmp_path / "broken", files | {"model-2.safetensors": data[:-4096] + bytes(4096)})
    done = fetch("http://127.0.0.1:9", tmp_path / "w2", "--what", "lfm", "--from_file", str(broken))
    assert done.returncode == 2
    assert "model-2.safetensors: b has nothing but zeros in 16 of 64 rows" in done.stderr
