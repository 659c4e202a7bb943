"""Making soft labels: what is on the disk at any moment, killed runs that are resumed, and what is refused."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soft_label_run
from soft_label_run import FEATURES, HEADER, IDS, LOGITS, SPLITS, STUDIES, TEMPERATURES, WIDTH, make

from mlx_cxr.data import soft_label_writer
from mlx_cxr.data.soft_label_writer import SoftLabelWriter
from mlx_cxr.data.soft_labels import SoftLabelError, load_soft_labels, partial_paths

PROGRAM = Path(soft_label_run.__file__)
FILES = ("teacher_features.npy", "teacher_soft_labels.npy", "teacher_study_ids.json")


def small(folder, header=HEADER, ids=IDS[:4], splits=SPLITS[:4], **more):
    return SoftLabelWriter.open(folder, ids, splits, header, **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_on_disk(folder):
    """How many rows a process that is at work has written so far."""
    try:
        return int(np.isfinite(np.load(partial_paths(folder)[0], allow_pickle=False)).all(axis=1).sum())
    except (OSError, ValueError, EOFError):
        return 0


def kill_after(folder, rows, pause):
    """Start the program, and kill it as soon as that many rows are on the disk; False if it ended before."""
    program = subprocess.Popen([sys.executable, str(PROGRAM), str(folder), "1", str(pause)])
    try:
        while program.poll() is None and rows_on_disk(folder) < rows:
            time.sleep(0.001)
    finally:
        program.kill()
    return program.wait() == -signal.SIGKILL


class TestKilled:
    def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(self, tmp_path):
        assert make(tmp_path / "whole", with_features=True) == STUDIES
        expected = contents(tmp_path / "whole")
        assert set(expected) == set(FILES)
        killed = tmp_path / "killed"
        done = 0
        for goal in (150, 400):
            assert kill_after(killed, goal, pause=0.004)
            with pytest.raises(SoftLabelError, match=r"teacher_study_ids\.json is not complete, .* was stopped"):
                load_soft_labels(killed)
            now = rows_on_disk(killed)
            assert max(goal, done) <= now < STUDIES
            done = now
            # What counts as done is right, features too; nothing else is.
            logits = np.load(partial_paths(killed)[0], allow_pickle=False)
            features = np.load(partial_paths(killed)[1], allow_pickle=False)
            whole = np.isfinite(logits).all(axis=1)
            np.testing.assert_array_equal(logits[whole], LOGITS[whole])
            np.testing.assert_array_equal(features[whole], FEATURES[whole])
        left = make(killed, with_features=True)
        assert left == STUDIES - done
        assert contents(killed) == expected

    @pytest.mark.parametrize("fatal", ["replace 1", "replace 2", "write_record", "unlink 2"])
    def test_a_kill_while_the_files_are_moved(self, tmp_path, monkeypatch, fatal):
        """The process ends before the n-th step of `finish`; the next one has nothing to compute, or all is there."""
        make(tmp_path / "whole", with_features=True)
        folder = tmp_path / "killed"

        class Killed(BaseException):
            pass

        def dies_at(number, real):
            calls = iter(range(1, 100))

            def call(*given, **named):
                if next(calls) == number:
                    raise Killed
                return real(*given, **named)

            return call

        name, _, number = fatal.partition(" ")
        with small(folder, ids=IDS, splits=SPLITS, feature_size=WIDTH) as writer:
            writer.put(range(STUDIES), LOGITS, FEATURES)
            with monkeypatch.context() as patched:
                if name == "write_record":
                    patched.setattr(soft_label_writer, name, dies_at(1, None))
                else:
                    patched.setattr(Path, name, dies_at(int(number), getattr(Path, name)))
                with pytest.raises(Killed):
                    writer.finish(TEMPERATURES, truncated=3, skipped=1)
        if fatal == "unlink 2":  # the JSON is there, so all is
            np.testing.assert_array_equal(load_soft_labels(folder).logits, LOGITS)
        else:
            with pytest.raises(SoftLabelError, match="not complete"):
                load_soft_labels(folder)
        assert make(folder, with_features=True) == 0
        assert contents(folder) == contents(tmp_path / "whole")

    def test_another_header_or_other_studies_start_anew(self, tmp_path):
        for changes in (
            {"header": {**HEADER, "labels": {"empty": "masked", "uncertain": "zeros"}}},
            {"ids": IDS[1:5]},
            {"splits": ("train",) * 4},
            {"feature_size": 3},
        ):
            with small(tmp_path) as writer:
                assert writer.todo.tolist() == [0, 1, 2, 3], changes
                writer.put([2], LOGITS[[2]])
            with small(tmp_path) as writer:
                assert writer.todo.tolist() == [0, 1, 3]
            with small(tmp_path, **changes) as writer:
                assert writer.todo.tolist() == [0, 1, 2, 3], changes

    def test_a_header_that_only_looks_different_goes_on(self, tmp_path):
        with small(tmp_path, {"a": (1, 2), "b": np.float32(0.5)}) as writer:
            writer.put([0], LOGITS[[0]])
        with small(tmp_path, {"b": 0.5, "a": [1, 2]}) as writer:
            assert writer.todo.tolist() == [1, 2, 3]

    @pytest.mark.parametrize("damage", ["cut", "gone", "other"])
    def test_a_damaged_partial_starts_anew(self, tmp_path, damage):
        with small(tmp_path) as writer:
            writer.put([0, 1], LOGITS[:2])
        path = partial_paths(tmp_path)[0]
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "gone":
            path.unlink()
        else:
            np.save(path, LOGITS[:3])
        with small(tmp_path) as writer:
            assert writer.todo.tolist() == [0, 1, 2, 3]

    def test_old_soft_labels_stay_until_new_ones_are_finished(self, tmp_path):
        with small(tmp_path, feature_size=WIDTH) as writer:
            writer.put(range(4), LOGITS[:4], FEATURES[:4])
            writer.finish(TEMPERATURES)
        with small(tmp_path, {"manifest": "b"}) as writer:
            writer.put([0, 1], -LOGITS[:2])
        np.testing.assert_array_equal(load_soft_labels(tmp_path).logits, LOGITS[:4])
        with small(tmp_path, {"manifest": "b"}) as writer:
            writer.put(writer.todo, -LOGITS[2:4])
            np.testing.assert_array_equal(writer.logits, -LOGITS[:4])
            writer.finish(TEMPERATURES)
        labels = load_soft_labels(tmp_path)
        np.testing.assert_array_equal(labels.logits, -LOGITS[:4])
        assert labels.features is None
        assert set(contents(tmp_path)) == set(FILES[1:])

    def test_what_is_finished_is_not_done_again(self, tmp_path):
        """As when a stage is killed after its soft labels, in what comes after them."""
        make(tmp_path, with_features=True)
        before = contents(tmp_path)
        assert make(tmp_path, with_features=True) == 0
        assert contents(tmp_path) == before
        path = tmp_path / "teacher_features.npy"
        path.write_bytes(path.read_bytes()[:-1])
        assert make(tmp_path, with_features=True) == STUDIES
        assert contents(tmp_path) == before
        assert make(tmp_path, with_features=False) == STUDIES


class TestRefused:
    def test_studies_of_the_test_split(self, tmp_path):
        with pytest.raises(SoftLabelError, match=rf"study '{IDS[2]}' is of the test split.*predictions\.csv"):
            small(tmp_path / "run", splits=("train", "train", "test", "train"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"splits": ("train", "val", "train", "train")}, "has the split 'val', not train or validate"),
            ({"splits": ("train",)}, "4 study ids, but 1 splits"),
            ({"ids": ("a", "b", "a", "c")}, "study 'a' is there twice"),
            ({"ids": (), "splits": ()}, "there is no study"),
        ],
    )
    def test_studies_that_cannot_be(self, tmp_path, changes, message):
        with pytest.raises(SoftLabelError, match=message):
            small(tmp_path, **changes)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
    def test_logits_that_are_no_numbers(self, tmp_path, value):
        logits = LOGITS[:2].astype(np.float64)
        logits[1, 5] = value
        with small(tmp_path) as writer:
            with pytest.raises(
                SoftLabelError, match=rf"logits for study '{IDS[3]}' are not finite as float32 \(1 of 2"
            ):
                writer.put([2, 3], logits)
            assert writer.todo.tolist() == [0, 1, 2, 3]

    def test_features_beyond_float16(self, tmp_path):
        with small(tmp_path, feature_size=2) as writer:
            with pytest.raises(SoftLabelError, match=rf"features for study '{IDS[0]}' are not finite as float16"):
                writer.put([0], LOGITS[:1], [[1.0, 70000.0]])
            assert writer.todo.tolist() == [0, 1, 2, 3]

    def test_shapes_that_do_not_go_together(self, tmp_path):
        with small(tmp_path) as writer:
            for rows, logits, features in (
                ([0], LOGITS[:2], None),
                ([0], LOGITS[:1, :13], None),
                ([4], LOGITS[:1], None),
                ([-1], LOGITS[:1], None),
                ([0], LOGITS[:1], FEATURES[:1]),
            ):
                with pytest.raises(ValueError, match=r"shape|rows|feature_size"):
                    writer.put(rows, logits, features)
            assert writer.todo.tolist() == [0, 1, 2, 3]

    def test_finishing_too_early_or_with_bad_temperatures(self, tmp_path):
        with small(tmp_path) as writer:
            writer.put([0, 2], LOGITS[[0, 2]])
            with pytest.raises(SoftLabelError, match=rf"2 of 4 studies have no soft label, first '{IDS[1]}'"):
                writer.finish(TEMPERATURES)
            writer.put([1, 3], LOGITS[[1, 3]])
            for bad in (TEMPERATURES[:13], [0.0, *TEMPERATURES[1:]], [np.nan, *TEMPERATURES[1:]], None):
                with pytest.raises(SoftLabelError, match="temperatures are not 14 positive numbers"):
                    writer.finish(bad)
            writer.finish(TEMPERATURES)

    def test_two_processes_at_once(self, tmp_path):
        with small(tmp_path) as writer:
            writer.put([0], LOGITS[:1])
            with pytest.raises(SoftLabelError, match="another process is writing soft labels into"):
                small(tmp_path)
            writer.put([1], LOGITS[1:2])
        with small(tmp_path) as writer:
            assert writer.todo.tolist() == [2, 3]

    def test_a_full_disk_keeps_what_was_put(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with small(tmp_path) as writer:
            writer.put([0], LOGITS[:1])
            monkeypatch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                writer.put([1], LOGITS[1:2])
            monkeypatch.undo()
        with small(tmp_path) as writer:
            assert writer.todo.tolist() == [1, 2, 3]


def test_a_row_counts_as_done_only_when_all_of_it_is_there(tmp_path, monkeypatch):
    """A write that ended inside a row, as a kill between two pages of the file could make it."""
    with small(tmp_path) as writer:
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:20], offset) and len(data))
        writer.put([1], LOGITS[1:2])
        monkeypatch.undo()
    with small(tmp_path) as writer:
        assert writer.todo.tolist() == [0, 1, 2, 3]
        writer.put(range(4), LOGITS[:4])
        writer.finish(TEMPERATURES)
    np.testing.assert_array_equal(load_soft_labels(tmp_path).logits, LOGITS[:4])
