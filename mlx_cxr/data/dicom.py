"""DICOM radiographs as 8-bit gray images, by the recipe that the training images went through.

`mimic`, the default, is what MIMIC-CXR-JPG 2.0.0 did with the DICOMs of MIMIC-CXR (Johnson et al., arXiv:1901.07042;
its code is issue 16 of MIT-LCP/mimic-cxr), step by step: stored values as they are, without modality or VOI look-up
table and without masking any padding; lowest to 0, highest to 255, fractions cut off; MONOCHROME1 inverted;
`cv2.equalizeHist`. It has two additions, for images that MIMIC does not have: a negative Rescale Slope inverts too, and
signed values are subtracted in 64 bits, where the original would wrap.

`window` shows what a viewer shows: modality LUT or rescale, then the file's first VOI LUT or window (PS3.3 C.11.1 and
C.11.2), its output range to 0..255, MONOCHROME1 inverted, padding black. A model trained on MIMIC-CXR-JPG has not
seen such images.

Only the elements of `_ELEMENTS` are read: none of them identifies a patient.
"""

from __future__ import annotations

import io
import re
import unicodedata
import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from PIL import Image

from mlx_cxr.data.image_limits import MAX_BYTES, MAX_PIXELS, ImageError, Recipe, check_scans, check_size

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

_REQUIRED = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ABOUT = ("Modality", "BodyPartExamined", "ViewPosition", "PresentationIntentType")
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_OVERLAY_BIT = 0x60000102
"""Overlay Bit Position, of which there are several in one element's name."""
_ELEMENTS = (
    *(*_REQUIRED, *_PIXELS, *_ABOUT),
    *("NumberOfFrames", "BitsStored", "HighBit", _OVERLAY_BIT, "PixelRepresentation", "PlanarConfiguration"),
    *_PADDING,
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "LUTDescriptor", "LUTData"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
)
_MAY_BE_EMPTY = ("RescaleSlope", "RescaleIntercept", "VOILUTFunction", "HighBit", "PixelRepresentation", *_PADDING)
"""Elements that some programs write without a value; absent they have a meaning, empty they stop pydicom."""
_RADIOGRAPHS = ("CR", "DX", "DR", "RG", "XR", "RF", "HC", "OT")
"""Modalities that a radiograph's file may name: those of the standard, DR and XR, which scanners write though the
standard lacks them, and other or hard copy, as of digitized film."""
_CHEST = re.compile("CHEST|THORA|TORA[XK]|TORACE|LUNG|PULMO|POUMON|BRUSTKORB")
_SPINE = re.compile(r"SPINE|SPINAL|LUMBAR|LUMBAL|CERVICAL|WIRBEL|COLUMNA|COLUNA|COLONNE|RACHIS|SACR|COCCYX")
_OTHER_PART = re.compile(
    r"HAND|FINGER|THUMB|WRIST|CARPUS|CARPAL|FOREARM|ELBOW|HUMERUS|UPPER ?ARM|SHOULDER|CLAVIC|SCAPULA|FOOT|FEET|ANKLE|"
    r"CALCAN|HEEL|KNEE|PATELLA|FEMUR|THIGH|TIBIA|FIBULA|PELVI|SKULL|HEAD|BRAIN|FACE|FACIAL|MANDIB|MAXILLA|TEETH|TOOTH|"
    r"DENTAL|NECK|ABDOM|BAUCH|BREAST|MAMMA|ORBIT|SINUS|NASAL|NOSE|EXTREMIT|CRANI|CRANEO|SCHADEL|RODILLA|JOELHO|GENOU|"
    r"HOMBRO|EPAULE|SCHULTER|BECKEN|BASSIN|CADERA|POIGNET|"
    r"\b(?:ARM|LEG|HIP|HIPS|TOE|TOES|JAW|KUB|EYE|EAR|MANO|MAO|MAIN|PIE|PIED|KNIE|FUSS|CRANE)\b"
)
"""Body parts (PS3.16, annex L, and what users of other languages write) that show no chest. A word in none of these,
such as UNKNOWN, THX or CXR, says nothing, and the image decides."""
_VIEWS = {
    "a decubitus": re.compile(r"DECUB|\b[LR]LD\b"),
    "an oblique": re.compile(r"OBLI|SCHRAG|\b(?:[LR]LO|[LR][AP]O)\b"),
    "a lateral": re.compile(r"LATERAL|PERFIL|PROFIL|SEITL|\b[LR]? ?LAT\b|\b(?:LL|RL|LLAT|RLAT)\b"),
}
_FEW_LEVELS = 16
_MOST_READS = 500_000
"""Images have some hundreds of elements. A megabyte, deflated, may hold fifty million."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_DECODERS = {
    **dict.fromkeys(("JPEGExtended12Bit", "JPEGLossless", "JPEGLosslessSV1"), "pylibjpeg pylibjpeg-libjpeg"),
    **dict.fromkeys(("JPEGLSLossless", "JPEGLSNearLossless"), "pyjpegls"),
    **dict.fromkeys(("HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K"), "pylibjpeg pylibjpeg-openjpeg"),
}
"""Keyword of a transfer syntax -> packages that give pydicom a decoder for it."""


@dataclass(frozen=True)
class DicomImage:
    """The only frame of a DICOM, by a recipe.

    Attributes:
        gray: mode `L`, as large as the frame.
        notes: the steps done or left out, in words.
        concerns: reasons in its header why it is no frontal chest image, in words.
    """

    gray: Image.Image
    notes: tuple[str, ...]
    concerns: tuple[str, ...]


def read_dicom(data: bytes, recipe: Recipe = "mimic") -> DicomImage:
    """Read a single-frame gray radiograph.

    Args:
        data: the file, with or without preamble.
        recipe: how stored values become gray levels; see the module.

    Raises:
        ImageError: pydicom is not installed, or the file holds no such image, has a damaged header or pixel data, more
            pixels than `image_limits` allows, or a compression without a decoder here.
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipe {recipe!r} is not one of {', '.join(get_args(Recipe))}")
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise ImageError('a DICOM file, which needs pydicom to be read: pip install "mlx-cxr[dicom]"') from None
    dataset = _dataset(data)
    _check_header(dataset)
    values = _stored_values(dataset)
    notes = ["DICOM"]
    if (bits := dataset.get("BitsStored", dataset.BitsAllocated)) != 8:
        notes.append(f"{bits}-bit")
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if inverted:
        notes.append("MONOCHROME1, inverted")
    elif dataset.get("PresentationLUTShape") == "INVERSE":
        notes.append("MONOCHROME2, though its header also says INVERSE; not inverted")
    concerns = _header_concerns(dataset)
    if recipe == "mimic":
        levels = _stretched(values)
        if (count := np.count_nonzero(_histogram(levels))) < _FEW_LEVELS:
            concerns.append(f"has only {count} gray levels left after scaling; a few extreme values take up its range")
        falling = (dataset.get("RescaleSlope") or 1) < 0
        levels = equalize(255 - levels if inverted != falling else levels)
    else:
        levels = _windowed(values, dataset)
        levels = 255 - levels if inverted else levels
        levels[_padding(values, dataset)] = 0
    return DicomImage(Image.fromarray(levels), tuple(notes), tuple(concerns))


def equalize(levels: np.ndarray) -> np.ndarray:
    """Histogram equalization, bit for bit as OpenCV's `cv2.equalizeHist`.

    The cumulative histogram above the lowest level that occurs, scaled to 0..255 in single precision and rounded half
    to even; an image of one level stays as it is.

    Args:
        levels: uint8 (H, W).

    Returns:
        uint8 (H, W).
    """
    histogram = _histogram(levels)
    lowest = int(np.flatnonzero(histogram)[0])
    if histogram[lowest] == levels.size:
        return levels
    scale = np.float32(255) / np.float32(levels.size - histogram[lowest])
    above = np.cumsum(histogram) - histogram[: lowest + 1].sum()
    table = np.rint(above.clip(0).astype(np.float32) * scale).clip(0, 255).astype(np.uint8)
    return table[levels]


def _histogram(levels: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(levels).histogram())


class _Bounded(io.BytesIO):
    """A file in memory that is not read in endless small pieces; each element of a data set takes a read or two."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file.

        Raises:
            ImageError: it is the read after `_MOST_READS`.
        """
        self.reads += 1
        if self.reads > _MOST_READS:
            raise ImageError("a DICOM of too many elements to be that of an image; export it again")
        return super().read(size)


def _dataset(data: bytes) -> FileDataset:
    from pydicom import dcmread, uid

    dataset = dcmread(_Bounded(_inflated(data)), force=True, specific_tags=list(_ELEMENTS))
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        if implicit:
            syntax = uid.ImplicitVRLittleEndian
        else:
            syntax = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _inflated(data: bytes) -> bytes:
    """The data set of a deflated file (PS3.5 A.5), unpacked in bounded memory; any other file as it is."""
    length = int.from_bytes(data[140:144], "little")
    if data[128:138] != b"DICM\2\0\0\0UL" or _DEFLATED not in data[144 : 144 + length]:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[144 + length :], MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ImageError(f"a DICOM that unpacks to more than {MAX_BYTES:,} bytes")
    return body


def _check_header(dataset: FileDataset) -> None:
    if not any(keyword in dataset for keyword in _PIXELS):
        name = getattr(dataset.file_meta.get("MediaStorageSOPClassUID"), "name", "")
        # An unknown identifier is its own name.
        kind = f" ({name})" if " " in name else ""
        raise ImageError(f"a DICOM file without pixels{kind}, or one cut short before them; give the file of an image")
    for keyword in _MAY_BE_EMPTY:
        if keyword in dataset and dataset.get(keyword) in (None, ""):
            del dataset[keyword]
    if said := dataset.get("PhotometricInterpretation"):
        dataset.PhotometricInterpretation = str(said).strip(" \0").upper()
    # Floating point pixels (PS3.3 C.7.6.24 and 25) have no bits stored.
    required = (*_REQUIRED, "BitsStored") if "PixelData" in dataset else _REQUIRED
    missing = [keyword for keyword in required if dataset.get(keyword) in (None, "")]
    if missing:
        raise ImageError(f"a DICOM whose header lacks {', '.join(missing)}; export it again")
    for keyword in set(required) - {"PhotometricInterpretation"}:
        if not isinstance(dataset.get(keyword), int):
            raise ImageError(f"a DICOM whose header has no single number as {keyword}; export it again")
    allocated, stored = dataset.BitsAllocated, dataset.get("BitsStored", 1)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise ImageError(f"a DICOM whose header says {stored} bits stored in {allocated}; export it again")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"a DICOM of {frames} frames, as of a video or a volume; give one film per file")
    check_size(dataset.Columns, dataset.Rows)
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        kind = _word(dataset.PhotometricInterpretation)
        raise ImageError(
            f"a DICOM whose pixels are {kind} with {dataset.SamplesPerPixel} samples, such as a colour image; a "
            "radiograph's are MONOCHROME1 or MONOCHROME2 with one"
        )
    if dataset.get("PixelRepresentation") is None:
        dataset.PixelRepresentation = 0


def _stored_values(dataset: FileDataset) -> np.ndarray:
    """The frame's stored values, (rows, columns), unused high bits removed."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGTransferSyntaxes

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:
        number = re.sub(r"[^0-9.]", "", syntax)[:64]
        raise ImageError(f"a DICOM of an unknown transfer syntax ({number}); export it uncompressed")
    expected = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
    if syntax.is_compressed and not syntax.is_deflated:
        try:
            plugins = get_decoder(syntax).available_plugins
        except NotImplementedError:
            plugins = ()
        # Pillow's JPEG decoder does 8 bits only.
        if not plugins or (syntax.keyword == "JPEGExtended12Bit" and dataset.BitsStored > 8 and plugins == ("pillow",)):
            package = _DECODERS.get(syntax.keyword)
            way_out = f"pip install {package}" if package else "export it uncompressed"
            raise ImageError(f"a DICOM compressed as {syntax.name}, for which there is no decoder here: {way_out}")
        # Run-length code at most doubles the pixels; a longer one would fill the memory when decoded.
        if syntax.keyword == "RLELossless" and len(dataset.PixelData) > 2 * expected + 1024:
            raise ImageError("a DICOM whose compressed pixels are more than its header says; export it again")
        if syntax in JPEGTransferSyntaxes:
            # Its own size may be another than the header's.
            check_scans(get_frame(dataset.PixelData, 0, number_of_frames=1), MAX_PIXELS, 1)
    elif "PixelData" in dataset and len(dataset.PixelData or b"") < expected:
        held = len(dataset.PixelData or b"")
        raise ImageError(f"cut short: {held:,} of {expected:,} bytes of pixels are there; copy it again")
    # pydicom takes the lowest `BitsStored` bits, wherever `HighBit` has them, and cuts off what lies above: values
    # wrap. A JPEG 2000 has a number of bits of its own.
    words = "PixelData" in dataset and syntax not in JPEG2000TransferSyntaxes
    values = pixel_array(dataset, correct_unused_bits=not words)
    if words:
        values = _of_stored_bits(values, dataset)
    if values.ndim != 2:
        raise ImageError("a DICOM of several frames or samples; give one gray film per file")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError("a DICOM with NaN or infinite values among its pixels; export it again")
    if values.min() == values.max():
        raise ImageError(f"blank: every pixel is {values.min()}")
    return values


def _of_stored_bits(words: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """The values in the stored bits of each word: those that end at `HighBit`, or the lowest ones where only these fit.

    Bits above may hold a sign (PS3.5 8.1.1), or an overlay, as in files of before 2004; others are empty.

    Raises:
        ImageError: values have more bits than the header gives them; cut to these, they would wrap around.
    """
    allocated, stored = words.dtype.itemsize * 8, dataset.BitsStored
    said = dataset.get("HighBit", stored - 1)
    raw = words.view(f"u{words.dtype.itemsize}")
    overlaid = _OVERLAY_BIT in dataset and dataset[_OVERLAY_BIT].value
    for high in dict.fromkeys((said, stored - 1)):
        if not stored - 1 <= high < allocated:
            continue
        low = high + 1 - stored
        values = words << (allocated - 1 - high) >> (allocated - stored)
        filled = values << low
        if overlaid or ((filled == words) | (filled.view(raw.dtype) & (2 ** (high + 1) - 1) == raw)).all():
            return values
    raise ImageError(
        f"a DICOM with values of more than the {stored} bits that its header gives them (highest bit {said}); "
        "export it again"
    )


def _stretched(values: np.ndarray) -> np.ndarray:
    """Lowest value to 0, highest to 255, as MIMIC-CXR-JPG's code: in double precision, fractions cut off; uint8."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        part = values.astype(np.float64) - float(low)
        return (part / part.max() * 255).astype(np.uint8)
    span = int(high) - int(low)
    table = (np.arange(span + 1) / span * 255).astype(np.uint8)
    return table[values.astype(np.int32) - int(low)]


def _windowed(values: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """Gray levels as a viewer shows them, but for the inversion of MONOCHROME1; uint8."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    tables, width = dataset.get("VOILUTSequence"), dataset.get("WindowWidth")
    try:
        if rescales := dataset.get("ModalityLUTSequence"):
            # Of its entries pydicom reads 8 or 16 bits; they lie in 16 whatever number of them is used (C.11.1.1.1).
            first, mapped, bits = rescales[0].LUTDescriptor
            rescales[0].LUTDescriptor = [first, mapped, 8 if bits <= 8 else 16]
            measured = np.asarray(apply_modality_lut(values, dataset)).astype(np.float64)
        else:
            # Not in the integers of the file, where a product would wrap around.
            measured = np.asarray(apply_modality_lut(values.astype(np.float64), dataset))
        if tables and tables[0].get("LUTData"):
            shown = apply_voi(measured.astype(np.int64), dataset)
            low, high = 0.0, 2.0 ** tables[0].LUTDescriptor[2] - 1
        elif width not in (None, "") and dataset.get("WindowCenter") not in (None, ""):
            shown = apply_windowing(measured, dataset)
            low, high = apply_windowing(np.array([-np.inf, np.inf]), dataset)
        else:
            exposed = measured[~_padding(values, dataset)]
            shown, low, high = measured, exposed.min(initial=np.inf), exposed.max(initial=-np.inf)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
        raise ImageError("a DICOM whose window cannot be used; try the recipe 'mimic'") from None
    shown = np.asarray(shown, dtype=np.float64)
    low, high = min(low, high), max(low, high)
    if not high > low:
        raise ImageError("a DICOM whose window shows nothing; try the recipe 'mimic'")
    return ((shown - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)


def _padding(values: np.ndarray, dataset: FileDataset) -> np.ndarray:
    """bool (rows, columns): outside of the exposed field, by Pixel Padding Value (PS3.3 C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(values.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    # Of signed values it may be written unsigned.
    ends = [end - 65536 if end > 32767 and values.dtype.kind == "i" else end for end in (first, last)]
    return (values >= min(ends)) & (values <= max(ends))


def _header_concerns(dataset: FileDataset) -> list[str]:
    """Reasons in the header why it is no frontal chest image; elements that are absent or empty give none."""
    said = {keyword: _word(dataset.get(keyword)) for keyword in _ABOUT}
    concerns = []
    if (modality := said["Modality"]) and modality not in _RADIOGRAPHS:
        concerns.append(f"says in its header that it is no plain radiograph (Modality {modality})")
    part = said["BodyPartExamined"]
    if _SPINE.search(part) or (_OTHER_PART.search(part) and not _CHEST.search(part)):
        concerns.append(f"says in its header that it shows another body part ({part})")
    if view := next((view for view, words in _VIEWS.items() if words.search(said["ViewPosition"])), None):
        concerns.append(f"says in its header that it is {view} view, not a frontal one")
    if said["PresentationIntentType"] == "FOR PROCESSING":
        concerns.append("says in its header that it is a detector's raw image, not meant to be looked at")
    return concerns


def _word(value: object) -> str:
    """A code string (CS) in upper case, without accents, cut to the characters and the length that the standard allows.

    Accented letters, which the standard does not allow, are read as Latin-1, or as UTF-8 where they are that.
    """
    text = str(value or "")
    with suppress(UnicodeError):
        text = text.encode("latin-1").decode("utf-8")
    plain = unicodedata.normalize("NFKD", text).upper()
    return re.sub(r"[^A-Z0-9_ ]", "", re.sub(r"[-./,]", " ", plain)).strip()[:16]
