"""From a film's file to the square 8-bit array that models see: decoding, gray levels, geometry.

The same `Transform` serves the pixel store, inference and masks. Gray levels: an 8-bit film is taken as it is; a film
of more bits is scaled from its own lowest to its own highest value to 0..255, fractions cut off, as MIMIC-CXR-JPG
did with its DICOMs (Johnson et al., arXiv:1901.07042; the histogram equalization it did next is not repeated here).
Colour becomes ITU-R 601 luma, transparent parts become black, an EXIF orientation is applied.

A decoding worker imports this module alone, so it needs nothing beyond NumPy and Pillow.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlx_cxr.errors import UserError

Fit = Literal["letterbox", "center_crop"]
Box = tuple[float, float, float, float]

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
"""What is opened at all; among Pillow's other readers are some that start programs."""
_JPEG = ("JPEG", "MPO")
INVERTED = "looks inverted"
"""The note on a film that is more like a negative; see `looks_inverted`."""
MIN_SIDE = 32
MAX_SIDE = 12_000
MAX_PIXELS = 80_000_000
"""Refused by header, before anything is decoded. The largest chest films are about 4300 x 5000."""
MAX_BYTES = 500_000_000
_BLANK_RANGE = 2
"""Gray levels between darkest and brightest: JPEG noise on a uniform image stays within this."""
_TIFF_PHOTOMETRIC = 262
_EXIF_ORIENTATION = 274


class FilmError(UserError, ValueError):
    """A film that cannot be used; the message is the reason, without the path where `decode` raises it."""


@dataclass(frozen=True)
class Transform:
    """How a film of any size becomes a square one.

    Attributes:
        size: side of the result in pixels.
        fit: `letterbox` shows the whole film, centred on black; `center_crop` fills the square with the film's
            central square.
    """

    size: int
    fit: Fit = "letterbox"

    def __post_init__(self) -> None:
        if self.size < 1 or self.fit not in ("letterbox", "center_crop"):
            raise ValueError(f"{self}: size must be positive, fit 'letterbox' or 'center_crop'")

    def plain(self) -> dict[str, str | int]:
        """JSON-ready: everything that the resulting pixels depend on; `version` counts changes of this module."""
        return {"version": 1, "size": self.size, "fit": self.fit}

    def key(self) -> str:
        """One word for `plain()`, such as `letterbox-224-v1`."""
        return "{fit}-{size}-v{version}".format(**self.plain())

    def shown(self, width: int, height: int) -> Box:
        """(left, top, right, bottom) of the part of a film that is seen, in the film's pixels."""
        if self.fit == "letterbox":
            return 0.0, 0.0, float(width), float(height)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def placed(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, width, height) of that part in the square, in its pixels; the rest is black."""
        if self.fit == "center_crop":
            return 0, 0, self.size, self.size
        longest = max(width, height)
        across = max(1, round(width * self.size / longest))
        down = max(1, round(height * self.size / longest))
        return (self.size - across) // 2, (self.size - down) // 2, across, down

    def enlarges(self, width: int, height: int) -> bool:
        """Whether a film has fewer pixels than the square shows of it."""
        return self._film_side(width, height) < self.size

    def reduction(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: the most a JPEG may be reduced while decoding and keep twice the pixels of the result."""
        return next(s for s in (8, 4, 2, 1) if s == 1 or self._film_side(width, height) >= 2 * self.size * s)

    def apply(self, film: np.ndarray) -> np.ndarray:
        """uint8 (H, W) -> uint8 (S, S), antialiased bicubic, on black."""
        image = Image.fromarray(_checked(film, np.uint8))
        return np.asarray(_squared(image, self, image.size, 1)[0])

    def apply_mask(self, mask: np.ndarray) -> np.ndarray:
        """The same geometry for a mask, made so that thin findings stay.

        A pixel belongs to the result where at least half as much of it is covered as of the most covered pixel among
        it and its eight neighbours. Along the edge of anything thicker than two pixels that is the plain rule of half
        the area; a line thinner than a pixel, which that rule would break up or lose, stays whole.

        Args:
            mask: (H, W), non-zero on the finding; H, W are the film's.

        Returns:
            bool (S, S); all False where the mask is empty or lies outside a centre crop.
        """
        mask = _checked(np.asarray(mask) != 0, np.bool_)
        height, width = mask.shape
        left, top, across, down = self.placed(width, height)
        x0, y0, x1, y1 = self.shown(width, height)
        covered = _means(_means(mask, y0, y1, down).T, x0, x1, across).T
        near = np.lib.stride_tricks.sliding_window_view(np.pad(covered, 1), (3, 3)).max(axis=(2, 3))
        out = np.zeros((self.size, self.size), dtype=bool)
        # Differences of sums leave dust of about 1e-12 where nothing is covered.
        out[top : top + down, left : left + across] = (covered > 1e-6) & (covered >= near / 2)
        return out

    def _film_side(self, width: int, height: int) -> int:
        return max(width, height) if self.fit == "letterbox" else min(width, height)


@dataclass(frozen=True)
class Film:
    """A decoded film.

    Attributes:
        pixels: uint8 (S, S).
        notes: what a user may want to know of, in words: `16-bit`, `RGB`, `palette`, `looks inverted`, ….
    """

    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def read_film(path: str | Path, transform: Transform) -> np.ndarray:
    """A film's pixels as every model gets them.

    Returns:
        uint8 (S, S).

    Raises:
        FilmError: the film cannot be used; names the file and the reason.
    """
    try:
        return decode(path, transform).pixels
    except FilmError as error:
        raise FilmError(f"{path}: {error}") from None


def decode(path: str | Path, transform: Transform) -> Film:
    """Decode a film, with notes on anything unusual about it.

    A JPEG much larger than needed is reduced by 2, 4 or 8 in the DCT domain while it is decoded, never below twice
    the size of the result, and is then resized like any other. On films of 2500 x 3000 px this differs from
    decoding in full by 0.15 gray levels on average.

    Raises:
        FilmError: missing, empty, cut short, no image, too small, too large, or blank; the message is the reason.
    """
    data = _read(Path(path))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            if image.format in _JPEG and not _ends(data):
                raise FilmError("cut short: the JPEG has no end marker; download or copy it again")
            return _finished(image, transform)
    except FilmError:
        raise
    except UnidentifiedImageError:
        raise FilmError(_what_it_is(data)) from None
    except Image.DecompressionBombError:
        raise FilmError(f"more than {MAX_PIXELS:,} pixels by its header") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files.
        raise FilmError(f"damaged or cut short ({type(error).__name__}: {error})") from None


def looks_inverted(film: Image.Image) -> bool:
    """Whether a frontal film is more like the negative of a chest than like a chest.

    The sign of the correlation with `_CHEST`. Of the 567 real frontal films in ../shared/realcxr it is wrong about one
    (a film with a black band over its lower third), and, being a sign, about the negative of the same one. One in
    hundreds is too many to change films by, so this only leads to a note. Not measured on lateral films.

    Args:
        film: mode `L`, without padding.
    """
    small = np.asarray(film.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
    return float(((small - small.mean()) * _CHEST).sum()) < 0


_HALF_CHEST = np.array(
    [
        [-10, -8, -5, 0],
        [-1, 0, -4, -1],
        [0, 0, -6, 0],
        [0, -1, -5, 2],
        [-1, -1, -2, 5],
        [-2, 1, 2, 6],
        [-3, 3, 6, 8],
        [-4, 6, 8, 8],
    ]
)
_CHEST = np.hstack([_HALF_CHEST, _HALF_CHEST[:, ::-1]])
"""Mean frontal chest of the real films, 8 x 8, made symmetrical: dark upper corners and lungs, bright mediastinum and
abdomen. The three sources of those films weigh alike; a template from two finds the third as well as this one."""


def _finished(image: Image.Image, transform: Transform) -> Film:
    width, height = image.size
    notes = []
    # Pillow itself turns a TIFF while loading it.
    turned = image.format != "TIFF" and image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    scale = 1
    if image.format in _JPEG and not turned:
        if image.mode != "L":
            notes.append(image.mode)
        scale = transform.reduction(width, height)
        image.draft("L", (width // scale, height // scale))
    if getattr(image, "n_frames", 1) > 1:
        notes.append("several images in the file, the first is used")
    image.load()
    if turned:
        ImageOps.exif_transpose(image, in_place=True)
        notes.append("turned by its EXIF orientation")
    if scale == 1:
        width, height = image.size
    gray = _gray(image, notes)
    low, high = gray.getextrema()
    if high - low <= _BLANK_RANGE:
        raise FilmError(f"blank: every pixel is about {low} of 255")
    square, content = _squared(gray, transform, (width, height), scale)
    if transform.enlarges(width, height):
        notes.append("smaller than the store, enlarged")
    if looks_inverted(content):
        notes.append(INVERTED)
    return Film(np.asarray(square), tuple(dict.fromkeys(notes)))


def _squared(
    gray: Image.Image, transform: Transform, film_size: tuple[int, int], scale: int
) -> tuple[Image.Image, Image.Image]:
    """(the square, the film's part of it) from an `L` image that was reduced by `scale` while decoding."""
    left, top, across, down = transform.placed(*film_size)
    box = tuple(edge / scale for edge in transform.shown(*film_size))
    content = gray.resize((across, down), Image.Resampling.BICUBIC, box=box)
    if content.size == (transform.size, transform.size):
        return content, content
    square = Image.new("L", (transform.size, transform.size))
    square.paste(content, (left, top))
    return square, content


def _means(values: np.ndarray, start: float, stop: float, count: int) -> np.ndarray:
    """(H, W) -> float64 (count, W): means over `count` equal stretches of rows, which may begin within a row.

    Pillow's BOX filter takes whole rows only, and so can miss one between two stretches.
    """
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    edges = np.linspace(start, stop, count + 1)
    row = np.minimum(edges.astype(int), len(values) - 1)
    # The sum of all rows before an edge: those up to its own row, less what of that row lies behind the edge.
    before = sums[row] - (row + 1 - edges)[:, None] * values[row]
    return np.diff(before, axis=0) * (count / (stop - start))


def _gray(image: Image.Image, notes: list[str]) -> Image.Image:
    """An `L` image; says in `notes` what it was made from."""
    if image.mode == "L":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        notes.append({"I": "32-bit", "F": "floating point"}.get(image.mode, "16-bit"))
        inverted = image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
        if inverted:
            notes.append("inverted, as its TIFF header says that white is 0")
        return Image.fromarray(_to_8_bits(np.asarray(image), inverted))
    notes.append({"1": "black and white", "P": "palette"}.get(image.mode, image.mode))
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        gray, alpha = image.convert("RGB").convert("L"), image.getchannel("A")
        return Image.composite(gray, Image.new("L", image.size), alpha)
    return image.convert("RGB").convert("L")


def _to_8_bits(values: np.ndarray, inverted: bool) -> np.ndarray:
    """Lowest value -> 0, highest -> 255, in between cut to whole levels; the other way round where `inverted`."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise FilmError("holds NaN or infinite values")
    wide = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    low, high = wide.min(), wide.max()
    if low == high:
        raise FilmError(f"blank: every pixel is {low}")
    wide = high - wide if inverted else wide - low
    return (wide * 255 // (high - low)).astype(np.uint8)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FilmError(f"{size:,} bytes; no film is larger than {MAX_BYTES:,}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise FilmError("no such file") from None
    except OSError as error:
        raise FilmError(f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise FilmError("empty (0 bytes); download or copy it again")
    return data


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise FilmError(f"{width} x {height} px; shorter than {MIN_SIDE} px")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise FilmError(
            f"{width} x {height} px by its header; more than {MAX_SIDE:,} px long or {MAX_PIXELS:,} px in all"
        )


def _ends(jpeg: bytes) -> bool:
    """Whether an end-of-image marker follows the last scan: a tail of zeros would otherwise decode as gray."""
    return jpeg.endswith(b"\xff\xd9") or jpeg.rfind(b"\xff\xd9") > jpeg.rfind(b"\xff\xda")


def _what_it_is(data: bytes) -> str:
    if data[128:132] == b"DICM":
        return "a DICOM file; convert it to 16-bit PNG or to JPEG first"
    if data.lstrip()[:1] == b"<":
        return "a web page, not an image, such as a log-in page saved by the download; download it again"
    return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"


def _checked(array: np.ndarray, dtype: type) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype != dtype or not array.size:
        raise ValueError(f"expected {np.dtype(dtype)} (H, W), got {array.dtype} {array.shape}")
    return array
