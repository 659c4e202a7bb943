"""The patient's soft anatomy: body, lungs, heart, great vessels and diaphragm as solids with closed-form chords.

Lengths are adult means with their spread (cm): inner chest width about 27 in men and 24.5 in women, lung apex to
right dome about 20 in full inspiration, the right dome 1 to 2 higher than the left (Felson, *Principles of Chest
Roentgenology*). The cardiothoracic ratio, heart width over inner chest width, is normal up to 0.5 on a PA image
(Danzer 1919); `HEART_WIDTH` is this model's heart at scale 1, so that a wanted ratio fixes the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from mlx_cxr.synthetic.geometry import Ellipsoid, View, smoothstep

RIGHT, LEFT = -1, 1
HEART_WIDTH = 13.1
"""Right to left border of the heart solids at scale 1, cm; a test measures it."""
DOME_CURVE_X, DOME_CURVE_Z, DOME_Z = np.float32(0.070), np.float32(0.038), np.float32(2.2)


@dataclass(frozen=True)
class Patient:
    """A patient, the same in every image. Lengths in cm.

    Attributes:
        subject_id: 8 digits.
        sex: `M` or `F`.
        age: years at the first study.
        width: half the inner chest width at its widest.
        depth: half the inner front-to-back depth.
        height: apex to right dome in full inspiration.
        fat: extra wall from habitus, 0 (thin) to about 5.
        breast: radius of a breast; 0 in men.
        ratio: cardiothoracic ratio without disease.
        aorta: 0 (young) to 1 (unfolded, calcified).
        seed: entropy of everything drawn once per patient (vessels, ribs).
    """

    subject_id: int
    sex: str
    age: int
    width: float
    depth: float
    height: float
    fat: float
    breast: float
    ratio: float
    aorta: float
    seed: int


def sample_patient(subject_id: int, rng: np.random.Generator, seed: int) -> Patient:
    """A patient drawn from the cohort's distribution of age, sex and build."""
    sex = "F" if rng.random() < 0.48 else "M"
    age = int(np.clip(rng.normal(62, 17), 18, 91))
    size = rng.normal(1.0, 0.045) * (0.93 if sex == "F" else 1.0)
    fat = float(np.clip(rng.gamma(2.2, 0.75), 0.1, 5.0))
    return Patient(
        subject_id=subject_id,
        sex=sex,
        age=age,
        width=13.4 * size,
        depth=8.8 * size * rng.normal(1, 0.05) * (1 + 0.0015 * max(age - 50, 0)),
        height=20.5 * size * rng.normal(1, 0.04),
        fat=fat,
        breast=float(np.clip(rng.normal(4.9, 1.0) + 0.5 * fat, 3.0, 8.5)) if sex == "F" else 0.0,
        ratio=float(np.clip(rng.normal(0.435 + 0.0005 * (age - 50), 0.022), 0.37, 0.485)),
        aorta=float(np.clip((age - 45) / 45 + rng.normal(0, 0.12), 0, 1)),
        seed=seed,
    )


@dataclass(frozen=True)
class Shape:
    """The effect of disease and posture on the anatomy of one image.

    Attributes:
        ratio: cardiothoracic ratio drawn (true widths, before magnification).
        mediastinum: factor on the width of the upper mediastinum.
        shift: displacement of heart and mediastinum to the patient's left, cm.
        dome_right: rise of the right dome above its place in full inspiration, cm.
        dome_left: the same on the left.
        sulcus: side of a deep sulcus (-1, 0, 1) in a supine pneumothorax.
        supine: the patient lies or half lies.
    """

    ratio: float
    mediastinum: float = 1.0
    shift: float = 0.0
    dome_right: float = 0.0
    dome_left: float = 0.0
    sulcus: int = 0
    supine: bool = False


class Anatomy:
    """One patient in one posture seen in one view; every layer is float32 cm on the view's half grid."""

    def __init__(self, patient: Patient, shape: Shape, view: View) -> None:
        self.patient, self.shape, self.view = patient, shape, view
        self.heart_scale = shape.ratio * 2 * patient.width / HEART_WIDTH
        self.unit = patient.height / 20.5
        self.base = patient.height - (shape.dome_right + shape.dome_left) / 2

    def dome(self, side: int) -> float:
        """Height of a dome's top, y in cm."""
        drop = 0.0 if side == RIGHT else 1.1
        return self.patient.height + drop - (self.shape.dome_right if side == RIGHT else self.shape.dome_left)

    def half_width(self, y: np.ndarray) -> np.ndarray:
        """Inner half width of the rib cage at level `y`, cm; 0 above the apex."""
        p = self.patient
        widest = 0.74 * p.height
        above = np.clip((widest - y) / (widest + 3.2), 0, 1)
        # The cage narrows again towards the costal margin.
        below = np.clip((y - widest) / (1.6 * p.height), 0, 1)
        return np.float32(p.width) * ((1 - above**2.5) ** 0.5 - 0.35 * below**2).astype(np.float32)

    def half_depth(self, y: np.ndarray) -> np.ndarray:
        """Inner half depth of the rib cage at level `y`, cm."""
        p = self.patient
        above = np.clip((0.8 * p.height - y) / (0.8 * p.height + 4.5), 0, 1)
        return np.float32(p.depth) * np.sqrt(1 - above**2.2).astype(np.float32)

    def lung(self, side: int) -> np.ndarray:
        """Thickness of one pleural space along the beam, before heart and mediastinum are taken out."""
        across, y = self.view.plane(0.0)
        return self.frontal_lung(across * side, y, side) if self.view.frontal else self._lung_lateral(across, y, side)

    def frontal_lung(self, ax: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Thickness of one pleural space in a frontal view, at `ax` cm from the midline and level `y`."""
        width = self.half_width(y)
        room = np.maximum(1 - (np.maximum(ax, 0) / np.maximum(width, 0.1)) ** 2.3, 0)
        front = self.half_depth(y) * np.sqrt(room) * self._apex(ax, y)
        deep = 3.0 if self.shape.sulcus == side else 0.0
        away = np.maximum(ax - 5.5, 0)
        excess = y - self.dome(side) - (DOME_CURVE_X + 0.004 * deep) * away**2 - 0.045 * np.minimum(ax - 5.5, 0) ** 2
        cut = np.sqrt(np.maximum(excess, 0) / DOME_CURVE_Z)
        behind = np.maximum(DOME_Z - cut + front, 0)
        ahead = np.maximum(front - DOME_Z - cut, 0)
        thickness = np.where(excess <= 0, 2 * front, np.minimum(behind + ahead, 2 * front))
        return thickness * smoothstep(ax, -0.8, 4.6)

    def _lung_lateral(self, z: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        depth = np.maximum(self.half_depth(y), 0.1)
        room = np.maximum(1 - (np.abs(z) / depth) ** 2.3, 0)
        reach = self.half_width(y) * np.sqrt(room) * self._apex(np.float32(4.8), y)
        excess = y - self.dome(side) - DOME_CURVE_Z * (z - DOME_Z) ** 2
        cut = 5.5 + np.sqrt(np.maximum(excess, 0) / DOME_CURVE_X)
        return np.where(excess <= 0, np.maximum(reach - 1.0, 0), np.maximum(reach - cut, 0)).astype(np.float32)

    def _apex(self, ax: np.ndarray, y: np.ndarray) -> np.ndarray:
        top = 0.07 * (ax - 4.6) ** 2
        return np.sqrt(1 - (1 - np.clip((y - top) / 7.0, 0, 1)) ** 2)

    def heart(self) -> np.ndarray:
        """Thickness of the heart: left ventricle, right atrium, right ventricle and the outflow tract."""
        s, top = self.heart_scale, self.heart_level()
        dx = self.shape.shift
        flat = 0.25 if self.shape.supine else 0.0
        solids = [
            Ellipsoid((2.9 * s + dx, top, 2.0), (6.4 * s, 4.5 * s, 4.6 * s), 0.62 - flat),
            Ellipsoid((-1.6 * s + dx, top - 0.4, 1.5), (2.95 * s, 4.4 * s, 3.6 * s), 0.05),
            Ellipsoid((1.2 * s + dx, top + 1.0, 4.0), (4.6 * s, 3.9 * s, 3.4 * s), 0.3),
            Ellipsoid((1.9 * s + dx, top - 3.6 * s, 2.2), (3.2 * s, 5.0 * s, 2.8 * s), -0.38),
        ]
        return _union([solid.chord(self.view) for solid in solids])

    def heart_level(self) -> float:
        """Level of the heart's centre, y in cm; it rides on the diaphragm."""
        return self.base - 3.5 * self.heart_scale + 1.6

    def great_vessels(self) -> np.ndarray:
        """Thickness of aorta, main pulmonary artery, caval vein and the tissue between them."""
        return self._mediastinum_frontal() if self.view.frontal else self._mediastinum_lateral()

    def _mediastinum_frontal(self) -> np.ndarray:
        p, sh, u = self.patient, self.shape, self.unit
        x, y = self.view.plane(0.0)
        row = np.linspace(-12.0, 40.0, 260)
        # Left border: subclavian artery, knob, aortopulmonary window, pulmonary trunk. Right: caval vein, atrium.
        knob = 3.15 + 0.95 * p.aorta
        wide = sh.mediastinum * (1 + 0.04 * min(p.fat, 3.0) + (0.12 if sh.supine else 0.0))
        left = PchipInterpolator(
            np.array([-12, -2, 2.0, 4.6, 6.3, 8.2, 9.8, 12, 15, 40]) * u,
            [2.4, 2.2, 2.3, 2.6, knob, 2.75, 3.35, 3.1, 2.3, 2.0],
        )(row)
        right = PchipInterpolator(
            np.array([-12, -2, 2.0, 5.0, 8.0, 11, 14, 40]) * u, [2.4, 2.1, 2.4, 2.65, 2.85, 3.0, 2.3, 2.0]
        )(row)
        lower = np.clip((row - 9 * u) / 5, 0, 1)
        left, right = (border * (wide + (1 - wide) * lower) for border in (left, right))
        shift = sh.shift * 0.85 * np.clip((row + 4) / 8, 0, 1)
        middle, half = (left - right) / 2 + shift, (left + right) / 2
        level = y[:, 0] if not self.view.tilt else y
        middle, half = (np.interp(level, row, c).astype(np.float32) for c in (middle, half))
        if middle.ndim == 1:
            middle, half = middle[:, None], half[:, None]
        # Thick in the middle, and only as deep as a great vessel at its borders.
        column = 11.0 * np.maximum(1 - np.abs((x - middle) / half) ** 1.7, 0) ** 0.75 * smoothstep(y, 19.0, 11.5)
        bow = 1.1 * p.aorta * np.sin(np.clip((y - 7 * u) / 16.0, 0, 1) * np.pi)
        behind, down = self.view.plane(-5.0)
        aorta = 2.4 * np.sqrt(np.maximum(1 - ((behind - np.float32(1.4 + 0.8 * sh.shift) - bow) / 1.3) ** 2, 0))
        return column + aorta * smoothstep(down, 6.2, 8.0)

    def _mediastinum_lateral(self) -> np.ndarray:
        p, u = self.patient, self.unit
        z, y = self.view.plane(0.0)
        arch = Ellipsoid((1.5, 6.8 * u, -1.0), (2.0 + 0.5 * p.aorta, 1.6 + 0.3 * p.aorta, 4.6), 0.0).chord(self.view)
        trunk = Ellipsoid((0.5, 10.3 * u, 0.8), (4.0, 1.7, 2.2)).chord(self.view)
        column = 3.4 * smoothstep(np.abs(z - 0.2), 4.2, 1.8) * smoothstep(y, 13.0, 8.0)
        aorta = 2.4 * np.sqrt(np.maximum(1 - ((z + 5.2) / 1.25) ** 2, 0)) * smoothstep(y, 6.5, 8.5)
        return _union([column, arch, 0.8 * trunk]) + 0.5 * aorta

    def spine_space(self) -> np.ndarray:
        """Thickness that vertebrae and the muscles beside them keep free of lung."""
        across, _ = self.view.plane(-6.5)
        if self.view.frontal:
            return 6.5 * np.maximum(1 - (across / np.float32(3.3)) ** 2, 0)
        return 4.6 * np.sqrt(np.maximum(1 - ((across + 8.0) / 2.6) ** 2, 0))

    def body(self) -> np.ndarray:
        """Thickness of the whole body, arms and neck included."""
        return self._body_frontal() if self.view.frontal else self._body_lateral()

    def _body_frontal(self) -> np.ndarray:
        p = self.patient
        x, y = self.view.plane(0.0)
        ax = np.abs(x)
        wall = 2.3 + 0.85 * p.fat
        belly = 0.7 * p.fat * smoothstep(y, 16.0, 30.0)
        torso_width = np.float32(p.width + wall) - 1.3 * smoothstep(y, 14.0, 24.0) + belly
        neck = 5.6 + 0.35 * p.fat
        slope = neck + (p.width + 8.0 - neck) * smoothstep(y, -9.0, 4.5) ** 1.3
        width = np.minimum(slope, torso_width + 1.5 * smoothstep(y, 15.0, 5.0))
        depth = self.half_depth(np.maximum(y, 3.0)) + 1.3 + 0.62 * p.fat + belly
        depth = 6.2 + (depth - 6.2) * smoothstep(y, -6.0, 6.0)
        torso = 2 * depth * np.sqrt(np.maximum(1 - (ax / width) ** 3.6, 0))
        return _union([torso, self._arms(ax, y, wall)])

    def _arms(self, ax: np.ndarray, y: np.ndarray, wall: float) -> np.ndarray:
        p = self.patient
        radius = 3.9 + 0.35 * p.fat
        shoulder = np.float32(p.width + wall + 1.6)
        lean = 0.10 if self.shape.supine else 0.30
        along = np.clip((lean * (ax - shoulder) + (y - 2.6)) / (1 + lean * lean), 0, 40)
        off = np.square(ax - shoulder - lean * along) + np.square(y - 2.6 - along)
        return 2 * np.sqrt(np.maximum(radius**2 - off, 0))

    def _body_lateral(self) -> np.ndarray:
        p = self.patient
        z, y = self.view.plane(0.0)
        wall = 1.7 + 0.6 * p.fat
        front = self.half_depth(np.maximum(y, 2.0)) + wall + 0.8 * p.fat * smoothstep(y, 16.0, 30.0)
        back = self.half_depth(np.maximum(y, 6.0)) + wall + 2.3
        depth = np.where(z > 0, front, back) * (0.62 + 0.38 * smoothstep(y, -6.0, 5.0))
        width = (p.width + 1.5 + 0.6 * p.fat) * (0.55 + 0.45 * smoothstep(y, -5.0, 6.0))
        torso = 2 * width * np.sqrt(np.maximum(1 - (np.abs(z) / depth) ** 2.4, 0))
        arms = np.maximum(1 - np.square((z - 1.5 + 0.35 * y) / 5.2), 0)
        return torso + 9.0 * np.sqrt(arms) * smoothstep(y, 2.5, -3.0)

    def breasts(self) -> np.ndarray:
        """Thickness that the breasts add in front of the chest wall; a mixture of fat and gland."""
        p = self.patient
        if not p.breast:
            return np.zeros_like(self.view.plane()[0])
        fall = 1.0 if self.shape.supine else 0.0
        out, top = 8.3 + 1.6 * fall, 0.74 * p.height - 0.6 * fall
        radii = (p.breast * 1.06, p.breast, p.breast * (0.75 - 0.25 * fall))
        solids = [Ellipsoid((s * out, top, p.depth + 1.0), radii, s * 0.25) for s in (RIGHT, LEFT)]
        _, y = self.view.plane(p.depth)
        # The upper half slopes into the chest wall; the lower border is sharp, as skin meets air there.
        slope = smoothstep(y, top - p.breast, top + 0.35 * p.breast)
        return (0.42 if self.view.frontal else 0.3) * slope * sum(solid.chord(self.view) for solid in solids)

    def stomach(self, rng: np.random.Generator) -> np.ndarray:
        """Thickness of gas under the left dome (stomach) and now and then in the colon."""
        shown = rng.random() < 0.7
        size = rng.uniform(1.2, 3.3)
        dx, dy, flat = rng.uniform(-2.0, 2.0), rng.uniform(0.6, 1.6), rng.uniform(0.4, 0.75)
        colon = rng.random(3) < 0.3
        loops = rng.uniform(-1, 1, (3, 3))
        top = self.dome(LEFT)
        gas = np.zeros_like(self.view.plane()[0])
        if shown:
            spot = (6.0 + dx, top + dy + size * flat, 1.0)
            gas += Ellipsoid(spot, (size * 1.25, size * flat, size), 0.15).chord(self.view)
        for here, (a, b, c) in zip(colon, loops, strict=True):
            if here:
                spot = (5.0 + 5 * a, top + 6 + 3 * b, 3.0)
                gas += Ellipsoid(spot, (1.6 + 0.5 * c, 1.0, 1.2), a).chord(self.view)
        return gas

    def inside_lung(self, points: np.ndarray) -> np.ndarray:
        """Mask of the (N, 3) points that lie in a pleural space, 3 mm inside its wall: bool (N,)."""
        x, y, z = points[:, 0], points[:, 1], points[:, 2]
        side = np.where(x < 0, RIGHT, LEFT)
        ax = np.abs(x)
        width = np.maximum(self.half_width(y) - 0.3, 0.1)
        depth = np.maximum(self.half_depth(y) - 0.3, 0.1)
        inside = (ax / width) ** 2.3 + (np.abs(z) / depth) ** 2 < self._apex(ax, y) ** 2
        domes = np.where(side == RIGHT, self.dome(RIGHT), self.dome(LEFT))
        floor = domes + DOME_CURVE_X * np.maximum(ax - 5.5, 0) ** 2 + DOME_CURVE_Z * (z - DOME_Z) ** 2
        return inside & (y < floor - 0.2)


def _union(chords: list[np.ndarray]) -> np.ndarray:
    """Thickness of overlapping solids without a crease where one takes over from another."""
    total = np.square(np.square(chords[0]))
    for chord in chords[1:]:
        total += np.square(np.square(chord))
    return np.sqrt(np.sqrt(total))
