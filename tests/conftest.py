"""Loads the package first, and puts this folder on `sys.path` for the reference networks kept here."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers with all cores each would wait for each other in every matrix product.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

if "MLX_CXR_TEST_SESSION" not in os.environ:  # a worker has it of the process that started it
    os.environ["MLX_CXR_TEST_SESSION"] = tempfile.mkdtemp(prefix="mlx_cxr-tests-")
    atexit.register(shutil.rmtree, os.environ["MLX_CXR_TEST_SESSION"], ignore_errors=True)
    if sys.dont_write_bytecode:
        # Over a hundred commands are started here, and each would compile all that it imports: seconds of pandas,
        # scikit-learn and mlx-vlm.
        sys.dont_write_bytecode = False
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = f"{os.environ['MLX_CXR_TEST_SESSION']}/bytecode"

# Before any test imports mlx.core, as that fixes which BLAS serves on Linux; the stock one is 30x slower.
import mlx_cxr  # noqa: F401

# A background job of a shell ignores Ctrl-C, and so would every command that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


@pytest.fixture
def torch():
    """The `torch` module; without it the test is skipped and says so."""
    return pytest.importorskip("torch", reason="PyTorch is not installed: parity with it is not checked here")


@pytest.fixture(scope="module")
def without_plots() -> Iterator[None]:
    """Scored models get an empty file for each of their plots, two seconds' work, where no test looks at one."""
    from mlx_cxr.pages import results_page

    names = ("plot_roc", "plot_precision_recall", "plot_reliability", "plot_risk_coverage")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            results_page, "plots", SimpleNamespace(**dict.fromkeys(names, lambda path, *_, **__: path.touch()))
        )
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a disk of a size such as `20k`, where the machine lets us mount one, and takes it away again."""
    mounted = []

    def disk(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with most slow tests first, so that no process is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
