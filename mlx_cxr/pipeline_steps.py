"""The stages of an experiment in order, each with what it reads, leaves and depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr import (
    bag_of_words,
    build_manifest,
    cache_teacher_outputs,
    compare_models,
    distillation,
    evaluate_cnn,
    explain_report,
    failure_analysis,
    lfm_finetune,
    make_demo_data,
    make_tiny_teacher,
    prepare_images,
    train_cnn,
)
from mlx_cxr.core.runs import bag_of_words_name

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config

_PIXELS = ("pixels.size", "pixels.fit")
"""What of the pixel store decides what is learned; not how it is made and kept."""
_SCORES = ("predictions.csv", "operating_points.json", "test_results.json")


@dataclass(frozen=True)
class Step:
    """A stage as the pipeline sees it.

    Attributes:
        name: the stage, with `@run` where it is there more than once.
        run: does it; is told whether to resume a stopped run.
        settings: configuration keys it reads: sections, or keys of one as `section.key`.
        inputs: files it reads; looked for when its turn comes.
        outputs: files it leaves; called when they are looked for, where only the stage decides which.
        folder: where it writes (the small base: where its data are from), and where the ledger lies that says so.
        trains: whether it makes a run of its own, that may be resumed and is not replaced unasked.
        looks: whether it reads images or reports of the source, which `inputs` do not tell.
    """

    name: str
    run: Callable[[bool], Any]
    settings: tuple[str, ...]
    inputs: Callable[[], list[Path]]
    outputs: tuple[Path, ...] | Callable[[], Sequence[Path]]
    folder: Path
    trains: bool = False
    looks: bool = False

    @property
    def left(self) -> Sequence[Path]:
        """The files that it leaves."""
        return self.outputs() if callable(self.outputs) else self.outputs


def steps(config: Config, overwrite: bool = False) -> list[Step]:
    """The stages of an experiment, in order; the synthetic cohort is made only where the data are synthetic.

    Args:
        overwrite: let a cohort, manifest or small base be replaced that runs were trained on.
    """
    from mlx_cxr.data.pixel_store import store_files

    data = config.sample_dir
    chain = [
        Step(
            "build_manifest",
            lambda _: build_manifest.run(config, overwrite=overwrite),
            ("seed", "data"),
            lambda: build_manifest.source_tables(config),
            (config.manifest_path, config.splits_path, *(_reports(config) if config.pipeline.teacher else [])),
            data,
            looks=True,
        ),
        Step(
            "prepare_images",
            lambda _: prepare_images.run(config),
            ("pixels",),
            lambda: [config.manifest_path],
            lambda: store_files(config.pixels_path),
            data,
            looks=True,
        ),
        Step(
            "train_cnn",
            lambda resume: train_cnn.run(config, resume=resume, overwrite=not resume),
            ("seed", "labels", "model", "augment", "training", *_PIXELS),
            lambda: _images(config),
            (config.run_dir() / "best_model.safetensors", config.run_dir() / "training.json"),
            config.run_dir(),
            trains=True,
        ),
        _evaluation("evaluate_cnn", config, config.run_name, "best_model.safetensors"),
    ]
    if config.data.synthetic:
        tables = config.data.root / "mimic-cxr-2.0.0-metadata.csv.gz"
        # A cohort of an older version of the code gives way to this one's.
        demo = Step(
            "make_demo_data",
            lambda _: make_demo_data.run(config, overwrite=overwrite),
            ("seed", "demo"),
            list,
            (tables,),
            data,
        )
        chain.insert(0, demo)
    return [*chain, *_teacher_steps(config, overwrite)] if config.pipeline.teacher else chain


def _teacher_steps(config: Config, overwrite: bool) -> list[Step]:
    """Teacher, student, controls, comparison and failure analysis."""
    chain = [_tiny_base(config, overwrite)] if config.teacher.tiny is not None else []
    chain += _taught(config, "")
    words = [bag_of_words_name(config.teacher.run_name)] if config.teacher.modality != "image" else []
    chain += [_word_counts(config, name) for name in words]
    student = config.distillation.run_name
    chain += _student(config, student, "")
    for targets in config.comparison.controls:
        name = compare_models.control_run_name(student, targets)
        section = config.distillation.model_copy(update={"targets": targets, "run_name": name})
        chain += _student(config.model_copy(update={"distillation": section}), name, f"@{name}")
    graded = {graded_run_name(config.teacher.run_name, sections): sections for sections in config.comparison.graded}
    for name, sections in graded.items():
        section = config.teacher.model_copy(update={"sections": sections, "run_name": name})
        chain += _taught(config.model_copy(update={"teacher": section}), f"@{name}")
    controls = [compare_models.control_run_name(student, targets) for targets in config.comparison.controls]
    compared = [config.run_name, config.teacher.run_name, student, *controls, *graded, *words]
    folder = compare_models.comparison_dir(config)
    failures = config.run_dir(student) / "failure_analysis"
    chain += [
        Step(
            "compare_models",
            lambda _: compare_models.run(config, graded_teacher_runs=list(graded)),
            ("seed", "evaluation", "comparison"),
            lambda: [config.run_dir(name) / file for name in compared for file in _SCORES],
            tuple(folder / f"final_comparison.{kind}" for kind in ("json", "csv", "md")),
            folder,
        ),
        Step(
            "failure_analysis",
            lambda _: failure_analysis.run(config),
            ("seed", "evaluation", "failure"),
            lambda: [config.run_dir(name) / "predictions.csv" for name in compared[:3]],
            (failures / "summary.md", failures / "failures.csv"),
            failures,
        ),
    ]
    if config.teacher.modality != "image":
        words = config.run_dir(config.teacher.run_name) / explain_report.FOLDER
        chain.append(
            Step(
                "explain_report",
                lambda _: explain_report.run(config),
                ("seed",),
                lambda: [config.run_dir(config.teacher.run_name) / file for file in _SCORES],
                (words / "index.html", words / "explanations.json"),
                words,
            )
        )
    return chain


def _tiny_base(config: Config, overwrite: bool) -> Step:
    folder = Path(config.teacher.base)
    return Step(
        "make_tiny_teacher",
        lambda _: make_tiny_teacher.run(config, overwrite),
        ("seed", "teacher.base", "teacher.tiny"),
        lambda: [config.manifest_path, config.reports_path],
        (folder / "model.safetensors", folder / "config.json"),
        config.sample_dir,
    )


def _taught(config: Config, suffix: str) -> list[Step]:
    """A teacher, and what it says of the cohort."""
    from mlx_cxr.data.pixel_store import store_files
    from mlx_cxr.data.soft_labels import INDEX_NAME, LOGITS_NAME

    folder = config.run_dir(config.teacher.run_name)
    adapter = folder / "adapter_weights" / "adapters.safetensors"

    def read() -> list[Path]:
        read = [config.manifest_path, *_reports(config)]
        if config.teacher.modality != "text":
            read += store_files(config.pixels_path)[1:]
        base = Path(config.teacher.base)
        return [*read, *sorted(base.glob("*.safetensors"))] if base.is_dir() else read

    return [
        Step(
            f"lfm_finetune{suffix}",
            lambda resume: lfm_finetune.run(config, resume=resume, overwrite=not resume),
            ("seed", "labels", "teacher"),
            read,
            (adapter, folder / "training.json"),
            folder,
            trains=True,
        ),
        Step(
            f"cache_teacher_outputs{suffix}",
            lambda _: cache_teacher_outputs.run(config),
            ("seed", "evaluation", "labels"),
            lambda: [*read(), adapter],
            tuple(folder / name for name in (LOGITS_NAME, INDEX_NAME, *_SCORES)),
            folder,
        ),
    ]


def _word_counts(config: Config, name: str) -> Step:
    from mlx_cxr.data.soft_labels import INDEX_NAME, LOGITS_NAME

    folder = config.run_dir(name)
    return Step(
        "bag_of_words",
        lambda _: bag_of_words.run(config, overwrite=True),
        ("seed", "evaluation", "labels", "teacher"),
        lambda: [config.manifest_path, config.reports_path],
        tuple(folder / file for file in ("bag_of_words.npz", LOGITS_NAME, INDEX_NAME, *_SCORES)),
        folder,
    )


def _student(config: Config, name: str, suffix: str) -> list[Step]:
    """A student and its evaluation; a control is scored, and not explained."""
    from mlx_cxr.data.soft_labels import INDEX_NAME, LOGITS_NAME

    folder, weights = config.run_dir(name), "best_student.safetensors"

    def read() -> list[Path]:
        read = _images(config)
        if config.distillation.targets != "hard":
            read += [config.run_dir(config.soft_labels_run) / file for file in (LOGITS_NAME, INDEX_NAME)]
        if config.distillation.init == "cnn":
            read.append(config.run_dir() / "best_model.safetensors")
        return read

    return [
        Step(
            f"distillation{suffix}",
            lambda resume: distillation.run(config, name, resume=resume, overwrite=not resume),
            ("seed", "labels", "model", "augment", "training", *_PIXELS, "distillation"),
            read,
            (folder / weights, folder / "training.json"),
            folder,
            trains=True,
        ),
        _evaluation(f"evaluate_cnn@{name}", config, name, weights, maps=not suffix),
    ]


def _evaluation(title: str, config: Config, name: str, weights: str, maps: bool = True) -> Step:
    folder = config.run_dir(name)
    return Step(
        title,
        lambda _: evaluate_cnn.run(config, name, maps=maps),
        ("seed", "evaluation", "explain"),
        lambda: [*_images(config), folder / weights],
        tuple(folder / file for file in (*_SCORES, "inference.json", *(["findings.md"] if maps else []))),
        folder,
    )


def graded_run_name(teacher_run: str, sections: Sequence[str]) -> str:
    """The run of a teacher in `comparison.graded`, such as `lora_teacher_phase1_reads_indication`."""
    return f"{teacher_run}_reads_{'_'.join(sections)}"


def _reports(config: Config) -> list[Path]:
    """Report files that a teacher reads: none, where it looks at images only."""
    return [] if config.teacher.modality == "image" else [config.reports_path]


def _images(config: Config) -> list[Path]:
    """Manifest and pixels; not the index, which changes with the dates of the image files too."""
    from mlx_cxr.data.pixel_store import store_files

    return [config.manifest_path, *store_files(config.pixels_path)[1:]]
