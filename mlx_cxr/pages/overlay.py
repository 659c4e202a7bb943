"""Images with their maps as pictures that can be read alone: scale, probability, threshold, label and warning.

The image stands beside the overlay, as the map hides what it lies on. Opacity grows with the map, so that a
region without evidence shows the plain image. The scale is the share of the finding's reference activation
(`maps.scale_maps`), the same for every image. A map is withheld unless the finding is called present
(`Reading.withheld`), as a map of an absent finding misleads; on CheXlocalize (Saporta et al., Nature Machine
Intelligence 2022) gating by the threshold raised the validation mIoU of Grad-CAM for Edema from .063 to .233.

Drawn with Pillow, some tens of milliseconds each. Colours are matplotlib's `plasma`: perceptually uniform,
ordered by lightness, and told apart under the common colour deficiencies; outlines are white on black.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, PngImagePlugin

from mlx_cxr.core.files import atomic_path
from mlx_cxr.core.formatting import NOT_CLINICAL, footer
from mlx_cxr.explain.maps import upsample
from mlx_cxr.pages.withheld_maps import METHOD_NAMES, Reading

_BACKGROUND, _TEXT, _DIM = (16, 18, 22), (238, 240, 243), (165, 171, 180)
_ACCENT, _TRACK = (255, 196, 61), (58, 63, 71)
_MARGIN, _GAP = 20, 14
MAX_OPACITY = 0.72


def draw_overlay(
    image: np.ndarray,
    heat: np.ndarray,
    reading: Reading,
    mask: np.ndarray | None = None,
    side: int = 448,
    show_withheld: bool = False,
) -> Image.Image:
    """One finding on one image: the image, the image under its map, a colour bar, and what was predicted and
    reported.

    Args:
        image: uint8 (S, S), as in the pixel store.
        heat: float (h, w) of `scale_maps`, at any resolution, in the image's frame; 1 is the reference
            activation.
        reading: what is printed, and what gates the map.
        mask: bool or 0/255 (S, S) in the image's frame, drawn as an outline; None draws none.
        side: pixels per panel side, at least 256.
        show_withheld: draw a map that is withheld too; the picture says so of one below its threshold.

    Returns:
        An RGB picture.

    Raises:
        ValueError: shapes or types do not fit, or `side` is too small for the text.
    """
    if side < 256:
        raise ValueError(f"side is {side}; the text needs at least 256")
    why = reading.withheld(heat)
    hidden = bool(why) and not (show_withheld and np.isfinite(heat).all())
    left = _outlined(image_tile(image, side), mask)
    right = _withheld_tile(image, side, why) if hidden else _outlined(map_tile(image, heat, side), mask)

    bar_width = 74
    width = 2 * _MARGIN + 2 * side + 2 * _GAP + bar_width
    top, bottom = 92 + (26 if reading.abstention else 0), 62
    canvas = Image.new("RGB", (width, top + side + bottom), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    room = width - 2 * _MARGIN
    _header(draw, reading, room)
    columns = (_MARGIN, _MARGIN + side + _GAP)
    for at, panel in zip(columns, (left, right), strict=True):
        canvas.paste(panel, (at, top))
    captions = ["film" if mask is None else "film, outline: reference mask", METHOD_NAMES[reading.method]]
    if not hidden:
        captions[1] += f"{'' if reading.above_threshold else ' below threshold'}, peak {np.max(heat):.2f}"
    for at, caption in zip(columns, captions, strict=True):
        draw.text((at, top + side + 8), fitted(caption, 13, side), _DIM, font(13))
    if not hidden:
        _colour_bar(canvas, (columns[1] + side + _GAP, top), side)
    warning = fitted(footer(reading.synthetic, reading.own_image), 13, room)
    draw.text((_MARGIN, top + side + bottom - 24), warning, _ACCENT, font(13))
    return canvas


def _header(draw: ImageDraw.ImageDraw, reading: Reading, room: int) -> None:
    draw.text((_MARGIN, 16), reading.finding, _TEXT, font(24, bold=True))
    used = draw.textlength(reading.finding, font(24, bold=True)) + 24
    image = fitted(reading.image, 13, room - used)
    draw.text((_MARGIN + room, 26), image, _DIM, font(13), anchor="ra")
    summary = fitted(reading.summary(), 15, room)
    draw.text((_MARGIN, 56), summary, _TEXT, font(15))
    if reading.abstention:
        abstains = fitted(f"abstains: {reading.abstention}", 14, room)
        draw.text((_MARGIN, 82), abstains, _ACCENT, font(14))
    if draw.textlength(summary, font(15)) > room - 200:
        return
    x, y, length = _MARGIN + room - 180, 62, 180
    draw.rounded_rectangle((x, y, x + length, y + 8), 4, _TRACK)
    if (filled := round(length * reading.probability)) >= 8:
        draw.rounded_rectangle((x, y, x + filled, y + 8), 4, _ACCENT if reading.above_threshold else _DIM)
    if not math.isnan(reading.threshold):
        tick = x + round(length * reading.threshold)
        draw.line((tick, y - 5, tick, y + 13), _TEXT, 2)


def _colour_bar(canvas: Image.Image, at: tuple[int, int], height: int) -> None:
    """The scale as it looks on a mid-gray image, with ticks at quarters."""
    draw = ImageDraw.Draw(canvas)
    x, y = at
    canvas.paste(Image.fromarray(colour_scale(height, 16)).rotate(90, expand=True), (x, y))
    draw.rectangle((x - 1, y - 1, x + 16, y + height), outline=_DIM)
    for share, text in ((1.0, "≥1"), (0.75, ".75"), (0.5, ".5"), (0.25, ".25"), (0.0, "0")):
        level = y + round((1 - share) * (height - 1))
        draw.line((x + 16, level, x + 20, level), _DIM)
        anchor = {1.0: "la", 0.0: "ls"}.get(share, "lm")
        draw.text((x + 23, level), text, _TEXT, font(12), anchor=anchor)
    captions = ("share of the finding's reference activation", "share of the reference")
    text = next((caption for caption in captions if draw.textlength(caption, font(12)) <= height), "")
    label = Image.new("RGB", (math.ceil(draw.textlength(text, font(12))) + 2, 18), _BACKGROUND)
    ImageDraw.Draw(label).text((0, 1), text, _DIM, font(12))
    label = label.rotate(90, expand=True)
    canvas.paste(label, (x + 56, y + (height - label.height) // 2))


def colour_scale(length: int, width: int, opacity: float = MAX_OPACITY) -> np.ndarray:
    """uint8 (width, length, 3): the colours of maps from 0 to 1, left to right, as they look on a mid-gray image."""
    ramp = np.linspace(0, 1, length, dtype=np.float32)[None].repeat(width, axis=0)
    return _blend(np.full(ramp.shape, 110, np.uint8), ramp, opacity)


def image_tile(image: np.ndarray, side: int) -> Image.Image:
    """An image (S, S) uint8 as an RGB picture of `side` pixels."""
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"film is {image.dtype} {image.shape}; expected uint8 (S, S), as in the pixel store")
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def map_tile(
    image: np.ndarray, heat: np.ndarray, side: int, opacity: float = MAX_OPACITY, seen: int | None = None
) -> Image.Image:
    """An image under its scaled map, as an RGB picture.

    Args:
        image: uint8 (S, S).
        heat: (h, w) of `scale_maps`.
        side: of the picture in pixels.
        opacity: of the colours at the map's full strength, in [0, 1].
        seen: pixels per side of the image that the map was made of, where `image` shows it at another resolution.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise ValueError(f"map has shape {heat.shape} or non-finite values; expected finite (h, w) of scale_maps")
    gray = np.asarray(image_tile(image, side).getchannel(0))
    return Image.fromarray(_blend(gray, upsample(heat, side, image=seen or np.shape(image)[0]), opacity))


def _withheld_tile(image: np.ndarray, side: int, why: str) -> Image.Image:
    tile = image_tile(image, side).point(lambda value: value * 0.3)
    draw = ImageDraw.Draw(tile)
    centre = side // 2
    draw.text((centre, centre - 30), "map withheld", _TEXT, font(20, bold=True), anchor="mm")
    lines = textwrap.fill(why, 30)
    draw.multiline_text((centre, centre + 14), lines, _TEXT, font(15), anchor="mm", align="center", spacing=6)
    return tile


@functools.lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    return (matplotlib.colormaps["plasma"](np.linspace(0.08, 1.0, 256))[:, :3] * 255).astype(np.float32)


def _blend(gray: np.ndarray, heat: np.ndarray, most: float = MAX_OPACITY) -> np.ndarray:
    """uint8 (H, W, 3): the gray image under colours whose opacity grows with the map, from none at 0."""
    heat = np.clip(heat, 0.0, 1.0)
    opacity = (most * heat**0.7)[..., None]
    colour = _colours()[np.rint(heat * 255).astype(np.uint8)]
    return (gray[..., None] * (1 - opacity) + colour * opacity + 0.5).astype(np.uint8)


def _outlined(tile: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """The tile with a mask's border in white, cased in black so that it shows on any ground."""
    if mask is None:
        return tile
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {mask.shape}; expected (S, S) in the film's frame")
    double = tile.width * 2, tile.height * 2
    inside = Image.fromarray((mask > 0).astype(np.uint8) * 255).resize(double, Image.Resampling.BILINEAR)
    inside = inside.filter(ImageFilter.BoxBlur(2)).point(lambda v: 255 if v > 127 else 0)
    # A blurred pixel that is not 0 has the mask within reach: a dilation, ten times as fast as Pillow's.
    line, casing = (inside.filter(ImageFilter.BoxBlur(reach)).point(lambda v: 255 if v else 0) for reach in (3, 4))
    cased = tile.copy()
    for outer, colour in ((casing, (0, 0, 0)), (line, (255, 255, 255))):
        ring = ImageChops.subtract(outer, inside).resize(tile.size, Image.Resampling.BOX)
        cased.paste(colour, (0, 0), ring)
    return cased


@dataclass(frozen=True)
class Tile:
    """One cell of a montage: a picture and the line under it."""

    image: Image.Image
    caption: str


def montage(
    tiles: Sequence[Tile],
    columns: int,
    title: str = "",
    synthetic: bool = False,
    scale: bool = True,
    own_images: bool = False,
) -> Image.Image:
    """A grid of captioned pictures, row by row, with the colour bar and the warning.

    Args:
        tiles: all of one size; `image_tile` and `map_tile` make them.
        columns: tiles per row.
        title: a line above, or empty.
        synthetic: the model was trained on the synthetic cohort; the footer then says so.
        scale: draw the colour bar beside the first row; False where no tile shows a map.
        own_images: the images are a user's, not the cohort's.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no tiles, tiles of different sizes, or no columns.
    """
    sizes = {tile.image.size for tile in tiles}
    if len(sizes) != 1 or columns < 1:
        raise ValueError(f"a montage needs at least one column and tiles of one size; got {columns}, {sorted(sizes)}")
    tile_width, tile_height = sizes.pop()
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    line = 34
    width = 2 * _MARGIN + columns * tile_width + (columns - 1) * _GAP + (_GAP + 74 if scale else 0)
    warning = wrapped(footer(synthetic, own_images), 13, width - 2 * _MARGIN)
    titles = wrapped(title, 22, width - 2 * _MARGIN, bold=True) if title else []
    top = 34 + 28 * len(titles) if titles else _MARGIN
    height = top + rows * (tile_height + line) + 28 + 18 * len(warning)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, words in enumerate(titles):
        draw.text(
            (_MARGIN, 18 + 28 * number), fitted(words, 22, width - 2 * _MARGIN, bold=True), _TEXT, font(22, bold=True)
        )
    for number, tile in enumerate(tiles):
        x = _MARGIN + number % columns * (tile_width + _GAP)
        y = top + number // columns * (tile_height + line)
        canvas.paste(tile.image, (x, y))
        draw.text((x, y + tile_height + 7), fitted(tile.caption, 14, tile_width), _TEXT, font(14))
    if scale:
        _colour_bar(canvas, (width - _MARGIN - 74, top), tile_height)
    for number, words in enumerate(reversed(warning)):
        draw.text((_MARGIN, height - 32 - 18 * number), words, _ACCENT, font(13))
    return canvas


def save_picture(path: str | Path, picture: Image.Image) -> Path:
    """Write a PNG atomically, with the warning in its metadata too, and return the path.

    Raises:
        ValueError: the name does not end in `.png`.
        OSError: it cannot be written; what was there before is kept.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as .png")
    note = PngImagePlugin.PngInfo()
    note.add_text("Warning", NOT_CLINICAL)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=3, pnginfo=note)
    return path


@functools.lru_cache(maxsize=16)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings, so that pictures look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrapped(text: str, size: int, room: float, bold: bool = False) -> list[str]:
    """The text as lines, broken between words, that are no wider than `room` pixels unless a word is."""
    face, lines = font(size, bold), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def fitted(text: str, size: int, room: float, bold: bool = False) -> str:
    """The text, cut with an ellipsis where it is wider than `room` pixels."""
    # A letter takes more than a pixel.
    face, text = font(size, bold), text[: int(room)]
    if face.getlength(text) <= room:
        return text
    while text and face.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…" if text else ""
