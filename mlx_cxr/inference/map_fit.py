"""The fit of a run's maps on its validation images: their scale, the mean features, and each finding's usual place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from mlx_cxr.core.files import RecordError, atomic_path
from mlx_cxr.core.labels import MAPPED
from mlx_cxr.explain.grad_cam import Method
from mlx_cxr.explain.maps import fit_reference
from mlx_cxr.inference.trained_run import image_maps, mean_features
from mlx_cxr.models.resnet import ResNet18
from mlx_cxr.training.batches import ImageSource

FILE = "map_fit.npz"
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class MapFit:
    """The fit; the arrays are in `map_fit.npz`, the references in `inference.json`.

    Attributes:
        baseline: float32 (h, w, 512) of `mean_features`.
        usual: method -> float32 (13, h, w), the mean map of each of `MAPPED`: its usual place, for any image.
        references: method -> finding -> reference activation; NaN for no scale.
        sha256: of the weights.
    """

    baseline: np.ndarray
    usual: dict[str, np.ndarray]
    references: dict[str, dict[str, float]]
    sha256: str

    @classmethod
    def of(cls, model: ResNet18, validation: ImageSource, batch_size: int, sha256: str) -> MapFit:
        """Fit all methods on the validation images."""
        baseline = mean_features(model, validation, batch_size)
        maps, _ = image_maps(model, validation, MAPPED, METHODS, batch_size, baseline)
        references = {
            method: dict(zip(MAPPED, fit_reference(raw).tolist(), strict=True)) for method, raw in maps.items()
        }
        return cls(baseline, {method: raw.mean(axis=1) for method, raw in maps.items()}, references, sha256)

    def save(self, folder: Path) -> Path:
        """Write `map_fit.npz`."""
        with atomic_path(folder / FILE) as temporary:
            np.savez(temporary, baseline=self.baseline, sha256=np.array(self.sha256), **self.usual)
        return folder / FILE

    @classmethod
    def load(cls, folder: Path, references: dict[str, dict[str, float]], sha256: str) -> MapFit:
        """Read `map_fit.npz`, beside the references of `inference.json`.

        Raises:
            RecordError: it is missing, damaged, or of other weights than those with this SHA-256.
        """
        path = folder / FILE
        again = f"run evaluate_cnn --run_name {folder.name} again, with maps"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fit = cls(
                    arrays["baseline"], {name: arrays[name] for name in references}, references, str(arrays["sha256"])
                )
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise RecordError(f"{path} cannot be used ({error}); {again}") from None
        if fit.sha256 != sha256:
            raise RecordError(f"{path} is of other weights than the run has now; {again}")
        return fit
