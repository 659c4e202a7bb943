"""The wording of reports, as small grammars: `[a|b]` is a choice (nested, may be empty), `<name>` a field.

A noun phrase that begins with `@` takes an article. A text that begins with `+` also mentions Lung Opacity as present;
the mark itself is not written. The words follow the mention lists of the CheXpert labeler (Irvin et al.,
arXiv:1901.07031), so that a labeler of that kind reads from the text what was meant; the sentences are written for this
package and come from no report.
"""

from __future__ import annotations

SIZE = {
    "small": "[small|small|trace|tiny|minimal]",
    "moderate": "[moderate|moderate|moderate-sized|small to moderate]",
    "large": "[large|large|moderate to large|substantial]",
}
GRADE = {
    "small": "[mild|mild|minimal|slight]",
    "moderate": "[moderate|moderate|mild to moderate]",
    "large": "[severe|marked|moderate to severe]",
}
HEART = {"small": "[mildly|mildly|slightly]", "moderate": "moderately", "large": "[severely|markedly|massively]"}

LOBES = {
    "right upper lobe": "[right upper lobe|right upper lung|right apex]",
    "right middle lobe": "[right middle lobe|right mid lung|right middle lobe]",
    "right lower lobe": "[right lower lobe|right lung base|right base|right lower lung]",
    "left upper lobe": "[left upper lobe|left upper lung]",
    "lingula": "[lingula|left mid lung]",
    "left lower lobe": "[left lower lobe|left lung base|left base|retrocardiac region|left lower lung]",
    "": "[<side> lung|<side> lower lung|<side> lung base]",
    "both": "[both lungs|both lung bases|the lung bases bilaterally]",
}

NOUN: dict[str, dict[str, list[str]]] = {
    "Atelectasis": {
        "plate": [
            "[|mild |minimal ]<side> [basilar|basal|lung base] atelectasis",
            "[linear|plate-like|subsegmental|discoid|bandlike] atelectasis [at|in] the <side> [base|lung base]",
            "<side> [lower lobe|basilar] [linear|subsegmental|plate-like] atelectasis",
        ],
        "lobar": [
            "<side> lower lobe [collapse|atelectasis]",
            "[partial |near-complete |]<side> lower lobe collapse",
            "[substantial|extensive] <side> lower lobe atelectasis",
        ],
        "both": [
            "[|mild |minimal |moderate ]bibasilar atelectasis",
            "bibasilar [linear|subsegmental|plate-like] atelectasis",
            "bilateral lower lobe atelectasis",
            "atelectasis at [both|the] lung bases",
        ],
    },
    "Cardiomegaly": {
        "": [
            "<grade> cardiomegaly",
            "<grade> [enlargement of the cardiac silhouette|cardiac enlargement]",
            "<grade> cardiomegaly",
        ]
    },
    "Consolidation": {
        "": [
            "@[focal |dense |confluent |]consolidation [in|within] the <lobe>",
            "consolidation [in|of|within] the <lobe>",
            "+@[dense|confluent|large] [|airspace ]opacity in the <lobe> [compatible|consistent] with consolidation",
            "+[|confluent |dense ]airspace opacification [in|of] the <lobe> consistent with consolidation",
        ]
    },
    "Edema": {
        "": [
            "<grade> [pulmonary|interstitial|interstitial pulmonary] edema",
            "<grade> pulmonary edema",
            "<grade> pulmonary vascular congestion [and|with] interstitial edema",
            "<grade> [asymmetric |]pulmonary edema",
        ]
    },
    "Enlarged Cardiomediastinum": {
        "": [
            "[|<grade> ]widening of the [|upper |superior ]mediastinum",
            "@[|<gradely> ]widened [upper |superior |]mediastinum",
            "enlargement of the cardiomediastinal silhouette",
        ]
    },
    "Fracture": {
        "acute one": [
            "@[|mildly displaced |displaced |acute ]fracture of @[|lateral |posterolateral ]<side> rib",
            "@[displaced |acute |]<side> [lateral |]rib fracture",
        ],
        "acute": [
            "multiple [acute |displaced |]<side> rib fractures",
            "<side> [lateral |posterolateral |]rib fractures",
            "[several|multiple] [mildly displaced |displaced |]<side>-sided rib fractures",
        ],
        "old one": ["@[healed|healing|old] <side> [lateral |]rib fracture", "@chronic <side> rib fracture"],
        "old": [
            "multiple [old|healed|healing|remote] <side> rib fractures",
            "[old|healed|chronic] <side>-sided rib fractures",
        ],
    },
    "Lung Lesion": {
        "nodule": [
            "@<cm> [|rounded |solid |spiculated ][nodule|pulmonary nodule] [in|projecting over] the <side> lung",
            "@<side> [lung|pulmonary] nodule [measuring|of] [approximately |]<cm>",
        ],
        "mass": [
            "@<cm> [|lobulated |spiculated |rounded ]mass in the <side> lung",
            "@<side> lung mass measuring [approximately |up to ]<cm>",
            "@[large |]<side> pulmonary mass",
        ],
        "multiple": [
            "multiple [bilateral |]pulmonary nodules",
            "multiple [rounded |]pulmonary nodules [bilaterally|in both lungs]",
            "innumerable [bilateral |]pulmonary nodules and masses",
        ],
    },
    "Lung Opacity": {
        "": [
            (
                "@[patchy|hazy|ill-defined|heterogeneous|focal|vague] [|airspace ]opacity [in|within|"
                "projecting over] the <lobe>"
            ),
            "[patchy|hazy|heterogeneous|ill-defined] opacities [in|within|at] the <lobe>",
            "[hazy|patchy] opacification of the <lobe>",
        ]
    },
    "Pleural Effusion": {
        "": [
            "@<size> <side> pleural effusion",
            "@<size> <side>-sided pleural effusion",
            "@<size> <side> effusion",
            "@<size>[| layering] <side> pleural effusion",
        ],
        "both": [
            "<size> bilateral pleural effusions",
            "bilateral [<size> |]pleural effusions",
            "<size> bilateral effusions, [right greater than left|left greater than right]",
        ],
    },
    "Pleural Other": {
        "apical cap": [
            "[|<grade> ]<side> apical pleural thickening",
            "<side> [biapical |apical |]pleural thickening",
        ],
        "thickening": [
            "[|<grade> |smooth |chronic ]<side>[-sided|] pleural thickening",
            "<side> [lateral |]pleural thickening",
            "<side> pleural thickening [along the lateral chest wall|at the lung base]",
        ],
        "plaques": [
            "calcified <side> pleural plaques and pleural thickening",
            "<side> [calcified |]pleural thickening",
            "pleural thickening with calcified plaques on the <side>",
        ],
        "both": [
            "[|<grade> ]bilateral pleural thickening",
            "bilateral [calcified |]pleural thickening[| and plaques]",
        ],
    },
    "Pneumonia": {
        "": [
            "+[patchy|multifocal|heterogeneous] opacities in the <lobe> [compatible|consistent] with pneumonia",
            "<lobebare> pneumonia",
            "+@[patchy|focal] opacity in the <lobe> [consistent with|compatible with|representing] pneumonia",
            "pneumonia [in|of|involving] the <lobe>",
        ],
        "both": [
            "multifocal pneumonia",
            "bilateral [|multifocal ]pneumonia",
            "+[patchy|multifocal] bilateral opacities [compatible|consistent] with [|multifocal ]pneumonia",
        ],
    },
    "Pneumothorax": {
        "": [
            "@<size> <side> [apical |]pneumothorax",
            "@<size> <side>-sided pneumothorax",
            "@<size> <side> pneumothorax",
        ]
    },
}
"""Noun phrases by label and variant."""

SENTENCE: dict[str, list[str]] = {
    "Cardiomegaly": [
        "The heart is <gradely> enlarged.",
        "[The cardiac silhouette|Cardiac silhouette|The heart size|Heart size] is <gradely> enlarged.",
        "Heart size is [enlarged|<gradely> enlarged].",
    ],
    "Edema": [
        (
            "There is [upper zone redistribution and |]<grade> indistinctness of the pulmonary "
            "vasculature, [compatible|consistent] with pulmonary edema."
        ),
        (
            "+[Diffuse|Bilateral|Perihilar] [hazy |interstitial |]opacities are [consistent|"
            "compatible] with <grade> pulmonary edema."
        ),
    ],
    "Pleural Effusion": [
        (
            "[Blunting|Obscuration] of the <side> costophrenic [angle|sulcus] [is|is] [consistent|"
            "compatible] with @<size> pleural effusion."
        ),
        (
            "There is [fluid layering|pleural fluid] on the <side>[|, <size> in amount] [with|and] "
            "@<size> pleural effusion."
        ),
    ],
    "Atelectasis": [
        (
            "+[Streaky|Linear|Patchy] <side> basilar [opacity|opacities], [likely|most likely] "
            "[representing |reflecting |]atelectasis."
        ),
        "There is volume loss at the <side> [base|lung base] with atelectasis.",
    ],
    "Enlarged Cardiomediastinum": [
        "The [mediastinum|superior mediastinum|upper mediastinum] is <gradely> widened.",
        "The [cardiomediastinal silhouette|mediastinal contour] is [<gradely> |]widened.",
    ],
    "Pneumothorax": [
        (
            "A [pleural|visceral pleural] edge is [seen|visible] on the <side>, [consistent|compatible] "
            "with @<size> pneumothorax."
        )
    ],
    "Lung Lesion": ["+[A rounded|A focal] nodular opacity of <cm> [projects over|is seen in] the <side> lung."],
    "Consolidation": ["[The <lobe> is consolidated|There is consolidation of the <lobe>][|, with air bronchograms]."],
    "Fracture": [
        "[Cortical step-off|Deformity] of <side> ribs [is consistent|is compatible|in keeping] with fracture."
    ],
}
"""Whole sentences for a finding that is new or seen for the first time."""

HEDGED: dict[str, list[str]] = {
    "Atelectasis": [
        "+@[streaky|faint] <side> basilar opacity may [represent|reflect] atelectasis.",
        "[Possible|Probable] [minimal |]<side> basilar atelectasis.",
    ],
    "Cardiomegaly": [
        (
            "Heart size is [difficult to assess|likely accentuated by technique], [possible|"
            "questionable] [mild |]cardiomegaly."
        ),
        "[Possible|Questionable] [mild |]cardiomegaly.",
    ],
    "Consolidation": [
        "[Early|Developing|Subtle] consolidation in the <lobe> cannot be excluded.",
        "[Possible|Questionable] consolidation in the <lobe>.",
    ],
    "Edema": [
        "[Possible|Questionable] mild [interstitial edema|vascular congestion].",
        "Mild pulmonary edema [may be present|is possible|cannot be excluded].",
    ],
    "Enlarged Cardiomediastinum": [
        "The mediastinum [may be|is possibly] widened[|, which may be due to technique].",
        "Possible widening of the mediastinum.",
    ],
    "Fracture": [
        "[Possible|Questionable] <side> rib fracture.",
        "@[subtle |nondisplaced |]<side> rib fracture cannot be excluded.",
    ],
    "Lung Lesion": [
        "[Possible|Questionable] nodule [in|projecting over] the <side> lung[|, CT could be considered].",
        "@[subtle|vague|tiny] density over the <side> lung may represent @nodule.",
    ],
    "Lung Opacity": [
        "[Possible|Questionable] [subtle |faint |]opacity in the <lobe>.",
        "@[subtle|faint] opacity in the <lobe> may be present.",
    ],
    "Pleural Effusion": [
        "[Possible|Questionable] [trace|small] <side> pleural effusion.",
        "@[trace|small] <side> pleural effusion [cannot be excluded|is difficult to exclude|may be present].",
    ],
    "Pleural Other": [
        "[Possible|Questionable] <side> pleural thickening.",
        "Blunting on the <side> may reflect pleural thickening.",
    ],
    "Pneumonia": [
        "[Possible|Questionable] [early |]pneumonia [in|at] the <lobe>.",
        (
            "+@[patchy|vague|subtle] opacity in the <lobe>, [could represent|may represent|concerning "
            "for|suspicious for] pneumonia."
        ),
        "Pneumonia [in|at] the <lobe> [cannot be excluded|is not excluded][| in the appropriate clinical setting].",
    ],
    "Pneumothorax": [
        "[Possible|Questionable] [tiny|small] <side> [apical |]pneumothorax.",
        "@[tiny|small] <side> pneumothorax [cannot be excluded|is not excluded|may be present].",
    ],
}
"""Sentences about a finding of which the reader is not sure."""
