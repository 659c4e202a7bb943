"""Wording for normal anatomy, absent findings, devices and earlier studies; grammars as in `phrases`."""

from __future__ import annotations

PRIOR = (
    "[the prior study|the prior exam|the prior radiograph|the previous study|the most recent prior|"
    "the study of ___|___|prior|the prior study from ___|the examination of ___]"
)

ABSENT: dict[str, list[str]] = {
    "Atelectasis": ["atelectasis"],
    "Cardiomegaly": ["cardiomegaly"],
    "Consolidation": [
        "focal consolidation",
        "focal consolidation",
        "consolidation",
        "focal airspace consolidation",
        "lobar consolidation",
    ],
    "Edema": [
        "pulmonary edema",
        "pulmonary edema",
        "overt pulmonary edema",
        "pulmonary vascular congestion",
        "evidence of edema",
    ],
    "Fracture": ["displaced rib fracture", "displaced fracture", "acute fracture", "rib fracture"],
    "Lung Lesion": ["pulmonary nodule", "suspicious nodule", "discrete nodule", "mass"],
    "Lung Opacity": ["focal opacity", "new opacity", "focal opacities"],
    "Pleural Effusion": [
        "pleural effusion",
        "pleural effusion",
        "pleural effusions",
        "effusion",
        "large pleural effusion",
    ],
    "Pleural Other": ["pleural thickening"],
    "Pneumonia": ["pneumonia", "evidence of pneumonia", "acute pneumonia", "infectious process"],
    "Pneumothorax": ["pneumothorax", "pneumothorax", "evidence of pneumothorax", "pneumothoraces"],
}
"""Noun phrases that follow `no`."""

NORMAL_HEART = [
    "Heart size is normal.",
    "The heart is normal in size.",
    "The cardiac silhouette is normal.",
    "Cardiac silhouette is within normal limits.",
    "The heart size is [within normal limits|normal].",
]
NORMAL_SILHOUETTE = [
    "The cardiomediastinal silhouette is [normal|unremarkable|within normal limits].",
    "[Mediastinal contour is|The mediastinal contours are] [normal|unremarkable|within normal limits].",
    "Cardiomediastinal silhouette is [normal|unremarkable].",
]
NORMAL_LUNGS = [
    "The lungs are [clear|well expanded and clear|clear bilaterally|grossly clear].",
    "Lungs are [clear|well expanded|fully expanded and clear].",
    "The lungs are [well inflated|normally expanded|adequately inflated] and clear.",
]
FILLERS = [
    "Hilar contours are [normal|unremarkable].",
    (
        "[The osseous structures are|Bony structures are|The visualized osseous structures are] [intact|"
        "unremarkable|grossly intact]."
    ),
    (
        "[Degenerative changes are [noted|seen] in the thoracic spine.|Mild degenerative changes of the "
        "[thoracic |]spine.]"
    ),
    (
        "[The aorta is [tortuous|mildly tortuous|calcified].|Atherosclerotic calcifications [are seen at|"
        "of] the aortic [knob|arch].]"
    ),
    "[No free air below the [right |]hemidiaphragm is seen.|Upper abdomen is [unremarkable|within normal limits].]",
    "[Lung volumes are low.|Low lung volumes accentuate the bronchovascular markings.|The patient is rotated.]",
    "[Soft tissues are unremarkable.|Imaged upper abdomen is unremarkable.]",
]
NORMAL_IMPRESSION = [
    "No acute cardiopulmonary [process|abnormality|disease|pathology].",
    "No acute [intrathoracic|cardiothoracic|chest] [process|abnormality].",
    "No evidence of acute cardiopulmonary [process|disease].",
    "Normal [chest radiograph|chest|chest x-ray][|.  No acute process].",
    "[Normal|Unremarkable] [radiograph of the chest|chest radiographs].",
    "No radiographic evidence of [an |]acute cardiopulmonary [process|abnormality].",
]

DEVICES: dict[str, list[str]] = {
    "endotracheal tube": [
        (
            "[The endotracheal tube|Endotracheal tube|ET tube|The ET tube] [terminates|ends|tip is] "
            "[approximately |about |]<tip> cm above the carina."
        ),
        (
            "[Endotracheal tube|The endotracheal tube] [in standard position|is in appropriate "
            "position], with its tip <tip> cm above the carina."
        ),
    ],
    "nasogastric tube": [
        (
            "[Enteric tube|Nasogastric tube|NG tube|The enteric tube|Orogastric tube] [courses below the "
            "diaphragm|passes into the stomach|terminates in the stomach|tip is in the stomach][| and "
            "out of view]."
        ),
    ],
    "right internal jugular central venous line": [
        (
            "[Right IJ|Right internal jugular|Right-sided] [central venous catheter|central line|"
            "catheter] [terminates|ends|tip is] [in|at] the [mid |lower |]SVC[|/cavoatrial junction]."
        ),
    ],
    "subclavian central venous line": [
        (
            "[Subclavian|A subclavian] [central venous catheter|central line|line] [terminates|ends] in "
            "the [mid |lower |]SVC."
        )
    ],
    "PICC": [
        (
            "[PICC line|PICC|A PICC|The PICC line] [terminates|ends|tip lies] in the [mid |lower |upper |"
            "]SVC[| near the cavoatrial junction]."
        )
    ],
    "Port-A-Cath": [
        (
            "[Right-sided Port-A-Cath|Right chest wall port|Port-A-Cath] catheter [terminates|ends|tip "
            "is] in the [low |mid |]SVC."
        )
    ],
    "pacemaker": [
        (
            "[Left-sided|Left chest wall|Left pectoral] [pacemaker|dual-lead pacemaker|pacemaker device] "
            "[is seen with leads in the expected positions|leads are in unchanged position|with leads in "
            "the right heart|in place]."
        ),
    ],
    "chest tube": [
        (
            "[<Drain> chest tube|<Drain>-sided chest tube|<Drain> pleural drain|A <drain> chest tube] "
            "[is in place|remains in place|projects over the <drain> hemithorax|terminates near the "
            "apex]."
        )
    ],
    "median sternotomy wires": ["Median sternotomy wires are [intact|in place|noted|aligned]."],
}
"""Sentences about each device; ECG leads go without mention."""

DEVICE_SUMMARY = [
    (
        "[Support devices|Lines and tubes|Monitoring and support devices] [in standard position|in place|"
        "as above|as described|are unchanged]."
    ),
    "[Satisfactory|Standard|Appropriate] position of [the |]<devices>.",
    "<Devices> in [place|standard position|appropriate position|unchanged position].",
    "[Status post|Interval placement of] <devices>.",
]
