"""A handful of studies in the layout of MIMIC-CXR-JPG, for tests: tables, empty image files and reports."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path

from mlx_cxr.core.labels import LABELS


@dataclass
class Study:
    """One study; `labels` maps a label to the text of its cell, the others are empty; None leaves the row out."""

    patient: str
    study: str
    views: list[str] = field(default_factory=lambda: ["PA"])
    split: str = "train"
    labels: dict[str, str] | None = field(default_factory=dict)
    report: str | None = None

    def images(self) -> list[str]:
        return [f"{self.study}-{place}" for place in range(len(self.views))]

    def folder(self) -> str:
        return f"files/p{self.patient[:2]}/p{self.patient}/s{self.study}"


def write_tree(root: Path, studies: list[Study], version: str = "2.0.0", packed: bool = True) -> Path:
    """Write tables, images (empty files) and reports under `root`, and return it."""
    metadata = ["dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate"]
    split = ["dicom_id,study_id,subject_id,split"]
    labels = ["subject_id,study_id," + ",".join(LABELS)]
    for study in studies:
        for image, view in zip(study.images(), study.views, strict=True):
            metadata.append(f"{image},{study.patient},{study.study},CHEST,{view},3056,2544,21800506")
            split.append(f"{image},{study.study},{study.patient},{study.split}")
            radiograph = root / study.folder() / f"{image}.jpg"
            radiograph.parent.mkdir(parents=True, exist_ok=True)
            radiograph.touch()
        if study.labels is not None:
            cells = ",".join(study.labels.get(name, "") for name in LABELS)
            labels.append(f"{study.patient},{study.study},{cells}")
        if study.report is not None:
            (root / f"{study.folder()}.txt").write_text(study.report, encoding="utf-8")
    for name, lines in (("metadata", metadata), ("split", split), ("chexpert", labels)):
        write_table(root / f"mimic-cxr-{version}-{name}.csv{'.gz' if packed else ''}", lines)
    return root


def write_table(path: Path, lines: list[str]) -> Path:
    """Write lines as a table, gzipped where the name says so."""
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_lines(path: Path) -> list[str]:
    """The lines of a table that `write_table` wrote."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
