"""Errors whose message is enough: a command prints it without a traceback and ends with status 2."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# The file that frames of the import statement name (importlib is compiled into Python).
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
# The name of the thread that waits to repeat a Ctrl-C.
_AGAIN = "Ctrl-C again"


class UserError(Exception):
    """Something the user can put right; the message names the file, row or key, and the way out.

    Mixed into the specific errors of each room, beside the built-in class that fits
    (`class ConfigError(UserError, ValueError)`).
    """

    def __str__(self) -> str:
        # KeyError would show its message quoted and escaped.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


def end_quietly_until_started() -> None:
    """In a process that is a stage, end at Ctrl-C with a line and status 130 wherever `readable_errors` does not reach.

    These are the imports before `main`, which take most of the first second, and the end of the process.
    """
    command = sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "mlx-cxr"
    if command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_quietly)


def _end_quietly(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Around a stage's `main`: a `UserError` or `OSError` ends the process with `error: …` and status 2.

    `MLX_CXR_TRACEBACK=1` lets the traceback through. Any other exception is a fault of this package and keeps its own.
    """
    try:
        with _interruptible():
            yield
    except (UserError, OSError) as error:
        if os.environ.get("MLX_CXR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was written so far is kept", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, so that what is under way is left whole."""
    if signal.getsignal(signal.SIGINT) is not _end_quietly:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt_after_import)
    before, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        yield
    except Exception:  # It may be all that an import left of a Ctrl-C.
        if any(thread.name == _AGAIN for thread in threading.enumerate()):
            raise KeyboardInterrupt from None
        raise
    finally:
        sys.unraisablehook = before
        signal.signal(signal.SIGINT, _end_quietly)


def _interrupt_after_import(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but while a module is imported only when that has ended.

    A library that tries an import with a bare `except:` would go on without it, and an extension in C++ turns what is
    raised while it is loaded into an ImportError.
    """
    importing = frame
    while importing is not None and importing.f_code.co_filename != _IMPORT_SYSTEM:
        importing = importing.f_back
    if importing is None:
        raise KeyboardInterrupt
    _interrupt_soon()


def _interrupt_again(ignored: sys.UnraisableHookArgs) -> None:
    """Repeat a Ctrl-C that came in a callback, such as that of a weak reference: Python prints it and goes on."""
    if ignored.exc_type is KeyboardInterrupt:
        _interrupt_soon()
    else:
        sys.__unraisablehook__(ignored)


def _interrupt_soon() -> None:
    again = threading.Timer(0.02, _thread.interrupt_main)
    again.name, again.daemon = _AGAIN, True
    again.start()
