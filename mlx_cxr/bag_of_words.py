"""The teacher's control that counts words: `python -m mlx_cxr.bag_of_words --config configs/demo.yaml`.

Fits TF-IDF and a logistic regression per finding on the training reports that the teacher may read, with the strength
that validation chooses, and writes a run beside the teacher's (`<teacher.run_name>_bag_of_words`): the model
(`bag_of_words.npz`), `teacher.json`, its soft labels, from which a student may learn too (`distillation.targets:
words`), and predictions of validation and test with tables and plots. `compare_models` shows
it beside the teacher and says whether the language model is worth its size.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import sha256_file, write_record
from mlx_cxr.core.runs import WEIGHTS, bag_of_words_name, create_run, provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

log = logging.getLogger("mlx_cxr")

STAGE = "bag_of_words"


@claims(lambda config, *_, **__: config.run_dir(bag_of_words_name(config.teacher.run_name)))
def run(config: Config, overwrite: bool = False) -> Path:
    """Fit and score, and return the run's folder.

    Args:
        config: the experiment; what `teacher.sections` may be read.
        overwrite: replace an earlier run.

    Raises:
        UserError: the teacher reads no text, or the reports share no words.
        DataError: a file is missing, they do not belong together, or no study of a split has a report.
        RunExistsError: the run is there and `overwrite` is false.
    """
    import numpy as np

    from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
    from mlx_cxr.data.soft_label_writer import SoftLabelWriter
    from mlx_cxr.data.soft_labels import SPLITS
    from mlx_cxr.evaluation.calibration import fit_temperatures
    from mlx_cxr.evaluation.metrics import macro_auc, roc_auc_per_label
    from mlx_cxr.evaluation.predictions import join, study_level
    from mlx_cxr.evaluation.results import write_scores
    from mlx_cxr.inference.cost import write_cost
    from mlx_cxr.pages.results_page import write_results
    from mlx_cxr.teacher.bag_of_words import BagOfWords
    from mlx_cxr.teacher.dataset import readable
    from mlx_cxr.teacher.teacher_run import Material, what_it_reads

    if config.teacher.modality == "image":
        raise UserError("teacher.modality is image: a bag of words needs reports; set teacher.modality=text")
    machine = device.start(STAGE)
    # Of a teacher that looks at films too, it has the text alone.
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"modality": "text"})})
    material = Material.open(config)
    inputs, protocol = material.inputs(config), f"empty_{config.labels.empty}"
    rows, texts, counts = {}, {}, {}
    for split in ("train", "validate", "test"):
        rows[split], sections, counts[split] = readable(
            material.manifest, material.reports.sections, config.teacher, (split,)
        )
        texts[split] = [" ".join(text for _, text in pairs) for pairs in sections]
    folder = create_run(
        config.outputs,
        bag_of_words_name(config.teacher.run_name),
        stage=STAGE,
        config=config.plain(),
        inputs=inputs,
        device=machine,
        overwrite=overwrite,
    )
    labels = material.manifest.raw_labels
    learned = [row for row in rows["train"] if material.manifest.labelled[row]]
    targets = np.full((len(rows["train"]), len(LABELS)), np.nan, np.float32)
    targets[material.manifest.labelled[rows["train"]]] = config.labels.policy().apply(labels[learned])
    validation = SCORING_PROTOCOLS[protocol].apply(labels[rows["validate"]])
    begun = time.perf_counter()
    try:
        bag = BagOfWords.fit(texts["train"], targets, texts["validate"], validation)
    except ValueError as error:
        raise UserError(
            f"the training reports give no words to count ({error}); look at {config.reports_path}"
        ) from None
    seconds = time.perf_counter() - begun
    bag.save(folder / WEIGHTS[STAGE])

    logits, scored = {}, []
    for split in ("train", "validate", "test"):
        begun = time.perf_counter()
        logits[split] = bag.logits(texts[split])
        took = time.perf_counter() - begun
        if split != "train":
            frame = material.manifest.frame.iloc[rows[split]].reset_index(drop=True)
            scored.append(study_level(frame, labels[rows[split]], logits[split]))
    studies = {name: material.manifest.frame["study_id"].iloc[rows[name]].tolist() for name in SPLITS}
    header = {
        "run": folder.name,
        "weights": sha256_file(folder / WEIGHTS[STAGE]),
        "text": config.teacher.model_dump(mode="json", include={"modality", "sections", "section_mode"}),
        "manifest": material.manifest.sha256,
        "reports": material.reports.sha256,
        "labels": config.plain()["labels"],
    }
    splits = [name for name in SPLITS for _ in studies[name]]
    with SoftLabelWriter.open(folder, [study for name in SPLITS for study in studies[name]], splits, header) as writer:
        writer.put(writer.todo, np.concatenate([logits[name] for name in SPLITS])[writer.todo])
        writer.finish(fit_temperatures(logits["validate"], validation).temperatures)
    auc, reads = macro_auc(roc_auc_per_label(validation, logits["validate"])), what_it_reads(config)
    write_record(
        folder / "teacher.json",
        {
            "schema": 1,
            "modality": "text",
            "reads": reads,
            "studies": counts,
            "terms": len(bag.terms),
            "strength": bag.strength,
            "zero_shot_auc": None,
            "tuned_auc": auc,
        },
    )
    write_record(folder / "training.json", {"schema": 1, "seconds": seconds, "synthetic": config.data.synthetic})
    record = provenance(STAGE, config.plain(), {**inputs, "weights": folder / WEIGHTS[STAGE]}, machine)
    predictions, score_of = join(*scored), f"what a bag of words makes of its {reads}"
    points, results = write_scores(folder, predictions, protocol, material.manifest, config, record, score_of)
    write_results(folder, results, predictions, points)
    size = bag.weights.size + bag.biases.size
    write_cost(
        folder,
        parameters={"total": size, "trainable": size},
        ms_per_sample=1000 * took / len(rows["test"]),
        samples=len(rows["test"]),
        batch_size=len(rows["test"]),
        what=f"one study ({reads}), words counted and weighed on the CPU",
        device=machine,
    )
    log.info(
        "%s: %d reports, %d terms, C = %g; validation macro AUC %.4f", folder, counts["train"]["read"], len(bag.terms),
        bag.strength, auc,
    )  # fmt: skip
    return folder


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser(STAGE, __doc__)
    add_config_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args), args.overwrite)


if __name__ == "__main__":
    main()
