"""A stage as a program that counts its changes on disk, and may end itself before one of them as `kill -9` does.

Arguments: the stage and its own. Environment: `CAMPAIGN_COUNT`, a file that gets the number of changes (files opened
for writing, renamed and removed, folders made and removed, below the folder that it runs in); `CAMPAIGN_KILL_AT`, the
number of the change that it does not live to make; `CAMPAIGN_LARGEST`, bytes that no file may exceed.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = frozenset(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"))


class Changes:
    """Counts the changes of this process, and kills it before the one that is asked for."""

    def __init__(self, kill_at: int) -> None:
        self.count, self._kill_at, self._here = 0, kill_at, os.getcwd() + os.sep  # noqa: PTH109

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[0], str) and bool(arguments[2] & WRITING)
        if not opens and event not in CHANGES:
            return
        path = arguments[0]  # An open file's number, for one that is cut.
        if not isinstance(path, int) and not os.path.abspath(path).startswith(self._here):  # noqa: PTH100
            return
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if largest := int(os.environ.get("CAMPAIGN_LARGEST", 0)):
        import resource

        sys.dont_write_bytecode = True  # It would be cut short for all others.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    changes = Changes(int(os.environ.get("CAMPAIGN_KILL_AT", 0)))
    count = Path(os.environ["CAMPAIGN_COUNT"])
    atexit.register(lambda: count.write_text(str(changes.count)))
    sys.addaudithook(changes)
    importlib.import_module(f"mlx_cxr.{sys.argv[1]}").main(sys.argv[2:])
