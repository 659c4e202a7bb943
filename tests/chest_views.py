"""Images that `mlx_cxr.data.chest_film_gate` is fitted and measured on: real ones, variants of them, and drawings."""

from __future__ import annotations

import csv
import functools
import os
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter

from mlx_cxr.synthetic.cohort import plan_cohort
from mlx_cxr.synthetic.image import render_image

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = Path(os.environ.get("MLX_CXR_REALCXR", SHARED / "realcxr"))
REAL2 = Path(os.environ.get("MLX_CXR_REALCXR2", SHARED / "realcxr2"))
FIT_SEED, TEST_SEED = 1, 2
TURNS = {
    "negative": ImageOps.invert,
    "left": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "right": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
}
"""Kind -> what makes an image of it from a frontal one."""


class RealImage(NamedTuple):
    """A real image, at most 512 px wide; `source` and `patient` tell apart what a test must not share with the fit."""

    kind: str
    source: str
    patient: str
    name: str
    gray: Image.Image


@functools.cache
def real_images() -> tuple[RealImage, ...]:
    """Frontal images of three sources, and of laterals, CT, spines and photographs; empty where they are not here."""
    images = []
    for folder, table in ((REAL, "metadata"), (REAL2, "nih"), (REAL2, "paired"), (REAL2, "negatives")):
        if not folder.is_dir():
            return ()
        with (folder / f"{table}.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                patient = row["patient_id"].replace("-", "_") or row["image_file"]
                gray = Image.open(folder / row["image_file"]).convert("L")
                source = row["kind"] if table == "negatives" else patient.split("_")[0]
                images.append(RealImage(row.get("kind", "frontal"), source, patient, row["image_file"], gray))
    return tuple(images)


@functools.cache
def drawn_images(seed: int, patients: int = 90, size: int = 96) -> dict[str, list[Image.Image]]:
    """Images of the synthetic cohort with all its findings and devices: PA, AP and LATERAL."""
    images = {"PA": [], "AP": [], "LATERAL": []}
    for study in plan_cohort(patients, seed).studies:
        for plan in study.images:
            image = render_image(study.patient, study.findings, plan.kind, size, plan.seed, plan.supine)
            images[plan.kind].append(Image.fromarray(image.pixels))
    return images


def photographs() -> list[Image.Image]:
    """Colour photographs that come with scikit-learn and Matplotlib, and crops of them: RGB."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    whole.append(Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB"))
    rng = np.random.default_rng(0)
    return [*whole, *(part_of(image, rng, 0.4, 1) for image in whole for _ in range(20))]


def part_of(image: Image.Image, rng: np.random.Generator, least: float, most: float) -> Image.Image:
    """A square part of an image, its side a random share of the image's shorter one."""
    side = int(min(image.size) * rng.uniform(least, most))
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def varied(image: Image.Image, rng: np.random.Generator, mirrors: bool = True) -> Image.Image:
    """An image that shows the same: turned a little, cropped, bordered, of other exposure, written on, noisy, …

    Of an image that is turned by 90 degrees its mirror image shows another turn, so `mirrors` is to be false.
    """
    width, height = image.size
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    if rng.random() < 0.6:
        left, top, right, bottom = rng.uniform(0, 0.1, 4)
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        image = image.crop(tuple(int(edge) for edge in box))
    if rng.random() < 0.35:
        border = rng.uniform(0, 0.15, 4) * max(image.size) * rng.permutation([1, 1, rng.integers(2), rng.integers(2)])
        image = ImageOps.expand(image, tuple(border.astype(int).tolist()), int(rng.choice([0, 0, 0, 255, 128])))
    levels = np.asarray(image, np.float64) / 255
    if rng.random() < 0.7:
        levels = levels ** np.exp(rng.uniform(-0.7, 0.7))
    if rng.random() < 0.4:
        levels = (levels - 0.5) * rng.uniform(0.5, 1.8) + 0.5 + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.2:
        levels = levels + rng.normal(0, rng.uniform(0.01, 0.05), levels.shape)
    image = Image.fromarray((levels.clip(0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.1:
        image = ImageOps.equalize(image)
    if mirrors and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.3:
        draw = ImageDraw.Draw(image)
        for place in rng.uniform(0, 0.9, (rng.integers(1, 4), 2)):
            draw.text(tuple(place * image.size), "PORTABLE AP SUPINE 12:40"[: rng.integers(1, 24)], fill=255)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    if rng.random() < 0.3:
        image = image.resize((max(8, int(image.width * rng.uniform(0.85, 1.15))), image.height))
    return image


def drawn_part(kind: str, rng: np.random.Generator) -> Image.Image:
    """A rough drawing of a radiograph of another part of the body: one of `PARTS`. No real one was at hand."""
    height, width = 160, int(160 * rng.uniform(0.7, 1.2))
    canvas = PARTS[kind](np.zeros((height, width)), rng)
    for spread, least in ((6, 0.08), (2, 0.03)):
        noise = gaussian_filter(rng.normal(size=canvas.shape), spread)
        canvas = canvas * (1 + least * noise / noise.std())
    canvas = canvas + rng.uniform(0, 0.1) + 0.01 * rng.normal(size=canvas.shape)
    return Image.fromarray((255 * (canvas / canvas.max()).clip(0, 1) ** rng.uniform(0.6, 1.6)).astype(np.uint8))


def _limb(canvas, start, end, radii, bone=0.6, soft=0.35):
    """Add a tapered limb between two points (x, y), with a bone of a bright cortex that is so much of its radius."""
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((x - start[0]) * dx + (y - start[1]) * dy) / (dx**2 + dy**2)
    inside = along.clip(0, 1)
    radius = radii[0] + (radii[1] - radii[0]) * inside
    off = np.hypot(x - start[0] - inside * dx, y - start[1] - inside * dy) / radius
    tissue = np.sqrt((1 - off**2).clip(0))
    np.maximum(canvas, soft * tissue, out=canvas)
    across = off / (bone * (1 + 0.35 * np.abs(2 * inside - 1) ** 3))
    bony = (across < 1) & (np.abs(along - 0.5) < 0.52)
    canvas += np.where(bony, (0.25 + 0.25 * across**4) * np.minimum(1, 3 * tissue), 0)


def _hand(canvas, rng):
    height, width = canvas.shape
    for x in [width / 2] if rng.random() < 0.7 else [width * 0.28, width * 0.74]:
        unit = (1 if x == width / 2 else 0.6) * rng.uniform(0.8, 1.1) * min(height, width) / 160
        side, wrist = rng.choice([-1, 1]), height * rng.uniform(0.6, 0.75)
        for off in (-9, 9):
            _limb(
                canvas, (x + off * unit, wrist + 9 * unit), (x + off * unit, height + 20), (22 * unit, 18 * unit), 0.4
            )
        for finger, length in enumerate((30, 62, 72, 68, 52)):
            angle = np.deg2rad(-rng.uniform(30, 55) if finger == 0 else (finger - 2.5) * rng.uniform(5, 13)) * side
            place = (x + (finger - 2.5) * 8 * unit * side, wrist)
            for joint, part in enumerate((45, 34, 22, 16)):
                part *= unit * length / 68
                tip = (place[0] + np.sin(angle) * part, place[1] - np.cos(angle) * part)
                _limb(canvas, place, tip, ((13 - 2 * joint) * unit, (11.5 - 2 * joint) * unit), 0.5)
                place = tip
    return canvas


def _knee(canvas, rng):
    height, width = canvas.shape
    for x in [width / 2] if rng.random() < 0.6 else [width * 0.27, width * 0.73]:
        unit = width * (0.5 if x == width / 2 else 0.28) / 50 * rng.uniform(0.6, 0.9)
        bend = rng.uniform(-12, 12) * unit
        _limb(canvas, (x - bend, -20), (x, height * 0.48), (42 * unit, 46 * unit), 0.5)
        _limb(canvas, (x, height * 0.52), (x + bend, height + 20), (46 * unit, 34 * unit), 0.5)
        _limb(canvas, (x + 22 * unit, height * 0.62), (x + 22 * unit + bend, height + 20), (9 * unit, 8 * unit), 0.8)
    return canvas


def _skull(canvas, rng):
    height, width = canvas.shape
    y, x = np.mgrid[:height, :width]
    wide, high = width * rng.uniform(0.33, 0.45), height * rng.uniform(0.32, 0.4)
    x, y = (x - width / 2) / wide, (y - height * 0.42) / high
    off = np.hypot(x, y)
    canvas += np.where(off < 1, 0.45 + 0.4 * off**8, 0)
    canvas -= 0.2 * (np.hypot((np.abs(x) - 0.42) / 0.25, (y - 0.35) / 0.2) < 1)
    return canvas + 0.35 * ((np.abs(x) < 0.55) & (np.abs(y - 1.05) < 0.3)) + 0.35 * ((np.abs(x) < 0.3) & (y > 1.2))


def _pelvis(canvas, rng):
    height, width = canvas.shape
    y, x = np.mgrid[:height, :width]
    x, y = np.abs(x / width - 0.5), y / height
    canvas += np.where(x < 0.42 + 0.04 * np.sin(50 * y), 0.5, 0.05) + 0.15 * ((x < 0.06) & (y < 0.6))
    canvas += 0.28 * (np.hypot((x - 0.25) / 0.16, (y - 0.5) / 0.2) < 1)
    canvas += 0.25 * (np.hypot((x - 0.3) / 0.06, (y - 0.78) / 0.07) < 1)
    for side in (-1, 1):
        start, end = width * (0.5 + 0.3 * side), width * (0.5 + 0.36 * side)
        _limb(canvas, (start, height * 0.78), (end, height + 30), (width * 0.07, width * 0.06), 0.8, 0.5)
    return canvas


def _foot(canvas, rng):
    height, width = canvas.shape
    unit = min(height, width) / 160
    _limb(canvas, (width * 0.25, -10), (width * 0.3, height * 0.6), (26 * unit, 24 * unit))
    _limb(canvas, (width * 0.2, height * 0.72), (width * 0.55, height * 0.7), (28 * unit, 26 * unit), 0.7)
    for toe in range(5):
        end = (width * rng.uniform(0.85, 0.97), height * (0.62 + 0.07 * toe))
        _limb(canvas, (width * 0.5, height * (0.62 + 0.05 * toe)), end, (11 * unit, 8 * unit), 0.5)
    return canvas


PARTS = {"hand": _hand, "knee": _knee, "skull": _skull, "pelvis": _pelvis, "foot": _foot}
