"""Fetch base weights ahead of time, for a machine that will be offline: `python -m mlx_cxr.fetch_weights`.

Writes `weights/resnet18.tv_in1k.safetensors` and `weights/LFM2.5-VL-1.6B/`, each with a JSON record of its
source, revision, licence, sizes and SHA-256 beside it. Copy the whole folder to the other machine.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mlx_cxr.core.claim import claimed
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.safetensors import safetensors_files
from mlx_cxr.core.stage import stage_parser, started
from mlx_cxr.models import hub

log = logging.getLogger("mlx_cxr")


def run(weights_dir: Path, what: str = "resnet18", from_file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Fetch, check and record weights; files that are there already and pass their check are kept.

    Args:
        weights_dir: their folder; made when missing.
        what: `resnet18`, `lfm` or `all`.
        from_file: a file (`resnet18`) or folder (`lfm`) on this machine to take instead of the hub's.

    Returns:
        Name -> record.

    Raises:
        UserError: `from_file` with `all`, or an unknown `what`.
        WeightsUnavailableError: the hub cannot be reached, or `from_file` does not exist.
        WeightsCorruptError: incomplete or changed files; names each.
        ModelFormatError: a file that is not torchvision's ResNet-18.
    """
    from mlx_cxr.models.convert import fetch_imagenet

    if what not in ("resnet18", "lfm", "all"):
        raise UserError(f"--what {what}: resnet18, lfm or all")
    if what == "all" and from_file is not None:
        raise UserError("--from_file gives one thing; say which with --what resnet18 or --what lfm")
    records = {}
    if what in ("resnet18", "all"):
        records["resnet18"] = fetch_imagenet(weights_dir, from_file)
    if what in ("lfm", "all"):
        records["lfm"] = _fetch_lfm(weights_dir, from_file)
    for record in records.values():
        total = sum(entry["bytes"] for entry in record["files"].values())
        log.info(
            "%s: %d MB from %s (licence: %s)",
            record["name"],
            total // 10**6,
            record["source"],
            record["licence"],
        )
        for name, entry in record["files"].items():
            log.info("  %s  sha256 %s", name, entry["sha256"])
    return records


def _fetch_lfm(weights_dir: Path, local: Path | None) -> dict[str, Any]:

    if local is None and hub.LFM.record_path(weights_dir).exists():
        record = hub.check_record(hub.LFM, weights_dir)
        hub.check_language_model(hub.LFM.path(weights_dir))
        return record
    with claimed(hub.LFM.path(weights_dir)):
        return hub.fetch_folder(hub.LFM, weights_dir, _check_lfm, local)


def _check_lfm(folder: Path) -> None:
    from mlx_cxr.models.weight_files import check_values

    hub.check_language_model(folder)
    for path in safetensors_files(folder):
        check_values(path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("fetch_weights", __doc__)
    parser.add_argument("--weights_dir", type=Path, default=Path("weights"))
    parser.add_argument("--what", choices=("resnet18", "lfm", "all"), default="resnet18")
    parser.add_argument("--from_file", type=Path, help="a file or folder on this machine to take instead")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point; a failure ends with status 2 and one message."""
    with started(build_parser(), argv) as args:
        run(args.weights_dir, args.what, args.from_file)


if __name__ == "__main__":
    main()
