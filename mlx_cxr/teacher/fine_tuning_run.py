"""A fine-tuning run of the teacher: opened and checked, its folder begun, the base scored, the adapters trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cxr.core.config import Config
from mlx_cxr.core.files import hash_of, read_record, sha256_file, write_record
from mlx_cxr.core.runs import create_run
from mlx_cxr.data.manifest import labelled_in_turn
from mlx_cxr.data.soft_labels import INDEX_NAME
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.dataset import Studies
from mlx_cxr.teacher.fine_tuning import lora_task, validator
from mlx_cxr.teacher.lora import WEIGHTS, adapter_parameters, attach_lora, read_first_adapter, target_layers
from mlx_cxr.teacher.memory import Decoder, MemoryEstimate, adapted_widths, check_training_fits
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.teacher_run import ADAPTER, RECORD, Material, prompt_format, what_it_reads
from mlx_cxr.training.distributed import World
from mlx_cxr.training.loop import TrainingResult, train
from mlx_cxr.training.losses import masked_bce, positive_weights

log = logging.getLogger("mlx_cxr")

Validate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class FineTuning:
    """All that a run needs, opened and checked before its folder is touched.

    Attributes:
        base: without adapters yet.
        training: studies to learn from.
        validation: studies to choose the best weights by.
        inputs: role -> file that is read.
        first_adapter: arrays that the adapters begin with, by name; empty for fresh ones.
        memory: estimate of a training step.
    """

    config: Config
    world: World
    material: Material
    base: Base
    form: PromptFormat
    training: Studies
    validation: Studies
    inputs: Mapping[str, Path]
    first_adapter: Mapping[str, mx.array]
    memory: MemoryEstimate

    @classmethod
    def open(cls, config: Config, world: World) -> FineTuning:
        """Open data and base, and refuse what cannot be trained.

        Raises:
            DataError, BaseUnavailableError, WeightsCorruptError, AdapterError, MemoryLimitError: as the stage says.
        """
        teacher = config.teacher
        material = Material.open(config)
        base = Base.open(teacher, config.weights_dir, vision=teacher.modality != "text")
        form = prompt_format(base, config)
        training, validation = (material.studies(config, form, split) for split in ("train", "validate"))
        longest = int(max(training.lengths().max(), validation.lengths().max()))
        widths = adapted_widths(base.model, target_layers(base.model, teacher.lora))
        log.info(
            "reads %s: %d training and %d validation studies, up to %d tokens; skipped for want of text: %d; cut: %d",
            what_it_reads(config),
            len(training),
            len(validation),
            longest,
            training.counts["without_text"] + validation.counts["without_text"],
            training.counts["cut"] + validation.counts["cut"],
        )
        inputs, first = material.inputs(config), {}
        if teacher.start_from is not None:
            folder = config.run_dir(teacher.start_from) / ADAPTER
            first = read_first_adapter(base.model, folder, base.identity, teacher.lora)
            inputs["first_adapter"] = folder / WEIGHTS
        memory = check_training_fits(Decoder.of(base.model), widths, teacher, longest, base.precision)
        log.info("memory: about %s", memory)
        return cls(config, world, material, base, form, training, validation, inputs, first, memory)

    def begin(self, run_dir: Path, machine: Mapping[str, Any], overwrite: bool) -> None:
        """Write the `config.json` of a new run, and remove what an earlier one of that name left; rank 0 does."""
        if not self.world.writes:
            return
        create_run(
            self.config.outputs,
            run_dir.name,
            stage="lfm_finetune",
            config=self.config.plain(),
            inputs=self.inputs,
            device=machine,
            overwrite=overwrite,
        )
        # Soft labels too: they would be taken for those of the new adapter.
        for old in ("training.json", RECORD, f"{ADAPTER}/{WEIGHTS}", "last/state.safetensors", INDEX_NAME):
            (run_dir / old).unlink(missing_ok=True)

    def embed_images(self) -> tuple[np.ndarray | None, Validate]:
        """Embeddings of the training images (None for a text teacher), and the validation with those of its own.

        One rank after another computes what is not on the disk; the vision tower is dropped after it.
        """
        with self.world.one_after_another():
            images, held_out = (
                self.material.images(self.base, studies, self.config) for studies in (self.training, self.validation)
            )
        self.base.release_vision()
        return images, validator(self.base, self.form, self.validation, held_out, self.config.teacher, self.world)

    def score_base(self, run_dir: Path, validate: Validate, resume: bool) -> dict[str, Any]:
        """The entries of `teacher.json` before training: base, studies, and the base's own validation AUC.

        A run that is resumed has that on record; a new one writes it.
        """
        teacher, base = self.config.teacher, self.base
        if resume:
            log.info("resumed from the last saved state of %s", run_dir)
            zero_shot = self.world.agree(lambda: read_record(run_dir / RECORD)["zero_shot"])
        else:
            zero_shot = validate(base.model)
        record = {
            "schema": 1,
            "base": teacher.base,
            "base_sha256": base.sha256,
            "bits": base.bits,
            "precision": base.precision,
            "modality": teacher.modality,
            "reads": what_it_reads(self.config),
            "studies": {"train": dict(self.training.counts), "validate": dict(self.validation.counts)},
            "zero_shot": zero_shot,
            "zero_shot_auc": zero_shot["macro_auc"],
        }
        if not resume and self.world.writes:
            write_record(run_dir / RECORD, record)
        log.info("zero-shot validation macro AUC %.4f", zero_shot["macro_auc"])
        return record

    @property
    def settings(self) -> str:
        """Hash of what decides the adapter, and so may not change when a run is resumed."""
        return settings_hash(self.config, self.base, self.inputs)

    def fit(
        self, run_dir: Path, images: np.ndarray | None, validate: Validate, resume: bool
    ) -> tuple[TrainingResult, dict[str, Any]]:
        """Put adapters on the base and train them; returns the outcome, and what `training.json` says beside it.

        `images` and `validate` are those of `embed_images`.
        """
        config, teacher, base, training = self.config, self.config.teacher, self.base, self.config.teacher.training
        turns = labelled_in_turn(self.training.raw_labels, self.training.withheld)
        studies = self.training.taken(turns)
        targets = config.labels.policy().apply(studies.raw_labels)
        loss = masked_bce(positive_weights(targets, training.class_weighting, training.max_class_weight))
        attach_lora(base.model, teacher.lora, config.seed)
        if self.first_adapter:
            base.model.load_weights(list(self.first_adapter.items()), strict=False)
        mx.reset_peak_memory()
        with batch_parallel(rows=training.batch_size):
            task = lora_task(
                base, self.form, studies, targets, images, loss, validate, teacher, config.seed, self.world, turns
            )
            result = train(
                task,
                epochs=training.epochs,
                seed=config.seed,
                patience=training.patience,
                save_every=training.save_every,
                log_every=training.log_every,
                run_dir=run_dir,
                settings=self.settings,
                resume=resume,
            )
        trainable = adapter_parameters(base.model)
        return result, {
            "parameters": {"total": base.parameters + trainable, "trainable": trainable},
            "memory_estimate_bytes": self.memory.total,
            "peak_memory_bytes": mx.get_peak_memory(),
            "synthetic": config.data.synthetic,
        }


def settings_hash(config: Config, base: Base, inputs: Mapping[str, Path]) -> str:
    """Hash of what decides the adapter, and so may not change when a run is resumed."""
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
