"""Keys of result files: as documented, and as written."""

from __future__ import annotations

import runpy
import types
import typing
from pathlib import Path

import pytest
from evaluated_runs import evaluated_run
from pydantic import BaseModel
from simulated_runs import NOISE, model, write_run, write_three

from mlx_cxr.core.files import read_record, write_record
from mlx_cxr.evaluation.comparison import Comparison, compare
from mlx_cxr.evaluation.operating_points import OperatingPointsFile
from mlx_cxr.evaluation.results import Results
from mlx_cxr.evaluation.scored_runs import open_scored_run
from mlx_cxr.inference.record_schema import InferenceRecord

DOCS = Path(__file__).resolve().parents[1] / "docs"


def faults(value: object, kind: object, where: str) -> list[str]:
    """Keys that lack or are too many, and values of another type, by place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        keys = {name.rstrip("_"): hint for name, hint in typing.get_type_hints(kind).items() if name != "model_config"}
        keys = {name: hint for name, hint in keys.items() if typing.get_origin(hint) is not typing.ClassVar}
        if not isinstance(value, dict) or set(value) != set(keys):
            return [f"{where}: {sorted(value) if isinstance(value, dict) else value}, not {sorted(keys)}"]
        return [fault for key, hint in keys.items() for fault in faults(value[key], hint, f"{where}.{key}")]
    if origin is dict:
        return [fault for key, entry in value.items() for fault in faults(entry, args[1], f"{where}.{key}")]
    if origin is list:
        return [fault for i, entry in enumerate(value) for fault in faults(entry, args[0], f"{where}[{i}]")]
    if origin in (types.UnionType, typing.Union):
        found = [faults(value, arg, where) for arg in args]
        return [] if [] in found else found[0]
    if origin is typing.Literal:
        fine = value in args
    else:
        fine = kind is typing.Any or isinstance(value, (int, float) if kind is float else kind)
    return [] if fine else [f"{where}: {value!r}, not {kind}"]


def test_the_page_is_that_of_the_source():
    page = runpy.run_path(str(DOCS / "make_results.py"))["schema_page"]()
    written = (DOCS / "results.md").read_text(encoding="utf-8")
    assert written == page, "the source has changed; write the page anew: python docs/make_results.py"


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("test_results.json", Results),
        ("operating_points.json", OperatingPointsFile),
        ("inference.json", InferenceRecord),
    ],
)
def test_a_run_has_the_keys_of_the_schemas(tmp_path, file, schema):
    content = read_record(evaluated_run(tmp_path) / file)
    assert faults(content, schema, file) == []
    key, value = content.popitem()
    assert faults(content, schema, file), f"{key} lacks"
    assert faults({**content, key: value, "more": 1}, schema, file)


def test_a_comparison_has_the_keys_of_its_schema(tmp_path):
    write_three(tmp_path)
    write_run(tmp_path, "shuffled", model(NOISE["shuffled"], 13), targets="shuffled")
    write_run(tmp_path, "graded", model(NOISE["graded"], 14), reads="whole report", sections=("whole",))
    roles = {"cnn": "cnn", "teacher": "teacher", "student": "student", "shuffled": "control"}
    runs = [open_scored_run(tmp_path / name, role) for name, role in (roles | {"graded": "graded teacher"}).items()]
    settings = {"experiment": "toy", "min_retention": 0.9, "samples": 50, "seed": 3, "bins": 15, "provenance": {}}
    content = read_record(write_record(tmp_path / "final_comparison.json", compare(runs, **settings)))
    assert faults(content, Comparison, "final_comparison.json") == []
    assert {"interval_above_0", "met"} < set(content["gates"]["teacher_beats_cnn"])
    del content["protocols"]["empty_masked"]["retention"]["gain"]["low"]
    assert "retention.gain" in faults(content, Comparison, "final_comparison.json")[0]
