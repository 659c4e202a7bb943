"""The report of a study: MIMIC's sections and look, from what the radiologist saw, with what it mentions.

A report is sentences drawn from the grammars in `phrases`, each with the findings that it mentions, so that the labels
a labeler would read are known from the writing. Sections come and go as in MIMIC-CXR: some reports have no FINDINGS or
no IMPRESSION, some one paragraph without a heading; names, dates and ages are `___`. What is not imitated: the
idiosyncrasies of single readers, dictation errors beyond a rare typo, addenda, and findings outside the 14.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_cxr.synthetic import phrases, stock_phrases
from mlx_cxr.synthetic.canvas import Finding
from mlx_cxr.synthetic.devices import BYSTANDERS, tube_height
from mlx_cxr.synthetic.devices import LABEL as DEVICE_LABEL
from mlx_cxr.synthetic.findings import OPACITIES, broken_ribs, lesion_radius
from mlx_cxr.synthetic.grammar import capital, page, pick, spin, typo
from mlx_cxr.synthetic.labeler import Seen, merge
from mlx_cxr.synthetic.opening import Scene, opening_sections

Sentence = tuple[str, Mapping[str, int]]

ORDER = {
    "Support Devices": 0,
    "Lung Opacity": 1,
    "Consolidation": 1,
    "Pneumonia": 1,
    "Atelectasis": 2,
    "Edema": 2,
    "Lung Lesion": 2,
}
"""Position in FINDINGS: devices, lungs, then (3) pleura, heart and bones."""

PLAIN_DROP: dict[str, float] = {
    "Cardiomegaly": 0.10,
    "Support Devices": 0.07,
    "Fracture": 0.08,
    "Pleural Other": 0.08,
    "Atelectasis": 0.07,
}
"""Chance that a finding stated in FINDINGS is left out of the IMPRESSION; 0.03 for the others."""

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

NEGATED_BRIEFLY: dict[str, float] = {
    "Pneumonia": 0.22,
    "Pneumothorax": 0.2,
    "Pleural Effusion": 0.12,
    "Edema": 0.13,
    "Consolidation": 0.07,
    "Fracture": 0.04,
}
"""The same for the IMPRESSION."""


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        text: as MIMIC-CXR has it, header and indents included.
        findings: mentions of the FINDINGS section (1, -1, 0 by label); None without that section.
        impression: the same for the IMPRESSION.
    """

    text: str
    findings: dict[str, int] | None
    impression: dict[str, int] | None

    @property
    def mentions(self) -> dict[str, int]:
        """Mentions that a labeler reads: the Impression's, or the Findings' where there is none."""
        chosen = self.impression if self.impression is not None else self.findings
        return chosen or {}


def write_report(seen: list[Seen], scene: Scene, rng: np.random.Generator) -> Report:
    """The report of one study, from the findings that the radiologist saw; `rng` decides the wording."""
    layout = str(rng.choice(["both", "impression", "findings", "plain"], p=[0.64, 0.18, 0.12, 0.06]))
    body = _findings(seen, scene, rng)
    summary = _impression(seen, scene, rng)
    parts = opening_sections(scene, rng)
    found = None if layout == "impression" else merge([mentions for _, mentions in body])
    concluded = None
    if layout in ("both", "findings"):
        parts.append((pick(["FINDINGS", "FINDINGS", "FINDINGS", "FINDING"], rng), _paragraph(body, rng)))
    if layout in ("both", "impression"):
        concluded = merge([m for _, m in summary])
        heading = pick(["IMPRESSION", "IMPRESSION", "IMPRESSION", "CONCLUSION"], rng)
        texts = [text for text, _ in summary if text]
        if len(texts) > 1 and rng.random() < 0.55:
            text = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        else:
            text = "  ".join(texts)
        parts.append((heading, typo(text, rng)))
    if layout == "plain":
        # One paragraph under no heading, as older reports have it: a labeler takes the last section.
        parts.append(("", _paragraph(body, rng)))
    return Report(page(parts, rng), found, concluded)


def _findings(seen: list[Seen], scene: Scene, rng: np.random.Generator) -> list[Sentence]:
    told = sorted(seen, key=lambda item: (ORDER.get(item.finding.label, 3), rng.random()))
    sentences: list[Sentence] = []
    for item in told:
        sentences.extend(_device_sentences(item, rng) if item.finding.label == DEVICE_LABEL else [state(item, rng)])
    known = {label for _, mentions in sentences for label in mentions}
    if not known & {*OPACITIES, "Pneumothorax", "Pleural Effusion"} and rng.random() < 0.75:
        sentences.insert(0, (spin(pick(stock_phrases.NORMAL_LUNGS, rng), rng), {}))
    sentences += _negations(known, NEGATED, rng)
    if not known & {"Cardiomegaly", "Enlarged Cardiomediastinum"}:
        draw = rng.random()
        if draw < 0.5:
            text = spin(pick(stock_phrases.NORMAL_SILHOUETTE, rng), rng)
            sentences.append((text, {"Enlarged Cardiomediastinum": 0}))
        if 0.35 < draw < 0.85:
            sentences.append((spin(pick(stock_phrases.NORMAL_HEART, rng), rng), {"Cardiomegaly": 0}))
    for number in rng.permutation(len(stock_phrases.FILLERS))[: int(rng.integers(0, 3))]:
        sentences.append((spin(stock_phrases.FILLERS[number], rng), {}))
    opener = {
        "portable AP": "[AP portable [upright |semi-upright |]view of the chest.  |Portable AP chest film.  |]",
        "PA and lateral": "[PA and lateral views of the chest provided.  |Frontal and lateral views were obtained.  |]",
    }
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
        sentences.insert(0, (spin(pick(stock_phrases.NORMAL_IMPRESSION, rng), rng), {}))
    elif scene.prior and rng.random() < 0.1:
        unchanged = "[Otherwise no|No] [other |]significant [interval |]change [since|from] <prior>."
        sentences.append((spin(unchanged, rng, {"prior": stock_phrases.PRIOR}), {}))
    sentences += _negations(known, NEGATED_BRIEFLY, rng)
    return sentences


def state(item: Seen, rng: np.random.Generator, brief: bool = False) -> Sentence:
    """A sentence about one finding, with what it mentions; `brief`, a fragment, as in an impression."""
    label = item.finding.label
    fields = _fields(item.finding, rng)
    if item.value == -1:
        text, also = _text(pick(phrases.HEDGED[label], rng))
        # What is possibly opacity is put as opacity; the hedge is on its cause.
        return capital(spin(text, rng, fields)), {**dict.fromkeys(also, 1), label: -1}
    fresh = item.change in ("first", "new")
    if fresh and not brief and label in phrases.SENTENCE and rng.random() < 0.4:
        text, also = _text(pick(phrases.SENTENCE[label], rng))
        return capital(spin(text, rng, fields)), dict.fromkeys((*also, label), 1)
    variants = phrases.NOUN[label]
    text, also = _text(pick(variants[_variant(item.finding, variants)], rng))
    noun = spin(text.lstrip("@"), rng, fields)
    head = noun.split(" consistent")[0].split(" compatible")[0]
    many = re.search(r"(effusions|fractures|nodules|masses|opacities|plaques)\b", head) is not None
    fields |= {
        "np": ("@" if text.startswith("@") and not many else "") + noun,
        "bare": noun,
        "is": "are" if many else "is",
        "has": "have" if many else "has",
        "prior": stock_phrases.PRIOR,
    }
    value = 0 if item.change == "resolved" else 1
    frame = pick((BRIEF if brief else FULL)[item.change], rng)
    return capital(spin(frame, rng, fields)), dict.fromkeys((label, *also), value)


FULL: dict[str, list[str]] = {
    "first": [
        "There <is> <np>.",
        "There <is> <np>.",
        "<np> <is> [seen|noted|present|identified|demonstrated].",
        "<bare>.",
    ],
    "new": [
        "There <is> <np>, new [since|from|compared to] <prior>.",
        "New <bare>.",
        "[Interval development of|There has been interval development of] <np>.",
        "<bare> <is> new.",
    ],
    "worse": [
        "[Interval increase in|Interval worsening of|There has been interval worsening of] <bare>.",
        "<bare> <has> [increased|worsened|progressed] [since|compared to|from] <prior>.",
        "Worsening <bare>.",
    ],
    "better": [
        "<bare> <has> [decreased|improved|diminished] [since|compared to|from] <prior>.",
        "[Interval improvement in|Interval decrease in] <bare>.",
        "[Improving|Decreasing] <bare>.",
    ],
    "stable": [
        "[Unchanged|Stable|Persistent] <bare>.",
        "<bare> <is> [unchanged|stable|not significantly changed|similar][| compared to <prior>| since <prior>].",
        "[Again seen|Again noted] <is> <np>.",
    ],
    "resolved": [
        "[Previously seen|Previously noted|The prior] <bare> <has> resolved.",
        "[Interval resolution of|Resolution of] <bare>.",
        "<bare> <is> no longer [seen|present|evident].",
    ],
}
BRIEF: dict[str, list[str]] = {
    "first": ["<bare>.", "<bare>.", "<np>.", "There <is> <np>."],
    "new": ["New <bare>.", "Interval development of <bare>.", "<bare>, new [since|from] <prior>."],
    "worse": [
        "[Worsening|Increasing|Increased|Interval worsening of|Interval increase in] <bare>.",
        "<bare>, [increased|worse|progressed] [since|from|compared to] <prior>.",
    ],
    "better": [
        "[Improved|Improving|Decreased|Interval improvement in] <bare>.",
        "<bare>, [improved|decreased] [since|from|compared to] <prior>.",
    ],
    "stable": [
        "[Stable|Unchanged|Persistent] <bare>.",
        "<bare>, [unchanged|stable|not significantly changed].",
        "<bare> <is> [unchanged|stable].",
    ],
    "resolved": ["[Interval resolution of|Resolved|Resolution of] <bare>."],
}


def _variant(finding: Finding, variants: Mapping[str, object]) -> str:
    s, label = finding.severity, finding.label
    wanted = {
        "Fracture": f"{finding.kind} one" if broken_ribs(s) == 1 else finding.kind,
        "Lung Lesion": "multiple" if finding.kind == "multiple" else ("mass" if _diameter(s) >= 3 else "nodule"),
    }.get(label, "both" if finding.side == 0 else finding.kind)
    return wanted if wanted in variants else next(iter(variants))


def _diameter(severity: float) -> float:
    """Of a single lesion, cm, as `findings.draw_lesion` draws it on average."""
    return 2 * lesion_radius(severity) * 0.875


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
    told = []
    for name in names:
        if name in stock_phrases.DEVICES:
            text = spin(pick(stock_phrases.DEVICES[name], rng), rng, fields)
            told.append((capital(text), {} if name in BYSTANDERS else {DEVICE_LABEL: 1}))
    return [told[i] for i in rng.permutation(len(told))]


def _device_summary(item: Seen, rng: np.random.Generator) -> Sentence:
    names = [name for name in item.finding.kind.split("|") if name not in BYSTANDERS]
    short = {
        "right internal jugular central venous line": "right IJ line",
        "subclavian central venous line": "central line",
        "PICC": "PICC line",
    }
    listed = [short.get(name, name) for name in names]
    text = " and ".join([", ".join(listed[:-1]), listed[-1]]) if len(listed) > 1 else listed[0]
    summary = pick(stock_phrases.DEVICE_SUMMARY[1:] if len(names) == 1 else stock_phrases.DEVICE_SUMMARY, rng)
    return spin(summary, rng, {"devices": text, "Devices": capital(text)}), {DEVICE_LABEL: 1}


def _negations(known: set[str], chances: Mapping[str, float], rng: np.random.Generator) -> list[Sentence]:
    labels = [label for label, chance in chances.items() if label not in known and rng.random() < chance]
    labels = [labels[i] for i in rng.permutation(len(labels))]
    out: list[Sentence] = []
    while labels:
        count = min(len(labels), int(rng.integers(1, 4)))
        some, labels = labels[:count], labels[count:]
        things = [pick(stock_phrases.ABSENT[label], rng) for label in some]
        joined = things[0] if count == 1 else ", ".join(things[:-1]) + pick([" or ", ", or ", " or "], rng) + things[-1]
        opening = "[There is no|No|There is no|No evidence of]" if "evidence" not in joined else "[There is no|No]"
        text = spin(f"{opening} {joined}[||| [is seen|seen|identified]].", rng) if joined else ""
        text = re.sub(r"^(There is no .*?) (is seen|seen|identified)\.$", r"\1.", text)
        out.append((text, dict.fromkeys(some, 0)))
    return out


def _paragraph(sentences: list[Sentence], rng: np.random.Generator) -> str:
    gap = pick(["  ", "  ", " "], rng)
    return typo(gap.join(text for text, _ in sentences if text), rng)


def _text(entry: str) -> tuple[str, tuple[str, ...]]:
    """A grammar without its mark, and the labels that it mentions besides its own."""
    return entry.removeprefix("+"), ("Lung Opacity",) if entry.startswith("+") else ()
