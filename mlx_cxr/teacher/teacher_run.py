"""A trained teacher: its base with its adapter, checked against the data it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cxr.core.config import Config, config_from_plain
from mlx_cxr.core.files import RecordError, read_record, sha256_file
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import open_run
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest, check_patient_splits, load_manifest
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.data.study_reports import StudyReports, load_reports
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.dataset import Studies, read_studies
from mlx_cxr.teacher.image_embeddings import image_embeddings, image_tokens
from mlx_cxr.teacher.lora import load_adapter
from mlx_cxr.teacher.prompt import PromptFormat

ADAPTER = "adapter_weights"
RECORD = "teacher.json"


@dataclass(frozen=True)
class Material:
    """The manifest, and the reports and images that a teacher of some modality reads.

    Attributes:
        reports: None for a teacher that reads no text.
        store: None for one that looks at no images.
        store_sha256: of the store's index.
    """

    manifest: Manifest
    reports: StudyReports | None
    store: PixelStore | None
    store_sha256: str | None

    @classmethod
    def open(cls, config: Config) -> Material:
        """Open the files of `build_manifest` and `prepare_images` that `teacher.modality` needs.

        Raises:
            DataError: a file is missing, they do not belong together, or a patient is in two splits.
        """
        manifest = load_manifest(config.manifest_path).within_budget(config.labels.budget, config.seed)
        check_patient_splits(manifest.frame)
        modality = config.teacher.modality
        reports = load_reports(config.reports_path, manifest) if modality != "image" else None
        store, store_sha256 = None, None
        if modality != "text":
            store = PixelStore.open(config.pixels_path, manifest, Transform.of(config))
            store_sha256 = sha256_file(config.pixels_path.with_suffix(".json"))
        return cls(manifest, reports, store, store_sha256)

    def inputs(self, config: Config) -> dict[str, Path]:
        """Role -> file, for the record of a run that reads them."""
        files = {"manifest": config.manifest_path}
        if self.reports is not None:
            files["reports"] = config.reports_path
        if self.store is not None:
            files["pixel_index"] = config.pixels_path.with_suffix(".json")
        return files

    def studies(self, config: Config, form: PromptFormat, *splits: str) -> Studies:
        """Prompts of the studies of some splits; errors as `read_studies`."""
        reports = self.reports.sections if self.reports is not None else {}
        missing = frozenset(self.store.missing) if self.store is not None else frozenset()
        return read_studies(self.manifest, reports, config.teacher, form, splits, missing)

    def images(self, base: Base, studies: Studies, config: Config) -> np.ndarray | None:
        """Image embeddings, float16 (N, T, H), computed where the disk has none yet; None for a text teacher."""
        if self.store is None or self.store_sha256 is None:
            return None
        size, images = config.teacher.image_size, studies.frame["image_id"].tolist()
        return image_embeddings(base, self.store, self.store_sha256, images, size, config.sample_dir)


def prompt_format(base: Base, config: Config, order: Sequence[str] = LABELS) -> PromptFormat:
    """The prompt of an experiment's teacher, with its 14 lines in that order."""
    teacher = config.teacher
    tokens = image_tokens(teacher.image_size, base) if teacher.modality != "text" else 0
    return PromptFormat.of(base.tokenizer, image_tokens=tokens, max_tokens=teacher.max_tokens, order=order)


def what_it_reads(config: Config) -> str:
    """Name of a teacher's input for the head of a column: `findings`, `film`, `film + findings, impression`."""
    teacher = config.teacher
    sections = (", " if teacher.section_mode == "all" else ", else ").join(
        name.replace("_", " ") for name in teacher.sections
    )
    return {"text": sections, "image": "film", "image_text": f"film + {sections}"}[teacher.modality]


@dataclass(frozen=True)
class TrainedTeacher:
    """A run folder that `lfm_finetune` made, opened.

    Attributes:
        config: the configuration that it was trained with, with its own teacher section.
        inputs: role -> SHA-256 of the files that it was trained on.
        base: with the adapter on it, in evaluation mode.
        adapter_sha256: of the adapter's weights.
        record: `teacher.json`.
    """

    folder: Path
    config: Config
    inputs: dict[str, str]
    base: Base
    form: PromptFormat
    adapter_sha256: str
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, vision: bool = True) -> TrainedTeacher:
        """Read a run's record, its base and its adapter.

        Args:
            vision: keep the vision tower where the teacher looks at images; without it images need stored embeddings.

        Raises:
            RecordError: there is no such run, it is not a teacher's, or its training was stopped.
            ConfigError: its configuration does not fit this version.
            BaseUnavailableError: its base is not on this machine.
            AdapterError: its adapter is missing, damaged or of another base.
        """
        run = open_run(folder, "lfm_finetune", finished=True)
        config = config_from_plain(run.config, run.path)
        inputs = {role: entry["sha256"] for role, entry in run.inputs.items()}
        base = Base.open(config.teacher, config.weights_dir, vision=vision and config.teacher.modality != "text")
        load_adapter(base.model, run.folder / ADAPTER, base.identity)
        sha256 = sha256_file(run.weights)
        record = read_record(run.folder / RECORD)
        return cls(run.folder, config, inputs, base, prompt_format(base, config), sha256, record)

    @property
    def protocol(self) -> str:
        """The key of `labels.SCORING_PROTOCOLS` that treats empty labels as the training did."""
        return f"empty_{self.config.labels.empty}"

    def check(self, config: Config, material: Material) -> None:
        """Refuse to be asked about other data than it was trained for.

        Raises:
            RecordError: manifest, reports, images, labels or the synthetic flag differ; names each with both values.
        """
        now = {role: sha256_file(path) for role, path in material.inputs(self.config).items()}
        pairs = {f"{role} (SHA-256)": (self.inputs.get(role), sha256) for role, sha256 in now.items()}
        pairs["data.synthetic"] = (self.config.data.synthetic, config.data.synthetic)
        pairs["labels"] = (self.config.labels, config.labels)
        pairs["folder of manifest and reports"] = (self.config.sample_dir, config.sample_dir)
        faults = [f"{key}: the run has {a}, this is {b}" for key, (a, b) in pairs.items() if a != b]
        if faults:
            raise RecordError(
                f"{self.folder} was trained for something else:\n  " + "\n  ".join(faults) + "\n"
                "use the configuration and manifest that it was trained with, or train again under another --run_name"
            )

    def header(self, material: Material) -> dict[str, Any]:
        """All that its answers depend on, for the header of a cache of them."""
        teacher = self.config.teacher
        return {
            "run": self.folder.name,
            "base": self.base.identity,
            "precision": self.base.precision,
            "adapter": self.adapter_sha256,
            "prompt": self.form.sha256(),
            "text": {
                "modality": teacher.modality,
                "sections": list(teacher.sections) if teacher.modality != "image" else [],
                "section_mode": teacher.section_mode,
                "max_tokens": teacher.max_tokens,
                "image_size": teacher.image_size if teacher.modality != "text" else None,
            },
            "manifest": material.manifest.sha256,
            "reports": material.reports.sha256 if material.reports is not None else None,
            "pixels": material.store_sha256,
            "labels": self.config.labels.model_dump(mode="json"),
        }
