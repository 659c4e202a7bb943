"""Store what the teacher says: `python -m mlx_cxr.cache_teacher_outputs --config configs/demo.yaml`.

Writes into the teacher's run: its soft labels of the training and validation studies, for a student to learn from
(`teacher_soft_labels.npy`, `teacher_study_ids.json`), and, kept apart from them, its predictions of validation and test
with tables and plots, for the comparison; with `--zero_shot` also those of the base without the adapter, in
`zero_shot/`, and with `--line_orders` how much the order of the prompt's lines matters (`order_effect.json`).
Killed, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_cxr import runtime
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.data.soft_label_writer import SoftLabelWriter
from mlx_cxr.data.soft_labels import SPLITS
from mlx_cxr.errors import readable_errors
from mlx_cxr.evaluation.calibration import fit_temperatures
from mlx_cxr.evaluation.predictions import Predictions, join, study_level
from mlx_cxr.labels import SCORING_PROTOCOLS
from mlx_cxr.runs import provenance, read_json, write_json
from mlx_cxr.scoring_report import write_cost, write_scores
from mlx_cxr.teacher.lora import WEIGHTS, adapters_off
from mlx_cxr.teacher.order import order_effect
from mlx_cxr.teacher.scoring import Answers, score
from mlx_cxr.teacher.studies import Studies
from mlx_cxr.teacher.trained import ADAPTER, Material, TrainedTeacher

log = logging.getLogger("mlx_cxr")


def run(config: Config, teacher_run: str | None = None, zero_shot: bool = False, line_orders: int = 0) -> Path:
    """Cache a teacher's answers, and return its run's folder.

    Args:
        config: the experiment; manifest, reports and films must be those that the teacher was trained on.
        teacher_run: folder under `outputs`; None takes `teacher.run_name`.
        zero_shot: score validation and test without the adapter too.
        line_orders: ask the validation studies under so many other orders of the 14 lines too.

    Raises:
        RunFormatError: there is no such run, or it was trained for something else.
        AdapterError: its adapter is missing or does not fit.
        DataError: a file is missing, or no study can be read.
        SoftLabelError: an answer is not finite, or another process writes there.
    """
    device = runtime.start("cache_teacher_outputs")
    teacher = TrainedTeacher.open(config.run_dir(teacher_run or config.teacher.run_name))
    material = Material.open(teacher.config)
    teacher.check(config, material)
    learned, test = (
        material.studies(teacher.config, teacher.form, *splits) for splits in (("train", "validate"), ("test",))
    )
    protocol = SCORING_PROTOCOLS[teacher.protocol]

    rows = np.flatnonzero((learned.frame["split"] == "validate").to_numpy())
    with SoftLabelWriter.open(
        teacher.folder,
        learned.study_ids,
        learned.frame["split"].tolist(),
        teacher.header(material),
        None if teacher.config.teacher.modality == "text" else teacher.base.hidden_size,
    ) as writer:
        _fill(writer, teacher, material, learned)
        logits = writer.logits
        calibration = fit_temperatures(logits[rows], protocol.apply(learned.raw_labels[rows]))
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

    answers = _answers(teacher, material, test)
    validation = _predictions(learned.of_split("validate"), logits[rows])
    inputs = {**material.inputs(teacher.config), "adapter": teacher.folder / ADAPTER / WEIGHTS}
    record = provenance("cache_teacher_outputs", config.plain(), inputs, device)
    predictions = join(validation, _predictions(test, answers.logits))
    score_of = f"what the teacher says to its {teacher.record['reads']}"
    write_scores(teacher.folder, predictions, teacher.protocol, material.manifest, teacher.config, record, score_of)
    size = teacher.config.teacher.batch_size
    write_cost(
        teacher.folder,
        parameters=read_json(teacher.folder / "training.json")["parameters"],
        ms_per_sample=1000 * answers.seconds / len(test),
        samples=len(test),
        batch_size=size,
        what=f"one study ({teacher.record['reads']}), {answers.tokens / len(test):.0f} tokens on average, "
        f"forward pass, batch {size}",
        device=device,
    )
    if line_orders:
        effect = order_effect(teacher.base, teacher.config, material, orders=line_orders, seed=config.seed).summary()
        write_json(teacher.folder / "order_effect.json", {**effect, "split": "validate"})
        log.info(
            "under %d other orders of the lines: validation macro AUC %.3f to %.3f (usual order: %.3f), logits move by "
            "%.2f on average",
            line_orders,
            *(effect["macro_auc"][key] for key in ("least", "largest", "usual")),
            effect["mean_abs_logit_shift"],
        )
    if zero_shot:
        _score_zero_shot(teacher, material, learned.of_split("validate"), test, config, record)
    return teacher.folder


def _score_zero_shot(
    teacher: TrainedTeacher,
    material: Material,
    validation: Studies,
    test: Studies,
    config: Config,
    record: Mapping[str, Any],
) -> None:
    with adapters_off(teacher.base.model):
        parts = [_predictions(part, _answers(teacher, material, part).logits) for part in (validation, test)]
    write_scores(
        teacher.folder / "zero_shot",
        join(*parts),
        teacher.protocol,
        material.manifest,
        config,
        record,
        f"what the base says to its {teacher.record['reads']}, without the adapter",
    )


def _fill(writer: SoftLabelWriter, teacher: TrainedTeacher, material: Material, studies: Studies) -> None:
    todo = np.isin(np.arange(len(studies)), writer.todo)
    if not todo.all():
        log.info("going on: %d of %d studies are done", len(studies) - todo.sum(), len(studies))
    keeps_features = teacher.config.teacher.modality != "text"
    # A split at a time, as fine-tuning has stored the films' embeddings.
    for split in SPLITS:
        rows = np.flatnonzero((studies.frame["split"] == split).to_numpy())
        if not todo[rows].any():
            continue
        part = studies.of_split(split)
        score(
            teacher.base,
            teacher.form,
            part.prompts,
            material.films(teacher.base, part, teacher.config),
            teacher.config.teacher,
            lambda batch, logits, features, rows=rows: writer.put(
                rows[batch], logits, features if keeps_features else None
            ),
            todo[rows],
        )


def _answers(teacher: TrainedTeacher, material: Material, studies: Studies) -> Answers:
    films = material.films(teacher.base, studies, teacher.config)
    return score(teacher.base, teacher.form, studies.prompts, films, teacher.config.teacher)


def _predictions(studies: Studies, logits: np.ndarray) -> Predictions:
    return study_level(studies.frame, studies.raw_labels, logits)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_cxr.cache_teacher_outputs", description=__doc__.splitlines()[0]
    )
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
    args = build_parser().parse_args(argv)
    with readable_errors():
        run(load_config(args.config, args.overrides), args.teacher_run, args.zero_shot, args.line_orders)


if __name__ == "__main__":
    main()
