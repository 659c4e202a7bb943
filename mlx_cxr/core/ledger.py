"""Ledger of the steps of a pipeline: tells by hash which are up to date, and for what reason the others are not.

A step is recorded with the configuration it read, and the SHA-256 of the files it read and of those it left. It is up
to date when all are the same now and the package has the same version. Code is not hashed: after a change of code, the
pipeline is told the stage to start again from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_cxr import __version__
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, known_sha256, read_record, write_record

SCHEMA = 2
NEVER = "not run before"
STOPPED = "it was stopped before its end"
"""Two of the reasons that `Ledger.why_run` gives."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that a step's outputs depend on.

    Attributes:
        version: of this package.
        settings: dotted configuration key -> value, of the keys the step reads.
        inputs: path -> hex SHA-256 of each file the step reads.
    """

    version: str
    settings: dict[str, Any]
    inputs: dict[str, str]


def fingerprint(settings: Mapping[str, Any], inputs: Sequence[Path]) -> Fingerprint:
    """Take the fingerprint of a step about to run, of the sections of `Config.plain()` and the files that it reads.

    Raises:
        UserError: an input is missing; names it.
    """
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path} is missing; it should come from an earlier stage or from the data folder")
    return Fingerprint(__version__, _flat(settings), {str(path): known_sha256(path) for path in inputs})


class Ledger:
    """The steps that brought a folder to its present state, in one JSON file, written when the first is recorded.

    Raises:
        RecordError: the file is there but not a ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps: dict[str, Any] = {}
        if path.exists():
            try:
                record = read_record(path)
            except RecordError as error:
                raise RecordError(
                    f"{error}; or delete it: stages whose runs are there already then ask first"
                ) from None
            if record.get("schema") != SCHEMA:
                raise RecordError(f"{path} is not a ledger of this version; delete it to run every stage again")
            self._steps = record["steps"]

    def why_run(self, step: str, now: Fingerprint, outputs: Sequence[Path]) -> str:
        """The reason for running a step, in words; empty when its outputs are up to date."""
        then = self._steps.get(step)
        if then is None:
            return NEVER
        if changed := self.changes(step, now):
            return changed
        if not then["finished"]:
            return STOPPED
        if missing := [str(path) for path in outputs if not path.exists()]:
            return f"{', '.join(missing)} is missing"
        left = then["outputs"]
        damaged = [str(path) for path in outputs if known_sha256(path) != left.get(str(path))]
        return f"{', '.join(damaged)} is not what it left" if damaged else ""

    def changes(self, step: str, now: Fingerprint) -> str:
        """Differences from the recorded fingerprint, in words; empty without any, or when nothing is recorded."""
        then = self._steps.get(step)
        if then is None:
            return ""
        old, new = then["fingerprint"], asdict(now)
        if old["version"] != new["version"]:
            return f"mlx_cxr is {new['version']}, it was made by {old['version']}"
        for what in ("settings", "inputs"):
            before, after = old[what], new[what]
            changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
            if changed:
                more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
                return f"changed: {', '.join(changed[:4])}{more}"
        return ""

    def seconds(self, step: str) -> float | None:
        """Time that a step took when it was last run to its end; None where that is not known."""
        return self._steps.get(step, {}).get("seconds")

    def begin(self, step: str, fingerprint: Fingerprint) -> None:
        """Record that a step is begun with this fingerprint."""
        self._write(step, {"finished": False, "fingerprint": asdict(fingerprint), "seconds": self.seconds(step)})

    def finish(self, step: str, fingerprint: Fingerprint, outputs: Sequence[Path], seconds: float) -> None:
        """Record that a step has left these outputs."""
        left = {str(path): known_sha256(path) for path in outputs}
        about = {"finished": True, "fingerprint": asdict(fingerprint), "outputs": left, "seconds": seconds}
        self._write(step, about)

    def _write(self, step: str, about: dict[str, Any]) -> None:
        self._steps[step] = about
        write_record(self.path, {"schema": SCHEMA, "steps": self._steps})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
