"""Limits and ethics of a model card: sentences that follow from its figures by rule, and those true of any such model.

A card is that of `model_card.model_card`; figures are quoted, never judged good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_cxr.core.formatting import escaped, interval_text, number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.evaluation.subgroups import FEW_POSITIVES
from mlx_cxr.pages.external_page import NEVER_SEEN
from mlx_cxr.pages.map_checks import ALL_CONTROLS, found

CHANCE = 0.5
"""ROC-AUC of a model that knows nothing, and the share of errors of one that tosses a coin."""


def limits(card: Mapping[str, Any]) -> list[str]:
    """Sentences, each with the figures it follows from."""
    return [*_scope(card), *_findings(card), *_shortcuts(card), *_calls(card), *_maps(card)]


def ethics(card: Mapping[str, Any]) -> list[str]:
    """Consequences for people of the way such models are made and used."""
    if card["synthetic"]:
        about = "Nothing here is measured on people, so nothing is known of fairness between groups of them."
    else:
        about = (
            "Ethnicity, language and insurance are not recorded: that the model misses findings more often in some of "
            "these groups, as was shown for models of this kind (Seyyed-Kalantari et al., Nature Medicine 2021), can "
            "neither be seen nor ruled out here."
        )
    return [
        about,
        "Labels repeat what report writers chose to mention. What is under-reported for some patients is under-called "
        "for them too.",
        "A number and a coloured map persuade. Show them with the abstention, the interval and the notice, and only to "
        "people who can overrule them.",
        "Weights can give away something of the films that they were trained on (membership inference); treat them "
        "with the care that the films are due.",
    ]


def _scope(card: Mapping[str, Any]) -> Iterator[str]:
    evaluation, counts = card["evaluation"], card["evaluation"]["counts"]["test"]
    source = "cohort" if card["synthetic"] else "source"
    yield (
        f"Tested on {counts['studies']} studies of {counts['patients']} patients of the same {source} as the training "
        "data: no prospective use, no readers with and without it."
    )
    yield from _elsewhere(card["external"])
    if card["synthetic"]:
        yield "The figures say that the code works, and nothing about patients."
    else:
        yield (
            "The reference standard is the label, not a reader of the film: an error of the labels counts as one of "
            "the model, and a model that repeats the labels' errors looks right."
        )
    samples = evaluation["bootstrap"]["samples"]
    spread = "the intervals say which patients were tested, and not" if samples else "nothing says"
    yield f"One training run with one seed: {spread} what another seed would have given."
    age = card["data"]["age"] or {}
    if "0-19" in age and (few := age["0-19"]["train"]) < FEW_POSITIVES:
        of = sum(counts["train"] for counts in age.values())
        yield f"{few} of {of} training studies are known to be of patients under 20: not for children."


def _elsewhere(external: Mapping[str, Any]) -> Iterator[str]:
    """On cohorts of other places."""
    if not external:
        yield (
            f"{NEVER_SEEN}: models of this kind lose much of their ROC-AUC at other hospitals, some all of it (Zech "
            "et al., PLOS Medicine 2018)."
        )
    for name, one in external.items():
        macro, compared = one["against_own"]["macro"], one["against_own"]
        said = (
            f"On {one['counts']['studies']} studies of {one['counts']['patients']} patients of {escaped(name)}, over "
            f"{len(compared['findings'])} findings: macro ROC-AUC {interval_text(macro['external'])}, where its own "
            f"test split has {interval_text(macro['own'])}."
        )
        if macro["verdict"] == "below":
            said += " Its own figures do not hold there."
        if _known(macro["external"]) and macro["external"]["low"] <= CHANCE:
            said += " That it ranks better than chance there is not shown."
        yield said


def _findings(card: Mapping[str, Any]) -> Iterator[str]:
    name = card["evaluation"]["fitted_under"]
    protocol = card["evaluation"]["protocols"][name]
    entries = protocol["per_label"]
    if protocol["single_class"]:
        yield f"No ROC-AUC, as test has one class only: {', '.join(protocol['single_class'])}."
    few = [f"{k} ({entries[k]['positives']})" for k in LABELS if 0 < entries[k]["positives"] < FEW_POSITIVES]
    if few:
        yield f"Fewer than {FEW_POSITIVES} positive test studies, so wide intervals: {', '.join(few)}."
    chance = [k for k in LABELS if _known(entries[k]["roc_auc"]) and entries[k]["roc_auc"]["low"] <= CHANCE]
    if chance:
        yield (
            f"That it ranks better than chance is not shown (the interval of ROC-AUC reaches {CHANCE}): "
            f"{', '.join(chance)}."
        )
    points = card["operating_points"]["labels"]
    default = [k for k in LABELS if points[k]["threshold_source"] == "default"]
    if default:
        yield f"No threshold could be chosen: {', '.join(default)}."


def _shortcuts(card: Mapping[str, Any]) -> Iterator[str]:
    subgroups = card["subgroups"]
    drains = subgroups["pneumothorax_by_support_devices"]
    for control in (subgroups["metadata_only"], subgroups["exposure_only"]):
        gain = control["macro"]["model_minus_it"] if control else None
        if gain and _known(gain) and gain["low"] <= 0:
            yield (
                f"That it knows more than {', '.join(control['features'])} do together is not shown: macro ROC-AUC "
                f"minus theirs {interval_text(gain)}."
            )
    without, with_ = (drains[key]["roc_auc"] for key in ("without_devices", "with_devices"))
    if without["value"] is not None and with_["value"] is not None and without["value"] < with_["value"]:
        yield (
            f"Pneumothorax is ranked worse without support devices ({interval_text(without)}) than with them "
            f"({interval_text(with_)}): part of it may be the drain."
        )
    largest = ((subgroups["failure_analysis"] or {}).get("gaps") or {}).get("largest")
    if largest is not None:
        more = "more" if largest["value"] > 0 else "less"
        yield (
            f"Findings go unseen {more} often than in all studies together where {largest['attribute']} is "
            f"{escaped(largest['group'])}: false-negative rate {interval_text(largest)} apart."
        )
    teacher = card["model"]["teacher"]
    if teacher is not None and teacher["targets"] == "teacher":
        yield (
            f"It was taught by the answers of `{teacher['run']}` (reads: {teacher.get('reads') or 'not recorded'}): "
            "what that teacher gets wrong, or copies from reports, it may have learned."
        )


def _calls(card: Mapping[str, Any]) -> Iterator[str]:
    abstention = card["abstention"]
    if abstention is None:
        yield "How often it abstains, and how often its calls are then wrong, is not recorded."
        return
    section, wanted = abstention["protocols"][abstention["fitted_under"]], 1 - abstention["alpha"]
    called, sure = section["macro"]["called"], f"{100 * wanted:.4g} %"
    if called["value"] is not None:
        yield (
            f"It makes a call for a share of {number(called['value'])} of studies (mean over "
            f"{len(section['macro_labels'])} findings) and abstains on the rest. That the truth stays plausible in "
            f"{sure} of studies holds for films like those of validation, and on average, not for each patient."
        )
    for key, which in (("positive_coverage", "with"), ("negative_coverage", "without")):
        coverage = {label: section["per_label"][label][key] for label in LABELS}
        below = [f"{k} {interval_text(x)}" for k, x in coverage.items() if x["high"] is not None and x["high"] < wanted]
        if below:
            yield f"On test it stayed plausible less often than {sure} for studies {which} {', '.join(below)}."
    risk = {label: section["per_label"][label]["risk_called"] for label in LABELS}
    if wrong := [f"{k} {interval_text(x)}" for k, x in risk.items() if x["value"] is not None and x["value"] > CHANCE]:
        yield f"More than half of the calls that it makes on test are wrong for {', '.join(wrong)}."
    if abstention["too_few"]:
        yield (
            f"Too few validation examples (fewer than {abstention['needed']} of a class), so no call is ever made: "
            f"{', '.join(abstention['too_few'])}."
        )


def _maps(card: Mapping[str, Any]) -> Iterator[str]:
    table = card["localization"]
    if table is None:
        yield (
            "Whether its maps point at the findings was not tested, for want of films with their places marked: do not "
            "take them as evidence."
        )
        return
    yield (
        f"That a map points at the finding better than the strongest of {ALL_CONTROLS} (pointing game) is shown for "
        f"{', '.join(found(table['per_label'])) or 'no finding'}, of {len(table['per_label'])} tested. For the others, "
        "do not take a map as evidence."
    )


def _known(interval: Mapping[str, Any]) -> bool:
    """True where there is an interval."""
    return interval["low"] is not None
