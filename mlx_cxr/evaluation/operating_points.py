"""Operating points: temperatures, thresholds and conformal bands, which turn logits into calls.

A finding is called at its threshold, and only where the call is all that conformal prediction leaves plausible; else
the model abstains. Of findings that validation has too few studies of, or too few without, it makes no call. All of it
is fitted per study. An image that is read alone is taken as a study of one image, for which the coverage of `conformal`
holds as far as such an image is like a validation study; and it holds for images from the source that validation came
from, not for another hospital's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
from mlx_cxr.evaluation.calibration import Calibration
from mlx_cxr.evaluation.conformal import ConformalBands
from mlx_cxr.evaluation.metrics import Thresholds

SCHEMA = 1
FILE = "operating_points.json"
"""In the folder of every run that was scored."""
PRESENT, ABSENT, ABSTAIN = 1, 0, -1
STATE_WORDS = {PRESENT: "present", ABSENT: "absent", ABSTAIN: "abstain"}

Unit = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LabelPoint(_Strict):
    """Operating point of a finding."""

    threshold: Unit
    """On the calibrated probability."""
    threshold_source: Literal["validation", "default"]
    """`default`: 0.5, as validation has one class only."""
    temperature: Annotated[float, Field(gt=0)]
    """Of the logits: the calibrated probability is sigmoid(logit / temperature)."""
    temperature_source: Literal["validation", "bound", "default"]
    """`bound`: the end of the range; `default`: 1, as validation has one class only."""
    lower: Unit
    upper: Unit
    """Conformal bands: a lower probability rules "present" out, a higher one "absent"."""
    positives: Annotated[int, Field(ge=0)]
    negatives: Annotated[int, Field(ge=0)]
    """Validation studies of the conformal bands."""


class OperatingPointsFile(_Strict):
    """Temperatures, thresholds and conformal bands, fitted on validation."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    run: str
    synthetic: bool
    """Format, name of the run, and cohort."""
    made_from: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    """Role (the checkpoint, the manifest, ...) to SHA-256."""
    protocol: Literal[tuple(SCORING_PROTOCOLS)]  # type: ignore[valid-type]
    """Of the validation targets, a key of `labels.SCORING_PROTOCOLS`."""
    threshold_rule: Literal["youden", "f1"]
    """As `metrics.choose_thresholds`."""
    alpha: Annotated[float, Field(gt=0, lt=1)]
    """Of the conformal bands."""
    labels: dict[str, LabelPoint]
    """The 14 findings, in the order of `labels.LABELS`."""

    @model_validator(mode="after")
    def _labels_hang_together(self) -> OperatingPointsFile:
        if tuple(self.labels) != LABELS:
            raise ValueError(f"its labels are {', '.join(self.labels)}; those of this version are {', '.join(LABELS)}")
        for label, entry in self.labels.items():
            if (entry.threshold_source == "default") != (min(entry.positives, entry.negatives) == 0):
                raise ValueError(
                    f"{label}: threshold_source is {entry.threshold_source!r} with {entry.positives} positives and "
                    f"{entry.negatives} negatives"
                )
        return self


@dataclass(frozen=True)
class Decisions:
    """Answers of a model for N studies.

    Attributes:
        probabilities: float64 (N, 14) in [0, 1], calibrated.
        states: int8 (N, 14), each `PRESENT`, `ABSENT` or `ABSTAIN`.
    """

    probabilities: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class OperatingPoints:
    """Parameters fitted on validation, which turn logits into calls.

    Attributes:
        calibration: temperatures.
        thresholds: on calibrated probabilities.
        protocol: of the validation targets, a key of `labels.SCORING_PROTOCOLS`.
        bands: on calibrated probabilities; what they leave plausible gates the calls.
    """

    calibration: Calibration
    thresholds: Thresholds
    protocol: str
    bands: ConformalBands

    @property
    def tuned(self) -> np.ndarray:
        """bool (14,): the findings whose threshold validation chose."""
        return np.array([source == "validation" for source in self.thresholds.sources])

    @property
    def tuned_thresholds(self) -> np.ndarray:
        """float64 (14,) thresholds, NaN where validation could choose none."""
        return np.where(self.tuned, self.thresholds.values, np.nan)

    def decide(self, logits: np.ndarray) -> Decisions:
        """Calibrated probabilities and calls.

        Args:
            logits: (N, 14), before temperature scaling.

        Raises:
            ValueError: another shape, or a logit that is not finite.
        """
        logits = np.asarray(logits)
        if logits.ndim != 2 or logits.shape[1] != len(LABELS):
            raise ValueError(f"logits have shape {logits.shape}, expected (N, {len(LABELS)})")
        if not np.isfinite(logits).all():
            row, column = np.argwhere(~np.isfinite(logits))[0]
            raise ValueError(f"row {row}, {LABELS[column]}: logit {logits[row, column]} is not finite")
        probabilities = self.calibration.probabilities(logits)
        return Decisions(probabilities, self.states(probabilities))

    def states(self, probabilities: np.ndarray) -> np.ndarray:
        """int8 (N, 14) calls of calibrated probabilities (N, 14).

        A call is made where the conformal set is exactly what the threshold calls. Of a finding with too few validation
        studies of a class none is made: the class could never be ruled out, so that every call would be the other one.
        """
        above = probabilities >= self.thresholds.values
        present, absent = self.bands.present_plausible(probabilities), self.bands.absent_plausible(probabilities)
        states = np.full(probabilities.shape, ABSTAIN, dtype=np.int8)
        states[above & present & ~absent & self.bands.fitted] = PRESENT
        states[~above & absent & ~present & self.bands.fitted] = ABSENT
        return states

    def abstention_zone(self, column: int) -> tuple[float, float]:
        """Range of calibrated probabilities without a call on a finding: its lower and its higher end.

        A call needs the conformal set to be just what the threshold says, so it is made beyond the threshold and both
        bands only; all of [0, 1] where validation has too few studies of a class.
        """
        if not self.bands.fitted[column]:
            return 0.0, 1.0
        ends = self.thresholds.values[column], self.bands.lower[column], self.bands.upper[column]
        return float(min(ends)), float(max(ends))

    def reason(self, column: int, probability: float) -> str:
        """Reason why the model abstains on a finding, in words; empty where it makes a call.

        Args:
            column: of the finding in `labels.LABELS`.
            probability: calibrated, in [0, 1].
        """
        bands, label = self.bands, LABELS[column]
        counts = {"with": int(bands.positives[column]), "without": int(bands.negatives[column])}
        fewest = min(counts, key=counts.__getitem__)
        if counts[fewest] < bands.needed:
            return (
                f"too few examples {fewest} {label} on validation ({counts[fewest]}; {bands.needed} needed at alpha "
                f"{bands.alpha:g})"
            )
        above = probability >= self.thresholds.values[column]
        present, absent = probability >= bands.lower[column], probability <= bands.upper[column]
        sure = f"{100 * (1 - bands.alpha):.4g} %"
        if present and absent:
            return f"both present and absent are plausible at {sure}"
        if not present and not absent:
            return f"neither present nor absent fits at {sure}: unlike the validation films of either kind"
        if present != above:
            said, plausible = ("present", "absent") if above else ("absent", "present")
            return f"the threshold says {said}, but at {sure} only {plausible} is plausible"
        return ""


def label_entries(points: OperatingPoints) -> dict[str, dict[str, Any]]:
    """The `labels` of `OperatingPointsFile`; `points_of_entries` reads them."""
    calibration, thresholds, bands = points.calibration, points.thresholds, points.bands
    return {
        label: {
            "threshold": float(thresholds.values[k]),
            "threshold_source": thresholds.sources[k],
            "temperature": float(calibration.temperatures[k]),
            "temperature_source": calibration.sources[k],
            "lower": float(bands.lower[k]),
            "upper": float(bands.upper[k]),
            "positives": int(bands.positives[k]),
            "negatives": int(bands.negatives[k]),
        }
        for k, label in enumerate(LABELS)
    }


def points_of_entries(
    entries: Mapping[str, Mapping[str, Any]], protocol: str, rule: str, alpha: float
) -> OperatingPoints:
    """Operating points from what `label_entries` made of them.

    Raises:
        KeyError: a finding or a value is missing.
    """

    def column(key: str) -> tuple[Any, ...]:
        return tuple(entries[label][key] for label in LABELS)

    temperatures, thresholds, lower, upper = (
        np.array(column(key), dtype=np.float64) for key in ("temperature", "threshold", "lower", "upper")
    )
    counts = (np.array(column(key), dtype=np.int64) for key in ("positives", "negatives"))
    return OperatingPoints(
        Calibration(temperatures, column("temperature_source")),
        Thresholds(thresholds, column("threshold_source"), rule),
        protocol,
        ConformalBands(alpha, lower, upper, *counts),
    )


def write_operating_points(
    path: str | Path, points: OperatingPoints, *, run: str, synthetic: bool, made_from: Mapping[str, str]
) -> Path:
    """Write `operating_points.json` atomically and return its path.

    `made_from` is role to the SHA-256 of what the predictions came from.
    """
    return write_record(
        path,
        {
            "schema": SCHEMA,
            "run": run,
            "synthetic": synthetic,
            "made_from": dict(made_from),
            "protocol": points.protocol,
            "threshold_rule": points.thresholds.rule,
            "alpha": points.bands.alpha,
            "labels": label_entries(points),
        },
    )


def read_operating_points(path: str | Path) -> tuple[OperatingPoints, dict[str, Any]]:
    """Read and check what `write_operating_points` wrote; every number comes back exactly.

    Returns:
        The operating points, and `run`, `synthetic` and `made_from`.

    Raises:
        RecordError: the file is missing, of another schema, or damaged: names each fault.
    """
    path = Path(path)
    again = "run evaluate_cnn again (for a teacher cache_teacher_outputs)"
    if not path.exists():
        raise RecordError(f"{path} is missing, as in a run that was not scored by this version; {again}")
    plain = read_record(path)
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if schema != SCHEMA:
        raise RecordError(f"{path} has schema {schema}, not {SCHEMA}; {again}")
    try:
        checked = OperatingPointsFile.model_validate(plain)
    except ValidationError as error:
        faults = "\n  ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'labels'}: {fault['msg']}" for fault in error.errors()
        )
        raise RecordError(f"{path} cannot be used; {again}:\n  {faults}") from None
    entries = {label: entry.model_dump() for label, entry in checked.labels.items()}
    points = points_of_entries(entries, checked.protocol, checked.threshold_rule, checked.alpha)
    return points, {"run": checked.run, "synthetic": checked.synthetic, "made_from": checked.made_from}
