"""Safetensors files of weights: read whole, checked by name and shape, written atomically; never a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import SEAL, UNSEALED, RecordError, atomic_path, seal_weights
from mlx_cxr.core.files import check_weights as check_seal
from mlx_cxr.core.safetensors import SafetensorsError, read_header

_LARGEST_WEIGHT, _LARGEST_STATISTIC = 1e6, 1e12
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")


class ModelFormatError(UserError, ValueError):
    """A weights file that does not hold what was asked for; the message names the file and every fault."""


def read_safetensors(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and header entries of a safetensors file, read to its end.

    Raises:
        FileNotFoundError: no such file.
        ModelFormatError: a pickle (never opened), cut short, not safetensors, or, of a file that this package wrote,
            changed since.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; give safetensors, or 'imagenet' or 'scratch'")
    with path.open("rb") as data:
        start = data.read(9)
    # A safetensors file begins with the header's length in 8 bytes, which may look like a pickle's first two.
    if start.startswith(_PICKLE_STARTS) and start[8:] != b"{":
        raise ModelFormatError(
            f"{path} is a PyTorch pickle, which can run code when it is opened, so it is not read here. "
            "Convert it where PyTorch is: safetensors.torch.save_file(torch.load(file, weights_only=True), "
            "'resnet18.safetensors')"
        )
    try:
        read_header(path)
        arrays, header = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(arrays)
    except SafetensorsError as error:
        raise ModelFormatError(f"{error}; fetch or write it again") from None
    except (RuntimeError, ValueError) as error:
        raise ModelFormatError(f"{path} cannot be read by MLX ({error}); fetch or write it again") from None
    if SEAL in header or header.get("format", "").startswith("mlx_cxr."):
        try:
            check_seal(path)
        except RecordError as error:
            raise ModelFormatError(str(error)) from None
    return arrays, header


def write_safetensors(path: str | Path, arrays: dict[str, mx.array], header: dict[str, str]) -> Path:
    """Write arrays and header entries atomically and return the path.

    Raises:
        ModelFormatError: the name does not end in `.safetensors`, which MLX would append.
        OSError: the file cannot be written; what was there before is kept.
    """
    if Path(path).suffix != ".safetensors":
        raise ModelFormatError(f"{path}: weights are written as safetensors; give a name that ends in .safetensors")
    mx.eval(arrays)
    with atomic_path(path) as temporary:
        # Into a file of Python's, whose error says what is wrong with the disk; MLX's own says "unable to write".
        with temporary.open("wb") as file:
            mx.save_safetensors(file, arrays, metadata={**header, SEAL: UNSEALED})
        seal_weights(temporary)
    return Path(path)


def check_weights(
    path: str | Path, weights: Mapping[str, mx.array], expected: Mapping[str, tuple[int, ...]], layout: str
) -> None:
    """Hold weights against the names and shapes that they must have.

    Args:
        path: the file they are from, for the message.
        expected: name -> shape.
        layout: order of the axes of a convolution in `expected`, for the message.

    Raises:
        ModelFormatError: lists every name that is missing, unexpected, of another shape, not floating point, not
            finite, or with values that no training leaves (`value_faults`).
    """
    common = [name for name in expected if name in weights]
    misshaped = [n for n in common if weights[n].shape != expected[n]]
    not_float = [n for n in common if not mx.issubdtype(weights[n].dtype, mx.floating)]
    finite = {n: mx.isfinite(weights[n]).all() for n in common if n not in not_float}
    faults = {
        "missing": sorted(set(expected) - set(weights)),
        "unexpected": sorted(set(weights) - set(expected)),
        "of another shape": [f"{n} {weights[n].shape}, expected {layout} {expected[n]}" for n in misshaped],
        "not floating point": [f"{n} ({weights[n].dtype})" for n in not_float],
        "not finite": [n for n, good in finite.items() if not good.item()],
    }
    if not any(faults.values()):
        faults["not what training leaves"] = value_faults(weights)
    lines = [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in faults.items() if names]
    if lines:
        raise ModelFormatError(f"{path} does not hold this ResNet-18{_resemblance(weights)}:\n" + "\n".join(lines))


def value_faults(weights: Mapping[str, mx.array]) -> list[str]:
    """Faults of values that no training leaves, as blocks that a disk or a copy lost leave them; each names its tensor.

    These are values that are not finite or absurdly large, negative variances, and zeros in all of the last two rows
    or in an eighth of the rows of a matrix or kernel; of an embedding, whose last tokens may be unused, in half of
    them. For weights that come without a hash: what this does not find may still be wrong.
    """
    faults = []
    for name, weight in weights.items():
        if mx.issubdtype(weight.dtype, mx.floating):
            largest = mx.abs(weight).max().item() if weight.size else 0.0
            limit = _LARGEST_WEIGHT if weight.ndim > 1 else _LARGEST_STATISTIC
            if not largest <= limit or not mx.isfinite(weight).all().item():
                faults.append(f"{name} has values that are not finite, or beyond {limit:.0e}")
                continue
            if name.endswith("running_var") and weight.min().item() < 0:
                faults.append(f"{name} has negative variances")
        if weight.ndim > 1 and weight.shape[0] >= 8:
            zeros = np.array((weight.reshape(weight.shape[0], -1) == 0).all(axis=1))
            embedding = "embed_tokens" in name or "lm_head" in name
            if zeros.mean() > (0.5 if embedding else 0.125) or (zeros[-2:].all() and not embedding):
                faults.append(f"{name} has nothing but zeros in {zeros.sum():,} of {len(zeros):,} rows")
    return faults


def check_values(path: Path) -> None:
    """Read a file tensor by tensor, and raise ModelFormatError where it is damaged or has `value_faults`."""
    try:
        read_header(path)
        arrays = mx.load(str(path), format="safetensors")
        # One at a time: those of a base would take all of the memory.
        faults = [fault for name in list(arrays) for fault in value_faults({name: arrays.pop(name)})]
    except (RuntimeError, ValueError) as error:
        raise ModelFormatError(f"{path} cannot be read: {error}") from None
    if faults:
        raise ModelFormatError(f"{path}: " + "; ".join(faults[:5]) + "; fetch or write it again")


def _resemblance(names: Iterable[str]) -> str:
    names = set(names)
    if "layer1.0.conv3.weight" in names:
        return " (it looks like a ResNet-50 or deeper)"
    return " (it looks like a ResNet-34)" if "layer1.2.conv1.weight" in names else ""
