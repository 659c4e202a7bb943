"""Make the built-in synthetic cohort: `python -m mlx_cxr.make_demo_data --config configs/demo.yaml`.

Writes, under `data.root`, images, reports, masks and tables in the layout of MIMIC-CXR-JPG 2.0.0 (see `synthetic`),
with `SYNTHETIC.txt`, which says that nothing in it is real. A cohort that is there already and was made from the same
settings by the same code is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import hash_of, read_json, write_json
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started
from mlx_cxr.core.workers import available_cores

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")

MARKER = "cohort.json"
NOTICE = """\
SYNTHETIC DATA. Nothing here shows or describes a real person.

The films are computer renderings, the reports are generated text, the labels come from that text. The layout is that
of MIMIC-CXR-JPG 2.0.0, so that the real code runs on it; no value was taken from MIMIC-CXR. Not for clinical use, and
no ground for any claim about real radiographs.

Made by `python -m mlx_cxr.make_demo_data`; settings and seed are in cohort.json.
"""


class CohortExistsError(UserError, FileExistsError):
    """Another cohort, or something else, is where this one should go."""


def run(config: Config, overwrite: bool = False, workers: int = 0) -> Path:
    """Make the cohort, and return its folder.

    Args:
        config: `demo`, `seed` and `data.root` matter.
        overwrite: replace a cohort made with other settings (one made by other code is replaced anyway).
        workers: processes; 0 takes one per core. The bytes written do not depend on it.

    Raises:
        CohortExistsError: `data.root` holds another cohort and `overwrite` is false, or holds anything else.
        OSError: the disk is full or not writable.
    """
    from tqdm import tqdm

    from mlx_cxr.synthetic.cohort import plan_cohort
    from mlx_cxr.synthetic.layout import write_images, write_tables

    root = config.data.root
    settings = {"patients": config.demo.patients, "image_size": config.demo.image_size, "seed": config.seed}
    wanted = hash_of({"settings": settings, "code": code_hash()})
    if not _room_for(root, wanted, settings, overwrite):
        log.info("%s is up to date: %s", root, settings)
        return root
    cohort = plan_cohort(config.demo.patients, config.seed)
    images = sum(len(study.images) for study in cohort.studies)
    counts = (images, len(cohort.studies), config.demo.patients)
    log.info("rendering %d films of %d studies of %d patients into %s", *counts, root)
    # Built beside its place and moved there at the end: a killed run leaves the old cohort or none.
    fresh = root.with_name(f".{root.name}-being-made")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tqdm(total=len(cohort.studies), unit="study", desc="films", smoothing=0.05, mininterval=1.0) as bar:
        shapes = write_images(cohort, fresh, config.demo.image_size, workers or available_cores(), bar.update)
    write_tables(cohort, fresh, shapes)
    (fresh / "SYNTHETIC.txt").write_text(NOTICE, encoding="utf-8")
    write_json(
        fresh / MARKER,
        {"schema": 1, "synthetic": True, "hash": wanted, **settings, "studies": len(cohort.studies), "films": images},
    )
    if root.exists():
        shutil.rmtree(root)
    fresh.replace(root)
    log.info("cohort written to %s", root)
    return root


def code_hash() -> str:
    """Hash of the source that decides what is drawn and written."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "synthetic").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _room_for(root: Path, wanted: str, settings: dict[str, int], overwrite: bool) -> bool:
    """True if the cohort is to be made, False if it is there already."""
    if not root.exists() or not any(root.iterdir()):
        return True
    marker = root / MARKER
    if not marker.exists():
        raise CohortExistsError(
            f"{root} holds files that are no synthetic cohort (no {MARKER}); move them, or set another data.root"
        )
    there = read_json(marker)
    if there.get("hash") == wanted:
        return False
    if all(there.get(key) == value for key, value in settings.items()):
        log.info("%s was made by another version of the code; making it again", root)
    elif not overwrite:
        found = ", ".join(f"{key} {there.get(key)}" for key in settings)
        raise CohortExistsError(
            f"{root} holds a cohort made with {found}; pass --overwrite to replace it, or set another data.root"
        )
    return True


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("make_demo_data", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace a cohort made with other settings")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, seed=args.seed), args.overwrite, args.workers)


if __name__ == "__main__":
    main()
