"""Files that matter: written whole or not at all, and read back as they were written.

A record is a JSON object of this package's own with its SHA-256 as the last key: a reader is told of any change that
was made to it since. Weights carry theirs in the header of the safetensors file. JSON of others' formats is written and
read without.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mlx_cxr.core.errors import UserError

SEAL = "self_sha256"
"""The key, of a record and of the metadata of weights, that holds the hash of all the rest."""
UNSEALED = "0" * 64
"""The value of `SEAL` in the metadata of weights until `seal_weights` puts the hash there."""

_HEADER_BYTES = 100 << 20
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}-.+")


class RecordError(UserError, ValueError):
    """A record that is missing, cannot be read, lacks a key, or is not what was written."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    A killed or failed writer leaves the old file, or none, but never half of one. The suffix is kept, so that
    writers that look at it (`np.save`, `savefig`, `mx.save_safetensors`) behave. What a killed one leaves beside it is
    removed by `sweep`.

    Raises:
        OSError: the folder cannot be written or the disk is full; names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename is not None and str(error.filename) != str(temporary):
            reason += f" ({error.filename})"
        raise OSError(error.errno, f"could not write {path}: {reason}; what was there before is kept") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Name `path` in errors of a disk that name no file, as those of a full one do not.

    Raises:
        OSError: what is written in the context could not be; names a file.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically and return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically (indented, keys in the order given; NaN becomes null) and return the path."""
    return write_text(path, json.dumps(_jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Parsed JSON.

    Raises:
        RecordError: the file is missing or not JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not readable JSON: {error}") from None


def write_record(path: str | Path, value: Mapping[str, Any]) -> Path:
    """Write a record atomically: `write_json` of `value` and, as the last key, `self_sha256` of `hash_of(value)`."""
    return write_json(path, {**value, SEAL: hash_of(value)})


def read_record(path: str | Path) -> dict[str, Any]:
    """The record that `write_record` wrote, without its `self_sha256`.

    Raises:
        RecordError: it is missing, not JSON, or other than it was written; names it.
    """
    record = read_json(path)
    if not isinstance(record, dict) or SEAL not in record:
        raise RecordError(
            f"{path} carries no {SEAL!r} of its own: it is damaged, or of an earlier version of mlx_cxr; have it "
            "written again by the stage that makes it"
        )
    if record.pop(SEAL) != hash_of(record):
        raise RecordError(
            f"{path} is not what was written: it was damaged, or edited by hand; restore it, or have it written again "
            "by the stage that makes it"
        )
    return record


def seal_weights(path: Path) -> None:
    """Put the hash of a safetensors file into its own header, in place of `UNSEALED`.

    Args:
        path: a file with `SEAL: UNSEALED` among its metadata; still under a temporary name.
    """
    with path.open("r+b") as weights:
        place, digest = _weights_seal(weights, path)
        if place is None:
            raise ValueError(f"{path} was saved without {SEAL!r} in its metadata")
        weights.seek(place)
        weights.write(digest.encode())


def check_weights(path: str | Path) -> None:
    """Compare a safetensors file with the hash in its header.

    Raises:
        RecordError: it is missing, carries no hash, is damaged, or was changed; names it.
    """
    path = Path(path)
    try:
        with path.open("rb") as weights:
            place, digest = _weights_seal(weights, path)
            written = os.pread(weights.fileno(), 64, place).decode("latin-1") if place is not None else None
    except FileNotFoundError:
        raise RecordError(f"{path} is missing") from None
    if written is None:
        raise RecordError(
            f"{path} carries no hash of its own: it is damaged, or was not written by this version of mlx_cxr"
        )
    if written != digest:
        raise RecordError(f"{path} is not what was written: it is damaged or was changed; restore it, or train again")


def _weights_seal(weights: BinaryIO, path: Path) -> tuple[int | None, str]:
    """(offset of the hash in the file, None without one; SHA-256 of the file with `UNSEALED` in its place)."""
    size = os.fstat(weights.fileno()).st_size
    length = int.from_bytes(weights.read(8), "little")
    if not 2 <= length <= min(size - 8, _HEADER_BYTES):
        raise RecordError(f"{path} is damaged or cut short: no safetensors header")
    header = weights.read(length)
    found = re.search(rb'"%s"\s*:\s*"([0-9a-f]{64})"' % SEAL.encode(), header)
    digest = hashlib.sha256(length.to_bytes(8, "little"))
    if found is None:
        digest.update(header)
    else:
        digest.update(header[: found.start(1)] + UNSEALED.encode() + header[found.end(1) :])
    while chunk := weights.read(1 << 20):
        digest.update(chunk)
    return None if found is None else 8 + found.start(1), digest.hexdigest()


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder and in those right below it; nobody may be writing there now."""
    for pattern in (".tmp-*", "*/.tmp-*"):
        for path in folder.glob(pattern):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                with suppress(OSError):
                    path.unlink()


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line; a reader sees whole lines only, because each is a single write."""
    with told(path), Path(path).open("a", encoding="utf-8") as out:
        out.write(json.dumps(_jsonable(record), allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_known: dict[tuple[str, int, int, int], str] = {}


def known_sha256(path: str | Path) -> str:
    """`sha256_file`, computed once in a process for as long as the file's size and time of modification stay."""
    path = Path(path)
    about = path.stat()
    key = (str(path.resolve()), about.st_ino, about.st_size, about.st_mtime_ns)
    if key in _known:
        return _known[key]
    digest = sha256_file(path)
    # A file just written may be written again within the same tick of the disk's clock.
    if abs(time.time_ns() - about.st_mtime_ns) > 10**9:
        _known[key] = digest
    return digest


def hash_of(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (keys sorted, no spaces)."""
    text = json.dumps(_jsonable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    """Plain JSON data: paths as text, NumPy scalars and arrays as Python values, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
