"""From centimetres of tissue to an 8-bit image: attenuation, scatter, detector, noise, display.

Attenuation coefficients are NIST's (Hubbell & Seltzer, NISTIR 5632) at 60 keV, the mean energy behind a patient
at chest kilovoltages, times density. One energy stands for the spectrum: there is no beam hardening.
The display follows the making of MIMIC-CXR-JPG (Johnson et al., arXiv:1901.07042): intensities scaled to 0..255,
then histogram-equalized; scanners compress the latitude before that, so it is done here with a wide blur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_cxr.synthetic.geometry import View, blur

MU_SOFT = 0.205 * 1.06
MU_FAT = 0.197 * 0.95
MU_LUNG = 0.205 * 0.26
MU_BONE = 0.315 * 1.92
MU_METAL = 1.205 * 7.87
"""1/cm at 60 keV: mass attenuation (cm²/g) times density (g/cm³); lung inflated, bone cortical, metal iron."""


@dataclass(frozen=True)
class Exposure:
    """Settings of exposure and display of one image.

    Attributes:
        quanta: detected quanta per pixel in the open beam; noise goes with its inverse root.
        scatter: scattered over primary light, times the mean transmission near by.
        sharpness: detector blur, pixels (sigma).
        equalize: share of histogram equalization in the final grey scale, 0 to 1.
        latitude: share of wide-area contrast that the scanner takes out, 0 to 1.
        edge: strength of the scanner's edge enhancement.
        gamma: display gamma; below 1 is brighter.
        shutter: collimated border, pixels (left, top, right, bottom).
    """

    quanta: float
    scatter: float
    sharpness: float
    equalize: float
    latitude: float
    edge: float
    gamma: float
    shutter: tuple[int, int, int, int]


def sample_exposure(view: View, bedside: bool, rng: np.random.Generator) -> Exposure:
    """An exposure as the department makes them; bedside images have no grid, so more scatter and noise."""
    short = min(view.rows, view.columns)
    shutter = [0, 0, 0, 0]
    if rng.random() < (0.35 if bedside else 0.2):
        shutter = [int(side * short) for side in np.maximum(rng.normal(0.012, 0.022, 4), 0)]
    return Exposure(
        quanta=float(rng.lognormal(np.log(2.2e5 if bedside else 6e5), 0.45)),
        scatter=float(rng.uniform(0.45, 0.8) if bedside else rng.uniform(0.16, 0.34)),
        sharpness=float(rng.uniform(0.55, 0.95) if bedside else rng.uniform(0.4, 0.7)),
        equalize=float(rng.uniform(0.2, 0.7)),
        latitude=float(rng.uniform(0.25, 0.5)),
        edge=float(rng.uniform(0.2, 0.9)),
        gamma=float(np.exp(rng.normal(-0.28, 0.2))),
        shutter=(shutter[0], shutter[1], shutter[2], shutter[3]),
    )


def expose(attenuation: np.ndarray, view: View, exposure: Exposure, rng: np.random.Generator) -> np.ndarray:
    """Signal in the detector.

    Args:
        attenuation: float32 (rows, columns), the line integral of µ.
        rng: the quantum noise.

    Returns:
        float32 (rows, columns): -log of detected over open-beam intensity.
    """
    primary = np.exp(-attenuation)
    if exposure.sharpness > 0.3:
        primary = blur(primary, exposure.sharpness)
    # Light is scattered where something attenuates it, so none comes from the open beam beside the patient.
    source = primary * np.minimum(attenuation, 5.0) * np.float32(0.55)
    signal = primary + np.float32(exposure.scatter) * blur(source, 4.0 / view.pixel)
    # Poisson counts are large here, so a normal of the same variance stands for them.
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    signal = signal + noise * np.sqrt(signal / np.float32(exposure.quanta) * np.float32((0.07 / view.pixel) ** 2))
    return -np.log(np.maximum(signal, 1e-5))


def display(density: np.ndarray, view: View, exposure: Exposure) -> np.ndarray:
    """The image as stored: uint8 (rows, columns), bone white."""
    wide = blur(density, 2.6 / view.pixel)
    shown = density - np.float32(exposure.latitude) * wide
    if exposure.edge > 0:
        fine = blur(density, 0.25 / view.pixel)
        shown = shown + np.float32(exposure.edge) * (density - fine)
    # The grey scale is spent on the patient: direct exposure and the lead marker do not set it.
    sample, patient = shown[::3, ::3], density[::3, ::3] > density.min() + 0.9
    inside = sample[patient] if patient.mean() > 0.2 else sample.ravel()
    low, high = np.percentile(inside, (0.7, 99.5) if view.frontal else (3.0, 97.0))
    high += 0.05 * (high - low)
    levels, of_patient = (
        (np.clip((part - low) / max(high - low, 1e-6), 0, 1) * 1023).astype(np.int32) for part in (shown, inside)
    )
    counts = np.bincount(of_patient, minlength=1024).astype(np.float64)
    counts = np.minimum(counts, counts.sum() * 0.006)
    curve = np.cumsum(counts) / counts.sum()
    ramp = np.linspace(0, 1, 1024)
    table = (1 - exposure.equalize) * ramp**exposure.gamma + exposure.equalize * curve
    image = (table[levels] * 255).astype(np.uint8)
    left, top, right, bottom = exposure.shutter
    image[:top] = 0
    image[view.rows - bottom :] = 0
    image[:, :left] = 0
    image[:, view.columns - right :] = 0
    return image
