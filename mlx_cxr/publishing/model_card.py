"""The model card of an evaluated run, every figure of it from the run's own records.

After Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993, with the items of CLAIM 2024
(`claim_checklist`). `model_card` gives it as plain data, `model_card_page` as Markdown. Keys:

- `schema` (1), `run`, `synthetic`, `notice`.
- `model`: `kind` (`CNN`, `student` or `control: …`), `architecture`, `film_size`, `fit`, `in_channels`,
  `output_stride`, `parameters`, `checkpoint_sha256`, `trained` and `evaluated` (times), `commit`, `tree_dirty`,
  `version`, `initial_weights`, `teacher`.
- `use`: `intended`, `out_of_scope`. `sharing`: `credentialed`, `terms`.
- `data`: `source`, `about`, `label_origin`, `views`, `label_policy`, `label_policy_in_words`, `manifest_sha256`,
  `counts` (split to `patients`, `studies`, `images`), and from the manifest's summary `labels`, `views_by_split`,
  `sex`, `age`, `dropped`, `images_read`, `split_from`, `notes`, `sample_of` (studies it was sampled from), null where
  that is gone or says nothing.
- `training`: `settings`, `dropout`, `frozen_stages`, `augmentation`, `distillation`, `soft_labels`, `outcome`, `seed`,
  `python`, `platform`, `packages`, `device`.
- `evaluation`: the entries of `test_results.json` that hold figures; `comparison`, or null. `external`: of each other
  cohort `counts`, `against_own`, `shift`, `objections` of its `external_results.json`.
- `operating_points`: label to threshold, temperature and conformal bounds; `alpha`. `abstention`: as in
  `test_results.json`, or null.
- `subgroups`: `by_view`, `pneumothorax_by_support_devices`, `metadata_only`, `exposure_only` as there;
  `failure_analysis` or null.
- `localization`, `cost`: the files, or null.
- `limits`, `ethics`: sentences. `claim_2024`: a row per item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_cxr import __version__
from mlx_cxr.core.config_schema import LabelsConfig
from mlx_cxr.core.formatting import footer
from mlx_cxr.data.source_rows import MISSING_VIEW
from mlx_cxr.evaluation.operating_points import label_entries
from mlx_cxr.inference.evaluated_run import EvaluatedRun
from mlx_cxr.publishing import card_limits
from mlx_cxr.publishing.claim_checklist import claim_table

SCHEMA = 1

_FIGURES = (
    *("split", "unit", "score", "counts", "fitted_under", "threshold_rule", "bootstrap", "calibration_bins"),
    *("protocols", "validation"),
)
_FAILURES = ("protocol", "counts", "subgroups", "gaps")
_EXTERNAL = ("counts", "against_own", "shift", "objections")
_SUBGROUPS = ("by_view", "pneumothorax_by_support_devices", "metadata_only", "exposure_only")
_PAIRS = ("student_minus_cnn", "student_minus_teacher", "teacher_minus_cnn")

_LATERAL_VIEWS = {"LATERAL", "LL", "RL"}


def model_card(run: EvaluatedRun) -> dict[str, Any]:
    """The card as JSON-ready data, as this module's docstring describes it."""
    results, failures = run.results, run.failures
    card: dict[str, Any] = {
        "schema": SCHEMA,
        "run": run.name,
        "synthetic": run.synthetic,
        "notice": footer(run.synthetic),
        "model": _model(run),
        "use": {"intended": _intended(run), "out_of_scope": _out_of_scope(run)},
        "sharing": {"credentialed": run.credentialed, "terms": _terms(run)},
        "data": _data(run),
        "training": _training(run),
        "evaluation": {**{key: results[key] for key in _FIGURES}, "comparison": _comparison(run)},
        "external": {name: {key: one[key] for key in _EXTERNAL} for name, one in run.external.items()},
        "operating_points": {"alpha": run.points.bands.alpha, "labels": label_entries(run.points)},
        "abstention": results.get("abstention"),
        "subgroups": {
            **{key: results[key] for key in _SUBGROUPS},
            "failure_analysis": None if failures is None else {key: failures[key] for key in _FAILURES},
        },
        "localization": run.localization,
        "cost": run.cost,
    }
    card["limits"] = card_limits.limits(card)
    card["ethics"] = card_limits.ethics(card)
    card["claim_2024"] = claim_table(card)
    return card


def _model(run: EvaluatedRun) -> dict[str, Any]:
    record, model, pixels = run.record, run.config.model, run.config.pixels
    stride = ", the last stage dilated in place of its stride" if model.output_stride == 16 else ""
    return {
        "kind": _kind(run),
        "architecture": f"ResNet-18 (arXiv:1512.03385), output stride {model.output_stride}{stride}; average pooling, "
        f"a linear layer of 14 logits, a sigmoid each",
        "film_size": pixels.size,
        "fit": pixels.fit,
        "in_channels": model.in_channels,
        "output_stride": model.output_stride,
        "parameters": run.training["parameters"],
        "checkpoint_sha256": run.checkpoint_sha256,
        "trained": record["started"],
        "evaluated": run.results["provenance"]["started"],
        "commit": record["commit"],
        "tree_dirty": record["tree_dirty"],
        "version": __version__,
        "initial_weights": _initial_weights(run),
        "teacher": _teacher(run),
    }


def _kind(run: EvaluatedRun) -> str:
    if run.record["stage"] == "train_cnn":
        return "CNN"
    targets = run.config.distillation.targets
    return "student" if targets == "teacher" else f"control: a student with {targets} targets in its teacher's place"


def _initial_weights(run: EvaluatedRun) -> dict[str, Any]:
    """Origin of the initial weights, without the paths of this machine."""
    origin = run.training["initial_weights"]
    known = ("weights", "head", "source", "revision", "licence", "sha256")
    about = {key: origin[key] for key in known if origin.get(key) is not None}
    started = run.record["inputs"].get("initial_weights")
    return about | ({"run": Path(started["path"]).parent.name} if started else {})


def _teacher(run: EvaluatedRun) -> dict[str, Any] | None:
    """A student's teacher and its input; None for a model without a teacher."""
    if run.teacher is None:
        return None
    record = run.teacher["record"]
    about = {"run": run.teacher["run"], "soft_labels_sha256": run.teacher["soft_labels_sha256"]}
    about["targets"] = run.config.distillation.targets
    if record is not None:
        about |= {key: record.get(key) for key in ("modality", "reads", "bits", "zero_shot_auc", "tuned_auc")}
        about["base"] = public_name(record["base"])
    return about


def last_part(path: str) -> str:
    """A path's last part, which names no user and no folder of this machine; of any system's paths."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def public_name(text: str) -> str:
    """A hub's `owner/name` as it is; of a local path its last part."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not Path(text).exists()
    return text if is_hub_id else last_part(text)


def _intended(run: EvaluatedRun) -> list[str]:
    return [
        f"Research on reading chest films by machine. In: {_images(run)}. Out: 14 probabilities, each with a call "
        "(present or absent) or an abstention.",
        "Reproducing, comparing and criticizing the figures of this card, and studying where the model fails.",
        "For researchers and clinician-engineers who test it on their own films first.",
    ]


def _images(run: EvaluatedRun) -> str:
    views = run.config.data.views
    return f"chest films of the views {', '.join(views)}" if views else "chest films of any view"


def _out_of_scope(run: EvaluatedRun) -> list[str]:
    return [
        "Any decision about a patient: diagnosis, triage, screening, a second reading, the order of a worklist. No "
        "clearance as a medical device is recorded.",
        f"Anything but {_images(run)}: other parts of the body, photographs of a screen, CT"
        f"{', laterals' if run.config.data.views and not {*run.config.data.views} & _LATERAL_VIEWS else ''}.",
        "Films of another source than the training data, before it was tested there: scanners, patients and the habits "
        "of report writers differ.",
        "Reading `No Finding`, or 14 calls of absent, as healthy: a film may show what is none of the 14.",
        "Reading a probability as the risk of a disease: it estimates whether a report would mention the finding.",
        "Reading a map as the outline of a finding, or comparing two films of a patient over time: it sees one film.",
    ]


def _terms(run: EvaluatedRun) -> list[str]:
    if run.synthetic:
        return ["All films and reports were drawn by a program; no person's data are in these weights."]
    if run.credentialed:
        return [
            "DO NOT UPLOAD OR PASS ON. These weights derive from MIMIC-CXR, which is open only to those who signed "
            "PhysioNet's data use agreement. Weights, maps, soft labels and predictions count as derived data.",
            "PhysioNet asks that derived models be treated as sensitive and, where they are shared at all, be shared "
            "through PhysioNet under the agreement of the source. Keep this folder on machines of its signatories.",
        ]
    return [
        "The data are the user's own table. Whether weights that derive from them may be shared follows from their "
        "licence, the patients' consent and the institution's rules, none of which the run knows: settle it before "
        "this folder leaves the institution."
    ]


def _data(run: EvaluatedRun) -> dict[str, Any]:
    data, summary = run.config.data, run.manifest_summary or {}
    tested = {split: dict(counts) for split, counts in run.results["counts"].items()}
    return {
        "source": data.source,
        "about": _source(run),
        "label_origin": _label_origin(run),
        "views": None if data.views is None else list(data.views),
        "label_policy": run.config.labels.model_dump(mode="json"),
        "label_policy_in_words": _policy_in_words(run.config.labels),
        "manifest_sha256": run.record["inputs"]["manifest"]["sha256"],
        "counts": summary.get("splits") or {"train": None, **tested},
        "labels": summary.get("labels"),
        "views_by_split": _known_groups(summary.get("views")),
        **{key: _known_groups(summary.get(key)) for key in ("sex", "age")},
        **{key: summary.get(key) for key in ("dropped", "notes", "images_read", "split_from")},
        "sample_of": (summary.get("sample") or {}).get("studies_before"),
    }


def _known_groups(groups: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """None where every study or image is of an unknown group."""
    return groups if groups and set(groups) - {MISSING_VIEW, "unknown"} else None


def _policy_in_words(labels: LabelsConfig) -> str:
    left_out = "unknown, and was left out of the loss"
    rules = {"zeros": "absent", "ones": "present", "ignore": left_out, "soft": f"a target of {labels.soft_value}"}
    empty = {"negative": "absent", "masked": left_out}[labels.empty]
    others = "".join(f", of {label} as {rules[rule]}" for label, rule in labels.uncertain_per_label.items())
    return f"a finding that is not mentioned counted as {empty}, an uncertain one as {rules[labels.uncertain]}{others}"


def _source(run: EvaluatedRun) -> str:
    if run.synthetic:
        return "Synthetic chest films and reports, drawn by a program in the layout of MIMIC-CXR-JPG; of no people."
    if run.credentialed:
        return (
            "MIMIC-CXR-JPG (Johnson et al., arXiv:1901.07042): films of one hospital's emergency department in Boston, "
            "2011 to 2016, de-identified by its makers."
        )
    return "A table of films that the user gave; where and when they were taken is not recorded."


def _label_origin(run: EvaluatedRun) -> str:
    data = run.config.data
    if data.source == "csv":
        mapped = ", ".join(f"{theirs} -> {ours}" for theirs, ours in data.csv.label_map.items())
        taken = f" Its findings were taken as: {mapped}." if mapped else ""
        return f"Columns of the user's table; who labelled, and from what, is not recorded.{taken}"
    if run.synthetic:
        return "Read from the synthetic reports by a rule-based labeler of this package, with its mistakes."
    labelers = {"chexpert": "the CheXpert labeler (arXiv:1901.07031)", "negbio": "NegBio (arXiv:1712.05898)"}
    labeler = labelers[data.labeler]
    return (
        f"Read from the radiologists' reports by a program, {labeler}, chiefly from the impression; nobody looked at "
        "the films for it."
    )


def _training(run: EvaluatedRun) -> dict[str, Any]:
    config, record = run.config, run.record
    settings, distillation = config.training.model_dump(mode="json"), None
    if record["stage"] == "distillation":
        distillation = config.distillation.model_dump(mode="json")
        settings |= {key: distillation[key] for key in ("epochs", "learning_rate") if distillation[key] is not None}
    outcome = ("best_auc", "best_epoch", "epochs", "steps", "seconds", "stopped_early")
    return {
        "settings": settings,
        "dropout": config.model.dropout,
        "frozen_stages": config.model.freeze_stages,
        "augmentation": config.augment.model_dump(mode="json"),
        "distillation": distillation,
        "soft_labels": run.training.get("soft_labels"),
        "outcome": {key: run.training[key] for key in outcome},
        **{key: record[key] for key in ("seed", "python", "platform", "packages", "device")},
    }


def _comparison(run: EvaluatedRun) -> dict[str, Any] | None:
    """This run beside its teacher, student or controls: macro ROC-AUC under the protocol that fitted."""
    comparison = run.comparison
    if comparison is None:
        return None
    protocol = comparison["fitted_under"]
    section = comparison["protocols"][protocol]
    differences = {pair: section["differences"][pair] for pair in _PAIRS} | dict(section["controls"])
    return {
        "protocol": protocol,
        "studies": comparison["counts"]["studies"],
        "models": [
            {key: model[key] for key in ("run", "role", "title")}
            | {"roc_auc": section["models"][model["run"]]["macro"]["roc_auc"]}
            for model in comparison["models"]
        ],
        "differences": {
            name: {"roc_auc": entry["judged"], "verdict": entry["verdict"], "rests_on": entry["rests_on"]}
            for name, entry in differences.items()
        },
        "retention": section["retention"]["share"],
    }
