"""Writes the report of a study: MIMIC's sections and look, from what the radiologist saw, with what it mentions.

A report is sentences drawn from the grammars in `phrases`, each with the findings that it mentions, so that the labels
a labeler would read are known from the writing. Sections come and go as in MIMIC-CXR: some reports have no FINDINGS or
no IMPRESSION, some one paragraph without a heading; names, dates and ages are `___`. What is not imitated: the
idiosyncrasies of single readers, dictation errors beyond a rare typo, addenda, and findings outside the 14.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_cxr.phantom import phrases
from mlx_cxr.phantom.canvas import Finding
from mlx_cxr.phantom.devices import BYSTANDERS, tube_height
from mlx_cxr.phantom.devices import LABEL as DEVICE_LABEL
from mlx_cxr.phantom.labeler import Seen, merge

Sentence = tuple[str, Mapping[str, int]]

ORDER = {"Support Devices": 0, "Lung Opacity": 1, "Consolidation": 1, "Pneumonia": 1, "Atelectasis": 2, "Edema": 2, "Lung Lesion": 2}
"""Position in FINDINGS: devices, lungs, then (3) pleura, heart and bones."""

PLAIN_DROP: dict[str, float] = {"Cardiomegaly": 0.10, "Support Devices": 0.07, "Fracture": 0.08, "Pleural Other": 0.08, "Atelectasis": 0.07}
"""Chance that a finding told in FINDINGS is left out of the IMPRESSION; 0.03 for the others."""

NEGATED: dict[str, float] = {
    "Pleural Effusion": 0.75,
    "Pneumothorax": 0.80,
    "Consolidation": 0.55,
    "Edema": 0.40,
    "Pneumonia": 0.18,
    "Fracture": 0.10,
    "Lung Lesion": 0.06,
    "Lung Opacity": 0.08,
    "Atelectasis": 0.03,
    "Pleural Other": 0.02,
}
"""Chance that FINDINGS say that an absent finding is absent."""

NEGATED_BRIEFLY: dict[str, float] = {"Pneumonia": 0.22, "Pneumothorax": 0.2, "Pleural Effusion": 0.12, "Edema": 0.13, "Consolidation": 0.07, "Fracture": 0.04}
"""The same for the IMPRESSION."""


@dataclass(frozen=True)
class Scene:
    """What a report needs to know besides findings.

    Attributes:
        sex: `M` or `F`.
        views: `PA and lateral`, `portable AP`, …
        bedside: whether the film was made in bed.
        prior: whether an earlier study exists.
        reasons: what the referrer asks; fields for the INDICATION.
    """

    sex: str
    views: str
    bedside: bool
    prior: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        text: as MIMIC-CXR has it, header and indents included.
        findings: what the FINDINGS section mentions (1, -1, 0 by label); None without that section.
        impression: the same for the IMPRESSION.
    """

    text: str
    findings: dict[str, int] | None
    impression: dict[str, int] | None

    @property
    def mentions(self) -> dict[str, int]:
        """What a labeler reads: the Impression, or the Findings where there is none."""
        chosen = self.impression if self.impression is not None else self.findings
        return chosen or {}


def spin(text: str, rng: np.random.Generator, fields: Mapping[str, str] | None = None) -> str:
    """One sentence of a grammar: fields filled in, a branch taken at each choice, articles and spaces set right."""
    for _ in range(6):
        filled = re.sub(r"<(\w+)>", lambda m: (fields or {}).get(m.group(1), m.group(0)), text)
        if filled == text:
            break
        text = filled
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda m: _pick(m.group(1).split("|"), rng), text)
    text = re.sub(r"@\s*(\w)", lambda m: ("an " if m.group(1) in "aeioAEIO" else "a ") + m.group(1), text)
    return re.sub(r"\s+([.,;])", r"\1", re.sub(r"\s{2,}", " ", text)).strip()


def write_report(seen: list[Seen], scene: Scene, rng: np.random.Generator) -> Report:
    """The report of one study.

    Args:
        seen: what the radiologist saw.
        scene: who, how, why.
        rng: the wording.
    """
    layout = _pick_weighted({"both": 0.64, "impression": 0.18, "findings": 0.12, "plain": 0.06}, rng)
    body = _findings(seen, scene, rng)
    summary = _impression(seen, scene, rng)
    parts = [(name, text) for name, text in _opening(scene, rng) if text]
    found = concluded = None
    if layout in ("both", "findings"):
        found = merge([m for _, m in body])
        parts.append((_pick(["FINDINGS", "FINDINGS", "FINDINGS", "FINDING"], rng), _paragraph(body, rng)))
    if layout in ("both", "impression"):
        concluded = merge([m for _, m in summary])
        parts.append((_pick(["IMPRESSION", "IMPRESSION", "IMPRESSION", "CONCLUSION"], rng), _summary_text(summary, rng)))
    if layout == "plain":
        # One paragraph under no heading, as older reports have it: a labeler takes the last section.
        found = merge([m for _, m in body])
        parts.append(("", _paragraph(body, rng)))
    return Report(_page(parts, rng), found, concluded)


def _opening(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    exam = _pick(["EXAMINATION", "EXAMINATION", "EXAM"], rng)
    who = _pick({"M": ["man", "M", "male"], "F": ["woman", "F", "female"]}[scene.sex], rng)
    reason = _pick(list(scene.reasons), rng)
    asked = spin(
        f"[___ year old {who} with {reason}|___-year-old {who} with {reason}|___{scene.sex} with {reason}|{reason[:1].upper() + reason[1:]}|History: ___{scene.sex} with {reason}]"
        "[|  // [eval|evaluate|assess] for [acute process|interval change|pneumonia|infiltrate|edema or effusion]|, [question|evaluate for|assess for] [acute process|interval change|pneumonia]].",
        rng,
    )
    technique = {
        "PA and lateral": "[Chest PA and lateral|PA and lateral views of the chest [were obtained|]|Frontal and lateral views of the chest|Upright PA and lateral radiographs of the chest].",
        "portable AP": "[Portable AP [upright |semi-upright |supine |]view of the chest|Single AP portable view of the chest|Portable chest radiograph|Semi-erect portable chest].",
        "AP": "[AP view of the chest|Single frontal view of the chest|Single AP upright chest radiograph].",
        "PA": "[PA view of the chest|Single frontal radiograph of the chest].",
        "AP and lateral": "[AP and lateral views of the chest|Frontal and lateral radiographs of the chest, AP projection].",
    }[scene.views]
    compared = (
        "[Chest radiograph [from |dated |of ]___|___|Multiple prior radiographs, most recent ___|Prior chest radiograph ___|Comparison is made with chest radiograph from ___]."
        if scene.prior
        else "[None|None available|None.  No prior films are available|No prior|Chest CT ___]."
    )
    title = {"portable AP": "CHEST (PORTABLE AP)", "PA and lateral": "CHEST (PA AND LAT)", "AP and lateral": "CHEST (AP AND LAT)"}.get(scene.views, "CHEST (SINGLE VIEW)")
    return [
        (exam, _pick([title, title, f"Chest radiograph, {scene.views}", f"Chest: {scene.views}"], rng) if rng.random() < 0.85 else ""),
        (_pick(["INDICATION", "INDICATION", "INDICATION", "HISTORY", "CLINICAL HISTORY", "REASON FOR EXAM"], rng), asked if rng.random() < 0.95 else ""),
        ("TECHNIQUE", spin(technique, rng) if rng.random() < 0.75 else ""),
        (_pick(["COMPARISON", "COMPARISON", "COMPARISONS"], rng), spin(compared, rng) if rng.random() < 0.88 else ""),
    ]


def _findings(seen: list[Seen], scene: Scene, rng: np.random.Generator) -> list[Sentence]:
    told = sorted(seen, key=lambda item: (ORDER.get(item.finding.label, 3), rng.random()))
    sentences: list[Sentence] = []
    for item in told:
        sentences.extend(_device_sentences(item, rng) if item.finding.label == DEVICE_LABEL else [state(item, rng)])
    known = {label for _, mentions in sentences for label in mentions}
    lungs_ill = known & {"Lung Opacity", "Consolidation", "Pneumonia", "Edema", "Lung Lesion", "Atelectasis", "Pneumothorax", "Pleural Effusion"}
    if not lungs_ill and rng.random() < 0.75:
        sentences.insert(0, (spin(_pick(phrases.NORMAL_LUNGS, rng), rng), {}))
    sentences += _negations(known, NEGATED, rng)
    if not known & {"Cardiomegaly", "Enlarged Cardiomediastinum"}:
        draw = rng.random()
        if draw < 0.5:
            sentences.append((spin(_pick(phrases.NORMAL_SILHOUETTE, rng), rng), {"Enlarged Cardiomediastinum": 0}))
        if 0.35 < draw < 0.85:
            sentences.append((spin(_pick(phrases.NORMAL_HEART, rng), rng), {"Cardiomegaly": 0}))
    for number in rng.permutation(len(phrases.FILLERS))[: int(rng.integers(0, 3))]:
        sentences.append((spin(phrases.FILLERS[number], rng), {}))
    opener = {"portable AP": "[AP portable [upright |semi-upright |]view of the chest.  |Portable AP chest film.  |]", "PA and lateral": "[PA and lateral views of the chest provided.  |Frontal and lateral views were obtained.  |]"}
    if rng.random() < 0.3 and scene.views in opener and (first := spin(opener[scene.views], rng)):
        sentences.insert(0, (first, {}))
    return sentences


def _impression(seen: list[Seen], scene: Scene, rng: np.random.Generator) -> list[Sentence]:
    sentences: list[Sentence] = []
    for item in sorted(seen, key=lambda item: (item.finding.label == DEVICE_LABEL, -item.finding.severity)):
        label = item.finding.label
        subtle = 0.12 if item.finding.severity < 0.35 and label != DEVICE_LABEL else 0.0
        if rng.random() < PLAIN_DROP.get(label, 0.03) + subtle + (0.4 if item.value == 0 else 0.0):
            continue
        sentences.append(_device_summary(item, rng) if label == DEVICE_LABEL else state(item, rng, brief=True))
    known = {label for _, mentions in sentences for label in mentions}
    if not any(value for _, mentions in sentences for label, value in mentions.items() if label != DEVICE_LABEL):
        sentences.insert(0, (spin(_pick(phrases.NORMAL_IMPRESSION, rng), rng), {}))
    elif scene.prior and rng.random() < 0.1:
        sentences.append((spin("[Otherwise no|No] [other |]significant [interval |]change [since|from] <prior>.", rng, {"prior": phrases.PRIOR}), {}))
    sentences += _negations(known, NEGATED_BRIEFLY, rng)
    return sentences


def state(item: Seen, rng: np.random.Generator, brief: bool = False) -> Sentence:
    """A sentence about one finding, with what it mentions.

    Args:
        item: what, how sure, and how it changed.
        rng: the wording.
        brief: as in an impression: a fragment rather than a sentence.
    """
    label = item.finding.label
    fields = _fields(item.finding, rng)
    if item.value == -1:
        text, extra = _text(_pick(phrases.HEDGED[label], rng))
        # What is possibly opacity is put as opacity; the hedge is on its cause.
        return _capital(spin(text, rng, fields)), {**({extra: 1} if extra else {}), label: -1}
    fresh = item.change in ("first", "new")
    if fresh and not brief and label in phrases.SENTENCE and rng.random() < 0.4:
        text, extra = _text(_pick(phrases.SENTENCE[label], rng))
        return _capital(spin(text, rng, fields)), {**({extra: 1} if extra else {}), label: 1}
    variants = phrases.NOUN[label]
    text, extra = _text(_pick(variants[_variant(item.finding, variants)], rng))
    noun = spin(text.lstrip("@"), rng, fields)
    many = bool(re.search(r"(effusions|fractures|nodules|masses|opacities|plaques)\b", noun.split(" consistent")[0].split(" compatible")[0]))
    fields |= {
        "np": ("@" if text.startswith("@") and not many else "") + noun,
        "bare": noun,
        "is": "are" if many else "is",
        "has": "have" if many else "has",
        "prior": phrases.PRIOR,
    }
    value = 0 if item.change == "resolved" else 1
    frame = _pick((BRIEF if brief else FULL)[item.change], rng)
    mentions = {label: value} | ({extra: value} if extra else {})
    return _capital(spin(frame, rng, fields)), mentions


FULL: dict[str, list[str]] = {
    "first": ["There <is> <np>.", "There <is> <np>.", "<np> <is> [seen|noted|present|identified|demonstrated].", "<bare>."],
    "new": ["There <is> <np>, new [since|from|compared to] <prior>.", "New <bare>.", "[Interval development of|There has been interval development of] <np>.", "<bare> <is> new."],
    "worse": ["[Interval increase in|Interval worsening of|There has been interval worsening of] <bare>.", "<bare> <has> [increased|worsened|progressed] [since|compared to|from] <prior>.", "Worsening <bare>."],
    "better": ["<bare> <has> [decreased|improved|diminished] [since|compared to|from] <prior>.", "[Interval improvement in|Interval decrease in] <bare>.", "[Improving|Decreasing] <bare>."],
    "stable": ["[Unchanged|Stable|Persistent] <bare>.", "<bare> <is> [unchanged|stable|not significantly changed|similar][| compared to <prior>| since <prior>].", "[Again seen|Again noted] <is> <np>."],
    "resolved": ["[Previously seen|Previously noted|The prior] <bare> <has> resolved.", "[Interval resolution of|Resolution of] <bare>.", "<bare> <is> no longer [seen|present|evident]."],
}
BRIEF: dict[str, list[str]] = {
    "first": ["<bare>.", "<bare>.", "<np>.", "There <is> <np>."],
    "new": ["New <bare>.", "Interval development of <bare>.", "<bare>, new [since|from] <prior>."],
    "worse": ["[Worsening|Increasing|Increased|Interval worsening of|Interval increase in] <bare>.", "<bare>, [increased|worse|progressed] [since|from|compared to] <prior>."],
    "better": ["[Improved|Improving|Decreased|Interval improvement in] <bare>.", "<bare>, [improved|decreased] [since|from|compared to] <prior>."],
    "stable": ["[Stable|Unchanged|Persistent] <bare>.", "<bare>, [unchanged|stable|not significantly changed].", "<bare> <is> [unchanged|stable]."],
    "resolved": ["[Interval resolution of|Resolved|Resolution of] <bare>."],
}


def _variant(finding: Finding, variants: Mapping[str, object]) -> str:
    s, label = finding.severity, finding.label
    wanted = {
        "Fracture": f"{finding.kind} one" if 1 + int(4.6 * s) == 1 else finding.kind,
        "Lung Lesion": "multiple" if finding.kind == "multiple" else ("mass" if _diameter(s) >= 3 else "nodule"),
    }.get(label, "both" if finding.side == 0 else finding.kind)
    return wanted if wanted in variants else next(iter(variants))


def _diameter(severity: float) -> float:
    """Of a single lesion, cm, as `findings.draw_lesion` draws it on average."""
    return 2 * (0.55 + 2.4 * severity**1.3) * 0.875


def _fields(finding: Finding, rng: np.random.Generator) -> dict[str, str]:
    s = finding.severity
    size = "small" if s < 0.38 else "moderate" if s < 0.68 else "large"
    wide = _diameter(s)
    cm = f"{wide:.1f} cm" if wide >= 1 and rng.random() < 0.7 else f"{round(wide * 10)} mm"
    both = finding.side == 0 and finding.kind not in phrases.LOBES
    side = {1: "left", -1: "right", 0: "bilateral"}[finding.side]
    lobe = phrases.LOBES["both" if both else finding.kind if finding.kind in phrases.LOBES else ""]
    return {
        "size": phrases.SIZE[size],
        "grade": phrases.GRADE[size],
        "gradely": phrases.HEART[size],
        "lobe": lobe,
        "lobebare": finding.kind if finding.kind in phrases.LOBES and finding.kind else f"{side} lower lobe",
        "side": side,
        "cm": cm,
    }


def _device_sentences(item: Seen, rng: np.random.Generator) -> list[Sentence]:
    names = item.finding.kind.split("|")
    drain = "left" if item.finding.side == 1 else "right"
    fields = {"tip": f"{tube_height(item.finding.seed):.1f}", "drain": drain, "Drain": drain.capitalize()}
    told = [(_capital(spin(_pick(phrases.DEVICES[name], rng), rng, fields)), {} if name in BYSTANDERS else {DEVICE_LABEL: 1}) for name in names if name in phrases.DEVICES]
    return [told[i] for i in rng.permutation(len(told))]


def _device_summary(item: Seen, rng: np.random.Generator) -> Sentence:
    names = [name for name in item.finding.kind.split("|") if name not in BYSTANDERS]
    short = {"right internal jugular central venous line": "right IJ line", "subclavian central venous line": "central line", "PICC": "PICC line"}
    listed = [short.get(name, name) for name in names]
    text = " and ".join([", ".join(listed[:-1]), listed[-1]]) if len(listed) > 1 else listed[0]
    sentence = spin(_pick(phrases.DEVICE_SUMMARY[1:] if len(names) == 1 else phrases.DEVICE_SUMMARY, rng), rng, {"devices": text, "Devices": _capital(text)})
    return sentence, {DEVICE_LABEL: 1}


def _negations(known: set[str], chances: Mapping[str, float], rng: np.random.Generator) -> list[Sentence]:
    labels = [label for label, chance in chances.items() if label not in known and rng.random() < chance]
    labels = [labels[i] for i in rng.permutation(len(labels))]
    out: list[Sentence] = []
    while labels:
        count = min(len(labels), int(rng.integers(1, 4)))
        some, labels = labels[:count], labels[count:]
        things = [_pick(phrases.ABSENT[label], rng) for label in some]
        joined = things[0] if count == 1 else ", ".join(things[:-1]) + _pick([" or ", ", or ", " or "], rng) + things[-1]
        opening = "[There is no|No|There is no|No evidence of]" if "evidence" not in joined else "[There is no|No]"
        text = spin(f"{opening} {joined}[||| [is seen|seen|identified]].", rng) if joined else ""
        text = re.sub(r"^(There is no .*?) (is seen|seen|identified)\.$", r"\1.", text)
        out.append((text, dict.fromkeys(some, 0)))
    return out


def _paragraph(sentences: list[Sentence], rng: np.random.Generator) -> str:
    gap = _pick(["  ", "  ", " "], rng)
    return _typo(gap.join(text for text, _ in sentences if text), rng)


def _summary_text(sentences: list[Sentence], rng: np.random.Generator) -> str:
    texts = [text for text, _ in sentences if text]
    if len(texts) > 1 and rng.random() < 0.55:
        return _typo("\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1)), rng)
    return _typo("  ".join(texts), rng)


def _page(parts: list[tuple[str, str]], rng: np.random.Generator) -> str:
    """Header, indents and line breaks as MIMIC-CXR has them."""
    lines = [" " * 33 + "FINAL REPORT"]
    for name, text in parts:
        blocks = text.split("\n")
        blocks[0] = f"{name}:  {blocks[0]}" if name else blocks[0]
        if name and rng.random() < 0.3 and name in ("FINDINGS", "IMPRESSION"):
            lines.append(f" {name}:  ")
            lines.append(" ")
            blocks = text.split("\n")
        for block in blocks:
            lines += textwrap.wrap(block, 78, initial_indent=" ", subsequent_indent=" ", fix_sentence_endings=False) or [" "]
        lines.append(" ")
    return "\n".join(lines).rstrip() + "\n"


def _typo(text: str, rng: np.random.Generator) -> str:
    """Now and then two letters change places inside a long word that no labeler looks for."""
    if rng.random() > 0.05:
        return text
    words = [m for m in re.finditer(r"\b(compared|unchanged|interval|approximately|terminates|identified|demonstrated|contours)\b", text)]
    if not words:
        return text
    word = words[int(rng.integers(len(words)))]
    at = word.start() + int(rng.integers(2, len(word.group()) - 2))
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _text(entry: phrases.Text) -> tuple[str, str | None]:
    return entry if isinstance(entry, tuple) else (entry, None)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pick(options: list[str] | list[phrases.Text], rng: np.random.Generator):  # noqa: ANN202
    return options[int(rng.integers(len(options)))]


def _pick_weighted(options: Mapping[str, float], rng: np.random.Generator) -> str:
    return str(rng.choice(list(options), p=list(options.values())))
