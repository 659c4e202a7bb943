"""Files of `predict`: a table with a row per image, overlays, and contact sheets.

Columns of `films.csv`, UTF-8 with a header:

- `file`: as it was given; `./` is put before a name that a spreadsheet would take for a formula, and bytes that are no
  UTF-8 are written as `\\xNN`.
- `status`: `answered`; `questionable`, where it does not look like a frontal chest image; `unreadable`.
- `reason`: why it is one of the latter two. `notes`: what else is worth knowing, such as `16-bit`.
- for each of `labels.LABELS`, in that order, `<label> probability` (calibrated, in [0, 1]), `<label> threshold`,
  `<label> above_threshold` (1 or 0) and `<label> call`: `present`, `absent` or `abstain`. Empty for an image that is
  not answered.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mlx_cxr.core.files import atomic_path
from mlx_cxr.core.labels import LABELS, MAPPED
from mlx_cxr.evaluation.operating_points import PRESENT, STATE_WORDS, OperatingPoints
from mlx_cxr.inference.answers import ImageAnswer
from mlx_cxr.pages.case_page import by_margin
from mlx_cxr.pages.overlay import Tile, draw_overlay, image_tile, map_tile, montage, save_picture
from mlx_cxr.pages.withheld_maps import Reading

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
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def row_of(answer: ImageAnswer, points: OperatingPoints) -> dict[str, str]:
    """An image's row of `films.csv`."""
    image = answer.image
    row = dict.fromkeys(COLUMNS, "")
    row |= {"file": cell_of(image.name), "status": answer.status, "notes": "; ".join(image.notes)}
    row["reason"] = image.error or "; ".join(image.concerns)
    if answer.answered:
        for k, label in enumerate(LABELS):
            row[f"{label} probability"] = f"{answer.probabilities[k]:.6f}"
            if points.tuned[k]:
                threshold = points.thresholds.values[k]
                row[f"{label} threshold"] = f"{threshold:.6f}"
                row[f"{label} above_threshold"] = str(int(answer.probabilities[k] >= threshold))
            row[f"{label} call"] = STATE_WORDS[int(answer.states[k])]
    return row


def cell_of(name: str) -> str:
    """A file's name as it stands in `films.csv`."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return f"./{text}" if text[:1] in _FORMULA else text


def shown_name(name: str) -> str:
    """A file's name, without its folder, as it stands in pictures: what cannot be printed becomes `?`."""
    return "".join(c if c.isprintable() else "?" for c in Path(name).name)


@contextmanager
def images_table(path: Path) -> Iterator[csv.DictWriter]:
    """A writer of `films.csv`; the file is there when the block ends, also by Ctrl-C, with what it has."""
    stopped = None
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        try:
            yield writer
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
    if stopped is not None:
        raise stopped


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
    """

    def __init__(self, folder: Path, run: str, points: OperatingPoints, synthetic: bool) -> None:
        self._folder, self._run, self._points, self._synthetic = folder, run, points, synthetic
        self._tiles: list[Tile] = []
        self.pages: list[Path] = []

    def add(self, answer: ImageAnswer, heat: np.ndarray | None = None) -> None:
        """Put an image on the page, under a map."""
        self._tiles.append(self._tile(answer, heat))
        if len(self._tiles) == _ACROSS * _DOWN:
            self.finish()

    def finish(self) -> None:
        """Write the page that is not full yet, where there is one."""
        if not self._tiles:
            return
        number = len(self.pages) + 1
        title = f"{self._run}: films, page {number}"
        sheet = montage(self._tiles, _ACROSS, title, self._synthetic, own_images=True)
        self.pages.append(save_picture(self._folder / f"contact_sheet_{number:02}.png", sheet))
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
            words = f"{first} {answer.probabilities[LABELS.index(first)]:.2f}{more}"
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
