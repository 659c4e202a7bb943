"""The start of every stage: its command line, its logging, and errors that end in one sentence.

Nothing heavy is imported here, so that `--help` answers at once; a stage imports what it works with inside `run`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core.claim import launched_rank
from mlx_cxr.core.errors import readable_errors

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config


def stage_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a stage, yet without options; `description` is the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"python -m mlx_cxr.{name}", description=(description or "").strip().splitlines()[0]
    )


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The two options of a stage that has a configuration: `--config` and repeatable `--set KEY=VALUE`."""
    parser.add_argument(
        "--config", type=Path, required=required, help="YAML of the experiment, such as configs/demo.yaml"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as training.epochs=3 (YAML value; repeatable)",
    )


def add_training_arguments(parser: argparse.ArgumentParser, run_name: str) -> None:
    """The further options of a stage that trains; `run_name` is the configuration's key for its run's name."""
    parser.add_argument("--run_name", help=f"folder under outputs/; default: {run_name} of the configuration")
    parser.add_argument("--seed", type=int)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="resume a run that was stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run of that name")


def configuration(args: argparse.Namespace, **direct: Any) -> Config:
    """The experiment's configuration, from `--config`, `--set` and options that stand for one key (`load_config`)."""
    from mlx_cxr.core.config import load_config

    return load_config(args.config, args.overrides, **direct)


@contextmanager
def started(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, verbose: bool = True
) -> Iterator[argparse.Namespace]:
    """Around the work of a stage's `main`: parse, log to the terminal, and end with a sentence where a user erred.

    Args:
        argv: its arguments; None takes the process's.
        verbose: log more than warnings. Of the processes of one run only the first does.

    Raises:
        SystemExit: as `readable_errors` and `argparse` say.
    """
    args = parser.parse_args(argv)
    log_to_terminal(verbose and launched_rank() == 0)
    with readable_errors():
        yield args


def log_to_terminal(verbose: bool = True) -> None:
    """Let this package's messages reach the terminal, and of chatty libraries warnings only."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for chatty in ("httpx", "httpx2", "huggingface_hub", "matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
