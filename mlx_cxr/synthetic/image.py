"""One image of one patient: posture and view, anatomy, findings, exposure, display, side marker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_cxr.synthetic import physics
from mlx_cxr.synthetic.anatomy import LEFT, RIGHT, Anatomy, Patient, Shape
from mlx_cxr.synthetic.canvas import Canvas, Finding, blank_canvas
from mlx_cxr.synthetic.devices import draw_devices
from mlx_cxr.synthetic.findings import DRAWERS, OPACITIES
from mlx_cxr.synthetic.geometry import Kind, View, blur, noise_field, smoothstep
from mlx_cxr.synthetic.skeleton import bones
from mlx_cxr.synthetic.vessels import airways, draw, grow


@dataclass(frozen=True)
class SyntheticImage:
    """A rendered image.

    Attributes:
        pixels: uint8 (rows, columns), bone white, patient's right at image left on frontal views.
        masks: by label, bool (rows, columns), of each finding drawn that shows.
        view: its geometry.
        ratio: cardiothoracic ratio drawn, in true widths.
    """

    pixels: np.ndarray
    masks: dict[str, np.ndarray]
    view: View
    ratio: float


def render_image(
    patient: Patient, findings: Mapping[str, Finding], kind: Kind, size: int, seed: int, supine: bool = False
) -> SyntheticImage:
    """Render one image.

    Every part draws from its own stream of `seed`, so two calls that differ in one finding differ in nothing
    else but that finding (and the grey scale that is fitted to the image).

    Args:
        patient: the patient.
        findings: those to draw, by label.
        kind: `PA`, `AP` or `LATERAL`.
        size: short side in pixels.
        seed: position, inspiration, exposure and noise of this image.
        supine: lying or half lying (bedside AP); an upright AP is False.

    Raises:
        ValueError: an unknown view or a size under 64.
    """
    if kind not in ("PA", "AP", "LATERAL"):
        raise ValueError(f"view {kind!r} is not one of PA, AP, LATERAL")
    if size < 64:
        raise ValueError(f"a short side of {size} px is too small to render; use 64 or more")
    pose, quantum, marker = (np.random.default_rng((seed, stream)) for stream in (1, 2, 3))
    shape = _shape(patient, findings, supine, pose)
    view = _view(patient, kind, size, supine, pose)
    anatomy = Anatomy(patient, shape, view)
    canvas = blank_canvas(anatomy)
    for label, drawer in DRAWERS.items():
        if label in findings:
            drawer(canvas, findings[label])
    if "Support Devices" in findings:
        draw_devices(canvas, findings["Support Devices"])
    exposure = physics.sample_exposure(view, supine, pose)
    attenuation = _attenuation(canvas, findings, np.random.default_rng((patient.seed, 31)))
    density = physics.expose(attenuation, view, exposure, quantum)
    pixels = physics.display(density, view, exposure)
    _mark_side(pixels, view, supine, marker)
    return SyntheticImage(pixels, _finished_masks(canvas, findings), view, shape.ratio)


def _shape(patient: Patient, findings: Mapping[str, Finding], supine: bool, rng: np.random.Generator) -> Shape:
    breath = float(np.clip(rng.normal(2.6 if supine else 0.7, 0.9), 0, 5))
    right = left = breath + rng.normal(0, 0.25)
    left += rng.normal(0, 0.3)
    ratio, wide, shift = patient.ratio, 1.0 + abs(rng.normal(0, 0.04)), 0.0
    if heart := findings.get("Cardiomegaly"):
        ratio = 0.525 + 0.135 * heart.severity
    if broad := findings.get("Enlarged Cardiomediastinum"):
        wide = 1.32 + 0.55 * broad.severity
    if loss := findings.get("Atelectasis"):
        rise = 0.5 + (2.4 if loss.kind == "lobar" else 1.0) * loss.severity
        right += rise if RIGHT in loss.sides else 0.0
        left += rise if LEFT in loss.sides else 0.0
        shift += loss.side * (1.3 if loss.kind == "lobar" else 0.2) * loss.severity
    if (fluid := findings.get("Pleural Effusion")) and fluid.severity > 0.6:
        shift -= fluid.side * 2.0 * (fluid.severity - 0.6)
    air = findings.get("Pneumothorax")
    if air and air.severity > 0.5 and not supine:
        shift -= air.side * 2.2 * (air.severity - 0.5)
    return Shape(
        ratio=ratio,
        mediastinum=wide,
        shift=float(shift),
        dome_right=float(min(right, 6.0)),
        dome_left=float(min(left, 6.0)),
        sulcus=(air.side or LEFT) if air and supine and air.kind == "deep sulcus" else 0,
        supine=supine,
    )


def _view(patient: Patient, kind: Kind, size: int, supine: bool, rng: np.random.Generator) -> View:
    landscape = kind != "LATERAL" and rng.random() < (0.6 if supine else 0.25)
    long = round(size * 43 / 35.5 / 2) * 2
    rows, columns = (size, long) if landscape else (long, size)
    # Lateral cassettes are filled more tightly; an image is collimated to the patient, small or large.
    build = patient.width / 13.4 * (1 + 0.012 * patient.fat)
    field = (40.5 if landscape else 34.5) * build * rng.uniform(0.92, 1.06) * (1.03 if supine else 1.0)
    if kind == "LATERAL":
        field *= 0.95
    pixel = field / columns
    sideways, down = rng.normal(0, 0.8 if supine else 0.4), rng.normal(0, 1.0 if supine else 0.6)
    middle = 0.57 * patient.height - (0.4 if landscape else -0.6) + down
    distance, gap = 180.0, patient.depth + 2.5 + 0.5 * patient.fat
    if kind == "AP":
        distance, gap = (float(rng.uniform(100, 125)) if supine else 180.0), patient.depth + 4.5 + 0.5 * patient.fat
    if kind == "LATERAL":
        gap = patient.width + 4.0
    return View(
        kind, rows, columns, pixel, distance, gap, (float(sideways), float(middle * 1.07)),
        tilt=float(rng.normal(0, 0.035 if supine else 0.012)), turn=float(rng.normal(0, 0.09 if supine else 0.03)),
    )  # fmt: skip


def _attenuation(canvas: Canvas, findings: Mapping[str, Finding], rng: np.random.Generator) -> np.ndarray:
    """Line integral of µ along each ray: float32 (rows, columns)."""
    anatomy, view = canvas.anatomy, canvas.view
    # On the half grid: body, lung, gas, fat and the spine.
    body = anatomy.body()
    air = canvas.air
    lung = np.maximum(np.minimum(canvas.lung() - canvas.opacity - air, body - 1.5), 0)
    gas = np.minimum(anatomy.stomach(rng), 0.4 * body)
    # The lung's own grain: acini and vessels too small to draw.
    grain = noise_field(np.random.default_rng((canvas.patient.seed, 32)), lung.shape, 0.8 / (2 * view.pixel), 2)
    aeration = 1.0 + 0.05 * grain + (0.12 if canvas.shape.supine else 0.0)
    fat = 0.35 + 0.9 * canvas.patient.fat
    fat = np.minimum(2 * fat, 0.5 * body)
    soft = np.maximum(body - lung - air - gas - fat, 0) + anatomy.breasts() * 0.9
    half = physics.MU_SOFT * soft + physics.MU_FAT * fat + physics.MU_LUNG * lung * aeration
    cortical = physics.MU_BONE - physics.MU_SOFT
    age = np.float32(1.08 - 0.004 * max(canvas.patient.age - 50, 0) * (1.6 if canvas.patient.sex == "F" else 0.8))
    fine, coarse = bones(anatomy, canvas.breaks)
    half = half + cortical * age * coarse
    # On the image's grid: vessels, ribs, girdle, airways and metal.
    trees = draw(anatomy, (tree := grow(anatomy)), _gain(canvas, findings, tree.points))
    aerated = view.full((smoothstep(lung, 0.0, 3.0) * canvas.vessel_gain).astype(np.float32))
    full = view.full(half.astype(np.float32))
    full = full + cortical * age * (fine + canvas.bone) + (physics.MU_SOFT - physics.MU_LUNG) * (trees * aerated)
    full = full + physics.MU_SOFT * (canvas.soft - 0.7 * airways(anatomy)) + physics.MU_METAL * canvas.metal
    return np.maximum(full, 0).astype(np.float32)


def _gain(canvas: Canvas, findings: Mapping[str, Finding], points: np.ndarray) -> np.ndarray | None:
    """Upper-zone vessels widen when lying and in heart failure; those in the base narrow a little."""
    shift = 0.18 if canvas.shape.supine else 0.0
    if edema := findings.get("Edema"):
        shift += 0.2 + 0.3 * edema.severity
    if not shift:
        return None
    upper = np.clip((11.0 - points[:, 1]) / 6.0, -0.4, 1.0)
    return 1 + shift * upper


def _mark_side(pixels: np.ndarray, view: View, supine: bool, rng: np.random.Generator) -> None:
    """Burn in a lead letter: R at image left or L at image right; on laterals L near the front or back."""
    letter = "L" if rng.random() < 0.7 or not view.frontal else "R"
    rows, columns = pixels.shape
    size = max(8, int(min(rows, columns) * rng.uniform(0.035, 0.055)))
    font = ImageFont.load_default(size=size)
    tag = Image.new("L", (size * 6, size * 4))
    pen = ImageDraw.Draw(tag)
    pen.text((size * 2, size), letter, font=font, fill=255, stroke_width=max(1, size // 14), stroke_fill=255)
    if supine and rng.random() < 0.35:
        small = ImageFont.load_default(size=max(6, size // 2))
        pen.text((int(size * 1.2), int(size * 2.2)), "PORTABLE", font=small, fill=230)
    tag = tag.rotate(float(rng.normal(0, 6)), resample=Image.Resampling.BILINEAR)
    box = tag.getbbox()
    if box is None:
        return
    stamp = np.asarray(tag.crop(box), np.float32) / 255
    height, width = stamp.shape
    margin = rng.uniform(0.02, 0.09) * columns
    left = int(margin) if letter == "R" else int(columns - margin - width)
    top = int(rng.uniform(0.03, 0.16) * rows)
    place = (slice(top, top + height), slice(max(left, 0), max(left, 0) + width))
    under = pixels[place].astype(np.float32)
    lead = blur(stamp, 0.5)[: under.shape[0], : under.shape[1]]
    pixels[place] = np.clip(under + (250 - under) * lead, 0, 255).astype(np.uint8)


def _finished_masks(canvas: Canvas, findings: Mapping[str, Finding]) -> dict[str, np.ndarray]:
    """Masks of what shows; Lung Opacity, as the parent, takes in its children's."""
    masks = {label: mask for label, mask in canvas.masks.items() if label in findings and mask.any()}
    children = [masks[label] for label in OPACITIES if label in masks]
    if children:
        masks["Lung Opacity"] = np.logical_or.reduce(children)
    return masks
