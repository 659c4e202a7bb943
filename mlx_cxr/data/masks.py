"""Masks of findings, where a data set has them: for scoring maps, never for training.

The masks of the film `files/p10/p10000032/s50414267/<dicom>.jpg` lie in `masks/p10/p10000032/s50414267/<dicom>/`, those
of a film `a/b/x.png` in `masks/a/b/x/`, both under `data.root`: one PNG per finding, named after it with underscores
(`Pleural_Effusion.png`), 8-bit gray, 0 and 255, of the film's own size. A finding without a file has no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from mlx_cxr.data.decoding import FORMATS, MAX_PIXELS, Transform
from mlx_cxr.data.image_arrays import apply_mask
from mlx_cxr.data.tables import DataError
from mlx_cxr.core.labels import LABELS, label_index

FOLDER = "masks"
_LABEL_OF_STEM = {label.replace(" ", "_"): label for label in LABELS}


def has_masks(root: str | Path) -> bool:
    """Whether a data set brings masks at all."""
    return (Path(root) / FOLDER).is_dir()


def mask_folder(root: str | Path, image_path: str) -> Path:
    """Folder of a film's masks, there or not.

    Args:
        root: `data.root`.
        image_path: the film's path as the manifest has it, relative to `root`.
    """
    parts = PurePosixPath(image_path).with_suffix("").parts
    return Path(root, FOLDER, *(parts[1:] if parts[0] == "files" else parts))


def load_masks(
    root: str | Path, image_path: str, transform: Transform, labels: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """A film's masks in the frame of its prepared pixels.

    Args:
        root: `data.root`.
        image_path: the film's path as the manifest has it.
        transform: the one its pixels were prepared with.
        labels: findings wanted; None takes all that have a mask.

    Returns:
        label -> bool (S, S), in the order of `LABELS`; labels without a mask are absent. A mask is all False where a
        centre crop shows nothing of the finding.

    Raises:
        DataError: a mask that is unreadable, of another size than its film, or named after none of the 14.
        KeyError: one of `labels` is none of the 14.
    """
    for label in labels or ():
        label_index(label)
    folder = mask_folder(root, image_path)
    if not folder.is_dir():
        return {}
    found = {}
    for path in folder.glob("*.png"):
        if path.stem not in _LABEL_OF_STEM:
            raise DataError(f"{path}: no finding has that name; masks are named {', '.join(_LABEL_OF_STEM)}")
        found[_LABEL_OF_STEM[path.stem]] = path
    wanted = [label for label in LABELS if label in found and (labels is None or label in labels)]
    if not wanted:
        return {}
    film = Path(root, image_path)
    film_size = _film_size(film)
    return {label: apply_mask(_read_mask(found[label], film, film_size), transform) for label in wanted}


def _read_mask(path: Path, film: Path, film_size: tuple[int, int]) -> np.ndarray:
    """bool (H, W)."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != film_size:
                raise DataError(
                    f"the mask {path} has {image.width} x {image.height} px, its film {film} has "
                    f"{film_size[0]} x {film_size[1]}; a mask must be drawn on the film's own pixels"
                )
            return np.asarray(image.convert("L")) > 127
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask {path} cannot be read ({error}); write it again as 8-bit gray PNG") from None


def _film_size(path: Path) -> tuple[int, int]:
    """(width, height) as it is seen, by the header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}, whose masks are asked for, has more than {MAX_PIXELS:,} px")
            if image.format != "TIFF" and image.getexif().get(274, 1) in (5, 6, 7, 8):
                return image.height, image.width
            return image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}, whose masks are asked for, cannot be read ({error})") from None
