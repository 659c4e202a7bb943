"""Damaged copies of an image's files, the same ones each time: flipped bits, cut ends, wrong suffixes, mixed parts."""

import io

import numpy as np
from dicom_files import dicom_bytes
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

HEADER = 600


def whole_files(radiograph):
    """name -> content of sound files of an image, uint8 (H, W)."""
    image = Image.fromarray(radiograph)
    files = {}
    for name, options in {
        "film.jpg": {"quality": 90},
        "progressive.jpg": {"quality": 90, "progressive": True},
        "film.png": {},
        "film.tif": {"compression": "tiff_lzw"},
        "film.bmp": {},
    }.items():
        content = io.BytesIO()
        image.save(content, {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "bmp": "BMP"}[name[-3:]], **options)
        files[name] = content.getvalue()
    content = io.BytesIO()
    Image.fromarray(radiograph.astype(np.uint16) * 257).save(content, "PNG")
    files["deep.png"] = content.getvalue()
    files["film.dcm"] = dicom_bytes(radiograph, "MONOCHROME1", 12)
    files["implicit.dcm"] = dicom_bytes(radiograph, bits=16, syntax=ImplicitVRLittleEndian)
    files["deflated.dcm"] = dicom_bytes(radiograph, syntax=DeflatedExplicitVRLittleEndian)
    files["rle.dcm"] = dicom_bytes(radiograph, bits=16, syntax=RLELossless)
    files["jpeg.dcm"] = dicom_bytes(radiograph, syntax=JPEGBaseline8Bit)
    return files


def mutations(radiograph, seed=0, rounds=4):
    """Yield (name, content) of damaged files: 40 a round and more, named after what was done to which file."""
    files = whole_files(radiograph)
    rng = np.random.default_rng(seed)
    names = list(files)
    for count in range(rounds):
        for name, content in files.items():
            yield f"{count}-bit-{name}", _flipped(content, 1, len(content), rng)
            yield f"{count}-bits-{name}", _flipped(content, 64, len(content), rng)
            yield f"{count}-header-{name}", _flipped(content, 4, HEADER, rng)
            yield f"{count}-cut-{name}", content[: int(rng.integers(1, len(content)))]
            yield f"{count}-zeros-{name}", _zeroed(content, rng)
            other = names[int(rng.integers(len(names)))]
            yield f"{count}-spliced-{other}-{name}", _spliced(files[other], content, rng)
            suffix = other[-3:]
            yield f"{count}-renamed-{name}.{suffix}", content


def write_mutations(folder, radiograph, seed=0, rounds=4):
    """The same as files in a folder; their paths."""
    paths = []
    for name, content in mutations(radiograph, seed, rounds):
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths


def _flipped(content, bits, within, rng):
    changed = bytearray(content)
    for at in rng.integers(0, min(within, len(content)), bits):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _zeroed(content, rng):
    start = int(rng.integers(len(content)))
    length = int(rng.integers(1, len(content) // 4))
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def _spliced(head, tail, rng):
    return head[: int(rng.integers(4, HEADER))] + tail[int(rng.integers(4, HEADER)) :]
