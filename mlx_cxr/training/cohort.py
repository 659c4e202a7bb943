"""The data of a stage that trains or scores: manifest rows that have pixels, by split, after the leak check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mlx_cxr.core.config import Config
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest, check_patient_splits, labelled_in_turn, load_manifest
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.training.batches import ImageSource


@dataclass(frozen=True)
class SplitData:
    """One split of a cohort, a row per image.

    Attributes:
        name: `train`, `validate` or `test`, or several.
        frame: the manifest's rows.
        raw_labels: float32 (N, 14), 1 / 0 / -1 / NaN; all NaN for an image that nobody labelled.
        images: the images, in the same order.
        withheld: bool (N,), images whose labels a budget took away; None without one.
    """

    name: str
    frame: pd.DataFrame
    raw_labels: np.ndarray
    images: ImageSource
    withheld: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def labelled(self) -> SplitData:
        """The labelled images alone, as `labelled_in_turn`."""
        return self.taken(labelled_in_turn(self.raw_labels, self.withheld))

    def taken(self, rows: np.ndarray) -> SplitData:
        """The given rows, int (M,), an image as often as it is in them."""
        frame = self.frame.iloc[rows].reset_index(drop=True)
        return SplitData(self.name, frame, self.raw_labels[rows], self.images.taken(rows))


@dataclass(frozen=True)
class Cohort:
    """A manifest and its pixel store, opened and checked against each other."""

    manifest: Manifest
    store: PixelStore
    budget_gb: float

    @classmethod
    def open(cls, config: Config) -> Cohort:
        """Open the manifest and pixel store of this configuration.

        Raises:
            DataError: a file is missing, they do not belong together, or a patient is in two splits.
        """
        manifest = load_manifest(config.manifest_path).within_budget(config.labels.budget, config.seed)
        check_patient_splits(manifest.frame)
        transform = Transform.of(config)
        store = PixelStore.open(config.pixels_path, manifest, transform)
        return cls(manifest, store, config.training.pixel_budget_gb)

    def split(self, name: str, *others: str) -> SplitData:
        """The images of a split, or of several; those that could not be read are left out (the store lists them)."""
        frame = self.manifest.frame
        wanted = (
            frame["split"].isin([name, *others]).to_numpy() & ~frame["image_id"].isin(self.store.missing).to_numpy()
        )
        chosen = np.flatnonzero(wanted)
        rows = self.store.rows(frame["image_id"].iloc[chosen])
        # The splits share one budget: a store that does not fit as a whole is read from disk.
        fits = self.store.images.nbytes <= self.budget_gb * 1e9
        images = ImageSource(self.store.images, rows, self.budget_gb if fits else 0.0)
        manifest = self.manifest
        withheld = None if manifest.withheld is None else manifest.withheld[chosen]
        frame = frame.iloc[chosen].reset_index(drop=True)
        return SplitData(" + ".join([name, *others]), frame, manifest.raw_labels[chosen], images, withheld)
