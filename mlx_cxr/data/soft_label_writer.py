"""Making the files of `soft_labels`, study by study, so that a stopped run can be resumed.

While they are made, `teacher_soft_labels.partial.npy` holds the logits, NaN in the rows still to do, and
`teacher_features.partial.npy` the features; `teacher_soft_labels.partial.json` has the hash of the studies and header.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cxr.core.files import RecordError, atomic_path, hash_of, read_record, sha256_file, told, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.data.soft_labels import (
    FEATURES_NAME,
    INDEX_NAME,
    LOGITS_NAME,
    SCHEMA,
    SoftLabelError,
    check_studies,
    checked_temperatures,
    has_form,
    load_soft_labels,
    partial_paths,
)

_CHUNK = 4096


class SoftLabelWriter:
    """Soft labels that are being made: `open`, then `put` the rows of `todo`, then `finish`; a context manager."""

    def __init__(self, folder: Path, key: dict[str, Any], lock: int) -> None:
        self._folder, self._key, self._lock = folder, key, lock
        self._logits_path, self._features_path, self._key_path = partial_paths(folder)
        shape = (len(key["study_ids"]), len(LABELS))
        sizes = {} if key["features"] is None else {self._features_path: ((shape[0], key["features"]), np.float16)}
        sizes = {self._logits_path: (shape, np.float32)} | sizes
        if not self._can_resume(sizes):
            self._begin(sizes)
        self._files = {path: _RowFile(path) for path in sizes}
        self._logits = np.load(self._logits_path, allow_pickle=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        study_ids: Sequence[str],
        splits: Sequence[str],
        header: Mapping[str, Any],
        feature_size: int | None = None,
    ) -> SoftLabelWriter:
        """Begin, or resume a stopped run of the same studies and header.

        Finished soft labels in the folder stay until `finish` replaces them. Where these are of the same studies and
        header, nothing is left to do.

        Args:
            folder: the teacher's run.
            study_ids: (N,), each once.
            splits: (N,), `train` or `validate`.
            header: JSON-ready; hashes of everything that the logits depend on, for `SoftLabels.check`.
            feature_size: H of the features; None for none.

        Raises:
            SoftLabelError: a study is of another split or there twice, or another process is writing there.
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        check_studies(study_ids, splits, f"soft labels for {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entries = {"study_ids": list(study_ids), "splits": list(splits), "header": dict(header)}
            return cls(folder, {"labels": list(LABELS), **entries, "features": feature_size}, lock)
        except BlockingIOError:
            os.close(lock)
            raise SoftLabelError(
                f"another process is writing soft labels into {folder}; wait for it, or end it"
            ) from None
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> SoftLabelWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the rows that were put are kept."""
        for file in self._files.values():
            file.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._files, self._lock = {}, -1

    @property
    def todo(self) -> np.ndarray:
        """int64 (K,): rows that are not done yet, in order."""
        return np.flatnonzero(np.isnan(self._logits).any(axis=1))

    @property
    def logits(self) -> np.ndarray:
        """float32 (N, 14): a copy of the logits, NaN in rows that are not done; for fitting temperatures."""
        return self._logits.copy()

    def put(self, rows: Sequence[int] | np.ndarray, logits: np.ndarray, features: np.ndarray | None = None) -> None:
        """Store rows; they are on the disk when this returns.

        Args:
            rows: int (M,).
            logits: float (M, 14), finite.
            features: float (M, H), within float16; given if and only if `open` had a `feature_size`.

        Raises:
            SoftLabelError: a value is not a finite number; names the study.
            ValueError: shapes that do not fit each other.
            OSError: the disk is full; the rows put before are kept.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._logits):
            raise ValueError(f"rows {rows.min()} to {rows.max()}, but there are {len(self._logits)} studies")
        size = self._key["features"]
        if (features is None) != (size is None):
            raise ValueError(f"features are {'missing' if features is None else 'given'}, feature_size is {size}")
        logits = self._checked(rows, logits, (len(rows), len(LABELS)), np.float32, "logits")
        if features is not None:
            features = self._checked(rows, features, (len(rows), size), np.float16, "features")
            # Before the logits, which mark a row as done.
            self._files[self._features_path].write(rows, features)
        self._files[self._logits_path].write(rows, logits)
        self._logits[rows] = logits

    def finish(self, temperatures: np.ndarray | Sequence[float], **counts: int) -> Path:
        """Move the arrays to their final names, write the JSON, and close.

        Args:
            temperatures: (14,), positive, fitted on validation.
            counts: for the header, such as `truncated=3, skipped=1`.

        Returns:
            The JSON's path.

        Raises:
            SoftLabelError: rows are not done, or a temperature is not a positive number.
            OSError: as `put`; the run can be resumed.
        """
        if len(todo := self.todo):
            first = self._key["study_ids"][todo[0]]
            raise SoftLabelError(f"{len(todo)} of {len(self._logits)} studies have no soft label, first {first!r}")
        fitted = checked_temperatures(temperatures, f"soft labels for {self._folder}")
        header = {**self._key["header"], "temperatures": fitted, **counts}
        names = {self._logits_path: "logits", self._features_path: "features"}
        hashes = {names[path]: sha256_file(path) for path in self._files}
        index_path = self._folder / INDEX_NAME
        index_path.unlink(missing_ok=True)
        for partial, final in _moves(self._folder):
            if partial in self._files:
                partial.replace(final)
            else:
                final.unlink(missing_ok=True)
        about = {"header": header, "made_for": hash_of(self._key), "sha256": hashes}
        write_record(index_path, {"schema": SCHEMA, **self._key, **about})
        self._key_path.unlink()
        self.close()
        return index_path

    def _checked(
        self, rows: np.ndarray, values: np.ndarray, shape: tuple[int, int], dtype: type, what: str
    ) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, dtype=dtype)
        if values.shape != shape:
            raise ValueError(f"{what} have shape {values.shape}, expected {shape}")
        if (wrong := np.flatnonzero(~np.isfinite(values).all(axis=1))).size:
            study = self._key["study_ids"][rows[wrong[0]]]
            raise SoftLabelError(
                f"the teacher's {what} for study {study!r} are not finite as {np.dtype(dtype)} "
                f"({len(wrong)} of {len(rows)} studies). Did its training diverge? A base in float16 may overflow: set "
                "teacher.training.precision: float32"
            )
        return values

    def _can_resume(self, sizes: Mapping[Path, tuple[tuple[int, int], type]]) -> bool:
        """True if a stopped run left files of this key; those that have their final names already are moved back."""
        try:
            if read_record(self._key_path) != {"key": hash_of(self._key)}:
                return False
        except RecordError:
            return False
        if not (self._folder / INDEX_NAME).exists():
            for partial, final in _moves(self._folder):
                if partial in sizes and final.exists() and not partial.exists():
                    final.replace(partial)
        try:
            return all(has_form(np.load(path, mmap_mode="r", allow_pickle=False), *sizes[path]) for path in sizes)
        except (OSError, ValueError, EOFError):
            return False

    def _begin(self, sizes: Mapping[Path, tuple[tuple[int, int], type]]) -> None:
        """Start from the finished soft labels in the folder if they are of this key, else from blank ones."""
        try:
            load_soft_labels(self._folder)
            finished = read_record(self._folder / INDEX_NAME).get("made_for") == hash_of(self._key)
        except SoftLabelError:
            finished = False
        self._key_path.unlink(missing_ok=True)
        for partial, final in _moves(self._folder):
            if partial in sizes:
                with atomic_path(partial) as temporary:
                    if finished:
                        shutil.copyfile(final, temporary)
                    else:
                        _write_blank(temporary, *sizes[partial])
        write_record(self._key_path, {"key": hash_of(self._key)})


class _RowFile:
    """A `.npy` whose rows are written one by one."""

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        self._start, self._row_bytes = array.offset, array[:1].nbytes
        self._file, self._path = os.open(path, os.O_RDWR), path

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write rows and flush them to the disk."""
        for row, value in zip(rows.tolist(), values, strict=True):
            # Not through a memory map: on a full disk that ends the process without a word.
            offset, rest = self._start + row * self._row_bytes, memoryview(value.tobytes())
            while rest:
                with told(self._path):
                    written = os.pwrite(self._file, rest, offset)
                offset, rest = offset + written, rest[written:]
        with told(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _write_blank(path: Path, shape: tuple[int, int], dtype: type) -> None:
    """Write a `.npy` of NaN in full, so that a disk that is too small fails before the teacher has worked for hours."""
    with path.open("wb") as out:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], _CHUNK):
            out.write(np.full((min(_CHUNK, shape[0] - start), shape[1]), np.nan, dtype).tobytes())


def _moves(folder: Path) -> list[tuple[Path, Path]]:
    """(partial, final) of the two arrays."""
    logits, features, _ = partial_paths(folder)
    return [(features, folder / FEATURES_NAME), (logits, folder / LOGITS_NAME)]
