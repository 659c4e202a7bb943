"""Worker processes: what they inherit, and that they do not outlive their parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_cxr.core.workers import available_cores, lean_start, worker_pool

PARENT = """
import os, time
from mlx_cxr.core.workers import lean_start, worker_pool
print("main module runs")
pool = worker_pool(2)
with lean_start():
    work = [pool.submit(time.sleep, 60), pool.submit(time.sleep, 60), pool.submit(time.sleep, 60)]
print(*pool._processes, flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path):
    """A program with two workers asleep: (process, ids of its workers)."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines = [process.stdout.readline(), process.stdout.readline()]
    yield process, [int(pid) for pid in lines[1].split()]
    process.kill()
    process.wait()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_they_end_with_a_killed_parent(parent):
    process, workers = parent
    assert len(workers) == 2
    assert all(map(alive, workers))
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)


def test_ctrl_c_is_the_parents_business(parent):
    _, workers = parent
    time.sleep(0.5)
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(map(alive, workers))


def test_what_they_inherit(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    main = sys.modules["__main__"]
    with worker_pool(1) as pool:
        with lean_start():
            found = pool.submit(os.getenv, "OMP_NUM_THREADS"), pool.submit(os.getenv, "MKL_NUM_THREADS")
        assert [each.result() for each in found] == ["1", "1"]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
    assert sys.modules["__main__"] is main
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_cores():
    assert 1 <= available_cores() <= os.cpu_count()
