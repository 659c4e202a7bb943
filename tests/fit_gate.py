"""The fit of `mlx_cxr.data.chest_film_gate`, and how well it does on kinds and sources of images that it has not seen.

`python tests/fit_gate.py` writes `chest_gate.npz` from all images of `chest_views`; `--validate` prints the rates by
five-fold cross-validation over patients, by leaving out each kind of image, and by leaving out each source of frontal
images. The thresholds are those of the cross-validation throughout, so of all sources of frontal images.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass

import numpy as np
from chest_views import FIT_SEED, PARTS, TURNS, drawn_images, drawn_part, part_of, photographs, real_images, varied

from mlx_cxr.data.chest_film_gate import MODEL, Gate, features_of

VARIANTS, OTHER_VARIANTS, DRAWINGS = 4, 16, 60
COMPONENTS = 30
SHRINKAGE = 0.3
"""Of the covariance within kinds, toward a multiple of the identity; from 0.3 to 3 the rates hardly change."""
ALARMS = (0.005, 0.001)
"""Share of plain real frontal images, out of fold, that log-odds and distance may object to."""
FOLDS = 5


@dataclass(frozen=True)
class Examples:
    """Features (N, F) and of each: kind, source, patient, and whether it is as it came (no variant, real)."""

    features: np.ndarray
    kinds: np.ndarray
    sources: np.ndarray
    patients: np.ndarray
    plain: np.ndarray

    def only(self, rows: np.ndarray) -> Examples:
        """Some of them."""
        return Examples(*(values[rows] for values in vars(self).values()))


def examples() -> Examples:
    """All images, variants of them, and drawings."""
    rows = []

    def add(image, kind, source, patient, plain=False):
        rows.append((features_of(image), kind, source, patient, plain))

    for real in real_images():
        rng = np.random.default_rng(zlib.crc32(real.name.encode()))
        identity = (real.source, real.patient)
        add(real.gray, real.kind, *identity, plain=True)
        small = real.gray.copy()
        small.thumbnail((256, 256))
        for _ in range(VARIANTS if real.kind == "frontal" else OTHER_VARIANTS):
            add(varied(small, rng), real.kind, *identity)
        if real.kind == "frontal":
            fault = rng.choice([*TURNS, "part"])
            faulty = part_of(small, rng, 0.25, 0.5) if fault == "part" else TURNS[fault](small)
            add(varied(faulty, rng, mirrors=fault not in ("left", "right")), fault, *identity)
    rng = np.random.default_rng(FIT_SEED)
    for kind in PARTS:
        for number in range(DRAWINGS):
            add(varied(drawn_part(kind, rng), rng), kind, "drawn", f"{kind}{number}")
    for number, image in enumerate(photographs()):
        add(varied(image.convert("L"), rng), "photo", "photograph", f"photo{number}")
    for view, images in drawn_images(FIT_SEED, patients=40).items():
        for number, image in enumerate(images):
            for one in (image, varied(image, rng)):
                add(one, "lateral" if view == "LATERAL" else "frontal", "synthetic", f"{view}{number}")
    return Examples(*(np.array(column) for column in zip(*rows, strict=True)))


def fit(seen: Examples) -> Gate:
    """The gate of these examples, with thresholds of infinity."""
    frontal = seen.kinds == "frontal"
    kinds = ("frontal", *sorted(set(seen.kinds[~frontal])))
    weights = _weights(seen)
    centre = np.average(seen.features[frontal], axis=0, weights=weights[frontal])
    scale = seen.features.std(axis=0) + 1e-6
    scaled = (seen.features - centre) / scale

    # Linear discriminants: a mean for each kind, one covariance for all.
    members = [seen.kinds == kind for kind in kinds]
    means = np.stack([np.average(scaled[rows], axis=0, weights=weights[rows]) for rows in members])
    within = (
        sum(
            (weights[rows, None] * (scaled[rows] - mean)).T @ (scaled[rows] - mean)
            for rows, mean in zip(members, means, strict=True)
        )
        / weights.sum()
    )
    within += SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
    directions = np.linalg.solve(within, means.T).T
    biases = np.log([weights[rows].sum() / weights.sum() for rows in members]) - (directions * means).sum(axis=1) / 2

    # Principal components of frontal images.
    off = scaled[frontal] - means[0]
    variances, axes = np.linalg.eigh((weights[frontal, None] * off).T @ off / weights[frontal].sum())
    variances, axes = variances[::-1], axes.T[::-1]
    residual = variances[COMPONENTS:].sum() / (len(variances) - COMPONENTS)
    principal = means[0], axes[:COMPONENTS], variances[:COMPONENTS], float(residual)
    return Gate(kinds, centre, scale, directions, biases, *principal, np.inf, np.inf)


def _weights(seen: Examples) -> np.ndarray:
    """Frontal images weigh as much as all others; a source as the root of its size, the other kinds alike."""
    weights = np.zeros(len(seen.kinds))
    frontal = seen.kinds == "frontal"
    for source in set(seen.sources[frontal]):
        members = frontal & (seen.sources == source)
        weights[members] = members.sum() ** -0.5
    for kind in set(seen.kinds[~frontal]):
        members = seen.kinds == kind
        weights[members] = 1 / members.sum()
    for group in (frontal, ~frontal):
        weights[group] *= len(weights) / 2 / weights[group].sum()
    return weights


def scores(gate: Gate, seen: Examples) -> np.ndarray:
    """Log-odds against frontal of any other kind, and distance; (N, 2)."""
    return np.stack([np.logaddexp.reduce(gate.log_odds(seen.features), axis=-1), gate.distance(seen.features)], axis=-1)


def cross_validated(seen: Examples) -> np.ndarray:
    """Scores (N, 2), each by a gate that has not seen the patient."""
    folds = np.array([zlib.crc32(patient.encode()) % FOLDS for patient in seen.patients])
    found = np.empty((len(folds), 2))
    for fold in range(FOLDS):
        found[folds == fold] = scores(fit(seen.only(folds != fold)), seen.only(folds == fold))
    return found


def thresholds(seen: Examples, found: np.ndarray) -> np.ndarray:
    """Of log-odds and distance: quantiles of real frontal images."""
    frontal = found[seen.plain & (seen.kinds == "frontal")]
    return np.array([np.quantile(frontal[:, score], 1 - alarms) for score, alarms in enumerate(ALARMS)])


def validate(seen: Examples) -> None:
    """Print the rates at which images are objected to, in %: by kind, by log-odds, by distance, by either."""
    found = cross_validated(seen)
    limits = thresholds(seen, found)
    print("thresholds", limits.round(3))

    def line(what, rows, of=found):
        over = of[rows] > limits
        rates = [over[:, 0].mean(), over[:, 1].mean(), over.any(axis=1).mean()]
        print(f"{what:45} {int(rows.sum()):5} ", *(f"{100 * rate:6.1f}" for rate in rates), flush=True)

    print("--- patients not seen")
    frontal, variants = seen.kinds == "frontal", ~seen.plain
    for source in sorted(set(seen.sources[frontal])):
        of_source = frontal & (seen.sources == source)
        for what, rows in (("as they came", of_source & seen.plain), ("variants", of_source & variants)):
            line(f"frontal {source} {what}", rows) if rows.any() else None
    for kind in sorted(set(seen.kinds[~frontal])):
        real = (seen.kinds == kind) & seen.plain
        line(kind, real if real.any() else seen.kinds == kind)
    print("--- kind not seen")
    for left_out in (["ct"], ["spine"], ["lateral"], ["photo"], ["part"], ["hand", "foot"], ["knee"], ["skull"],
                     ["pelvis"], [*PARTS], ["negative"], ["left", "right"], ["down"]):  # fmt: skip
        out = np.isin(seen.kinds, left_out)
        rows = out & (seen.plain if (out & seen.plain).any() else True)
        of = np.full_like(found, -np.inf)
        of[rows] = scores(fit(seen.only(~out)), seen.only(rows))
        line(" ".join(left_out), rows, of)
    print("--- source of frontal images not seen")
    for source in ("nih", "mhh", "cohen", "synthetic"):
        out = seen.sources == source
        gate, of = fit(seen.only(~out)), np.full_like(found, -np.inf)
        of[out] = scores(gate, seen.only(out))
        line(f"{source} as they came", out & frontal & (seen.plain | (source == "synthetic")), of)
        line(f"{source} variants", out & frontal & variants, of)


def main() -> None:
    """Fit, or validate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true")
    validating, seen = parser.parse_args().validate, examples()
    if validating:
        return validate(seen)
    gate = vars(fit(seen))
    threshold, farthest = thresholds(seen, cross_validated(seen))
    tables = {**gate, "kinds": np.array(gate["kinds"]), "threshold": threshold, "farthest": farthest}
    half = {name: np.float16 if np.ndim(table) == 2 else np.float32 for name, table in tables.items()}
    half["kinds"] = tables["kinds"].dtype
    np.savez_compressed(MODEL, **{name: np.asarray(table, half[name]) for name, table in tables.items()})
    return None


if __name__ == "__main__":
    main()
