"""The layers of one image while findings are drawn on it, and the masks of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import binary_dilation

from mlx_cxr.synthetic.anatomy import LEFT, RIGHT, Anatomy, Patient, Shape
from mlx_cxr.synthetic.geometry import View
from mlx_cxr.synthetic.skeleton import RibBreak

VISIBLE = 0.6
"""Tissue in the place of air, cm, from which a pixel counts as part of a finding's mask."""


@dataclass(frozen=True)
class Finding:
    """One finding, as drawn.

    Attributes:
        label: one of the 14 CheXpert labels.
        severity: 0 (only just visible) to 1 (extreme).
        side: -1 right, 1 left, 0 both or midline.
        kind: sub-type, such as `plate` or a lobe's name; meanings lie with the drawing function.
        seed: fixes position and texture, so that a finding stays itself from image to image.
    """

    label: str
    severity: float
    side: int = 0
    kind: str = ""
    seed: int = 0

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides it lies on."""
        return (self.side,) if self.side else (RIGHT, LEFT)


@dataclass
class Canvas:
    """Layers in cm; half-grid ones are float32 (rows/2, columns/2), image-size ones (rows, columns).

    Attributes:
        anatomy: the patient in this posture and view.
        spaces: thickness of each pleural space with heart and mediastinum taken out, by side (half grid).
        opacity: soft tissue or fluid in place of aerated lung (half grid).
        air: bare air in place of lung, as in a pneumothorax (half grid).
        soft: thin soft-tissue detail (image size); negative where air replaces tissue.
        bone: excess calcium, cm of cortex (image size).
        metal: metal and dense plastic, cm of iron (image size).
        vessel_gain: factor on vessels' visibility (half grid), 1 without disease.
        breaks: rib fractures for the skeleton to draw.
        masks: by label, bool (rows, columns).
    """

    anatomy: Anatomy
    spaces: dict[int, np.ndarray]
    opacity: np.ndarray
    air: np.ndarray
    soft: np.ndarray
    bone: np.ndarray
    metal: np.ndarray
    vessel_gain: np.ndarray
    breaks: list[RibBreak] = field(default_factory=list)
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def view(self) -> View:
        """The exposure's geometry."""
        return self.anatomy.view

    @property
    def patient(self) -> Patient:
        """The patient."""
        return self.anatomy.patient

    @property
    def shape(self) -> Shape:
        """The posture."""
        return self.anatomy.shape

    def lung(self) -> np.ndarray:
        """Thickness of both pleural spaces together (half grid)."""
        return self.spaces[RIGHT] + self.spaces[LEFT]

    def add_opacity(self, label: str, thickness: np.ndarray, visible: float = VISIBLE) -> None:
        """Put tissue or fluid in place of lung where there is lung, and mask what shows of it."""
        held = np.clip(thickness, 0, self.lung() - self.opacity)
        self.opacity = self.opacity + held
        self.add_mask(label, self.view.full(held) > visible)

    def add_mask(self, label: str, mask: np.ndarray, grow: int = 0) -> None:
        """Add image-size bool pixels to a label's mask, widened by `grow` pixels."""
        if grow:
            mask = binary_dilation(mask, iterations=grow)
        self.masks[label] = self.masks[label] | mask if label in self.masks else mask


def blank_canvas(anatomy: Anatomy) -> Canvas:
    """A canvas without findings: the pleural spaces with heart, vessels and spine taken out."""
    view = anatomy.view
    taken = np.maximum(anatomy.heart(), anatomy.great_vessels()) + anatomy.spine_space()
    spaces = {side: anatomy.lung(side) for side in (RIGHT, LEFT)}
    whole = spaces[RIGHT] + spaces[LEFT]
    left_over = np.maximum(whole - taken, 0) / np.maximum(whole, 1e-3)
    half = whole.shape
    return Canvas(
        anatomy=anatomy,
        spaces={side: space * left_over for side, space in spaces.items()},
        opacity=np.zeros(half, np.float32),
        air=np.zeros(half, np.float32),
        soft=np.zeros((view.rows, view.columns), np.float32),
        bone=np.zeros((view.rows, view.columns), np.float32),
        metal=np.zeros((view.rows, view.columns), np.float32),
        vessel_gain=np.ones(half, np.float32),
    )
