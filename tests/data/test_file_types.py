import gzip
import io
import zipfile

import numpy as np
import pytest
from dicom_files import as_bytes, dicom_bytes, dicom_dataset
from odd_images import tiff
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from mlx_cxr.data.decoding import ImageError, Transform, decode_bytes
from mlx_cxr.data.file_types import describe, is_dicom, unsupported


def saved(name, images=1):
    frames = [Image.fromarray(np.full((40, 40), 60 * number + 9, np.uint8)) for number in range(images)]
    content = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if images > 1 else {}
    frames[0].save(content, name, **more)
    return content.getvalue()


def zipped(name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "<x/>")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (saved("PDF"), "a PDF document; save the film in it as PNG or JPEG"),
        (saved("GIF"), "a GIF image; save the film"),
        (saved("GIF", 3), "an animated GIF; save the film"),
        (saved("WEBP"), "a WebP image; convert it to PNG"),
        (saved("JPEG2000"), "a JPEG 2000 image; convert"),
        (saved("PPM"), "a PGM image; convert"),
        (saved("ICO"), "an icon, not a film"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo; convert it to PNG"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image; convert"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0", "a HEIC photo; convert it to PNG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video, not a film"),
        (b"\0\0\1\0moov\0\0\0lmvhd", "a video, not a film"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81", "a video, not a film"),
        (b"\0\0\1\xba\x44\0\4\0", "a video, not a film"),
        (b"\n\n%PDF-1.7\n", "a PDF document; save the film"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "what macOS keeps beside a file (`._…`)"),
        (b"BMI of the patient is 30, heart not enlarged.\n", "a text file, not an image"),
        (zipped("film.jpg"), "a ZIP archive; unpack it"),
        (zipped("[Content_Types].xml"), "an Office document"),
        (gzip.compress(b"film", mtime=0), "a gzip archive; unpack it"),
        (b"<html><body>Please log in</body></html>", "a web page, not an image, such as a log-in page"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "a web page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"></svg>', "an SVG drawing, not a film"),
        (b'<?xml version="1.0"?><report/>', "an XML document"),
        ("Befund: kein Erguss, Größe unverändert.\n".encode(), "a text file, not an image"),
        (("é" * 5000).encode(), "a text file, not an image"),
        (bytes(5000), "it begins with zeros, as a stopped download leaves it"),
        (bytes(range(128, 256)) * 4, "of no known kind; JPEG, PNG, TIFF, BMP and DICOM are read"),
        (b"\x89", "of no known kind"),
    ],
)
def test_what_a_file_is(content, said):
    assert said in describe(content)
    with pytest.raises(ImageError) as raised:
        decode_bytes(content, Transform(32))
    assert said in str(raised.value)


def image():
    return np.arange(1600, dtype=np.uint32).reshape(40, 40).astype(np.uint8)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_dicoms_are_known_with_and_without_preamble(syntax):
    assert is_dicom(dicom_bytes(image(), syntax=syntax))
    assert is_dicom(as_bytes(dicom_dataset(image(), syntax=syntax), preamble=False))


@pytest.mark.parametrize(
    "content",
    [
        saved("JPEG"),
        saved("PNG"),
        saved("TIFF"),
        saved("BMP"),
        saved("GIF"),
        b"",
        b"\x08",
        b"\x08\0",
        bytes(4000),
        b"text",
    ],
)
def test_others_are_not_taken_for_dicoms(content):
    assert not is_dicom(content)


def jpeg_of(kind: int, bits: int = 8) -> bytes:
    """A JPEG whose frame header names another coding process or depth than the baseline that it is."""
    content = bytearray(saved("JPEG"))
    at = content.find(b"\xff\xc0")
    content[at + 1], content[at + 4] = kind, bits
    return bytes(content)


def tiff_of(compression: int) -> bytes:
    content = bytearray(saved("TIFF"))
    at = content.find((259).to_bytes(2, "little"))
    content[at + 8 : at + 10] = compression.to_bytes(2, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (jpeg_of(0xC3), "a JPEG of a kind that is not read here (lossless)"),
        (jpeg_of(0xF7), "a JPEG of a kind that is not read here (JPEG-LS)"),
        (jpeg_of(0xC0, 12), "a JPEG of a kind that is not read here (12-bit)"),
        (tiff_of(34712), "a TIFF of a compression that is not read here (34712)"),
        (tiff(image().astype("f8")), "a TIFF of a kind that is not read here (1 samples of 64 bits, floating point)"),
        (tiff(np.dstack([image().view("i1")] * 3)), "not read here (3 samples of 8 bits, signed); save it as gray PNG"),
        (tiff(np.dstack([image()] * 2), tags={338: [2], 262: [0]}), "not read here (2 samples of 8 bits)"),
        (tiff(np.dstack([image().astype("u4")] * 3), order=">"), "not read here (3 samples of 32 bits)"),
        (tiff_of(52546), "a TIFF of a compression that is not read here (52546)"),
    ],
)
def test_a_kind_that_no_decoder_reads_is_not_called_damaged(content, kind):
    with pytest.raises(ImageError) as raised:
        decode_bytes(content, Transform(32))
    assert kind in str(raised.value)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "BMP"])
def test_what_is_cut_short_is_still_damaged(name):
    content = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(content).save(whole, name)
    assert unsupported(whole.getvalue()) is None
    with pytest.raises(ImageError, match=r"damaged|cut short"):
        decode_bytes(whole.getvalue()[: whole.tell() * 2 // 3], Transform(32))
