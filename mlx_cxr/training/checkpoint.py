"""The state to resume from: weights, running statistics, optimizer and progress in one file, replaced atomically."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_cxr.core.files import RecordError
from mlx_cxr.models.weight_files import ModelFormatError, read_safetensors, write_safetensors
from mlx_cxr.training.distributed import World

STATE = "last/state.safetensors"
"""The state's file in a run's folder."""
_FORMAT = "mlx_cxr.training_state"


@dataclass(frozen=True)
class Progress:
    """Progress of a training run.

    Attributes:
        step: optimizer steps done.
        best_auc: best validation macro AUC so far; -1 before the first.
        best_epoch: the epoch (from 1) that reached it; 0 before the first.
        stale_epochs: epochs since then.
        seconds: time spent in training so far.
        sums: the loop's running sums (loss of the epoch, loss and gradient norm of the logging interval), so that a
            resumed run logs what an unbroken one does.
        settings: hash of everything that must not change between a run and its resumption.
    """

    step: int = 0
    best_auc: float = -1.0
    best_epoch: int = 0
    stale_epochs: int = 0
    seconds: float = 0.0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    settings: str = ""

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Progress:
        """Progress from the JSON of its `asdict`; TypeError or KeyError where that is of another version."""
        return cls(**plain | {"sums": tuple(plain["sums"])})


def save_state(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, progress: Progress, trainable_only: bool = False
) -> None:
    """Write `path` (safetensors) atomically; the progress stands in its header.

    Args:
        model: all its parameters are saved, with running statistics, or only those that are not frozen.

    Raises:
        OSError: the file cannot be written; what was there before is kept.
    """
    arrays = {f"model.{name}": value for name, value in _weights(model, trainable_only)}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    header = {"format": _FORMAT, "progress": json.dumps(asdict(progress))}
    write_safetensors(path, arrays, header)


def load_state(
    path: Path, model: nn.Module, optimizer: optim.Optimizer, settings: str, trainable_only: bool = False
) -> Progress:
    """Put a saved state into `model` and `optimizer`, in place: a step compiled before sees it.

    Args:
        model: of the same structure as the one that was saved, and frozen alike.
        optimizer: initialized with the model's trainable parameters.
        trainable_only: as it was saved; frozen parameters are left as they are.

    Raises:
        RecordError: the file is missing, is no training state, does not fit the model, or was made with other
            settings.
    """
    if not path.exists():
        raise RecordError(f"{path} is missing: nothing to resume; start without --resume")
    try:
        arrays, header = read_safetensors(path)
    except ModelFormatError as error:
        raise RecordError(f"{error}; or start the run again with --overwrite") from None
    if header.get("format") != _FORMAT:
        raise RecordError(f"{path} is not a training state of this package; start the run again with --overwrite")
    try:
        progress = Progress.from_plain(json.loads(header["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{path} is of another version of this package ({error}); start the run again with --overwrite"
        ) from None
    if progress.settings != settings:
        raise RecordError(
            f"{path} was made with other data or settings, so resuming would mix two runs; "
            "restore the configuration, or start again with another --run_name or --overwrite"
        )
    weights = {name.removeprefix("model."): a for name, a in arrays.items() if name.startswith("model.")}
    moments = {name.removeprefix("optimizer."): a for name, a in arrays.items() if name.startswith("optimizer.")}
    _check_fit(path, "model", weights, dict(_weights(model, trainable_only)))
    _check_fit(path, "optimizer", moments, dict(tree_flatten(optimizer.state)))
    model.load_weights(list(weights.items()), strict=False)
    _put(optimizer.state, tree_unflatten(list(moments.items())))
    return progress


def forget_state(run_dir: Path) -> None:
    """Remove the state of a run that has come to its end: it is three times as large as the weights that were kept."""
    state = run_dir / STATE
    state.unlink(missing_ok=True)
    with suppress(OSError):  # Not there, or it holds something else.
        state.parent.rmdir()


def share_state(
    progress: Progress, model: nn.Module, optimizer: optim.Optimizer, world: World, trainable_only: bool = False
) -> Progress:
    """Give every rank the progress of rank 0, and in place its weights and optimizer; others need not see its files."""
    if world.size == 1:
        return progress
    weights, state = world.from_first((dict(_weights(model, trainable_only)), optimizer.state))
    model.load_weights(list(weights.items()), strict=False)
    _put(optimizer.state, state)
    return Progress.from_plain(world.agree(lambda: asdict(progress)))


def _weights(model: nn.Module, trainable_only: bool) -> list[tuple[str, mx.array]]:
    return tree_flatten(model.trainable_parameters() if trainable_only else model.parameters())


def _check_fit(path: Path, what: str, saved: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (saved, wanted)]
    faults = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
    if faults:
        raise RecordError(
            f"{path} does not fit the {what}: {', '.join(dict.fromkeys(faults))} missing, unexpected or of another "
            "shape; start the run again with --overwrite"
        )


def _put(tree: dict | list, values: dict | list) -> None:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, mx.array):
            tree[key] = value
        else:
            _put(tree[key], value)
