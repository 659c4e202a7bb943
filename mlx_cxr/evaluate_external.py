"""Score a frozen run on another cohort: `python -m mlx_cxr.evaluate_external --run RUN --config OTHER.yaml`.

The run is a CNN's or student's (films), a teacher's or a bag of words (reports); the configuration is the other
cohort's, after `build_manifest` and `prepare_images`. Nothing is fitted there. Writes into
`outputs/<run>/external/<name of the configuration>/`: `external_results.json`, `external.md` with the run's own figures
beside, `predictions.csv`, and `localization.json` where that cohort has boxes or masks of the findings. `compare_models
--cohort` sets runs side by side there. A run that was never seen outside its own cohort says so in its model card.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import read_record, sha256_file, write_record, write_text
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.runs import RunRecord, open_run, provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    import pandas as pd

    from mlx_cxr.core.config import Config
    from mlx_cxr.data.manifest import Manifest
    from mlx_cxr.data.places import Places
    from mlx_cxr.evaluation.external import Shift
    from mlx_cxr.evaluation.operating_points import OperatingPoints
    from mlx_cxr.evaluation.predictions import Predictions
    from mlx_cxr.training.cohort import SplitData

log = logging.getLogger("mlx_cxr")

SPLITS = ("all", "train", "validate", "test")


def folder_of(run_dir: str | Path, config: Config) -> Path:
    """The folder of this cohort in the run's folder."""
    return Path(run_dir) / "external" / config.name


@claims(lambda run_dir, config, *_, **__: folder_of(run_dir, config))
def run(run_dir: str | Path, config: Config, split: str = "all") -> Path:
    """Score the run on the configuration's cohort, and return the folder of the results.

    Args:
        run_dir: an evaluated run's folder.
        config: the other cohort's; `data`, `pixels.workers`, `evaluation` and `seed` are used.
        split: of `SPLITS`.

    Raises:
        UserError: the cohort is the run's own, or an unknown split.
        RecordError: there is no such run, or it is not evaluated.
        DataError: manifest, pixels or reports are missing, or were made for another transform; no study is left; no
            finding is present and absent in both cohorts; or boxes or masks cannot be used.
    """
    from mlx_cxr.core.config import config_from_plain
    from mlx_cxr.core.labels import SCORING_PROTOCOLS
    from mlx_cxr.data.manifest import check_patient_splits, load_manifest
    from mlx_cxr.data.places import Places
    from mlx_cxr.data.tables import DataError
    from mlx_cxr.evaluation import external
    from mlx_cxr.evaluation.abstention import abstention_section
    from mlx_cxr.evaluation.bootstrap import LEVEL, patient_resamples
    from mlx_cxr.evaluation.operating_points import FILE, read_operating_points
    from mlx_cxr.evaluation.predictions import read_predictions, write_predictions
    from mlx_cxr.evaluation.results import protocol_section, score_protocol
    from mlx_cxr.pages.external_page import external_markdown, statement

    if split not in SPLITS:
        raise UserError(f"--split {split}: one of {', '.join(SPLITS)}")
    machine, trained = device.start("evaluate_external"), open_run(run_dir, finished=True)
    own_config = config_from_plain(trained.config, trained.path)
    manifest = load_manifest(config.manifest_path)
    check_patient_splits(manifest.frame)
    if manifest.sha256 == trained.inputs["manifest"]["sha256"]:
        raise UserError(f"{config.manifest_path} is the run's own manifest; give the configuration of another cohort")
    # What is not the same as in training would not be this run's answer.
    config = config.model_copy(
        update={
            "pixels": config.pixels.model_copy(
                update={
                    "size": own_config.pixels.size,
                    "fit": own_config.pixels.fit,
                    "dicom_recipe": own_config.dicom_recipe,
                }
            ),
            "teacher": own_config.teacher,
            "labels": own_config.labels,
        }
    )
    points = read_operating_points(trained.folder / FILE)[0]
    own = read_predictions(trained.folder / "predictions.csv").predictions
    own_results = read_record(trained.folder / "test_results.json")

    places = (
        Places.of(config.data, manifest.frame["path"].tolist())
        if trained.kind not in ("teacher", "bag of words")
        else None
    )
    scored, score, data = _answers(trained, config, manifest, split)
    images = None if data is None else data.frame
    known = _own_patients(trained, own_config)
    shared = None if known is None else set(scored.patient_ids.tolist()) & known
    if shared:
        log.warning(
            "%d patients have ids that the run's own cohort has too, such as %r; they are left out. If they are other "
            "people, give this cohort's ids a prefix",
            len(shared),
            min(shared),
        )
        scored = scored.select(~_among(scored.patient_ids, shared))
    if not len(scored):
        raise DataError(f"{config.manifest_path}: no study of {split} is left to score")

    samples, bins, seed = config.evaluation.bootstrap_samples, config.evaluation.calibration_bins, config.seed
    resamples = patient_resamples(scored.patient_ids, samples, seed)
    compared = external.against_own(own.of_split("test"), scored, points, samples, seed)
    results = {
        "schema": external.SCHEMA,
        "run": trained.folder.name,
        "kind": trained.kind,
        "cohort": config.name,
        "split": split,
        "synthetic": config.data.synthetic or own_config.data.synthetic,
        "notice": footer(config.data.synthetic or own_config.data.synthetic),
        "score": score,
        "counts": {
            "studies": len(scored),
            "patients": len(set(scored.patient_ids.tolist())),
            "shared_patients": None if shared is None else len(shared),
        },
        "objections": _objections(config, images),
        "bootstrap": {"unit": "patient", "samples": samples, "seed": seed, "level": LEVEL},
        "against_own": compared,
        "protocols": {
            name: protocol_section(score_protocol(scored, name, points, resamples), bins) for name in SCORING_PROTOCOLS
        },
        "abstention": abstention_section(own.of_split("validate"), scored, points, resamples),
        "exposure_only": own_results["exposure_only"],
        "shift": None
        if images is None or known is None
        else _shift(trained, own_config, config, manifest, own, scored),
        "provenance": provenance(
            "evaluate_external",
            config.plain(),
            {
                "manifest": config.manifest_path,
                "weights": trained.weights,
                "operating_points": trained.folder / FILE,
                "own_results": trained.folder / "test_results.json",
            },
            machine,
        ),
    }
    folder = folder_of(run_dir, config)
    table = None if places is None else _localization(trained, config, data, places, scored, points)
    if table is None:
        (folder / "localization.json").unlink(missing_ok=True)
    else:
        write_record(folder / "localization.json", table)
    write_predictions(folder / "predictions.csv", scored, points)
    write_record(folder / external.FILE, results)
    page = write_text(folder / "external.md", external_markdown(results, table))
    log.info("%s", " ".join(statement(results)).replace("**", ""))
    log.info("tables in %s. %s", page, results["notice"])
    return folder


def _answers(
    trained: RunRecord, config: Config, manifest: Manifest, split: str
) -> tuple[Predictions, str, SplitData | None]:
    """The run's answers for the studies of a split, in words what a study's score is, and the images scored, if any."""
    import numpy as np

    from mlx_cxr.data.tables import DataError
    from mlx_cxr.evaluation.predictions import study_level
    from mlx_cxr.evaluation.results import MEAN_OF_IMAGES

    there = sorted(set(manifest.frame["split"]))
    splits = tuple(there if split == "all" else [split])
    if trained.kind == "bag of words":
        from mlx_cxr.teacher.bag_of_words import BagOfWords
        from mlx_cxr.teacher.dataset import readable
        from mlx_cxr.teacher.teacher_run import Material, what_it_reads

        reports = Material.open(config).reports
        rows, sections, _ = readable(manifest, reports.sections, config.teacher, splits)
        logits = BagOfWords.load(trained.weights).logits([" ".join(text for _, text in pairs) for pairs in sections])
        frame = manifest.frame.iloc[rows].reset_index(drop=True)
        scored, score, images = study_level(frame, manifest.raw_labels[rows], logits), what_it_reads(config), None
        score = f"what a bag of words makes of its {score}"
    elif trained.kind == "teacher":
        from mlx_cxr.teacher.soft_label_cache import answers_of, predictions_of
        from mlx_cxr.teacher.teacher_run import Material, TrainedTeacher, what_it_reads
        from mlx_cxr.training.distributed import ALONE

        teacher, material = TrainedTeacher.open(trained.folder), Material.open(config)
        studies = material.studies(config, teacher.form, *splits)
        scored = predictions_of(studies, answers_of(teacher, material, studies, ALONE).logits)
        score, images = f"what the teacher says to its {what_it_reads(config)}", None
    else:
        from mlx_cxr.inference.trained_run import TrainedRun, study_predictions
        from mlx_cxr.training.cohort import Cohort

        model, pixels = TrainedRun.open(trained.folder).model, config.pixels
        try:
            cohort = Cohort.open(config)
        except DataError as error:
            settings = {"size": pixels.size, "fit": pixels.fit, "dicom_recipe": pixels.dicom_recipe}
            asked = " ".join(f"--set pixels.{key}={value}" for key, value in settings.items())
            raise DataError(f"{error}. What this run sees is made by prepare_images --config … {asked}") from None
        images = cohort.split(*splits)
        if not len(images):
            raise DataError(f"{config.manifest_path}: no films of split {split}")
        scored, score = study_predictions(model, images, config.evaluation.batch_size), MEAN_OF_IMAGES
    return replace(scored, split=np.full(len(scored), "external")), score, images


def _localization(
    trained: RunRecord, config: Config, data: SplitData, places: Places, scored: Predictions, points: OperatingPoints
) -> dict[str, Any] | None:
    """`localization.json` of that cohort; None without an image to score, or where the run has no maps."""
    from mlx_cxr.core.labels import MAPPED
    from mlx_cxr.inference import explanation
    from mlx_cxr.inference.predictor import read_map_fit
    from mlx_cxr.inference.trained_run import TrainedRun

    run = TrainedRun.open(trained.folder)
    fit, method = read_map_fit(run), config.explain.method
    if fit is None:
        log.warning("%s was evaluated without maps, so its maps are not scored by %s", run.folder, places.source)
        return None
    labels = config.explain.labels or MAPPED
    maps = explanation.scaled_maps(run.model, data.images, labels, method, fit, config.evaluation.batch_size)
    return explanation.place_scores(run, maps, fit, data, places, scored, points, config)[1]


def _own_patients(trained: RunRecord, own_config: Config) -> set[str] | None:
    """Ids of the run's own patients; None where its manifest is gone, or another one has its place."""
    from mlx_cxr.data.manifest import load_manifest

    path = own_config.manifest_path
    if not path.exists() or sha256_file(path) != trained.inputs["manifest"]["sha256"]:
        return None
    return set(load_manifest(path).frame["patient_id"].tolist())


def _objections(config: Config, images: pd.DataFrame | None) -> int | None:
    """Images scored that the gate objects to, by the list of `prepare_images`; None for reports."""
    from mlx_cxr.data.tables import read_table

    if images is None:
        return None
    path = config.pixels_path.with_name(f"{config.pixels_path.stem}_objections.csv")
    listed = set(read_table(path, ["image_id"])["image_id"]) if path.exists() else set()
    return len(listed & set(images["image_id"]))


def _shift(
    trained: RunRecord, own_config: Config, config: Config, manifest: Manifest, own: Predictions, scored: Predictions
) -> Shift | None:
    """How the films differ from those of the run's own test split; None where its pixels are gone."""
    import numpy as np

    from mlx_cxr.data.decoding import Transform
    from mlx_cxr.data.manifest import load_manifest
    from mlx_cxr.data.pixel_store import PixelStore
    from mlx_cxr.evaluation.external import cohort_shift
    from mlx_cxr.evaluation.feature_distance import one_of_each
    from mlx_cxr.evaluation.image_statistics import study_statistics
    from mlx_cxr.inference.trained_run import TrainedRun, pooled_features
    from mlx_cxr.training.batches import ImageSource

    try:
        own_manifest = load_manifest(own_config.manifest_path)
        own_store = PixelStore.open(own_config.pixels_path, own_manifest, Transform.of(own_config))
    except UserError as error:
        log.info("the films are not compared with the run's own: %s", error)
        return None
    store = PixelStore.open(config.pixels_path, manifest, Transform.of(config))
    parts = {
        "test": (own_manifest, own_store, own.of_split("test")),
        "external": (manifest, store, scored),
        "validate": (own_manifest, own_store, own.of_split("validate")),
    }
    model, tables, patients, features = TrainedRun.open(trained.folder).model, [], [], {}
    for name, (known, pixels, part) in parts.items():
        films = known.frame[known.frame["study_id"].isin(part.study_ids.tolist())]
        films = films[~films["image_id"].isin(pixels.missing)]
        drawn = films.iloc[one_of_each(films["patient_id"].to_numpy(dtype=str), config.seed)]
        images = ImageSource(pixels.images, pixels.rows(drawn["image_id"]), 0.0)
        features[name] = pooled_features(model, images, config.evaluation.batch_size)
        if name != "validate":
            tables.append(study_statistics(pixels, films))
            of = dict(zip(part.study_ids.tolist(), part.patient_ids.tolist(), strict=True))
            patients += [of[study] for study in tables[-1].index]
    return cohort_shift(*tables, np.array(patients), features, config.seed)


def _among(ids: Any, known: set[str]) -> Any:
    import numpy as np

    return np.array([one in known for one in ids.tolist()])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("evaluate_external", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--run", "--run_name", required=True, metavar="RUN", help="run under outputs/, or its folder")
    parser.add_argument("--split", choices=SPLITS, default="all", help="of the other cohort; default: all of it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        config = configuration(args)
        run(config.run_dir(args.run), config, args.split)


if __name__ == "__main__":
    main()
