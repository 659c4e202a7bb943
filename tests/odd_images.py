"""Image files of kinds that Pillow does not write, byte by byte after their specifications."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def gray_png(values, depth, clear=None):
    """A gray PNG of 1, 2, 4, 8 or 16 bits; `clear` is the value that is transparent (tRNS)."""
    height, width = values.shape
    rows = values.astype(">u2").view(np.uint8)
    if depth < 16:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))]
    if clear is not None:
        chunks.append((b"tRNS", struct.pack(">H", clear)))
    chunks += [(b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def tiff(values, planar=False, order="<", tags=None, directories=0):
    """An uncompressed TIFF of (H, W) or (H, W, C).

    Args:
        planar: the samples lie apart, a strip for each.
        order: byte order.
        tags: number -> values; set last, so they may contradict the rest.
        directories: further ones behind the image, each of the same pixels.
    """
    height, width, samples = np.atleast_3d(values).shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    strips = np.moveaxis(values, 2, 0) if planar else values[None]
    body = strips.astype(values.dtype.newbyteorder(order)).tobytes()
    starts = [8 + n * len(body) // len(strips) for n in range(len(strips))]
    entries = {
        **{256: [width], 257: [height], 258: [values.itemsize * 8] * samples, 259: [1], 262: [2 if samples > 2 else 1]},
        **{273: starts, 277: [samples], 278: [height], 279: [len(body) // len(strips)] * len(strips)},
        **{284: [1 + planar], 339: [kind] * samples},
        **(tags or {}),
    }
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body)) + body
    for left in range(directories, -1, -1):
        behind = len(file) + 2 + 12 * len(entries) + 4
        directory, more = struct.pack(order + "H", len(entries)), b""
        for tag, numbers in sorted(entries.items()):
            long = max(numbers) > 65535 or tag in (273, 279)
            packed = struct.pack(f"{order}{len(numbers)}{'I' if long else 'H'}", *numbers)
            if len(packed) > 4:
                packed, more = struct.pack(order + "I", behind + len(more)), more + packed
            directory += struct.pack(order + "HHI", tag, 4 if long else 3, len(numbers)) + packed.ljust(4, b"\0")
        file += directory + struct.pack(order + "I", behind + len(more) if left else 0) + more
    return file


def jpeg_of_scans(scans, side):
    """A progressive gray JPEG whose last scan is repeated."""
    content = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * scans + whole[-2:]
