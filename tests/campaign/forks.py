"""Calls in processes of their own that begin alike, with everything imported, and cannot hang or fill the memory."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_cxr
from mlx_cxr.core.errors import UserError

MEMORY = 2 << 30
"""Bytes that a call may take beside what all of them begin with."""
_LEFT_OUT = ("mlx_cxr.bench", "mlx_cxr.publishing.use_with_pytorch", "mlx_cxr.__main__")


@dataclass(frozen=True)
class Outcome:
    """The end of a call: `answer` with its value, `refusal` with its sentence, or a fault: `traceback`, `hang`, `died`.

    Attributes:
        said: the sentence or the traceback; and, before it, all that was printed and logged.
    """

    kind: str
    value: Any = None
    said: str = ""


def _modules() -> list[str]:
    found = (module.name for module in pkgutil.walk_packages(mlx_cxr.__path__, "mlx_cxr."))
    libraries = [
        "sklearn.metrics",
        "matplotlib.pyplot",
        "scipy.optimize",
        "scipy.stats",
        "pydicom",
        "mlx_vlm",
        "mlx_lm",
    ]
    return [*libraries, *(name for name in found if not name.startswith(_LEFT_OUT))]


os.environ["OPENBLAS_NUM_THREADS"] = "1"  # Two of them on a busy machine wait for each other most of the time.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_modules())


def call(function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> Outcome:
    """The outcome of a function of a module, called in a process of its own; `seconds` is when it hangs."""
    return next(calls(function, [arguments], seconds))


def calls(function: Callable[..., Any], cases: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[Outcome]:
    """The outcomes of calls one after the other in one process, and in a new one after a call that was its end."""
    reader = None
    with tempfile.NamedTemporaryFile() as said:
        for number in range(len(cases)):
            if reader is None:
                reader, writer = _context.Pipe(duplex=False)
                process = _context.Process(target=_child, args=(writer, said.name, function, cases[number:]))
                process.start()
                writer.close()
                begun = 0
            try:
                answered = reader.poll(seconds)
                outcome = reader.recv() if answered else ("hang", None, f"over {seconds} s")
            except EOFError:
                outcome = ("died", None, "it ended without a word")
            printed = Path(said.name).read_bytes()
            if outcome[0] in ("hang", "died") or number == len(cases) - 1:
                process.kill()
                process.join()
                reader = None
            kind, value, sentence = outcome
            yield Outcome(kind, value, printed[begun:].decode("utf-8", "replace") + sentence)
            begun = len(printed)


def stage(folder: Path, name: str, *arguments: str) -> None:
    """Run a stage in a folder; `call` tells its sentence on standard error from its other ends."""
    os.chdir(folder)
    importlib.import_module(f"mlx_cxr.{name}").main(list(arguments))


def _child(writer: Any, said: str, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = Path("/proc/self/status")
    if status.exists():
        taken = 1024 * int(re.search(r"VmSize:\s+(\d+)", status.read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for arguments in cases:
        kind, value, sentence = "answer", None, ""
        try:
            value = function(*arguments)
        except SystemExit as end:
            kind = "refusal" if end.code in (1, 2) else "answer" if not end.code else "traceback"
        except (UserError, OSError) as error:
            kind, sentence = "refusal", str(error)
        except BaseException:
            kind, sentence = "traceback", traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            writer.send((kind, value, sentence))
        except Exception:
            writer.send(("traceback", None, traceback.format_exc()))
    os._exit(0)
