"""The stage that makes the tiny base: what it may read, what it may replace, and its record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from toy_teacher import MARKERS, ToyTeacher, shared

from mlx_cxr import build_manifest, make_tiny_teacher
from mlx_cxr.core.config import Config
from mlx_cxr.core.files import read_json, sha256_file, write_record

WEIGHTS = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyTeacher:
    return shared(tmp_path_factory)


def made(toy: ToyTeacher, folder, *overrides: str):
    fast = ("teacher.tiny.epochs=1", "teacher.tiny.hidden_size=32")
    return make_tiny_teacher.run(toy.config(f"teacher.base={folder}", *fast, *overrides))


def hashes(folder) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in WEIGHTS}


@pytest.fixture(scope="module")
def small(toy, tmp_path_factory):
    return made(toy, tmp_path_factory.mktemp("made") / "small")


def changed_cohort(toy: ToyTeacher, folder, change) -> Config:
    """The cohort with another table, built anew."""
    table = pd.read_csv(toy.folder / "table.csv", keep_default_na=False)
    change(table)
    table.to_csv(folder / "table.csv", index=False)
    config = toy.config(
        f"data.csv.table={folder / 'table.csv'}",
        f"data.work_dir={folder / 'made'}",
        f"teacher.base={folder / 'base'}",
        *("teacher.tiny.epochs=1", "teacher.tiny.hidden_size=32"),
    )
    build_manifest.run(config)
    return config


def test_the_record_says_what_was_made_from_what(toy, small):
    record = read_json(small / "made_by_mlx_cxr.json")
    assert record["stage"] == "make_tiny_teacher"
    assert record["inputs"]["reports"]["sha256"] == sha256_file(toy.config().reports_path)
    # 64 training studies, one without a report.
    assert record["made"]["reports"] == 63
    assert record["made"]["loss"] < np.log(read_json(small / "config.json")["text_config"]["vocab_size"])


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(toy, small, tmp_path):
    assert hashes(made(toy, tmp_path / "again")) == hashes(small)
    config = toy.config(f"teacher.base={tmp_path / 'other'}", "teacher.tiny.epochs=1", "teacher.tiny.hidden_size=32")
    other = make_tiny_teacher.run(config.model_copy(update={"seed": 9}))
    assert hashes(other)["model.safetensors"] != hashes(small)["model.safetensors"]
    assert hashes(other)["tokenizer.json"] == hashes(small)["tokenizer.json"]


def test_labels_and_reports_of_other_splits_have_no_influence(toy, small, tmp_path):
    """All labels turned round, and validation and test reports replaced: not a byte differs."""

    def change(table: pd.DataFrame) -> None:
        for name in ("Edema", "Cardiomegaly"):
            table[name] = 1 - table[name]
        held_out = table["split"] != "train"
        for name in ("indication", "findings", "impression"):
            table.loc[held_out, name] = "floccinaucinihilipilification " * 50

    assert hashes(make_tiny_teacher.run(changed_cohort(toy, tmp_path, change))) == hashes(small)


def test_the_tokenizer_knows_a_word_of_the_training_reports_only(small):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(small))
    pieces = {split: len(tokenizer.encode(f" {word}", add_special_tokens=False)) for split, word in MARKERS.items()}
    assert pieces["train"] == 1
    assert pieces["validate"] > 3
    assert pieces["test"] > 3


def test_one_training_report_changes_the_weights(toy, small, tmp_path):
    def change(table: pd.DataFrame) -> None:
        table.loc[0, "findings"] = "Edema."

    other = hashes(make_tiny_teacher.run(changed_cohort(toy, tmp_path, change)))
    assert other["model.safetensors"] != hashes(small)["model.safetensors"]


def failure(capsys, toy: ToyTeacher, *overrides: str) -> str:
    arguments = ["--config", str(toy.folder / "trial.yaml")]
    with pytest.raises(SystemExit) as end:
        make_tiny_teacher.main(arguments + [part for value in overrides for part in ("--set", value)])
    assert end.value.code == 2
    return capsys.readouterr().err.split("error: ", 1)[1]


def test_only_its_own_folders_are_replaced(toy, tmp_path, capsys):
    (tmp_path / "LFM2.5-VL-1.6B").mkdir()
    weights = tmp_path / "LFM2.5-VL-1.6B" / "model.safetensors"
    weights.write_bytes(b"downloaded for hours")
    message = failure(capsys, toy, f"teacher.base={weights.parent}")
    assert f"{weights.parent} holds something that was not made here" in message
    assert weights.read_bytes() == b"downloaded for hours"
    assert [path.name for path in weights.parent.iterdir()] == ["model.safetensors"]
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = made(toy, empty)
    before = hashes(folder)
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert hashes(made(toy, empty)) == before


def test_a_base_that_a_teacher_stands_on_is_not_replaced_by_another(toy, tmp_path):
    from mlx_cxr.core.runs import RunExistsError
    from mlx_cxr.teacher.base_model import base_sha256

    outputs = f"outputs={tmp_path / 'outputs'}"
    folder = made(toy, tmp_path / "base", outputs)
    before = hashes(folder)
    run = tmp_path / "outputs" / "teacher_v1"
    run.mkdir(parents=True)
    write_record(run / "teacher.json", {"base": str(folder), "base_sha256": base_sha256(folder)})
    for other in ("seed=9", "teacher.tiny.max_tokens=64"):
        with pytest.raises(RunExistsError, match=f"{folder} is the base of {run}, and the one to be made now differs"):
            made(toy, folder, outputs, other)
    assert hashes(folder) == before
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert hashes(made(toy, folder, outputs)) == before, "the same one may be made again"
    config = toy.config(
        f"teacher.base={folder}", "teacher.tiny.epochs=1", "teacher.tiny.hidden_size=32", outputs, "seed=9"
    )
    assert hashes(make_tiny_teacher.run(config, overwrite=True))["model.safetensors"] != before["model.safetensors"]


def test_every_file_of_a_base_is_held_against_its_record(toy, small, tmp_path):
    from mlx_cxr.models.hub import MADE_HERE, WeightsCorruptError, check_base

    folder = shutil.copytree(small, tmp_path / "copy")
    check_base(folder)
    names = {path.name for path in folder.iterdir()} - {MADE_HERE}
    assert names >= {*WEIGHTS, "chat_template.jinja"}
    for name in names:
        path, content = folder / name, (folder / name).read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(WeightsCorruptError, match=f"{name}.*make it again"):
            check_base(folder)
        path.write_bytes(content)


def test_the_published_base_is_not_made_here(toy, capsys):
    message = failure(capsys, toy, "teacher.base=LiquidAI/LFM2.5-VL-1.6B")
    assert "is fetched and not made here" in message
    assert "--set teacher.base=" in message


def test_without_training_reports_there_is_nothing_to_learn(toy, tmp_path):
    from mlx_cxr.data.tables import DataError

    def change(table: pd.DataFrame) -> None:
        table.loc[table["split"] == "train", ["indication", "findings", "impression"]] = ""

    config = changed_cohort(toy, tmp_path, change)
    with pytest.raises(DataError, match="no training study has a report to train the language model on"):
        make_tiny_teacher.run(config)
    assert not (tmp_path / "base").exists()


def test_a_stopped_make_leaves_no_complete_checkpoint(toy, tmp_path, monkeypatch):
    """`config.json` comes last: until then the folder is refused as incomplete, and made again at the next call."""
    from mlx_cxr.models.hub import WeightsCorruptError, check_language_model
    from mlx_cxr.teacher import tiny

    folder = made(toy, tmp_path / "base")
    before = hashes(folder)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tiny, "train_language_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(toy, folder)
    with pytest.raises(WeightsCorruptError, match=r"config.json"):
        check_language_model(folder)
    assert hashes(made(toy, folder)) == before
    shutil.rmtree(folder)


def test_the_record_is_readable_json_with_the_command(small):
    record = json.loads((small / "made_by_mlx_cxr.json").read_text())
    assert {"command", "seed", "packages", "made"} <= set(record)


KILLED = """
import os, signal, sys
left, folder = int(sys.argv.pop(1)), sys.argv.pop(1)

def hook(name, arguments):
    global left
    if name == "os.rename" and os.path.dirname(os.fspath(arguments[1])) == folder:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
from mlx_cxr.make_tiny_teacher import main
main()
"""
"""Kills itself before its n-th file gets its name in the folder."""


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 7])
def test_whenever_it_is_killed_the_advice_is_to_make_it_again_and_that_works(toy, small, tmp_path, at):
    from mlx_cxr.models.hub import WeightsCorruptError, check_base

    folder = tmp_path / "base"
    fast = (f"teacher.base={folder}", "teacher.tiny.epochs=1", "teacher.tiny.hidden_size=32")
    options = ["--config", str(toy.folder / "trial.yaml"), *(part for value in fast for part in ("--set", value))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at), str(folder), *options], capture_output=True, cwd=toy.folder, check=False
    )
    if done.returncode == 0:
        pytest.skip(f"fewer than {at} files are written")
    assert done.returncode == -9, done.stderr
    if at > 1:
        with pytest.raises(WeightsCorruptError) as refused:
            check_base(folder)
        assert "python -m mlx_cxr.make_tiny_teacher" in str(refused.value)
        assert "fetch" not in str(refused.value)
    assert hashes(made(toy, folder)) == hashes(small)
    check_base(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_companions_of_macos_and_a_claim_do_not_make_a_folder_foreign(toy, small, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / ".claim").write_text("{}")
    (folder / "._model.safetensors").write_bytes(b"\0\5\26\7")
    assert hashes(made(toy, folder)) == hashes(small)
