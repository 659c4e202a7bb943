"""From an image's file to a square 8-bit gray image: decoding, gray levels, geometry.

Gray levels: an 8-bit image is taken as it is; an image of more bits is scaled from its own lowest to its own highest
value to 0..255, fractions cut off, as MIMIC-CXR-JPG did with its DICOMs (Johnson et al., arXiv:1901.07042; the
histogram equalization it did next is not repeated here, but see `dicom`). Colour becomes ITU-R 601 luma, transparent
parts become black, an EXIF orientation is applied. A file that would take very long is refused by its header.

A file's content decides what it is, never its name. Whatever its bytes are, it decodes or raises `ImageError`.

This is all that a decoding worker imports, so it keeps to Pillow: a worker starts in half the time without NumPy, which
only DICOMs, images of more than 8 bits and `chest_film_gate` need.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from PIL import Image, ImageOps, UnidentifiedImageError

from mlx_cxr.data.file_types import is_dicom, unsupported
from mlx_cxr.data.image_limits import MAX_BYTES, MAX_PIXELS, ImageError, Recipe, check_scans, check_size
from mlx_cxr.data.quiet import quiet_decoders

if TYPE_CHECKING:
    import numpy as np

    from mlx_cxr.core.config import Config

Fit = Literal["letterbox", "center_crop"]

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
"""All that Pillow may open: some of its other readers start programs. DICOMs are read by `dicom`."""
_JPEG = ("JPEG", "MPO")
INVERTED = "looks inverted"
"""The note on an image that is more like a negative; see `looks_inverted`."""
_BLANK_RANGE = 2
"""Gray levels between darkest and brightest: JPEG noise on a uniform image stays within this."""
_GRAY_MODES = ("1", "L", "LA", "I", "F")
_AGAIN = "; download or copy it again"
_NOT_WHOLE = "colours of more than 8 bits in a form that is not read whole here; save it as gray PNG"
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
EXIF_ORIENTATION = 274


@dataclass(frozen=True)
class Transform:
    """The way from an image of any size to a square one.

    Attributes:
        size: side of the result in pixels.
        fit: `letterbox` shows the whole image, centred on black; `center_crop` fills the square with the image's
            central square.
        recipe: how a DICOM's values become gray levels; see `dicom`.
    """

    size: int
    fit: Fit = "letterbox"
    recipe: Recipe = "mimic"

    def __post_init__(self) -> None:
        if self.size < 1 or self.fit not in get_args(Fit) or self.recipe not in get_args(Recipe):
            fits, recipes = (" or ".join(map(repr, get_args(kind))) for kind in (Fit, Recipe))
            raise ValueError(f"{self}: size must be positive, fit {fits}, recipe {recipes}")

    @classmethod
    def of(cls, config: Config) -> Transform:
        """That of an experiment's images, in training and at inference."""
        return cls(config.pixels.size, config.pixels.fit, config.dicom_recipe)

    def plain(self) -> dict[str, str | int]:
        """JSON-ready: everything that the resulting pixels depend on; `version` counts changes of this module.

        The recipe stands there where it is not `mimic`, which was once the only one.
        """
        plain: dict[str, str | int] = {"version": 1, "size": self.size, "fit": self.fit}
        return plain if self.recipe == "mimic" else plain | {"dicom_recipe": self.recipe}

    def key(self) -> str:
        """One word for `plain()`, such as `letterbox-224-v1` or `letterbox-224-v1-window`."""
        return "-".join(map(str, (self.fit, self.size, "v1", *(self.recipe,) * (self.recipe != "mimic"))))

    def shown(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the part of an image that is seen, in the image's pixels."""
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
        """True for an image that has fewer pixels than the square shows of it."""
        return self._image_side(width, height) < self.size

    def reduction(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: the most a JPEG may be reduced while decoding and keep twice the pixels of the result."""
        return next(s for s in (8, 4, 2, 1) if s == 1 or self._image_side(width, height) >= 2 * self.size * s)

    def _image_side(self, width: int, height: int) -> int:
        return max(width, height) if self.fit == "letterbox" else min(width, height)


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        gray: mode `L`, `size` x `size`.
        notes: what a user may want to know, in words: `16-bit`, `RGB`, `palette`, `looks inverted`, ….
        concerns: why it does not look like an upright frontal chest image, each in words that complete "the film …";
            see `chest_film_gate`. Empty where nothing speaks against it, or where it was not inspected.
    """

    gray: Image.Image
    notes: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Opened:
    """An image before it becomes square.

    Attributes:
        gray: mode `L`.
        size: (width, height) of the image.
        scale: by which `gray` is smaller than that.
        reduces: a transform to a smaller square may decode it at a larger scale, as of a JPEG.
        recipe: that of a DICOM.
        colour: mode `RGB`, for an image that has colours and is inspected.
        notes, concerns: those of `DecodedImage` that are known by now.
    """

    gray: Image.Image
    size: tuple[int, int]
    scale: int = 1
    colour: Image.Image | None = None
    notes: tuple[str, ...] = ()
    concerns: tuple[str, ...] = ()
    reduces: bool = False
    recipe: Recipe | None = None

    def serves(self, transform: Transform) -> bool:
        """A transform needs no other decoding."""
        return self.recipe in (None, transform.recipe) and (
            not self.reduces or self.scale == transform.reduction(*self.size)
        )


class ImageContent:
    """An image, read and decoded once for all transforms.

    A JPEG is decoded again for a transform that reduces it by another factor, a DICOM for one of another recipe.

    Args:
        source: a file's path or content, or an image in memory.
        inspect: look for `DecodedImage.concerns`, which training does without.
    """

    def __init__(self, source: Path | bytes | Image.Image, inspect: bool = True) -> None:
        self._source, self._inspect = source, inspect
        self._opened: _Opened | None = None

    def decode(self, transform: Transform) -> DecodedImage:
        """The image by a transform; errors as the function `decode`."""
        if isinstance(self._source, Path):
            self._source = _read(self._source)
        data, dicom = self._source, False
        if isinstance(data, bytes):
            if not data:
                raise ImageError("empty (0 bytes)" + _AGAIN)
            if len(data) > MAX_BYTES:
                raise ImageError(f"{len(data):,} bytes; no film is larger than {MAX_BYTES:,}")
            dicom = is_dicom(data)
        try:
            with quiet_decoders():
                known = self._opened
                if known is None or not known.serves(transform):
                    known = _open_dicom(data, transform) if dicom else _open_image(data, transform, self._inspect)
                    self._opened = known
                return _finished(known, transform, self._inspect)
        except ImageError:
            raise
        except UnidentifiedImageError:
            damaged = "damaged: an image by its first bytes, but not by what follows" + _AGAIN
            raise ImageError(unsupported(data) or damaged) from None
        except Image.DecompressionBombError:
            raise ImageError(f"more than {MAX_PIXELS:,} pixels by its header") from None
        except MemoryError:
            raise ImageError("too little memory to decode it; run again when there is more") from None
        except Exception as error:
            # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on damaged files. What
            # pydicom says may quote the file.
            if isinstance(data, bytes) and not dicom and (other := unsupported(data)):
                raise ImageError(other) from None
            detail = "" if dicom else f": {error}"
            raise ImageError(f"damaged or cut short ({type(error).__name__}{detail}){_AGAIN}") from None


def decode(path: str | Path, transform: Transform, inspect: bool = True) -> DecodedImage:
    """Decode an image, with notes on anything unusual about it.

    A JPEG much larger than needed is reduced by 2, 4 or 8 in the DCT domain while it is decoded, never below twice
    the size of the result, and is then resized like any other. On images of 2500 x 3000 px this differs from
    decoding in full by 0.15 gray levels on average.

    Args:
        path: of a JPEG, PNG, TIFF, BMP or DICOM file, whatever its suffix.
        inspect: see `ImageContent`.

    Raises:
        ImageError: missing, empty, cut short, no image, too small, too large, or blank; the message is the reason.
    """
    return ImageContent(Path(path), inspect).decode(transform)


def decode_bytes(data: bytes, transform: Transform, inspect: bool = True) -> DecodedImage:
    """The same for a file's content."""
    return ImageContent(data, inspect).decode(transform)


def looks_inverted(image: Image.Image) -> bool:
    """Tell a frontal image that is more like the negative of a chest than like a chest.

    By the sign of the correlation with `CHEST`. Of 567 real frontal images of three public sources (NIH ChestX-ray14,
    the Hannover and the Cohen COVID-19 collections) it is wrong about one, which has a black band over its lower third,
    and, being a sign, about the negative of the same one. One in hundreds is too many to change images for, so this
    only leads to a note. Not measured on real lateral images.

    Args:
        image: mode `L`, without padding.
    """
    small = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    mean = sum(small) / len(small)
    return sum((value - mean) * chest for value, chest in zip(small, CHEST, strict=True)) < 0


_LEFT_HALF = (
    (-10, -8, -5, 0),
    (-1, 0, -4, -1),
    (0, 0, -6, 0),
    (0, -1, -5, 2),
    (-1, -1, -2, 5),
    (-2, 1, 2, 6),
    (-3, 3, 6, 8),
    (-4, 6, 8, 8),
)
CHEST = tuple(value for row in _LEFT_HALF for value in (*row, *row[::-1]))
"""Mean frontal chest of the real images, 8 x 8 by rows, made symmetrical: dark upper corners and lungs, bright
mediastinum and abdomen. The three sources of those images have equal weights; a template from two of them does as well
on the third."""


def _open_dicom(data: bytes, transform: Transform) -> _Opened:
    from mlx_cxr.data.dicom import read_dicom

    frame = read_dicom(data, transform.recipe)
    notes, concerns = frame.notes, frame.concerns
    return _Opened(frame.gray, frame.gray.size, notes=notes, concerns=concerns, recipe=transform.recipe)


def _open_image(data: bytes | Image.Image, transform: Transform, inspect: bool) -> _Opened:
    with data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(*image.size)
        _check_work(data, image)
        size = image.size
        notes = []
        # Pillow itself turns a TIFF when loading it.
        turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) != 1
        colour, scale = None, 1
        reduces = image.format in _JPEG and not turned
        if reduces:
            if image.mode != "L":
                notes.append(image.mode)
                if inspect:
                    # Reduced to gray below, a JPEG has lost its colours.
                    with Image.open(io.BytesIO(data), formats=FORMATS) as small:
                        small.draft("RGB", (128, 128))
                        colour = small.convert("RGB")
            scale = transform.reduction(*size)
            image.draft("L", (size[0] // scale, size[1] // scale))
        # To count those of a TIFF takes a time that grows with the square of their number.
        if getattr(image, "is_animated", False):
            notes.append("several images in the file, the first is used")
        image.load()
        gray = _deep_colour(data, image, notes) if _loses_bits(data, image) else _gray(data, image, notes)
        if inspect and colour is None and image.mode not in _GRAY_MODES and not image.mode.startswith("I;"):
            colour = image.convert("RGB")
        if turned:
            gray, colour = _upright(gray, image), colour and _upright(colour, image)
            notes.append("turned by its EXIF orientation")
        if scale == 1:
            size = gray.size
        return _Opened(gray, size, scale, colour, tuple(notes), reduces=reduces)


def _check_work(data: bytes | Image.Image, image: Image.Image) -> None:
    """Refuse a file whose decoding would take out of proportion to its pixels."""
    if isinstance(data, Image.Image):
        return
    if image.format in _JPEG:
        if not _ends(data):
            raise ImageError("cut short: the JPEG has no end marker" + _AGAIN)
        check_scans(data, *image.size)
    if image.format == "TIFF":
        if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
            check_scans(data, *image.size)
        covered = sum((x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1), *_ in image.tile)
        if covered > len(image.getbands()) * image.width * image.height:
            raise ImageError("a TIFF whose strips cover its pixels many times over; save it as PNG")


def _upright(image: Image.Image, turned: Image.Image) -> Image.Image:
    """An image turned by the EXIF orientation of the one that it was made from."""
    image.getexif()[EXIF_ORIENTATION] = turned.getexif()[EXIF_ORIENTATION]
    return ImageOps.exif_transpose(image)


def _loses_bits(data: bytes | Image.Image, image: Image.Image) -> bool:
    """True for samples of more than 8 bits of which Pillow keeps 8: those of colours, and of gray with transparency."""
    if isinstance(data, Image.Image) or image.mode in ("I", "F") or image.mode.startswith("I;"):
        return False
    return _png_depth(data, image) == 16 or _tiff_tag(image, _TIFF_BITS, 8) > 8


def _png_depth(data: bytes | Image.Image, image: Image.Image) -> int:
    """Bits per sample of a PNG (11.2.2 of its specification: in IHDR, which comes first); 0 for others."""
    return data[24] if image.format == "PNG" and isinstance(data, bytes) else 0


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """Value of a tag of a TIFF, the first of several; that of other images is the default."""
    value = image.tag_v2.get(tag, default) if image.format == "TIFF" else default
    return value[0] if isinstance(value, tuple) else value


def _deep_colour(data: bytes, image: Image.Image, notes: list[str]) -> Image.Image:
    """Mode `L` of colours of 16 bits, by their luma's lowest and highest value; OpenCV reads them whole.

    Args:
        image: as Pillow has loaded it, with the high byte of each sample.
    """
    import cv2
    import numpy as np

    # What it does not read it would print.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    gray = np.empty(image.size[::-1], np.uint16)
    with_alpha = image.has_transparency_data
    if values is None or values.shape not in {(*gray.shape, 3 + with_alpha), (*gray.shape, 4)}:
        raise ImageError(_NOT_WHOLE)
    shown = np.asarray(image.convert("RGB"))
    # In stretches, for the memory's sake.
    for rows in (slice(start, start + 64) for start in range(0, len(gray), 64)):
        colours = values[rows, :, 2::-1]
        # OpenCV reads some TIFFs wrongly, such as those whose colours lie apart; it must agree with Pillow.
        if values.dtype != np.uint16 or (colours >> 8 != shown[rows]).any():
            raise ImageError(_NOT_WHOLE)
        red, green, blue = np.moveaxis(colours.astype(np.uint32), 2, 0)
        luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
        gray[rows] = (luma * values[rows, :, 3] + 32767) // 65535 if with_alpha else luma
    notes.append(f"16-bit {'with transparency' if with_alpha else 'RGB'}")
    return _to_8_bits(gray, inverted=False)


def _finished(opened: _Opened, transform: Transform, inspect: bool) -> DecodedImage:
    square, content = squared(opened.gray, transform, opened.size, opened.scale)
    low, high = content.getextrema()
    if high - low <= _BLANK_RANGE:
        raise ImageError(f"blank: every pixel is about {low} of 255")
    notes, concerns = [*opened.notes], [*opened.concerns]
    if transform.enlarges(*opened.size):
        notes.append("smaller than the store, enlarged")
    if looks_inverted(content):
        notes.append(INVERTED)
    if inspect:
        from mlx_cxr.data.chest_film_gate import concerns_about

        concerns += concerns_about(opened.gray, opened.colour)
    return DecodedImage(square, tuple(dict.fromkeys(notes)), tuple(concerns))


def squared(
    gray: Image.Image, transform: Transform, image_size: tuple[int, int], scale: int
) -> tuple[Image.Image, Image.Image]:
    """Resize by a transform, antialiased bicubic.

    Args:
        gray: mode `L`.
        image_size: (width, height) of the image.
        scale: by which `gray` is smaller than the image, as it was reduced while decoding.

    Returns:
        The square, and the image's part of it.
    """
    left, top, across, down = transform.placed(*image_size)
    box = tuple(edge / scale for edge in transform.shown(*image_size))
    content = gray.resize((across, down), Image.Resampling.BICUBIC, box=box)
    if content.size == (transform.size, transform.size):
        return content, content
    square = Image.new("L", (transform.size, transform.size))
    square.paste(content, (left, top))
    return square, content


def _gray(data: bytes | Image.Image, image: Image.Image, notes: list[str]) -> Image.Image:
    """An image in mode `L`; appends to `notes` what it was made from."""
    clear, signed = image.info.get("transparency"), _tiff_tag(image, _TIFF_SAMPLE_FORMAT, 1) == 2
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        import numpy as np

        bits = 16 if image.mode.startswith("I;") else _tiff_tag(image, _TIFF_BITS, 32)
        notes.append("floating point" if image.mode == "F" else f"{bits}-bit")
        values = np.asarray(image)
        if image.mode == "I" and bits == 32 and not signed:
            values = values.view(np.uint32)
        if isinstance(clear, int):
            values = np.where(values == clear, 0, values)
        inverted = _tiff_tag(image, _TIFF_PHOTOMETRIC, 1) == 0
        if inverted:
            notes.append("inverted, as its TIFF header says that white is 0")
        return _to_8_bits(values, inverted)
    if image.mode != "L":
        notes.append({"1": "black and white", "P": "palette"}.get(image.mode, image.mode))
    if image.mode in ("1", "L"):
        gray = image if image.mode == "L" else image.convert("L")
        if signed:
            notes.append("8-bit signed")
            return gray.point([level ^ 0x80 for level in range(256)])
        if isinstance(clear, int):
            # Pillow gives it as it stands in the file, and has spread the levels of fewer bits.
            clear = clear * 255 // (2 ** (_png_depth(data, image) or 8) - 1)
            return gray.point([0 if level == clear else level for level in range(256)])
        return gray
    if image.has_transparency_data:
        image = image.convert("RGBA")
        gray, alpha = image.convert("RGB").convert("L"), image.getchannel("A")
        return Image.composite(gray, Image.new("L", image.size), alpha)
    return image.convert("RGB").convert("L")


def _to_8_bits(values: np.ndarray, inverted: bool) -> Image.Image:
    """Lowest value -> 0, highest -> 255, in between cut to whole levels; the other way round where `inverted`."""
    import numpy as np

    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError("holds NaN or infinite values")
    low, high = values.min(), values.max()
    if low == high:
        raise ImageError(f"blank: every pixel is {low}")
    if values.dtype.kind != "f" and (span := int(high) - int(low)) < 1 << 16:
        levels = (np.arange(span + 1) * 255 // span).astype(np.uint8)
        return Image.fromarray((levels[::-1] if inverted else levels)[values - low])
    wide = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    low, high = wide.min(), wide.max()
    wide = high - wide if inverted else wide - low
    return Image.fromarray((wide * 255 // (high - low)).astype(np.uint8))


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ImageError("a folder, not a file")
        # Reading a pipe or a device might never end.
        if path.exists() and not path.is_file():
            raise ImageError("no ordinary file; copy the film to one")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"{size:,} bytes; no film is larger than {MAX_BYTES:,}")
        return path.read_bytes()
    except ImageError:  # a ValueError too
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a name with a zero byte in it
        raise ImageError(f"no name of a file: {error}") from None


def _ends(jpeg: bytes) -> bool:
    """True if an end-of-image marker follows the last scan: a tail of zeros would otherwise decode as gray."""
    return jpeg.endswith(b"\xff\xd9") or jpeg.rfind(b"\xff\xd9") > jpeg.rfind(b"\xff\xda")
