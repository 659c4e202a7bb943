"""Record of the preprocessing that a network was trained with, kept with its run and compared later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import RecordError
from mlx_cxr.data.decoding import Transform
from mlx_cxr.models.resnet import GRAY_MEAN, GRAY_STD, RGB_MEAN, RGB_STD


def preprocessing_record(config: Config) -> dict[str, Any]:
    """Record of this version's preprocessing of an experiment's images, from file to network input, JSON-ready.

    Returns:
        `transform` (as `Transform.plain`), `normalization` (`in_channels`, and `mean` and `std` per channel of images
        in [0, 1]) and `dicom_recipe`, by which a DICOM becomes an image like those of the training data.
    """
    channels = config.model.in_channels
    mean, std = ([GRAY_MEAN], [GRAY_STD]) if channels == 1 else (list(RGB_MEAN), list(RGB_STD))
    return {
        "transform": Transform.of(config).plain(),
        "normalization": {"in_channels": channels, "mean": mean, "std": std},
        "dicom_recipe": config.dicom_recipe,
    }


def check_preprocessing(recorded: Mapping[str, Any], config: Config, where: object) -> None:
    """Refuse a network that was trained with other preprocessing than this version's.

    Args:
        recorded: `preprocessing_record` of the training.
        where: the file that holds the record.

    Raises:
        RecordError: they differ; names each key with both values.
    """
    if not isinstance(recorded, Mapping):
        raise RecordError(f"{where}: no preprocessing is recorded; evaluate the run again")
    now = preprocessing_record(config)
    faults = [
        f"{key}: recorded {recorded.get(key)!r}, this version has {now.get(key)!r}"
        for key in sorted({*now, *recorded})
        if recorded.get(key) != now.get(key)
    ]
    if faults:
        raise RecordError(
            f"{where}: films are no longer prepared as they were for this network, so its answers would be wrong:\n  "
            + "\n  ".join(faults)
            + "\nuse the version that it was trained with, or train again"
        )
