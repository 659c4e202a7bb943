"""Making a pixel store: in parallel, to a file beside its place, so that a stopped run can be gone on with.

While it is made, `images_<size>.npy.partial` holds the pixels and `images_<size>.partial.jsonl` is the journal: a first
line with what the store is for, then a line per checkpoint with the rows that are on disk by then. The index is
written last; until then there is the old store or none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from mlx_cxr.data.decode_pool import Decoded, decode_films
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.pixel_store import SCHEMA, map_images, partial_paths, read_index, sample_hash
from mlx_cxr.data.tables import DataError
from mlx_cxr.errors import UserError
from mlx_cxr.runs import write_json

log = logging.getLogger("mlx_cxr")

CHECKPOINT_SECONDS = 2.0


class StoreBusyError(UserError, RuntimeError):
    """Another process is making the same store."""


@dataclass(frozen=True)
class StoreReport:
    """How a store came out.

    Attributes:
        films: rows of the store.
        decoded: films that were decoded now; the others were there from before.
        seconds: that this took.
        unreadable: image_id -> reason.
        notes: image_id -> what is unusual about it.
    """

    films: int
    decoded: int
    seconds: float
    unreadable: dict[str, str]
    notes: dict[str, list[str]]


def build_store(
    path: str | Path,
    manifest: Manifest,
    transform: Transform,
    root: str | Path,
    workers: int = 0,
    rebuild: bool = False,
) -> StoreReport:
    """Make the pixel store of a manifest, go on with one that was stopped, or find that it is up to date.

    It is up to date when manifest, transform, and the names and sizes of all film files are those it was made from.

    Args:
        path: `images_<size>.npy`.
        manifest: whose films, in its order.
        transform: what to make of each film.
        root: folder that the manifest's paths are relative to.
        workers: decoding processes; 0 takes one per core.
        rebuild: decode every film again.

    Raises:
        DataError: no films, more than half of them unusable, or `root` is gone.
        OSError: the disk is full or not writable; what was written is kept and gone on with by the next call.
        StoreBusyError: another process is at it.
        WorkerDiedError: a decoding process was killed.
    """
    path, root = Path(path), Path(root)
    ids = [str(image_id) for image_id in manifest.frame["image_id"]]
    films = [root / film for film in manifest.frame["path"]]
    if not films:
        raise DataError(f"the manifest has no films; see the counts that build_manifest wrote beside {path}")
    sizes = film_sizes(films)
    gone = [(film, "no such file") for film, size in zip(films, sizes, strict=True) if size < 0]
    _refuse_if_most(gone, len(films), root)
    key = {
        "schema": SCHEMA,
        "manifest": manifest.sha256,
        "transform": transform.plain(),
        "films": _films_hash(manifest.frame["path"], sizes),
        "shape": [len(films), transform.size, transform.size],
    }
    if not rebuild and (current := _up_to_date(path, key)):
        return StoreReport(len(films), 0, 0.0, current["unreadable"], current["notes"])

    begun = time.perf_counter()
    with _Partial(path, key, fresh=rebuild) as partial:
        jobs = [(row, film) for row, film in enumerate(films) if row not in partial.done]
        if partial.done:
            log.info("going on with a stopped run: %d of %d films are there already", len(partial.done), len(films))
        partial.check_space()
        reasons: dict[int, str] = {}
        with tqdm(total=len(films), initial=len(partial.done), unit="img", desc="films", disable=None) as bar:
            for film in decode_films(jobs, transform, workers):
                if film.reason is None:
                    partial.write(film)
                else:
                    _refuse_if_gone(root, films[film.row])
                    reasons[film.row] = film.reason
                bar.update()
        _refuse_if_most([(films[row], reasons[row]) for row in sorted(reasons)], len(films), root)
        unreadable = {ids[row]: reasons[row] for row in sorted(reasons)}
        notes = {ids[row]: partial.notes[row] for row in sorted(partial.notes)}
        partial.finish({"unreadable": unreadable, "notes": notes, "image_ids": ids})
    return StoreReport(len(films), len(jobs), time.perf_counter() - begun, unreadable, notes)


def film_sizes(films: Sequence[Path]) -> np.ndarray:
    """int64 (N,): bytes of each file, -1 where there is none."""
    sizes = np.full(len(films), -1, dtype=np.int64)
    for row, film in enumerate(films):
        with suppress(OSError):
            sizes[row] = os.stat(film).st_size  # noqa: PTH116  twice as fast as Path.stat, for 377,000 films
    return sizes


class _Partial:
    """A store that is being written.

    Attributes:
        done: rows that are written.
        notes: row -> notes, of those.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool) -> None:
        self._path, self._key = path, key
        self._pixels_path, self._journal_path = partial_paths(path)
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": tuple(key["shape"])}
        np.lib.format.write_array_header_1_0(header, description)
        self._header = header.getvalue()
        self._film_bytes = key["shape"][1] * key["shape"][2]
        self._bytes = len(self._header) + key["shape"][0] * self._film_bytes
        self.done: set[int] = set()
        self.notes: dict[int, list[str]] = {}
        self._unsaved: list[int] = []
        self._save_at = time.monotonic() + CHECKPOINT_SECONDS
        path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = self._journal_path.open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._journal.close()
            raise StoreBusyError(
                f"another prepare_images is writing {path} at this moment; wait for it, or end it"
            ) from None
        if fresh or not self._go_on():
            self._begin()

    def __enter__(self) -> _Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):
                self._checkpoint()
        finally:
            os.close(self._pixels)
            self._journal.close()

    def write(self, film: Decoded) -> None:
        """Put a decoded film in its row.

        Raises:
            OSError: disk full, or another fault; the films of before are kept.
        """
        try:
            # Not through a memory map: on a full disk that ends the process without a word.
            offset, rest = len(self._header) + film.row * self._film_bytes, memoryview(film.pixels)
            while rest:
                written = os.pwrite(self._pixels, rest, offset)
                offset, rest = offset + written, rest[written:]
            self.done.add(film.row)
            self._unsaved.append(film.row)
            if film.notes:
                self.notes[film.row] = list(film.notes)
            if time.monotonic() > self._save_at:
                self._checkpoint()
        except OSError as error:
            raise self._disk_error(error) from error

    def check_space(self) -> None:
        """Raise OSError when the disk has not enough room for what is still to be written."""
        needed = self._bytes - os.fstat(self._pixels).st_blocks * 512
        free = shutil.disk_usage(self._path.parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self._path} needs {needed / 1e6:,.1f} MB more, {free / 1e6:,.1f} MB are free there; make room, set "
                "data.work_dir to another disk, or choose a smaller pixels.size or data.n_studies",
            )

    def finish(self, entries: dict[str, Any]) -> None:
        """Move the store to its place and write its index.

        Raises:
            OSError: as `write`.
        """
        try:
            os.ftruncate(self._pixels, self._bytes)
            self._checkpoint()
            images = map_images(self._pixels_path, tuple(self._key["shape"]))
            index = {
                **self._key,
                "sample": sample_hash(images),
                "pillow": PIL.__version__,
                "stored": len(self.done),
                **entries,
            }
            # An index never lies beside another array than its own: killed between these steps, `_go_on` mends it.
            self._path.with_suffix(".json").unlink(missing_ok=True)
            self._pixels_path.replace(self._path)
        except OSError as error:
            raise self._disk_error(error) from error
        write_json(self._path.with_suffix(".json"), index)
        self._journal_path.unlink()

    def _begin(self) -> None:
        self.done, self.notes = set(), {}
        self._journal.truncate(0)
        self._pixels = os.open(self._pixels_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self._pixels, self._header, 0)
        self._append(self._key)

    def _go_on(self) -> bool:
        """Take up what a stopped run left; False when there is nothing, or it was for something else."""
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._journal.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        try:
            records = [json.loads(line) for line in lines]
        except ValueError:
            return False
        if not records or records[0] != self._key:
            return False
        if not self._pixels_path.exists() and self._path.exists() and not self._path.with_suffix(".json").exists():
            self._path.replace(self._pixels_path)
        for record in records[1:]:
            self.done.update(record["rows"])
            self.notes.update({int(row): notes for row, notes in record["notes"].items()})
        try:
            self._pixels = os.open(self._pixels_path, os.O_RDWR)
        except FileNotFoundError:
            return False
        size = len(self._header) + (max(self.done, default=-1) + 1) * self._film_bytes
        if os.pread(self._pixels, len(self._header), 0) != self._header or os.fstat(self._pixels).st_size < size:
            os.close(self._pixels)
            return False
        return True

    def _checkpoint(self) -> None:
        """Films to the disk first, then their rows into the journal."""
        begun = time.monotonic()
        if self._unsaved:
            os.fsync(self._pixels)
            notes = {row: self.notes[row] for row in self._unsaved if row in self.notes}
            self._append({"rows": self._unsaved, "notes": notes})
            self._unsaved = []
        # Less often where the disk is slow, so that decoding does not wait for it.
        now = time.monotonic()
        self._save_at = now + max(CHECKPOINT_SECONDS, 20 * (now - begun))

    def _append(self, record: dict[str, Any]) -> None:
        self._journal.write(json.dumps(record).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _disk_error(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"could not write {self._pixels_path}: {error.strerror or error}. {len(self.done)} of "
            f"{self._key['shape'][0]} films are written and kept; make room (or set data.work_dir to another disk) and "
            "run the same command again",
        )


def _up_to_date(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        index = read_index(path)
        if any(index[name] != value for name, value in key.items()):
            return None
        if sample_hash(map_images(path, tuple(index["shape"]))) != index["sample"]:
            return None
    except DataError:
        return None
    return index


def _films_hash(paths: Sequence[str], sizes: np.ndarray) -> str:
    digest = hashlib.sha256(sizes.tobytes())
    for path in paths:
        digest.update(path.encode() + b"\0")
    return digest.hexdigest()


def _refuse_if_gone(root: Path, film: Path) -> None:
    if not root.is_dir():
        raise DataError(
            f"data.root {root} is gone while {film} was to be read: is its disk still there? "
            "What was written is kept; run the same command again"
        )


def _refuse_if_most(failed: Sequence[tuple[Path, str]], films: int, root: Path) -> None:
    if 2 * len(failed) <= films:
        return
    kinds = Counter(reason for _, reason in failed).most_common(3)
    first = "\n".join(f"  {film}: {reason}" for film, reason in failed[:5])
    raise DataError(
        f"{len(failed)} of {films} films cannot be used ({'; '.join(f'{n} x {reason}' for reason, n in kinds)}). "
        f"The first:\n{first}\nIs data.root right ({root})? The manifest's paths are relative to it; "
        "were the films downloaded?"
    )
