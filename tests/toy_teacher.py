"""A cohort of short reports and small images, a tiny base for it, and a teacher trained on it: all in seconds.

Reports name oedema and heart size, and two labels follow them; a bright square in the image goes with oedema. A marker
word stands in each split's reports, to find out who has read them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
import pytest
import yaml
from made_once import made_once
from mlx.utils import tree_flatten
from PIL import Image

from mlx_cxr import build_manifest, lfm_finetune, make_tiny_teacher, prepare_images
from mlx_cxr.core.config import Config, load_config
from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.core.files import read_json, write_json
from mlx_cxr.core.labels import label_index
from mlx_cxr.models.hub import MADE_HERE
from mlx_cxr.models.weight_files import write_safetensors
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.prompt import Prompt, PromptFormat

SPLITS = ["train"] * 64 + ["validate"] * 24 + ["test"] * 16
WITHOUT_REPORT = (3, 70)
"""Numbers of a training and a validation study that have an image and no report."""
MARKERS = {"train": "xenolith", "validate": "quixotry", "test": "zymurgy"}
EDEMA, HEART = label_index("Edema"), label_index("Cardiomegaly")


def toy_reports() -> tuple[list[dict[str, str]], np.ndarray]:
    """Sections of each study's report, and float32 (N, 2): oedema, large heart."""
    rng = np.random.default_rng(0)
    facts = rng.integers(0, 2, (len(SPLITS), 2)).astype(np.float32)
    # Both classes everywhere, also in the smallest split.
    facts[::4, 0], facts[1::4, 0] = 0, 1
    reports = []
    for (edema, heart), split in zip(facts, SPLITS, strict=True):
        sentences = [
            "Edema. Edema. Edema. Edema." if edema else "Clear. Clear. Clear. Clear.",
            "Cardiomegaly. Cardiomegaly. Cardiomegaly." if heart else "Normal. Normal. Normal.",
        ]
        findings = " ".join(sentences[i] for i in rng.permutation(2))
        impression = "Edema." if edema else "No acute process."
        indication = f"Sign of {MARKERS[split]}."
        reports.append({"indication": indication, "findings": findings, "impression": impression})
    return reports, facts


def make_cohort(folder: Path) -> Path:
    """`trial.yaml`, images, their table, manifest, reports and pixel store, and the tiny base in `tiny`."""
    reports, facts = toy_reports()
    images = np.random.default_rng(1).integers(60, 140, (len(SPLITS), 64, 64)).astype(np.uint8)
    (folder / "films").mkdir(parents=True)
    rows = []
    for i, (image, split) in enumerate(zip(images, SPLITS, strict=True)):
        image[20:44, 4:28] = 230 if facts[i, 0] else 20
        Image.fromarray(image).save(folder / "films" / f"film{i:03}.png")
        texts = dict.fromkeys(reports[i], "") if i in WITHOUT_REPORT else reports[i]
        labels = {"Edema": facts[i, 0], "Cardiomegaly": facts[i, 1]}
        names = {"patient_id": f"p{i:03}", "study_id": f"s{i:03}", "image_file": f"film{i:03}.png", "split": split}
        rows.append(names | labels | texts)
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    plain = {
        "name": "trial",
        "outputs": str(folder / "outputs"),
        "weights_dir": str(folder / "weights"),
        "data": {
            "source": "csv",
            "synthetic": True,
            "root": str(folder / "films"),
            "work_dir": str(folder / "made"),
            "views": None,
            "csv": {
                "table": str(folder / "table.csv"),
                "split": "split",
                "sections": {name: name for name in reports[0]},
            },
        },
        "pixels": {"size": 64, "workers": 1},
        "evaluation": {"bootstrap_samples": 10},
        "teacher": {
            "base": str(folder / "tiny"),
            "run_name": "teacher",
            "max_tokens": 320,
            "image_size": 64,
            "batch_size": 6,
            "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.1},
            "training": {
                **{"epochs": 10, "batch_size": 2, "accumulate": 2, "learning_rate": 4e-3},
                **{"save_every": 2, "log_every": 1},
            },
            "tiny": {"hidden_size": 64, "layers": 2, "vocabulary": 1000, "epochs": 20, "learning_rate": 1e-2},
        },
    }
    (folder / "trial.yaml").write_text(yaml.safe_dump(plain))
    config = load_config(folder / "trial.yaml")
    build_manifest.run(config)
    prepare_images.run(config)
    make_tiny_teacher.run(config)
    return folder


def copied_base(folder: Path, base: Path, *left_out: str) -> Path:
    """A copy of a checkpoint, as one puts it there by hand: without its record and some of its files."""
    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MADE_HERE))
    for name in left_out:
        (folder / name).unlink()
    return folder


def quantized_copy(folder: Path, base: Path, bits: int) -> Path:
    """A copy of a checkpoint whose language model is quantized, written as mlx-vlm's converter writes it."""
    from mlx_vlm import load

    copied_base(folder, base)
    model, _ = load(str(base), lazy=True)
    nn.quantize(model.language_model, group_size=64, bits=bits)
    write_safetensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())), {"format": "mlx"})
    chosen = {"group_size": 64, "bits": bits, "mode": "affine"}
    write_json(folder / "config.json", {**read_json(base / "config.json"), "quantization": chosen})
    return folder


def opened(folder: Path, vision: bool = False, **settings: Any) -> Base:
    """A fresh base."""
    return Base.open(TeacherConfig(base=str(folder), **settings), folder, vision=vision)


def prompts_of(form: PromptFormat, texts: Sequence[str], section: str = "findings") -> list[Prompt]:
    """A prompt for each text."""
    return [form.prompt([(section, text)]) for text in texts]


def perturbed_adapters(model: nn.Module, seed: int = 0, size: float = 0.05) -> None:
    """Give every B random values in the place of 0, so that the adapters do something."""
    rng = np.random.default_rng(seed)
    weights = [
        (name, mx.array(rng.normal(0, size, value.shape).astype(np.float32)))
        for name, value in tree_flatten(model.trainable_parameters())
        if name.endswith("lora_b")
    ]
    model.load_weights(weights, strict=False)
    mx.eval(model.parameters())


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Every array by name, bfloat16 as float32."""
    return {
        name: np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
        for name, value in tree_flatten(model.parameters())
    }


@dataclass(frozen=True)
class ToyTeacher:
    """The cohort's folder and its parts."""

    folder: Path

    @property
    def base(self) -> Path:
        """The tiny base's folder."""
        return self.folder / "tiny"

    def config(self, *overrides: str) -> Config:
        """The cohort's configuration."""
        return load_config(self.folder / "trial.yaml", overrides)

    def tuned(self, name: str = "tuned", *overrides: str) -> Path:
        """A finished run of `lfm_finetune`; made when it is asked for the first time."""
        run_dir = self.folder / "outputs" / name
        if not (run_dir / "training.json").exists():
            lfm_finetune.run(self.config(*overrides), name, overwrite=True)
        return run_dir


_SHARED: list[ToyTeacher] = []


def shared(temporary: pytest.TempPathFactory) -> ToyTeacher:
    """The one cohort of a process; a test that changes it works on a copy, or under a run name of its own."""
    if not _SHARED:
        made, own = made_once("toy_teacher", make_cohort), temporary.mktemp("teacher") / "cohort"
        shutil.copytree(made, own)
        (own / "trial.yaml").write_text((own / "trial.yaml").read_text().replace(str(made), str(own)))
        _SHARED.append(ToyTeacher(own))
    return _SHARED[0]
