"""Predict the findings of images: `python -m mlx_cxr.predict --run outputs/student_v1 FILES_OR_FOLDERS --out results/`.

JPEG, PNG, TIFF, BMP and DICOM, whatever their names. Prints the findings of a few images, and of many the counts.
Writes into the folder `--out`: `films.csv`, a row per file (see `prediction_files`), `predict.json` with what it was
made by, and as asked for `overlays/` and `contact_sheet_<n>.png`. A call that was stopped leaves its rows so far in
`films.part.csv`, and `--resume` goes on from there; answers that are there are replaced with `--overwrite` only. A file
that cannot be used gets its reason in the table, and the next one is read. Research only, not for clinical use.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import hash_of, read_record, write_record
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import run_folder_given, stage_parser, started

log = logging.getLogger("mlx_cxr")

METHODS = ("contrast_cam", "grad_cam", "grad_cam_pp", "hires_cam")
"""Of `explain.grad_cam`, named here so that `--help` need not import it."""
_FEW = 3
"""Files whose answers are printed."""


class PredictError(UserError, ValueError):
    """Nothing to answer for, something asked for that the run cannot give, or answers that are there already."""


@claims(lambda run_dir, inputs, out, **_: out)
def run(
    run_dir: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    overlays: int = 0,
    contact_sheet: bool = False,
    method: str = "contrast_cam",
    recipe: str | None = None,
    ignore_gate: bool = False,
    batch_size: int = 32,
    precision: Literal["float32", "auto"] = "float32",
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Answer for all files, and return the path of the table.

    Args:
        run_dir: an evaluated run of a CNN or a student.
        inputs: files, and folders whose files are taken, hidden ones left out.
        out: folder for what is written; made where it is not there.
        overlays: write maps of this many called findings per image.
        contact_sheet: write pages of small images.
        method: of the maps.
        recipe: how a DICOM's values become gray levels: `mimic` or `window`; None for that of the training.
        ignore_gate: answer for images that do not look like frontal chest images too.
        batch_size: images per forward pass.
        precision: as `Predictor` has it.
        resume: go on with a call of the same question that was stopped.
        overwrite: replace the answers that are in `out`.

    Raises:
        PredictError: no files, none that can be read, a run without maps of this method, or answers in `out` that are
            not to be replaced.
        RecordError, ConfigError, ModelFormatError: as `Predictor.from_run`.
        FolderBusyError: another process writes into `out`.
        OSError: the folder cannot be written.
    """
    from tqdm import tqdm

    from mlx_cxr.data.image_files import all_files, file_state
    from mlx_cxr.evaluation.operating_points import FILE as POINTS
    from mlx_cxr.inference.predictor import Predictor
    from mlx_cxr.pages import prediction_files as written

    if overlays < 0:
        raise PredictError(f"--overlays {overlays}: give 0 for none, or the number of findings per film")
    if resume and overwrite:
        raise PredictError("--resume and --overwrite exclude each other: give one of them")
    if not any(map(os.path.lexists, inputs)):
        raise PredictError(f"not found: {_some(written.cell_of(str(path)) for path in inputs)}")
    machine = device.start("predict")
    predictor = Predictor.from_run(run_dir, batch_size, precision)
    recipe = recipe or predictor.transform.recipe
    if (overlays or contact_sheet) and method not in predictor.methods:
        raise PredictError(
            f"{run_dir} has no scale for {method} maps; evaluate it again without --without_maps, or ask for none"
        )
    files, hidden = all_files(inputs, lambda path: written.is_ours(path, out.resolve()))
    if hidden:
        log.info("left out as hidden: %s", _some(written.cell_of(str(path)) for path in hidden))
    if not files:
        raise PredictError(f"no files in {_some(written.cell_of(str(path)) for path in inputs)}")

    settings = {
        "run": predictor.trained.folder.name,
        "overlays": overlays,
        "contact_sheet": contact_sheet,
        "method": method,
        "recipe": recipe,
        "ignore_gate": ignore_gate,
        "precision": precision,
    }
    made_from = {"checkpoint": predictor.trained.checkpoint, "operating_points": predictor.trained.folder / POINTS}
    record = provenance("predict", settings, made_from, machine) | {
        "synthetic": predictor.synthetic,
        "files": len(files),
        "files_sha256": hash_of([file_state(path) for path in files]),
    }
    # Whole batches, as an answer depends on the others of its batch in its last bits; and whole contact sheets.
    at_once = math.lcm(batch_size, written.PER_SHEET if contact_sheet else 1)
    # Of a few films the answers are printed, so that they are read again.
    done = _rows_to_keep(out, record, resume, overwrite, at_once) * (len(files) > _FEW)
    for name in (written.TABLE,) if done else (written.TABLE, written.PART):
        (out / name).unlink(missing_ok=True)
    write_record(out / written.RECORD, record)
    written.remove_pictures(out, done)

    points, synthetic = predictor.points, predictor.synthetic
    pages = done // written.PER_SHEET
    sheets = written.ContactSheets(out, settings["run"], points, synthetic, pages) if contact_sheet else None
    printed: list[str] = []
    begun = time.perf_counter()
    with written.ImagesTable(out, done) as table:
        answers = predictor.predict_files(files[done:], recipe, ignore_gate)
        answers = tqdm(answers, total=len(files), initial=done, unit="film", disable=None)
        for number, answer in enumerate(answers, start=done + 1):
            maps = {}
            if answer.answered and (called := written.called_findings(answer, points)[: max(overlays, contact_sheet)]):
                maps = dict(zip(called, predictor.maps(answer, called, method), strict=True))
            drawn = dict(list(maps.items())[:overlays])
            written.write_overlays(out / written.OVERLAYS, number, answer, points, drawn, method, synthetic)
            if sheets is not None:
                sheets.add(answer, next(iter(maps.values()), None))
            # The row comes last: what a stopped call has no row of is made again.
            table.add(written.row_of(answer, points))
            if len(files) <= _FEW:
                printed += written.answer_lines(answer, points)
        if sheets is not None:
            sheets.finish()
        seconds = time.perf_counter() - begun
        per_second = (len(files) - done) / seconds
        found = {"status": dict(table.statuses), "findings": dict(table.calls), "films_per_second": per_second}
        # Before the table gets its name, with which the call is complete.
        write_record(out / written.RECORD, record | {"computed_in": predictor.computed_in, **found})
        path = table.finish()
    if not table.statuses.keys() - {"unreadable"}:
        none = f"none of the {len(files)} files can be read; {path} says why"
        raise PredictError("\n".join(printed) or none)
    if printed:
        log.info("%s", "\n".join(printed))
    else:
        log.info("%d files in %.1f s, %.1f a second: %s", len(files), seconds, per_second, _counted(table.statuses))
        log.info("findings: %s", _counted(table.calls))
        for line in written.untested_lines(points):
            log.info("%s", line)
    log.info("table in %s. %s", path, footer(synthetic, own_image=True))
    return path


def _rows_to_keep(out: Path, record: Mapping[str, Any], resume: bool, overwrite: bool, at_once: int) -> int:
    """Rows of a stopped call in `out` that this one goes on from, a multiple of `at_once`.

    Raises:
        PredictError: there are answers that it does not go on from, and that are not to be replaced.
        RecordError: `predict.json` does not say of what call they are.
    """
    from mlx_cxr.pages.prediction_files import PART, RECORD, TABLE, rows_of

    finished, done = (out / TABLE).exists(), len(rows_of(out / PART))
    nothing = all(row["status"] == "unreadable" for row in rows_of(out / TABLE)) if finished else not done
    if overwrite or nothing:
        return 0
    if resume:
        earlier = read_record(out / RECORD)
        differs = {
            "had other options": earlier["config"] != record["config"],
            "was of other weights": _hashes(earlier) != _hashes(record),
            "was of other files, or they changed since": earlier["files_sha256"] != record["files_sha256"],
        }
        if any(differs.values()):
            what = next(what for what, differ in differs.items() if differ)
            raise PredictError(f"{out}: the call that is there {what}; --overwrite begins anew")
        if finished:
            raise PredictError(f"{out / TABLE} is complete; --overwrite makes it anew")
        done -= done % at_once
        log.info("going on after %d of %d files", done, record["files"])
        return done
    there = "the answers of an earlier call" if finished else f"{done} rows of a call that was stopped"
    ways = "--overwrite to replace them" if finished else "--resume to go on with them, --overwrite to begin anew"
    raise PredictError(f"{out} holds {there}: give {ways}, or another --out")


def _hashes(record: Mapping[str, Any]) -> dict[str, str]:
    return {role: one["sha256"] for role, one in record["inputs"].items()}


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "none"


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return first + (f" and {len(others)} more" if others else "")


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
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"of the maps; default {METHODS[0]}")
    parser.add_argument(
        "--dicom_recipe",
        choices=("mimic", "window"),
        help="mimic: as MIMIC-CXR-JPG made its films; window: the file's own; default: that of the run's training",
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
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with a call that was stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace the answers that are in --out")
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
            resume=args.resume,
            overwrite=args.overwrite,
        )


if __name__ == "__main__":
    main()
