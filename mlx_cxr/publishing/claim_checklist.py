"""CLAIM 2024, answered as far as a run knows: Tejani et al., "Checklist for Artificial Intelligence in Medical Imaging
(CLAIM): 2024 Update", Radiology: Artificial Intelligence 2024, doi 10.1148/ryai.240300.

Its 44 items are named by number and a short topic of ours; their wording is in the paper. An answer is taken from a
card of `model_card.model_card`. What a run cannot know (a study's aims, its funding) is `not recorded`: whoever
publishes the model has to add it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_cxr.core.formatting import interval_text, number

NOT_RECORDED = "not recorded"
SECTIONS: tuple[tuple[str, int, int], ...] = (
    ("Title and abstract", 1, 2),
    ("Introduction", 3, 4),
    ("Study design", 5, 6),
    ("Data", 7, 13),
    ("Reference standard", 14, 18),
    ("Data partitions", 19, 20),
    ("Testing data", 21, 21),
    ("Model", 22, 24),
    ("Training", 25, 27),
    ("Evaluation", 28, 34),
    ("Results: data", 35, 36),
    ("Results: performance", 37, 39),
    ("Discussion", 40, 41),
    ("Other information", 42, 44),
)
"""Part of the checklist, its first item and its last."""

Card = Mapping[str, Any]
Answer = str | Callable[[Card], str | None] | None
"""Of one item: the same for every run, taken from its card, or None where a run cannot know."""


def claim_table(card: Card) -> list[dict[str, Any]]:
    """A row per item: `item` (1 to 44), `section`, `topic`, `answer`, and `recorded` (False for `NOT_RECORDED`)."""
    rows = []
    for section, first, last in SECTIONS:
        for item in range(first, last + 1):
            topic, answer = ITEMS[item]
            said = answer(card) if callable(answer) else answer
            row = {"item": item, "section": section, "topic": topic}
            rows.append({**row, "answer": said or NOT_RECORDED, "recorded": bool(said)})
    return rows


def _title(card: Card) -> str:
    return f"Deep learning, a convolutional network ({card['model']['kind']}); see the title and Model"


def _design(card: Card) -> str | None:
    if card["synthetic"]:
        return "Drawn by a program"
    return "Retrospective" if card["sharing"]["credentialed"] else None


def _about_known_cohort(key: str) -> Answer:
    """An entry of the card's data, for the cohorts that this package knows; None for a user's table."""
    return lambda card: card["data"][key] if _known_cohort(card) else None


def _known_cohort(card: Card) -> bool:
    return card["synthetic"] or card["sharing"]["credentialed"]


def _raters(card: Card) -> str | None:
    said = "No raters: labels were read by a program; its errors were not measured here"
    return said if _known_cohort(card) else None


def _eligibility(card: Card) -> str | None:
    views = card["data"]["views"]
    if card["data"]["dropped"] is None:
        return f"Views {', '.join(views)}; further criteria not recorded" if views else None
    dropped = "; ".join(f"{reason}: {count}" for reason, count in card["data"]["dropped"].items()) or "nothing"
    return f"Views {', '.join(views) if views else 'all'}. Left out, in images: {dropped}"


def _subset(card: Card) -> str | None:
    before, counts = card["data"]["sample_of"], card["data"]["counts"]
    if card["data"]["labels"] is None:
        return None
    if before is None:
        return "None taken: all eligible studies are used"
    return f"{sum(split['studies'] for split in counts.values())} of {before} studies, sampled by patient with the seed"


def _deidentified(card: Card) -> str | None:
    if card["synthetic"]:
        return "No persons in the data"
    return "By the makers of MIMIC-CXR (arXiv:1901.07042)" if card["sharing"]["credentialed"] else None


def _missing(card: Card) -> str:
    said = card["data"]["label_policy_in_words"]
    return f"{said[0].upper()}{said[1:]}. Scored under both protocols; see Test results"


def _partition(card: Card) -> str | None:
    split = card["data"]["split_from"]
    if split is None:
        return None
    imbalance = card["training"]["settings"]["class_weighting"]
    return f"Split {split}; counts under Data. Weighting against class imbalance: {imbalance}"


def _sample_size(card: Card) -> str:
    counts = card["evaluation"]["counts"]["test"]
    return f"Not calculated beforehand; {counts['studies']} studies of {counts['patients']} patients were there"


def _software(card: Card) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in card["training"]["packages"].items())
    return f"mlx_cxr {card['model']['version']}, Python {card['training']['python']}, {packages}"


def _initialization(card: Card) -> str:
    origin = card["model"]["initial_weights"]
    source = origin.get("source") or origin.get("run")
    return f"{origin['weights']}{f' ({source})' if source else ''}; head: {origin.get('head', NOT_RECORDED)}"


def _selection(card: Card) -> str:
    outcome = card["training"]["outcome"]
    return (
        f"Epoch {outcome['best_epoch']} of {outcome['epochs']}, by validation macro ROC-AUC per film "
        f"({number(outcome['best_auc'])})"
    )


def _uncertainty(card: Card) -> str:
    boot = card["evaluation"]["bootstrap"]
    if not boot["samples"]:
        return "None: no resamples were asked for"
    paired = "; paired differences under Beside other models" if card["evaluation"]["comparison"] else ""
    return f"95 % percentile intervals, {boot['samples']} resamples of patients{paired}"


def _explained(card: Card) -> str:
    table = card["localization"]
    if table is None:
        return "Class activation maps; not validated, for want of films with marked places"
    hit = interval_text(table["macro"]["hit"]["maps"])
    return f"Class activation maps ({table['method']}), against marked places: pointing game {hit}; see Maps"


def _internal(card: Card) -> str:
    evaluation = card["evaluation"]
    name = evaluation["fitted_under"]
    test = interval_text(evaluation["protocols"][name]["macro"]["roc_auc"])
    return f"Macro ROC-AUC ({name}): validation {number(evaluation['validation'][name]['roc_auc'])}, test {test}"


def _external(card: Card) -> str:
    tests = [
        f"{name}: macro ROC-AUC {interval_text(one['against_own']['macro']['external'])}"
        for name, one in card["external"].items()
    ]
    return "; ".join(tests) or "None"


def _included(card: Card) -> str | None:
    data = card["data"]
    if data["images_read"] is None:
        return None
    kept = sum(counts["images"] for counts in data["counts"].values())
    return f"{data['images_read']} images read, {kept} kept; see Data"


def _demographics(card: Card) -> str | None:
    known = [name for name, key in (("sex", "sex"), ("age", "age"), ("view", "views_by_split")) if card["data"][key]]
    return f"By split: {', '.join(known)}; see Data" if known else None


def _failures(card: Card) -> str | None:
    analysis = card["subgroups"]["failure_analysis"]
    if analysis is None:
        return None
    counts = analysis["counts"]
    return (
        f"{counts['false_positives']} false positives and {counts['false_negatives']} false negatives among "
        f"{counts['pairs']} studies and findings; subgroups here, cases in the run's failure analysis"
    )


def _available(card: Card) -> str:
    may = "may not be passed on" if card["sharing"]["credentialed"] else "are under what Data rights says"
    return f"mlx_cxr {card['model']['version']} (MIT licence); the weights {may}"


ITEMS: Mapping[int, tuple[str, Answer]] = {
    1: ("AI and its kind in the title", _title),
    2: ("structured summary", "At a glance"),
    3: ("background and clinical role", None),
    4: ("aims and hypotheses", None),
    5: ("prospective or retrospective", _design),
    6: ("goal of the study", "Model creation and its internal test, for research; see Intended use"),
    7: ("data sources", _about_known_cohort("about")),
    8: ("inclusion and exclusion", _eligibility),
    9: ("preprocessing", "`preprocessing.json`, step by step"),
    10: ("data subsets", _subset),
    11: ("de-identification", _deidentified),
    12: ("missing data", _missing),
    13: ("image acquisition", lambda card: "Simulated radiography" if card["synthetic"] else None),
    14: ("reference standard, definition", _about_known_cohort("label_origin")),
    15: ("reference standard, rationale", None),
    16: ("reference standard, annotators", _raters),
    17: ("annotation of the test set", "As the training set; see Data"),
    18: ("variability between raters", _raters),
    19: ("assignment to partitions", _partition),
    20: ("level of disjoint partitions", "Patient: asserted when split, trained and scored"),
    21: ("test sample size", _sample_size),
    22: ("model", lambda card: f"{card['model']['architecture']}; {card['model']['parameters']['total']:,} parameters"),
    23: ("software", _software),
    24: ("initial parameters", _initialization),
    25: ("training", "Training; `config.json`"),
    26: ("choice of the final model", _selection),
    27: ("ensembles", "None"),
    28: ("metrics", "ROC-AUC, average precision, calls at fixed thresholds, Brier score, calibration error"),
    29: ("uncertainty and significance", _uncertainty),
    30: ("robustness", "Two label protocols, views, support devices, metadata alone; see Test results and Subgroups"),
    31: ("explanation, and its validation", _explained),
    32: ("internal test", _internal),
    33: ("external test", _external),
    34: ("trial registration", "Not applicable: not a trial"),
    35: ("numbers included and excluded", _included),
    36: ("characteristics by partition", _demographics),
    37: ("performance and subgroups", "Test results, by finding and protocol; Subgroups"),
    38: ("diagnostic accuracy, precision", "Sensitivity and specificity with intervals; see Test results"),
    39: ("failure analysis", _failures),
    40: ("limitations", lambda card: f"Limits ({len(card['limits'])})"),
    41: ("implications for practice", "None drawn: research only; see Not for"),
    42: ("full protocol", "No protocol; technical details in `config.json` and `preprocessing.json`"),
    43: ("availability", _available),
    44: ("funding", None),
}
"""Item to its topic and its answer."""
