"""Base weights that others publish: their sources and licences, and fetching them to `weights/`.

A fetched file or folder stands beside a JSON record of its source, revision, licence, sizes and SHA-256, written
last: weights without one were put there by hand, or not fetched to their end. `HF_HUB_OFFLINE` is respected.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, atomic_path, read_json, read_record, sha256_file, write_json
from mlx_cxr.core.safetensors import SafetensorsError, read_header, safetensors_files

log = logging.getLogger("mlx_cxr")

MADE_HERE = "made_by_mlx_cxr.json"
"""The record in the folder of a base that `make_tiny_teacher` makes: written first, and whole at the end."""

_TIMEOUT_SECONDS = 10


class WeightsUnavailableError(UserError, FileNotFoundError):
    """Weights are neither on this machine nor to be had from it now; the message says what to do."""


class WeightsCorruptError(UserError, ValueError):
    """Weights are here but are not what was fetched or asked for; the message names each fault."""


@dataclass(frozen=True)
class Source:
    """Something published on the Hugging Face hub.

    Attributes:
        name: file or folder under the weights folder; the record is `<name without .safetensors>.json`.
        repo: repository on the hub.
        file: the one file wanted; None takes the whole repository.
        licence: its licence, as its card states it.
        what: one phrase for people.
    """

    name: str
    repo: str
    file: str | None
    licence: str
    what: str

    def path(self, weights_dir: str | Path) -> Path:
        """The file or folder that holds it once fetched."""
        return Path(weights_dir) / self.name

    def record_path(self, weights_dir: str | Path) -> Path:
        """Its record."""
        return Path(weights_dir) / f"{self.name.removesuffix('.safetensors')}.json"

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"python -m mlx_cxr.fetch_weights --what {'lfm' if self.file is None else 'resnet18'}"


IMAGENET = Source(
    name="resnet18.tv_in1k.safetensors",
    repo="timm/resnet18.tv_in1k",
    file="model.safetensors",
    licence="BSD-3-Clause",
    what="ResNet-18 trained on ImageNet-1k (torchvision's weights), 47 MB",
)
LFM = Source(
    name="LFM2.5-VL-1.6B",
    repo="LiquidAI/LFM2.5-VL-1.6B",
    file=None,
    licence="LFM Open License v1.0",
    what="LFM2.5-VL-1.6B, the teacher's base, 3.2 GB",
)


def fetch_file(
    source: Source, weights_dir: str | Path, verify: Callable[[Path], None], local: Path | None = None
) -> dict[str, Any]:
    """Bring a source of one file under `weights_dir`, once `verify` accepts it, and record it.

    Args:
        weights_dir: made when missing.
        verify: raises ValueError on a file that is not what was wanted; nothing is then kept.
        local: a copy on this machine to take instead of the hub's.

    Returns:
        The record, as written.

    Raises:
        WeightsUnavailableError: the hub cannot be reached, or `local` does not exist.
        WeightsCorruptError: the bytes differ from the hub's checksum.
        ValueError: `verify` refused the file.
        OSError: the folder cannot be written or the disk is full.
    """
    if source.file is None:
        raise ValueError(f"{source.name} is a folder; use fetch_folder")
    target = source.path(weights_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        if local is not None:
            found, origin = _existing(local), {"source": "local file", "revision": None}
        else:
            found, origin = _download_file(source, Path(scratch))
        verify(found)
        with atomic_path(target) as temporary:
            shutil.copyfile(found, temporary)
    return _record(source, weights_dir, origin, {target.name: target})


def fetch_folder(
    source: Source, weights_dir: str | Path, verify: Callable[[Path], None], local: Path | None = None
) -> dict[str, Any]:
    """As `fetch_file`, of a source of many files; an interrupted download is resumed.

    A folder that `verify` refuses stays, without a record.
    """
    target, record_path = source.path(weights_dir), source.record_path(weights_dir)
    if local is not None:
        verify(_existing(local))
        record_path.unlink(missing_ok=True)
        if local.resolve() != target.resolve():
            shutil.copytree(local, target, dirs_exist_ok=True)
        origin = {"source": "local folder", "revision": None}
    else:
        from huggingface_hub import HfApi, snapshot_download

        wanted = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model", "LICENSE*", "README.md"]
        with _hub(source):
            about = HfApi().model_info(source.repo, timeout=_TIMEOUT_SECONDS, files_metadata=True)
            revision = about.sha
            record_path.unlink(missing_ok=True)
            log.info("fetching %s from %s", source.what, source.repo)
            snapshot_download(source.repo, revision=revision, local_dir=target, allow_patterns=wanted)
        # The client compares sizes only. The hub has the SHA-256 of large files, which are what matters.
        published = {one.rfilename: one.lfs.sha256 for one in about.siblings or () if one.lfs}
        arrived = {name: sha256 for name, sha256 in published.items() if (target / name).is_file()}
        if faults := _differences(target, arrived):
            raise WeightsCorruptError("; ".join(faults) + "; delete what is named and fetch it again")
        origin = {"source": f"https://huggingface.co/{source.repo}", "revision": revision}
    verify(target)
    files = {
        path.relative_to(target).as_posix(): path
        for path in sorted(target.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(target).parts)
    }
    return _record(source, weights_dir, origin, files)


def check_record(source: Source, weights_dir: str | Path) -> dict[str, Any]:
    """The record of a fetched source, after comparing the files' SHA-256 with it.

    Returns:
        The record; for weights put there by hand, without one, the same keys but no date, with source `placed
        by hand` and the hashes of the weight files as they are now.

    Raises:
        WeightsCorruptError: a file is gone or differs from its record; names each.
    """
    path, record_path = source.path(weights_dir), source.record_path(weights_dir)
    root = path.parent if source.file else path
    if not record_path.exists():
        files = [path] if source.file else safetensors_files(path)
        origin = {"source": "placed by hand", "revision": None}
        return _described(source, origin, {file.name: file for file in files})
    record, way = read_json(record_path), f"fetch it again with `{source.command}`"
    if faults := _differences(root, _recorded(record_path, record, way)):
        raise WeightsCorruptError("; ".join(faults) + f"; {way}")
    return record


def check_base(folder: Path) -> None:
    """As `check_language_model`; and compare a base with the hashes that were recorded when it was fetched or made.

    The files are hashed once in a process (`file_sha256`). A base without a record was put there by hand.

    Raises:
        WeightsCorruptError: a file missing, cut short, of another model or changed; names each, and the way out.
    """
    check_language_model(folder)
    path = folder / MADE_HERE
    if path.exists():
        record = read_record(path)
    elif folder.name == LFM.name and (path := LFM.record_path(folder.parent)).exists():
        record = read_json(path)
    else:
        return
    expected = _recorded(path, record, way_to(folder))
    unknown = [file.name for file in base_files(folder) if file.name not in expected]
    faults = [f"{folder / name} is not in {path}" for name in unknown] + _differences(folder, expected)
    if faults:
        raise WeightsCorruptError("; ".join(faults) + f"; {way_to(folder)}")


def base_files(folder: Path) -> list[Path]:
    """The files that decide a base's answers: its weights, configuration and tokenizer."""
    return [*safetensors_files(folder), folder / "config.json", folder / "tokenizer.json"]


def way_to(folder: Path) -> str:
    """The advice for a base that is incomplete or damaged, by how it came to be there."""
    if (folder / MADE_HERE).exists():
        return (
            "make it again: python -m mlx_cxr.make_tiny_teacher --config … (its making was stopped, or it was changed)"
        )
    return f"fetch it again with `{LFM.command}`, or put a whole copy of it there"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, computed once in a process as long as its size and times stay the same."""
    stat = path.stat()
    return _hashed(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@cache
def _hashed(path: Path, *_state: int) -> str:
    return sha256_file(path)


def _recorded(path: Path, record: dict[str, Any], way: str) -> dict[str, str]:
    """File name to SHA-256 of a record of weights."""
    try:
        return {str(name): str(entry["sha256"]) for name, entry in record["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise WeightsCorruptError(f"{path} is not a record of whole weights; {way}") from None


def _differences(root: Path, expected: dict[str, str]) -> list[str]:
    faults = []
    for name, sha256 in expected.items():
        if not (root / name).is_file():
            faults.append(f"{root / name} is missing")
        elif (now := file_sha256(root / name)) != sha256:
            faults.append(f"{root / name} has SHA-256 {now[:12]}…, recorded was {sha256[:12]}…")
    return faults


def check_language_model(folder: Path) -> None:
    """Check that an LFM2-VL folder is complete, from its JSON files and the headers of its weights.

    Raises:
        WeightsCorruptError: a file missing, cut short or of another model; names each fault.
    """
    faults = []
    try:
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in ("lfm2_vl", "lfm2-vl"):
            faults.append(f"config.json: model_type is {kind!r}, not 'lfm2_vl'")
    except (RecordError, AttributeError) as error:
        faults.append(f"config.json: {error}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        faults.append("preprocessor_config.json (or processor_config.json) is missing")
    faults += _weight_faults(folder)
    if faults:
        raise WeightsCorruptError(f"{folder}: " + "; ".join(faults) + f"; {way_to(folder)}")


def _weight_faults(folder: Path) -> list[str]:
    faults, present = [], set()
    index = folder / "model.safetensors.index.json"
    expected: dict[str, str] = {}
    if index.exists():
        try:
            expected = read_json(index)["weight_map"]
        except (RecordError, KeyError, TypeError) as error:
            faults.append(f"{index.name}: {error}")
    shards = sorted({*expected.values(), *(path.name for path in safetensors_files(folder))})
    if not shards:
        faults.append("no .safetensors file")
    for shard in shards:
        try:
            present |= read_header(folder / shard)[0].keys()
        except FileNotFoundError:
            faults.append(f"{shard} is missing")
        except SafetensorsError as error:
            faults.append(str(error))
    if not faults and (absent := sorted(set(expected) - present)):
        faults.append(f"{len(absent)} tensors of the index are in no file, such as {absent[0]}")
    return faults


def _download_file(source: Source, scratch: Path) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(source.repo, source.file)
    if isinstance(cached, str):
        return Path(cached), {"source": f"{source.repo} (from the local hub cache)", "revision": None}
    with _hub(source):
        # One request without retries first: a machine without network then knows in moments.
        remote = get_hf_file_metadata(hf_hub_url(source.repo, source.file), timeout=_TIMEOUT_SECONDS)
        log.info("fetching %s from %s", source.what, source.repo)
        found = Path(hf_hub_download(source.repo, source.file, revision=remote.commit_hash, local_dir=scratch))
    # For large files the hub's entity tag is their SHA-256; for small ones it is a 40-digit git hash.
    if remote.etag and len(remote.etag) == 64 and (got := sha256_file(found)) != remote.etag:
        raise WeightsCorruptError(
            f"{source.repo}/{source.file}: SHA-256 {got}, the hub says {remote.etag}; fetch again"
        )
    return found, {"source": f"https://huggingface.co/{source.repo}", "revision": remote.commit_hash}


@contextmanager
def _hub(source: Source) -> Iterator[None]:
    """Access to the hub: its client's network errors, of its HTTP library too, become WeightsUnavailableError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def unavailable(reason: object) -> WeightsUnavailableError:
        return WeightsUnavailableError(
            f"{source.repo} could not be fetched ({reason}). Where there is a network, run `{source.command}`, "
            "and copy the weights folder here, or give a downloaded copy with --from_file"
        )

    switches = [os.environ.get(name, "").lower() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if {"1", "on", "yes", "true"} & set(switches):
        raise unavailable("HF_HUB_OFFLINE is set")
    transport = tuple(base for base in HfHubHTTPError.__bases__ if not issubclass(base, OSError))
    try:
        yield
    except (HfHubHTTPError, *transport, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise unavailable(error) from None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise WeightsUnavailableError(f"{path}: no such file or folder")
    return path


def _record(source: Source, weights_dir: str | Path, origin: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    record = _described(source, origin, files) | {
        "fetched": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pinned": False,
    }
    write_json(source.record_path(weights_dir), record)
    return record


def _described(source: Source, origin: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": source.name,
        "what": source.what,
        **origin,
        "licence": source.licence,
        "files": {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in files.items()},
    }
