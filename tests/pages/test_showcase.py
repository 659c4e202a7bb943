"""What goes into a README: the right finding by rule, figures as in the files, one picture copied."""

import json

import pytest
from PIL import Image

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.labels import LABELS
from mlx_cxr.core.runs import RunFormatError
from mlx_cxr.pages.readme import best_localized, update_readme


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "replicates": 100}


def score(maps, control):
    return {"maps": interval(maps), "random": {"mean": interval(control), "difference": interval(maps - control)}}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "outputs" / "r"
    (folder / "grad_cam").mkdir(parents=True)
    table = {
        "per_label": {
            "Edema": {"films": 20, "hit": score(0.60, 0.40), "hit_half_cell": score(0.7, 0.5), "iou": score(0.3, 0.1)},
            "Pleural Effusion": {
                "films": 12,
                "hit": score(0.55, 0.10),
                "hit_half_cell": score(0.65, 0.2),
                "iou": score(0.2, 0.05),
            },
        },
        "macro": {
            "labels": 2,
            "hit": score(0.575, 0.25),
            "hit_half_cell": score(0.675, 0.35),
            "iou": score(0.25, 0.075),
        },
    }
    entry = {"positives": 7, "roc_auc": interval(0.8125), "average_precision": interval(0.4)}
    protocol = {
        "meaning": "uncertain counts as absent",
        "macro": entry,
        "macro_labels": list(LABELS),
        "per_label": dict.fromkeys(LABELS, entry),
    }
    abstained = {"called": interval(0.625), "risk_called": interval(0.125), "risk": interval(0.25)}
    abstention = {"macro": abstained, "macro_labels": list(LABELS)}
    results = {
        "fitted_under": "empty_negative",
        "protocols": {"empty_negative": protocol},
        "abstention": {"alpha": 0.1, "protocols": {"empty_negative": abstention}},
        "counts": {"test": {"studies": 99}},
        "synthetic": True,
        "provenance": {"device": {"kind": "cpu", "cores": 2}},
    }
    (folder / "localization.json").write_text(json.dumps(table))
    (folder / "test_results.json").write_text(json.dumps(results))
    for name, shade in (("Edema_true_positive_1_5", 10), ("Pleural_Effusion_true_positive_1_7", 200)):
        Image.new("L", (4, 4), shade).save(folder / "grad_cam" / f"{name}.png")
    (tmp_path / "README.md").write_text("top\n<!-- begin demo -->\n<!-- end demo -->\nend\n")
    return folder


def test_the_finding_that_maps_hit_best_beyond_chance_is_shown(run_dir, tmp_path):
    table = json.loads((run_dir / "localization.json").read_text())
    assert best_localized(table) == "Pleural Effusion"  # though Edema has the higher hit rate
    update_readme(tmp_path / "README.md", run_dir, 90)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("top\n<!-- begin demo -->")
    assert "| Pleural Effusion | 12 | 0.55 | 0.10 | 0.45 [0.35, 0.55] | 0.65 | 0.20 | 0.20 | 0.05 |" in text
    assert "0.812 [0.713, 0.912]" in text or "0.812 [0.712, 0.912]" in text
    assert "1.5 minutes" in text
    assert "find: Edema, Pleural Effusion; allowing half a cell also nothing" in text  # 0.2 and 0.45, each less 0.1
    assert "synthetic" in text
    assert "not for clinical use" in text
    with Image.open(tmp_path / ".github" / "images" / "map.png") as picture:
        assert picture.getpixel((0, 0)) == 200


def test_a_run_without_masks_or_without_that_picture_is_refused(run_dir, tmp_path):
    for picture in (run_dir / "grad_cam").glob("Pleural*"):
        picture.unlink()
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="no true positive of Pleural Effusion"):
        update_readme(tmp_path / "README.md", run_dir, 90)
    (run_dir / "localization.json").unlink()
    with pytest.raises(RunFormatError, match=r"localization\.json is missing"):
        update_readme(tmp_path / "README.md", run_dir, 90)
    assert (tmp_path / "README.md").read_text() == before
