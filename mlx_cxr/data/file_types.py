"""The type of a file by its first bytes, in words for a user; its name is never trusted.

Signatures after the formats' own specifications, as collected by the `file` command's database.
"""

from __future__ import annotations

import io
import re

from mlx_cxr.data.quiet import quiet_decoders

_HEAD = 4096
_EXPORT = "; save the film in it as PNG or JPEG"
_UNPACK = "; unpack it and give the films inside"
_VIDEO = "a video, not a film; save one picture of it as PNG"
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\0\x05\x16\7", "what macOS keeps beside a file (`._…`), not a film; give the file itself"),
    (0, b"\0\0\0\1Bud1", "what macOS keeps of a folder, not a film"),
    (0, b"%!PS", "a PostScript document" + _EXPORT),
    (0, b"{\\rtf", "a text document" + _EXPORT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document" + _EXPORT),
    (0, b"PK\x03\x04", "a ZIP archive" + _UNPACK),
    (0, b"PK\x05\x06", "an empty ZIP archive" + _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive" + _UNPACK),
    (0, b"BZh", "a bzip2 archive" + _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive" + _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive" + _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive" + _UNPACK),
    (257, b"ustar", "a tar archive" + _UNPACK),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image; convert it to PNG"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image; convert it to PNG"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image; convert it to PNG"),
    (0, b"\xff\x0a", "a JPEG XL image; convert it to PNG"),
    (0, b"8BPS", "a Photoshop file; save it as PNG"),
    *((4, kind, _VIDEO) for kind in (b"moov", b"mdat", b"wide", b"free")),
    *(
        (0, kind, _VIDEO)
        for kind in (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"0&\xb2u\x8ef\xcf\x11", b"FLV\1")
    ),
    (0, b"\0\0\1\0", "an icon, not a film; give a JPEG, PNG or DICOM"),
    (0, b"II\xbc", "a JPEG XR image; convert it to PNG"),
    (0, b"P5", "a PGM image; convert it to PNG"),
    (0, b"P6", "a PPM image; convert it to PNG"),
    (0, b"\x93NUMPY", "a NumPy array; save it as PNG"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file" + _EXPORT),
    (0, b"NRRD", "an NRRD volume; one film at a time is read, as PNG, JPEG or DICOM"),
    (344, b"n+1\0", "a NIfTI volume; one film at a time is read, as PNG, JPEG or DICOM"),
    (0, b"SQLite format 3\0", "a database, not a film; give a JPEG, PNG or DICOM"),
    (0, b"\x7fELF", "a program, not a film; give a JPEG, PNG or DICOM"),
    (0, b"MZ", "a program, not a film; give a JPEG, PNG or DICOM"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_BRANDS = dict.fromkeys(_HEIC, "a HEIC photo") | dict.fromkeys((b"avif", b"avis"), "an AVIF image")
_RIFF = {b"WEBP": "a WebP image; convert it to PNG", b"AVI ": _VIDEO}
_UNREAD_JPEG = {0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless"}
_UNREAD_JPEG |= {0xF7: "JPEG-LS"}


def is_dicom(data: bytes) -> bool:
    """Tell a DICOM by the prefix of PS3.10 section 7.1, or as a data set that begins without any.

    A data set without preamble is known by its first element, of group 2 or 8, little or big endian, with a value
    representation (explicit) or a short length (implicit).
    """
    if data[128:132] == b"DICM":
        return True
    if data[:4] in (b"\0\x08\0\0", b"\0\x08\0\x01", b"\0\x08\0\x05", b"\0\x08\0\x08", b"\0\x08\0\x16", b"\0\x02\0\0"):
        return data[4:6].isalpha()
    if data[:2] in (b"\x02\0", b"\x08\0") and data[3:4] == b"\0" and len(data) > 8:
        return (data[4:6].isalpha() and data[4:6].isupper()) or (data[6:8] == b"\0\0" and data[5:6] in b"\0\x01")
    return False


def describe(data: bytes) -> str:
    """A sentence on a file that cannot be read as an image: its type, and the way out.

    Args:
        data: the whole file, not empty.
    """
    head = data[:_HEAD]
    if b"%PDF-" in head[:1024]:
        return "a PDF document" + _EXPORT
    for offset, signature, words in _SIGNATURES:
        if head.startswith(signature, offset):
            if signature == b"PK\x03\x04" and b"[Content_Types].xml" in head:
                return "an Office document" + _EXPORT
            return words
    if head[:6] in (b"GIF87a", b"GIF89a"):
        # A Graphic Control Extension stands before each frame.
        animated = data.count(b"!\xf9\x04") > 1
        return f"{'an animated GIF' if animated else 'a GIF image'}; save the film in it as PNG"
    if head[:4] == b"RIFF" and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[4:8] == b"ftyp":
        still = _BRANDS.get(head[8:12])
        return f"{still}; convert it to PNG" if still else _VIDEO
    if not any(head):
        return "no image: it begins with zeros, as a stopped download leaves it; download or copy it again"
    return _markup(head) or _text(head) or "of no known kind; JPEG, PNG, TIFF, BMP and DICOM are read"


def unsupported(data: bytes) -> str | None:
    """A sentence on a file of another kind than Pillow reads here; None for a JPEG, PNG, TIFF or BMP that it does read.

    Args:
        data: the whole file, not empty, and no DICOM.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _unread_jpeg(data)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _unread_tiff(data)
    # Words may begin with BM too; after its size a bitmap has four zeros.
    if data.startswith(b"\x89PNG\r\n\x1a\n") or (data.startswith(b"BM") and data[6:10] == bytes(4)):
        return None
    return describe(data)


def _unread_jpeg(data: bytes) -> str | None:
    """By the frame header (ITU-T T.81, B.2.2): the coding process, and the bits per sample."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 5 < min(len(data), 1 << 22):
        kind = data[at + 1]
        if kind in _UNREAD_JPEG or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):
            process = _UNREAD_JPEG.get(kind) or ("12-bit" if data[at + 4] != 8 else None)
            return process and f"a JPEG of a kind that is not read here ({process}); convert it to PNG"
        at += 1 if kind == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _unread_tiff(data: bytes) -> str | None:
    """By the first directory: the compression, and the samples where Pillow has no mode for them."""
    from PIL import Image, UnidentifiedImageError
    from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

    file = io.BytesIO(data)
    with quiet_decoders():
        try:
            tags = ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
            file.seek(tags.next)
            tags.load(file)
            compression, samples, bits, kind = tags.get(259, 1), tags.get(277, 1), tags[258][0], tags.get(339, (1,))[0]
            if compression in COMPRESSION_INFO:
                Image.open(file, formats=("TIFF",))
                return None
        except UnidentifiedImageError:
            more = {2: ", signed", 3: ", floating point"}.get(kind, "")
            return (
                f"a TIFF of a kind that is not read here ({samples} samples of {bits} bits{more}); save it as gray PNG"
            )
        except Exception:  # what damage does to Pillow
            return None
    return f"a TIFF of a compression that is not read here ({compression}); save it uncompressed, or as PNG"


def _markup(head: bytes) -> str | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start.startswith(b"<"):
        return None
    if re.search(rb"<svg[\s>]", start):
        return "an SVG drawing, not a film; give a JPEG, PNG or DICOM"
    if start.startswith(b"<?xml") and b"<html" not in start:
        return "an XML document, not an image; give a JPEG, PNG or DICOM"
    return "a web page, not an image, such as a log-in page saved by the download; download it again"


def _text(head: bytes) -> str | None:
    try:
        # A character may be cut at the end of the head.
        words = head.decode("utf-8", "strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    if words.isprintable() or all(letter.isprintable() or letter in "\t\r\n\f" for letter in words):
        return "a text file, not an image; give a JPEG, PNG or DICOM"
    return None
