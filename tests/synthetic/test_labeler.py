"""The two readings between image and label: radiologist and labeler."""

import numpy as np

from mlx_cxr.core.labels import LABELS
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.labeler import Reader, labels_of, merge, read_study, spoil

FAULTLESS = Reader(missed=0, hedged=0, suspected=0)


def test_mentions_merge_as_chexpert_does():
    assert merge([{"Edema": 0}, {"Edema": -1}]) == {"Edema": -1}
    assert merge([{"Edema": 1}, {"Edema": -1, "Fracture": 0}]) == {"Edema": 1, "Fracture": 0}


def test_no_finding_means_nothing_but_devices():
    none = LABELS.index("No Finding")
    assert labels_of({})[none] == 1
    assert labels_of({"Support Devices": 1, "Pneumonia": 0})[none] == 1
    assert np.isnan(labels_of({"Edema": -1})[none])
    assert np.isnan(labels_of({"Fracture": 1})[none])
    row = labels_of({"Edema": -1, "Fracture": 0, "Cardiomegaly": 1})
    assert [row[LABELS.index(name)] for name in ("Edema", "Fracture", "Cardiomegaly")] == [-1, 0, 1]
    assert np.isnan(row).sum() == 11


def test_a_faultless_reader_states_all_with_the_change():
    before = {
        "Edema": Finding("Edema", 0.8),
        "Fracture": Finding("Fracture", 0.6, 1),
        "Pneumonia": Finding("Pneumonia", 0.4, 1),
    }
    now = {
        "Edema": Finding("Edema", 0.4),
        "Fracture": Finding("Fracture", 0.61, 1),
        "Cardiomegaly": Finding("Cardiomegaly", 0.5),
    }
    seen = {item.finding.label: item for item in read_study(now, before, FAULTLESS, np.random.default_rng(0))}
    assert {label: (item.value, item.change) for label, item in seen.items() if item.value} == {
        "Edema": (1, "better"),
        "Fracture": (1, "stable"),
        "Cardiomegaly": (1, "new"),
    }
    first = read_study(now, None, FAULTLESS, np.random.default_rng(0))
    assert {item.change for item in first} == {"first"}


def test_leads_and_wires_are_no_support_devices():
    wires = {"Support Devices": Finding("Support Devices", 1.0, 0, "median sternotomy wires|ECG leads")}
    assert read_study(wires, None, FAULTLESS, np.random.default_rng(0)) == []
    tube = {"Support Devices": Finding("Support Devices", 1.0, 0, "ECG leads|endotracheal tube")}
    assert len(read_study(tube, None, FAULTLESS, np.random.default_rng(0))) == 1


def test_subtle_findings_are_missed_and_hedged_more():
    rng = np.random.default_rng(2)
    reader = Reader(missed=0.6, hedged=0.5, suspected=0)

    def rates(severity):
        read = [read_study({"Edema": Finding("Edema", severity)}, None, reader, rng) for _ in range(4000)]
        stated = [item[0].value for item in read if item]
        return 1 - len(stated) / len(read), np.mean(np.array(stated) == -1)

    missed, hedged = rates(0.25)
    assert abs(missed - 0.6 * 0.5) < 0.03
    assert abs(hedged - 0.5 * 0.9**1.5) < 0.04
    clear_missed, clear_hedged = rates(0.95)
    assert clear_missed == 0
    assert clear_hedged < 0.07


def test_labeler_errors_have_the_rate_they_are_given():
    rng = np.random.default_rng(3)
    error = dict.fromkeys(LABELS, 0.10)
    share = dict.fromkeys(LABELS, 0.25)
    column = LABELS.index("Edema")
    present, empty = np.full(len(LABELS), np.nan), np.full(len(LABELS), np.nan)
    present[column] = 1
    lost = np.mean([spoil(present, error, share, rng)[column] != 1 for _ in range(4000)])
    made = np.mean([spoil(empty, error, share, rng)[column] == 1 for _ in range(4000)])
    assert abs(lost - 0.10) < 0.015
    # Invented positives are as many as lost ones: 0.1 * 0.25 / 0.75 of those without.
    assert abs(made - 0.0333) < 0.009


def test_errors_never_put_no_finding_beside_a_finding():
    rng = np.random.default_rng(4)
    error, share = dict.fromkeys(LABELS, 0.3), dict.fromkeys(LABELS, 0.3)
    none = LABELS.index("No Finding")
    others = [k for k, label in enumerate(LABELS) if label not in ("No Finding", "Support Devices")]
    for _ in range(500):
        row = spoil(labels_of({}), error, share, rng)
        assert not (row[none] == 1 and np.isin(row[others], (1, -1)).any())
        assert np.isin(row[~np.isnan(row)], (-1, 0, 1)).all()
