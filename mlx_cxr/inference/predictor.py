"""An evaluated run that answers for any image: calibrated probabilities, calls, abstention and maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, sha256_file, write_record
from mlx_cxr.core.labels import MAPPED
from mlx_cxr.data.decoding import ImageContent, ImageError, Recipe, Transform
from mlx_cxr.evaluation.operating_points import FILE as POINTS_FILE
from mlx_cxr.evaluation.operating_points import OperatingPoints, read_operating_points
from mlx_cxr.explain.grad_cam import Method, finer_features, maps_of_features
from mlx_cxr.explain.maps import REFERENCE_QUANTILE, scale_maps
from mlx_cxr.inference.answers import ImageAnswer, ImageInput
from mlx_cxr.inference.map_fit import MapFit
from mlx_cxr.inference.trained_run import TrainedRun
from mlx_cxr.models.folded import FoldedResNet18, inference_network
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.training.preprocessing import check_preprocessing, preprocessing_record
from mlx_cxr.training.scoring import image_features

FILE = "inference.json"
SCHEMA = 2


class PredictorError(UserError, ValueError):
    """Something that a predictor cannot be asked for."""


def write_inference_record(trained: TrainedRun, references: Mapping[str, Mapping[str, float]], images: int) -> Path:
    """Write `inference.json`, a `record_schema.InferenceRecord`.

    Args:
        trained: the run.
        references: of `MapFit`; empty where maps were not asked for.
        images: of validation that they were fitted on.

    Raises:
        RecordError: its training recorded other preprocessing than this version's.
    """
    training = trained.folder / "training.json"
    recorded = read_record(training).get("preprocessing") if training.exists() else None
    if recorded is not None:
        check_preprocessing(recorded, trained.config, training)
    return write_record(
        trained.folder / FILE,
        {
            "schema": SCHEMA,
            "run": trained.folder.name,
            "synthetic": trained.config.data.synthetic,
            "checkpoint": {"name": trained.checkpoint.name, "sha256": sha256_file(trained.checkpoint)},
            "preprocessing": recorded or preprocessing_record(trained.config),
            "map_references": {"quantile": REFERENCE_QUANTILE, "films": images, "methods": references},
        },
    )


def read_references(trained: TrainedRun) -> dict[str, dict[str, float]]:
    """The map references of a run's `inference.json`: method to label to reference activation, NaN for no scale.

    Raises:
        RecordError: the file is missing, of another version or of other weights than the run has now, or images are
            prepared in another way now.
    """
    path = trained.folder / FILE
    again = f"evaluate the run again: {_evaluation(trained)}"
    if not path.exists():
        raise RecordError(f"{path} is missing: evaluate the run first: {_evaluation(trained)}")
    record = read_record(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RecordError(f"{path} was written by another version; {again}")
    try:
        evaluated, recorded = record["checkpoint"]["sha256"], record["preprocessing"]
        references = {
            method: {label: np.nan if value is None else float(value) for label, value in entry.items()}
            for method, entry in record["map_references"]["methods"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} cannot be used ({error!r}); {again}") from None
    _check_weights(trained, path, evaluated)
    check_preprocessing(recorded, trained.config, path)
    return references


def read_map_fit(trained: TrainedRun) -> MapFit | None:
    """The run's `MapFit`; None where it was evaluated without maps. Raises as `read_references` and `MapFit.load`."""
    references = read_references(trained)
    return MapFit.load(trained.folder, references, sha256_file(trained.checkpoint)) if references else None


def _check_weights(trained: TrainedRun, path: Path, sha256: str | None) -> None:
    """Refuse a file of the run that was made from other weights than it has now."""
    if sha256 != sha256_file(trained.checkpoint):
        raise RecordError(
            f"{trained.checkpoint} changed since {path} was written; evaluate the run again: {_evaluation(trained)}"
        )


def _evaluation(trained: TrainedRun) -> str:
    return f"python -m mlx_cxr.evaluate_cnn --config YOUR.yaml --run_name {trained.folder.name}"


@dataclass(frozen=True)
class Predictor:
    """An evaluated CNN or student that answers for any image.

    MLX's streams belong to a thread: what one thread opened, that thread asks. `read` may be called in any.

    Attributes:
        trained: the run.
        points: what was fitted on its validation split, and turns logits into calls.
        map_fit: the scale and baseline of its maps; None where it was evaluated without.
        batch_size: images per forward pass.
        precision: `float32`, or `auto` for float16 where the device is faster with it and the logits of the first batch
            agree (`models.folded.inference_network`).
    """

    trained: TrainedRun
    points: OperatingPoints
    map_fit: MapFit | None
    batch_size: int = 32
    precision: Literal["float32", "auto"] = "float32"
    _ready: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise PredictorError(f"batch size {self.batch_size}: give at least 1")

    @classmethod
    def from_run(
        cls, folder: str | Path, batch_size: int = 32, precision: Literal["float32", "auto"] = "float32"
    ) -> Predictor:
        """Open a run that `evaluate_cnn` has evaluated.

        Raises:
            RecordError: there is no such run, it is not evaluated, its weights changed since, or images are prepared
                in another way now.
            ConfigError, ModelFormatError: its record or weights are not this version's.
        """
        trained = TrainedRun.open(folder)
        map_fit = read_map_fit(trained)
        path = trained.folder / POINTS_FILE
        points, record = read_operating_points(path)
        _check_weights(trained, path, record["made_from"].get("checkpoint"))
        return cls(trained, points, map_fit, batch_size, precision)

    @property
    def transform(self) -> Transform:
        """Geometry and size of the images that the network sees."""
        return Transform.of(self.trained.config)

    @property
    def synthetic(self) -> bool:
        """It was trained on the synthetic cohort."""
        return self.trained.config.data.synthetic

    @property
    def methods(self) -> tuple[str, ...]:
        """The map methods that have a scale in this run."""
        return tuple(self.map_fit.references) if self.map_fit else ()

    @property
    def computed_in(self) -> str:
        """The precision that the images so far were scored in, such as `float32`."""
        network = self._ready.get("network")
        return str(mx.float32 if network is None else network.dtype).removeprefix("mlx.core.")

    def read(
        self, source: str | Path | bytes | np.ndarray | ImageContent, name: str = "", recipe: Recipe | None = None
    ) -> ImageInput:
        """An image from a file, from a file's bytes, or from an array; never raises for what is wrong with it.

        Args:
            source: a path; the content of a JPEG, PNG, TIFF, BMP or DICOM file; uint8 (H, W) or (H, W, 3) pixels; or an
                `ImageContent`, which other transforms may share.
            name: to tell it by; the default is the path.
            recipe: how a DICOM's values become gray levels, see `data.dicom`; None for that of the training.
        """
        name = name or (str(source) if isinstance(source, (str, Path)) else "film")
        try:
            if isinstance(source, np.ndarray):
                if source.dtype != np.uint8 or not (source.ndim == 2 or source.shape[2:] == (3,)) or not source.size:
                    raise ImageError(f"an array of {source.dtype} {source.shape}; give uint8 (H, W) or (H, W, 3)")
                source = Image.fromarray(source)
            elif isinstance(source, str):
                source = Path(source)
            content = source if isinstance(source, ImageContent) else ImageContent(source)
            image = content.decode(replace(self.transform, recipe=recipe or self.transform.recipe))
        except ImageError as error:
            return ImageInput(name, None, error=str(error))
        return ImageInput(name, np.asarray(image.gray), image.notes, image.concerns)

    def predict(self, images: Sequence[ImageInput], ignore_gate: bool = False) -> list[ImageAnswer]:
        """Answers in the images' order, those that cannot be read included; `ignore_gate` as in `ImageAnswer`."""
        readable = [image.pixels for image in images if image.pixels is not None]
        seen = iter(())
        if readable:
            logits, features = self._scored(np.stack(readable))
            decided = self.points.decide(logits)
            # Copies, so that no answer holds the features of all.
            seen = zip(logits, decided.probabilities, decided.states, (a.copy() for a in features), strict=True)
        return [
            ImageAnswer(image) if image.pixels is None else ImageAnswer(image, *next(seen), ignore_gate)
            for image in images
        ]

    def _scored(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits (N, 14), and last feature maps (N, h, w, 512), float32."""
        size = min(self.batch_size, len(pixels))
        logits, features = [], []
        for start in range(0, len(pixels), size):
            # The last batch is filled up, so that one graph serves all.
            items = np.resize(np.arange(start, min(start + size, len(pixels))), size)
            batch = mx.array(pixels[items])
            if not self._ready:
                trial = preprocess(batch, self.trained.model.config.in_channels) if self.precision == "auto" else None
                self._take(inference_network(self.trained.model, trial))
            scored = self._batch(batch)
            if self._ready["network"].dtype != mx.float32 and not np.isfinite(scored[0]).all():
                # An image beyond the range of float16, which the first batch did not show.
                self._take(FoldedResNet18.of(self.trained.model))
                scored = self._batch(batch)
            for parts, part in zip((logits, features), scored, strict=True):
                parts.append(part[: len(pixels) - start])
        return np.concatenate(logits), np.concatenate(features)

    def _batch(self, images: mx.array) -> tuple[np.ndarray, np.ndarray]:
        a = self._ready["trunk"](images)
        return np.array(self._ready["network"].head(a).astype(mx.float32)), np.array(a)

    def _take(self, network: FoldedResNet18) -> None:
        self._ready.update(network=network, trunk=image_features(network))

    def predict_files(
        self, paths: Iterable[str | Path], recipe: Recipe | None = None, ignore_gate: bool = False, workers: int = 2
    ) -> Iterator[ImageAnswer]:
        """Answers for files, in their order; a batch is decoded while the one before it is scored."""
        paths = iter(paths)
        with ThreadPoolExecutor(max_workers=workers) as readers:

            def begin() -> list:
                return [readers.submit(self.read, path, "", recipe) for path in islice(paths, self.batch_size)]

            coming = begin()
            while coming:
                images = [future.result() for future in coming]
                coming = begin()
                yield from self.predict(images, ignore_gate)

    def maps(self, answer: ImageAnswer, labels: Sequence[str] = MAPPED, method: Method = "contrast_cam") -> np.ndarray:
        """float32 (K, h, w): maps of findings as shares of their reference activation, as `explain.maps.scale_maps`.

        They are made from the features of the pass that gave the answer, those of `contrast_cam` from passes of its
        own over the shifted image. NaN for a finding whose maps were zero on all
        of validation.

        Raises:
            KeyError: the run has no reference for this method or finding.
            ValueError: the image could not be read.
        """
        if answer.features is None:
            raise ValueError(f"{answer.image.name}: {answer.image.error}")
        if self.map_fit is None:
            raise KeyError(f"{self.trained.folder.name} was evaluated without maps")
        reference = np.array([self.map_fit.references[method][label] for label in labels])
        network = self._ready.get("network") or FoldedResNet18.of(self.trained.model)
        a, baseline = mx.array(answer.features)[None], None
        if method == "contrast_cam":
            trunk, baseline = self._ready.get("trunk") or image_features(network), mx.array(self.map_fit.baseline)
            a = finer_features(trunk, mx.array(answer.image.pixels)[None], network.config.output_stride)
        return scale_maps(maps_of_features(network, a, labels, method, baseline).raw[:, 0], reference)
