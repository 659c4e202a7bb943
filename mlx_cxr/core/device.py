"""The machine that a stage runs on: MLX's device, memory and BLAS, and the processes (ranks) of one run.

On Linux, `mlx[cpu]` links netlib's reference BLAS (7 GFLOP/s on two cores); `cblas_sgemm` is a dynamic symbol, so an
OpenBLAS loaded globally before `mlx.core` serves it instead (about 220).
`opencv-python`, which mlx-vlm needs, ships one; a system OpenBLAS is preferred.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import os
import platform
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core import workers
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.stage import log_to_terminal

if TYPE_CHECKING:
    import mlx.core as mx

log = logging.getLogger("mlx_cxr")

_openblas: str | None = None


def link_openblas() -> str | None:
    """On Linux, load an OpenBLAS globally so that MLX's float32 matrix products use it; elsewhere do nothing.

    It has an effect once, and only before `mlx.core` is imported. `MLX_CXR_OPENBLAS` names a library to use, or `off`.

    Returns:
        The path or name of the library in use, or None for the stock BLAS.
    """
    global _openblas
    if _openblas is not None or platform.system() != "Linux":
        return _openblas
    wanted = os.environ.get("MLX_CXR_OPENBLAS", "")
    if wanted == "off" or "mlx.core" in sys.modules:
        return None
    for candidate in [wanted] if wanted else _openblas_candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            library.cblas_sgemm  # noqa: B018  the symbol MLX calls; AttributeError where a build renames it
        except (OSError, AttributeError):
            continue
        _openblas = candidate
        return _openblas
    if wanted:
        log.warning("MLX_CXR_OPENBLAS=%s is no OpenBLAS that can be loaded; the slow reference BLAS serves", wanted)
    return None


def _openblas_candidates() -> list[str]:
    candidates = ["libopenblas.so.0"]
    cv2 = importlib.util.find_spec("cv2")
    if cv2 is not None and cv2.origin is not None:
        site = Path(cv2.origin).parent.parent
        candidates += [str(path) for path in sorted(site.glob("opencv_python*.libs/libopenblas*.so*"))]
    return candidates


def keep_freed_memory() -> bool:
    """On Linux with glibc, let freed buffers stay with the process instead of going back to the kernel.

    MLX's CPU backend allocates every array with malloc, and glibc maps and unmaps the large ones: their page faults
    cost more than the arithmetic (a BatchNorm step over 19 MB: 86 ms, then 28). One arena serves all threads.

    Returns:
        True if the C library took the settings.
    """
    settings = {
        workers.M_ARENA_MAX: 1,
        workers.M_MMAP_MAX: 0,
        workers.M_TRIM_THRESHOLD: 2**31 - 1,
        workers.M_TOP_PAD: workers.KEPT_BYTES,
    }
    return platform.system() == "Linux" and workers.set_malloc(settings)


def device_kind() -> str:
    """MLX's default device: `metal`, `cuda` or `cpu`."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def configure_memory(cache_limit_gb: float = 1.0) -> dict[str, int]:
    """Bound MLX's memory on a device with unified or graphics memory; does nothing on the CPU backend.

    The wired limit becomes the device's recommended working set, which macOS will not page out, and the cache of
    freed buffers is bounded (GB of 1e9 bytes), so that a training run does not push a 16 GB machine into swap.

    Returns:
        The limits that were set, in bytes; empty on the CPU.
    """
    import mlx.core as mx

    if device_kind() == "cpu":
        return {}
    cache = int(cache_limit_gb * 1e9)
    mx.set_cache_limit(cache)
    limits = {"cache_limit": cache}
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if device_kind() == "metal" and working_set:
        mx.set_wired_limit(int(working_set))
        limits["wired_limit"] = int(working_set)
    return limits


def describe() -> dict[str, Any]:
    """Record of the machine for a run: device, name, cores, memory in bytes, and the BLAS on Linux."""
    import mlx.core as mx

    kind = device_kind()
    info = mx.device_info()
    return {
        "kind": kind,
        "name": str(info.get("device_name") or platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "blas": blas_name() if kind == "cpu" else None,
    }


def blas_name() -> str:
    """Name of the library behind MLX's matrix products on the CPU backend, for people."""
    if platform.system() != "Linux":
        return "Accelerate"
    return f"OpenBLAS ({Path(_openblas).name})" if _openblas else "reference BLAS (slow; see the doctor stage)"


def total_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of a float32 `(size, size)` matrix product on the default device, over about `seconds`."""
    import mlx.core as mx

    a = mx.random.normal((size, size))
    b = mx.random.normal((size, size))
    mx.eval(a, b, a @ b)
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        mx.eval(a @ b)
        rounds += 1
    return 2 * size**3 * rounds / elapsed / 1e9


def process_group() -> mx.distributed.Group | None:
    """The processes that `mlx.launch` or `mpirun` started; None for a process by itself.

    Without their environment variables MLX is not asked, as it would load and start any MPI library installed.

    Raises:
        UserError: the others cannot be reached.
    """
    if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & set(os.environ):
        return None
    hostfile = os.environ.get("MLX_HOSTFILE")
    if hostfile and not Path(hostfile).read_text(encoding="utf-8").strip():
        return None  # `mlx.launch -n 1` leaves it empty, which MLX cannot read
    import mlx.core as mx

    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise UserError(
            f"the other processes of this run cannot be reached ({error}); see that each of them is started, that no "
            "other run uses the ports (mlx.launch --starting-port), and that the addresses of the hostfile are right"
        ) from error
    sizes = (os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_WORLD_SIZE"))
    ranks = (os.environ.get(name, "0") for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    if group.size() == 1 and (any(int(size) > 1 for size in sizes) or any(int(rank) > 0 for rank in ranks)):
        raise UserError(
            "this process was started as one of several, but MLX finds no other: is the library of its backend (such "
            "as MPI) installed for it, and does each process have the hostfile? Each of them would write the same run"
        )
    return group if group.size() > 1 else None


def share_cores(group: mx.distributed.Group) -> int | None:
    """Give OpenBLAS this process's share of the cores, where several ranks run on one machine.

    Two ranks that each use all cores take turns, and each waits for the other's slowest thread. `OPENBLAS_NUM_THREADS`
    in the environment stands above this.

    Returns:
        Its number of threads now; None where it was left as it is.
    """
    import mlx.core as mx

    # By all ranks alike, as it communicates.
    here = mx.array([zlib.crc32(platform.node().encode()) >> 1], dtype=mx.int32)
    neighbours = int(mx.sum(mx.distributed.all_gather(here, group=group) == here).item())
    if _openblas is None or neighbours == 1 or "OPENBLAS_NUM_THREADS" in os.environ:
        return None
    threads = max(1, (os.cpu_count() or 1) // neighbours)
    try:
        ctypes.CDLL(_openblas).openblas_set_num_threads(threads)
    except (OSError, AttributeError):
        return None
    return threads


def start(stage: str, verbose: bool = True, parallel: bool = False) -> dict[str, Any]:
    """Set up a stage: logging to the terminal, memory limits, and one line about the machine.

    Args:
        verbose: log more than warnings; of several processes only rank 0 does.
        parallel: the stage can be one run of several processes.

    Returns:
        `describe()`, and the number of `processes` where there are several.

    Raises:
        UserError: `mlx.launch` has started several processes of a stage that is not parallel; or they do not find each
            other.
    """
    group = process_group()
    if group is not None and not parallel:
        raise UserError(f"{stage} runs as one process; start it without mlx.launch")
    if group is not None and group.rank() > 0:
        verbose = False
    log_to_terminal(verbose)
    configure_memory()
    device = describe()
    if device["kind"] == "cpu":
        keep_freed_memory()
    if group is not None:
        device["processes"] = group.size()
        share_cores(group)
    log.info(
        "%s on %s (%s), %d cores, %.0f GB%s%s",
        stage,
        device["kind"],
        device["name"],
        device["cores"],
        device["memory_bytes"] / 1e9,
        f", BLAS: {device['blas']}" if device["blas"] else "",
        f", {group.size()} processes" if group is not None else "",
    )
    return device
