"""Places of findings that readers marked, from one table of boxes or masks: for scoring maps, never for training.

`data.boxes` names a CSV table of boxes: NIH's `BBox_List_2017.csv` (`Image Index`, `Finding Label`, `Bbox [x`, `y`,
`w`, `h]`; corner and size) or VinDr-CXR's (`image_id`, `class_name`, `x_min`, `y_min`, `x_max`, `y_max`). `data.masks`
names a table of mask files (`image_file`, `cls`, `mask_file`) or CheXlocalize's JSON (image -> finding -> COCO run
lengths). Without either, masks are those of the folder beside the images (`mlx_cxr.data.masks`), if there is one.

An image is known by its path, its file's name, or CheXlocalize's `patient_study_view`, with or without suffix. Places
of several readers, and of several names of a source that mean one of the 14, are joined.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from mlx_cxr.core.config_schema import DataConfig
from mlx_cxr.core.files import read_json
from mlx_cxr.core.labels import LABELS, MAPPED
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.masks import apply_mask, has_masks, image_size, load_masks, read_mask
from mlx_cxr.data.tables import DataError, listed, read_table, row_number

log = logging.getLogger("mlx_cxr")

Truth = Literal["drawn", "masks", "boxes"]
_FINDING_OF = {label.casefold(): label for label in LABELS} | {
    # NIH ChestX-ray14
    "infiltrate": "Lung Opacity",
    "infiltration": "Lung Opacity",
    "effusion": "Pleural Effusion",
    "mass": "Lung Lesion",
    "nodule": "Lung Lesion",
    "pleural_thickening": "Pleural Other",
    # VinDr-CXR
    "nodule/mass": "Lung Lesion",
    "pleural thickening": "Pleural Other",
    "clavicle fracture": "Fracture",
    "rib fracture": "Fracture",
    # CheXlocalize
    "airspace opacity": "Lung Opacity",
    # covid-19-chest-xray-segmentations-dataset
    "ground glass opacities": "Lung Opacity",
    "central venous line": "Support Devices",
    "endotracheal tube": "Support Devices",
    "monitoring probes": "Support Devices",
    "nosogastric tube": "Support Devices",
    "tubings": "Support Devices",
}
"""Names in the sources that are read here -> one of the 14; any other is counted, never guessed."""
_SIZED = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
_CORNERS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
_MASKS = ("image_file", "cls", "mask_file")
_SLACK = 1.0
"""Pixels by which a box may lie outside of its frame, and percent by which the shapes of two frames may differ."""

Region = tuple[float, float, float, float] | Path | Mapping[str, Any]
"""A box (left, top, right, bottom), a file, or run lengths."""


@dataclass(frozen=True)
class Places:
    """Places of the findings on the images of a cohort.

    Attributes:
        root: `data.root`.
        truth: `drawn` by the program that drew the images, readers' `masks`, or readers' `boxes`.
        source: the table, or the folder.
        unmapped: names of the source that are none of the 14 -> how many places they have.
        elsewhere: places on images that the cohort does not have.
        empty: rows of images on which nothing is marked.
        regions: image path -> finding -> what is marked; None for the masks of the folder.
        frame: (width, height) that boxes are given in; None for the image's own pixels.
    """

    root: Path
    truth: Truth
    source: Path
    unmapped: Mapping[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    empty: int = 0
    regions: Mapping[str, Mapping[str, Sequence[Region]]] | None = None
    frame: tuple[int, int] | None = None

    @classmethod
    def of(cls, data: DataConfig, paths: Sequence[str]) -> Places | None:
        """The places that the configuration names, or else those in the folder; None where there are neither.

        Args:
            data: the section.
            paths: the images', as the manifest has them.

        Raises:
            DataError: the table cannot be read or used, has a box that is none or lies outside of its frame, or none of
                its places is on an image of the cohort.
        """
        if data.boxes is None and data.masks is None:
            truth = "drawn" if data.synthetic else "masks"
            return cls(data.root, truth, data.root / "masks") if has_masks(data.root) else None
        settings = data.boxes or data.masks
        known = _FINDING_OF | {name.casefold(): label for name, label in settings.label_map.items()}
        frame, read = (data.boxes.frame, _boxes) if data.boxes else (None, _masks)
        images, unmapped, elsewhere, empty, met = _names(paths), Counter(), 0, 0, None
        regions: dict[str, dict[str, list[Region]]] = {}
        for where, image, name, region in read(settings):
            label = known.get(name.casefold())
            path = _image(images, image, where)
            met = met or image
            if region is None:
                empty += 1
            elif path is None:
                elsewhere += 1
            elif label not in MAPPED:
                unmapped[name] += 1
            else:
                if isinstance(region, tuple):
                    _check_box(region, frame or image_size(data.root / path), where)
                regions.setdefault(path, {}).setdefault(label, []).append(region)
        if not regions:
            raise DataError(
                f"{settings.table}: no place of a finding on an image of the manifest, whose images are called "
                f"{paths[0]!r} and so on, the table's {met!r}; not among the 14 "
                f"(data.{'boxes' if data.boxes else 'masks'}.label_map): {listed(sorted(unmapped)) or 'none'}"
            )
        places = cls(
            data.root, "boxes" if data.boxes else "masks", settings.table, unmapped, elsewhere, empty, regions, frame
        )
        log.info("%s", places.words())
        return places

    def masks(self, path: str, transform: Transform, labels: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As `data.masks.load_masks`: finding -> bool (S, S) in the geometry of the prepared image.

        Raises:
            DataError: a mask cannot be read, or has another shape than the image.
        """
        if self.regions is None:
            return load_masks(self.root, path, transform, labels)
        marked = self.regions.get(path, {})
        wanted = [label for label in LABELS if label in marked and (labels is None or label in labels)]
        if not wanted:
            return {}
        image, found = self.root / path, {}
        size = image_size(image)
        for label in wanted:
            drawn = [self._drawn(region, image, size) for region in marked[label]]
            found[label] = np.any([apply_mask(mask, transform) for mask in drawn], axis=0)
        return found

    def _drawn(self, region: Region, image: Path, size: tuple[int, int]) -> np.ndarray:
        """bool (H, W) in a frame of the image's shape."""
        if isinstance(region, Path):
            return read_mask(region, image, size)
        if isinstance(region, tuple):
            frame = self.frame or size
            mask = np.zeros(frame[::-1], dtype=bool)
            left, top, right, bottom = (round(edge) for edge in region)
            mask[max(top, 0) : max(bottom, top + 1), max(left, 0) : max(right, left + 1)] = True
        else:
            mask = decode_rle(region, f"{self.source}, {image.name}")
        height, width = mask.shape
        if abs(width * size[1] / (height * size[0]) - 1) > _SLACK / 100:
            raise DataError(
                f"{self.source}: marked in a frame of {width} x {height}, but {image} has {size[0]} x {size[1]} px, "
                "which is another shape; give the images that were marked (or, for boxes, data.boxes.frame)"
            )
        return mask

    def words(self) -> str:
        """What was left out, in a sentence."""
        said = [f"{name} ({count})" for name, count in sorted(self.unmapped.items())]
        marked = sum(len(of) for one in (self.regions or {}).values() for of in one.values())
        return (
            f"{self.source.name}: {marked} {self.truth} on {len(self.regions or {})} images; left out: "
            f"{self.elsewhere} on other images, {self.empty} rows without a place, none of the "
            f"14: {', '.join(said) or 'none'}"
        )

    def plain(self) -> dict[str, Any]:
        """For `localization.json`."""
        return {
            "truth": self.truth,
            "source": self.source.name,
            "left_out": {"unmapped": dict(self.unmapped), "other_images": self.elsewhere, "without_place": self.empty},
        }


def decode_rle(rle: Mapping[str, Any], where: str) -> np.ndarray:
    """A COCO run-length mask as bool (H, W): runs of 0 and 1 in turn, column by column.

    `counts` are numbers, or COCO's text: 5 bits a character from `0` on, the lowest first, the sixth for "more
    follows", two's complement, and from the fourth run on as the difference to the run before the last (cocoapi's
    `maskApi.c`).

    Raises:
        DataError: it is none, or its runs do not fill its size; names `where`.
    """
    try:
        (height, width), counts = rle["size"], rle["counts"]
        runs = np.array(_runs(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"its runs add up to {runs.sum()}, not to {height} x {width}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: no mask in COCO's run lengths ({error})") from None
    return (np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T) == 1


def _runs(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        code = character - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _boxes(settings: Any) -> Any:
    """(where, image, name, box or None) of each row of a table of boxes."""
    table = read_table(settings.table, None)
    for columns in (_SIZED, _CORNERS):
        if set(columns) <= set(table.columns):
            break
    else:
        raise DataError(
            f"{settings.table} has the columns {listed(list(table.columns))}; a table of boxes has "
            f"{', '.join(_SIZED)} (NIH) or {', '.join(_CORNERS)} (VinDr-CXR)"
        )
    for k, (image, name, *cells) in enumerate(table[list(columns)].itertuples(index=False)):
        where = f"{settings.table}, row {row_number(table, k)}"
        if not any(cells):
            yield where, image, name, None
            continue
        try:
            left, top, a, b = (float(cell) for cell in cells)
        except ValueError:
            raise DataError(f"{where}: {', '.join(cells)} are not four numbers") from None
        right, bottom = (left + a, top + b) if columns is _SIZED else (a, b)
        if not (np.isfinite([left, top, right, bottom]).all() and left < right and top < bottom):
            raise DataError(f"{where}: {', '.join(cells)} is no box: it has no area")
        yield where, image, name, (left, top, right, bottom)


def _masks(settings: Any) -> Any:
    """(where, image, name, file or run lengths) of a table of mask files, or of a JSON of run lengths."""
    if settings.table.suffix == ".json":
        content = read_json(settings.table)
        for image, findings in content.items() if isinstance(content, dict) else [(None, None)]:
            if not isinstance(findings, dict):
                raise DataError(f"{settings.table}: expected image -> finding -> run lengths, as CheXlocalize has it")
            for name, rle in findings.items():
                yield f"{settings.table}, {image}", image, name, rle
        return
    table = read_table(settings.table, _MASKS)
    for k, (image, name, file) in enumerate(table.itertuples(index=False)):
        where = f"{settings.table}, row {row_number(table, k)}"
        yield where, image, name, (settings.root or settings.table.parent) / file if file else None


def _check_box(box: tuple[float, float, float, float], frame: tuple[int, int], where: str) -> None:
    left, top, right, bottom = box
    if min(left, top) < -_SLACK or right > frame[0] + _SLACK or bottom > frame[1] + _SLACK:
        raise DataError(
            f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside of the image's "
            f"{frame[0]} x {frame[1]}; if boxes were drawn on images of another size, set data.boxes.frame to it, "
            "such as [1024, 1024] for NIH's"
        )


def _names(paths: Sequence[str]) -> dict[str, str | None]:
    """Each name that an image goes by -> its path; None for a name of several."""
    names: dict[str, str | None] = {}
    for path in paths:
        whole = PurePosixPath(path)
        bare = whole.with_suffix("")
        for name in {path, whole.name, str(bare), bare.name, "_".join(bare.parts[-3:])}:
            names[name] = None if name in names else path
    return names


def _image(names: Mapping[str, str | None], image: str, where: str) -> str | None:
    for name in (image, str(PurePosixPath(image).with_suffix(""))):
        if name in names:
            if names[name] is None:
                raise DataError(f"{where}: {image!r} is the name of several images; give their paths")
            return names[name]
    return None
