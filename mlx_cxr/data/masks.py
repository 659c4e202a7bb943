"""Masks of findings, where a data set has them: for scoring maps, never for training.

The masks of the image `files/p10/p10000032/s50414267/<dicom>.jpg` lie in `masks/p10/p10000032/s50414267/<dicom>/`,
those of an image `a/b/x.png` in `masks/a/b/x/`, both under `data.root`: one PNG per finding, named after it with
underscores (`Pleural_Effusion.png`), 8-bit gray, 0 and 255, of the image's own size. A finding without a file has no
mask. `load_masks` gives them in the geometry of the prepared image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.data.decoding import EXIF_ORIENTATION, FORMATS, Transform
from mlx_cxr.data.image_limits import MAX_PIXELS
from mlx_cxr.data.tables import DataError

FOLDER = "masks"
_LABEL_OF_STEM = {label.replace(" ", "_"): label for label in LABELS}


def has_masks(root: str | Path) -> bool:
    """True for a data set that has a folder of masks."""
    return (Path(root) / FOLDER).is_dir()


def mask_folder(root: str | Path, image_path: str) -> Path:
    """Folder of an image's masks, there or not.

    Args:
        root: `data.root`.
        image_path: the image's path as the manifest has it, relative to `root`.
    """
    parts = PurePosixPath(image_path).with_suffix("").parts
    return Path(root, FOLDER, *(parts[1:] if parts[0] == "files" else parts))


def mask_files(folder: Path) -> list[Path]:
    """The masks in a folder; hidden files, such as the `._*.png` that macOS puts beside them, are none."""
    return [path for path in folder.glob("*.png") if not path.name.startswith(".")]


def load_masks(
    root: str | Path, image_path: str, transform: Transform, labels: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """An image's masks in the geometry of its prepared pixels.

    Args:
        root: `data.root`.
        image_path: the image's path as the manifest has it.
        labels: findings wanted; None takes all that have a mask.

    Returns:
        label -> bool (S, S), in the order of `LABELS`; labels without a mask are absent. A mask is all False where a
        centre crop shows nothing of the finding.

    Raises:
        DataError: a mask that is unreadable, of another size than its image, or named after none of the 14.
        KeyError: one of `labels` is none of the 14.
    """
    for label in labels or ():
        label_index(label)
    folder = mask_folder(root, image_path)
    if not folder.is_dir():
        return {}
    found = {}
    for path in mask_files(folder):
        if path.stem not in _LABEL_OF_STEM:
            raise DataError(f"{path}: no finding has that name; masks are named {', '.join(_LABEL_OF_STEM)}")
        found[_LABEL_OF_STEM[path.stem]] = path
    wanted = [label for label in LABELS if label in found and (labels is None or label in labels)]
    if not wanted:
        return {}
    radiograph = Path(root, image_path)
    size = image_size(radiograph)
    return {label: apply_mask(read_mask(found[label], radiograph, size), transform) for label in wanted}


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image as displayed, by its header.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    try:
        if path.suffix.lower() in (".dcm", ".dicom"):
            from pydicom import dcmread

            header = dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"], force=True)
            return int(header.Columns), int(header.Rows)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}, whose masks are asked for, has more than {MAX_PIXELS:,} px")
            if image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
                return image.height, image.width
            return image.size
    except (OSError, SyntaxError, AttributeError, ImportError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}, whose masks are asked for, cannot be read ({error})") from None


def read_mask(path: Path, radiograph: Path, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W); refuses a mask of another (width, height) than its radiograph's."""
    try:
        with Image.open(path, formats=("PNG",)) as mask:
            if mask.size != size:
                raise DataError(
                    f"the mask {path} has {mask.width} x {mask.height} px, its film {radiograph} has "
                    f"{size[0]} x {size[1]}; a mask must be drawn on the film's own pixels"
                )
            return np.asarray(mask.convert("L")) > 127
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask {path} cannot be read ({error}); write it again as 8-bit gray PNG") from None


def apply_mask(mask: np.ndarray, transform: Transform) -> np.ndarray:
    """Bring a mask into the geometry of the prepared image, so that thin findings stay.

    A pixel belongs to the result where at least half as much of it is covered as of the most covered pixel among it and
    its eight neighbours. Along the edge of anything thicker than two pixels that is the plain rule of half the area; a
    line thinner than a pixel, which that rule would break up or lose, stays whole.

    Args:
        mask: (H, W), non-zero on the finding; H, W are the image's.

    Returns:
        bool (S, S); all False where the mask is empty or lies outside a centre crop.

    Raises:
        ValueError: it has no two dimensions, or no pixels.
    """
    mask = np.asarray(mask) != 0
    if mask.ndim != 2 or not mask.size:
        raise ValueError(f"expected a mask (H, W), got {mask.shape}")
    height, width = mask.shape
    left, top, across, down = transform.placed(width, height)
    x0, y0, x1, y1 = transform.shown(width, height)
    covered = _means(_means(mask, y0, y1, down).T, x0, x1, across).T
    near = np.lib.stride_tricks.sliding_window_view(np.pad(covered, 1), (3, 3)).max(axis=(2, 3))
    out = np.zeros((transform.size, transform.size), dtype=bool)
    # Differences of sums leave about 1e-12 where nothing is covered.
    out[top : top + down, left : left + across] = (covered > 1e-6) & (covered >= near / 2)
    return out


def _means(values: np.ndarray, start: float, stop: float, count: int) -> np.ndarray:
    """(H, W) -> float64 (count, W): means over `count` equal stretches of rows, which may begin within a row.

    Pillow's BOX filter takes whole rows only, and so can miss one between two stretches.
    """
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    edges = np.linspace(start, stop, count + 1)
    row = np.minimum(edges.astype(int), len(values) - 1)
    # The sum of all rows before an edge: those up to its own row, less the part of that row behind the edge.
    before = sums[row] - (row + 1 - edges)[:, None] * values[row]
    return np.diff(before, axis=0) * (count / (stop - start))
