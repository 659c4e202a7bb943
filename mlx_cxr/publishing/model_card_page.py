"""`MODEL_CARD.md`: a card of `model_card.model_card` as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_cxr.core.formatting import escaped, interval_text, notice_lines, number
from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.tables import markdown_table
from mlx_cxr.publishing import model_card_figures as figures
from mlx_cxr.publishing.claim_checklist import NOT_RECORDED

_SPLITS = ("train", "validate", "test")

Card = Mapping[str, Any]


def card_markdown(card: Card) -> str:
    """The page; synthetic data are named in its first line, and what is not known is `not recorded`."""
    of = ", a model of synthetic films" if card["synthetic"] else ""
    lines = [f"# Model card: `{card['run']}`{of}", "", *notice_lines(card["synthetic"])]
    if card["sharing"]["credentialed"]:
        lines += [f"> **{card['sharing']['terms'][0]}**", ""]
    lines += [*_glance(card), *_model(card)]
    lines += _bullets("Intended use", card["use"]["intended"]) + _bullets("Not for", card["use"]["out_of_scope"])
    lines += _bullets("Data rights", card["sharing"]["terms"])
    for section in (_data, _training, *figures.SECTIONS):
        lines += section(card)
    lines += [*_bullets("Limits", card["limits"]), *_bullets("Ethics", card["ethics"]), *_claim(card)]
    return "\n".join(lines).rstrip() + "\n"


def _glance(card: Card) -> list[str]:
    evaluation, data, abstention = card["evaluation"], card["data"], card["abstention"]
    rows = [
        ["gives", "14 probabilities for a chest film, each with a call (present, absent) or an abstention"],
        ["data", data["about"]],
        ["trained on", _count(data["counts"]["train"])],
        ["tested on", f"{_count(evaluation['counts']['test'])}, none of them in training"],
    ]
    for name, protocol in figures.protocols(evaluation):
        mean = f"mean ROC-AUC of {len(protocol['macro_labels'])} findings, `{name}`"
        rows.append([mean, interval_text(protocol["macro"]["roc_auc"])])
    if abstention is not None:
        section = abstention["protocols"][abstention["fitted_under"]]
        macro, mean = section["macro"], f"mean over {len(section['macro_labels'])} findings"
        rows.append([f"share of studies called, {mean}; it abstains on the rest", interval_text(macro["called"])])
        rows.append([f"share of those calls that are wrong, {mean}", interval_text(macro["risk_called"])])
        rows.append([f"share that would be wrong if all were called, {mean}", interval_text(macro["risk"])])
        rows.append(["never called", ", ".join(abstention["too_few"]) or "none"])
    own = " and ".join(["its own", *(f"`{name}`" for name in card["external"])])
    for name, one in card["external"].items():
        rows.append([f"mean ROC-AUC on the cohort `{name}`", interval_text(one["against_own"]["macro"]["external"])])
    sharing = "**the weights may not be passed on**" if card["sharing"]["credentialed"] else "see Data rights"
    rows += [
        ["not tested", f"cohorts other than {own}; prospective use; readers with and without it"],
        ["sharing", sharing],
        ["status", card["notice"]],
    ]
    lines = ["## At a glance", "", *markdown_table(["", ""], rows)]
    if samples := evaluation["bootstrap"]["samples"]:
        lines += [f"In brackets 95 % intervals, from {samples} resamples of the test patients.", ""]
    return lines


def _model(card: Card) -> list[str]:
    model, origin = card["model"], card["model"]["initial_weights"]
    commit = model["commit"] or NOT_RECORDED
    known = [f"{key} {origin[key]}" for key in ("source", "revision", "run", "licence") if key in origin]
    rows = [
        ["kind", model["kind"]],
        ["architecture", model["architecture"]],
        ["input", f"one film, {model['film_size']} px square ({model['fit']}), {model['in_channels']} channel(s)"],
        ["output", "14 logits, in the order of `labels.json`"],
        ["parameters", f"{model['parameters']['total']:,} ({model['parameters']['trainable']:,} trained)"],
        ["weights, SHA-256", f"`{model['checkpoint_sha256']}`"],
        ["initial weights", ", ".join([origin["weights"], *known])],
        ["trained, evaluated", f"{model['trained']}, {model['evaluated']}"],
        ["commit", f"`{commit}`{', with uncommitted changes' if model['tree_dirty'] else ''}"],
    ]
    if model["teacher"] is not None:
        rows += _teacher(model["teacher"])
    rows.append(["maker, licence of the weights, contact", f"{NOT_RECORDED}: whoever publishes the model adds them"])
    return ["## Model", "", *markdown_table(["", ""], rows)]


def _teacher(teacher: Mapping[str, Any]) -> list[list[str]]:
    known = "reads" in teacher
    about = f"; {teacher['base']}, reads: {teacher['reads']}" if known else "; what it is and reads is not recorded"
    rows = [["taught by" if teacher["targets"] == "teacher" else "soft labels of", f"`{teacher['run']}`{about}"]]
    if known:
        aucs = f"{number(teacher['zero_shot_auc'])} untrained, {number(teacher['tuned_auc'])} trained"
        rows.append(["teacher's validation macro ROC-AUC", aucs])
    return [*rows, ["soft labels, SHA-256", f"`{teacher['soft_labels_sha256']}`"]]


def _data(card: Card) -> list[str]:
    data, titles = card["data"], ["", *_SPLITS]
    lines = [
        "## Data",
        "",
        f"{data['about']} Labels: {escaped(data['label_origin'][:1].lower() + data['label_origin'][1:])}",
        "",
        f"In training, {data['label_policy_in_words']}. No patient is in two splits. Manifest, SHA-256: "
        f"`{data['manifest_sha256']}`.",
        "",
    ]
    counts = [data["counts"][split] or {} for split in _SPLITS]
    rows = [[what, *(str(by.get(what, NOT_RECORDED)) for by in counts)] for what in ("patients", "studies", "images")]
    lines += markdown_table(titles, rows, right=(1, 2, 3))
    for what, groups in (("view, images", data["views_by_split"]), ("sex", data["sex"]), ("age", data["age"])):
        if groups is None:
            lines += [f"By {what}: {NOT_RECORDED}.", ""]
        else:
            rows = [[escaped(name), *(str(by[split]) for split in _SPLITS)] for name, by in groups.items()]
            lines += markdown_table([what, *_SPLITS], rows, right=(1, 2, 3))
    if data["labels"] is None:
        return [*lines, f"By label: {NOT_RECORDED}, as the manifest's summary is not at hand.", ""]
    rows = [[k, *(" / ".join(map(str, data["labels"][k][split].values())) for split in _SPLITS)] for k in LABELS]
    return lines + markdown_table(["present / absent / uncertain / not mentioned", *_SPLITS], rows, right=(1, 2, 3))


def _training(card: Card) -> list[str]:
    training = card["training"]
    settings, outcome, device = training["settings"], training["outcome"], training["device"]
    best = number(outcome["best_auc"])
    keys = ("batch_size", "learning_rate", "weight_decay", "clip_norm", "class_weighting", "precision")
    rows = [
        ["epochs", f"{outcome['epochs']} of {settings['epochs']}, {outcome['steps']} steps"],
        ["weights kept", f"epoch {outcome['best_epoch']}, validation macro ROC-AUC {best} per film"],
        ["settings", ", ".join(f"{key} {settings[key]}" for key in keys)],
        ["augmentation", ", ".join(f"{key} {value}" for key, value in training["augmentation"].items()) + "; no flips"],
        ["seed", str(training["seed"])],
        ["time", f"{outcome['seconds'] / 60:.1f} min {figures.on_device(device)}"],
        ["software", f"Python {training['python']}, " + ", ".join(f"{k} {v}" for k, v in training["packages"].items())],
    ]
    if training["distillation"] is not None:
        settings = training["distillation"]
        keys = ("targets", "alpha", "temperature", "calibrated", "init", "feature_weight")
        rows.append(["distillation", ", ".join(f"{key} {settings[key]}" for key in keys)])
    soft = training["soft_labels"]
    if soft is not None:
        studies, agreement = f"{soft['with_soft_label']} of {soft['studies']}", number(soft["teacher_agreement"])
        rows.append(["soft labels", f"{studies} studies; agree with the labels for {agreement}"])
    return ["## Training", "", *markdown_table(["", ""], rows)]


def _claim(card: Card) -> list[str]:
    table = card["claim_2024"]
    recorded = sum(row["recorded"] for row in table)
    rows = [[str(row["item"]), row["section"], row["topic"], row["answer"]] for row in table]
    return [
        "## CLAIM 2024",
        "",
        f"{recorded} of {len(table)} items of the Checklist for Artificial Intelligence in Medical Imaging (doi "
        "10.1148/ryai.240300, topics in our words) are answered by the run; the others are for whoever publishes it.",
        "",
        *markdown_table(["item", "part", "topic", "answer"], rows, right=(0,)),
    ]


def _count(counts: Mapping[str, int] | None) -> str:
    return NOT_RECORDED if counts is None else f"{counts['studies']} studies of {counts['patients']} patients"


def _bullets(title: str, sentences: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {sentence}" for sentence in sentences), ""]
