"""The plan of a cohort: frequencies, correlations, courses, split, determinism."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mlx_cxr.core.labels import LABELS, check_raw_labels
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.cohort import SPLIT, plan_cohort
from mlx_cxr.synthetic.devices import BYSTANDERS
from mlx_cxr.synthetic.disease import VISIBLE_FROM, Episode
from mlx_cxr.synthetic.labeler import labels_of

# Lowest and highest share of studies labelled 1; MIMIC-CXR's own in the comment where it lies outside.
BOUNDS = {
    "Atelectasis": (0.13, 0.24),
    "Cardiomegaly": (0.13, 0.24),
    "Consolidation": (0.035, 0.09),
    "Edema": (0.08, 0.17),
    "Enlarged Cardiomediastinum": (0.04, 0.11),  # 0.03
    "Fracture": (0.04, 0.10),  # 0.02
    "Lung Lesion": (0.04, 0.11),  # 0.028
    "Lung Opacity": (0.12, 0.25),
    "No Finding": (0.24, 0.38),
    "Pleural Effusion": (0.15, 0.27),
    "Pleural Other": (0.04, 0.10),  # 0.009
    "Pneumonia": (0.05, 0.11),
    "Pneumothorax": (0.04, 0.10),
    "Support Devices": (0.21, 0.34),
}


@pytest.fixture(scope="module")
def cohort():
    return plan_cohort(600, 0)


@pytest.fixture(scope="module")
def raw(cohort):
    return np.array([study.chexpert for study in cohort.studies])


def drawn(cohort, label):
    if label == "Support Devices":
        return np.array(
            [
                any(n not in BYSTANDERS for n in s.findings[label].kind.split("|")) if label in s.findings else False
                for s in cohort.studies
            ]
        )
    return np.array([label in study.findings for study in cohort.studies])


def test_size_and_views(cohort):
    studies = Counter(study.patient.subject_id for study in cohort.studies)
    assert len(studies) == 600
    assert sum(count > 1 for count in studies.values()) > 200
    positions = Counter(image.view_position for study in cohort.studies for image in study.images)
    assert set(positions) == {"AP", "PA", "LATERAL", "LL", ""}
    assert 0.02 < positions[""] / positions.total() < 0.06
    assert sum(positions[k] for k in ("AP", "PA")) > 1000


def test_label_frequencies_are_near_mimics(raw):
    share = dict(zip(LABELS, (raw == 1).mean(axis=0), strict=True))
    assert {
        label: round(value, 3) for label, value in share.items() if not BOUNDS[label][0] < value < BOUNDS[label][1]
    } == {}
    check_raw_labels(raw)
    assert not (raw[:, LABELS.index("No Finding")] == 0).any()
    for label in ("Pneumothorax", "Pleural Effusion", "Edema", "Pneumonia"):
        assert (raw[:, LABELS.index(label)] == 0).mean() > 0.05, label


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("Pleural Effusion", "Atelectasis"),
        ("Edema", "Cardiomegaly"),
        ("Edema", "Pleural Effusion"),
        ("Consolidation", "Pneumonia"),
        ("Fracture", "Pneumothorax"),
        ("Pneumothorax", "Support Devices"),
        ("Lung Lesion", "Pleural Effusion"),
    ],
)
def test_findings_come_together_as_in_life(cohort, given, then):
    a, b = drawn(cohort, given), drawn(cohort, then)
    assert b[a].mean() > 1.25 * b.mean()


def test_consolidation_and_pneumonia_are_reported_as_opacity(raw):
    column = LABELS.index
    airspace = (raw[:, column("Consolidation")] == 1) | (raw[:, column("Pneumonia")] == 1)
    assert (raw[airspace, column("Lung Opacity")] == 1).mean() > 2 * (
        raw[~airspace, column("Lung Opacity")] == 1
    ).mean()


def test_drains_mark_pneumothoraces_and_devices_the_bedside(cohort):
    drains = [
        study for study in cohort.studies if "chest tube" in getattr(study.findings.get("Support Devices"), "kind", "")
    ]
    assert np.mean(["Pneumothorax" in study.findings for study in drains]) > 0.6
    assert all(
        s.findings["Support Devices"].side == s.findings["Pneumothorax"].side
        for s in drains
        if "Pneumothorax" in s.findings
    )
    devices, bedside = drawn(cohort, "Support Devices"), np.array([study.bedside for study in cohort.studies])
    assert devices[bedside].mean() > 1.8 * devices[~bedside].mean()
    assert all(image.kind == "AP" for study in cohort.studies if study.bedside for image in study.images)


def test_labels_are_the_reports_but_for_the_labelers_errors(cohort, raw):
    said = np.array([labels_of(study.report.mentions) for study in cohort.studies])
    other = np.array([study.negbio for study in cohort.studies])
    for labels in (raw, other):
        wrong = ~((labels == said) | (np.isnan(labels) & np.isnan(said)))
        assert 0.002 < wrong.mean() < 0.03
        errors = dict(zip(LABELS, wrong.mean(axis=0), strict=True))
        assert errors["No Finding"] > errors["Pneumothorax"]
    differ = ~((raw == other) | (np.isnan(raw) & np.isnan(other)))
    assert 0.002 < differ.mean() < 0.05


def test_positive_labels_are_mostly_true(cohort, raw):
    for label in LABELS:
        if label in ("No Finding", "Lung Opacity"):
            continue
        positive = raw[:, LABELS.index(label)] == 1
        assert drawn(cohort, label)[positive].mean() > 0.75, label


def test_split_is_by_patient_and_gives_each_label_its_share(cohort, raw):
    assert set(cohort.split) == {study.patient.subject_id for study in cohort.studies}
    part = np.array([cohort.split[study.patient.subject_id] for study in cohort.studies])
    for name, share in SPLIT.items():
        assert abs(np.mean([v == name for v in cohort.split.values()]) - share) < 0.09
        for column, label in enumerate(LABELS):
            positive = raw[:, column] == 1
            assert abs((part[positive] == name).mean() - share) < 0.08, (name, label)
            assert positive[part == name].sum() >= 5, (name, label)


def test_findings_keep_their_place_and_change_in_degree(cohort):
    history: dict[int, list] = {}
    for study in cohort.studies:
        history.setdefault(study.patient.subject_id, []).append(study)
    changes = Counter()
    for studies in history.values():
        assert [s.when for s in studies] == sorted(s.when for s in studies)
        assert len({s.study_id for s in studies}) == len(studies)
        for one, two in pairwise(studies):
            for label in set(one.findings) | set(two.findings):
                if label == "Support Devices":
                    continue
                if label not in two.findings:
                    changes["gone"] += 1
                elif label not in one.findings:
                    changes["new"] += 1
                else:
                    a, b = one.findings[label], two.findings[label]
                    changes["worse" if b.severity > a.severity else "better"] += 1
                    changes["same place"] += (a.side, a.kind, a.seed) == (b.side, b.kind, b.seed)
    assert min(changes[k] for k in ("gone", "new", "worse", "better")) > 25
    assert changes["same place"] > 0.9 * (changes["worse"] + changes["better"])


def test_courses():
    finding = Finding("Edema", 0.8, seed=7)
    assert [Episode(finding, 1, "passing").severity(k) for k in range(4)] == [0, 0.8, 0, 0]
    fading = [Episode(finding, 0, "fading").severity(k) for k in range(6)]
    assert fading[:3] == pytest.approx([0.8, 0.8 * 0.66, 0.8 * 0.66**2])
    assert fading[-1] == 0
    growing = [Episode(finding, 0, "growing").severity(k) for k in range(3)]
    assert growing == pytest.approx([0.48, 0.68, 0.8])
    assert all(0.7 < Episode(finding, 0, "stable").severity(k) < 0.9 for k in range(6))
    assert Episode(Finding("Edema", VISIBLE_FROM / 2), 0, "stable").severity(0) == 0


def test_ids_look_like_mimics_and_are_unique(cohort):
    assert all(10_000_000 <= s.patient.subject_id < 20_000_000 for s in cohort.studies)
    numbers = [s.study_id for s in cohort.studies]
    assert len(set(numbers)) == len(numbers)
    assert all(50_000_000 <= n < 60_000_000 for n in numbers)
    images = [f.dicom_id for s in cohort.studies for f in s.images]
    assert len(set(images)) == len(images)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", name) for name in images)


def test_a_seed_fixes_the_cohort_and_a_larger_one_begins_with_it():
    small, again, other, large = plan_cohort(12, 5), plan_cohort(12, 5), plan_cohort(12, 6), plan_cohort(20, 5)
    assert [s.report.text for s in small.studies] == [s.report.text for s in again.studies]
    assert small.split == again.split
    assert [s.report.text for s in small.studies] != [s.report.text for s in other.studies]
    count = len(small.studies)
    assert [s.report.text for s in large.studies[:count]] == [s.report.text for s in small.studies]
    assert [s.images for s in large.studies[:count]] == [s.images for s in small.studies]
