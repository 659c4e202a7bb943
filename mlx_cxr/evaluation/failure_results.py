"""`failures.json`: every figure of a failure analysis, made from predictions, labels and what is known of the studies.

An interval is `{"value", "low", "high", "replicates", "drawn"}`, as in `results`. What is undefined is null. Keys:

- `schema` (1), `run`, `synthetic`, `notice`, `protocol` (what an error is judged under), `fitted_under`,
  `threshold_rule`.
- `counts`: `studies`, `patients`, `pairs` (study and finding), `positives`, `negatives`, `false_positives`,
  `false_negatives`; `abstained_failures`: those of both on which the model abstains; `without_threshold`: findings
  left out, as validation could choose no threshold.
- `models`: `cnn` and `teacher` to null, or `run`, `scored` (of the studies) and for the teacher `reads` and
  `reads_label_source`.
- `settings`: `teacher_margin`, `rare_share`, `rare` (the findings that are).
- `per_label`: finding to `positives`, `negatives`, `false_positives`, `false_negatives`, `training_share`, and
  `categories`: category to its errors.
- `categories`, `conditions`: `category_rates` of the partition, and of each condition wherever it holds.
- `drawing`: `label_check`, or null where it is not known what the images show.
- `subgroups`: `subgroups.subgroup_tables`; `gaps`: `subgroups.gaps`.
- `confusions`, `confused_pairs`: the functions of `confusions`; `lifts`: how many were looked at.
- `relabel`: `items` of the sheet, which the stage adds.
- `bootstrap`: `unit`, `samples`, `seed`, `level`. `provenance`: as `runs.provenance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mlx_cxr.core.formatting import footer
from mlx_cxr.core.labels import LABELS, label_index
from mlx_cxr.evaluation.bootstrap import LEVEL, PatientResamples, patient_bootstrap, patient_resamples
from mlx_cxr.evaluation.confusions import confused_pairs, confusions, lifts_with_an_interval
from mlx_cxr.evaluation.failures import (
    NOISE,
    OTHER,
    PROTOCOL,
    Calls,
    Judged,
    categorize,
    conditions,
    failure_table,
    judge,
    plain_interval,
)
from mlx_cxr.evaluation.scored_runs import ScoredRun
from mlx_cxr.evaluation.subgroups import gaps, study_groups, subgroup_tables

SCHEMA = 1


@dataclass(frozen=True)
class Analysis:
    """Findings of `analyse`.

    Attributes:
        results: the content of `failures.json`, but for `relabel`.
        failures: that of `failures.csv`: `failures.failure_table`, and after `threshold` a column `abstention`, why
            the student abstains, in words, empty where it makes the call.
        judged: the studies.
        category: (N, 14) str, of each study and finding, right or wrong.
    """

    results: dict[str, Any]
    failures: pd.DataFrame
    judged: Judged
    category: np.ndarray


def analyse(
    student: ScoredRun,
    others: Mapping[str, ScoredRun],
    studies: pd.DataFrame,
    training_share: np.ndarray,
    drawn: np.ndarray | None = None,
    *,
    teacher_margin: float,
    rare_share: float,
    samples: int,
    seed: int,
    provenance: Mapping[str, Any],
) -> Analysis:
    """Sort a student's errors on test, and count.

    Args:
        student: the run whose errors these are.
        others: `cnn` and `teacher` to their runs, where there are such; of the same manifest.
        studies: a row per study of `student.test`, in its order: `view` (of `predictions.VIEW_GROUPS`), `sex`, `age`
            and `age_band`.
        training_share: (14,), the share of training studies that have each finding.
        drawn: (N, 14), 1 where a finding shows in an image of the study, else 0; None where that is not known.
        teacher_margin: as `failures.conditions`.
        rare_share: findings with a smaller share of training studies are rare.
        samples: bootstrap resamples; 0 gives no intervals.
    """
    judged = judge(student)
    calls = {name: Calls.of(run, judged.study_ids) for name, run in others.items()}
    rare = training_share < rare_share
    bedside = (studies["view"] == "AP").to_numpy()
    found = conditions(judged, teacher=calls.get("teacher"), teacher_margin=teacher_margin, rare=rare, bedside=bedside)
    category = categorize(found)
    resamples = patient_resamples(judged.patient_ids, samples, seed)
    names = [*found, OTHER]
    tables = subgroup_tables(judged, study_groups(studies, judged.raw_labels), resamples)
    lifts = confusions(judged, resamples)
    failures = failure_table(judged, category, studies, calls, drawn)
    pairs = zip(failures["label"], failures["probability"], strict=True)
    abstention = [student.points.reason(label_index(label), probability) for label, probability in pairs]
    failures.insert(failures.columns.get_loc("threshold") + 1, "abstention", abstention)
    counted = {
        "positives": judged.targets == 1,
        "negatives": judged.targets == 0,
        "false_positives": judged.false_positive,
        "false_negatives": judged.false_negative,
    }
    scored = judged.scored.any(axis=0)
    results = {
        "schema": SCHEMA,
        "run": student.name,
        "synthetic": student.settings["synthetic"],
        "notice": footer(student.settings["synthetic"]),
        "protocol": PROTOCOL,
        "fitted_under": student.settings["fitted_under"],
        "threshold_rule": student.settings["threshold_rule"],
        "counts": {
            "studies": len(judged.study_ids),
            "patients": len(set(judged.patient_ids.tolist())),
            "pairs": int(judged.scored.sum()),
            **{name: int(cells.sum()) for name, cells in counted.items()},
            "without_threshold": [label for label, there in zip(LABELS, scored, strict=True) if not there],
            "abstained_failures": sum(map(bool, abstention)),
        },
        "models": {name: _about(others.get(name), calls.get(name)) for name in ("cnn", "teacher")},
        "settings": {
            "teacher_margin": teacher_margin,
            "rare_share": rare_share,
            "rare": [label for label, is_rare in zip(LABELS, rare, strict=True) if is_rare],
        },
        "per_label": {
            label: {
                **{name: int(cells[:, k].sum()) for name, cells in counted.items()},
                "training_share": float(training_share[k]),
                "categories": {name: int((judged.error[:, k] & (category[:, k] == name)).sum()) for name in names},
            }
            for k, label in enumerate(LABELS)
        },
        "categories": category_rates(judged, {name: category == name for name in names}, resamples),
        "conditions": category_rates(judged, found, resamples),
        "drawing": None if drawn is None else label_check(judged, category, names, drawn, resamples),
        "subgroups": tables,
        "gaps": gaps(tables),
        "confusions": lifts,
        "confused_pairs": confused_pairs(lifts),
        "lifts": lifts_with_an_interval(lifts),
        "bootstrap": {"unit": "patient", "samples": samples, "seed": seed, "level": LEVEL},
        "provenance": provenance,
    }
    return Analysis(results, failures, judged, category)


def category_rates(
    judged: Judged, members: Mapping[str, np.ndarray], resamples: PatientResamples
) -> dict[str, dict[str, Any]]:
    """Share of the errors in each category, beside its share of all pairs.

    Args:
        judged: the N studies.
        members: name to bool (N, 14), which studies and findings are in it.

    Returns:
        Name to `false_positives`, `false_negatives`, `pairs` (scored ones, right or wrong), `share_of_errors`,
        `share_of_pairs`, and three intervals: `ratio`, the first over the second, which is the error rate in the
        category over that of all; `fp_ratio`, the same of false positives and pairs with the label absent; `fn_ratio`,
        of false negatives and pairs with the label present. A ratio is undefined without such pairs or errors.
    """
    kinds = {
        "ratio": (judged.error, judged.scored),
        "fp_ratio": (judged.false_positive, judged.targets == 0),
        "fn_ratio": (judged.false_negative, judged.targets == 1),
    }

    def ratio(sums: np.ndarray) -> np.ndarray:
        return _quotient(np.stack([_quotient(sums[:, :2]), _quotient(sums[:, 2:])], axis=1))

    result = {}
    for name, member in members.items():
        entry: dict[str, Any] = {
            "false_positives": int((judged.false_positive & member).sum()),
            "false_negatives": int((judged.false_negative & member).sum()),
            "pairs": int((judged.scored & member).sum()),
            "share_of_errors": _share_of(judged.error, member),
            "share_of_pairs": _share_of(judged.scored, member),
        }
        for key, (wrong, pool) in kinds.items():
            counts = np.stack([part.sum(axis=1) for part in (wrong & member, wrong, pool & member, pool)], axis=1)
            entry[key] = _interval_of(counts.astype(np.float64), ratio, resamples)
        result[name] = entry
    return result


def label_check(
    judged: Judged, category: np.ndarray, names: Sequence[str], drawn: np.ndarray, resamples: PatientResamples
) -> dict[str, Any]:
    """Share of errors whose label is wrong by the drawing, which tests the names of the categories.

    Args:
        judged: the N studies.
        category: (N, 14) of `failures.categorize`.
        names: of the categories.
        drawn: (N, 14), 1 where a finding shows in an image of the study, else 0.

    Returns:
        `categories`: name to `errors`, `wrong_labels` and the interval `share`, and the same under `all errors` and
        `all pairs` (every scored study and finding, right or wrong); `false_positives` and `false_negatives`: the same
        of the category `NOISE` alone; `caught`: of the errors with a wrong label, the share that `NOISE` holds. The
        last three are null without that category.
    """
    wrong = judged.scored & (drawn != judged.targets)

    def entry(rows: np.ndarray) -> dict[str, Any]:
        counts = np.stack([(rows & wrong).sum(axis=1), rows.sum(axis=1)], axis=1).astype(np.float64)
        interval = _interval_of(counts, _quotient, resamples)
        return {"errors": int(rows.sum()), "wrong_labels": int((rows & wrong).sum()), "share": interval}

    noise = category == NOISE
    caught = np.stack([(judged.error & wrong & rows).sum(axis=1) for rows in (noise, noise | True)], axis=1)
    there = NOISE in names
    return {
        "categories": {
            **{name: entry(judged.error & (category == name)) for name in names},
            "all errors": entry(judged.error),
            "all pairs": entry(judged.scored),
        },
        "false_positives": entry(judged.false_positive & noise) if there else None,
        "false_negatives": entry(judged.false_negative & noise) if there else None,
        "caught": _interval_of(caught.astype(np.float64), _quotient, resamples) if there else None,
    }


def _interval_of(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: PatientResamples
) -> dict[str, float | int]:
    """Interval of a statistic of sums over studies; `counts` is (N, C), and `statistic` takes (b, C) to (b,)."""
    value = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    return plain_interval(value, patient_bootstrap(lambda weights: statistic(weights @ counts), resamples))


def _quotient(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)


def _share_of(pool: np.ndarray, member: np.ndarray) -> float:
    return float((pool & member).sum() / pool.sum()) if pool.any() else float("nan")


def _about(run: ScoredRun | None, calls: Calls | None) -> dict[str, Any] | None:
    if run is None or calls is None:
        return None
    about: dict[str, Any] = {"run": run.name, "scored": int((~np.isnan(calls.probabilities[:, 0])).sum())}
    if run.teacher is not None:
        about |= {"reads": run.teacher["reads"], "reads_label_source": run.reads_label_source}
    return about
