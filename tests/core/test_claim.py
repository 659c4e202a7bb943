"""Claims on folders, held and lost by real processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from mlx_cxr.core.claim import CLAIM, FolderBusyError, claimed

HOLD = """
    import os, sys, time
    from mlx_cxr.core.claim import claimed
    with claimed(sys.argv[1]):
        if sys.argv[2] == "fork" and os.fork() == 0:
            print("child", os.getpid(), flush=True)
            time.sleep(60)
        elif sys.argv[2] != "fork":
            print("holds", os.getpid(), flush=True)
        time.sleep(60)
    """


@pytest.fixture
def holder(tmp_path):
    """Starts a process that claims `tmp_path / "run"`."""
    started = []

    def start(how="hold"):
        command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "run"), how]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], int(started[-1].stdout.readline().split()[1])

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_claim_leaves_nothing_behind(tmp_path):
    with claimed(tmp_path / "outputs" / "deep" / "run"):
        pass
    assert list(tmp_path.iterdir()) == [], "folders that nothing was written into"
    (tmp_path / "run").mkdir()
    with claimed(tmp_path / "run") as folder:
        assert json.loads((folder / CLAIM).read_text())["process"] == os.getpid()
        with claimed(tmp_path / "run"):
            pass
        assert (folder / CLAIM).exists(), "a claim within a claim ended the outer one"
    assert list((tmp_path / "run").iterdir()) == []


def test_another_process_is_named(tmp_path, holder):
    _, number = holder()
    with (
        pytest.raises(FolderBusyError, match=f"process {number} on {socket.gethostname()}") as told,
        claimed(tmp_path / "run"),
    ):
        pass
    assert str(tmp_path / "run") in str(told.value)
    with claimed(tmp_path / "other"):
        pass


def test_a_killed_process_holds_nothing(tmp_path, holder):
    process, _ = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / CLAIM).exists()
    (tmp_path / "run" / ".tmp-0123abcd-config.json").write_text("half")
    with claimed(tmp_path / "run") as folder:
        assert [path.name for path in folder.iterdir()] == [CLAIM]
    assert not (tmp_path / "run" / CLAIM).exists()


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path, holder):
    process, worker = holder("fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(worker, 0)
    with claimed(tmp_path / "run"):
        pass
    os.kill(worker, signal.SIGKILL)


def test_only_one_of_many_holds_it(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from mlx_cxr.core.claim import FolderBusyError, claimed
        done = 0
        while done < 20:
            try:
                with claimed(sys.argv[1]) as folder:
                    (folder / "inside").touch(exist_ok=False)
                    time.sleep(0.001)
                    (folder / "inside").unlink()
                    done += 1
            except FolderBusyError:
                time.sleep(0.0005)
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")]
    many = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[1] for process in many] == ["", "", ""]


class TestDisksWithoutLocks:
    """There the file says who holds it."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.lockf", refuse)

    def left(self, folder, **holder):
        folder.mkdir()
        us = {"host": socket.gethostname(), "process": os.getpid(), "command": "train_cnn", "since": "2026-01-01"}
        (folder / CLAIM).write_text(json.dumps({**us, **holder}))

    def test_a_living_process_keeps_it(self, tmp_path):
        self.left(tmp_path / "run")
        with (
            pytest.raises(FolderBusyError, match=f"process {os.getpid()} .*train_cnn, since 2026"),
            claimed(tmp_path / "run"),
        ):
            pass

    def test_a_dead_process_does_not(self, tmp_path):
        ended = subprocess.Popen(["true"])
        ended.wait()
        self.left(tmp_path / "run", process=ended.pid)
        with claimed(tmp_path / "run"):
            pass

    def test_of_another_machine_nothing_is_known(self, tmp_path):
        ended = subprocess.Popen(["true"])
        ended.wait()
        self.left(tmp_path / "run", process=ended.pid, host="elsewhere")
        with pytest.raises(FolderBusyError, match=f"on elsewhere.*delete .*{CLAIM}"), claimed(tmp_path / "run"):
            pass
