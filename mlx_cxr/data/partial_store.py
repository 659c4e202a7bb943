"""An array file of a pixel store while it is written: pixels under a temporary name, and a journal of the rows done.

`images_<size>.npy.partial` holds the pixels and `images_<size>.partial.jsonl` is the journal: a first line with the key
of the file, then a line per checkpoint with the rows that are on disk by then. A stopped run is resumed from them.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import sha256_file, told, write_record
from mlx_cxr.data.decode_pool import Decoded
from mlx_cxr.data.pixel_store import partial_paths

log = logging.getLogger("mlx_cxr")

CHECKPOINT_SECONDS = 2.0


class StoreBusyError(UserError, RuntimeError):
    """Another process is making the same file."""


@contextmanager
def claimed(path: Path) -> Iterator[BinaryIO]:
    """Lock the journal of an array file for this process alone; the lock ends with the process.

    Args:
        path: the array file; its folder is there.

    Yields:
        The journal, open to be read and appended to.

    Raises:
        StoreBusyError: another process holds it.
    """
    journal_path = partial_paths(path)[1]
    while True:
        with journal_path.open("a+b") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusyError(
                    f"another prepare_images is writing {path} at this moment; wait for it, or end it"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                log.warning("%s: this disk has no file locks; see that no other process is at it (--shard)", path)
            # A process that finishes removes the journal, perhaps between our opening and our locking it.
            if _is_at(journal, journal_path):
                yield journal
                return


def remove_partial(path: Path) -> None:
    """Remove the pixels and the journal of an array file that is claimed; the journal, which is the claim, last."""
    for left in partial_paths(path):
        left.unlink(missing_ok=True)


def discard_stopped(path: Path) -> None:
    """Remove what a stopped run left beside a whole array file, unless another process is making it anew."""
    if any(left.exists() for left in partial_paths(path)):
        with suppress(StoreBusyError, OSError), claimed(path):
            remove_partial(path)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class PartialStore:
    """An array file that is being written.

    Args:
        path: the file when finished.
        key: the first entries of its index, `shape` among them; a stopped run with another key is not resumed.
        journal: from `claimed`.
        fresh: start over even where a stopped run could be resumed.

    Attributes:
        done: rows that are written.
        notes: row -> notes, of those.
    """

    def __init__(self, path: Path, key: dict[str, Any], journal: BinaryIO, fresh: bool) -> None:
        self._path, self._key, self._journal = path, key, journal
        self._pixels_path, self._journal_path = partial_paths(path)
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": tuple(key["shape"])}
        np.lib.format.write_array_header_1_0(header, description)
        self._header = header.getvalue()
        self._image_bytes = key["shape"][1] * key["shape"][2]
        self._bytes = len(self._header) + key["shape"][0] * self._image_bytes
        self.done: set[int] = set()
        self.notes: dict[int, list[str]] = {}
        self._unsaved: list[int] = []
        self._save_at = time.monotonic() + CHECKPOINT_SECONDS
        with told(path):
            if fresh or not self._resume():
                self._begin()

    def __enter__(self) -> PartialStore:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with suppress(OSError):
                self._checkpoint()
        finally:
            os.close(self._pixels)

    def write(self, decoded: Decoded) -> None:
        """Write a decoded image to its row.

        Raises:
            OSError: disk full, or another fault; the images written before are kept.
        """
        try:
            # Not through a memory map: on a full disk that ends the process without a word.
            offset, rest = len(self._header) + decoded.row * self._image_bytes, memoryview(decoded.pixels)
            while rest:
                written = os.pwrite(self._pixels, rest, offset)
                offset, rest = offset + written, rest[written:]
            self.done.add(decoded.row)
            self._unsaved.append(decoded.row)
            if decoded.notes:
                self.notes[decoded.row] = list(decoded.notes)
            if time.monotonic() > self._save_at:
                self._checkpoint()
        except OSError as error:
            raise self._disk_error(error) from error

    def finish(self, entries: dict[str, Any], whole: Path) -> dict[str, Any]:
        """Move the array to its final name, write its index, and return that.

        Args:
            entries: further entries of the index.
            whole: the store that the array belongs to; its index goes before the array changes.

        Raises:
            OSError: as `write`.
        """
        try:
            os.ftruncate(self._pixels, self._bytes)
            self._checkpoint()
            index = {
                **self._key,
                "pixels": sha256_file(self._pixels_path),
                "pillow": PIL.__version__,
                "stored": len(self.done),
                **entries,
            }
            # An index never lies beside another array than its own: killed between these steps, `_resume` repairs it.
            for store in (whole, self._path):
                store.with_suffix(".json").unlink(missing_ok=True)
            self._pixels_path.replace(self._path)
        except OSError as error:
            raise self._disk_error(error) from error
        write_record(self._path.with_suffix(".json"), index)
        self._journal_path.unlink()
        return index

    def _begin(self) -> None:
        self.done, self.notes = set(), {}
        self._journal.truncate(0)
        self._pixels = os.open(self._pixels_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self._pixels, self._header, 0)
        self._append(self._key)

    def _resume(self) -> bool:
        """Load the state of a stopped run; False when there is none, or it was for another key."""
        # The journal up to its last whole line.
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
        # Killed in `finish`: the array has its final name and no index yet.
        if not self._pixels_path.exists() and self._path.exists() and not self._path.with_suffix(".json").exists():
            self._path.replace(self._pixels_path)
        for record in records[1:]:
            self.done.update(record["rows"])
            self.notes.update({int(row): notes for row, notes in record["notes"].items()})
        try:
            self._pixels = os.open(self._pixels_path, os.O_RDWR)
        except FileNotFoundError:
            return False
        size = len(self._header) + (max(self.done, default=-1) + 1) * self._image_bytes
        if os.pread(self._pixels, len(self._header), 0) != self._header or os.fstat(self._pixels).st_size < size:
            os.close(self._pixels)
            return False
        return True

    def _checkpoint(self) -> None:
        """Flush images to the disk first, then their rows to the journal."""
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
