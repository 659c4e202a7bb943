"""The sections before the findings in a report: examination, indication, technique, comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_cxr.synthetic.grammar import capital, pick, spin

TITLE = {
    "portable AP": "CHEST (PORTABLE AP)",
    "PA and lateral": "CHEST (PA AND LAT)",
    "AP and lateral": "CHEST (AP AND LAT)",
    "AP": "CHEST (SINGLE VIEW)",
    "PA": "CHEST (SINGLE VIEW)",
}
TECHNIQUE = {
    "PA and lateral": (
        "[Chest PA and lateral|PA and lateral views of the chest [were obtained|]|"
        "Frontal and lateral views of the chest|Upright PA and lateral radiographs of the chest]."
    ),
    "portable AP": (
        "[Portable AP [upright |semi-upright |supine |]view of the chest|Single AP portable view of the chest|"
        "Portable chest radiograph|Semi-erect portable chest]."
    ),
    "AP": "[AP view of the chest|Single frontal view of the chest|Single AP upright chest radiograph].",
    "PA": "[PA view of the chest|Single frontal radiograph of the chest].",
    "AP and lateral": (
        "[AP and lateral views of the chest|Frontal and lateral radiographs of the chest, AP projection]."
    ),
}
COMPARED = (
    "[Chest radiograph [from |dated |of ]___|___|Multiple prior radiographs, most recent ___|"
    "Prior chest radiograph ___|Comparison is made with chest radiograph from ___]."
)
NOT_COMPARED = "[None|None available|None.  No prior films are available|No prior|Chest CT ___]."
ASKED = (
    "[___ year old <who> with <reason>|___-year-old <who> with <reason>|___<sex> with <reason>|<Reason>|"
    "History: ___<sex> with <reason>]"
    "[|  // [eval|evaluate|assess] for [acute process|interval change|pneumonia|infiltrate|edema or effusion]"
    "|, [question|evaluate for|assess for] [acute process|interval change|pneumonia]]."
)


@dataclass(frozen=True)
class Scene:
    """The facts of a study that its report states besides findings.

    Attributes:
        sex: `M` or `F`.
        views: `PA and lateral`, `portable AP`, …
        prior: an earlier study exists.
        reasons: the referrer's reasons, one of which fills the INDICATION.
    """

    sex: str
    views: str
    prior: bool
    reasons: tuple[str, ...]


def opening_sections(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Heading and text of the sections before the findings; each is left out now and then, as in MIMIC-CXR."""
    reason = pick(scene.reasons, rng)
    fields = {
        "who": pick({"M": ["man", "M", "male"], "F": ["woman", "F", "female"]}[scene.sex], rng),
        "sex": scene.sex,
        "reason": reason,
        "Reason": capital(reason),
    }
    title = TITLE[scene.views]
    wanted = [
        (0.85, ["EXAMINATION", "EXAMINATION", "EXAM"], [title, title, "Chest radiograph, <v>", "Chest: <v>"]),
        (0.95, ["INDICATION", "INDICATION", "INDICATION", "HISTORY", "CLINICAL HISTORY", "REASON FOR EXAM"], [ASKED]),
        (0.75, ["TECHNIQUE"], [TECHNIQUE[scene.views]]),
        (0.88, ["COMPARISON", "COMPARISON", "COMPARISONS"], [COMPARED if scene.prior else NOT_COMPARED]),
    ]
    return [
        (pick(headings, rng), spin(pick(texts, rng), rng, fields | {"v": scene.views}))
        for chance, headings, texts in wanted
        if rng.random() < chance
    ]
