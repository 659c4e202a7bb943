"""The start of every stage: its command line, its logging, and errors that end in one sentence.

Nothing heavy is imported here, so that `--help` answers at once; a stage imports what it works with inside `run`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core.claim import launched_rank
from mlx_cxr.core.errors import readable_errors

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

_OPTION = re.compile(r"^--(\w[\w-]*)(?=$|=)")


class StageParser(argparse.ArgumentParser):
    """A command line on which `--run-name`, `--run_name` and `--run` are one, and so are the dashes of all options."""

    def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:  # type: ignore[override]
        """An option; `--run` and `--run_name` stand for each other."""
        both = {"--run", "--run_name"}
        return super().add_argument(*flags, *(both - set(flags) if both & set(flags) else ()), **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As `argparse`, once each option's dashes are underscores; values and what follows `--` stay."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        options = [_OPTION.sub(lambda name: "--" + name[1].replace("-", "_"), argument) for argument in given[:end]]
        return super().parse_known_args(options + given[end:], namespace)


def stage_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a stage, yet without options; `description` is the docstring of its module."""
    return StageParser(prog=f"python -m mlx_cxr.{name}", description=(description or "").strip().splitlines()[0])


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


def run_folder_given(text: str) -> Path:
    """Value of `--run` of a stage without a configuration: a folder, or the name of one under `outputs`."""
    path = Path(text)
    return path if len(path.parts) != 1 or path.is_dir() else Path("outputs") / path


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
