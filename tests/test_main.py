"""`mlx-cxr`: the list of stages, a stage by name, and a name that is none."""

import subprocess
import sys

import pytest
from test_architecture import STAGES as AT_THE_ROOT

from mlx_cxr.__main__ import STAGES, main


def test_every_stage_is_listed_once_with_a_sentence(capsys):
    main([])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(STAGES)
    assert sorted(STAGES) == AT_THE_ROOT
    assert all(12 < len(sentence) < 90 and "`" not in sentence for _, sentence in lines)


def test_their_order_is_that_of_use():
    at = STAGES.index
    assert at("build_manifest") < at("prepare_images") < at("train_cnn") < at("evaluate_cnn") < at("distillation")
    assert at("lfm_finetune") < at("cache_teacher_outputs") < at("distillation") < at("compare_models")


def test_a_stage_runs_with_its_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train_cnn", "--config", "nowhere.yaml"])
    assert ended.value.code == 2
    assert "nowhere.yaml: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"), [("train_cn", "train_cnn"), ("evaluate", "evaluate_cnn"), ("distill", "distillation")]
)
def test_a_mistyped_stage_gets_the_nearest(typed, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        main([typed])
    assert ended.value.code == 2
    assert f"{typed!r} is no stage; did you mean {meant}?" in capsys.readouterr().err


def test_hyphens_will_do(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train-cnn", "--help"])
    assert ended.value.code == 0
    assert "python -m mlx_cxr.train_cnn" in capsys.readouterr().out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mlx_cxr"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mlx-cxr STAGE")
