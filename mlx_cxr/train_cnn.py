"""Train the ResNet-18 baseline: `python -m mlx_cxr.train_cnn --config configs/demo.yaml --run_name demo_cnn`.

Writes `outputs/<run>/`: `config.json` first, then `metrics.jsonl`, `best_model.safetensors`, `last/` and
`training.json` with how it ended.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlx_cxr import runtime
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
from mlx_cxr.labels import SCORING_PROTOCOLS
from mlx_cxr.models.convert import freeze, initial_model
from mlx_cxr.models.resnet import ResNet18, parameter_counts
from mlx_cxr.runs import create_run, hash_of, write_json
from mlx_cxr.training.cohort import Cohort, SplitData
from mlx_cxr.training.loop import TrainingData, train
from mlx_cxr.training.losses import masked_bce, positive_weights
from mlx_cxr.training.scoring import predict_logits

log = logging.getLogger("mlx_cxr")


def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, and return the run's folder.

    Args:
        config: the experiment; its manifest and pixel store must be there.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.
        resume: go on with a run that was stopped.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        DataError: manifest or pixel store missing or not matching.
    """
    device = runtime.start("train_cnn")
    cohort = Cohort.open(config)
    train_data, validation = cohort.split("train"), cohort.split("validate")
    targets = config.labels.policy().apply(train_data.raw_labels)
    log.info("%d training and %d validation films%s", len(train_data), len(validation), "" if train_data.films.resident else ", read from disk")

    settings = hash_of(
        {"manifest": cohort.manifest.sha256, "config": {k: v for k, v in config.plain().items() if k not in ("evaluation", "explain", "pipeline", "outputs", "run_name")}}
    )
    run_dir = config.run_dir(run_name)
    if not (resume and (run_dir / "config.json").exists()):
        inputs = {"manifest": config.manifest_path, "pixel_index": config.pixels_path.with_suffix(".json")}
        create_run(config.outputs, run_dir.name, stage="train_cnn", config=config.plain(), inputs=inputs, device=device, overwrite=overwrite)

    model, origin = initial_model(config.model, config.weights_dir, config.seed)
    freeze(model, config.model.freeze_stages, config.model.freeze_batchnorm)
    weights = positive_weights(targets, config.training.class_weighting, config.training.max_class_weight)
    result = train(
        model,
        masked_bce(weights),
        TrainingData(train_data.films, targets),
        validator(validation, config.evaluation.batch_size),
        training=config.training,
        augmentation=config.augment,
        seed=config.seed,
        run_dir=run_dir,
        settings=settings,
        resume=resume and (run_dir / "last" / "state.safetensors").exists(),
    )
    summary = {"schema": 1, **asdict(result), "parameters": parameter_counts(model), "initial_weights": origin, "synthetic": config.data.synthetic}
    write_json(run_dir / "training.json", summary)
    log.info("best validation macro AUC %.4f (epoch %d); weights in %s", result.best_auc, result.best_epoch, run_dir / "best_model.safetensors")
    return run_dir


def validator(data: SplitData, batch_size: int) -> Callable[[ResNet18], dict[str, float]]:
    """What the loop calls after each epoch: loss and macro AUC of a split, per film, -1 and empty counted as 0."""
    targets = SCORING_PROTOCOLS["empty_negative"].apply(data.raw_labels)

    def validate(model: ResNet18) -> dict[str, float]:
        logits = predict_logits(model, data.films, batch_size)
        loss = float(np.mean(np.logaddexp(0, logits) - targets * logits))
        return {"loss": loss, "macro_auc": macro_auc(roc_auc_per_label(targets, logits))}

    return validate


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mlx_cxr.train_cnn", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a run of that name")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run(load_config(args.config, args.overrides, seed=args.seed), args.run_name, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
