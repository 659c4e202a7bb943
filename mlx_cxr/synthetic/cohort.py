"""The plan of a synthetic cohort: patients, studies, images, reports, labels, split. Nothing is rendered here.

Everything follows from one seed; each patient has a stream of chance of his own, so a larger cohort begins with the
patients of a smaller one. Only the split looks at the whole cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np

from mlx_cxr.synthetic.anatomy import Patient, sample_patient
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.disease import sample_history
from mlx_cxr.synthetic.geometry import Kind
from mlx_cxr.synthetic.labeler import Reader, labels_of, read_study, spoil
from mlx_cxr.synthetic.narrative import Report, write_report
from mlx_cxr.synthetic.opening import Scene

SEVERITY = (5.0, 2.0)
"""Beta distribution of a finding's worst severity, rescaled to 0.15..1: leans to moderate and marked."""

READER = Reader(missed=0.45, hedged=0.34, suspected=0.04)
"""The radiologist's errors; see `labeler.Reader`."""

LABELER_ERROR: dict[str, float] = {
    "Atelectasis": 0.03,
    "Cardiomegaly": 0.03,
    "Consolidation": 0.05,
    "Edema": 0.03,
    "Enlarged Cardiomediastinum": 0.10,
    "Fracture": 0.05,
    "Lung Lesion": 0.06,
    "Lung Opacity": 0.05,
    "No Finding": 0.07,
    "Pleural Effusion": 0.02,
    "Pleural Other": 0.08,
    "Pneumonia": 0.06,
    "Pneumothorax": 0.03,
    "Support Devices": 0.02,
}
"""Share of each label that the labeler gets wrong, after the mention F1 of MIMIC-CXR-JPG's labelers (Effusion .97,
No Finding .54, Pleural Other .59, Enlarged Cardiomediastinum .46), softened so that a small cohort can be learned."""

LABEL_SHARE: dict[str, float] = {
    "Atelectasis": 0.20,
    "Cardiomegaly": 0.19,
    "Consolidation": 0.06,
    "Edema": 0.13,
    "Enlarged Cardiomediastinum": 0.07,
    "Fracture": 0.07,
    "Lung Lesion": 0.07,
    "Lung Opacity": 0.20,
    "No Finding": 0.32,
    "Pleural Effusion": 0.23,
    "Pleural Other": 0.06,
    "Pneumonia": 0.09,
    "Pneumothorax": 0.07,
    "Support Devices": 0.28,
}
"""Approximate frequency of each label's positives; sets how many the labeler invents. MIMIC-CXR has 2 to 5 % of
Consolidation, Pneumothorax, Enlarged Cardiomediastinum, Lung Lesion and Fracture and 0.9 % of Pleural Other; those
are raised here, or a test split of some 200 studies could not score them."""

SPLIT = {"train": 0.70, "validate": 0.13, "test": 0.17}
"""Shares of each label's positives; of patients, the smaller parts get a little more."""


@dataclass(frozen=True)
class ImagePlan:
    """One exposure to render.

    Attributes:
        dicom_id: the image's name, five groups of eight hex digits.
        kind: the projection that is rendered.
        view_position: as the metadata have it: `AP`, `PA`, `LATERAL`, `LL` or empty.
        supine: lying or half lying.
        seed: of `image.render_image`.
    """

    dicom_id: str
    kind: Kind
    view_position: str
    supine: bool
    seed: int


@dataclass(frozen=True)
class StudyPlan:
    """One study.

    Attributes:
        study_id: 8 digits.
        when: date and time, shifted into the future as MIMIC's are.
        findings: those truly there, by label.
        images: the exposures.
        bedside: made in bed.
        procedure: the metadata's PerformedProcedureStepDescription.
        report: text and what it mentions.
        chexpert: (14,) labels of one labeler, 1 / 0 / -1 / NaN.
        negbio: (14,) labels of the other.
    """

    patient: Patient
    study_id: int
    when: datetime
    findings: Mapping[str, Finding]
    images: tuple[ImagePlan, ...]
    bedside: bool
    procedure: str
    report: Report
    chexpert: np.ndarray
    negbio: np.ndarray


@dataclass(frozen=True)
class Cohort:
    """All studies in order of patient and date, and each patient's split."""

    studies: tuple[StudyPlan, ...]
    split: Mapping[int, str]

    def frontal(self) -> Cohort:
        """The same without the exposures from the side."""

        def without(study: StudyPlan) -> StudyPlan:
            return replace(study, images=tuple(plan for plan in study.images if plan.kind != "LATERAL"))

        return replace(self, studies=tuple(map(without, self.studies)))


def plan_cohort(patients: int, seed: int) -> Cohort:
    """Draw a cohort of so many patients; `seed` fixes everything."""
    rng = np.random.default_rng((seed, 1))
    ids: dict[int, None] = {}
    while len(ids) < patients:
        ids[int(rng.integers(10_000_000, 20_000_000))] = None
    studies: list[StudyPlan] = []
    for number, subject_id in enumerate(ids):
        studies.extend(_patient_studies(subject_id, number, seed))
    return Cohort(tuple(studies), _split(studies, np.random.default_rng((seed, 2))))


def _patient_studies(subject_id: int, number: int, seed: int) -> list[StudyPlan]:
    rng = np.random.default_rng((seed, 3, number))
    patient = sample_patient(subject_id, rng, int(rng.integers(2**31)))
    history = sample_history(patient, SEVERITY, rng)
    when = datetime(2110, 1, 1) + timedelta(minutes=int(rng.integers(90 * 365 * 24 * 60)))
    studies: list[StudyPlan] = []
    before = None
    for visit in range(history.studies):
        findings = history.at(visit)
        bedside = bool(rng.random() < history.bedside_share())
        # A factor coprime to the range makes this a permutation: numbers look drawn and never meet.
        study_id = 50_000_000 + (number * 10 + visit) * 6_180_339 % 10_000_000
        images, views, procedure = _images(bedside, rng)
        seen = read_study(findings, before, READER, rng)
        scene = Scene(patient.sex, views, before is not None, _reasons(history.conditions, bedside))
        report = write_report(seen, scene, rng)
        # Both labelers read the same report, each with errors of its own.
        chexpert, negbio = (spoil(labels_of(report.mentions), LABELER_ERROR, LABEL_SHARE, rng) for _ in range(2))
        about = (patient, study_id, when, findings, images, bedside, procedure, report)
        studies.append(StudyPlan(*about, chexpert=chexpert, negbio=negbio))
        before = findings
        days = rng.exponential(2.5) + 0.2 if bedside else rng.exponential(150) + 2
        when += timedelta(minutes=int(days * 24 * 60))
    return studies


def _images(bedside: bool, rng: np.random.Generator) -> tuple[tuple[ImagePlan, ...], str, str]:
    """The exposures of a study, the report's words for them, and the procedure's name."""
    if bedside:
        kinds: list[Kind] = ["AP"] * (2 if rng.random() < 0.08 else 1)
        views, procedure = "portable AP", "CHEST (PORTABLE AP)"
    else:
        draw = rng.random()
        if draw < 0.62:
            kinds, views, procedure = ["PA", "LATERAL"], "PA and lateral", "CHEST (PA AND LAT)"
        elif draw < 0.74:
            kinds, views, procedure = ["AP", "LATERAL"], "AP and lateral", "CHEST (AP AND LAT)"
        elif draw < 0.86:
            kinds, views, procedure = ["AP"], "AP", "CHEST (SINGLE VIEW)"
        else:
            kinds, views, procedure = ["PA"], "PA", "CHEST (SINGLE VIEW)"
    supine = bedside and bool(rng.random() < 0.85)
    images = []
    for kind in kinds:
        position = ("LL" if rng.random() < 0.3 else "LATERAL") if kind == "LATERAL" else str(kind)
        if rng.random() < 0.04:
            position = ""
        name = rng.bytes(20).hex()
        dicom = "-".join(name[i : i + 8] for i in range(0, 40, 8))
        images.append(ImagePlan(dicom, kind, position, supine, int(rng.integers(2**31))))
    return tuple(images), views, procedure


_REASONS: dict[str, str] = {
    "heart failure": "CHF, shortness of breath|dyspnea on exertion|leg swelling and dyspnea|CHF exacerbation|hypoxia",
    "pneumonia": "cough and fever|productive cough|fever, leukocytosis|hypoxia and cough|shortness of breath",
    "intensive care": "respiratory failure, intubated|s/p CABG|sepsis|hypoxia|s/p surgery|line placement|"
    "altered mental status",
    "trauma": "s/p fall|MVC, chest pain|rib pain after fall|trauma",
    "cancer": "lung cancer|weight loss|metastatic cancer|cough, smoker|known malignancy",
    "pleural disease": "asbestos exposure|chronic dyspnea|cough|follow up",
    "pneumothorax": "acute chest pain|pleuritic chest pain|s/p biopsy|dyspnea",
    "wide mediastinum": "chest pain|chest pain radiating to back|hypertension|lymphoma",
    "long-term device": "s/p pacemaker|chest pain|device check|weakness",
}
"""Reasons of the referrer by condition, separated by `|`."""
_COMMON = (
    *("cough", "chest pain", "shortness of breath", "fever", "pre-op evaluation"),
    *("dizziness", "syncope", "weakness", "positive PPD", "abdominal pain"),
)


def _reasons(conditions: tuple[str, ...], bedside: bool) -> tuple[str, ...]:
    own = tuple(reason for name in conditions if name in _REASONS for reason in _REASONS[name].split("|"))
    return own + _COMMON[: 3 if own else len(_COMMON)] + (("interval change", "ICU patient") if bedside else ())


def _split(studies: list[StudyPlan], rng: np.random.Generator) -> dict[int, str]:
    """A split by patient with about the same label frequencies in each part.

    Iterative stratification (Sechidis et al., ECML PKDD 2011): from the rarest label on, each patient who has it goes
    to the part that lacks most of it.
    """
    patients: dict[int, np.ndarray] = {}
    for study in studies:
        row = np.concatenate([study.chexpert == 1, [False]]).astype(float)
        patients[study.patient.subject_id] = patients.get(study.patient.subject_id, 0.0) + row
    for counts in patients.values():
        # The last column counts patients, for those without any label.
        counts[-1] = 1.0
    shares = np.array(list(SPLIT.values()))
    wanted = shares[:, None] * np.sum(list(patients.values()), axis=0)
    order = [list(patients)[i] for i in rng.permutation(len(patients))]
    part: dict[int, str] = {}
    for column in np.argsort(np.sum(list(patients.values()), axis=0), kind="stable"):
        # Those with many such studies first, while every part still has room for them.
        for subject in sorted(order, key=lambda s: -patients[s][column]):
            if subject in part or not patients[subject][column]:
                continue
            chosen = int(np.argmax(wanted[:, column] + 1e-6 * wanted[:, -1]))
            wanted[chosen] -= patients[subject]
            part[subject] = list(SPLIT)[chosen]
    return part
