"""Headers of safetensors files, checked before any library opens them, and the weight files of a folder.

MLX takes a header at its word: of 1,000 dimensions it has hung, of offsets outside the file it reads what is there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cxr.core.errors import UserError

_LARGEST_HEADER = 16 << 20  # Of LFM2.5-VL-1.6B it has 60 KB.
_MOST_AXES = 8
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class SafetensorsError(UserError, ValueError):
    """A file that is not safetensors, or whose header cannot be true; one line, which names the file."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a header describes it.

    Attributes:
        dtype: as safetensors names it, such as `BF16`.
        shape: its axes.
        start: offset of its first byte among the tensors' bytes.
        stop: of the byte behind its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def safetensors_files(folder: Path) -> list[Path]:
    """The `.safetensors` files of a folder by name, without hidden ones, such as macOS's `._` companions."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors by name and the entries of `__metadata__`; no tensor is read.

    Raises:
        FileNotFoundError: no such file.
        SafetensorsError: it is cut short, too long, or its header is not that of a safetensors file: the tensors lie
            one behind the other to the end, each as long as its shape and type say.
    """
    try:
        return _read_header(path)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error)[:200] if type(error) is ValueError else "its header cannot be parsed"
        raise SafetensorsError(f"{path} is damaged, cut short or not safetensors: {reason}") from None


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as data:
        length = int.from_bytes(data.read(8), "little") if size >= 8 else size
        if not 2 <= length <= size - 8:
            raise ValueError("no safetensors header")
        if length > _LARGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(data.read(length), object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something else than texts")
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"{name[:60]!r} begins at byte {entry.start}, where {end} is next")
        end = entry.stop
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes, its header says {8 + length + end}")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(name: str, fields: Any) -> TensorEntry:
    whole = isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "data_offsets"}
    if not whole or not isinstance(fields["dtype"], str) or fields["dtype"] not in _ITEM_BYTES:
        raise ValueError(f"{name[:60]!r} has no known type, or not dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > _MOST_AXES or not all(_is_size(n) for n in numbers):
            raise ValueError(f"{name[:60]!r} has axes or offsets that no tensor has")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[fields["dtype"]]:
        raise ValueError(f"{name[:60]!r} is not as long as its shape and type say")
    return TensorEntry(fields["dtype"], tuple(shape), *offsets)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**48
