"""Tubes, lines, wires and boxes, on the courses they take in the body.

Tip positions are those a radiologist checks: tracheal tube 3 to 6 cm above the carina, central lines at the
cavoatrial junction, gastric tube below the diaphragm, pacing leads in atrium and right ventricular apex.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlx_cxr.synthetic.anatomy import LEFT
from mlx_cxr.synthetic.canvas import Canvas, Finding
from mlx_cxr.synthetic.geometry import paint, smooth_curve, tube

LABEL = "Support Devices"
BYSTANDERS = ("ECG leads", "median sternotomy wires")
"""Drawn, but no support devices to the CheXpert labeler, and so in no mask."""
# Thickness of iron, cm, that attenuates like the stripe or wall of each material.
WIRE, STRIPE, PLASTIC = 1.0, 0.22, 0.035


def draw_devices(canvas: Canvas, finding: Finding) -> None:
    """Draw every device named in `finding.kind` (separated by `|`) and add them to the mask."""
    for name in finding.kind.split("|"):
        metal = DEVICES[name](canvas, finding, _rng(finding.seed, name))
        canvas.metal += metal
        if name not in BYSTANDERS:
            canvas.add_mask(LABEL, metal > 0.012, grow=2)


def _rng(seed: int, name: str) -> np.random.Generator:
    """A device's own stream, so that it keeps its course when another is placed or removed."""
    return np.random.default_rng((seed, sum(map(ord, name))))


def tube_height(seed: int) -> float:
    """Height of the tracheal tube's tip over the carina, cm, as drawn for a finding's `seed`."""
    return float(_rng(seed, "endotracheal tube").uniform(2.0, 5.5))


def _line(
    canvas: Canvas, knots: list[list[float]], radius: float, gain: float, wall: float | None = None
) -> np.ndarray:
    return gain * tube(canvas.view, smooth_curve(np.array(knots, float), 120), radius, wall)


def _tracheal_tube(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    tip = 8.3 * canvas.anatomy.unit - tube_height(finding.seed)
    course = [[rng.normal(0, 0.3), -11, 2.5], [0.1, -4, 1.5], [0.1, tip, 0.2]]
    return _line(canvas, course, 0.5, 3 * PLASTIC, wall=0.12) + _line(
        canvas, [[a + 0.35, b, c] for a, b, c in course], 0.07, 2 * STRIPE
    )


def _gastric_tube(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    low = canvas.anatomy.dome(LEFT)
    course = [
        [0.6, -11, 1.0],
        [-0.3, 0, -2.5],
        [0.4, 9, -3.5],
        [0.9, low - 2, -2.5],
        [2.6, low + 3, 0],
        [5.5 + rng.normal(0, 1), low + 6.5, 2],
    ]
    return _line(canvas, course, 0.26, 1.6 * PLASTIC) + _line(canvas, course, 0.09, STRIPE)


def _jugular_line(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    end = rng.uniform(8.5, 12.5) * canvas.anatomy.unit
    loop = rng.uniform(4, 7)
    course = [
        [-loop - 3, -5.5, 3],
        [-loop, -8, 3],
        [-4.2, -5.5, 3],
        [-2.6, -0.5, 1.8],
        [-1.9, 5, 1.0],
        [-1.8, end, 1.2],
    ]
    return _line(canvas, course, 0.14, 1.3 * STRIPE)


def _subclavian_line(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    end = rng.uniform(8.5, 12.0) * canvas.anatomy.unit
    if rng.random() < 0.5:
        course = [[-12, 5, 5], [-9.5, 2.0, 5], [-5, 0.9, 4], [-2.4, 3.0, 2], [-1.9, end, 1.2]]
    else:
        course = [[12, 5, 5], [9.5, 1.8, 5], [5, 0.9, 4], [1.5, 3.5, 2.5], [-1.5, 5.5, 2], [-1.9, end, 1.2]]
    return _line(canvas, course, 0.14, 1.3 * STRIPE)


def _picc(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    side = 1 if rng.random() < 0.4 else -1
    w = canvas.patient.width
    course = [
        [side * (w + 5.5), 16, 0],
        [side * (w + 2.5), 6, 0],
        [side * (w - 1), 2.2, 2],
        [side * 6, 1.2, 3],
        [side * 2.2, 3, 2],
    ]
    if side == LEFT:
        course.append([-0.6, 5.5, 2])
    return _line(canvas, [*course, [-1.9, rng.uniform(8, 12) * canvas.anatomy.unit, 1.2]], 0.10, 1.2 * STRIPE)


def _port(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    w = canvas.patient.width
    spot = [-0.62 * w, 6.2, 9.0]
    course = [
        spot,
        [-0.55 * w, 2.0, 8],
        [-5, -0.5, 5],
        [-2.6, 1.5, 2],
        [-1.9, 6, 1.2],
        [-1.8, 11 * canvas.anatomy.unit, 1.2],
    ]
    return _line(canvas, course, 0.13, 1.2 * STRIPE) + _disc(canvas, spot, 1.25, 0.75, 0.30)


def _disc(canvas: Canvas, spot: list[float], radius: float, inner: float, thickness: float) -> np.ndarray:
    """A flat ring (or disc, its middle thinner) facing the beam; cm of iron."""
    turn = np.linspace(0, 2 * np.pi, 40)
    circle = np.column_stack([np.cos(turn), np.sin(turn), np.zeros_like(turn)])
    whole, middle = (paint(canvas.view, np.array(spot, float) + size * circle, 0.7) for size in (radius, inner))
    return (whole - 0.65 * middle) * np.float32(thickness)


def _pacemaker(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    anatomy = canvas.anatomy
    w, s = canvas.patient.width, anatomy.heart_scale
    spot = np.array([0.66 * w, 4.2, 9.5])
    shape = np.array([[-2.3, -1.6], [1.4, -2.0], [2.4, -0.6], [2.2, 1.7], [-0.6, 2.2], [-2.4, 1.0]]) * 0.92
    outline = np.column_stack([spot[0] + shape[:, 0], spot[1] + shape[:, 1], np.full(6, spot[2])])
    metal = paint(canvas.view, smooth_curve(np.concatenate([outline, outline[:1]])), 0.6) * np.float32(0.42)
    top = anatomy.heart_level()
    entry = [
        [spot[0] - 1.5, spot[1] - 1, 9],
        [0.42 * w, 0.8, 6],
        [4, 1.5, 4],
        [0.8, 4.0, 2.5],
        [-1.6, 6.5, 1.5],
        [-2.0, 10, 1.2],
    ]
    ventricle = [*entry, [-2.2 * s, top - 0.5, 1.5], [1.2 * s, top + 3.2, 3], [5.2 * s, top + 3.9 * s, 4.5]]
    metal += _line(canvas, ventricle, 0.09, 0.9 * WIRE)
    if rng.random() < 0.75:
        atrium = [*entry, [-2.6 * s, top - 1.2, 2], [-1.6 * s, top + 0.5, 3.5], [-2.2 * s, top - 1.8, 4.5]]
        metal += _line(canvas, atrium, 0.08, 0.9 * WIRE)
    if rng.random() < 0.35:
        coil = [[0.0, top + 2.6, 3], [1.2 * s, top + 3.2, 3], [4.6 * s, top + 3.7 * s, 4.3]]
        metal += _line(canvas, coil, 0.17, WIRE)
    return metal


def _chest_drain(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    side = finding.side or LEFT
    w = canvas.patient.width
    low = rng.uniform(10.5, 14.0)
    course = [
        [side * (w + 5), low + 3.5, 2],
        [side * (w + 0.6), low, 1],
        [side * (w - 2.5), low - 3, -3],
        [side * rng.uniform(4, 7), rng.uniform(3, 6), -3],
    ]
    return _line(canvas, course, 0.42, 2.2 * PLASTIC, wall=0.12) + _line(canvas, course, 0.09, 2.2 * STRIPE)


def _ecg_leads(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    w = canvas.patient.width
    metal = np.zeros_like(canvas.metal)
    spots = [[-0.8 * w, 3.0], [0.8 * w, 3.0], [0.9 * w, 17.5], [-0.9 * w, 18.0], [1.5, 11.0]]
    for x, y in spots[: int(rng.integers(3, 6))]:
        x, y = x + rng.normal(0, 1.0), y + rng.normal(0, 1.2)
        metal += _disc(canvas, [x, y, 10.0], 0.45, 0.18, 0.25)
        away = np.sign(x) if x else 1.0
        out = [x + away * rng.uniform(3, 8), y + rng.uniform(2, 9), 10.5]
        course = [
            [x, y, 10],
            [x + away * rng.uniform(0.5, 3), y + rng.uniform(-3, 4), 10.5],
            out,
            [out[0] + away * 6, out[1] + rng.uniform(2, 10), 10.5],
        ]
        metal += _line(canvas, course, 0.07, 0.75 * WIRE)
    return metal


def _sternal_wires(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    metal = np.zeros_like(canvas.metal)
    for number in range(int(rng.integers(5, 8))):
        y = 3.2 + 2.25 * number
        turn = np.linspace(0, 2 * np.pi, 40)
        lean = rng.normal(0, 0.25)
        ring = np.column_stack(
            [
                0.95 * np.cos(turn) + rng.normal(0, 0.12),
                y + 0.42 * np.sin(turn) + lean * np.cos(turn),
                8.0 + 0.7 * np.sin(turn),
            ]
        )
        metal += WIRE * tube(canvas.view, ring, 0.06)
    return metal


DEVICES: dict[str, Callable[[Canvas, Finding, np.random.Generator], np.ndarray]] = {
    "endotracheal tube": _tracheal_tube,
    "nasogastric tube": _gastric_tube,
    "right internal jugular central venous line": _jugular_line,
    "subclavian central venous line": _subclavian_line,
    "PICC": _picc,
    "Port-A-Cath": _port,
    "pacemaker": _pacemaker,
    "chest tube": _chest_drain,
    "ECG leads": _ecg_leads,
    "median sternotomy wires": _sternal_wires,
}
"""Device name (as reports write it) to its drawing: cm of iron on the image's grid."""
