r"""MIMIC-CXR-JPG as large as it is, with nothing of it in it: what a run on the whole of it takes can be measured.

    python tests/whole_mimic.py FOLDER [IMAGES]

writes tables, reports and images: 377,110 images of 227,835 studies of 65,379 patients in the splits of MIMIC-CXR-JPG
2.0.0, or a scale model with about IMAGES images. Ids, labels and views are drawn at about the frequencies of the
original (Johnson et al., arXiv:1901.07042); the reports are synthetic, each made unlike all others. An image is a
link to one of a few JPEGs: 377,110 files of their own would take hours to write. The tree has 287,000 folders, which
take 1.2 GB and a minute.

    python -m mlx_cxr.build_manifest --config configs/mimic.yaml --set data.root=FOLDER --set data.work_dir=ELSEWHERE \
        --set data.views=null --set data.n_studies=null

then took 119 s of processor time on two cores, 85 of them in two workers, and a peak of 1.1 GB.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mlx_cxr.core.labels import LABELS
from mlx_cxr.synthetic.cohort import plan_cohort

IMAGES = 377_110
SPLITS = {
    "train": (368_960, 222_758, 64_586),
    "validate": (2_991, 1_808, 500),
    "test": (5_159, 3_269, 293),
}
"""Images, studies and patients of each split."""
VIEWS = {"AP": 0.390, "PA": 0.255, "LATERAL": 0.220, "LL": 0.093, "": 0.042}
LABEL_VALUES = {"1.0": 0.14, "0.0": 0.07, "-1.0": 0.03, "": 0.76}
LINKS = 50_000
"""Names that one file may have; ext4 allows 65,000."""


@dataclass(frozen=True)
class Studies:
    """Ids and split of each study, and how many images it has: arrays of one length."""

    patient: np.ndarray
    study: np.ndarray
    split: np.ndarray
    images: np.ndarray


def draw_studies(images: int = IMAGES, seed: int = 0) -> Studies:
    """The studies of a cohort of about so many images; as many as MIMIC has where there are as many images."""
    rng = np.random.default_rng(seed)
    patients, per_study, splits = [], [], []
    for split, counts in SPLITS.items():
        n_images, n_studies, n_patients = (max(1, round(count * images / IMAGES)) for count in counts)
        first = 0 if not patients else patients[-1][-1] + 1
        patients.append(np.repeat(first + np.arange(n_patients), _dealt(n_studies, n_patients, 1.2, rng)))
        per_study.append(_dealt(n_images, n_studies, 0.3, rng))
        splits += [split] * n_studies
    patient = np.concatenate(patients)
    ids = rng.permutation(10_000_000)
    order = rng.permutation(len(patient))  # in the source's tables the splits are mixed
    return Studies(
        (10_000_000 + ids[patient])[order].astype(str),
        (50_000_000 + rng.permutation(10_000_000)[: len(patient)]).astype(str),
        np.array(splits)[order],
        np.concatenate(per_study)[order],
    )


def write_whole_mimic(root: Path, images: int = IMAGES, with_images: bool = True, seed: int = 0) -> Studies:
    """Write the tables, `mimic-cxr-reports.zip` and, if asked for, the images under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 1))
    studies = draw_studies(images, seed)
    image = _dicom_ids(int(studies.images.sum()), rng)
    _write_tables(root, studies, image, rng)
    _write_reports(root / "mimic-cxr-reports.zip", studies)
    if with_images:
        _link_images(root, studies, image)
    return studies


def _dealt(things: int, owners: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """How many of the things each owner has, at least one; int (owners,)."""
    weights = rng.lognormal(0, spread, owners)
    return 1 + rng.multinomial(max(things - owners, 0), weights / weights.sum())


def _dicom_ids(count: int, rng: np.random.Generator) -> list[str]:
    digits = rng.bytes(20 * count).hex()
    names = (digits[start : start + 40] for start in range(0, 40 * count, 40))
    return ["-".join(name[part : part + 8] for part in range(0, 40, 8)) for name in names]


def _write_tables(root: Path, studies: Studies, image: Sequence[str], rng: np.random.Generator) -> None:
    of_image = np.repeat(np.arange(len(studies.study)), studies.images)
    view = rng.choice(list(VIEWS), len(image), p=list(VIEWS.values()))
    ids = {"dicom_id": image, "subject_id": studies.patient[of_image], "study_id": studies.study[of_image]}
    metadata = {
        **ids,
        "PerformedProcedureStepDescription": np.where(view == "AP", "CHEST (PORTABLE AP)", "CHEST (PA AND LAT)"),
        "ViewPosition": view,
        "Rows": rng.choice([2544, 3056, 2022], len(image)),
        "Columns": rng.choice([3056, 2544, 1736], len(image)),
        "StudyDate": 21_000_101 + rng.integers(0, 90, len(of_image)) * 10_000,
        "StudyTime": np.round(rng.uniform(0, 235_959, len(of_image)), 3),
        "ProcedureCodeSequence_CodeMeaning": "CHEST (PA AND LAT)",
        "ViewCodeSequence_CodeMeaning": np.where(view == "AP", "antero-posterior", "postero-anterior"),
        "PatientOrientationCodeSequence_CodeMeaning": "Erect",
    }
    labels = {"subject_id": studies.patient, "study_id": studies.study}
    labels |= {
        name: rng.choice(list(LABEL_VALUES), len(studies.study), p=list(LABEL_VALUES.values())) for name in LABELS
    }
    # The labeler says of a report in which nothing is that nothing is; a row of empty cells would be of nobody's.
    nothing = np.all([labels[name] == "" for name in LABELS], axis=0)
    labels["No Finding"] = np.where(nothing, "1.0", labels["No Finding"])
    split = {name: ids[name] for name in ("dicom_id", "study_id", "subject_id")} | {"split": studies.split[of_image]}
    for name, table in {"metadata": metadata, "split": split, "chexpert": labels}.items():
        path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
        pd.DataFrame(table).to_csv(path, index=False, compression={"method": "gzip", "compresslevel": 1})


def _write_reports(path: Path, studies: Studies) -> None:
    texts = [study.report.text for study in plan_cohort(150, 0).studies]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for place, (patient, study) in enumerate(zip(studies.patient.tolist(), studies.study.tolist(), strict=True)):
            own = f" This is film {study} of {patient}.\n"
            archive.writestr(f"files/p{patient[:2]}/p{patient}/s{study}.txt", texts[place % len(texts)] + own)


def _link_images(root: Path, studies: Studies, image: Sequence[str]) -> None:
    shade = np.linspace(20, 230, 256, dtype=np.uint8)
    files = [root / f"film{number}.jpg" for number in range(1 + len(image) // LINKS)]
    for file in files:
        Image.fromarray(np.minimum(shade[:, None], shade[None, ::-1])).save(file, quality=90)
    first = 0
    for patient, study, count in zip(
        studies.patient.tolist(), studies.study.tolist(), studies.images.tolist(), strict=True
    ):
        folder = root / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
        folder.mkdir(parents=True, exist_ok=True)
        for place in range(first, first + count):
            os.link(files[place // LINKS], folder / f"{image[place]}.jpg")
        first += count


if __name__ == "__main__":
    write_whole_mimic(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else IMAGES)
