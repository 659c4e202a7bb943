"""JSON files of an export: the preprocessing, the labels, and the run's record without what is private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_cxr.core.config_schema import Section
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.labels import LABELS, label_word
from mlx_cxr.inference.evaluated_run import EvaluatedRun
from mlx_cxr.publishing.model_card import last_part, public_name

SCHEMA = 1

_SOURCE_VALUES = {str(value): label_word(value) for value in (1, 0, -1)} | {"": "not mentioned (an empty cell)"}
_GEOMETRY = {
    "letterbox": "Resize the whole film, aspect ratio kept, so that its longer side has {size} pixels (the other is "
    "rounded half to even, at least 1), and centre it on a black square of {size}; of an odd margin the smaller half "
    "lies left and above.",
    "center_crop": "Cut out the film's central square, whose side is the shorter one and whose corner may lie at half "
    "a pixel, and resize it to {size} x {size}.",
}
_DICOM = {
    "mimic": "Recipe `mimic`, that of MIMIC-CXR-JPG (arXiv:1901.07042), in place of the two steps above: stored values "
    "as they are, without modality LUT, VOI window or padding mask; (v - lowest) / (highest - lowest) * 255, fractions "
    "cut off; 255 minus that for MONOCHROME1 (and for a negative Rescale Slope, once where both hold); histogram "
    "equalization as OpenCV's `equalizeHist`.",
    "window": "Recipe `window`, in place of the two steps above: modality LUT or rescale, then the file's first VOI "
    "LUT or window (DICOM PS3.3 C.11), or without one from the lowest to the highest value that is no padding; its "
    "range to 0..255, fractions cut off; 255 minus that for MONOCHROME1; padding 0. Training films that were no DICOMs "
    "need not have been made so: compare before trusting a DICOM.",
}


def preprocessing_file(run: EvaluatedRun) -> dict[str, Any]:
    """Content of `preprocessing.json`: the way from an image to the network's input, in numbers and in words.

    Returns:
        `transform`, `normalization` and `dicom_recipe` as `training.preprocessing` records them, `input` (shapes and
        layouts), and `steps` in their order, each `name` and `how`.
    """
    recorded = run.inference["preprocessing"]
    size, fit = recorded["transform"]["size"], recorded["transform"]["fit"]
    mean, std, channels = (recorded["normalization"][key] for key in ("mean", "std", "in_channels"))
    repeated = "" if channels == 1 else " Three channels are the gray film three times, each with its own numbers."
    steps = {
        "decode": "JPEG, PNG, TIFF or BMP with Pillow; an EXIF orientation is applied. A JPEG whose shown side is at "
        f"least 2 x {size} x r px, r in 8, 4, 2, is reduced by the largest such r in the DCT domain while it is "
        "decoded (Pillow's `Image.draft`).",
        "gray levels": "8-bit gray as it is. More bits: (v - lowest) * 255 // (highest - lowest) of that film. Colour: "
        "ITU-R 601 luma, (19595 R + 38470 G + 7471 B + 32768) >> 16; of a colour JPEG its Y channel. Transparent "
        "parts black.",
        "DICOM": _DICOM[recorded["dicom_recipe"]],
        "geometry": _GEOMETRY[fit].format(size=size),
        "resizing": "Bicubic (a = -0.5), antialiased, as Pillow's `Image.resize` with `Resampling.BICUBIC`; the result "
        f"is 8-bit, {size} x {size}.",
        "normalization": f"(v / 255 - mean) / std with mean {mean} and std {std}.{repeated}",
        "probability": "sigmoid(logit / temperature) with the finding's temperature of `operating_points.json`. The "
        "logit of a study of several films is the mean of theirs.",
        "call": "Present where the probability is at least `threshold`, else absent; but abstain unless that is all "
        "that stays plausible: present is ruled out below `lower`, absent above `upper`. No call where `positives` or "
        "`negatives` is below ceil(1 / `alpha`) - 1.",
    }
    return {
        "schema": SCHEMA,
        "notice": footer(run.synthetic),
        **recorded,
        "input": {"dtype": "float32", "torchvision": ["N", channels, size, size], "mlx": ["N", size, size, channels]},
        "pillow": run.record["packages"].get("pillow"),
        "steps": [{"name": name, "how": how} for name, how in steps.items()],
    }


def labels_file(run: EvaluatedRun, origin: str) -> dict[str, Any]:
    """Content of `labels.json`: the 14 in the order of the logits, and the training target of each source value.

    `origin` is the source of the labels, in words.
    """
    raw = np.array([[1.0, 0.0, -1.0, np.nan]]).T
    targets = run.config.labels.policy().apply(np.repeat(raw, len(LABELS), axis=1))
    return {
        "schema": SCHEMA,
        "labels": list(LABELS),
        "origin": origin,
        "source_values": _SOURCE_VALUES,
        "target_in_training": {
            "meaning": "1 present, 0 absent, between: a soft target; null: left out of the loss",
            "per_label": {
                label: dict(zip(_SOURCE_VALUES, targets[:, k].tolist(), strict=True)) for k, label in enumerate(LABELS)
            },
        },
    }


def public_record(run: EvaluatedRun) -> dict[str, Any]:
    """The run's `config.json` without folders, user names and the places of files: of each path its last part stays.

    It still is a configuration that `config.config_from_plain` takes.
    """
    record = dict(run.record)
    # Of an argument such as `data.root=/home/me/images` each side of the equals sign.
    parts = (argument.split("=", 1) for argument in record["command"])
    record["command"] = ["=".join(map(last_part, both)) for both in parts]
    record["inputs"] = {role: {**entry, "path": last_part(entry["path"])} for role, entry in record["inputs"].items()}
    config = _public_section(run.config)
    config["model"]["weights"] = last_part(run.config.model.weights)
    config["teacher"]["base"] = public_name(run.config.teacher.base)
    record["config"] = config
    return record


def _public_section(section: Section) -> dict[str, Any]:
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            plain[name] = _public_section(value)
        elif isinstance(value, Path):
            plain[name] = last_part(str(value))
    return plain
