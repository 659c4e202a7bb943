"""How a stage starts, in process and as the command that a user types."""

import argparse
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_cxr.__main__ import STAGES
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.stage import (
    add_config_arguments,
    add_training_arguments,
    configuration,
    run_folder_given,
    stage_parser,
    started,
)

MINIMAL = "name: trial\ndata:\n  root: raw\n  work_dir: made\n"


def test_the_options_that_every_stage_has():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args(["--config", "c.yaml", "--set", "a=1", "--set", "b.c=2"])
    assert (args.config, args.overrides) == (Path("c.yaml"), ["a=1", "b.c=2"])
    assert parser.parse_args(["--config", "c.yaml"]).overrides == []
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_resume_and_overwrite_exclude_each_other():
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, "run_name")
    assert parser.parse_args(["--resume"]).resume
    with pytest.raises(SystemExit):
        parser.parse_args(["--resume", "--overwrite"])


def test_a_parser_says_its_command_and_the_first_line_of_the_docstring():
    parser = stage_parser("train_cnn", "Train it: `python -m mlx_cxr.train_cnn`.\n\nMore.")
    assert parser.prog == "python -m mlx_cxr.train_cnn"
    assert parser.description == "Train it: `python -m mlx_cxr.train_cnn`."


def test_the_configuration_of_the_options(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    parser = stage_parser("s", "S.")
    add_config_arguments(parser)
    with started(parser, ["--config", str(path), "--set", "training.epochs=3"]) as args:
        config = configuration(args, seed=7)
    assert (config.training.epochs, config.seed) == (3, 7)


def test_a_users_error_is_one_sentence_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended, started(stage_parser("s", "S."), []):
        raise UserError("row 3: no such patient")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: row 3: no such patient\n"


@pytest.mark.parametrize(("rank", "seen"), [("0", True), ("1", False)])
def test_only_the_first_process_of_a_run_talks(rank, seen):
    code = (
        "import logging; from mlx_cxr.core.stage import *\n"
        "with started(stage_parser('s', 'S.'), []): logging.getLogger('mlx_cxr').info('hello')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MLX_RANK": rank}, capture_output=True, text=True, check=True
    )
    assert ("hello" in done.stderr) is seen


def test_chatty_libraries_are_quiet():
    with started(stage_parser("s", "S."), []):
        assert logging.getLogger("httpx").level == logging.WARNING


@pytest.mark.parametrize("typed", ["--run_name", "--run-name", "--run"])
@pytest.mark.parametrize("added", ["--run_name", "--run"])
def test_a_run_is_asked_for_by_either_option(typed, added):
    parser = stage_parser("s", "S.")
    parser.add_argument(added, dest="run")
    assert parser.parse_args([typed, "a-b"]).run == "a-b"
    assert parser.parse_args([f"{typed}=a-b=c-d"]).run == "a-b=c-d"


def test_dashes_of_options_are_underscores_and_values_stay():
    parser = stage_parser("s", "S.")
    add_config_arguments(parser)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--text")
    parser.add_argument("words", nargs="*")
    typed = ["--batch-size", "3", "--config=my-c.yaml", "--set", "run_name=a-b", "--text=--x-y", "a-b", "--", "--c-d"]
    args = parser.parse_args(typed)
    assert (args.batch_size, args.config, args.overrides) == (3, Path("my-c.yaml"), ["run_name=a-b"])
    assert (args.text, args.words) == ("--x-y", ["a-b", "--c-d"])


def test_every_option_of_every_stage_may_be_typed_with_dashes(capsys):
    for name in STAGES:
        module = importlib.import_module(f"mlx_cxr.{name}")
        for option in module.build_parser()._option_string_actions:
            if option.startswith("--"):
                with pytest.raises(SystemExit):
                    module.main([option.replace("_", "-"), "--help", "--no-such-option"])
                assert "unrecognized" not in capsys.readouterr().err


def test_the_stages_that_read_one_run_take_either_option():
    for name in (
        "predict",
        "export",
        "benchmark",
        "evaluate_cnn",
        "explain_report",
        "cache_teacher_outputs",
        "pipeline",
    ):
        known = importlib.import_module(f"mlx_cxr.{name}").build_parser()._option_string_actions
        assert known["--run"] is known["--run_name"], name


def test_a_run_without_a_configuration_is_a_folder_or_a_name_under_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder_given("student_v1") == Path("outputs/student_v1")
    assert run_folder_given("outputs/student_v1") == Path("outputs/student_v1")
    (tmp_path / "here").mkdir()
    assert run_folder_given("here") == Path("here")
    assert run_folder_given(str(tmp_path)) == tmp_path
