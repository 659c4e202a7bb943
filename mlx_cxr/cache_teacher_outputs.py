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
from mlx_cxr.core.runs import provenance, read_json, write_json
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    import numpy as np

    from mlx_cxr.core.config import Config
    from mlx_cxr.data.soft_label_writer import SoftLabelWriter
    from mlx_cxr.evaluation.predictions import Predictions
    from mlx_cxr.teacher.dataset import Studies
    from mlx_cxr.teacher.scoring import Answers
    from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher
    from mlx_cxr.training.distributed import World

log = logging.getLogger("mlx_cxr")


def run(config: Config, teacher_run: str | None = None, zero_shot: bool = False, line_orders: int = 0) -> Path:
    """Cache a teacher's answers, and return its run's folder.

    Args:
        config: the experiment; manifest, reports and images must be those that the teacher was trained on.
        teacher_run: folder under `outputs`; None takes `teacher.run_name`.
        zero_shot: score validation and test without the adapter too.
        line_orders: ask the validation studies under so many other orders of the 14 lines too.

    Raises:
        RunFormatError: there is no such run, or it was trained for something else.
        AdapterError: its adapter is missing or does not fit.
        DataError: a file is missing, or no study can be read.
        SoftLabelError: an answer is not finite, or another process writes there.
        RankLostError: another process of the run is gone.
    """
    from mlx_cxr.evaluation.predictions import join
    from mlx_cxr.evaluation.scores import write_scores
    from mlx_cxr.inference.cost import write_cost
    from mlx_cxr.pages.results_page import write_results
    from mlx_cxr.teacher.lora import WEIGHTS, adapters_off
    from mlx_cxr.teacher.teacher_run import ADAPTER, Material, TrainedTeacher
    from mlx_cxr.training.distributed import World

    machine, world = device.start("cache_teacher_outputs", parallel=True), World.join()
    teacher = TrainedTeacher.open(config.run_dir(teacher_run or config.teacher.run_name))
    material = Material.open(teacher.config)
    teacher.check(config, material)
    learned, test = (
        material.studies(teacher.config, teacher.form, *splits) for splits in (("train", "validate"), ("test",))
    )

    if world.writes:
        validation = _predictions(learned.of_split("validate"), _cache(teacher, material, learned, world))
    else:
        _fill(None, teacher, material, learned, world)
    answers = _answers(teacher, material, test, world)
    bare: list[Predictions] = []
    if zero_shot:
        with adapters_off(teacher.base.model):
            parts = learned.of_split("validate"), test
            bare = [_predictions(part, _answers(teacher, material, part, world).logits) for part in parts]
    if not world.writes:
        return teacher.folder

    inputs = {**material.inputs(teacher.config), "adapter": teacher.folder / ADAPTER / WEIGHTS}
    record = provenance("cache_teacher_outputs", config.plain(), inputs, machine)
    reads = teacher.record["reads"]

    def write(folder: Path, predictions: Predictions, settings: Config, score_of: str) -> None:
        protocol, manifest = teacher.protocol, material.manifest
        points, results = write_scores(folder, predictions, protocol, manifest, settings, record, score_of)
        write_results(folder, results, predictions, points)

    predictions = join(validation, _predictions(test, answers.logits))
    write(teacher.folder, predictions, teacher.config, f"what the teacher says to its {reads}")
    size = teacher.config.teacher.batch_size
    write_cost(
        teacher.folder,
        parameters=read_json(teacher.folder / "training.json")["parameters"],
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
        _write_order_effect(teacher, material, line_orders, config.seed)
    return teacher.folder


def _cache(teacher: TrainedTeacher, material: Material, learned: Studies, world: World) -> np.ndarray:
    """Leave the soft labels in the run's folder; returns the validation studies' logits."""
    import numpy as np

    from mlx_cxr.core.labels import SCORING_PROTOCOLS
    from mlx_cxr.data.soft_label_writer import SoftLabelWriter
    from mlx_cxr.evaluation.calibration import fit_temperatures

    rows = np.flatnonzero((learned.frame["split"] == "validate").to_numpy())
    protocol = SCORING_PROTOCOLS[teacher.protocol]
    with SoftLabelWriter.open(
        teacher.folder,
        learned.study_ids,
        learned.frame["split"].tolist(),
        teacher.header(material),
        None if teacher.config.teacher.modality == "text" else teacher.base.hidden_size,
    ) as writer:
        _fill(writer, teacher, material, learned, world)
        logits = writer.logits[rows]
        calibration = fit_temperatures(logits, protocol.apply(learned.raw_labels[rows]))
        tokens = {
            "tokens": int(learned.lengths().sum()),
            "tokens_one_by_one": sum(map(teacher.form.tokens_one_by_one, learned.prompts)),
        }
        writer.finish(calibration.temperatures, **learned.counts, **tokens)
    log.info(
        "soft labels of %d studies (%d skipped for want of text, %d cut) in %s",
        len(learned),
        learned.counts["without_text"],
        learned.counts["cut"],
        teacher.folder,
    )
    log.info(
        "%s tokens, one pass per study; a prompt per finding would have taken %.1f times as many",
        f"{tokens['tokens']:,}",
        tokens["tokens_one_by_one"] / tokens["tokens"],
    )
    return logits


def _fill(
    writer: SoftLabelWriter | None, teacher: TrainedTeacher, material: Material, studies: Studies, world: World
) -> None:
    """Answer what is not answered yet, each rank its share; rank 0 has the writer."""
    import numpy as np

    from mlx_cxr.data.soft_labels import SPLITS
    from mlx_cxr.teacher.scoring import Collector, own_rows, score

    todo = np.isin(np.arange(len(studies)), world.agree(lambda: writer.todo.tolist()))
    if not todo.all():
        log.info("going on: %d of %d studies are done", len(studies) - todo.sum(), len(studies))
    section = teacher.config.teacher
    keeps_features = section.modality != "text"
    # A split at a time, as fine-tuning has stored the images' embeddings.
    for split in SPLITS:
        rows = np.flatnonzero((studies.frame["split"] == split).to_numpy())
        if not todo[rows].any():
            continue
        part = studies.of_split(split)
        with world.one_after_another():
            images = material.images(teacher.base, part, teacher.config)

        def put(batch: np.ndarray, logits: np.ndarray, features: np.ndarray, rows: np.ndarray = rows) -> None:
            writer.put(rows[batch], logits, features if keeps_features else None)

        collector = Collector(put, section.batch_size, teacher.base.hidden_size, world)
        mine = own_rows(part.prompts, section.batch_size, world)
        score(teacher.base, teacher.form, part.prompts, images, section, collector, todo[rows] & mine)
        collector.finish()


def _answers(teacher: TrainedTeacher, material: Material, studies: Studies, world: World) -> Answers:
    from mlx_cxr.teacher.scoring import shared_score

    with world.one_after_another():
        images = material.images(teacher.base, studies, teacher.config)
    return shared_score(teacher.base, teacher.form, studies.prompts, images, teacher.config.teacher, world)


def _write_order_effect(teacher: TrainedTeacher, material: Material, orders: int, seed: int) -> None:
    from mlx_cxr.teacher.prompt_order import order_effect

    effect = order_effect(teacher.base, teacher.config, material, orders=orders, seed=seed).summary()
    write_json(teacher.folder / "order_effect.json", {**effect, "split": "validate"})
    log.info(
        "under %d other orders of the lines: validation macro AUC %.3f to %.3f (usual order: %.3f), logits move by "
        "%.2f on average",
        orders,
        *(effect["macro_auc"][key] for key in ("least", "largest", "usual")),
        effect["mean_abs_logit_shift"],
    )


def _predictions(studies: Studies, logits: np.ndarray) -> Predictions:
    from mlx_cxr.evaluation.predictions import study_level

    return study_level(studies.frame, studies.raw_labels, logits)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("cache_teacher_outputs", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--teacher_run", help="folder under outputs/; default: teacher.run_name of the configuration")
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
