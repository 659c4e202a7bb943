"""Cache the teacher's soft labels: `python -m mlx_cxr.cache_teacher_outputs --config configs/demo.yaml`.

Writes into the teacher's run: its soft labels of the training and validation studies, for a student to learn from
(`teacher_soft_labels.npy`, `teacher_study_ids.json`), and, kept apart from them, its predictions of validation and test
with tables and plots, for the comparison; with `--zero_shot` also those of the base without the adapter, in
`zero_shot/`, and with `--line_orders` how much the order of the prompt's lines matters (`order_effect.json`).
Killed, it resumes where it was.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import read_record
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config
    from mlx_cxr.evaluation.predictions import Predictions


log = logging.getLogger("mlx_cxr")


@claims(lambda config, teacher_run=None, *_, **__: config.run_dir(teacher_run or config.teacher.run_name))
def run(config: Config, teacher_run: str | None = None, zero_shot: bool = False, line_orders: int = 0) -> Path:
    """Cache a teacher's answers, and return its run's folder.

    Args:
        config: the experiment; manifest, reports and images must be those that the teacher was trained on.
        teacher_run: folder under `outputs`; None takes `teacher.run_name`.
        zero_shot: score validation and test without the adapter too.
        line_orders: ask the validation studies under so many other orders of the 14 lines too.

    Raises:
        RecordError: there is no such run, or it was trained for something else.
        AdapterError: its adapter is missing or does not fit.
        DataError: a file is missing, or no study can be read.
        SoftLabelError: an answer is not finite, or another process writes there.
        RankLostError: another process of the run is gone.
    """
    from mlx_cxr.evaluation.predictions import join
    from mlx_cxr.evaluation.results import write_scores
    from mlx_cxr.inference.cost import write_cost
    from mlx_cxr.pages.results_page import write_results
    from mlx_cxr.teacher.lora import WEIGHTS, adapters_off
    from mlx_cxr.teacher.soft_label_cache import (
        answers_of,
        cache_soft_labels,
        predictions_of,
        write_order_effect,
    )
    from mlx_cxr.teacher.teacher_run import ADAPTER, Material, TrainedTeacher
    from mlx_cxr.training.distributed import World

    machine, world = device.start("cache_teacher_outputs", parallel=True), World.join()
    teacher = TrainedTeacher.open(config.run_dir(teacher_run or config.teacher.run_name))
    material = Material.open(teacher.config)
    teacher.check(config, material)
    learned, test = (
        material.studies(teacher.config, teacher.form, *splits) for splits in (("train", "validate"), ("test",))
    )

    validation_logits = cache_soft_labels(teacher, material, learned, world)
    answers = answers_of(teacher, material, test, world)
    bare: list[Predictions] = []
    validation = learned.of_split("validate")
    if zero_shot:
        with adapters_off(teacher.base.model):
            parts = validation, test
            bare = [predictions_of(part, answers_of(teacher, material, part, world).logits) for part in parts]
    if not world.writes:
        return teacher.folder

    inputs = {**material.inputs(teacher.config), "adapter": teacher.folder / ADAPTER / WEIGHTS}
    record = provenance("cache_teacher_outputs", config.plain(), inputs, machine)
    reads = teacher.record["reads"]

    def write(folder: Path, predictions: Predictions, settings: Config, score_of: str) -> None:
        protocol, manifest = teacher.protocol, material.manifest
        points, results = write_scores(
            folder, predictions, protocol, manifest, settings, record, score_of, material.store
        )
        write_results(folder, results, predictions, points)

    predictions = join(predictions_of(validation, validation_logits), predictions_of(test, answers.logits))
    write(teacher.folder, predictions, teacher.config, f"what the teacher says to its {reads}")
    size = teacher.config.teacher.batch_size
    write_cost(
        teacher.folder,
        parameters=read_record(teacher.folder / "training.json")["parameters"],
        ms_per_sample=1000 * answers.seconds / len(test),
        samples=len(test),
        batch_size=size,
        what=f"one study ({reads}), {answers.tokens / len(test):.0f} tokens on average, forward pass, batch {size}",
        device=machine,
    )
    if zero_shot:
        score_of = f"what the base says to its {reads}, without the adapter"
        write(teacher.folder / "zero_shot", join(*bare), config, score_of)
    if line_orders:
        write_order_effect(teacher, material, line_orders, config.seed)
    return teacher.folder


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("cache_teacher_outputs", __doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--teacher_run", "--run_name", help="run under outputs/, or a folder; default: teacher.run_name"
    )
    parser.add_argument("--zero_shot", action="store_true", help="score the base without its adapter too")
    parser.add_argument(
        "--line_orders",
        type=int,
        default=0,
        metavar="N",
        help="measure what N other orders of the prompt's lines change",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args), args.teacher_run, args.zero_shot, args.line_orders)


if __name__ == "__main__":
    main()
