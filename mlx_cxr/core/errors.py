"""Errors whose message is enough: a command prints it without a traceback and ends with status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right; the message names the file, row or key, and the way out.

    Mixed into the specific errors of each room, beside the built-in class that fits
    (`class ConfigError(UserError, ValueError)`).
    """

    def __str__(self) -> str:
        # KeyError would show its message quoted and escaped.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


@contextmanager
def readable_errors() -> Iterator[None]:
    """Around a stage's `main`: a `UserError` or `OSError` ends the process with `error: …` and status 2.

    `MLX_CXR_TRACEBACK=1` lets the traceback through. Any other exception is a fault of this package and keeps its own.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get("MLX_CXR_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; what was written so far is kept", file=sys.stderr)
        raise SystemExit(130) from None
