"""The teacher's soft labels: a row of 14 logits per study, and the hashes of everything they were made from.

`teacher_soft_labels.npy` is float32 (N, 14), logits before temperature, columns in the order of `LABELS`;
`teacher_features.npy`, where the teacher gives features, is float16 (N, H). `teacher_study_ids.json` has, key by key:

    schema      1
    labels      the 14, in the order of the columns
    study_ids   of each row
    splits      `train` or `validate`, of each row; the test split is never in here
    header      SHA-256 of base, adapter, prompt, text policy, manifest and reports, the label policy, the modality, the
                14 `temperatures`, and how many studies were truncated and skipped; as the stage names them
    features    H; null where there are none
    made_for    SHA-256 of all of the above but the entries that `finish` added to the header
    sha256      of the files: `logits`, `features`

`soft_label_writer` makes them. It writes the JSON last, and removes an old one before it replaces its arrays: a
JSON that is there belongs to the arrays beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, hash_of, read_record, sha256_file
from mlx_cxr.core.labels import LABELS

SCHEMA = 1
LOGITS_NAME, FEATURES_NAME, INDEX_NAME = "teacher_soft_labels.npy", "teacher_features.npy", "teacher_study_ids.json"
SPLITS: tuple[str, ...] = ("train", "validate")
"""The splits that a student may learn from, or be chosen by."""
_KEYS = {"labels": list, "study_ids": list, "splits": list, "header": dict, "sha256": dict}
_AGAIN = "run cache_teacher_outputs again"


class SoftLabelError(UserError, ValueError):
    """Soft labels that cannot be written or used; the message names file, study or key and the way out."""


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's soft labels as read from disk.

    Attributes:
        study_ids: (N,) of each row, each once.
        splits: (N,) `train` or `validate`.
        logits: float32 (N, 14), finite, before temperature.
        features: float16 (N, H), memory-mapped and read-only; None where the teacher gave none.
        header: hashes of everything they were made from, and counts.
        temperatures: float32 (14,), positive; a calibrated probability is sigmoid(logit / temperature).
    """

    study_ids: tuple[str, ...]
    splits: tuple[str, ...]
    logits: np.ndarray
    features: np.ndarray | None
    header: Mapping[str, Any]
    temperatures: np.ndarray

    def place(self, study_ids: Iterable[str]) -> np.ndarray:
        """int64 (M,): the row of each study, -1 where it has no soft label."""
        return pd.Index(self.study_ids, dtype=object).get_indexer(pd.Index(study_ids, dtype=object)).astype(np.int64)

    def check(self, **expected: Any) -> None:
        """Compare entries of the header with expected values.

        Args:
            expected: key of the header -> JSON-ready value that it must have.

        Raises:
            SoftLabelError: some differ or are not recorded; names each, in mappings too, with both values.
        """
        faults = [fault for key in expected for fault in _differences(key, self.header, expected)]
        if faults:
            raise SoftLabelError(
                f"the soft labels were made from something else; {_AGAIN}, or take the run that goes with them:\n  "
                + "\n  ".join(faults)
            )


def load_soft_labels(folder: str | Path) -> SoftLabels:
    """Read and check the files of a finished `SoftLabelWriter`.

    Raises:
        SoftLabelError: a file is missing, cut short, of another shape than the ids, or not the one that the JSON was
            written for; a study is there twice or of the test split; a value is no finite number.
    """
    folder = Path(folder)
    index_path = folder / INDEX_NAME
    index = _read_index(folder)
    study_ids, splits, header = tuple(index["study_ids"]), tuple(index["splits"]), index["header"]
    check_studies(study_ids, splits, str(index_path))
    logits = _array(folder / LOGITS_NAME, (len(study_ids), len(LABELS)), np.float32, index["sha256"].get("logits"))
    if (wrong := np.flatnonzero(~np.isfinite(logits).all(axis=1))).size:
        raise SoftLabelError(f"{folder / LOGITS_NAME}: study {study_ids[wrong[0]]!r} has no finite logits; {_AGAIN}")
    features = None
    if (size := index.get("features")) is not None:
        features = _array(folder / FEATURES_NAME, (len(study_ids), size), np.float16, index["sha256"].get("features"))
    temperatures = checked_temperatures(header.get("temperatures"), str(index_path))
    # The logits are small and used at random; the features may be a gigabyte.
    return SoftLabels(study_ids, splits, np.array(logits), features, header, temperatures)


def partial_paths(folder: Path) -> tuple[Path, Path, Path]:
    """(logits, features, key) of soft labels that are being made."""
    stem = folder / LOGITS_NAME.removesuffix(".npy")
    features = folder / f"{FEATURES_NAME.removesuffix('.npy')}.partial.npy"
    return stem.with_suffix(".partial.npy"), features, stem.with_suffix(".partial.json")


def check_studies(study_ids: Sequence[str], splits: Sequence[str], where: str) -> None:
    """Raise SoftLabelError, naming `where` and a study, unless each is there once and of a split of `SPLITS`."""
    if not study_ids:
        raise SoftLabelError(f"{where}: there is no study")
    if len(study_ids) != len(splits):
        raise SoftLabelError(f"{where}: {len(study_ids)} study ids, but {len(splits)} splits")
    place = pd.Index(study_ids, dtype=object)
    if not place.is_unique:
        raise SoftLabelError(f"{where}: study {place[place.duplicated()][0]!r} is there twice")
    for study, split in zip(study_ids, splits, strict=True):
        if split == "test":
            raise SoftLabelError(
                f"{where}: study {study!r} is of the test split. The student learns from these files, so no test study "
                "may be among them; the teacher's test logits go to its predictions.csv"
            )
        if split not in SPLITS:
            raise SoftLabelError(f"{where}: study {study!r} has the split {split!r}, not {' or '.join(SPLITS)}")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        begun = partial_paths(folder)[2].is_file()
        state = "is not complete, cache_teacher_outputs was stopped" if begun else "is missing"
        raise SoftLabelError(f"{path} {state}; run cache_teacher_outputs for this teacher run")
    try:
        index = read_record(path)
    except RecordError as error:
        raise SoftLabelError(f"{error}; {_AGAIN}") from None
    whole = isinstance(index, dict) and all(isinstance(index.get(key), kind) for key, kind in _KEYS.items())
    if not whole or index.get("schema") != SCHEMA:
        raise SoftLabelError(f"{path} is not an index of this version of mlx_cxr; {_AGAIN}")
    if index["labels"] != list(LABELS):
        raise SoftLabelError(f"{path} is of other labels or another order: {index['labels']}; {_AGAIN}")
    return index


def _array(path: Path, shape: tuple[int, int], dtype: type, sha256: str | None) -> np.ndarray:
    if not path.is_file():
        raise SoftLabelError(f"{path} is missing; {_AGAIN}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SoftLabelError(f"{path} is damaged or cut short ({error}); {_AGAIN}") from None
    if not has_form(array, shape, dtype):
        raise SoftLabelError(
            f"{path} holds {array.dtype} {array.shape}, its JSON says {np.dtype(dtype)} {shape}; {_AGAIN}"
        )
    if (found := sha256_file(path)) != sha256:
        raise SoftLabelError(
            f"{path} is not the file that {INDEX_NAME} was written for: sha256 {found[:12]}, not {_short(sha256)}; "
            f"{_AGAIN}"
        )
    return array


def has_form(array: np.ndarray, shape: tuple[int, int], dtype: type) -> bool:
    """True for an array of exactly this shape and dtype."""
    return array.shape == shape and array.dtype == dtype


def checked_temperatures(values: Any, where: str) -> np.ndarray:
    """float32 (14,): the values, if they are 14 positive numbers; else SoftLabelError, naming `where`."""
    try:
        fitted = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        fitted = np.empty(0)
    if fitted.shape != (len(LABELS),) or not (np.isfinite(fitted) & (fitted > 0)).all():
        raise SoftLabelError(f"{where}: temperatures are not {len(LABELS)} positive numbers: {values}")
    return fitted


def _differences(key: str, there: Mapping[str, Any], here: Mapping[str, Any], above: str = "") -> list[str]:
    theirs, ours = there.get(key), here.get(key)
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return [fault for name in {**theirs, **ours} for fault in _differences(name, theirs, ours, f"{above}{key}.")]
    if key in there and key in here and hash_of(theirs) == hash_of(ours):
        return []
    said = [_short(mapping[key]) if key in mapping else "not recorded" for mapping in (there, here)]
    return [f"{above}{key}: {said[0]} there, {said[1]} here"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
