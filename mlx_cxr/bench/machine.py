"""The machine's own limits, measured in the same run: matrix products, memory, load, heat."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cxr.bench.contenders import PRECISIONS
from mlx_cxr.bench.timing import seconds_of
from mlx_cxr.bench.torch_side import import_torch, synchronize, torch_dtype
from mlx_cxr.core import device

_SIDES = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH = 0.03
_COPIED_BYTES = {"cpu": 1 << 28}


def matrix_product_peaks(torch_device: str | None, seconds: float) -> dict[tuple[str, str], float]:
    """GFLOP/s of square matrix products, by (framework, precision): the yardstick of the other sections.

    The side grows until one product takes 30 ms; the best median counts.

    Args:
        torch_device: where PyTorch computes; None leaves it out.
        seconds: for each of them.

    Returns:
        (`mlx` or `torch`, precision) -> GFLOP/s; a precision that a framework does not have there is left out.
    """
    peaks = {}
    for precision in PRECISIONS:
        peaks["mlx", precision] = _best_gflops(lambda n, p=precision: _mlx_product(n, p), seconds)
        if torch_device is not None:
            try:
                peaks["torch", precision] = _best_gflops(
                    lambda n, p=precision: _torch_product(n, p, torch_device), seconds
                )
            except RuntimeError:
                continue
    return peaks


def memory_bandwidth(torch_device: str | None, seconds: float) -> dict[str, float]:
    """GB/s (1e9 bytes, read and written) of adding 1 to a large array, by framework; on a CPU also NumPy's copy.

    MLX's CPU backend adds on one core, so the largest of them is the memory's.
    """
    size = _COPIED_BYTES.get(device.device_kind(), 1 << 30) // 4
    x = mx.zeros(size)
    mx.eval(x)
    found = {"mlx": _gbs(lambda: mx.eval(x + 1), 8 * size, seconds)}
    if torch_device is not None:
        y = import_torch().zeros(size, device=torch_device)
        found["torch"] = _gbs(lambda: (y + 1, synchronize(torch_device)), 8 * size, seconds)
    if device.device_kind() == "cpu":
        source, target = np.ones(size, np.float32), np.empty(size, np.float32)
        found["numpy"] = _gbs(lambda: np.copyto(target, source), 8 * size, seconds)
    return found


def machine_state() -> dict[str, Any]:
    """Load average, heat and a reference product at this moment, as `load_average`, `thermal`, `reference_gflops`.

    The load is None where the system does not say. The product is MLX's float32 one of side 1024: its drift from the
    start of a run to its end tells of heat, of which only macOS says more.
    """
    return {
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "thermal": _thermal_note(),
        "reference_gflops": _gflops(_mlx_product(1024, "float32"), 1024, 1.0),
    }


def _thermal_note() -> str | None:
    """Heat as macOS reports it (`pmset -g therm`); None elsewhere."""
    if platform.system() != "Darwin" or shutil.which("pmset") is None:
        return None
    done = subprocess.run(["pmset", "-g", "therm"], capture_output=True, text=True, timeout=10, check=False)
    return " ".join(done.stdout.split()) or None


def _best_gflops(product: Callable[[int], Callable[[], object]], seconds: float) -> float:
    best = 0.0
    for side in _SIDES:
        call = product(side)
        call()
        once = seconds_of(call)
        best = max(best, _gflops(call, side, seconds / 3))
        if once > _LONG_ENOUGH:
            break
    return best


def _gflops(call: Callable[[], object], side: int, seconds: float) -> float:
    return 2 * side**3 / _median_seconds(call, seconds) / 1e9


def _gbs(call: Callable[[], object], size: int, seconds: float) -> float:
    return size / _median_seconds(call, seconds) / 1e9


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    taken, until = [], perf_counter() + seconds
    while len(taken) < 3 or perf_counter() < until:
        taken.append(seconds_of(call))
    return float(np.median(taken))


def _mlx_product(side: int, precision: str) -> Callable[[], object]:
    a, b = (mx.random.normal((side, side), key=mx.random.key(i)).astype(getattr(mx, precision)) for i in range(2))
    mx.eval(a, b)
    return lambda: mx.eval(a @ b)


def _torch_product(side: int, precision: str, device: str) -> Callable[[], object]:
    torch = import_torch()
    a, b = (torch.randn(side, side).to(device, torch_dtype(precision)) for _ in range(2))
    return lambda: (a @ b, synchronize(device))
