"""What a command prints and returns when something goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from mlx_cxr.core.errors import UserError, readable_errors


class MissingKeyError(UserError, KeyError):
    """As a room would define one."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x.yaml: key 'a' is missing"), "error: x.yaml: key 'a' is missing"),
        (MissingKeyError("no column 'view'"), "error: no column 'view'"),
        (
            FileNotFoundError(2, "No such file or directory", "t.csv"),
            "error: [Errno 2] No such file or directory: 't.csv'",
        ),
    ],
)
def test_one_line_and_status_2(error, line, capsys, monkeypatch):
    monkeypatch.delenv("MLX_CXR_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end, readable_errors():
        raise error
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert err == line + "\n"
    assert out == ""


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("MLX_CXR_TRACEBACK", "1")
    with pytest.raises(UserError), readable_errors():
        raise UserError("x")


def test_faults_of_the_package_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"), readable_errors():
        raise ValueError("a bug")


def test_interruption_ends_with_130(capsys):
    with pytest.raises(SystemExit) as end, readable_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "is kept" in capsys.readouterr().err


CALLBACK = """
import signal, sys, time, weakref
sys.argv[0] = "mlx-cxr"
from mlx_cxr.core.errors import readable_errors
class Lock: pass
with readable_errors():
    lock = Lock()
    kept = weakref.ref(lock, lambda _: signal.raise_signal(signal.SIGINT))
    del lock
    time.sleep(5)
    print("went on")
"""


def test_ctrl_c_in_a_callback_which_python_passes_over_stops_all_the_same():
    """As in those of the locks of imports."""
    process = subprocess.run([sys.executable, "-c", CALLBACK], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "stopped; what was written so far is kept\n"


IMPORTING = """
import signal, sys, time
from mlx_cxr.core import errors

signal.signal(signal.SIGINT, errors._end_quietly)
sys.path.insert(0, {folder!r})
with errors.readable_errors():
    try:
        import interrupted
    except:
        print("passed over")
    print(interrupted.went_on)
    for _ in range(1000):
        time.sleep(0.01)
    print("never stopped")
"""


def test_ctrl_c_while_a_module_is_imported_stops_once_it_is(tmp_path):
    """Libraries try imports with a bare `except:`, and extensions make an ImportError of it."""
    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwent_on = True\n")
    command = [sys.executable, "-c", IMPORTING.format(folder=str(tmp_path))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (130, "True\n")
    assert process.stderr == "stopped; what was written so far is kept\n"


def test_nothing_happens_where_nothing_goes_wrong():
    with readable_errors():
        pass


@pytest.mark.parametrize("command", [["mlx_cxr", "doctor"], ["mlx_cxr.doctor"], ["mlx_cxr.train_cnn", "--config", "x"]])
@pytest.mark.parametrize("after", [0.0, 0.1, 0.3, 1.0])
def test_ctrl_c_is_one_line_from_the_first_import_on(command, after):
    """From the trace of imports it is known when this package has begun, which takes Python itself a moment.

    Sent again after a second: while MLX looks for a compiler by C's `system()`, the process ignores it for 0.1 s.
    """
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "mlx_cxr/core/" in line and "device" in line:
            break
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    try:
        rest = process.communicate(timeout=1)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert "Traceback" not in rest
    if after < 0.2 or command[-1] == "doctor":
        assert process.returncode == 130
        assert "stopped" in rest
