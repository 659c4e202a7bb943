"""Files of `predict`: a table with a row per image, overlays, and contact sheets.

Columns of `films.csv`, UTF-8 with a header:

- `file`: as it was given, see `cell_of`.
- `status`: `answered`; `questionable`, where it does not look like a frontal chest image; `unreadable`.
- `reason`: why it is one of the latter two. `notes`: what else is worth knowing, such as `16-bit`.
- for each of `labels.LABELS`, in that order, `<label> probability` (calibrated, in [0, 1]), `<label> threshold`,
  `<label> above_threshold` (1 or 0) and `<label> call`: `present`, `absent`, `abstain`, or `untested`, where the
  finding was never annotated or validation has studies of one class only: its figures mean nothing, and are left out.
  Empty for an image that is not answered.

A row is one line, whatever stands in it. While `predict` runs the rows are in `films.part.csv`.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mlx_cxr.core.claim import CLAIM
from mlx_cxr.core.files import told
from mlx_cxr.core.labels import LABELS, MAPPED
from mlx_cxr.data.tables import guarded
from mlx_cxr.evaluation.operating_points import ABSENT, ABSTAIN, PRESENT, STATE_WORDS, OperatingPoints
from mlx_cxr.inference.answers import ImageAnswer
from mlx_cxr.pages.case_page import by_margin
from mlx_cxr.pages.overlay import Tile, draw_overlay, image_tile, map_tile, montage, save_picture
from mlx_cxr.pages.withheld_maps import Reading

log = logging.getLogger("mlx_cxr")

COLUMNS: tuple[str, ...] = (
    "file",
    "status",
    "reason",
    "notes",
    *(f"{label} {what}" for label in LABELS for what in ("probability", "threshold", "above_threshold", "call")),
)
_TILE = 208
_ACROSS, _DOWN = 8, 6
_NOTHING = LABELS.index("No Finding")
TABLE, PART, RECORD, OVERLAYS = "films.csv", "films.part.csv", "predict.json", "overlays"
UNTESTED = "untested"
_OVERLAY, _SHEET = re.compile(r"(\d{5,})_.+\.png"), re.compile(r"contact_sheet_(\d+)\.png")
PER_SHEET = _ACROSS * _DOWN
"""Images of a contact sheet."""


def row_of(answer: ImageAnswer, points: OperatingPoints) -> dict[str, str]:
    """An image's row of `films.csv`."""
    image = answer.image
    row = dict.fromkeys(COLUMNS, "")
    row |= {"file": cell_of(image.name), "status": answer.status, "notes": guarded(_one_line("; ".join(image.notes)))}
    row["reason"] = guarded(_one_line(image.error or "; ".join(image.concerns)))
    if answer.answered:
        words = call_words(answer.states, points)
        for k, label in enumerate(LABELS):
            row[f"{label} call"] = words[k]
            if points.tuned[k]:
                threshold = points.thresholds.values[k]
                row[f"{label} probability"] = f"{answer.probabilities[k]:.6f}"
                row[f"{label} threshold"] = f"{threshold:.6f}"
                row[f"{label} above_threshold"] = str(int(answer.probabilities[k] >= threshold))
    return row


def cell_of(name: str) -> str:
    """A file's name as it stands in `films.csv`: text without control characters, that no spreadsheet computes.

    A backslash is doubled, control characters and bytes that are no UTF-8 are escaped as in Python (`\\n`, `\\xe9`),
    and `./` stands before a name that begins like a formula: two files never have one cell.
    """
    text = _one_line(name.replace("\\", "\\\\"))
    return text if guarded(text) == text else f"./{text}"


def _one_line(text: str) -> str:
    """Text with what is no character of a line (line ends, other controls, undecoded bytes) escaped as in Python."""

    def escape(found: re.Match[str]) -> str:
        # Python decodes a name's byte that is no UTF-8 as one of these.
        return f"\\x{ord(found[0]) - 0xDC00:02x}" if "\udc80" <= found[0] <= "\udcff" else ascii(found[0])[1:-1]

    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", escape, text)


def shown_name(name: str) -> str:
    """A file's name, without its folder, as it stands in pictures: what cannot be printed becomes `?`."""
    return "".join(c if c.isprintable() else "?" for c in Path(name).name)


class ImagesTable:
    """`films.csv` as it grows: each row is written to `films.part.csv` at once, which becomes `films.csv` by `finish`.

    A context, within which rows are added.

    Args:
        folder: gets the table.
        keep: rows of a stopped call's part to go on from; those after them are dropped.

    Attributes:
        statuses: status to rows.
        calls: call to findings of rows.

    Raises:
        OSError: it cannot be written; names the file.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.path, self._part = folder / TABLE, folder / PART
        self._keep = keep
        self.statuses: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> ImagesTable:
        if self._keep:
            for row in rows_of(self._part)[: self._keep]:
                self._count(row)
            os.truncate(self._part, sum(map(len, self._part.read_bytes().splitlines(True)[: self._keep + 1])))
        self._out = self._part.open("a" if self._keep else "w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._out, COLUMNS, lineterminator="\n")
        if not self._keep:
            self._written(self._writer.writeheader)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # of a full disk, which was told of by then
            self._out.close()
        if error is not None:
            log.warning("the rows so far are in %s; --resume goes on with them", self._part)

    def add(self, row: Mapping[str, str]) -> None:
        """Write a row."""
        self._written(self._writer.writerow, row)
        self._count(row)

    def finish(self) -> Path:
        """Make the part the table, once it is on the disk, and return its path."""
        self._written(lambda: os.fsync(self._out.fileno()))
        self._part.replace(self.path)
        return self.path

    def _count(self, row: Mapping[str, str]) -> None:
        self.statuses[row["status"]] += 1
        self.calls.update(filter(None, (row[f"{label} call"] for label in LABELS)))

    def _written(self, write: Callable[..., Any], *rows: Any) -> None:
        with told(self._part):
            write(*rows)
            self._out.flush()


def rows_of(path: Path) -> list[dict[str, str]]:
    """The whole rows of a `films.csv` or of its part; none where there is no such file."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    whole = [line.decode("utf-8", "replace") for line in lines if line.endswith(b"\n")]
    return list(csv.DictReader(whole, COLUMNS, restval=""))[1:]


def remove_pictures(folder: Path, after: int = 0) -> None:
    """Take away overlays and contact sheets of an earlier call, but for those of the first `after` images."""
    for path in (folder / OVERLAYS).glob("*.png"):
        if (found := _OVERLAY.fullmatch(path.name)) and int(found[1]) > after:
            path.unlink()
    for path in folder.glob("contact_sheet_*.png"):
        if (found := _SHEET.fullmatch(path.name)) and int(found[1]) * PER_SHEET > after:
            path.unlink()


def is_ours(path: Path, out: Path) -> bool:
    """True for a file that `predict` wrote into the folder `out`, which may lie among the images."""
    ours = path.name in (TABLE, PART, RECORD, CLAIM) or _SHEET.fullmatch(path.name) is not None
    return path.parent == out / OVERLAYS or (path.parent == out and ours)


def answer_lines(answer: ImageAnswer, points: OperatingPoints) -> list[str]:
    """An image's answer for a terminal, or why there is none."""
    name, image = cell_of(answer.image.name), answer.image
    if image.error:
        return [f"{name}: {_one_line(image.error)}"]
    concerns = f"the film {'; '.join(image.concerns)}"
    if not answer.answered:
        return [f"{name}: not answered, as {concerns}; --ignore_gate answers all the same"]
    lines = [f"{name}:" + (f" {concerns}; answered all the same" if image.concerns else "")]
    lines += [f"  note: {note}" for note in image.notes]
    return lines + call_lines(answer.probabilities, answer.states, points)


def call_lines(probabilities: np.ndarray, states: np.ndarray, points: OperatingPoints) -> list[str]:
    """The 14 findings of an image or a report for a terminal: those called present first, the untested in a line.

    Args:
        probabilities: (14,), calibrated.
        states: (14,), each PRESENT, ABSENT or ABSTAIN.
        points: of the run that gave them.
    """
    order, lines = list(map(STATE_WORDS.get, (PRESENT, ABSTAIN, ABSENT))), []
    tested = [(word, k) for k, word in enumerate(call_words(states, points)) if word != UNTESTED]
    ranks = {k: rank for rank, k in enumerate(by_margin(probabilities, points))}
    for word, k in sorted(tested, key=lambda one: (order.index(one[0]), ranks[one[1]])):
        figures = f"{probabilities[k]:.2f}  (threshold {points.thresholds.values[k]:.2f})"
        why = points.reason(k, float(probabilities[k])) if word == STATE_WORDS[ABSTAIN] else ""
        lines.append(f"  {word:7}  {LABELS[k]:26}  {figures}  {why}".rstrip())
    return lines + [f"  {line}" for line in untested_lines(points)]


def untested_lines(points: OperatingPoints) -> list[str]:
    """The findings of which a run can say nothing, in a line; none where it was tested on all."""
    names = ", ".join(label for label, tested in zip(LABELS, points.tuned, strict=True) if not tested)
    return [f"{UNTESTED}, as validation has no study with it or none without: {names}"] if names else []


def call_words(states: np.ndarray, points: OperatingPoints) -> list[str]:
    """Calls (14,) in words; `UNTESTED` of the findings for which validation could choose no threshold."""
    return [STATE_WORDS[int(state)] if tested else UNTESTED for state, tested in zip(states, points.tuned, strict=True)]


def called_findings(answer: ImageAnswer, points: OperatingPoints) -> list[str]:
    """The findings called present, those furthest above their thresholds first; No Finding is none."""
    return [
        LABELS[k]
        for k in by_margin(answer.probabilities, points)
        if answer.states[k] == PRESENT and LABELS[k] in MAPPED
    ]


def write_overlays(
    folder: Path,
    number: int,
    answer: ImageAnswer,
    points: OperatingPoints,
    maps: Mapping[str, np.ndarray],
    method: str,
    synthetic: bool,
) -> None:
    """Write the image with each map as `<number>_<file>_<finding>.png`.

    Args:
        folder: gets them.
        number: of the image in the table, from 1, as files of different folders may have one name.
        answer: of an image that is answered.
        points: of the run that gave it.
        maps: finding to float32 (h, w), as `Predictor.maps`, by `method`.
        synthetic: the run was trained on the synthetic cohort.
    """
    shown = shown_name(answer.image.name)
    # File systems allow 255 bytes, which a long name of its own may have used up.
    stem = Path(shown).stem.encode()[:100].decode(errors="ignore")
    known = {"image": shown, "method": method, "synthetic": synthetic, "own_image": True}
    for finding, heat in maps.items():
        reading = Reading.of(points, finding, answer.probabilities, **known)
        name = f"{number:05}_{stem}_{finding.replace(' ', '_')}.png"
        save_picture(folder / name, draw_overlay(answer.image.pixels, heat, reading))


class ContactSheets:
    """Pages of 48 images, written one by one as they fill up: `contact_sheet_01.png`, ….

    Each image lies under the map of its called finding that is furthest above its threshold, where there is one.

    Args:
        folder: gets the pages.
        run: name of the run that gives the answers.
        points: the run's.
        synthetic: it was trained on the synthetic cohort.
        pages: that are there already, full.
    """

    def __init__(self, folder: Path, run: str, points: OperatingPoints, synthetic: bool, pages: int = 0) -> None:
        self._folder, self._run, self._points, self._synthetic = folder, run, points, synthetic
        self._tiles: list[Tile] = []
        self._pages = pages

    def add(self, answer: ImageAnswer, heat: np.ndarray | None = None) -> None:
        """Put an image on the page, under a map."""
        self._tiles.append(self._tile(answer, heat))
        if len(self._tiles) == PER_SHEET:
            self.finish()

    def finish(self) -> None:
        """Write the page that is not full yet, where there is one."""
        if not self._tiles:
            return
        self._pages += 1
        title = f"{self._run}: films, page {self._pages}"
        sheet = montage(self._tiles, _ACROSS, title, self._synthetic, own_images=True)
        save_picture(self._folder / f"contact_sheet_{self._pages:02}.png", sheet)
        self._tiles = []

    def _tile(self, answer: ImageAnswer, heat: np.ndarray | None) -> Tile:
        image = answer.image
        name = shown_name(image.name)
        if image.pixels is None:
            return Tile(_worded(Image.new("RGB", (_TILE, _TILE), (40, 44, 52)), name, image.error or ""), "unreadable")
        picture = image_tile(image.pixels, _TILE)
        if not answer.answered:
            dark = picture.point(lambda value: value * 0.35)
            return Tile(_worded(dark, name, "; ".join(image.concerns)), "not answered")
        if heat is not None and np.isfinite(heat).all():
            picture = map_tile(image.pixels, heat, _TILE)
        called, words = called_findings(answer, self._points), "nothing called present"
        if called or answer.states[_NOTHING] == PRESENT:
            first = called[0] if called else LABELS[_NOTHING]
            more = f" +{len(called) - 1}" if len(called) > 1 else ""
            words = f"{answer.probabilities[LABELS.index(first)]:.2f} {first}{more}"
        return Tile(_worded(picture, name, ""), words)


def _worded(tile: Image.Image, name: str, reason: str) -> Image.Image:
    """A tile with an image's name on top, and a reason across it."""
    tile = tile.copy()
    draw = ImageDraw.Draw(tile)
    shown = name if len(name) <= 30 else f"…{name[-29:]}"
    draw.rectangle((0, 0, tile.width, 15), fill=(0, 0, 0))
    draw.text((4, 2), shown, fill=(200, 204, 210))
    lines: Sequence[str] = textwrap.wrap(reason, 32)[:9]
    draw.multiline_text((8, 30), "\n".join(lines), fill=(255, 236, 200), spacing=4)
    return tile
