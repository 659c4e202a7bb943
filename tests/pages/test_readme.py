"""Marked blocks of a README, and the demo's: the right finding by rule, figures as in the files, one picture."""

import pytest
from PIL import Image

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError, read_record, write_record
from mlx_cxr.core.labels import LABELS
from mlx_cxr.pages.readme import best_localized, replace_block, update_readme


def test_only_the_named_block_changes_and_twice_is_once(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("top\n<!-- begin a -->\nold\n<!-- end a -->\n<!-- begin b -->\nkept\n<!-- end b -->\nbottom\n")
    replace_block(path, "a", "| new |\n")
    once = path.read_text()
    assert (
        once == "top\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\n<!-- begin b -->\nkept\n<!-- end b -->\nbottom\n"
    )
    replace_block(path, "a", "| new |")
    assert path.read_text() == once


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- begin a -->\n",
        "<!-- end a -->\n<!-- begin a -->\n",
        "<!-- begin a -->\n" * 2 + "<!-- end a -->",
    ],
)
def test_missing_doubled_or_swapped_markers_are_refused_and_the_file_is_kept(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match="begin a"):
        replace_block(path, "a", "new")
    assert path.read_text() == text
    with pytest.raises(UserError, match=r"absent\.md"):
        replace_block(tmp_path / "absent.md", "a", "new")


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "replicates": 100}


def score(maps, **controls):
    arms = {name: {"mean": interval(x), "difference": interval(maps - x)} for name, x in controls.items()}
    return {"maps": interval(maps), **arms}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "outputs" / "r"
    (folder / "grad_cam").mkdir(parents=True)
    edema = {"hit": score(0.60, random=0.40, centre=0.45), "hit_half_cell": score(0.7, random=0.5)}
    effusion = {"hit": score(0.55, random=0.05, centre=0.10), "hit_half_cell": score(0.65, random=0.2)}
    heart = {"hit": score(0.90, random=0.10, centre=0.95), "hit_half_cell": score(0.95, random=0.2, centre=0.97)}
    edema["iou"], effusion["iou"], heart["iou"] = (score(0.2, random=x, swapped=0.05) for x in (0.1, 0.04, 0.1))
    table = {
        "per_label": {
            "Edema": {"films": 20, **edema},
            "Pleural Effusion": {"films": 12, **effusion},
            "Cardiomegaly": {"films": 30, **heart},
        },
        "macro": {"labels": 3, **edema},
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
    write_record(folder / "localization.json", table)
    write_record(folder / "test_results.json", results)
    for name, shade in (("Edema_true_positive_1_5", 10), ("Pleural_Effusion_true_positive_1_7", 200)):
        Image.new("L", (4, 4), shade).save(folder / "grad_cam" / f"{name}.png")
    (tmp_path / "README.md").write_text("top\n<!-- begin demo -->\n<!-- end demo -->\nend\n")
    return folder


def test_the_finding_that_maps_hit_best_beyond_chance_is_shown(run_dir, tmp_path):
    table = read_record(run_dir / "localization.json")
    # Though Cardiomegaly has the highest hit rate and beats random maps by most: the centre hits it more often.
    assert best_localized(table) == "Pleural Effusion"
    update_readme(tmp_path / "README.md", run_dir, 90)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("top\n<!-- begin demo -->")
    row = "0.55 | 0.10 centre | 0.45 [0.35, 0.55] | 0.65 | 0.20 random | 0.45 [0.35, 0.55] | 0.20 | 0.05 swapped |"
    assert f"| Pleural Effusion | 12 | {row}" in text
    assert "0.812 [0.713, 0.912]" in text or "0.812 [0.712, 0.912]" in text
    assert "1.5 minutes" in text
    assert "find: Edema, Pleural Effusion; allowing half a cell also nothing" in text  # 0.15 and 0.45, each less 0.1
    assert "not shown for: Cardiomegaly." in text
    assert "drawn findings" in text
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
    with pytest.raises(RecordError, match=r"localization\.json is missing"):
        update_readme(tmp_path / "README.md", run_dir, 90)
    assert (tmp_path / "README.md").read_text() == before
