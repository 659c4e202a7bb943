"""The pulmonary vessels and airways: branching trees grown from the hila, projected as rods and tubes.

Arteries follow Murray's law (a parent's radius cubed is the sum of its children's), so branches taper as they divide;
the lower zones get the wider ones, as gravity has it in an upright patient. The trachea divides at the carina, and the
main bronchi, right steeper than left, run to the hila.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_cxr.synthetic.anatomy import LEFT, RIGHT, Anatomy
from mlx_cxr.synthetic.geometry import smooth_curve, splat_sections, tube


@dataclass(frozen=True)
class Tree:
    """Sampled vessels: points (N, 3) cm, radii (N,) cm, spacing of the samples (N,) cm, tangents (N, 3)."""

    points: np.ndarray
    radii: np.ndarray
    spacing: np.ndarray
    tangents: np.ndarray


def hilum(anatomy: Anatomy, side: int) -> np.ndarray:
    """Centre of a hilum, (3,) cm; the left lies about 1 cm higher."""
    s = anatomy.shape
    level = 10.6 * anatomy.unit if side == RIGHT else 9.6 * anatomy.unit
    return np.array([side * 3.3 + 0.8 * s.shift, level - 0.15 * (anatomy.patient.height - anatomy.base), -0.3])


def grow(anatomy: Anatomy) -> Tree:
    """Arteries and veins of both lungs, the same for a patient on every image but for posture."""
    parts = [_grow_side(anatomy, side) for side in (RIGHT, LEFT)]
    return Tree(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _grow_side(anatomy: Anatomy, side: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng((anatomy.patient.seed, 21, side + 1))
    root = hilum(anatomy, side)
    # Direction (lateral, down, forward), length in cm and radius of the segmental trunks.
    trunks = np.array(
        [
            [0.30, -1.00, 0.25, 2.6, 0.34],
            [0.65, -0.75, -0.35, 2.6, 0.28],
            [1.00, -0.15, 0.55, 2.4, 0.26],
            [0.95, 0.25, -0.45, 2.2, 0.27],
            [0.80, 0.70, 0.55, 2.8, 0.28],
            [0.45, 1.00, -0.30, 3.4, 0.46],
            [0.75, 0.95, -0.60, 3.2, 0.34],
            [0.18, 1.00, 0.10, 3.0, 0.32],
            [0.90, 0.50, 0.05, 2.6, 0.26],
        ]
    )
    heads = trunks[:, :3] / np.linalg.norm(trunks[:, :3], axis=1, keepdims=True)
    heads = heads + rng.normal(0, 0.10, heads.shape)
    starts = np.repeat(root[None], len(trunks), 0) + rng.normal(0, 0.35, (len(trunks), 3))
    lengths = trunks[:, 3] * rng.uniform(0.85, 1.2, len(trunks)) * anatomy.unit
    radii = 1.3 * trunks[:, 4] * rng.uniform(0.85, 1.15, len(trunks))
    out: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    toward_side = np.array([side, 1.0, 1.0])
    for _ in range(8):
        directions = heads / np.linalg.norm(heads, axis=1, keepdims=True)
        sag = rng.normal(0, 0.12, heads.shape) * lengths[:, None]
        count = max(4, int(lengths.max() / 0.07))
        t = np.linspace(0, 1, count)[None, :, None]
        ends = starts + directions * toward_side * lengths[:, None]
        line = starts[:, None] * (1 - t) + ends[:, None] * t + (sag * toward_side)[:, None] * (t * (1 - t) * 4 * 0.35)
        tangents = np.broadcast_to((directions * toward_side)[:, None], line.shape)
        taper = radii[:, None] * (1 - 0.22 * t[..., 0])
        step = np.repeat((lengths / (count - 1))[:, None], count, 1)
        out.append((line.reshape(-1, 3), taper.ravel(), step.ravel(), tangents.reshape(-1, 3)))
        # Two children: one goes on, one turns off; r0³ = r1³ + r2³.
        share = rng.uniform(0.5, 0.78, len(radii))
        bend = rng.normal(0, 1, heads.shape)
        bend -= (bend * directions).sum(1, keepdims=True) * directions
        bend /= np.linalg.norm(bend, axis=1, keepdims=True)
        spread = rng.uniform(0.30, 0.75, (len(radii), 1))
        heads = np.concatenate([directions + bend * spread * 0.55, directions - bend * spread])
        starts = np.concatenate([ends, ends])
        radii = np.concatenate([radii * share ** (1 / 3), radii * (1 - share) ** (1 / 3)]) * 0.90
        lengths = np.concatenate([lengths, lengths]) * rng.uniform(0.72, 0.98, 2 * len(lengths))
        keep = (radii > 0.04) & anatomy.inside_lung(starts)
        heads, starts, radii, lengths = heads[keep], starts[keep], radii[keep], lengths[keep]
        if not len(radii):
            break
    points, radius, spacing, tangent = (np.concatenate(columns) for columns in zip(*out, strict=True))
    inside = anatomy.inside_lung(points)
    return points[inside], radius[inside], spacing[inside], tangent[inside]


def draw(anatomy: Anatomy, tree: Tree, gain: np.ndarray | None = None) -> np.ndarray:
    """Thickness of the vessels in cm.

    Args:
        gain: factor on the radius of each sample, (N,); None leaves them.

    Returns:
        float32 (rows, columns).
    """
    view = anatomy.view
    radii = tree.radii if gain is None else tree.radii * gain
    depth = tree.points[:, 2] if view.frontal else tree.points[:, 0]
    scale = view.magnification(depth) ** 2
    beam = np.array([0.0, 0.0, 1.0] if view.frontal else [1.0, 0.0, 0.0])
    side = np.cross(tree.tangents, beam)
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-3)
    total = np.zeros((view.rows, view.columns), np.float32)
    for low, high, count in ((0.0, 0.06, 2), (0.06, 0.14, 4), (0.14, 9.0, 11)):
        some = (radii >= low) & (radii < high)
        if not some.any():
            continue
        offsets = (np.arange(count) + 0.5) / count * 2 - 1
        chords = np.sqrt(1 - offsets**2)
        chords = chords / chords.sum() * np.pi
        weights = (scale[some] * radii[some] ** 2 * tree.spacing[some])[:, None] * chords
        splat_sections(view, tree.points[some], (side[some],), (radii[some][:, None] * offsets,), weights, onto=total)
    return total


def airways(anatomy: Anatomy) -> np.ndarray:
    """Thickness of air in trachea and main bronchi, cm: float32 (rows, columns)."""
    s, u = anatomy.shape, anatomy.unit
    carina = np.array([0.3 + 0.9 * s.shift, 8.3 * u, -1.5])
    bow = 0.35 * anatomy.patient.aorta
    trachea = smooth_curve(
        np.array([[0.0, -9.0, 1.5], [0.1, 0.0, 0.5], [bow * -0.6 + 0.5 * s.shift, 5.0 * u, -0.8], carina])
    )
    right, left = hilum(anatomy, RIGHT), hilum(anatomy, LEFT)
    tubes = [
        (trachea, 0.85),
        (_bronchus(carina, right, [0.1, 0.1, 0.0], [0.6, 1.2, -0.6]), 0.6),
        (_bronchus(carina, left, [0.0, 0.5, 0.0], [-0.4, 1.6, -0.8]), 0.52),
    ]
    return sum(tube(anatomy.view, path, radius) for path, radius in tubes)


def _bronchus(carina: np.ndarray, root: np.ndarray, sag: list[float], beyond: list[float]) -> np.ndarray:
    return smooth_curve(np.array([carina, (carina + root) / 2 + np.array(sag), root + np.array(beyond)]))
