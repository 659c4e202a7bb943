"""Ratios and targets from rows made by hand, and the tables that are written of them."""

from __future__ import annotations

import csv
import io

import pytest

from mlx_cxr.bench import grad_cam, inference, training
from mlx_cxr.bench.contenders import Row
from mlx_cxr.bench.plot import plot
from mlx_cxr.bench.results import full_page, lora_entry, ratio_entry, ratios, readme_block, table_csv
from mlx_cxr.bench.timing import summary


def row(section: str, name: str, images: int, ms: float | None, **facts: object) -> Row:
    """A row whose median is `ms` per image."""
    framework = "torch" if "PyTorch" in name else "mlx"
    timing = None if ms is None else summary([ms * images / 1000 * share for share in (0.9, 1.0, 1.3)], 10)
    given = {"device": "cpu", "precision": "float32", "status": "wrong" if ms is None else "timed"}
    return Row(section, name, framework, samples=images, timing=timing, **{**given, **facts})


ROWS = [
    row("inference", inference.STOCK, 8, 48.0),
    row("inference", inference.COMPILED, 8, 20.0, flops=8e9, peak_gflops=400.0, bound_seconds=0.016),
    row("inference", f"{inference.PLAIN}, float16", 8, 1.0, precision="float16"),
    row("inference", inference.EAGER, 8, 12.0),
    row("inference", inference.CHANNELS_LAST, 8, 8.0),
    row("inference", inference.INDUCTOR, 8, 6.0),
    row("inference", inference.COMPILED, 1, 30.0),
    row("inference", inference.EAGER, 1, None, note="differs by 3, more than 0.001: not timed"),
    row("training", training.STOCK, 8, 400.0),
    row("training", training.OURS, 8, 105.0),
    row("training", training.EAGER, 8, 35.0),
    row("grad_cam", grad_cam.FORWARD, 8, 20.0),
    row("grad_cam", grad_cam.AT_ONCE, 8, 27.0),
    row("epoch", training.BARE, 8, 100.0),
    row("epoch", training.LOOPED, 8, 103.0),
    row("teacher", "LoRA step, tiny teacher", 4, 3.0, note="256 tokens a study; peak 0.10 GB, estimate 0.09 GB"),
]
STATE = {"load_average": 0.5, "thermal": None, "reference_gflops": 100.0}
RESULT = {
    "machine": {"kind": "cpu", "name": "Some Chip", "cores": 2, "blas": "OpenBLAS (x.so)"},
    "torch": {"version": "2.9", "device": "cpu"},
    "settings": {"size": 224},
    "before": STATE,
    "after": STATE | {"load_average": 1.5, "reference_gflops": 80.0},
    "peak": {"gflops": {"mlx, float32": 100.0}, "bandwidth_gbs": {"mlx": 3.0, "numpy": 12.0}},
    "teacher": None,
}


def test_ratios_are_of_the_fastest_float32_and_eager_pytorch():
    found = {line.what: line for line in ratios(ROWS)}
    forward = found["forward, batch 8"]
    assert (forward.mlx.name, forward.other.name) == (inference.COMPILED, inference.CHANNELS_LAST)
    assert forward.compiled.name == inference.INDUCTOR
    assert (forward.value, forward.limit, forward.met) == (pytest.approx(2.5), 2.0, False)
    alone = found["forward, batch 1"]
    assert (alone.other, alone.value, alone.met) == (None, None, None)
    assert found["training step, batch 8"].value == pytest.approx(3.0)
    assert found["training step, batch 8"].met
    assert found["14-label Grad-CAM, batch 8"].value == pytest.approx(1.35)
    assert not found["14-label Grad-CAM, batch 8"].met
    assert found["epoch of the loop, batch 8"].value == pytest.approx(1.03)
    assert found["epoch of the loop, batch 8"].met
    assert ratio_entry(forward) == {
        "what": "forward, batch 8",
        "mlx": inference.COMPILED,
        "against": inference.CHANNELS_LAST,
        "ratio": pytest.approx(2.5),
        "at_most": 2.0,
        "met": False,
    }


def test_the_short_table_says_machine_ratios_and_targets():
    text = readme_block(RESULT, ROWS)
    assert "Measured on cpu (Some Chip, 2 cores, OpenBLAS (x.so)), against PyTorch 2.9 on cpu" in text
    assert "0.5 and 1.5" in text
    assert (
        "| forward, batch 8 | 20 (MLX, folded, compiled) | 8 (PyTorch, eager, channels last); "
        "6 (PyTorch, torch.compile) | 2.50x | at most 2x: **not met** |"
    ) in text
    assert "| 105 (MLX step) | 35 (PyTorch step, channels last) | 3.00x | at most 3.5x: met |" in text
    assert "| LoRA step, tiny teacher, batch 4 | 3 per study |" in text
    assert "None of this is Metal" in text
    assert "--against torch --update_readme README.md" in text
    on_a_mac = readme_block({**RESULT, "machine": RESULT["machine"] | {"kind": "metal", "blas": None}}, ROWS)
    assert "None of this is Metal" not in on_a_mac
    assert "Measured on metal (Some Chip, 2 cores)" in on_a_mac
    assert "PyTorch" not in readme_block({**RESULT, "torch": None}, ROWS[:2]).split("| what")[0]


def test_the_full_page_has_every_row_and_the_drift():
    text = full_page(RESULT, ROWS)
    assert "80 at the end (x 0.80;" in text
    assert "| MLX, folded, compiled | cpu | 8 | 20 [19, 23] | 3 (10) | 50 | 12 % | 2 |  |  |" in text
    assert "| PyTorch, eager | cpu | 1 | wrong |  |  |  |  |  | differs by 3" in text
    assert "numpy 12.0" in text
    assert all(f"## {section}" in text for section in ("peak", "inference", "training", "grad_cam", "epoch", "teacher"))


def test_csv_has_a_line_per_contender():
    read = list(csv.DictReader(io.StringIO(table_csv(ROWS))))
    assert len(read) == len(ROWS)
    assert float(read[1]["ms_per_sample"]) == pytest.approx(20.0)
    assert float(read[1]["share_of_peak"]) == pytest.approx(0.125)
    assert read[7]["ms_per_sample"] == ""
    assert read[7]["status"] == "wrong"


def test_memory_of_the_lora_step_is_held_to_its_target():
    figures = {
        "size": "full",
        "precision": "float32",
        "bits": 4,
        "training": {"peak_bytes": 6e9, "estimate_bytes": 8.5e9},
    }
    entry = lora_entry(figures)
    assert (entry["peak_gb"], entry["estimate_gb"], entry["met"]) == (6.0, 8.5, False)
    assert entry["what"] == "LoRA step at full size, float32, 4-bit base"
    text = readme_block({**RESULT, "teacher": figures}, ROWS)
    assert "| peak 6.0 GB | estimate 8.5 GB | | at most 8 GB: **not met** |" in text
    assert lora_entry({**figures, "size": "tiny"}) is None
    assert lora_entry(None) is None


def test_the_picture(tmp_path):
    from PIL import Image

    path = plot(tmp_path / "a.png", RESULT, ROWS)
    with Image.open(path) as image:
        assert image.size == (1500, 700)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours, "both frameworks are drawn"
    assert plot(tmp_path / "b.png", RESULT, [row("grad_cam", "x", 1, 1.0)]) is None
    assert not (tmp_path / "b.png").exists()
