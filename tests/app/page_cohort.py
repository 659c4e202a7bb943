"""A small cohort with everything the page shows: CNN, student, teacher, comparison and failure analysis.

Two findings are drawn and labelled, oedema and a large heart, so that a model of random features with a fitted last
layer makes calls on them. Reports and teacher are those of `toy_teacher`.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import toy_teacher
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mlx_cxr import (
    cache_teacher_outputs,
    compare_models,
    distillation,
    evaluate_cnn,
    failure_analysis,
    lfm_finetune,
    prepare_images,
    train_cnn,
)
from mlx_cxr.core.config import Config, load_config
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.models.convert import load_model, save_model
from mlx_cxr.models.resnet import preprocess
from mlx_cxr.synthetic.anatomy import sample_patient
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.image import render_image

PATIENTS = 8
OVERRIDES = (
    "run_name=cnn",
    "distillation.run_name=student",
    "distillation.init=cnn",
    "distillation.learning_rate=1e-6",
    "model.weights=scratch",
    "model.output_stride=16",
    "training.epochs=1",
    "training.batch_size=16",
    "evaluation.bootstrap_samples=40",
    "evaluation.batch_size=16",
    "explain.labels=[Edema, Cardiomegaly]",
    "explain.examples_per_outcome=1",
    "failure.examples=2",
)


def page_config(folder: Path) -> Config:
    """The configuration that the runs of a cohort were made with."""
    return load_config(folder / "trial.yaml", OVERRIDES)


def make_page_cohort(folder: Path) -> None:
    """All runs in `folder/outputs`."""
    toy_teacher.make_cohort(folder)
    config = page_config(folder)
    _draw_images(folder)
    config.pixels_path.unlink()
    prepare_images.run(config)
    train_cnn.run(config)
    _fit_head(config)
    evaluate_cnn.run(config)
    lfm_finetune.run(config)
    cache_teacher_outputs.run(config)
    distillation.run(config)
    evaluate_cnn.run(config, config.distillation.run_name)
    compare_models.run(config)
    failure_analysis.run(config)


def chest(patient: int, edema: bool, heart: bool) -> np.ndarray:
    """uint8 (96, 116): a drawn chest, the same for the same arguments."""
    findings = {"Edema": Finding("Edema", 0.95, 0, "", 5)} if edema else {}
    findings |= {"Cardiomegaly": Finding("Cardiomegaly", 0.95, 0, "", 5)} if heart else {}
    person = sample_patient(10_000_000 + patient, np.random.default_rng(patient), patient)
    return render_image(person, findings, "PA", 96, patient).pixels


def _draw_images(folder: Path) -> None:
    """Chests in the place of the toy's squares: the quality gate would refuse those."""
    facts, rng, drawn = toy_teacher.toy_reports()[1].astype(bool), np.random.default_rng(2), {}
    for i, (edema, heart) in enumerate(facts.tolist()):
        key = i % PATIENTS, edema, heart
        if key not in drawn:
            drawn[key] = chest(*key)
        noisy = drawn[key] * rng.uniform(0.9, 1.0) + rng.normal(0, 3, drawn[key].shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "films" / f"film{i:03}.png")


def _fit_head(config: Config) -> None:
    """Have the trained network's last layer tell the two findings apart."""
    path = config.run_dir() / "best_model.safetensors"
    manifest, model = load_manifest(config.manifest_path), load_model(path)
    rows = np.flatnonzero(manifest.frame["split"] == "train")
    images = mx.array(np.load(config.pixels_path, allow_pickle=False)[rows])
    pooled = np.array(mx.mean(model.features(preprocess(images, model.config.in_channels)), axis=(1, 2)))
    weight, bias, scale = np.array(model.fc.weight), np.array(model.fc.bias), pooled.std()
    for k in (toy_teacher.EDEMA, toy_teacher.HEART):
        fit = LogisticRegression(C=0.1).fit(pooled / scale, manifest.raw_labels[rows, k])
        weight[k], bias[k] = fit.coef_[0] / scale, fit.intercept_[0]
    model.load_weights([("fc.weight", mx.array(weight)), ("fc.bias", mx.array(bias))], strict=False)
    save_model(path, model)
