"""Score and explain a trained run: `python -m mlx_cxr.evaluate_cnn --config configs/demo.yaml --run_name demo_cnn`.

Writes into `outputs/<run>/`, in this order, so that a failure in a later part loses nothing of an earlier one:
`predictions.csv` (validation and test), `test_results.json`, `results.md`, `roc.png`, `precision_recall.png`,
`reliability.png`, `grad_cam/*.png`, `localization.json` (where the cohort has masks) and `findings.md`. Run again, it
replaces each of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from mlx_cxr import explanation, runtime
from mlx_cxr.config import Config, add_config_arguments, load_config
from mlx_cxr.data.films import Transform
from mlx_cxr.data.masks import has_masks, load_masks
from mlx_cxr.data.tables import DataError
from mlx_cxr.errors import readable_errors
from mlx_cxr.evaluation import plots
from mlx_cxr.evaluation.predictions import Predictions, join, write_predictions
from mlx_cxr.evaluation.results import OperatingPoints, evaluate, fit_operating_points
from mlx_cxr.evaluation.shortcuts import study_metadata
from mlx_cxr.evaluation.tables import results_markdown
from mlx_cxr.inference import TrainedRun, study_predictions
from mlx_cxr.runs import provenance, write_json, write_text
from mlx_cxr.training.cohort import Cohort, SplitData

log = logging.getLogger("mlx_cxr")


def run(config: Config, run_name: str | None = None) -> Path:
    """Evaluate a run on the data it was trained for, and return its folder.

    Args:
        config: the experiment; manifest, pixels and model must be those of the run.
        run_name: folder under `outputs`; None takes `run_name` of the configuration.

    Raises:
        RunFormatError: there is no such run, it is not trained yet, or it was trained for something else.
        DataError: manifest or pixel store missing or not matching, or no validation or test films.
        PredictionsError: the films of a study disagree.
    """
    device = runtime.start("evaluate_cnn")
    trained = TrainedRun.open(config.run_dir(run_name))
    trained.check(config)
    cohort = Cohort.open(config)
    validation, test = cohort.split("validate"), cohort.split("test")
    for data in (validation, test):
        if not len(data):
            raise DataError(
                f"{config.manifest_path}: no films in the split {data.name!r}; evaluation needs both splits"
            )
    log.info("%s: %d validation and %d test films", trained.checkpoint, len(validation), len(test))

    inputs = {"manifest": config.manifest_path, "checkpoint": trained.checkpoint}
    record = provenance("evaluate_cnn", config.plain(), inputs, device)
    predictions, points = score(trained, cohort, validation, test, config, record)
    explain(trained, validation, test, predictions.of_split("test"), points, config)
    return trained.folder


def score(
    trained: TrainedRun, cohort: Cohort, validation: SplitData, test: SplitData, config: Config, record: Mapping
) -> tuple[Predictions, OperatingPoints]:
    """Predictions, results, tables and plots; thresholds and temperatures follow the protocol of the training."""
    folder, settings = trained.folder, config.evaluation
    parts = [study_predictions(trained.model, data, settings.batch_size) for data in (validation, test)]
    predictions = join(*parts)
    points = fit_operating_points(predictions.of_split("validate"), trained.protocol, settings.threshold_rule)
    write_predictions(folder / "predictions.csv", predictions, points.calibration, points.thresholds)

    frame = cohort.manifest.frame
    rows = (frame["split"] == "train").to_numpy()
    first = ~frame["study_id"].duplicated().to_numpy() & rows
    results = evaluate(
        predictions,
        points,
        run=folder.name,
        synthetic=config.data.synthetic,
        samples=settings.bootstrap_samples,
        seed=config.seed,
        bins=settings.calibration_bins,
        provenance=record,
        train=(study_metadata(frame[rows]), cohort.manifest.raw_labels[first]),
        test_metadata=study_metadata(test.frame),
    )
    write_json(folder / "test_results.json", results)
    write_text(folder / "results.md", results_markdown(results))
    part = predictions.of_split("test")
    plots.plot_roc(folder / "roc.png", part, points, config.data.synthetic)
    plots.plot_precision_recall(folder / "precision_recall.png", part, points, config.data.synthetic)
    plots.plot_reliability(
        folder / "reliability.png", part, points, config.data.synthetic, bins=settings.calibration_bins
    )
    macro = results["protocols"][points.protocol]["macro"]["roc_auc"]
    log.info(
        "test macro ROC-AUC %.3f [%.3f, %.3f] (%s, per study); tables in %s",
        *(macro[key] for key in ("value", "low", "high")),
        points.protocol,
        folder / "results.md",
    )
    return predictions, points


def explain(
    trained: TrainedRun,
    validation: SplitData,
    test: SplitData,
    predictions: Predictions,
    points: OperatingPoints,
    config: Config,
) -> None:
    """Maps of the test films: pictures, localization where there are masks, and `findings.md`."""
    folder, settings, synthetic = trained.folder, config.explain, config.data.synthetic
    maps = explanation.map_test(trained.model, validation.films, test.films, settings, config.evaluation.batch_size)
    masks, table, sections = None, None, []
    if has_masks(config.data.root):
        transform = Transform(config.pixels.size, config.pixels.fit)
        masks = [load_masks(config.data.root, path, transform, maps.labels) for path in test.frame["path"]]
        table = explanation.localization(
            maps,
            test,
            masks,
            predictions,
            points,
            fraction=settings.mask_fraction,
            half_cell=config.model.output_stride / 2,
            samples=config.evaluation.bootstrap_samples,
            seed=config.seed,
            synthetic=synthetic,
        )
    if table is None:
        (folder / "localization.json").unlink(missing_ok=True)
    else:
        write_json(folder / "localization.json", table)
        sections += explanation.localization_section(table)
    sections += explanation.randomization_section(trained.model, maps, test.films, config.seed)
    summaries = explanation.finding_summaries(
        maps, test, predictions, points, settings.examples_per_outcome, synthetic, masks
    )
    path = explanation.write_findings(folder, folder.name, summaries, sections, points, synthetic, maps.method)
    log.info("maps and their page in %s", path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mlx_cxr.evaluate_cnn", description=__doc__.splitlines()[0])
    add_config_arguments(parser)
    parser.add_argument("--run_name", help="folder under outputs/; default: run_name of the configuration")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    with readable_errors():
        run(load_config(args.config, args.overrides), args.run_name)


if __name__ == "__main__":
    main()
