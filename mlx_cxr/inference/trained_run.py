"""A trained run, its record and weights, checked against the data that it is to score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_cxr.core.config import Config, config_from_plain
from mlx_cxr.core.files import RecordError, sha256_file
from mlx_cxr.core.runs import open_run
from mlx_cxr.evaluation.predictions import Predictions, study_level
from mlx_cxr.explain.grad_cam import SHIFTS, Method, finer_features, maps_of_features
from mlx_cxr.models.convert import freeze, load_model
from mlx_cxr.models.folded import FoldedResNet18
from mlx_cxr.models.resnet import ResNet18, parameter_counts
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.cohort import SplitData
from mlx_cxr.training.scoring import image_features, predict_logits

STAGES = ("train_cnn", "distillation")
"""The stages whose runs are opened here."""


@dataclass(frozen=True)
class TrainedRun:
    """A run folder that `train_cnn` or `distillation` made.

    Attributes:
        folder: the run's.
        config: the configuration that it was trained with.
        manifest_sha256: of the manifest that it was trained on.
        checkpoint: its weights file.
        model: those weights, in evaluation mode.
    """

    folder: Path
    config: Config
    manifest_sha256: str
    checkpoint: Path
    model: ResNet18

    @classmethod
    def open(cls, folder: str | Path) -> TrainedRun:
        """Read a run's record and weights.

        Raises:
            RecordError: there is no such run, its record is incomplete, it is no CNN's or student's, or it has
                no weights yet.
            ConfigError: its configuration does not fit this version.
            ModelFormatError: its weights cannot be used.
        """
        run = open_run(folder, *STAGES)
        if not run.weights.exists():
            raise RecordError(f"{run.folder} has no {run.weights.name}; has its training saved an epoch yet?")
        config, manifest_sha256 = config_from_plain(run.config, run.path), run.inputs["manifest"]["sha256"]
        return cls(run.folder, config, manifest_sha256, run.weights, load_model(run.weights))

    @property
    def protocol(self) -> str:
        """The key of `labels.SCORING_PROTOCOLS` that treats empty labels as the training did."""
        return f"empty_{self.config.labels.empty}"

    @property
    def parameters(self) -> dict[str, int]:
        """`parameter_counts` of the network as it was trained, with what was frozen then."""
        model = ResNet18(self.model.config)
        freeze(model, self.config.model.freeze_stages, self.config.model.freeze_batchnorm)
        return parameter_counts(model)

    def check(self, config: Config) -> None:
        """Refuse other data than the run was trained for; `config` is of the experiment that is to be scored.

        Raises:
            RecordError: manifest, pixels, model or the synthetic flag differ; names each with both values.
            OSError: the manifest cannot be read.
        """
        weights = self.model.config
        pairs = {
            f"manifest {config.manifest_path} (SHA-256)": (self.manifest_sha256, sha256_file(config.manifest_path)),
            "data.synthetic": (self.config.data.synthetic, config.data.synthetic),
            "pixels.size": (self.config.pixels.size, config.pixels.size),
            "pixels.fit": (self.config.pixels.fit, config.pixels.fit),
            "model.in_channels": (weights.in_channels, config.model.in_channels),
            "model.output_stride": (weights.output_stride, config.model.output_stride),
        }
        faults = [f"{key}: the run has {a}, this is {b}" for key, (a, b) in pairs.items() if a != b]
        if faults:
            raise RecordError(
                f"{self.folder} was trained for something else:\n  " + "\n  ".join(faults) + "\n"
                "use the configuration and manifest that it was trained with, or train again under another --run_name"
            )


def study_predictions(model: ResNet18, data: SplitData, batch_size: int) -> Predictions:
    """A row per study of a split; its logit is the mean over its images."""
    return study_level(data.frame, data.raw_labels, predict_logits(model, data.images, batch_size))


def image_maps(
    model: ResNet18,
    images: ImageSource,
    labels: Sequence[str],
    methods: Sequence[Method],
    batch_size: int,
    baseline: np.ndarray | None = None,
) -> tuple[dict[Method, np.ndarray], np.ndarray]:
    """Maps of every image of a source by some methods: of all labels, with one pass of the trunk per batch and shift.

    Args:
        baseline: of `mean_features`; needed for `contrast_cam`, whose maps are the finer ones.

    Returns:
        Method -> float32 (K, N, h, w), not scaled (`explain.maps.scale_maps`); and the logits (N, 14) of the same
        passes.
    """
    network = FoldedResNet18.of(model)
    trunk, stride = image_features(network), model.config.output_stride
    against = None if baseline is None else mx.array(baseline)
    logits: list[np.ndarray] = []
    made: dict[Method, list[np.ndarray]] = {method: [] for method in methods}
    for some in _batches(images, batch_size):
        fine = finer_features(trunk, some, stride) if "contrast_cam" in methods else None
        plain = trunk(some) if fine is None else fine[:, ::SHIFTS, ::SHIFTS]
        logits.append(np.array(network.head(plain)))
        for method, parts in made.items():
            a = fine if method == "contrast_cam" else plain
            parts.append(maps_of_features(network, a, labels, method, against).raw)
    return {method: np.concatenate(parts, axis=1) for method, parts in made.items()}, np.concatenate(logits)


def mean_features(model: ResNet18, images: ImageSource, batch_size: int) -> np.ndarray:
    """float32 (h, w, 512): mean of the images' `finer_features`, the baseline of `contrast_cam`."""
    trunk, stride = image_features(FoldedResNet18.of(model)), model.config.output_stride
    sums = [
        np.array(mx.sum(finer_features(trunk, some, stride), axis=0), dtype=np.float64)
        for some in _batches(images, batch_size)
    ]
    return (np.sum(sums, axis=0) / len(images)).astype(np.float32)


def pooled_features(model: ResNet18, images: ImageSource, batch_size: int) -> np.ndarray:
    """float32 (N, 512): the mean of each image's last feature map, which the last layer makes logits of."""
    trunk = image_features(FoldedResNet18.of(model))
    return np.concatenate([np.array(mx.mean(trunk(some), axis=(1, 2))) for some in _batches(images, batch_size)])


def _batches(images: ImageSource, batch_size: int) -> Iterator[mx.array]:
    rows = np.arange(len(images))
    return images.batches([rows[i : i + batch_size] for i in range(0, len(images), batch_size)])
