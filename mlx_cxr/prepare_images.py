"""Decode the manifest's images into the pixel store: `python -m mlx_cxr.prepare_images --config configs/demo.yaml`.

Writes into `data.work_dir`, a sample (`data.n_studies`) into a folder of its own there:
`images_<size>.npy` (uint8 (N, S, S), a row per manifest row) and its index
`images_<size>.json`; where there is something to list, `images_<size>_unreadable.csv` (images that could not be used,
and why), `images_<size>_objections.csv` (images that do not look like frontal chest images, and why; none is left out
for that) and `images_<size>_notes.csv` (images that were 16-bit, palette, …). A stopped run is resumed.
Prints images per second.

More than `pixels.shard_films` images go into several files (`images_<size>-1-of-6.npy`, …). These may be made by
several calls at once, also on several machines that share the disk: start the same command as often as wanted.
Where the disk has no file locks across machines, give each call its share: `--shard 1/4` to `--shard 4/4`.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    import pandas as pd

    from mlx_cxr.core.config import Config
    from mlx_cxr.data.store_writer import StoreReport

log = logging.getLogger("mlx_cxr")


def run(config: Config, rebuild: bool = False, share: tuple[int, int] | None = None) -> Path:
    """Make the pixel store, or find that it is up to date, and return its path.

    Args:
        config: the experiment; its manifest must be there.
        rebuild: decode every image again.
        share: (k, n): of a store in several files, every n-th from the k-th on, and no other.

    Raises:
        DataError: the manifest is missing or has no images, or more than half of them cannot be used.
        OSError: the disk is full or not writable.
    """
    from mlx_cxr.data.decoding import Transform
    from mlx_cxr.data.manifest import load_manifest
    from mlx_cxr.data.store_writer import build_store
    from mlx_cxr.data.tables import DataError

    path = config.pixels_path
    manifest = load_manifest(config.manifest_path)
    if manifest.text_only:
        raise DataError(
            f"{config.manifest_path} has no films to prepare: it is one of reports alone (data.csv.image: null). "
            "A text teacher is trained on it as it is; a model of films needs films"
        )
    transform = Transform.of(config)
    report = build_store(
        path, manifest, transform, config.data.root, config.pixels.workers, rebuild, config.pixels.shard_films, share
    )
    what = f"{path}: {report.images - len(report.unreadable)} of {report.images} films, {transform.key()}"
    if report.decoded:
        rate = report.decoded / report.seconds
        log.info("%s; %d decoded in %.1f s, %.1f films/s", what, report.decoded, report.seconds, rate)
    elif report.images:
        log.info("%s; up to date: manifest, transform and film files are unchanged", what)
    if report.lacking:
        lacking = ", ".join(shard.name for shard in report.lacking)
        log.info("still to be made: %s; the store can be used when they are there", lacking)
    else:
        _write_lists(path, manifest.frame, report)
    return path


def _write_lists(path: Path, frame: pd.DataFrame, report: StoreReport) -> None:
    from mlx_cxr.data.decode_pool import OBJECTION
    from mlx_cxr.data.decoding import INVERTED

    file_of = dict(zip(frame["image_id"], frame["path"], strict=True))
    unreadable = [(image_id, file_of[image_id], reason) for image_id, reason in report.unreadable.items()]
    said = [(image_id, file_of[image_id], note) for image_id, all_of in report.notes.items() for note in all_of]
    notes = [row for row in said if not row[2].startswith(OBJECTION)]
    objections = [(*row[:2], row[2].removeprefix(OBJECTION)) for row in said if row[2].startswith(OBJECTION)]
    listed = _write_list(path.with_name(f"{path.stem}_unreadable.csv"), unreadable, "reason")
    if unreadable:
        log.warning("%d film(s) could not be used and are left out, see %s; the first:", len(unreadable), listed)
        for _, file, reason in unreadable[:3]:
            log.warning("  %s: %s", file, reason)
    listed = _write_list(path.with_name(f"{path.stem}_objections.csv"), objections, "objection")
    if objections:
        counts = Counter(objection for *_, objection in objections)
        log.warning(
            "%d of %d film(s) may be no upright frontal chest films; none is left out for that. See %s: %s",
            len({image_id for image_id, *_ in objections}),
            report.images,
            listed,
            "; ".join(f"{objection} ({n})" for objection, n in counts.most_common()),
        )
    listed = _write_list(path.with_name(f"{path.stem}_notes.csv"), notes, "note")
    if notes:
        counts = Counter(note for _, _, note in notes)
        log.info("notes, see %s: %s", listed, "; ".join(f"{note} ({n})" for note, n in counts.most_common()))
        if counts[INVERTED]:
            log.warning(
                "%d film(s) look like negatives (bone dark); they are kept as they are. Look at them, and invert those "
                "that are. Of 567 real frontal films, 1 was listed wrongly",
                counts[INVERTED],
            )


def _write_list(path: Path, rows: list[tuple[str, str, str]], what: str) -> Path:
    import pandas as pd

    from mlx_cxr.data.tables import write_table

    if rows:
        write_table(path, pd.DataFrame(rows, columns=["image_id", "path", what]))
    else:
        path.unlink(missing_ok=True)
    return path


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("prepare_images", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--workers", type=int, help="pixels.workers: decoding processes; 0 takes one per core")
    parser.add_argument("--rebuild", action="store_true", help="decode every film again, up to date or not")
    parser.add_argument(
        "--shard",
        type=_share,
        metavar="K/N",
        help="of a store in several files make the K-th of N equal shares; default: whatever nobody else is making",
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give K/N with K from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, pixels__workers=args.workers), args.rebuild, args.shard)


if __name__ == "__main__":
    main()
