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

import mlx.core as mx
import numpy as np

from mlx_cxr import runtime
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.errors import readable_errors
from mlx_cxr.evaluation.metrics import both_classes, macro_auc, roc_auc_per_label
from mlx_cxr.labels import SCORING_PROTOCOLS
from mlx_cxr.models.convert import freeze, initial_model
from mlx_cxr.models.resnet import ResNet18, parameter_counts
from mlx_cxr.runs import RunExistsError, create_run, hash_of, write_json
from mlx_cxr.training.cohort import Cohort, SplitData
from mlx_cxr.training.loop import TrainingData, TrainingDataError, TrainingDivergedError, train
from mlx_cxr.training.losses import masked_bce, positive_weights, prior_logits
from mlx_cxr.training.scoring import predict_logits

log = logging.getLogger("mlx_cxr")


def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, and return the run's folder.

    Args:
        config: the experiment; its manifest and pixel store must be there.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.
        resume: go on with a run that was stopped; one that saved nothing yet begins anew.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        RunFormatError: the run to resume was made with other data or settings.
        DataError: manifest or pixel store missing or not matching.
        TrainingDataError: no training films, or a validation split without both classes of any label.
        TrainingDivergedError: the loss is no longer a number.
    """
    device = runtime.start("train_cnn")
    cohort = Cohort.open(config)
    train_data, validation = cohort.split("train"), cohort.split("validate")
    targets = config.labels.policy().apply(train_data.raw_labels)
    log.info(
        "%d training and %d validation films%s",
        len(train_data),
        len(validation),
        "" if train_data.films.resident else ", read from disk",
    )

    run_dir = config.run_dir(run_name)
    begun = (run_dir / "config.json").exists()
    resume_state = resume and (run_dir / "last" / "state.safetensors").exists()
    if begun and not (resume or overwrite):
        raise RunExistsError(f"{run_dir} exists; choose another --run_name, or pass --resume or --overwrite")
    validate = validator(validation, config.evaluation.batch_size)
    model, origin = initial_model(config.model, config.weights_dir, config.seed)
    freeze(model, config.model.freeze_stages, config.model.freeze_batchnorm)
    if resume_state:
        log.info("going on from the last saved state of %s", run_dir)
    else:
        create_run(
            config.outputs,
            run_dir.name,
            stage="train_cnn",
            config=config.plain(),
            inputs={"manifest": config.manifest_path, "pixel_index": config.pixels_path.with_suffix(".json")},
            device=device,
            overwrite=overwrite or resume,
        )
        (run_dir / "training.json").unlink(missing_ok=True)

    weights = positive_weights(targets, config.training.class_weighting, config.training.max_class_weight)
    if origin["head"] == "fresh":
        model.fc.bias = mx.array(prior_logits(targets, weights))
    result = train(
        model,
        masked_bce(weights),
        TrainingData(train_data.films, targets),
        validate,
        training=config.training,
        augmentation=config.augment,
        seed=config.seed,
        run_dir=run_dir,
        settings=settings_hash(config, cohort.manifest.sha256),
        resume=resume_state,
    )
    summary = {
        "schema": 1,
        **asdict(result),
        "parameters": parameter_counts(model),
        "initial_weights": origin,
        "synthetic": config.data.synthetic,
    }
    write_json(run_dir / "training.json", summary)
    log.info(
        "best validation macro AUC %.4f (epoch %d); weights in %s",
        result.best_auc,
        result.best_epoch,
        run_dir / "best_model.safetensors",
    )
    return run_dir


def settings_hash(config: Config, manifest_sha256: str) -> str:
    """Hash of what decides a run's weights, and so may not change when it is resumed."""
    plain = config.plain()
    settings = {key: plain[key] for key in ("seed", "pixels", "labels", "model", "augment", "training")}
    del settings["training"]["pixel_budget_gb"]
    return hash_of({"manifest": manifest_sha256, **settings})


def validator(data: SplitData, batch_size: int) -> Callable[[ResNet18], dict[str, float]]:
    """What the loop calls after each epoch: loss and macro AUC of a split, per film, -1 and empty counted as 0.

    Raises:
        TrainingDataError: no label of the split has both classes, so no epoch could be told from another.
    """
    targets = SCORING_PROTOCOLS["empty_negative"].apply(data.raw_labels)
    if not both_classes(targets).any():
        raise TrainingDataError(
            f"split {data.name!r} has {len(data)} films and both classes of no label, so the best weights cannot be "
            "chosen by its AUC; look at the manifest's summary, and give more studies or another split"
        )

    def validate(model: ResNet18) -> dict[str, float]:
        logits = predict_logits(model, data.films, batch_size)
        if not np.isfinite(logits).all():
            raise TrainingDivergedError(
                "logits of validation films are not finite; lower training.learning_rate. "
                "The last saved state and the best weights so far are kept"
            )
        loss = float(np.mean(np.logaddexp(0, logits) - targets * logits))
        return {"loss": loss, "macro_auc": macro_auc(roc_auc_per_label(targets, logits))}

    return validate


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mlx_cxr.train_cnn", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    parser.add_argument("--seed", type=int)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    existing.add_argument("--overwrite", action="store_true", help="replace a run of that name")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    with readable_errors():
        run(load_config(args.config, args.overrides, seed=args.seed), args.run_name, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
