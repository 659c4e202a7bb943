"""Explain a teacher's answers by words of reports: `python -m mlx_cxr.explain_report --config configs/demo.yaml`.

By default the most confident true positives of each finding among the test studies; with `--study_id` or `--text` the
reports that are named, whose answers are printed too. Writes `outputs/<teacher_run>/text_explanation/`: for each report
and finding a page `<study>_<finding>.html` and the same as `.png`, then `explanations.json`, then `index.html`. What is
asked for by an option goes to a folder of its own under `asked_explanations/`, named by the question, so that only the
same question again replaces an answer. They quote reports: what holds for the data holds for them.
`token_page.write_explanations` describes the JSON.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_cxr.core import device
from mlx_cxr.core.claim import claims
from mlx_cxr.core.files import hash_of
from mlx_cxr.core.formatting import footer
from mlx_cxr.core.runs import provenance
from mlx_cxr.core.stage import add_config_arguments, configuration, stage_parser, started

if TYPE_CHECKING:
    from mlx_cxr.core.config import Config
    from mlx_cxr.evaluation.operating_points import OperatingPoints


log = logging.getLogger("mlx_cxr")

FOLDER, ASKED = "text_explanation", "asked_explanations"


@claims(lambda config, teacher_run=None, **_: config.run_dir(teacher_run or config.teacher.run_name))
def run(
    config: Config,
    teacher_run: str | None = None,
    *,
    study_ids: Sequence[str] = (),
    text: str | None = None,
    findings: Sequence[str] = (),
    examples: int = 1,
) -> Path:
    """Explain answers of a teacher, and return the folder of the pages.

    Args:
        config: the experiment; manifest, reports and images must be those that the teacher was trained on.
        teacher_run: folder under `outputs`; None takes `teacher.run_name`.
        study_ids: studies of the manifest to explain, in place of examples.
        text: a report, or a file with one, to explain in their place.
        findings: of `LABELS`; none given takes all for examples, and for a study or text those that the teacher calls
            present, or the likeliest one.
        examples: true positives per finding.

    Raises:
        ExplainReportError: an unknown finding or study, or a study without what the teacher reads.
        ReportReadingError: a text without what the teacher reads, or a teacher that reads no text.
        RecordError: there is no such run, it is not scored yet, or it was trained for something else.
        PredictionsError: its predictions cannot be read.
        DataError: a file is missing.
    """
    from mlx_cxr.core.labels import LABELS, finding_name
    from mlx_cxr.evaluation.operating_points import FILE as POINTS
    from mlx_cxr.inference.asked_reports import ExplainReportError, explained, of_studies, of_text, read_report
    from mlx_cxr.inference.report_reader import ReportReader
    from mlx_cxr.pages.prediction_files import call_lines
    from mlx_cxr.pages.token_page import word_lines, write_explanations
    from mlx_cxr.teacher.lora import WEIGHTS
    from mlx_cxr.teacher.teacher_run import ADAPTER, Material

    findings = [finding_name(name) for name in findings]
    if text is not None and study_ids:
        raise ExplainReportError("--study_id and --text exclude each other: give one of them")
    if examples < 1:
        raise ExplainReportError(f"--examples {examples}: give at least 1")
    machine = device.start("explain_report")
    run_dir = config.run_dir(teacher_run or config.teacher.run_name)
    reader = ReportReader.from_run(run_dir)
    teacher, points = reader.teacher, reader.points
    columns = tuple(LABELS.index(name) for name in findings) or None
    inputs = {"adapter": run_dir / ADAPTER / WEIGHTS, "operating_points": run_dir / POINTS}
    if text is not None:
        rule = "A report that was asked for."
        text = read_report(text)
        asked = [of_text(text, teacher, columns)]
    else:
        material = Material.open(teacher.config)
        teacher.check(config, material)
        inputs |= material.inputs(teacher.config)
        if study_ids:
            rule = "Studies that were asked for."
            wanted = dict.fromkeys(study_ids, columns)
        else:
            inputs["predictions"] = run_dir / "predictions.csv"
            rule = (
                f"The most confident true positives among the test studies, at most {examples} of each finding: called "
                "present at the threshold chosen on validation, present by the report's label, of the highest "
                "probability. They are examples, not a sample to estimate from."
            )
            wanted = confident_true_positives(run_dir, teacher.protocol, columns, points, examples)
        asked = of_studies(wanted, teacher, material) if wanted else []
    record = provenance("explain_report", config.plain(), inputs, machine)
    explanations = []
    for one in asked:
        answer, words = explained(one, reader)
        explanations += words
        if text is not None or study_ids:
            calls = call_lines(answer.probabilities, answer.states, points)
            log.info("\n".join(["", f"{one.study_id}:", *calls, *word_lines(words)]))
    explanations.sort(key=lambda e: (LABELS.index(e.finding), -e.probability))
    folder, synthetic = place_of(run_dir, text, study_ids, findings, examples), teacher.config.data.synthetic
    write_explanations(folder, run_dir.name, explanations, rule, synthetic, record)
    log.info("%s\npages in %s", footer(synthetic), folder / "index.html")
    return folder


def place_of(run_dir: Path, text: str | None, study_ids: Sequence[str], findings: Sequence[str], examples: int) -> Path:
    """Folder of a question's answer: `FOLDER` for the one that the pipeline asks, else one of its own in `ASKED`."""
    if text is None and not study_ids and not findings and examples == 1:
        return run_dir / FOLDER
    kind = "text" if text is not None else f"study_{study_ids[0]}" if study_ids else f"examples_{examples}"
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", kind)[:60]
    return run_dir / ASKED / f"{name}_{hash_of([text, study_ids, findings, examples])[:12]}"


def confident_true_positives(
    run_dir: Path, protocol: str, columns: Sequence[int] | None, points: OperatingPoints, count: int
) -> dict[str, tuple[int, ...]]:
    """Test study to the findings of which it is one of the `count` most confident true positives.

    Returns:
        Study to columns; empty where no finding has a true positive.
    """
    import numpy as np

    from mlx_cxr.core.labels import LABELS, SCORING_PROTOCOLS
    from mlx_cxr.evaluation.predictions import read_predictions
    from mlx_cxr.pages.findings_page import outcomes

    scored = read_predictions(run_dir / "predictions.csv")
    rows = np.flatnonzero(scored.predictions.split == "test")
    targets = SCORING_PROTOCOLS[protocol].apply(scored.predictions.raw_labels[rows])
    wanted: dict[str, tuple[int, ...]] = {}
    thresholds = points.tuned_thresholds
    for k in columns or range(len(LABELS)):
        found = outcomes(targets[:, k], scored.probabilities[rows, k], thresholds[k])["true positive"][:count]
        if not len(found):
            log.info("%s: no true positive among the test studies", LABELS[k])
        for row in found:
            study = str(scored.predictions.study_ids[rows[row]])
            wanted[study] = (*wanted.get(study, ()), k)
    return wanted


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = stage_parser("explain_report", __doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--teacher_run", "--run_name", help="run under outputs/, or a folder; default: teacher.run_name"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--study_id", nargs="+", default=[], metavar="STUDY", help="studies of the manifest")
    which.add_argument("--text", help="a report between quotes, or a file with one")
    which.add_argument("--examples", type=int, default=1, metavar="N", help="true positives per finding; default 1")
    parser.add_argument("--finding", nargs="+", default=[], metavar="FINDING", help='such as Edema "Pleural Effusion"')
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with started(build_parser(), argv) as args:
        run(
            configuration(args),
            args.teacher_run,
            study_ids=args.study_id,
            text=args.text,
            findings=args.finding,
            examples=args.examples,
        )


if __name__ == "__main__":
    main()
