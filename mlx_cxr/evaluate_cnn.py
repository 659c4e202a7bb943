"""Score and explain a trained run: `python -m mlx_cxr.evaluate_cnn --config configs/demo.yaml --run_name demo_cnn`.

The run is a CNN's or a student's. Writes into `outputs/<run>/`, in this order, so that a failure in a later part loses
nothing of an earlier one: `predictions.csv` (validation and test), `operating_points.json`, `test_results.json`,
`results.md`, `roc.png`, `precision_recall.png`, `reliability.png`, `risk_coverage.png`, `cost.json`, `inference.json`,
`map_fit.npz`, `grad_cam/*.png`, `localization.json` (where the cohort has boxes or masks) and `findings.md`. Run again,
it replaces them all, but keeps a `findings.md` that was filled in.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import sha256_file, write_record
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    import numpy as np

    from mlx_cxr.core.config import Config
    from mlx_cxr.data.places import Places
    from mlx_cxr.evaluation.operating_points import OperatingPoints
    from mlx_cxr.evaluation.predictions import Predictions
    from mlx_cxr.inference.map_fit import MapFit
    from mlx_cxr.inference.trained_run import TrainedRun
    from mlx_cxr.training.cohort import SplitData

log = logging.getLogger("mlx_cxr")


@claims(lambda config, run_name=None, *_, **__: config.run_dir(run_name))
def run(config: Config, run_name: str | None = None, maps: bool = True) -> Path:
    """Evaluate a run on the data it was trained for, and return its folder.

    Args:
        config: the experiment; manifest, pixels and model must be those of the run.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.
        maps: draw and test maps too; scores need none.

    Raises:
        RecordError: there is no such run, it is not trained yet, or it was trained for something else.
        DataError: manifest or pixel store missing or not matching, no validation or test images, or boxes or masks
            that cannot be used.
        PredictionsError: the images of a study disagree.
    """
    from mlx_cxr.data.places import Places
    from mlx_cxr.data.tables import DataError
    from mlx_cxr.evaluation.predictions import join
    from mlx_cxr.evaluation.results import write_scores
    from mlx_cxr.inference.cost import measure_image_cost
    from mlx_cxr.inference.map_fit import FILE as MAP_FIT
    from mlx_cxr.inference.map_fit import MapFit
    from mlx_cxr.inference.predictor import write_inference_record
    from mlx_cxr.inference.trained_run import TrainedRun, study_predictions
    from mlx_cxr.pages.findings_page import keep_filled_in
    from mlx_cxr.pages.results_page import write_results
    from mlx_cxr.training.cohort import Cohort

    machine = device.start("evaluate_cnn")
    trained = TrainedRun.open(config.run_dir(run_name))
    trained.check(config)
    cohort = Cohort.open(config)
    validation, test = cohort.split("validate"), cohort.split("test")
    for data in (validation, test):
        if not len(data):
            raise DataError(
                f"{config.manifest_path}: no films in the split {data.name!r}; evaluation needs both splits"
            )
    # Before anything is computed, as a table that cannot be used has to be seen to first.
    places = Places.of(config.data, cohort.manifest.frame["path"].tolist()) if maps else None
    log.info("%s: %d validation and %d test films", trained.checkpoint, len(validation), len(test))

    inputs = {"manifest": config.manifest_path, "checkpoint": trained.checkpoint}
    record = provenance("evaluate_cnn", config.plain(), inputs, machine)
    parts = [study_predictions(trained.model, data, config.evaluation.batch_size) for data in (validation, test)]
    predictions = join(*parts)
    points, results = write_scores(
        trained.folder, predictions, trained.protocol, cohort.manifest, config, record, store=cohort.store
    )
    write_results(trained.folder, results, predictions, points)
    measure_image_cost(trained, test, config, machine)
    fit = None
    if maps:
        sha256 = sha256_file(trained.checkpoint)
        fit = MapFit.of(trained.model, validation.images, config.evaluation.batch_size, sha256)
        fit.save(trained.folder)
    write_inference_record(trained, fit.references if fit else {}, len(validation))
    if fit:
        explain(trained, fit, test, predictions.of_split("test"), points, places, config)
    else:
        keep_filled_in(trained.folder)
        for stale in ("localization.json", "findings.md", MAP_FIT):
            (trained.folder / stale).unlink(missing_ok=True)
    return trained.folder


def explain(
    trained: TrainedRun,
    fit: MapFit,
    test: SplitData,
    predictions: Predictions,
    points: OperatingPoints,
    places: Places | None,
    config: Config,
) -> None:
    """Maps of the test images: pictures, localization where places are marked, and `findings.md`.

    Args:
        trained: the run.
        fit: of its maps.
        test: the test split.
        predictions: a row per study of it.
        points: thresholds and calibration, fitted on validation.
        places: of the cohort's findings, where there are any.
        config: the experiment.
    """
    import numpy as np

    from mlx_cxr.core.labels import MAPPED
    from mlx_cxr.inference import explanation
    from mlx_cxr.pages import findings_page
    from mlx_cxr.pages.map_checks import localization_section, randomization_section

    folder, settings, synthetic = trained.folder, config.explain, config.data.synthetic
    method, labels = settings.method, settings.labels or MAPPED
    batch_size = config.evaluation.batch_size
    maps = explanation.scaled_maps(trained.model, test.images, labels, method, fit, batch_size)

    # Against masks or boxes, where there are any.
    masks, table, sections = None, None, []
    if places is not None:
        masks, table = explanation.place_scores(trained, maps, fit, test, places, predictions, points, config)
    if table is None:
        (folder / "localization.json").unlink(missing_ok=True)
    else:
        write_record(folder / "localization.json", table)
        sections += localization_section(table)

    # Against the same network with randomized weights.
    check = explanation.randomization(trained.model, maps, test.images, config.seed)
    sections += randomization_section(maps.labels, check)

    def pixels(image: int) -> np.ndarray:
        return np.array(test.images.batch(np.array([image])))[0]

    summaries = findings_page.finding_summaries(
        maps, test.frame, pixels, predictions, points, settings.examples_per_outcome, synthetic, masks
    )
    path = findings_page.write_findings(folder, folder.name, summaries, sections, points, synthetic, method)
    log.info("maps and their page in %s", path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("evaluate_cnn", __doc__)
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    parser.add_argument("--without_maps", action="store_true", help="scores only, as for a control")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(configuration(args), args.run_name, not args.without_maps)


if __name__ == "__main__":
    main()
