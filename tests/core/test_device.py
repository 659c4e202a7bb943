"""The machine: what the BLAS redirection gains, and what is left alone on the CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_cxr.core import device

LINUX = platform.system() == "Linux"


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)


MEASURE = (
    "import mlx_cxr; from mlx_cxr.core import device; "
    "print(device.measure_gflops({size}, 0.3), device.blas_name(), sep='|')"
)


@pytest.mark.skipif(not LINUX, reason="only Linux wheels link the reference BLAS")
def test_openblas_is_several_times_faster_than_the_stock_library():
    if device._openblas is None:
        pytest.skip("no OpenBLAS on this machine")
    linked, name = in_python(MEASURE.format(size=512)).stdout.strip().split("|")
    stock, stock_name = in_python(MEASURE.format(size=256), MLX_CXR_OPENBLAS="off").stdout.strip().split("|")
    assert float(linked) > 5 * float(stock)
    assert name.startswith("OpenBLAS (")
    assert "slow" in stock_name


@pytest.mark.skipif(not LINUX, reason="only Linux wheels link the reference BLAS")
def test_results_are_those_of_the_stock_library():
    code = (
        "import mlx_cxr, mlx.core as mx; mx.random.seed(0); "
        "a = mx.random.normal((37, 53)); print((a @ a.T).sum().item(), (a @ a.T)[3, 5].item())"
    )
    linked = [float(x) for x in in_python(code).stdout.split()]
    stock = [float(x) for x in in_python(code, MLX_CXR_OPENBLAS="off").stdout.split()]
    assert linked == pytest.approx(stock, rel=1e-5)


@pytest.mark.skipif(not LINUX, reason="only Linux loads a library")
def test_a_library_that_cannot_be_loaded_is_said():
    done = in_python(
        "import mlx_cxr; from mlx_cxr.core import device; print(device.blas_name())", MLX_CXR_OPENBLAS="/no.so"
    )
    assert "MLX_CXR_OPENBLAS=/no.so is no OpenBLAS" in done.stderr
    assert "slow" in done.stdout


@pytest.mark.skipif(not LINUX, reason="only Linux loads a library")
def test_nothing_is_loaded_once_mlx_is_there():
    code = "import mlx.core, mlx_cxr; from mlx_cxr.core import device; print(device.link_openblas())"
    assert in_python(code).stdout == "None\n"


def test_device_kind_is_that_of_the_default_device():
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert device.device_kind() in (("cpu",) if on_cpu else ("metal", "cuda"))
    with mx.stream(mx.cpu):
        before = mx.default_device()
    try:
        mx.set_default_device(mx.cpu)
        assert device.device_kind() == "cpu"
        assert device.configure_memory() == {}
    finally:
        mx.set_default_device(before)


@pytest.mark.skipif(mx.default_device().type == mx.DeviceType.cpu, reason="no accelerator here")
def test_memory_limits_on_an_accelerator():
    limits = device.configure_memory(0.5)
    assert limits["cache_limit"] == 500_000_000
    assert 0 < limits.get("wired_limit", 1) <= device.total_memory()


def test_description():
    machine = device.describe()
    assert machine["kind"] == device.device_kind()
    assert machine["cores"] == os.cpu_count()
    assert machine["name"]
    assert 1e9 < machine["memory_bytes"] < 1e14
    assert (machine["blas"] is not None) == (machine["kind"] == "cpu")


def test_a_stage_starts_with_one_line_that_says_what_it_runs_on():
    done = in_python("import mlx_cxr; from mlx_cxr.core import device; device.start('train_cnn')")
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"train_cnn on {device.device_kind()} (")
    assert f"{os.cpu_count()} cores" in lines[0]


@pytest.mark.skipif(not LINUX, reason="glibc only")
def test_freed_memory_is_kept_and_results_do_not_change():
    code = (
        "import mlx_cxr, mlx.core as mx; from mlx_cxr.core import device; kept = device.keep_freed_memory(); "
        "a = mx.arange(2_000_000, dtype=mx.float32); mx.eval(a); print(kept, (a * 2).max().item())"
    )
    assert in_python(code).stdout.split()[1] == "3999998.0"
    if platform.libc_ver()[0] == "glibc":
        assert in_python(code).stdout.split()[0] == "True"
