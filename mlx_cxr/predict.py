"""Predict the findings of images: `python -m mlx_cxr.predict --run outputs/student_v1 FILES_OR_FOLDERS --out results/`.

JPEG, PNG, TIFF, BMP and DICOM, whatever their names. Writes into the folder `--out`: `films.csv`, a row per file (see
`prediction_files`), `predict.json` with what it was made by, and as asked for `overlays/` and `contact_sheet_<n>.png`.
Run again, it replaces all of them. A file that cannot be used gets its reason in the table, and the next one is read.
Research only, not for clinical use.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from mlx_cxr.core import device
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import write_json
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import run_folder_given, stage_parser, started

log = logging.getLogger("mlx_cxr")

OVERLAYS = "overlays"
METHODS = ("grad_cam", "grad_cam_pp", "hires_cam")
"""Of `explain.grad_cam`, named here so that `--help` need not import it."""
WRITTEN = re.compile(r"films\.csv|predict\.json|contact_sheet_\d+\.png")


class PredictError(UserError, ValueError):
    """Nothing to answer for, or something asked for that the run cannot give."""


def run(
    run_dir: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    overlays: int = 0,
    contact_sheet: bool = False,
    method: str = "grad_cam",
    recipe: str = "mimic",
    ignore_gate: bool = False,
    batch_size: int = 32,
    precision: Literal["float32", "auto"] = "float32",
) -> Path:
    """Answer for all files, and return the path of the table.

    Args:
        run_dir: an evaluated run of a CNN or a student.
        inputs: files, and folders whose files are taken, hidden ones left out.
        out: folder for what is written; made where it is not there.
        overlays: write maps of this many called findings per image.
        contact_sheet: write pages of small images.
        method: of the maps.
        recipe: how a DICOM's values become gray levels: `mimic` or `window`.
        ignore_gate: answer for images that do not look like frontal chest images too.
        batch_size: images per forward pass.
        precision: as `Predictor` has it.

    Raises:
        PredictError: no files, none that can be read, or a run without maps of this method.
        RecordError, ConfigError, ModelFormatError: as `Predictor.from_run`.
        OSError: the folder cannot be written.
    """
    from tqdm import tqdm

    from mlx_cxr.evaluation.operating_points import STATE_WORDS
    from mlx_cxr.inference.predictor import Predictor
    from mlx_cxr.pages.prediction_files import ContactSheets, called_findings, images_table, row_of, write_overlays

    machine = device.start("predict")
    predictor = Predictor.from_run(run_dir, batch_size, precision)
    if (overlays or contact_sheet) and method not in predictor.methods:
        raise PredictError(
            f"{run_dir} has no scale for {method} maps; evaluate it again without --without_maps, or ask for none"
        )
    files = all_files(inputs, out)
    if not files:
        raise PredictError(f"no files in {', '.join(map(str, inputs))}")
    _remove_earlier(out)
    counts: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    run_name, points, synthetic = predictor.trained.folder.name, predictor.points, predictor.synthetic
    sheets = ContactSheets(out, run_name, points, synthetic) if contact_sheet else None
    most = max(overlays, int(contact_sheet))
    begun = time.perf_counter()
    with images_table(out / "films.csv") as table:
        answers = predictor.predict_files(files, recipe, ignore_gate)
        for number, answer in enumerate(tqdm(answers, total=len(files), unit="film", disable=None), start=1):
            counts[answer.status] += 1
            table.writerow(row_of(answer, points))
            maps = {}
            if answer.answered:
                calls.update(STATE_WORDS[state] for state in answer.states.tolist())
                if called := called_findings(answer, points)[:most]:
                    maps = dict(zip(called, predictor.maps(answer, called, method), strict=True))
                drawn = dict(list(maps.items())[:overlays])
                write_overlays(out / OVERLAYS, number, answer, points, drawn, method, synthetic)
            if sheets is not None:
                sheets.add(answer, next(iter(maps.values()), None))
    if sheets is not None:
        sheets.finish()
    seconds = time.perf_counter() - begun
    made_from = {"checkpoint": predictor.trained.checkpoint}
    settings = {
        "run": run_name,
        "method": method,
        "recipe": recipe,
        "ignore_gate": ignore_gate,
        "precision": predictor.computed_in,
    }
    write_json(
        out / "predict.json",
        {
            **provenance("predict", settings, made_from, machine),
            "synthetic": synthetic,
            "files": len(files),
            "status": dict(counts),
            "findings": dict(calls),
            "films_per_second": len(files) / seconds,
        },
    )
    per_second = len(files) / seconds
    log.info("%d files in %.1f s, %.1f a second: %s", len(files), seconds, per_second, _counted(counts))
    log.info("findings: %s", _counted(calls))
    log.info("table in %s. %s", out / "films.csv", footer(synthetic, own_image=True))
    if not counts.keys() - {"unreadable"}:
        raise PredictError(f"none of the {len(files)} files can be read; {out / 'films.csv'} says why")
    return out / "films.csv"


def all_files(inputs: Iterable[Path], out: Path) -> list[Path]:
    """Files and the files of folders, each once, in order; hidden ones and what was written here are left out.

    A name or a link that leads nowhere stays: its row says so.
    """
    files: dict[Path, None] = {}
    for path in inputs:
        try:
            folder = path.is_dir()
        except OSError:  # such as a name that is too long; reading it will say so
            folder = False
        files |= dict.fromkeys(sorted(_inside(path, out)) if folder else [path])
    return list(files)


def _inside(folder: Path, out: Path) -> Iterator[Path]:
    """Files of a folder and of the folders in it, through links too, each folder once."""
    seen, results = set(), out.resolve()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root).resolve()
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        if here in seen:
            continue
        seen.add(here)
        for name in names:
            path = Path(root) / name
            ours = here == results / OVERLAYS or (here == results and WRITTEN.fullmatch(name))
            if not name.startswith(".") and not ours and (path.is_file() or path.is_symlink()):
                yield path


def _remove_earlier(out: Path) -> None:
    """Take away the pictures of an earlier call, which would stand beside a table that they do not belong to."""
    if not (out / "predict.json").exists():
        return
    for path in (*out.glob("contact_sheet_*.png"), *(out / OVERLAYS).glob("?????_*.png")):
        path.unlink()


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "none"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("predict", __doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="films, or folders of films")
    parser.add_argument(
        "--run",
        required=True,
        type=run_folder_given,
        metavar="RUN",
        help="an evaluated run, such as outputs/student_v1 or student_v1",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--overlays", type=int, nargs="?", const=1, default=0, metavar="N", help="maps of N called findings per film; 1"
    )
    parser.add_argument("--contact_sheet", action="store_true", help="pages of small films with their first call")
    parser.add_argument("--method", choices=METHODS, default="grad_cam", help="of the maps; default grad_cam")
    parser.add_argument(
        "--dicom_recipe",
        choices=("mimic", "window"),
        default="mimic",
        help="mimic: as MIMIC-CXR-JPG made its films, which the models of this package know; window: the file's own",
    )
    parser.add_argument(
        "--ignore_gate", action="store_true", help="answer for what does not look like a chest film too"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="films per forward pass; default 32")
    parser.add_argument(
        "--precision",
        choices=("float32", "auto"),
        default="float32",
        help="float32, which the run was evaluated in; auto: float16 where it is faster here and says the same",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(
            args.run,
            args.inputs,
            args.out,
            overlays=args.overlays,
            contact_sheet=args.contact_sheet,
            method=args.method,
            recipe=args.dicom_recipe,
            ignore_gate=args.ignore_gate,
            batch_size=args.batch_size,
            precision=args.precision,
        )


if __name__ == "__main__":
    main()
