import json
import math

import numpy as np
import pytest

from mlx_cxr.evaluation.localization_table import ImageScores, localization_table
from mlx_cxr.pages.map_checks import found, localization_markdown, randomization_section

PATIENTS = np.array(["a", "a", "b", "c", "d", "e"])


def scores(label, patients, hit, random):
    return ImageScores(label, patients, {"hit": np.asarray(hit, float)}, {"random": {"hit": np.asarray(random, float)}})


def test_markdown_shows_the_figures_and_survives_json():
    findings = [
        scores("Edema", PATIENTS, [1, 1, 0, 1, 1, 0], [0.2, 0.4, 0.1, 0.3, 0.0, 0.2]),
        scores("Pneumothorax", PATIENTS[:2], [0, 0.5], [0.1, math.nan]),
    ]
    table = localization_table(findings, samples=400, seed=0, synthetic=True, method="grad_cam")
    text = localization_markdown(json.loads(json.dumps(table)), {"hit": "Pointing game"}, against=("random",))
    rows = [line for line in text.splitlines() if line.startswith("| Edema")]
    assert rows[0].startswith("| Edema | 6 | 0.667 [")
    assert "| 0.200 | 0.467 [" in rows[0]
    assert rows[0].endswith("] random |")
    assert "| maps − random | maps − strongest |" in text
    assert "**Pointing game**" in text
    assert "**mean of 2**" in text
    assert found(table["per_label"]) == ["Edema"]
    with pytest.raises(KeyError, match="swapped"):
        localization_markdown(table, {"hit": "Pointing game"})


def test_randomization_section_has_a_row_of_means_per_finding():
    fc = np.array([[[0.5, 0.1, math.nan]], [[0.3, 0.3, math.nan]]])
    lines = randomization_section(["Edema"], {"fc": fc, "fc+layer4": fc * math.nan})
    assert "| Edema | 0.30 | – |" in lines
    assert "| **mean of 1** | 0.30 | – |" in lines
    assert "mean over 2 shuffles of 3 test films" in "".join(lines)
    assert "| finding | randomized: fc | randomized: fc+layer4 |" in lines
