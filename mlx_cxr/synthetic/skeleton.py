"""Bones as shells of cortex round a spongy core, placed in three dimensions and projected.

Each bone is a tube of points: ribs 1 to 12 run from their vertebra backwards, round the cage and down to the
costochondral joint (cartilage is not drawn, as it hardly shows), so that posterior arcs are near horizontal and
anterior arcs steep, and the arcs are brightest at the side, where the beam passes along them. Cross-sections follow
Gray's Anatomy: a rib is about 1.3 cm high and 0.6 thick with a cortex of 0.07.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_cxr.synthetic.anatomy import LEFT, RIGHT, Anatomy
from mlx_cxr.synthetic.geometry import View, paint, resample, smooth_curve, smoothstep, splat_sections, tube

SPACING = 2.2
"""Thoracic vertebra to vertebra, cm."""


@dataclass(frozen=True)
class RibBreak:
    """A fracture of one rib.

    Attributes:
        side: -1 right, 1 left.
        rib: 1 to 12.
        place: 0 at the spine to 1 at the cartilage.
        offset: displacement of the outer fragment, cm (down and inwards).
        callus: radius added by healing bone, cm; 0 when acute.
    """

    side: int
    rib: int
    place: float
    offset: float
    callus: float


def rib_path(anatomy: Anatomy, side: int, rib: int, count: int = 90) -> np.ndarray:
    """Centre line of a rib from spine to cartilage: (count, 3) cm."""
    u = anatomy.unit
    rng = np.random.default_rng((anatomy.patient.seed, 11, rib))
    start = -1.1 + SPACING * u * (rib - 1) + rng.normal(0, 0.06)
    reach = (0.62, 0.70, 0.76, 0.80, 0.83, 0.86, 0.88, 0.86, 0.80, 0.72, 0.55, 0.40)[rib - 1]
    fall = (3.2, 4.6, 5.9, 6.8, 7.6, 8.2, 8.7, 8.8, 8.4, 7.2, 5.0, 3.5)[rib - 1] * u
    angle = np.linspace(0.045, reach, count) * np.pi
    share = np.linspace(0, 1, count)
    lying = 0.82 if anatomy.shape.supine else 1.0
    y = start + lying * fall * (0.25 * share + 0.75 * share**1.7) - 0.55 * np.sin(np.clip(share * 3.4, 0, 1) * np.pi)
    flare = 0.35
    width = anatomy.half_width(np.maximum(y, 0.35 * rib)) + flare
    depth = anatomy.half_depth(np.maximum(y, 0.35 * rib)) + flare
    if rib <= 2:
        width = np.maximum(width, 5.2 + 1.6 * (rib - 1))
    x = width * np.sin(angle) ** 0.85
    z = -depth * np.cos(angle)
    x = np.maximum(x, 1.8)
    return np.column_stack([side * x, y, z])


def ribs(anatomy: Anatomy, breaks: list[RibBreak]) -> np.ndarray:
    """Excess bone of all ribs in cm of cortex: float32 (rows, columns)."""
    view = anatomy.view
    total = np.zeros((view.rows, view.columns), np.float32)
    rng = np.random.default_rng((anatomy.patient.seed, 12))
    height = rng.normal(0.66, 0.05) * (0.92 if anatomy.patient.sex == "F" else 1.0)
    for side in (RIGHT, LEFT):
        for rib in range(1, 13):
            line = rib_path(anatomy, side, rib)
            girth = np.ones(len(line))
            for broken in breaks:
                if (broken.side, broken.rib) == (side, rib):
                    line, girth = _break(line, girth, broken)
            scale = height * (0.8 if rib in (1, 11, 12) else 1.0)
            _add_shell(total, view, line, girth, high=scale, thick=0.32, cortex=0.065, spongy=0.22)
    return total


def _break(line: np.ndarray, girth: np.ndarray, broken: RibBreak) -> tuple[np.ndarray, np.ndarray]:
    share = np.linspace(0, 1, len(line))
    beyond = share > broken.place
    moved = line.copy()
    fade = np.exp(-np.maximum(share - broken.place, 0) / 0.25)[:, None]
    inward = np.array([-0.45 * broken.side, 1.0, 0.0]) * broken.offset
    moved[beyond] += (fade * inward)[beyond]
    lump = np.exp(-(((share - broken.place) / 0.022) ** 2))
    if broken.callus:
        return moved, girth + broken.callus * 2.2 * lump
    # An acute break: a gap of some millimetres and no cortex in it.
    return moved, np.where(np.abs(share - broken.place) < 0.011, 0.05, girth)


def _add_shell(
    total: np.ndarray,
    view: View,
    line: np.ndarray,
    girth: np.ndarray,
    high: float,
    thick: float,
    cortex: float,
    spongy: float,
) -> None:
    """Add a flat tube to a layer: cortex as a shell, the core at `spongy` times its density."""
    data = resample(np.column_stack([line, girth]), view.pixel * 0.9).astype(np.float32)
    center, girth = data[:, :3], data[:, 3]
    tangent = np.gradient(center, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    outward = center * np.array([1.0, 0.0, 1.0], np.float32)
    outward -= (outward * tangent).sum(1, keepdims=True) * tangent
    outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-6)
    tall = np.cross(outward, tangent)
    count = max(12, int(2.8 * high / view.pixel))
    angles = np.arange(count) / count * 2 * np.pi
    ring = np.column_stack([high * np.cos(angles), thick * np.sin(angles)])
    core = np.column_stack([high * 0.92 * np.linspace(-1, 1, count // 2), np.zeros(count // 2)])
    section = np.concatenate([ring, core])
    perimeter = np.pi * (3 * (high + thick) - np.sqrt((3 * high + thick) * (high + 3 * thick)))
    core_depth = np.sqrt(np.maximum(1 - (core[:, 0] / high) ** 2, 0))
    area = np.concatenate(
        [np.full(count, perimeter * cortex / count), spongy * np.pi * high * thick * core_depth / core_depth.sum()]
    )
    depth = center[:, 2] if view.frontal else center[:, 0]
    scale = view.magnification(depth) ** 2
    step = np.linalg.norm(np.diff(center, axis=0), axis=1).mean()
    # Bone thins towards the cartilage, which starts without an edge.
    share = np.linspace(0, 1, len(center))
    thinning = (1 - 0.5 * smoothstep(share, 0.35, 0.9)) * smoothstep(share, 1.0, 0.9)
    weights = (scale * girth**1.5 * np.float32(step) * thinning)[:, None] * area
    axes = (tall * girth[:, None], outward * girth[:, None])
    splat_sections(view, center, axes, (section[None, :, 0], section[None, :, 1]), weights, onto=total)


def clavicle_path(anatomy: Anatomy, side: int) -> np.ndarray:
    """Centre line of a clavicle: (60, 3) cm, from the sternum outwards."""
    reach = anatomy.patient.width
    lift = 1.3 if anatomy.shape.supine else 0.0
    knots = np.array(
        [
            [1.6, 2.2 - lift, 7.0],
            [0.35 * reach, 1.5 - lift, 7.6],
            [0.68 * reach, 0.1 - 1.4 * lift, 5.0],
            [1.12 * reach, -0.9 - 1.2 * lift, 1.5],
        ]
    )
    return smooth_curve(knots * np.array([side, 1, 1]))


def girdle(anatomy: Anatomy) -> np.ndarray:
    """Excess bone of clavicles, scapulae, humeri and sternum, in cm of cortex: float32 (rows, columns)."""
    view, reach = anatomy.view, anatomy.patient.width
    total = np.zeros((view.rows, view.columns), np.float32)
    if not view.frontal:
        # Lateral: sternum in profile and the edges of the scapulae over the upper spine.
        front = float(anatomy.half_depth(np.array([9.0]))[0]) + 0.9
        levels = np.linspace(1.5, 0.82 * anatomy.patient.height, 30)
        path = np.column_stack([np.zeros(30), levels, front - 2.6 * (1 - (levels - 1.5) / levels.max()) ** 1.6 + 0.4])
        total += 0.25 * tube(view, path, 0.62) + 1.0 * tube(view, path, 0.62, wall=0.12)
        for dz in (0.0, 1.0):
            edge = smooth_curve(np.array([[9, 0.5, -5.5 - dz], [10, 6, -7.2 - dz], [10, 12, -8.6 - dz]], float))
            total += tube(view, edge, 0.3)
        return total
    for side in (RIGHT, LEFT):
        path = clavicle_path(anatomy, side)
        total += tube(view, path, 0.6, wall=0.11) + 0.16 * tube(view, path, 0.55)
        total += _scapula(anatomy, side)
        head = np.array([side * (reach + 3.4), 1.8, 0.0])
        shaft = smooth_curve(head + np.array([[side * 0.1, 0.8, 0], [side * 0.6, 4, 0], [side * 3.2, 16, 0]]))
        widths = 1.15 + 0.6 * np.exp(-np.linspace(0, 7, len(shaft)))
        total += 0.7 * tube(view, shaft, widths, wall=0.3)
        ball = head + np.array([[0, -2.1, 0], [0, 0, 0], [side * 0.2, 1.6, 0]])
        total += 0.22 * tube(view, smooth_curve(ball), np.sin(np.linspace(0.1, 2.9, 60)) * 2.2)
    return total


def _scapula(anatomy: Anatomy, side: int) -> np.ndarray:
    view, reach = anatomy.view, anatomy.patient.width
    # With the hands on the hips (PA) the blades swing off the lungs; at the bedside they lie over them.
    medial = reach * (0.58 if anatomy.shape.supine else 0.80)
    top, low = 0.2, 11.5
    corner = [
        (medial, top + 0.8),
        (medial + 0.4, 5.5),
        (medial + 2.4, low),
        (reach + 1.6, 4.2),
        (reach + 2.0, 1.8),
        (medial + 2.6, top),
    ]
    outline = np.array([[side * x, y, -6.5] for x, y in corner])
    blade = paint(view, outline, 1.2) * np.float32(0.13)
    ring = np.concatenate([outline, outline[:1]])
    blade = blade + tube(view, smooth_curve(ring[:4]), 0.2) * 0.5 + tube(view, ring[2:4], 0.4, wall=0.12) * 0.5
    spine = smooth_curve(
        np.array([[side * medial, 3.2, -7.5], [side * (reach - 0.5), 0.6, -7], [side * (reach + 2.6), -0.9, -4]])
    )
    coracoid = np.array([[side * (reach + 0.6), 1.2, -2.0], [side * (reach + 0.2), 0.6, 0.5]])
    return blade + 0.5 * tube(view, spine, 0.5, wall=0.15) + 0.5 * tube(view, coracoid, 0.55, wall=0.15)


def spine(anatomy: Anatomy) -> np.ndarray:
    """Excess bone of the vertebrae in cm of cortex, on the half grid: bodies, end-plates, pedicles, spines."""
    view, u = anatomy.view, anatomy.unit
    across, y = view.plane(-6.0)
    # All of it lies in a band of columns; the rest of the image is left alone.
    whole = np.zeros_like(across)
    band = slice(*np.flatnonzero((np.abs(across if view.frontal else across + 8.5) < 7.0).any(axis=0))[[0, -1]])
    across, y = across[:, band], y[:, band]
    pitch = SPACING * u
    phase = np.mod((y + 1.6) / pitch, 1.0)
    half_gap = 0.09
    disc = np.minimum(phase, 1 - phase)
    bone = np.clip((disc - half_gap) / 0.06, 0, 1)
    plate = np.exp(-(((disc - half_gap - 0.03) / 0.045) ** 2))
    if view.frontal:
        bend = 0.25 * np.sin(y / 9.0 + anatomy.patient.seed % 7)
        x = across - bend
        half = 1.55 + 0.018 * np.clip(y, -6, 30) * u - 0.35 * smoothstep(y, 0.0, -4.0)
        body = np.sqrt(np.maximum(1 - (x / half) ** 4, 0))
        edge = np.exp(-(((np.abs(x) - half + 0.12) / 0.14) ** 2))
        layer = body * (0.35 * bone + 0.35 * plate) + 0.25 * edge * bone
        ring = np.hypot((np.abs(x) - 0.68 * half) / 0.8, (phase - 0.32) * pitch)
        layer += 0.35 * np.exp(-(((ring - 0.42) / 0.16) ** 2))
        layer += 0.30 * np.exp(-((x / 0.28) ** 2)) * np.exp(-(((phase - 0.75) / 0.2) ** 2))
        wings = np.exp(-(((phase - 0.3) * pitch / 0.42) ** 2)) * np.clip((half + 1.5 - np.abs(x)) / 0.4, 0, 1)
        neck = 0.72 - 0.27 * smoothstep(y, 1.0, -3.0)
        whole[:, band] = (layer + 0.10 * wings) * neck
        return whole
    kyphosis = 1.5 * np.clip((y - 9) / 12.0, -1.3, 1.3) ** 2
    z = across + 8.2 - kyphosis
    body = np.sqrt(np.maximum(1 - np.abs(z / 1.55) ** 4, 0))
    edge = np.exp(-(((np.abs(z) - 1.4) / 0.16) ** 2))
    arch = np.exp(-(((z + 3.0) / 1.0) ** 2)) * (0.35 + 0.65 * np.exp(-(((phase - 0.6) / 0.22) ** 2)))
    whole[:, band] = body * (0.55 * bone + 0.45 * plate) + 0.35 * edge * bone + 0.30 * arch
    return whole


def bones(anatomy: Anatomy, breaks: list[RibBreak]) -> tuple[np.ndarray, np.ndarray]:
    """All bone: excess cortex in cm on the image's grid (ribs, girdle) and on the half grid (spine)."""
    return ribs(anatomy, breaks) + girdle(anatomy), spine(anatomy)
