"""Fine-tune the teacher by LoRA: `python -m mlx_cxr.lfm_finetune --config configs/demo.yaml`.

Writes `outputs/<run>/`: `config.json` first, then `teacher.json` (what it reads, its zero-shot and tuned validation
AUC), `metrics.jsonl`, `adapter_weights/` in mlx-vlm's own schema, `last/` to resume from, and `training.json`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlx_cxr.core import device
from mlx_cxr.core.config import Config
from mlx_cxr.core.runs import create_run, hash_of, read_json, sha256_file, write_json
from mlx_cxr.core.stage import add_config_arguments, add_training_arguments, configuration, stage_parser, started
from mlx_cxr.data.soft_labels import INDEX_NAME
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.fine_tuning import lora_task, validator
from mlx_cxr.teacher.lora import WEIGHTS, attach_lora, read_first_adapter, target_layers
from mlx_cxr.teacher.memory import Decoder, adapted_widths, check_training_fits
from mlx_cxr.teacher.teacher_run import ADAPTER, RECORD, Material, prompt_format, what_it_reads
from mlx_cxr.training.classifier_run import can_resume
from mlx_cxr.training.distributed import World
from mlx_cxr.training.loop import train
from mlx_cxr.training.losses import masked_bce, positive_weights

log = logging.getLogger("mlx_cxr")


def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the adapters, and return the run's folder.

    Args:
        config: the experiment; its manifest, and the reports and pixel store that the teacher reads, must be there.
        run_name: folder under `outputs`; None takes `teacher.run_name`.
        resume: go on with a run that was stopped; one that saved nothing yet begins anew.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        RunFormatError: the run to resume was made with other data or settings.
        DataError: manifest, reports or pixel store missing or not matching, or no study that can be read.
        BaseUnavailableError: the base is not on this machine.
        WeightsCorruptError: the base is incomplete.
        AdapterError: `teacher.lora` names what the base has not.
        MemoryLimitError: it would not fit; names a setting that would.
        TrainingDivergedError: the loss is no longer a number.
        RankLostError, RanksDifferError: another process of the run is gone, or has other data.
    """
    machine, world = device.start("lfm_finetune", parallel=True), World.join()
    teacher = config.teacher
    run_dir = config.run_dir(run_name or teacher.run_name)
    resume_state = can_resume(run_dir, resume, overwrite, world)
    material = Material.open(config)
    base = Base.open(teacher, config.weights_dir, vision=teacher.modality != "text")
    form = prompt_format(base, config)
    training, validation = (material.studies(config, form, split) for split in ("train", "validate"))
    longest = int(max(training.lengths().max(), validation.lengths().max()))
    names = target_layers(base.model, teacher.lora)
    widths = adapted_widths(base.model, names)
    log.info(
        "reads %s: %d training and %d validation studies, up to %d tokens; skipped for want of text: %d; cut: %d",
        what_it_reads(config),
        len(training),
        len(validation),
        longest,
        training.counts["without_text"] + validation.counts["without_text"],
        training.counts["cut"] + validation.counts["cut"],
    )
    inputs, first = material.inputs(config), None
    if teacher.start_from is not None:
        first_folder = config.run_dir(teacher.start_from) / ADAPTER
        first = read_first_adapter(base.model, first_folder, base.identity, teacher.lora)
        inputs["first_adapter"] = first_folder / WEIGHTS
    estimate = check_training_fits(Decoder.of(base.model), widths, teacher, longest, base.precision)
    log.info("memory: about %s", estimate)
    if not resume_state and world.writes:
        create_run(
            config.outputs,
            run_dir.name,
            stage="lfm_finetune",
            config=config.plain(),
            inputs=inputs,
            device=machine,
            overwrite=overwrite or resume,
        )
        # Soft labels too: they would be taken for those of the new adapter.
        state, adapter = "last/state.safetensors", f"{ADAPTER}/{WEIGHTS}"
        for old in ("training.json", RECORD, adapter, state, INDEX_NAME):
            (run_dir / old).unlink(missing_ok=True)

    with world.one_after_another():
        images, validation_images = (material.images(base, studies, config) for studies in (training, validation))
    base.release_vision()
    validate = validator(base, form, validation, validation_images, teacher, world)
    if resume_state:
        log.info("going on from the last saved state of %s", run_dir)
        zero_shot = world.agree(lambda: read_json(run_dir / RECORD)["zero_shot"])
    else:
        zero_shot = validate(base.model)
    about = {
        "schema": 1,
        "base": teacher.base,
        "base_sha256": base.sha256,
        "bits": base.bits,
        "precision": base.precision,
        "modality": teacher.modality,
        "reads": what_it_reads(config),
        "studies": {"train": dict(training.counts), "validate": dict(validation.counts)},
        "zero_shot": zero_shot,
        "zero_shot_auc": zero_shot["macro_auc"],
    }
    if not resume_state and world.writes:
        write_json(run_dir / RECORD, about)
    log.info("zero-shot validation macro AUC %.4f", zero_shot["macro_auc"])

    targets = config.labels.policy().apply(training.raw_labels)
    weights = positive_weights(targets, teacher.training.class_weighting, teacher.training.max_class_weight)
    attach_lora(base.model, teacher.lora, config.seed)
    if first is not None:
        base.model.load_weights(list(first.items()), strict=False)
    trainable = sum(teacher.lora.rank * (inputs + outputs) for inputs, outputs in widths)
    mx.reset_peak_memory()
    with batch_parallel(rows=teacher.training.batch_size):
        result = train(
            lora_task(
                base, form, training, targets, images, masked_bce(weights), validate, teacher, config.seed, world
            ),
            epochs=teacher.training.epochs,
            seed=config.seed,
            patience=teacher.training.patience,
            save_every=teacher.training.save_every,
            log_every=teacher.training.log_every,
            run_dir=run_dir,
            settings=settings_hash(config, base, inputs),
            resume=resume_state,
        )
    summary = {
        "schema": 1,
        **asdict(result),
        "parameters": {"total": base.parameters + trainable, "trainable": trainable},
        "memory_estimate_bytes": estimate.total,
        "peak_memory_bytes": mx.get_peak_memory(),
        "synthetic": config.data.synthetic,
    }
    if world.writes:
        write_json(run_dir / RECORD, {**about, "tuned_auc": result.best_auc})
        write_json(run_dir / "training.json", summary)
    log.info(
        "validation macro AUC %.4f zero-shot, %.4f tuned (epoch %d); adapter in %s",
        zero_shot["macro_auc"],
        result.best_auc,
        result.best_epoch,
        run_dir / ADAPTER,
    )
    return run_dir


def settings_hash(config: Config, base: Base, inputs: Mapping[str, Path]) -> str:
    """Hash of what decides the adapter, and so may not change when a run is resumed.

    Args:
        config: the experiment.
        base: what is adapted.
        inputs: role -> file that is read.
    """
    plain = config.plain()
    unused = ("batch_size", "memory_limit_gb", "tiny", "run_name")
    return hash_of(
        {
            "inputs": {role: sha256_file(path) for role, path in inputs.items()},
            "base": base.identity,
            "seed": config.seed,
            "labels": plain["labels"],
            "teacher": {key: value for key, value in plain["teacher"].items() if key not in unused},
        }
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("lfm_finetune", __doc__)
    add_config_arguments(parser)
    add_training_arguments(parser, "teacher.run_name")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args, seed=args.seed), args.run_name, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
