"""Limits of the images that are decoded, the error of a file that gives none, and the recipes of DICOMs.

`decoding` and `dicom` share them.
"""

from __future__ import annotations

from typing import Literal

from mlx_cxr.core.errors import UserError

Recipe = Literal["mimic", "window"]
"""How a DICOM becomes gray levels; see `dicom`."""
MIN_SIDE = 32
MAX_SIDE = 12_000
MAX_PIXELS = 80_000_000
"""Refused by header, before anything is decoded. The largest chest images are about 4300 x 5000."""
MAX_BYTES = 500_000_000
MAX_SCANNED = 20 * MAX_PIXELS
"""Pixels times scans of a JPEG. A progressive one has about ten scans; a thousand fit into some kilobytes, and each
takes 0.7 ns for a pixel."""


class ImageError(UserError, ValueError):
    """An image that cannot be used; the message is the reason, without the path where `decode` raises it."""


def check_size(width: int, height: int) -> None:
    """Refuse an image by the size that its header gives.

    Raises:
        ImageError: a side is under `MIN_SIDE` or over `MAX_SIDE`, or there are more than `MAX_PIXELS`.
    """
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{width} x {height} px; shorter than {MIN_SIDE} px")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} px by its header; more than {MAX_SIDE:,} px long or {MAX_PIXELS:,} px in all"
        )


def check_scans(jpeg: bytes, width: int, height: int) -> None:
    """Refuse a JPEG whose pixels are gone over so often that decoding it would take minutes.

    Raises:
        ImageError: scans times pixels are more than `MAX_SCANNED`.
    """
    # Within a scan these two bytes cannot follow each other (ITU-T T.81, B.1.1.5).
    scans = jpeg.count(b"\xff\xda")
    if scans * width * height > MAX_SCANNED:
        raise ImageError(f"a JPEG of {scans:,} scans, where others have ten at most; save it again")
