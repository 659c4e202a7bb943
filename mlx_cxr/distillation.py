"""Train a student by soft labels: `python -m mlx_cxr.distillation --config configs/demo.yaml --run_name student_v1`.

The student is the ResNet-18 of `model`; the teacher's soft labels are those that `cache_teacher_outputs` left in the
teacher's run. Writes `outputs/<run>/` as `train_cnn` does: `config.json` first, then `metrics.jsonl`,
`best_student.safetensors`, `last/` and `training.json` with how it ended and how the soft labels agree with the hard.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import sha256_file
from mlx_cxr.core.stage import add_config_arguments, add_training_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config
    from mlx_cxr.core.config_schema import ModelConfig


@claims(lambda config, run_name=None, *_, **__: config.run_dir(run_name or config.distillation.run_name))
def run(config: Config, run_name: str | None = None, resume: bool = False, overwrite: bool = False) -> Path:
    """Train a student, and return the run's folder.

    Args:
        config: the experiment; its manifest and pixel store must be there, and the soft labels in the run
            `teacher.run_name` unless `distillation.targets` is `hard`.
        run_name: folder under `outputs`; None takes `distillation.run_name`.
        resume: resume a run that was stopped; one that saved nothing yet begins anew.
        overwrite: replace a run of that name.

    Raises:
        RunExistsError: the run is there, and neither `resume` nor `overwrite` is given.
        RecordError: the run to resume was made with other data or settings, or the CNN to start from with others.
        SoftLabelError: soft labels missing, of another manifest or label policy, or of test studies.
        UserError: the student would replace a run that it reads.
        DataError, TrainingDataError, TrainingDivergedError: as `train_cnn`.
    """
    import numpy as np

    from mlx_cxr.models.convert import save_model
    from mlx_cxr.models.resnet import parameter_counts
    from mlx_cxr.training import classifier_run
    from mlx_cxr.training.classifier_task import TrainingData, classifier_task
    from mlx_cxr.training.distributed import World
    from mlx_cxr.training.preprocessing import preprocessing_record
    from mlx_cxr.training.student import FeatureStudent, loss_and_targets, training_of_student
    from mlx_cxr.training.student_soft_labels import read_student_soft_labels

    machine, world = device.start("distillation", parallel=True), World.join()
    settings = config.distillation
    run_dir = config.run_dir(settings.run_name if run_name is None else run_name)
    _refuse_to_replace_what_is_read(config, run_dir)
    resume_state = classifier_run.can_resume(run_dir, resume, overwrite, world)
    cohort, train_data, validation = classifier_run.open_images(config)
    inputs: dict[str, Path] = {}
    soft = None
    if settings.targets == "hard":
        train_data = train_data.labelled()
    hard = np.where(
        np.isnan(train_data.raw_labels).all(axis=1, keepdims=True),
        np.float32(np.nan),
        config.labels.policy().apply(train_data.raw_labels),
    )
    if settings.targets != "hard":
        soft, inputs = read_student_soft_labels(config, cohort.manifest, train_data.frame["study_id"].tolist(), hard)
        # An image without a label and without a report has nothing to be learned from.
        learned = np.flatnonzero(~(np.isnan(hard) & np.isnan(soft.logits)).all(axis=1))
        train_data, hard, soft = train_data.taken(learned), hard[learned], soft.taken(learned)
    validate = classifier_run.validator(validation, config.evaluation.batch_size, world)
    section = initial_section(config)
    if settings.init == "cnn":
        inputs["initial_weights"] = Path(section.weights)
    student, origin, weights = classifier_run.initial_network(config, section, hard)
    classifier_run.begin(config, run_dir, "distillation", inputs, machine, resume_state, world)

    training = training_of_student(config)
    model, keeps_features = student, soft is not None and soft.features is not None
    if keeps_features:
        model = FeatureStudent(student, soft.features.shape[1], config.seed)
    loss, targets = loss_and_targets(settings, hard, soft, weights, world)
    task = classifier_task(
        model,
        loss,
        TrainingData(train_data.images, targets),
        lambda trained: validate(trained.student if keeps_features else trained),
        training=training,
        augmentation=config.augment,
        seed=config.seed,
        best_name="best_student.safetensors",
        keep=lambda path: save_model(path, student),
        world=world,
    )
    if settings.learning_rate is not None:
        task = replace(task, remedy=task.remedy.replace("training.learning_rate", "distillation.learning_rate"))
    classifier_run.fit(
        task,
        training,
        seed=config.seed,
        run_dir=run_dir,
        settings=classifier_run.settings_hash(
            config,
            training,
            cohort.manifest.sha256,
            distillation=settings.model_dump(mode="json", exclude={"run_name"}),
            inputs={role: sha256_file(path) for role, path in inputs.items()},
        ),
        resume=resume_state,
        summary={
            "parameters": parameter_counts(student),
            "initial_weights": origin,
            "preprocessing": preprocessing_record(config),
            "synthetic": config.data.synthetic,
            "soft_labels": None if soft is None else soft.summary,
        },
    )
    return run_dir


def initial_section(config: Config) -> ModelConfig:
    """The model section, with the weights of the CNN run `run_name` where the student starts from it.

    Raises:
        RecordError: there is no such run, or it was trained for something else.
    """
    from mlx_cxr.inference.trained_run import TrainedRun

    if config.distillation.init == "model":
        return config.model
    trained = TrainedRun.open(config.run_dir())
    trained.check(config)
    return config.model.model_copy(update={"weights": str(trained.checkpoint)})


def _refuse_to_replace_what_is_read(config: Config, run_dir: Path) -> None:
    read = {} if config.distillation.targets == "hard" else {"teacher": config.run_dir(config.soft_labels_run)}
    read |= {"CNN": config.run_dir()} if config.distillation.init == "cnn" else {}
    for what, folder in read.items():
        if folder == run_dir:
            raise UserError(f"{run_dir} is the {what}'s run, which the student learns from; choose another --run_name")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("distillation", __doc__)
    add_config_arguments(parser)
    add_training_arguments(parser, "distillation.run_name")
    parser.add_argument("--teacher_run", help="the teacher's folder under outputs/; default: teacher.run_name")
    parser.add_argument("--cnn_run", help="the CNN's, for distillation.init: cnn; default: run_name")
    parser.add_argument(
        "--targets", choices=("teacher", "words", "hard", "smoothed", "shuffled"), help="what takes the teacher's place"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        config = configuration(
            args,
            seed=args.seed,
            run_name=args.cnn_run,
            teacher__run_name=args.teacher_run,
            distillation__targets=args.targets,
        )
        run(config, args.run_name, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
