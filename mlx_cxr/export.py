"""Export a run for use without this package: `python -m mlx_cxr.export --run outputs/student_v1 --to DIR`.

The run is an evaluated CNN's or student's. Writes into the folder `model.safetensors` (this package's layout),
`model.torchvision.safetensors`, `config.json`, `preprocessing.json`, `operating_points.json`, `labels.json`,
`MODEL_CARD.md`, `model_card.json`, `use_with_pytorch.py` and `SHA256SUMS`. Local paths and user names stay behind.
Weights of credentialed data may not be passed on, and the command says so.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core.claim import claimed
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import sha256_file, write_json, write_text
from mlx_cxr.core.runs import open_run
from mlx_cxr.core.stage import run_folder_given, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.inference.evaluated_run import EvaluatedRun

log = logging.getLogger("mlx_cxr")

OPERATING_POINTS, SUMS = "operating_points.json", "SHA256SUMS"
PYTORCH_SCRIPT = Path(__file__).parent / "publishing" / "use_with_pytorch.py"
"""Runs in the exported folder, on PyTorch alone; nothing in this package imports it."""
FILES = (
    *("model.safetensors", "model.torchvision.safetensors", "config.json", "preprocessing.json"),
    *(OPERATING_POINTS, "labels.json", "MODEL_CARD.md", "model_card.json", PYTORCH_SCRIPT.name, SUMS),
)
"""All that an export holds."""
_LITTER = (".DS_Store",)
"""Files that a file manager leaves in a folder that it shows, and makes again."""


CONTENTS = """
## Files

- `model.safetensors`: the weights for this package (`mlx_cxr.models.convert.load_model`), bit for bit as evaluated.
- `model.torchvision.safetensors`: the same under torchvision's names and in its layout; `use_with_pytorch.py` reads
  films with it.
- `preprocessing.json`, `labels.json`, `operating_points.json`: from a film's file to the network's input, the 14
  logits, and how they become calls.
- `config.json`: the run's configuration and record. `model_card.json`: this card as data.
- `SHA256SUMS`: check the folder with `shasum -a 256 -c SHA256SUMS`.
"""
"""The part of an export's `MODEL_CARD.md` that follows the card."""


class ExportError(UserError, ValueError):
    """A folder that cannot take an export."""


def run(run_dir: str | Path, to: str | Path, overwrite: bool = False) -> Path:
    """Export a run, and return the folder.

    The folder appears in one step, when all of it is written; a killed export leaves none, or the one that was there.

    Args:
        run_dir: the run's folder.
        to: the folder to make.
        overwrite: replace an earlier export; a folder that holds anything else is refused.

    Raises:
        RecordError: the run is no evaluated CNN's or student's, or changed since its evaluation.
        ExportError: `to` is in the run's folder, or there already.
        FolderBusyError: another process writes into the folder around `to`.
        OSError: the folder cannot be written.
    """
    from mlx_cxr.inference.evaluated_run import EvaluatedRun
    from mlx_cxr.publishing.model_card import model_card

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A link is followed, so that the folder it points at is replaced, and not the link.
    source, target = Path(run_dir).resolve(), Path(to).resolve()
    if target == source or source in target.parents:
        raise ExportError(f"{to} is in the run's folder {run_dir}; give another place for the export")
    _refuse_occupied(target, overwrite)
    if open_run(source).kind == "teacher":
        raise ExportError(
            f"{run_dir} is a teacher's run. Its folder adapter_weights/ is the export already: mlx-vlm loads "
            "adapters.safetensors with adapter_config.json onto the base that teacher.json names"
        )
    evaluated = EvaluatedRun.open(run_dir)
    card = model_card(evaluated)
    with claimed(target.parent):
        temporary = _sibling(target)
        try:
            _fill(temporary, evaluated, card)
            _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _sweep(target)
    log.info("%s exported to %s; begin with %s", evaluated.name, target, target / "MODEL_CARD.md")
    if evaluated.credentialed:
        log.warning("WARNING: %s", " ".join(card["sharing"]["terms"]))
    elif not evaluated.synthetic:
        log.warning("Before it leaves your institution: %s", " ".join(card["sharing"]["terms"]))
    return target


def _fill(folder: Path, evaluated: EvaluatedRun, card: Mapping[str, Any]) -> None:
    """Write all `FILES` into a new folder, the sums last."""
    from mlx_cxr.models.convert import export_torchvision, load_model
    from mlx_cxr.publishing.export_files import labels_file, preprocessing_file, public_record
    from mlx_cxr.publishing.model_card_page import card_markdown

    folder.mkdir()
    shutil.copyfile(evaluated.checkpoint, folder / "model.safetensors")
    export_torchvision(folder / "model.torchvision.safetensors", load_model(folder / "model.safetensors"))
    write_json(folder / "config.json", public_record(evaluated))
    write_json(folder / "preprocessing.json", preprocessing_file(evaluated))
    shutil.copyfile(evaluated.folder / OPERATING_POINTS, folder / OPERATING_POINTS)
    write_json(folder / "labels.json", labels_file(evaluated, card["data"]["label_origin"]))
    write_text(folder / "MODEL_CARD.md", card_markdown(card) + CONTENTS)
    write_json(folder / "model_card.json", card)
    shutil.copyfile(PYTORCH_SCRIPT, folder / PYTORCH_SCRIPT.name)
    sums = {name: sha256_file(folder / name) for name in FILES if name != SUMS}
    if sums["model.safetensors"] != evaluated.checkpoint_sha256:
        raise ExportError(f"{evaluated.checkpoint} changed while it was exported; export again")
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    for name in FILES:
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())


def _refuse_occupied(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; give a folder")
    there = {path.name for path in target.iterdir()} if target.exists() else set()
    if foreign := sorted(there - {*FILES, *_LITTER}):
        raise ExportError(
            f"{target} holds what no export wrote ({', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}), and "
            "nothing of others is ever deleted; give another folder"
        )
    if there - {*_LITTER} and not overwrite:
        raise ExportError(f"{target} holds an export already; give another folder, or --overwrite to replace it")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished folder over what `_refuse_occupied` let pass."""
    old = _sibling(target)
    if target.exists():
        _refuse_occupied(target, overwrite=True)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    for name in (*FILES, *_LITTER):
        (old / name).unlink(missing_ok=True)
    if old.exists():
        old.rmdir()


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")


def _sweep(target: Path) -> None:
    """Remove what killed exports to this folder left beside it."""
    sibling = re.compile(re.escape(f".{target.name}-") + "[0-9a-f]{8}")
    for path in target.parent.iterdir():
        if (
            sibling.fullmatch(path.name)
            and path.is_dir()
            and {item.name for item in path.iterdir()} <= {*FILES, *_LITTER}
        ):
            shutil.rmtree(path, ignore_errors=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("export", __doc__)
    parser.add_argument(
        "--run", required=True, type=run_folder_given, metavar="RUN", help="an evaluated run: its folder or its name"
    )
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(args.run, args.to, args.overwrite)


if __name__ == "__main__":
    main()
