"""Make the built-in synthetic cohort: `python -m mlx_cxr.make_demo_data --config configs/demo.yaml`.

Writes, under `data.root`, images, reports, masks and tables in the layout of MIMIC-CXR-JPG 2.0.0 (see `synthetic`),
with `SYNTHETIC.txt`, which says that nothing in it is real. A whole cohort that is there already and was made from the
same settings by the same code is left as it is. It is made beside its place and moved there at the end: a killed run
leaves the old cohort or the new one.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core.claim import claimed
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, hash_of, read_json, sha256_file, told, write_json
from mlx_cxr.core.runs import runs_that_read
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


def _being_made(config: Config) -> Path:
    """The claimed folder, beside its place, in which a cohort is rendered, and from which it is moved there."""
    root = config.data.root.resolve()
    return root.with_name(f".{root.name}-being-made")


def run(config: Config, overwrite: bool = False, workers: int = 0) -> Path:
    """Make the cohort, and return its folder.

    Args:
        config: `demo`, `seed` and `data.root` matter.
        overwrite: replace a cohort made with other settings, or one made by other code that runs were trained on.
        workers: processes; 0 takes one per core. The bytes written do not depend on it.

    Raises:
        CohortExistsError: `data.root` holds another cohort and `overwrite` is false, or holds anything else.
        FolderBusyError: another process is making it.
        OSError: the disk is full or not writable.
    """
    with claimed(_being_made(config)) as out:
        root = _made(config, out, overwrite, workers)
    with suppress(OSError):  # Of a killed run; a claim removes what it made itself.
        out.rmdir()
    return root


def _made(config: Config, out: Path, overwrite: bool, workers: int) -> Path:
    root = config.data.root
    settings = config.demo.model_dump() | {"seed": config.seed}
    wanted = hash_of({"settings": settings, "code": code_hash()})
    fresh, old = out / "new", out / "old"
    # A run that was killed between the two renamings below left both cohorts here.
    if old.exists() and not root.exists():
        old.replace(root)
    if not _room_for(config, wanted, settings, overwrite):
        log.info("%s is up to date: %s", root, settings)
        _empty(out)
        return root
    if _whole(fresh, wanted):
        log.info("%s was rendered by a run that was killed then", fresh)
    else:
        _empty(out)
        _render(config, fresh, {"schema": 1, "synthetic": True, "hash": wanted, **settings}, workers)
    # Renamed, the old one is there whole or not at all, whenever this is killed.
    if root.exists():
        root.resolve().replace(old)
    fresh.replace(root.resolve())
    _empty(out)
    log.info("cohort written to %s", root)
    return root


def _render(config: Config, folder: Path, about: dict[str, Any], workers: int) -> None:
    """The whole cohort in a new folder; its marker comes last."""
    from tqdm import tqdm

    from mlx_cxr.synthetic.cohort import plan_cohort
    from mlx_cxr.synthetic.layout import write_images, write_tables

    cohort = plan_cohort(config.demo.patients, config.seed)
    if not config.demo.laterals:
        cohort = cohort.frontal()
    images = sum(len(study.images) for study in cohort.studies)
    counts = (images, len(cohort.studies), config.demo.patients)
    log.info("rendering %d films of %d studies of %d patients into %s", *counts, config.data.root)
    with told(folder):
        folder.mkdir()
        with tqdm(total=len(cohort.studies), unit="study", desc="films", smoothing=0.05, mininterval=1.0) as bar:
            shapes = write_images(cohort, folder, config.demo.image_size, workers or available_cores(), bar.update)
        write_tables(cohort, folder, shapes)
        (folder / "SYNTHETIC.txt").write_text(NOTICE, encoding="utf-8")
    about |= {"studies": len(cohort.studies), "films": images, **_extent(folder)}
    write_json(folder / MARKER, about)


def _extent(folder: Path) -> dict[str, int]:
    """Number and total size of a cohort's images, reports, masks and tables."""
    found = [*folder.glob("*.csv.gz"), *(folder / "files").rglob("*"), *(folder / "masks").rglob("*")]
    sizes = [path.stat().st_size for path in found if path.is_file() and not path.name.startswith(".")]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _whole(folder: Path, wanted: str) -> bool:
    """True if a folder holds the cohort of this hash with all its files."""
    try:
        about = read_json(folder / MARKER)
        return about["hash"] == wanted and {key: about[key] for key in ("files", "bytes")} == _extent(folder)
    except (RecordError, KeyError, TypeError):
        return False


def _empty(folder: Path) -> None:
    for part in ("new", "old"):
        if (folder / part).exists():
            shutil.rmtree(folder / part)


def code_hash() -> str:
    """Hash of the source that decides what is drawn and written."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "synthetic").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _room_for(config: Config, wanted: str, settings: dict[str, Any], overwrite: bool) -> bool:
    """True if the cohort is to be made, False if it is there already."""
    root = config.data.root
    marker = root / MARKER
    if not root.exists() or not any(root.iterdir()):
        return True
    if not marker.exists():
        raise CohortExistsError(
            f"{root} holds files that are no synthetic cohort (no {MARKER}); move them, or set another data.root"
        )
    if _whole(root, wanted):
        return False
    if overwrite:
        return True
    instead = "pass --overwrite to replace it, or set another data.root"
    try:
        there = {"laterals": True, **read_json(marker)}  # Older ones do not say that they have them.
    except (RecordError, ValueError, TypeError) as error:
        raise CohortExistsError(f"{error}; {instead}") from None
    if there.get("hash") == wanted:
        found, known = _extent(root), (there.get("files"), there.get("bytes"))
        log.info("%s has %d files of %d bytes, made were %s of %s; making it again", root, *found.values(), *known)
    elif any(there.get(key) != value for key, value in settings.items()):
        found = ", ".join(f"{key} {there.get(key)}" for key in settings)
        raise CohortExistsError(f"{root} holds a cohort made with {found}; {instead}")
    elif runs := _trained_on_it(config):
        raise CohortExistsError(
            f"{root} was made by another version of the code, and {', '.join(map(str, runs[:3]))} were trained on it; "
            f"{instead}"
        )
    else:
        log.info("%s was made by another version of the code; making it again", root)
    return True


def _trained_on_it(config: Config) -> list[Path]:
    manifest = config.manifest_path
    return runs_that_read(config.outputs, sha256_file(manifest)) if manifest.exists() else []


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
