"""The steps that the stages training a network on images share: data, first weights, run folder, loop and summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cxr import __version__
from mlx_cxr.core import device
from mlx_cxr.core.config import Config
from mlx_cxr.core.config_schema import ModelConfig, TrainingConfig
from mlx_cxr.core.files import RecordError, hash_of, read_record, write_record
from mlx_cxr.core.runs import RunExistsError, create_run
from mlx_cxr.models.convert import freeze, initial_model
from mlx_cxr.models.resnet import ResNet18
from mlx_cxr.ops.streams import available, batch_parallel
from mlx_cxr.training.checkpoint import STATE, forget_state
from mlx_cxr.training.cohort import Cohort, SplitData
from mlx_cxr.training.distributed import ALONE, World
from mlx_cxr.training.loop import Task, TrainingResult, train
from mlx_cxr.training.losses import positive_weights, prior_logits
from mlx_cxr.training.scoring import predict_logits, validation

log = logging.getLogger("mlx_cxr")

RESULT = "training.json"
"""The file in a run's folder that says that its training came to an end, and how."""


def open_images(config: Config) -> tuple[Cohort, SplitData, SplitData]:
    """Open the cohort, and its training and validation images.

    Raises:
        DataError: manifest or pixel store missing or not matching, or a patient in two splits.
    """
    cohort = Cohort.open(config)
    train_data, validation = cohort.split("train"), cohort.split("validate")
    log.info(
        "%d training and %d validation films%s",
        len(train_data),
        len(validation),
        "" if train_data.images.resident else ", read from disk",
    )
    return cohort, train_data, validation


def initial_network(
    config: Config, section: ModelConfig, targets: np.ndarray
) -> tuple[ResNet18, dict[str, Any], np.ndarray | None]:
    """Make the network that training starts from.

    Args:
        section: its model section, or one with other weights.
        targets: float (N, 14) in [0, 1], NaN where unknown; a fresh head starts at their prevalence.

    Returns:
        The model, frozen as the section says; the provenance of its weights; and the weight (14,) of each finding's
        positives, or None for none.

    Raises:
        FileNotFoundError, ModelFormatError, WeightsCorruptError: as `initial_model`.
    """
    model, origin = initial_model(section, config.weights_dir, config.seed)
    freeze(model, section.freeze_stages, section.freeze_batchnorm)
    weights = positive_weights(targets, config.training.class_weighting, config.training.max_class_weight)
    if origin["head"] == "fresh":
        model.fc.bias = mx.array(prior_logits(targets, weights))
    return model, origin, weights


def can_resume(run_dir: Path, resume: bool, overwrite: bool, world: World = ALONE) -> bool:
    """True if resuming is asked for, and there is a saved state to resume from or the run is finished; rank 0 looks.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
    """

    def look() -> bool:
        if (run_dir / "config.json").exists() and not (resume or overwrite):
            raise RunExistsError(f"{run_dir} exists; choose another --run_name, or pass --resume or --overwrite")
        return resume and ((run_dir / STATE).exists() or (run_dir / RESULT).exists())

    return world.agree(look)


def finished_result(run_dir: Path, settings: str, world: World) -> TrainingResult | None:
    """The outcome of a run to resume that has come to its end already; None for one that has not.

    A state that it left, killed right after its end, is removed.

    Raises:
        RecordError: it was made with other settings, or its record is damaged.
    """
    path = run_dir / RESULT
    record = world.agree(lambda: read_record(path) if path.exists() else None)
    if record is None:
        return None
    if record["settings"] != settings:
        raise RecordError(
            f"{path} is of a run that was made with other data or settings; restore the configuration, or start again "
            "with another --run_name or --overwrite"
        )
    if world.writes:
        forget_state(run_dir)
    log.info("%s is finished: there is nothing to resume", run_dir)
    return TrainingResult(**{field.name: record[field.name] for field in fields(TrainingResult)})


def write_result(run_dir: Path, result: TrainingResult, settings: str, summary: Mapping[str, Any]) -> None:
    """Write `training.json`, with which a run is finished, and remove the state to resume from."""
    write_record(run_dir / RESULT, {"schema": 1, **asdict(result), "settings": settings, **summary})
    forget_state(run_dir)


def begin(
    config: Config,
    run_dir: Path,
    stage: str,
    inputs: Mapping[str, Path],
    machine: Mapping[str, Any],
    resume: bool,
    world: World = ALONE,
) -> None:
    """Write the run's `config.json` on rank 0, unless the run is resumed.

    Args:
        inputs: role -> file that is read, beside manifest and pixel index.
        resume: as `can_resume` returned it: a run that saved no state begins anew.
    """
    if not world.writes:
        return
    if resume:
        return
    data = {"manifest": config.manifest_path, "pixel_index": config.pixels_path.with_suffix(".json")}
    create_run(
        config.outputs,
        run_dir.name,
        stage=stage,
        config=config.plain(),
        inputs={**data, **inputs},
        device=machine,
        overwrite=True,
    )
    (run_dir / RESULT).unlink(missing_ok=True)


def fit(
    task: Task,
    training: TrainingConfig,
    *,
    seed: int,
    run_dir: Path,
    settings: str,
    resume: bool,
    summary: Mapping[str, Any],
) -> TrainingResult:
    """Run the loop, and write `training.json` with its result and the given summary; a finished run is left as it is.

    Raises:
        TrainingDivergedError, TrainingDataError, RecordError: as `train`.
    """
    world = task.world
    world.check_same("version of this package, or kind of device,", f"{__version__} {device.device_kind()}")
    if resume:
        if (finished := finished_result(run_dir, settings, world)) is not None:
            return finished
        log.info("resumed from the last saved state of %s", run_dir)
    # The parts of a batch decide in which order ranks exchange BatchNorm's sums: as many on each.
    parts = int(world.gather(np.array([available()], np.int32)).min())
    with batch_parallel(parts):
        result = train(
            task,
            epochs=training.epochs,
            seed=seed,
            patience=training.patience,
            save_every=training.save_every,
            log_every=training.log_every,
            run_dir=run_dir,
            settings=settings,
            resume=resume,
        )
    if world.writes:
        write_result(run_dir, result, settings, summary)
    log.info(
        "best validation macro AUC %.4f (epoch %d); weights in %s",
        result.best_auc,
        result.best_epoch,
        run_dir / task.best_name,
    )
    return result


def settings_hash(config: Config, training: TrainingConfig, manifest_sha256: str, **others: Any) -> str:
    """Hash of what decides a run's weights, and so may not change when it is resumed.

    Args:
        training: its training section, or one with another number of epochs or learning rate.
        others: further settings that decide them, as plain data.
    """
    plain = config.plain()
    settings = {key: plain[key] for key in ("seed", "labels", "model", "augment")}
    settings["pixels"] = {key: plain["pixels"][key] for key in ("size", "fit")}
    settings["training"] = training.model_dump(mode="json", exclude={"pixel_budget_gb"})
    return hash_of({"manifest": manifest_sha256, **settings, **others})


def validator(data: SplitData, batch_size: int, world: World = ALONE) -> Callable[[ResNet18], dict[str, float]]:
    """The loop's validation on a split's images; raises as `validation`."""
    return validation(
        lambda model: predict_logits(model, data.images, batch_size, world),
        data.raw_labels,
        "films",
        "the learning rate",
        f"split {data.name!r} has {len(data)} films and both classes of no label, so the best weights cannot be "
        "chosen by its AUC; look at the manifest's summary, and give more studies or another split",
    )
