"""Fine-tune the teacher by LoRA: `python -m mlx_cxr.lfm_finetune --config configs/demo.yaml`.

Writes `outputs/<run>/`: `config.json` first, then `teacher.json` (what it reads, its zero-shot and tuned validation
AUC), `metrics.jsonl`, `adapter_weights/` in mlx-vlm's own schema, `last/` to resume from, and `training.json`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import write_record
from mlx_cxr.core.stage import add_config_arguments, add_training_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")


@claims(lambda config, run_name=None, *_, **__: config.run_dir(run_name or config.teacher.run_name))
def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the adapters, and return the run's folder.

    Args:
        config: the experiment; its manifest, and the reports and pixel store that the teacher reads, must be there.
        run_name: folder under `outputs`; None takes `teacher.run_name`.
        resume: resume a run that was stopped; one that saved nothing yet begins anew.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        RecordError: the run to resume was made with other data or settings.
        DataError: manifest, reports or pixel store missing or not matching, or no study that can be read.
        BaseUnavailableError: the base is not on this machine.
        WeightsCorruptError: the base is incomplete.
        AdapterError: `teacher.lora` names what the base has not.
        MemoryLimitError: it would not fit; names a setting that would.
        TrainingDivergedError: the loss is no longer a number.
        RankLostError, RanksDifferError: another process of the run is gone, or has other data.
    """
    from mlx_cxr.teacher.fine_tuning_run import FineTuning
    from mlx_cxr.teacher.teacher_run import ADAPTER, RECORD
    from mlx_cxr.training.classifier_run import can_resume, finished_result, write_result
    from mlx_cxr.training.distributed import World

    machine, world = device.start("lfm_finetune", parallel=True), World.join()
    run_dir = config.run_dir(run_name or config.teacher.run_name)
    resume_state = can_resume(run_dir, resume, overwrite, world)

    # Whatever can be refused is refused before the run's folder is touched.
    tuning = FineTuning.open(config, world)
    if resume_state and finished_result(run_dir, tuning.settings, world) is not None:
        return run_dir
    if not resume_state:
        tuning.begin(run_dir, machine, overwrite or resume)

    # The base answers before it has adapters: that is what they are measured against.
    images, validate = tuning.embed_images()
    record = tuning.score_base(run_dir, validate, resume_state)

    result, summary = tuning.fit(run_dir, images, validate, resume_state)
    if world.writes:
        write_record(run_dir / RECORD, {**record, "tuned_auc": result.best_auc})
        write_result(run_dir, result, tuning.settings, summary)
    aucs = record["zero_shot_auc"], result.best_auc, result.best_epoch
    log.info("validation macro AUC %.4f zero-shot, %.4f tuned (epoch %d); adapter in %s", *aucs, run_dir / ADAPTER)
    return run_dir


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
