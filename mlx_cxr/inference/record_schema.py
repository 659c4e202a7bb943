"""Schema of `inference.json`, which `evaluate_cnn` leaves in a run for the `Predictor`."""

from __future__ import annotations

from typing import Any, TypedDict


class CheckpointEntry(TypedDict):
    """Weights that were evaluated."""

    name: str
    sha256: str
    """Of the file."""


class MapReferences(TypedDict):
    """Reference activations of the maps, fitted on validation."""

    quantile: float
    """Of the largest activations, as `explain.maps.fit_reference`."""
    films: int
    """Number of validation images."""
    methods: dict[str, dict[str, float | None]]
    """Method to finding to the reference activation of `explain.maps.fit_reference`; null where the maps are zero on
    all of validation. Empty without maps."""


class InferenceRecord(TypedDict):
    """Weights, preprocessing and map references of an evaluated run."""

    schema: int
    run: str
    synthetic: bool
    """Format, name of the run, and cohort."""
    checkpoint: CheckpointEntry
    """Weights that the figures belong to."""
    preprocessing: dict[str, Any]
    """`training.preprocessing.preprocessing_record` of the training."""
    map_references: MapReferences
    """Scales of the maps."""
