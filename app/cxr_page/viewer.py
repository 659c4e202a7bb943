"""The image under the map of a finding, its scale, and why a map is withheld."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from cxr_page.chart import rows_of
from cxr_page.images import SHOWN_SIDE, CaseImage, pixels_of, png
from cxr_page.look import block, esc, note, picture
from cxr_page.models import Opened, maps
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record
from mlx_cxr.core.labels import LABELS, MAPPED
from mlx_cxr.evaluation.map_verdict import map_verdict
from mlx_cxr.evaluation.operating_points import PRESENT
from mlx_cxr.inference.answers import ImageAnswer
from mlx_cxr.pages.map_checks import CONTROL_NAMES
from mlx_cxr.pages.overlay import MAX_OPACITY, colour_scale, image_tile, map_tile
from mlx_cxr.pages.withheld_maps import METHOD_NAMES, Reading

SAME_METHODS = (
    "This network ends in average pooling and one linear layer, so Grad-CAM and HiResCAM give the same map by "
    "construction; Grad-CAM++ weighs the cells differently. Against the mean film a map shows what other films lack."
)


@dataclass(frozen=True)
class View:
    """The reader's choice of map and image.

    Attributes:
        finding: of `MAPPED`, or No Finding.
        method: a key of `METHOD_NAMES`.
        opacity: of the map at full strength, in [0, 1].
        show_withheld: draw a map that is withheld too.
        as_seen: at the network's own resolution.
    """

    finding: str
    method: str = "contrast_cam"
    opacity: float = MAX_OPACITY
    show_withheld: bool = False
    as_seen: bool = False


def likeliest(opened: Opened, said: ImageAnswer) -> str:
    """The finding called present with the highest probability; where none is, the first of the chart.

    No Finding, which has no map, is passed over.
    """
    called = [k for k in range(len(LABELS)) if int(said.states[k]) == PRESENT and LABELS[k] in MAPPED]
    if called:
        return LABELS[max(called, key=lambda k: float(said.probabilities[k]))]
    rows = rows_of(said.probabilities, said.states, opened.model.points)
    return next(row.finding for row in rows if row.finding in MAPPED)


def heat_of(opened: Opened, image: CaseImage, answer: ImageAnswer, view: View) -> np.ndarray | None:
    """The map (h, w) of the finding; None where the run or the finding has none."""
    if view.method not in opened.model.methods or view.finding not in MAPPED:
        return None
    return maps(opened, answer, image.key, view.method)[view.finding]


def show_image(opened: Opened, image: CaseImage, answer: ImageAnswer, view: View) -> None:
    """The image with or without its map, the scale, and what is to be said of them."""
    seen = answer.image
    finer = None if view.as_seen else pixels_of(image, replace(opened.model.transform, size=SHOWN_SIDE))
    pixels = seen.pixels if finer is None else finer
    heat = heat_of(opened, image, answer, view)
    why = Reading.of(opened.model.points, view.finding, answer.probabilities).withheld(heat)
    drawable = heat is not None and np.isfinite(heat).all()
    if not drawable or (why and not view.show_withheld):
        block(
            f'<div role="status"><b>{esc(view.finding)}: no map is shown.</b> Reason: {esc(why)}.'
            + (" “Show withheld maps” shows it all the same." if drawable else "")
            + "</div>"
        )
        picture(png(image_tile(pixels, SHOWN_SIDE)), f"Chest film {image.name}, without a map")
        return
    if why:
        block(f'<div role="status"><b>Shown on request.</b> The map is otherwise withheld: {esc(why)}.</div>')
    else:
        strength = f"peak {heat.max():.2f}, {_peak(heat)}" if heat.any() else "the map is empty"
        name = f"<b>{esc(view.finding)}</b>: {esc(METHOD_NAMES[view.method])}"
        block(f'<div role="status">{name}; {strength}.</div>')
        note(evidence(opened, view.finding))
    picture(
        png(map_tile(pixels, heat, SHOWN_SIDE, view.opacity, seen=seen.pixels.shape[0])),
        f"Chest film {image.name} under the {METHOD_NAMES[view.method]} map of {view.finding} by {opened.name}; "
        f"the map is strongest {_peak(heat)}",
    )
    _scale(view.opacity)


def _peak(heat: np.ndarray) -> str:
    """Place of a map's maximum in words; a frontal image shows the patient's right on the picture's left."""
    if not heat.any():
        return "nowhere"
    row, column = np.unravel_index(int(np.argmax(heat)), heat.shape)
    height = ("in the upper third", "at mid height", "in the lower third")[min(3 * row // heat.shape[0], 2)]
    sides = (
        "on the left of the picture (the patient's right)",
        "in the middle",
        "on the right of the picture (the patient's left)",
    )
    return f"{sides[min(3 * column // heat.shape[1], 2)]}, {height}"


def evidence(opened: Opened, finding: str) -> str:
    """A sentence on the maps of a finding beside their strongest control, from the run's `localization.json`."""
    path = opened.model.trained.folder / "localization.json"
    try:
        entry = read_record(path)["per_label"].get(finding) if path.exists() else None
        if entry is None:
            return "Where this run's maps of the finding point was not tested, for want of films with its place marked."
        images, hits, against = entry["films"], entry["hit"]["maps"]["value"], map_verdict(entry)
        said = (
            f"On {images} test films with the finding, maps peaked on it in {hits:.0%}, "
            f"{CONTROL_NAMES[against.control]} in {against.mean:.0%}"
        )
    except (UserError, KeyError, TypeError, AttributeError):
        return ""
    return f"{said}." if against.better else f"{said}: do not take it as evidence of the place."


def _scale(opacity: float) -> None:
    """The map's colours as they look on a mid-gray image."""
    content = base64.b64encode(png(Image.fromarray(colour_scale(256, 8, opacity)))).decode()
    block(
        f'<div class="cxr-bar" role="img" aria-label="Colour scale of the map, from 0 to 1 and above, '
        f'in shares of the finding\'s reference activation"><img alt="" src="data:image/png;base64,{content}">'
        '<div class="cxr-axis"><span>0</span><span>.25</span><span>.5</span><span>.75</span><span>≥1</span></div>'
        '<div class="cxr-note">share of the finding’s reference activation on validation; the same scale for every '
        "film</div></div>"
    )
