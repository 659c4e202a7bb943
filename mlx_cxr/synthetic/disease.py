"""Histories of illness: conditions of a patient, the findings they bring, and their courses over studies.

Findings are not drawn independently: a patient has conditions (heart failure, pneumonia, a stay in intensive care,
trauma, cancer, …), each of which brings its findings and devices with a probability. So effusion comes with
atelectasis, oedema with a large heart, a pneumothorax with broken ribs and a drain, and devices with the bedside.
The probabilities are set so that label frequencies come near those of MIMIC-CXR (Johnson et al., arXiv:1901.07042),
save that the rare labels are raised, or the demo's test split could not score them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlx_cxr.synthetic.anatomy import LEFT, RIGHT, Patient
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.devices import LABEL as DEVICE_LABEL
from mlx_cxr.synthetic.findings import LOBES

Course = Literal["stable", "fading", "growing", "passing"]

VISIBLE_FROM = 0.15
"""Severity under which a finding is gone."""

CONDITIONS: dict[str, float] = {
    "heart failure": 0.19,
    "pneumonia": 0.145,
    "intensive care": 0.17,
    "trauma": 0.08,
    "cancer": 0.075,
    "pleural disease": 0.065,
    "pneumothorax": 0.035,
    "wide mediastinum": 0.055,
    "collapse": 0.07,
    "large heart": 0.06,
    "opacity": 0.07,
    "long-term device": 0.06,
}
"""Share of patients with each condition; several may meet in one."""

BEDSIDE: dict[str, float] = {
    "intensive care": 0.95,
    "heart failure": 0.45,
    "trauma": 0.45,
    "pneumonia": 0.25,
    "cancer": 0.15,
}
"""Share of studies made at the bedside, by the condition that demands it most; 0.06 without any."""


@dataclass(frozen=True)
class Episode:
    """One finding's life in one patient.

    Attributes:
        finding: as it is at its worst.
        first: number of the study (from 0) in which it first shows.
        course: `stable`, `fading`, `growing`, or `passing` (gone at the next study).
    """

    finding: Finding
    first: int
    course: Course

    def severity(self, study: int) -> float:
        """Severity at a study, 0 before it begins and when it is gone."""
        age = study - self.first
        if age < 0:
            return 0.0
        peak = self.finding.severity
        # Small changes below what anyone would report keep two images of a stable finding from being the same.
        wobble = 1 + 0.04 * np.sin(1.7 * study + self.finding.seed % 7)
        factor = {
            "stable": wobble,
            "fading": 0.66**age,
            "growing": min(1.0, 0.6 + 0.25 * age),
            "passing": 1.0 if age == 0 else 0.0,
        }[self.course]
        now = float(np.clip(peak * factor, 0, 1))
        return now if now >= VISIBLE_FROM else 0.0


@dataclass(frozen=True)
class Stay:
    """One device's stay: its name and the studies (first to last, inclusive) that show it."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class History:
    """Findings and devices of a patient over all studies.

    Attributes:
        conditions: names from `CONDITIONS`.
        drain_side: side of a chest tube.
        studies: number of studies.
        device_seed: fixes each device's course through the body.
    """

    patient: Patient
    conditions: tuple[str, ...]
    episodes: tuple[Episode, ...]
    stays: tuple[Stay, ...]
    drain_side: int
    studies: int
    device_seed: int

    def at(self, study: int) -> dict[str, Finding]:
        """The findings and devices of one study, by label."""
        now: dict[str, Finding] = {}
        for episode in self.episodes:
            f = episode.finding
            severity = episode.severity(study)
            if severity and (f.label not in now or now[f.label].severity < severity):
                now[f.label] = Finding(f.label, severity, f.side, f.kind, f.seed)
        names = [stay.name for stay in self.stays if stay.first <= study <= stay.last]
        if names:
            now[DEVICE_LABEL] = Finding(DEVICE_LABEL, 1.0, self.drain_side, "|".join(names), self.device_seed)
        return now

    def bedside_share(self) -> float:
        """Share of this patient's studies that are made at the bedside."""
        return max([BEDSIDE.get(name, 0.0) for name in self.conditions], default=0.0) or 0.06


def sample_history(patient: Patient, severity: tuple[float, float], rng: np.random.Generator) -> History:
    """Conditions, findings and devices of a patient; `severity` is the Beta distribution of findings at their worst."""
    conditions = tuple(name for name, share in CONDITIONS.items() if rng.random() < share)
    studies = 1 + min(int(rng.poisson(1.15 if conditions else 0.85)), 6)
    return _HistorySampler(patient, conditions, studies, severity, rng).history()


class _HistorySampler:
    """Draws the episodes and stays of one patient, condition by condition; `_<condition>` adds those of one."""

    def __init__(
        self,
        patient: Patient,
        conditions: tuple[str, ...],
        studies: int,
        severity: tuple[float, float],
        rng: np.random.Generator,
    ) -> None:
        self.patient, self.conditions, self.studies, self.beta, self.rng = patient, conditions, studies, severity, rng
        self.episodes: list[Episode] = []
        self.stays: list[Stay] = []
        self.drain_side = 0

    def history(self) -> History:
        for name in self.conditions:
            getattr(self, "_" + name.replace(" ", "_").replace("-", "_"))()
        if not self.conditions and self.rng.random() < 0.04:
            self._wires()
        episodes, stays = tuple(self.episodes), tuple(self.stays)
        return History(self.patient, self.conditions, episodes, stays, self.drain_side, self.studies, self._seed())

    def _seed(self) -> int:
        return int(self.rng.integers(2**31))

    def _chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def _onset(self) -> int:
        """Number of the study at which something acute begins; mostly the first."""
        return 0 if self.studies == 1 or self._chance(0.6) else int(self.rng.integers(self.studies))

    def _course(self) -> Course:
        return ("fading", "stable", "growing", "passing")[int(self.rng.choice(4, p=[0.34, 0.30, 0.22, 0.14]))]  # type: ignore[return-value]

    def _side(self, both: float = 0.0) -> int:
        if self._chance(both):
            return 0
        return RIGHT if self._chance(0.55) else LEFT

    def _lobe(self, side: int) -> str:
        names = [name for name, (where, _, _) in LOBES.items() if side in (0, where)]
        weights = np.array([2.0 if "lower" in name else 1.0 for name in names])
        return str(self.rng.choice(names, p=weights / weights.sum()))

    def _add(
        self,
        label: str,
        side: int = 0,
        kind: str = "",
        first: int | None = None,
        course: Course | None = None,
        low: float = 0.0,
    ) -> Episode:
        peak = max(low, VISIBLE_FROM + (1 - VISIBLE_FROM) * float(self.rng.beta(*self.beta)))
        first = self._onset() if first is None else first
        episode = Episode(Finding(label, peak, side, kind, self._seed()), first, course or self._course())
        self.episodes.append(episode)
        return episode

    def _stay(self, name: str, first: int, length: int | None = None) -> None:
        if name not in {stay.name for stay in self.stays}:
            self.stays.append(Stay(name, first, self.studies if length is None else first + length - 1))

    def _wires(self) -> None:
        self._stay("median sternotomy wires", 0)

    def _collapse_beside(self, fluid: Episode, share: float) -> None:
        """Lung collapses next to fluid: on its side, with its course."""
        if self._chance(share):
            kind = "lobar" if self._chance(0.35) else "plate"
            self._add("Atelectasis", fluid.finding.side, kind, fluid.first, fluid.course)

    def _heart_failure(self) -> None:
        if self._chance(0.9):
            self._add("Cardiomegaly", first=0, course="stable")
        first = self._onset()
        course = self._course()
        wet = self._chance(0.78)
        if wet:
            self._add("Edema", 0, "right" if self._chance(0.12) else "", first, course)
        if self._chance(0.8 if wet else 0.45):
            fluid = self._add("Pleural Effusion", 0 if self._chance(0.7) else RIGHT, "", first, course)
            self._collapse_beside(fluid, 0.45)
        if self._chance(0.22):
            self._stay("pacemaker", 0)
        if self._chance(0.3):
            self._wires()

    def _pneumonia(self) -> None:
        side, first, course = self._side(), self._onset(), self._course()
        lobe = self._lobe(side)
        dense = self._chance(0.55)
        if dense:
            self._add("Consolidation", side, lobe, first, course)
        if self._chance(0.55 if dense else 0.85):
            self._add("Pneumonia", 0 if self._chance(0.2) else side, lobe, first, course)
        elif not dense:
            self._add("Lung Opacity", side, lobe, first, course)
        if self._chance(0.4):
            self._collapse_beside(self._add("Pleural Effusion", side, "", first, course), 0.4)

    def _intensive_care(self) -> None:
        first, length = 0, int(self.rng.integers(1, 5))
        if tube := self._chance(0.55):
            self._stay("endotracheal tube", first, length)
        if self._chance(0.85 if tube else 0.2):
            self._stay("nasogastric tube", first, length)
        lines = ("right internal jugular central venous line", "subclavian central venous line", "PICC", "")
        if line := lines[int(self.rng.choice(4, p=[0.42, 0.16, 0.22, 0.20]))]:
            self._stay(line, first if self._chance(0.75) else self._onset())
        if self._chance(0.55):
            self._stay("ECG leads", 0)
        if self._chance(0.15):
            self._wires()
        if self._chance(0.65):
            self._add("Atelectasis", self._side(0.5), "lobar" if self._chance(0.25) else "plate")
        if self._chance(0.5):
            self._collapse_beside(self._add("Pleural Effusion", self._side(0.45)), 0.35)
        if self._chance(0.22):
            self._add("Edema")
        if self._chance(0.16):
            self._air(self._side(), drained=0.75)
        if self._chance(0.18):
            side = self._side()
            self._add("Lung Opacity", side, self._lobe(side))

    def _trauma(self) -> None:
        side = self._side()
        if self._chance(0.92):
            self._add("Fracture", side, "acute" if self._chance(0.7) else "old", 0, "stable")
        if self._chance(0.33):
            self._air(side, drained=0.6)
        if self._chance(0.2):
            self._collapse_beside(self._add("Pleural Effusion", side, "", 0), 0.4)
        if self._chance(0.2):
            self._add("Lung Opacity", side, self._lobe(side), 0, "fading")

    def _air(self, side: int, drained: float) -> None:
        """A pneumothorax, and the drain that treats it."""
        air = self._add("Pneumothorax", side, "deep sulcus" if self._chance(0.25) else "")
        if self._chance(drained):
            self.drain_side = side
            self._stay("chest tube", air.first, int(self.rng.integers(1, 4)))
            if self._chance(0.35):
                self._add("Atelectasis", side, "plate", air.first)

    def _pneumothorax(self) -> None:
        self._air(self._side(), drained=0.4)

    def _cancer(self) -> None:
        side = self._side()
        many = self._chance(0.35)
        kind, course = "multiple" if many else "single", "growing" if self._chance(0.4) else "stable"
        self._add("Lung Lesion", 0 if many else side, kind, 0, course, 0.3)
        if self._chance(0.3):
            self._collapse_beside(self._add("Pleural Effusion", side), 0.45)
        if self._chance(0.4):
            self._stay("Port-A-Cath", 0)
        if self._chance(0.15):
            self._add("Enlarged Cardiomediastinum", first=0, course="stable")
        if self._chance(0.12):
            self._add("Atelectasis", side, "lobar", 0, "stable")

    def _pleural_disease(self) -> None:
        kind = ("apical cap", "thickening", "plaques")[int(self.rng.choice(3, p=[0.2, 0.5, 0.3]))]
        self._add("Pleural Other", self._side(0.35), kind, 0, "stable", 0.3)

    def _wide_mediastinum(self) -> None:
        self._add("Enlarged Cardiomediastinum", first=0, course="stable")

    def _collapse(self) -> None:
        self._add("Atelectasis", self._side(0.4), "lobar" if self._chance(0.2) else "plate")

    def _large_heart(self) -> None:
        self._add("Cardiomegaly", first=0, course="stable")
        if self._chance(0.2):
            self._wires()

    def _opacity(self) -> None:
        side = self._side()
        self._add("Lung Opacity", side, self._lobe(side))

    def _long_term_device(self) -> None:
        self._stay(("pacemaker", "Port-A-Cath", "PICC")[int(self.rng.choice(3, p=[0.55, 0.2, 0.25]))], 0)
        if self._chance(0.25):
            self._wires()
