"""Soft labels and predictions of a trained teacher, asked study by study, each rank its share."""

from __future__ import annotations

import logging

import numpy as np

from mlx_cxr.core.files import write_record
from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.data.soft_label_writer import SoftLabelWriter
from mlx_cxr.data.soft_labels import SPLITS
from mlx_cxr.evaluation.calibration import fit_temperatures
from mlx_cxr.evaluation.predictions import Predictions, study_level
from mlx_cxr.teacher.dataset import Studies
from mlx_cxr.teacher.prompt_order import order_effect
from mlx_cxr.teacher.scoring import Answers, Collector, own_rows, score, shared_score
from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher
from mlx_cxr.training.distributed import World

log = logging.getLogger("mlx_cxr")


def cache_soft_labels(teacher: TrainedTeacher, material: Material, learned: Studies, world: World) -> np.ndarray | None:
    """Leave the soft labels of the training and validation studies in the teacher's run, resuming a stopped cache.

    Args:
        teacher: who answers.
        material: what it reads.
        learned: the studies of both splits.
        world: the processes of the run.

    Returns:
        Logits of the validation studies, float32 (V, 14); None on the ranks that do not write.

    Raises:
        SoftLabelError: an answer is not finite, or another process writes there.
    """
    if not world.writes:
        return _fill(None, teacher, material, learned, world)
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


def answers_of(teacher: TrainedTeacher, material: Material, studies: Studies, world: World) -> Answers:
    """A teacher's answers for studies, on every rank; their images are embedded first, by one rank after another."""
    with world.one_after_another():
        images = material.images(teacher.base, studies, teacher.config)
    return shared_score(teacher.base, teacher.form, studies.prompts, images, teacher.config.teacher, world)


def write_order_effect(teacher: TrainedTeacher, material: Material, orders: int, seed: int) -> None:
    """Write `order_effect.json`: the validation studies under so many other orders of the prompt's 14 lines."""
    effect = order_effect(teacher.base, teacher.config, material, orders=orders, seed=seed).summary()
    write_record(teacher.folder / "order_effect.json", {**effect, "split": "validate"})
    log.info(
        "under %d other orders of the lines: validation macro AUC %.3f to %.3f (usual order: %.3f), logits move by "
        "%.2f on average",
        orders,
        *(effect["macro_auc"][key] for key in ("least", "largest", "usual")),
        effect["mean_abs_logit_shift"],
    )


def predictions_of(studies: Studies, logits: np.ndarray) -> Predictions:
    """Predictions of studies, from a teacher's logits (N, 14) of them."""
    return study_level(studies.frame, studies.raw_labels, logits)
