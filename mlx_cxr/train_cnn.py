"""Train the ResNet-18 baseline: `python -m mlx_cxr.train_cnn --config configs/demo.yaml --run_name demo_cnn`.

Writes `outputs/<run>/`: `config.json` first, then `metrics.jsonl`, `best_model.safetensors`, `last/` and
`training.json` with how it ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core.claim import claims
from mlx_cxr.core.stage import add_config_arguments, add_training_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config


@claims(lambda config, run_name=None, *_, **__: config.run_dir(run_name))
def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, and return the run's folder.

    Args:
        config: the experiment; its manifest and pixel store must be there.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.
        resume: resume a run that was stopped; one that saved nothing yet begins anew.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        RecordError: the run to resume was made with other data or settings.
        DataError: manifest or pixel store missing or not matching.
        TrainingDataError: no training images, or a validation split without both classes of any label.
        TrainingDivergedError: the loss is no longer a number.
        RankLostError, RanksDifferError: another process of the run is gone, or has other data.
    """
    from mlx_cxr.core import device
    from mlx_cxr.models.resnet import parameter_counts
    from mlx_cxr.training import classifier_run
    from mlx_cxr.training.classifier_task import TrainingData, classifier_task
    from mlx_cxr.training.distributed import World
    from mlx_cxr.training.losses import masked_bce
    from mlx_cxr.training.preprocessing import preprocessing_record

    machine, world = device.start("train_cnn", parallel=True), World.join()
    run_dir, training = config.run_dir(run_name), config.training
    resume_state = classifier_run.can_resume(run_dir, resume, overwrite, world)
    cohort, train_data, validation = classifier_run.open_images(config)
    train_data = train_data.labelled()
    targets = config.labels.policy().apply(train_data.raw_labels)
    validate = classifier_run.validator(validation, config.evaluation.batch_size, world)
    model, origin, weights = classifier_run.initial_network(config, config.model, targets)
    classifier_run.begin(config, run_dir, "train_cnn", {}, machine, resume_state, world)
    task = classifier_task(
        model,
        masked_bce(weights, world),
        TrainingData(train_data.images, targets),
        validate,
        training=training,
        augmentation=config.augment,
        seed=config.seed,
        world=world,
    )
    classifier_run.fit(
        task,
        training,
        seed=config.seed,
        run_dir=run_dir,
        settings=classifier_run.settings_hash(config, training, cohort.manifest.sha256),
        resume=resume_state,
        summary={
            "parameters": parameter_counts(model),
            "initial_weights": origin,
            "preprocessing": preprocessing_record(config),
            "synthetic": config.data.synthetic,
        },
    )
    return run_dir


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("train_cnn", __doc__)
    add_config_arguments(parser)
    add_training_arguments(parser, "run_name")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, seed=args.seed), args.run_name, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
