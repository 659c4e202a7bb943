"""Rays through solids: the projection of the patient onto the image, and the thickness of each shape along the beam.

Patient space is right-handed in centimetres: `x` to the patient's left (right of a frontal image), `y` down
from the level of the lung apices, `z` towards the sternum; the origin lies in the midline at mid-depth of the
thorax. The beam diverges from a point source, so a structure far from the detector is magnified: at 110 cm
with the detector behind the back (AP bedside) the heart appears about 14 % wider than at 180 cm with the
detector on the sternum (PA), as it does in life. Within one solid the beam is taken as parallel.

Smooth solids are evaluated on a grid of half the image's resolution, where a chord has a closed form; thin
things (bone, vessels, tubes) are projected as points onto the full grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

Kind = Literal["PA", "AP", "LATERAL"]
Plane = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class View:
    """One exposure: direction of the beam, place and size of the image.

    Attributes:
        kind: `PA`, `AP` or `LATERAL` (left side against the detector, sternum at image left).
        rows: image height in pixels.
        columns: image width in pixels.
        pixel: pixel pitch at the detector, cm.
        distance: source to detector, cm.
        depth_gap: mid-depth of the thorax to the detector, cm.
        center: image centre in detector cm, (horizontal, vertical) in patient axes.
        tilt: rotation of the image about the beam, radians.
        turn: rotation of the patient about the long axis, radians (frontal only).
    """

    kind: Kind
    rows: int
    columns: int
    pixel: float
    distance: float
    depth_gap: float
    center: tuple[float, float]
    tilt: float = 0.0
    turn: float = 0.0

    @property
    def frontal(self) -> bool:
        """True for PA and AP."""
        return self.kind != "LATERAL"

    def magnification(self, depth: float | np.ndarray) -> float | np.ndarray:
        """Size on the detector over true size at `depth` (cm, along z on frontal images, along x on laterals)."""
        toward = -depth if self.kind == "AP" else depth
        return self.distance / (self.distance - (self.depth_gap - toward))

    @cached_property
    def _half_grid(self) -> Plane:
        rows, columns = (self.rows + 1) // 2, (self.columns + 1) // 2
        u = ((np.arange(columns) * 2 + 1) - self.columns / 2) * self.pixel
        v = ((np.arange(rows) * 2 + 1) - self.rows / 2) * self.pixel
        u, v = np.meshgrid(u.astype(np.float32), v.astype(np.float32))
        cos, sin = np.float32(np.cos(self.tilt)), np.float32(np.sin(self.tilt))
        across, down = cos * u + sin * v + self.center[0], -sin * u + cos * v + self.center[1]
        return (across if self.frontal else -across), down

    def plane(self, depth: float = 0.0) -> Plane:
        """Patient coordinates of the half-resolution grid at a depth.

        Returns:
            Two float32 (rows/2, columns/2) arrays in cm: `x` and `y` on frontal images, `z` and `y` on laterals.
            The turn of the patient is taken out, so that they are coordinates of the anatomy.
        """
        across, down = self._half_grid
        scale = np.float32(1.0 / self.magnification(depth))
        return across * scale - np.float32(np.sin(self.turn) * depth if self.frontal else 0.0), down * scale

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image pixels (column, row; pixel centres at .5) of (N, 3) points in cm; floats of the points' dtype."""
        x, y, z = points[:, 0], points[:, 1], points[:, 2]
        depth, across = (z, x + float(np.sin(self.turn)) * z) if self.frontal else (x, z)
        scale = self.magnification(depth)
        across, down = across * scale, y * scale
        if not self.frontal:
            across = -across
        # `center` lies in detector cm, before the lateral's mirror.
        across, down = across - self.center[0], down - self.center[1]
        cos, sin = float(np.cos(self.tilt)), float(np.sin(self.tilt))
        u, v = cos * across - sin * down, sin * across + cos * down
        return u / self.pixel + self.columns / 2, v / self.pixel + self.rows / 2

    def full(self, half: np.ndarray) -> np.ndarray:
        """A half-resolution layer on the image's own grid, bilinear; float32 (rows, columns)."""
        size = (half.shape[1] * 2, half.shape[0] * 2)
        big = Image.fromarray(np.ascontiguousarray(half, dtype=np.float32)).resize(size, Image.Resampling.BILINEAR)
        return np.asarray(big)[: self.rows, : self.columns]


@dataclass(frozen=True)
class Ellipsoid:
    """A solid ellipsoid.

    Attributes:
        center: (x, y, z), cm.
        radii: semi-axes along x, y, z before the tilt, cm.
        tilt: rotation about z, radians; positive turns +x towards +y (down).
    """

    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    tilt: float = 0.0

    def level(self, view: View) -> np.ndarray:
        """1 at the centre of the outline, 0 on it, negative outside: float32 (rows/2, columns/2)."""
        form, _ = self._outline(view)
        depth = self.center[2] if view.frontal else self.center[0]
        across, down = view.plane(depth)
        p = across - np.float32(self.center[0] if view.frontal else self.center[2])
        q = down - np.float32(self.center[1])
        return 1 - (form[0, 0] * p * p + 2 * form[0, 1] * p * q + form[1, 1] * q * q)

    def chord(self, view: View) -> np.ndarray:
        """Thickness along the beam, cm: float32 (rows/2, columns/2), 0 outside."""
        _, depth = self._outline(view)
        return depth * np.sqrt(np.maximum(self.level(view), 0))

    def _outline(self, view: View) -> tuple[np.ndarray, np.float32]:
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        form = turn.T @ np.diag(1 / np.square(self.radii)) @ turn
        along = 2 if view.frontal else 0
        kept = [0, 1] if view.frontal else [2, 1]
        schur = form[np.ix_(kept, kept)] - np.outer(form[kept, along], form[kept, along]) / form[along, along]
        return schur.astype(np.float32), np.float32(2 / np.sqrt(form[along, along]))


def splat_sections(
    view: View,
    centers: np.ndarray,
    axes: tuple[np.ndarray, ...],
    offsets: tuple[np.ndarray, ...],
    weights: np.ndarray,
    onto: np.ndarray | None = None,
) -> np.ndarray:
    """Project weighted points, placed across a line at `centers + Σ axes·offsets`; far cheaper than each on its own.

    Args:
        centers: (N, 3) cm.
        axes: directions across the line, each (N, 3); short beside the distance to the source.
        offsets: for each axis, cm along it: (N, K) or (1, K).
        weights: (N, K), volumes in cm³ (or any quantity).
        onto: float32 (rows, columns) to add to; None starts from nothing.

    Returns:
        float32 (rows, columns), weight per cm² of detector: cm of thickness for volumes. Bilinear, so a regular
        lattice of points finer than a pixel makes an even layer.
    """
    centers = np.asarray(centers, np.float32)
    column, row = view.project(centers)
    columns, rows = column[:, None], row[:, None]
    for axis, offset in zip(axes, offsets, strict=True):
        ahead, below = view.project(centers + np.asarray(axis, np.float32))
        offset = np.asarray(offset, np.float32)
        columns = columns + (ahead - column)[:, None] * offset
        rows = rows + (below - row)[:, None] * offset
    layer = np.zeros((view.rows, view.columns), np.float32) if onto is None else onto
    return _deposit(view, columns.ravel(), rows.ravel(), np.asarray(weights, np.float32).ravel(), layer)


def _deposit(view: View, column: np.ndarray, row: np.ndarray, weights: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Add weights at float pixel places to `layer`, shared bilinearly by the four nearest pixels."""
    column, row = column - np.float32(0.5), row - np.float32(0.5)
    inside = (column > 0) & (row > 0) & (column < view.columns - 1) & (row < view.rows - 1)
    if not inside.all():
        column, row, weights = column[inside], row[inside], weights[inside]
    if not len(column):
        return layer
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_share, down_share = column - left, row - top
    # Only the box that the points lie in is summed: most things are small.
    first_column, first_row = int(left.min()), int(top.min())
    wide, high = int(left.max()) - first_column + 2, int(top.max()) - first_row + 2
    index = ((top - first_row) * wide + (left - first_column)).astype(np.intp)
    lower = weights * down_share
    upper = weights - lower
    lower_right, upper_right = lower * right_share, upper * right_share
    size = wide * high
    total = np.bincount(index, weights=upper - upper_right, minlength=size)
    for offset, share in ((1, upper_right), (wide, lower - lower_right), (wide + 1, lower_right)):
        # The shifted sum: cheaper than shifting every index.
        total[offset:] += np.bincount(index, weights=share, minlength=size)[: size - offset]
    box = (slice(first_row, first_row + high), slice(first_column, first_column + wide))
    layer[box] += (total * (1 / view.pixel**2)).reshape(high, wide).astype(np.float32)
    return layer


def paint(view: View, outline: np.ndarray, softness: float) -> np.ndarray:
    """A filled polygon facing the beam.

    Args:
        outline: (N, 3) corners, cm.
        softness: blur of its edge, pixels.

    Returns:
        float32 (rows, columns), 0 to 1.
    """
    column, row = view.project(outline)
    rim = int(3 * softness) + 2
    layer = np.zeros((view.rows, view.columns), np.float32)
    x0, y0 = max(int(column.min()) - rim, 0), max(int(row.min()) - rim, 0)
    x1, y1 = min(int(column.max()) + rim + 1, view.columns), min(int(row.max()) + rim + 1, view.rows)
    if x1 <= x0 or y1 <= y0:
        return layer
    image = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(image).polygon([*zip((column - x0).tolist(), (row - y0).tolist(), strict=True)], fill=255)
    layer[y0:y1, x0:x1] = blur(np.asarray(image, np.float32) / 255, softness)
    return layer


def resample(path: np.ndarray, step: float) -> np.ndarray:
    """A polyline's points made `step` cm apart: (N, D) -> (M, D). Columns past the third are carried along."""
    lengths = np.linalg.norm(np.diff(path[:, :3], axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0, along[-1], max(2, int(along[-1] / step) + 1))
    return np.stack([np.interp(wanted, along, path[:, k]) for k in range(path.shape[1])], axis=1)


def smooth_curve(knots: np.ndarray, count: int = 60) -> np.ndarray:
    """A Catmull-Rom curve through (K, 3) knots: (count, 3)."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    at = np.linspace(0, len(knots) - 1 - 1e-9, count)
    base = at.astype(int)
    t = (at - base)[:, None]
    a, b, c, d = (padded[base + k] for k in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def tube(view: View, path: np.ndarray, radius: float | np.ndarray, wall: float | None = None) -> np.ndarray:
    """Thickness map (cm) of a round tube along a polyline.

    Args:
        path: (N, 3) cm.
        radius: cm, one value or (N,).
        wall: thickness of the shell in cm; None for a solid rod.

    Returns:
        float32 (rows, columns).
    """
    line = resample(np.column_stack([path, np.broadcast_to(radius, len(path))]), view.pixel * 0.8)
    points, radii = line[:, :3], line[:, 3]
    count = int(np.clip(np.ceil(2.6 * radii.max() / view.pixel), 3, 48))
    offsets = (np.arange(count) + 0.5) / count * 2 - 1
    chords, inner = np.sqrt(1 - offsets**2), 0.0
    if wall is not None:
        inner = float(np.maximum(1 - wall / max(float(radii.mean()), 1e-6), 0))
        chords = chords - np.sqrt(np.maximum(inner**2 - offsets**2, 0))
    # A few samples stand for the section: they are made to hold its area.
    chords = chords * (np.pi / 4 * (1 - inner**2) / chords.mean())
    spacing = np.linalg.norm(np.diff(points, axis=0), axis=1).mean()
    depth = points[:, 2] if view.frontal else points[:, 0]
    # Weights are volumes scaled by m², as `splat_sections` divides by the area on the detector.
    scale = view.magnification(depth) ** 2
    weights = (scale * radii**2 * 4 / count * spacing)[:, None] * chords
    beam = np.array([0.0, 0.0, 1.0] if view.frontal else [1.0, 0.0, 0.0])
    side = np.cross(np.gradient(points, axis=0), beam)
    side = side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-6)
    return splat_sections(view, points, (side,), (radii[:, None] * offsets,), weights)


def noise_field(rng: np.random.Generator, shape: tuple[int, int], cell: float, octaves: int = 3) -> np.ndarray:
    """Smooth noise of zero mean and unit deviation.

    Args:
        shape: (rows, columns).
        cell: size of the largest feature in pixels; each octave halves it and its weight.
        octaves: number of sizes that are summed.

    Returns:
        float32 of `shape`.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        size = max(cell / 2**octave, 2.0)
        grid = (max(4, int(shape[0] / size) + 3), max(4, int(shape[1] / size) + 3))
        coarse = Image.fromarray(rng.standard_normal(grid).astype(np.float32))
        total += np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)) * 0.6**octave
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def blur(layer: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur by `sigma` pixels; a wide one is done on a reduced grid. float32, same shape."""
    if sigma < 3:
        return gaussian_filter(layer, sigma, mode="nearest", truncate=3)
    factor = int(sigma / 1.5)
    rows, columns = layer.shape
    size = (max(2, columns // factor), max(2, rows // factor))
    small = Image.fromarray(np.ascontiguousarray(layer, dtype=np.float32)).resize(size, Image.Resampling.BOX)
    soft = gaussian_filter(np.asarray(small), sigma / factor, mode="nearest", truncate=3)
    return np.asarray(Image.fromarray(soft).resize((columns, rows), Image.Resampling.BICUBIC))


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a cubic between; float32. `low` may exceed `high` for a falling edge."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)
