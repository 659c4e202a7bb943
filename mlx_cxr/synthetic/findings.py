"""Drawing of findings of lung, pleura, heart and bone into an image's layers, each graded by severity, with its mask.

Appearances follow the Fleischner Society's glossary (Hansell et al., Radiology 2008;246:697): consolidation
hides vessels and may show air bronchograms; atelectasis comes as plates or as loss of a lobe's volume with shift
towards it; a pneumothorax shows the visceral line with no vessels beyond; fluid makes a meniscus in the upright and a
veil in the supine patient. Oedema follows the stages of Milne: upper-zone vessels, septal lines, perihilar haze.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_erosion

from mlx_cxr.synthetic.anatomy import LEFT, RIGHT
from mlx_cxr.synthetic.canvas import Canvas, Finding
from mlx_cxr.synthetic.geometry import Ellipsoid, blur, noise_field, smooth_curve, smoothstep, tube
from mlx_cxr.synthetic.skeleton import RibBreak, rib_path
from mlx_cxr.synthetic.vessels import hilum

OPACITIES = ("Lung Opacity", "Consolidation", "Pneumonia", "Edema", "Atelectasis", "Lung Lesion")
"""Lung Opacity and its children in CheXpert's hierarchy of labels."""
LOBES: dict[str, tuple[int, tuple[float, float, float], tuple[float, float, float]]] = {
    "right upper lobe": (RIGHT, (6.2, 5.8, 1.0), (4.6, 4.4, 5.5)),
    "right middle lobe": (RIGHT, (5.6, 14.6, 4.5), (4.4, 3.0, 3.6)),
    "right lower lobe": (RIGHT, (6.8, 15.8, -4.2), (5.0, 4.6, 4.6)),
    "left upper lobe": (LEFT, (6.0, 6.6, 1.5), (4.4, 4.8, 5.0)),
    "lingula": (LEFT, (7.6, 13.4, 4.2), (3.4, 3.6, 3.6)),
    "left lower lobe": (LEFT, (6.4, 15.8, -4.2), (5.0, 4.6, 4.6)),
}
"""Side, centre (lateral, down, forward) and radii of each lobe's bulk in cm, for a lung 20.5 cm high."""


def _rng(finding: Finding, purpose: int = 0) -> np.random.Generator:
    return np.random.default_rng((finding.seed, purpose, sum(map(ord, finding.label))))


def _lobe(canvas: Canvas, name: str, size: float, jitter: tuple[float, float, float]) -> Ellipsoid:
    side, center, radii = LOBES[name]
    unit = canvas.anatomy.unit
    squeeze = canvas.anatomy.dome(side) / (20.5 * unit)
    x, y, z = (c + j for c, j in zip(center, jitter, strict=True))
    return Ellipsoid((side * x * unit, y * unit * squeeze, z), tuple(r * size * unit for r in radii))  # type: ignore[arg-type]


def _patch(
    canvas: Canvas, solid: Ellipsoid, fill: float, ragged: float, rng: np.random.Generator, cell: float
) -> np.ndarray:
    """Tissue thickness of an ill-defined patch: the solid with a noisy edge and a noisy inside."""
    level = solid.level(canvas.view)
    texture = noise_field(rng, level.shape, cell / (2 * canvas.view.pixel), 4)
    # Airspaces fill from many centres: dense in the middle, thinning outwards without an edge.
    body = smoothstep(level + ragged * 0.30 * texture, -0.45, 0.95)
    return fill * 2 * solid.radii[2] * body * np.clip(0.9 + 0.22 * texture, 0.3, 1.4)


def draw_consolidation(canvas: Canvas, finding: Finding) -> None:
    """A lobe or part of one filled, with air bronchograms; the border at a fissure stays sharp."""
    rng = _rng(finding)
    s = finding.severity
    jitter = tuple(rng.normal(0, 0.7, 3))
    solid = _lobe(canvas, finding.kind, 0.75 + 0.5 * s, jitter)  # type: ignore[arg-type]
    tissue = _patch(canvas, solid, 0.36 + 0.34 * s, 0.8, rng, 4.0)
    if canvas.view.frontal and finding.kind == "right upper lobe":
        x, y = canvas.view.plane(3.0)
        fissure = 10.2 * canvas.anatomy.unit + 0.08 * (x + 6)
        tissue = tissue * smoothstep(y, fissure + 0.15, fissure - 0.15)
    canvas.add_opacity("Consolidation", tissue)
    start = hilum(canvas.anatomy, RIGHT if solid.center[0] < 0 else LEFT)
    filled = canvas.view.full(tissue)
    for _ in range(int(3 + 4 * s)):
        goal = np.array(solid.center) + rng.normal(0, 0.5, 3) * np.array(solid.radii)
        middle = (start + goal) / 2 + rng.normal(0, 0.5, 3)
        path = smooth_curve(np.array([start, middle, goal]))
        tree = tube(canvas.view, path, np.linspace(0.24, 0.10, len(path)))
        canvas.soft -= 0.9 * tree * np.clip(filled / 4, 0, 1)


def draw_pneumonia(canvas: Canvas, finding: Finding) -> None:
    """Several mottled patches of bronchopneumonia, mostly low."""
    rng = _rng(finding)
    s = finding.severity
    names = [n for n, (side, _, _) in LOBES.items() if side in finding.sides]
    weights = np.array([0.6 if "upper" in n else 1.3 for n in names])
    first = finding.kind if finding.kind in names else None
    for number in range(2 + int(2.5 * s) + (finding.side == 0)):
        name = first if first and number < 2 else str(rng.choice(names, p=weights / weights.sum()))
        solid = _lobe(canvas, name, rng.uniform(0.5, 0.8) * (0.85 + 0.4 * s), tuple(rng.normal(0, 1.6, 3)))
        canvas.add_opacity("Pneumonia", _patch(canvas, solid, 0.24 + 0.26 * s, 1.3, rng, 2.4))


def draw_opacity(canvas: Canvas, finding: Finding) -> None:
    """One hazy, ill-defined patch with no lobe's outline."""
    rng = _rng(finding)
    s = finding.severity
    solid = _lobe(canvas, finding.kind, 0.75 + 0.4 * s, tuple(rng.normal(0, 1.2, 3)))
    canvas.add_opacity("Lung Opacity", _patch(canvas, solid, 0.26 + 0.32 * s, 1.0, rng, 4.5))


def draw_edema(canvas: Canvas, finding: Finding) -> None:
    """Perihilar haze, septal lines at the bases and a coarse reticulation; vessels blur into it."""
    rng = _rng(finding)
    s = finding.severity
    anatomy, view = canvas.anatomy, canvas.view
    across, y = view.plane(0.0)
    texture = noise_field(rng, across.shape, 3.0 / (2 * view.pixel), 5)
    haze = np.zeros_like(across)
    for side in (RIGHT, LEFT):
        root = hilum(anatomy, side)
        share = 1.0 if not finding.kind else (1.25 if finding.kind == "right" and side == RIGHT else 0.85)
        p = (across - np.float32(root[0] + 2.0 * side)) / 5.6 if view.frontal else (across + 1.0) / 5.0
        q = (y - np.float32(root[1] + 2.0)) / (7.0 + 2.5 * s)
        reach = np.exp(-(p * p + q * q))
        haze += share * canvas.spaces[side] * (reach + 0.22 * s) * (0.12 + 0.42 * s)
    canvas.add_opacity("Edema", haze * np.clip(1 + 0.2 * texture, 0.5, 1.6), visible=1.0)
    canvas.vessel_gain = canvas.vessel_gain * (1 - 0.35 * s * smoothstep(haze, 0.3, 2.5))
    lines = np.zeros_like(canvas.soft)
    for _ in range(int(10 + 26 * s)):
        side = RIGHT if rng.random() < 0.5 else LEFT
        level = anatomy.dome(side) - rng.uniform(-1.5, 6.0)
        wall = float(anatomy.half_width(np.array([level]))[0]) - 0.4
        length = rng.uniform(0.9, 2.2)
        ends = np.array(
            [[side * wall, level, rng.normal(0, 2)], [side * (wall - length), level + rng.normal(0, 0.15), 0]]
        )
        lines += tube(view, ends, 0.06)
    canvas.soft += lines * (1.0 + 1.6 * s)


def draw_atelectasis(canvas: Canvas, finding: Finding) -> None:
    """Plates above the diaphragm, or a lower lobe folded against the spine; the volume loss is in the shape."""
    rng = _rng(finding)
    s = finding.severity
    anatomy, view = canvas.anatomy, canvas.view
    for side in finding.sides:
        base = anatomy.dome(side)
        for _ in range(1 + int(2.4 * s + rng.random())):
            middle = np.array([side * rng.uniform(5.0, 9.5), base - rng.uniform(0.6, 4.2), rng.uniform(-4, 3)])
            reach, slope = rng.uniform(1.8, 3.4) * (0.8 + 0.5 * s), rng.normal(0.0, 0.28)
            # A plate is as deep as it is wide; each view draws the edge that it sees.
            step = np.array([reach, reach * slope, 0.3] if view.frontal else [0.3, reach * slope, 0.8 * reach])
            bend = np.array([0.0, rng.normal(0, 0.25), 0.0])
            path = smooth_curve(np.array([middle - step, middle + bend, middle + step]))
            profile = np.sin(np.linspace(0.15, np.pi - 0.15, len(path))) ** 0.5
            plate = tube(view, path, rng.uniform(0.22, 0.42) * (0.8 + 0.6 * s) * profile)
            # The plate lies nearly along the beam, so its depth adds to its thickness.
            aerated = np.minimum(canvas.spaces[side], canvas.lung() - canvas.opacity - canvas.air)
            plate = blur(plate * (1.3 + 1.3 * s), 0.07 / view.pixel) * smoothstep(view.full(aerated), 0.3, 3.0)
            canvas.soft += plate
            canvas.add_mask("Atelectasis", plate > 0.25, grow=2)
        if finding.kind == "lobar" or s > 0.55:
            wedge = Ellipsoid(
                (side * (4.6 + 0.8 * s), base - 1.8 - 1.2 * s, -4.5), (3.2 + 1.4 * s, 3.6 + 1.6 * s, 4.0), side * -0.35
            )
            canvas.add_opacity("Atelectasis", _patch(canvas, wedge, 0.38 + 0.38 * s, 0.45, rng, 4.0))


def lesion_radius(severity: float) -> float:
    """Radius of a single nodule or mass, cm, before it varies by about a fifth."""
    return 0.75 + 2.4 * severity**1.3


def broken_ribs(severity: float) -> int:
    """Number of neighbouring ribs that are broken."""
    return 1 + int(4.6 * severity)


def draw_lesion(canvas: Canvas, finding: Finding) -> None:
    """One to several round nodules, or a mass with a lobulated, spiculated border."""
    rng = _rng(finding)
    s = finding.severity
    anatomy = canvas.anatomy
    count = 1 if finding.kind != "multiple" else 3 + int(5 * s)
    placed = 0
    for _ in range(400):
        side = int(rng.choice(finding.sides))
        spot = np.array([side * rng.uniform(2.5, 11.5), rng.uniform(2.0, anatomy.dome(side)), rng.uniform(-5.5, 5.5)])
        radius = lesion_radius(s) * (rng.uniform(0.7, 1.05) if count == 1 else rng.uniform(0.45, 0.75))
        if not anatomy.inside_lung(spot[None])[0]:
            continue
        solid = Ellipsoid(tuple(spot), (radius, radius * rng.uniform(0.85, 1.1), radius), rng.uniform(-1, 1))  # type: ignore[arg-type]
        level = solid.level(canvas.view)
        lobed = level + 0.10 * noise_field(rng, level.shape, max(radius, 0.8) / (2 * canvas.view.pixel))
        tissue = 2 * radius * np.sqrt(np.clip(lobed, 0, 1)) * 1.4
        canvas.opacity = canvas.opacity + np.minimum(tissue, np.maximum(canvas.lung() - canvas.opacity, 0))
        canvas.add_mask("Lung Lesion", canvas.view.full((lobed > 0.02).astype(np.float32)) > 0.5)
        for _ in range(int(rng.uniform(4, 9)) if radius > 1.2 else 0):
            way = rng.normal(0, 1, 3)
            way /= np.linalg.norm(way)
            ends = np.array([spot + way * radius * 0.8, spot + way * radius * rng.uniform(1.3, 1.7)])
            canvas.soft += 0.8 * tube(canvas.view, ends, np.array([0.10, 0.02]))
        placed += 1
        if placed == count:
            return


def draw_effusion(canvas: Canvas, finding: Finding) -> None:
    """Free pleural fluid: a meniscus that climbs the side wall, or a veil behind the lung when lying."""
    s = finding.severity
    anatomy, view = canvas.anatomy, canvas.view
    across, y = view.plane(0.0)
    texture = noise_field(_rng(finding), across.shape, 5.0 / (2 * view.pixel), 2)
    for side in finding.sides:
        space = canvas.spaces[side]
        floor = anatomy.dome(side) + 3.2
        if not view.frontal:
            top = floor + 2.0 - (2.4 + 9.5 * s) * (0.75 + 0.25 * np.clip((np.abs(across) - 2) / 6, 0, 1))
            canvas.add_opacity("Pleural Effusion", space * smoothstep(y, 0.0, 1.6) * smoothstep(y - top, 0.0, 1.4))
            continue
        ax = across * side
        wall = np.maximum(anatomy.half_width(y), 1.0)
        climb = np.clip(ax / wall, 0, 1) ** 2.6
        height = (1.9 + 9.5 * s) * (0.72 if canvas.shape.supine else 1.0)
        top = floor - height * (0.52 + 0.48 * climb) + 0.18 * texture
        fluid = space * smoothstep(y - top, -0.4, 2.2)
        if canvas.shape.supine:
            depth = anatomy.dome(side) - 2.0
            veil = (0.7 + 3.4 * s) * smoothstep(y, 0.18 * depth, depth) * smoothstep(space, 0.5, 4.0)
            fluid = np.maximum(fluid, veil * (1 + 0.1 * texture))
        canvas.add_opacity("Pleural Effusion", fluid)
        canvas.vessel_gain = canvas.vessel_gain * (1 - 0.9 * np.clip(fluid / np.maximum(space, 1), 0, 1))


def _peel(canvas: Canvas, side: int, lateral: float, apical: float) -> np.ndarray:
    """Share (0..1) of each pixel that lies between the chest wall and a lung shrunk from it; half grid."""
    anatomy, view = canvas.anatomy, canvas.view
    across, y = view.plane(0.0)
    if not view.frontal:
        return np.zeros_like(across)
    width, base = anatomy.patient.width, anatomy.dome(side)
    kx, ky = 1 - lateral / width, 1 - apical / base
    inner = anatomy.frontal_lung(across * side / kx, base + (y - base) / ky, side)
    return smoothstep(inner, 1.1, 0.1) * (canvas.spaces[side] > 0.05)


def draw_pneumothorax(canvas: Canvas, finding: Finding) -> None:
    """Air between chest wall and a retracted lung; supine, it collects low and deepens the sulcus."""
    s = finding.severity
    view, side = canvas.view, finding.side or LEFT
    space = canvas.spaces[side]
    _, y = view.plane(0.0)
    base = canvas.anatomy.dome(side)
    if canvas.shape.sulcus == side:
        low = smoothstep(y, base - 7.0 - 3 * s, base + 0.5)
        across = view.plane(0.0)[0] * side
        region = low * smoothstep(across, 3.5, 8.0) * (0.35 + 0.5 * s)
        gap = region + (1 - region) * _peel(canvas, side, 0.5 + 1.6 * s, 0.9 + 1.5 * s)
    else:
        gap = _peel(canvas, side, 0.5 + 4.8 * s**1.2, 1.6 + 8.0 * s)
    gap = gap * (space > 0.05)
    canvas.air = canvas.air + space * gap
    canvas.vessel_gain = canvas.vessel_gain * (1 - gap)
    shown = gap > 0.5
    line = shown & ~binary_erosion(shown, iterations=1) & binary_erosion(space > 0.5, iterations=3)
    canvas.soft += view.full(line.astype(np.float32)) * 0.32
    # The collapsed part holds the same blood in less volume.
    canvas.opacity = canvas.opacity + space * (1 - gap) * 0.16 * s
    canvas.add_mask("Pneumothorax", view.full(gap.astype(np.float32)) > (0.25 if canvas.shape.sulcus == side else 0.5))


def draw_pleural_other(canvas: Canvas, finding: Finding) -> None:
    """Pleura without free fluid: an apical cap, a thickened peel along the side wall, or calcified plaques."""
    rng = _rng(finding)
    s = finding.severity
    view = canvas.view
    across, y = view.plane(0.0)
    texture = noise_field(rng, across.shape, 2.2 / (2 * view.pixel))
    for side in finding.sides:
        base, space = canvas.anatomy.dome(side), canvas.spaces[side]
        if finding.kind == "apical cap":
            band = _peel(canvas, side, 0.15, 1.5 + 2.2 * s) * smoothstep(y, 0.3 * base, 0.2 * base)
            tissue = band * (2.8 + 3.6 * s) * (1 + 0.2 * texture)
        else:
            upper, lower = rng.uniform(0.12, 0.35) * base, base + 3.0
            band = (
                _peel(canvas, side, 0.8 + 1.5 * s, 0.2)
                * smoothstep(y, upper, upper + 3.0)
                * smoothstep(y, lower + 1, lower)
            )
            # The peel lies on the side wall, not on the dome.
            band = band * smoothstep(across * side, 0.55 * canvas.patient.width, 0.7 * canvas.patient.width)
            tissue = band * (2.2 + 3.6 * s) * (1 + 0.3 * texture)
        canvas.add_opacity("Pleural Other", tissue, visible=0.5)
        if finding.kind == "plaques":
            spots = smoothstep(noise_field(rng, across.shape, 1.8 / (2 * view.pixel), 2), 0.5, 1.3)
            field = smoothstep(y, 5.0, 9.0) * smoothstep(across * side, 4.0, 7.0) * (space > 0.3)
            flecks = view.full((spots * field * (0.3 + 0.6 * s)).astype(np.float32))
            canvas.bone += flecks
            canvas.add_mask("Pleural Other", flecks > 0.12, grow=1)


def draw_fracture(canvas: Canvas, finding: Finding) -> None:
    """Neighbouring ribs broken at about the same place: displaced and gaping when acute, with callus when old."""
    rng = _rng(finding)
    s = finding.severity
    side = finding.side or RIGHT
    count = broken_ribs(s)
    first = int(rng.integers(3, 9 - count + 2))
    place = float(rng.uniform(0.28, 0.62))
    for rib in range(first, first + count):
        here = float(np.clip(place + rng.normal(0, 0.03), 0.15, 0.85))
        healed = finding.kind == "old"
        broken = RibBreak(side, rib, here, (0.15 if healed else 0.45 + 0.6 * s), (0.6 + 0.35 * s) if healed else 0.0)
        canvas.breaks.append(broken)
        path = rib_path(canvas.anatomy, side, rib)
        column, row = canvas.view.project(path[[int(here * (len(path) - 1))]])
        rows, columns = np.ogrid[: canvas.view.rows, : canvas.view.columns]
        near = np.square(rows - row[0]) + np.square(columns - column[0]) < (1.7 / canvas.view.pixel) ** 2
        canvas.add_mask("Fracture", near)
        if not healed:
            # Blood under the pleura beside a fresh break bulges into the lung.
            x, y, z = path[int(here * (len(path) - 1))]
            clot = Ellipsoid((x - 0.9 * side, y, z), (1.4 + 0.7 * s, 1.6, 1.4)).chord(canvas.view)
            canvas.soft += canvas.view.full(clot * smoothstep(canvas.lung(), 0.0, 1.5)) * (0.5 + 0.5 * s)


def draw_heart(canvas: Canvas, finding: Finding) -> None:
    """The mask of an enlarged heart; the size itself is in the shape."""
    canvas.add_mask(finding.label, canvas.view.full(canvas.anatomy.heart()) > 0.5)


def draw_mediastinum(canvas: Canvas, finding: Finding) -> None:
    """The mask of a widened upper mediastinum; the width itself is in the shape."""
    _, y = canvas.view.plane(0.0)
    upper = canvas.anatomy.great_vessels() * smoothstep(y, 13.0, 11.0) * smoothstep(y, -1.0, 0.5)
    canvas.add_mask(finding.label, canvas.view.full(upper.astype(np.float32)) > 2.0)


DRAWERS: dict[str, Callable[[Canvas, Finding], None]] = {
    "Cardiomegaly": draw_heart,
    "Enlarged Cardiomediastinum": draw_mediastinum,
    "Pneumothorax": draw_pneumothorax,
    "Pleural Other": draw_pleural_other,
    "Consolidation": draw_consolidation,
    "Pneumonia": draw_pneumonia,
    "Lung Opacity": draw_opacity,
    "Lung Lesion": draw_lesion,
    "Edema": draw_edema,
    "Pleural Effusion": draw_effusion,
    "Atelectasis": draw_atelectasis,
    "Fracture": draw_fracture,
}
"""In drawing order: what replaces lung first leaves the less to what comes after."""
