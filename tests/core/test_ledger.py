"""A step runs again when, and only when, something it depends on changed; the reason names what."""

import json

import pytest

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import RecordError
from mlx_cxr.core.ledger import Fingerprint, Ledger, fingerprint


@pytest.fixture
def files(tmp_path):
    source, product = tmp_path / "source.csv", tmp_path / "product.npy"
    source.write_text("a")
    product.write_text("b")
    return source, product


def _finished(tmp_path, now):
    ledger = Ledger(tmp_path / "pipeline.json")
    ledger.finish("prepare", now, [tmp_path / "product.npy"], 12.5)
    return Ledger(tmp_path / "pipeline.json")


def test_a_finished_step_with_nothing_changed_is_up_to_date(tmp_path, files):
    source, product = files
    ledger = _finished(tmp_path, fingerprint({"pixels": {"size": 64}}, [source]))
    assert ledger.why_run("prepare", fingerprint({"pixels": {"size": 64}}, [source]), [product]) == ""
    assert ledger.why_run("train", fingerprint({}, []), []) == "not run before"


def test_a_changed_setting_is_named_by_its_key(tmp_path, files):
    source, product = files
    ledger = _finished(tmp_path, fingerprint({"pixels": {"size": 64, "fit": "letterbox"}}, [source]))
    now = fingerprint({"pixels": {"size": 96, "fit": "letterbox"}}, [source])
    assert ledger.why_run("prepare", now, [product]) == "changed: pixels.size"


def test_an_input_with_other_bytes_is_named_and_its_date_alone_does_not_count(tmp_path, files):
    source, product = files
    ledger = _finished(tmp_path, fingerprint({}, [source]))
    source.write_text("a")  # same bytes, newer
    assert ledger.why_run("prepare", fingerprint({}, [source]), [product]) == ""
    source.write_text("c")
    assert ledger.why_run("prepare", fingerprint({}, [source]), [product]) == f"changed: {source}"


def test_a_lost_output_an_unfinished_step_and_another_version_make_it_run(tmp_path, files):
    source, product = files
    now = fingerprint({}, [source])
    ledger = _finished(tmp_path, now)
    product.unlink()
    assert str(product) in ledger.why_run("prepare", now, [product])
    ledger.begin("prepare", now)
    assert ledger.why_run("prepare", now, []) == "it was stopped before its end"
    older = Fingerprint("0.0.1", now.settings, now.inputs)
    ledger.finish("prepare", older, [], 1)
    assert "0.0.1" in ledger.why_run("prepare", now, [])


def test_a_missing_input_and_a_foreign_ledger_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv is missing"):
        fingerprint({}, [tmp_path / "nowhere.csv"])
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(RecordError, match=r"pipeline\.json"):
        Ledger(path)
