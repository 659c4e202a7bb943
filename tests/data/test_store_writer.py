import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from few_images import TRANSFORM, image, manifest_of
from PIL import Image, ImageOps
from prepared_images import read_image

from mlx_cxr.core.labels import LABELS
from mlx_cxr.data import partial_store, store_writer
from mlx_cxr.data.decode_pool import decode_images
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.partial_store import PartialStore, StoreBusyError
from mlx_cxr.data.pixel_store import PixelStore, partial_paths
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.data.tables import DataError


class TestMostImagesFail:
    def test_a_wrong_root_is_seen_before_anything_is_written(self, root, manifest, store_path):
        with pytest.raises(DataError, match=r"12 of 12 films cannot be used.*no such file") as caught:
            build_store(store_path, manifest, TRANSFORM, root / "elsewhere", 1)
        assert f"data.root right ({root / 'elsewhere'})" in str(caught.value)
        assert str(root / "elsewhere/films/f05.jpg") in str(caught.value)
        assert not store_path.parent.exists()

    def test_more_than_half_is_an_error_and_half_is_not(self, root, manifest, store_path):
        for number in range(6):
            (root / f"films/f{number:02d}.jpg").write_bytes(b"\0" * 128 + b"DICM")
        assert len(build_store(store_path, manifest, TRANSFORM, root, 1).unreadable) == 6
        (root / "films/f06.jpg").write_bytes(b"<html>")
        before = store_path.read_bytes(), store_path.with_suffix(".json").read_bytes()
        with pytest.raises(DataError, match=r"7 of 12 films cannot be used \(6 x a DICOM file"):
            build_store(store_path, manifest, TRANSFORM, root, 1)
        assert (store_path.read_bytes(), store_path.with_suffix(".json").read_bytes()) == before

    def test_no_images_at_all(self, root, store_path):
        with pytest.raises(DataError, match="no films"):
            build_store(store_path, manifest_of([]), TRANSFORM, root, 1)

    def test_a_root_that_vanishes_stops_the_run(self, root, manifest, store_path, monkeypatch):
        def decode_then_unplug(jobs, transform, workers):
            for number, job in enumerate(jobs):
                if number == 4:
                    (root / "disk").rename(root / "unplugged")
                yield from decode_images([job], transform, 1)

        (root / "disk").mkdir()
        shutil.move(root / "films", root / "disk" / "films")
        monkeypatch.setattr(store_writer, "decode_images", decode_then_unplug)
        with pytest.raises(DataError, match=r"data\.root .*disk is gone"):
            build_store(store_path, manifest, TRANSFORM, root / "disk")
        monkeypatch.undo()
        (root / "unplugged").rename(root / "disk")
        assert build_store(store_path, manifest, TRANSFORM, root / "disk").decoded == 8


class TestUpToDate:
    def test_nothing_is_done_twice(self, root, manifest, store_path):
        build_store(store_path, manifest, TRANSFORM, root, 1)
        before = store_path.stat().st_mtime_ns
        report = build_store(store_path, manifest, TRANSFORM, root, 1)
        assert (report.images, report.decoded) == (12, 0)
        assert store_path.stat().st_mtime_ns == before
        assert build_store(store_path, manifest, TRANSFORM, root, 1, rebuild=True).decoded == 12

    def test_what_is_known_of_bad_images_is_still_told(self, root, manifest, store_path):
        (root / "films/f03.jpg").write_bytes(b"")
        first = build_store(store_path, manifest, TRANSFORM, root, 1)
        again = build_store(store_path, manifest, TRANSFORM, root, 1)
        assert again.decoded == 0
        assert again.unreadable == first.unreadable != {}

    def test_a_mended_image_makes_it_anew(self, root, manifest, store_path):
        good = (root / "films/f03.jpg").read_bytes()
        (root / "films/f03.jpg").write_bytes(good[:-30])
        assert list(build_store(store_path, manifest, TRANSFORM, root, 1).unreadable) == ["id0006"]
        (root / "films/f03.jpg").write_bytes(good)
        assert build_store(store_path, manifest, TRANSFORM, root, 1).unreadable == {}
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        assert (store.images[6] == read_image(root / "films/f03.jpg", TRANSFORM)).all()

    @pytest.mark.parametrize("dated", ["as it was", "now"])
    def test_an_image_replaced_by_one_of_the_same_size(self, root, manifest, store_path, dated):
        # A picture without compression, and its negative: as many bytes, every one of them another.
        path = root / "films/f03.jpg"
        Image.open(path).convert("L").save(path, "BMP")
        build_store(store_path, manifest, TRANSFORM, root, 1)
        before, pixels = path.stat(), np.load(store_path)[6]
        ImageOps.invert(Image.open(path)).save(path, "BMP")
        assert path.stat().st_size == before.st_size
        if dated == "as it was":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 12
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        inside = pixels.any(axis=0)  # beside it are the bars of the letterbox
        np.testing.assert_allclose(store.images[6][:, inside].astype(int), 255 - pixels[:, inside].astype(int), atol=1)

    @pytest.mark.parametrize("row", range(12))
    def test_one_changed_pixel_of_any_image_in_the_store(self, root, manifest, store_path, row):
        build_store(store_path, manifest, TRANSFORM, root, 1)
        good = store_path.read_bytes()
        images = np.load(store_path, mmap_mode="r+")
        images[row, 31, 31] ^= 1
        images.flush()
        with pytest.raises(DataError, match=rf"{store_path.name} is not what its index .* says"):
            PixelStore.open(store_path, manifest, TRANSFORM)
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 12
        assert store_path.read_bytes() == good

    def test_another_manifest_transform_or_a_damaged_store_make_it_anew(self, root, manifest, store_path):
        build_store(store_path, manifest, TRANSFORM, root, 1)
        crop = Transform(32, "center_crop")
        assert build_store(store_path, manifest, crop, root, 1).decoded == 12
        assert build_store(store_path, manifest_of(manifest.frame["path"], "b" * 64), crop, root, 1).decoded == 12
        os.truncate(store_path, 5000)
        assert build_store(store_path, manifest_of(manifest.frame["path"], "b" * 64), crop, root, 1).decoded == 12


STAGE = """
import signal, sys
from mlx_cxr.data import partial_store
from mlx_cxr.prepare_images import main
# A shell that puts the tests into the background has Ctrl-C ignored in all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
partial_store.CHECKPOINT_SECONDS = 0.02
main(sys.argv[1:])
"""


@pytest.fixture
def experiment(tmp_path):
    """A configuration with a manifest of 240 rows over 8 images that take a few milliseconds each."""
    for number in range(8):
        image(number, 1200, 1000).save(tmp_path / f"big{number}.jpg", quality=95)
    frame = pd.DataFrame({"image_id": [f"i{row:03d}" for row in range(240)]})
    frame["patient_id"] = frame["study_id"] = frame["image_id"]
    frame["path"] = [f"big{row % 8}.jpg" for row in range(240)]
    frame["split"] = "train"
    for name in ("view", "age", "sex", "text", *LABELS):
        frame[name] = ""

    def make(name):
        work = tmp_path / name
        work.mkdir()
        frame.to_csv(work / "manifest.csv", index=False)
        config = work / "config.yaml"
        config.write_text(
            f"name: t\ndata: {{source: csv, root: {tmp_path}, work_dir: {work}, csv: {{table: unused.csv}}}}\n"
            "pixels: {size: 32, workers: 2}\n"
        )
        return work / "images_32.npy", [sys.executable, "-c", STAGE, "--config", str(config)]

    return make


def journaled(store_path):
    journal = partial_paths(store_path)[1]
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    return sum(len(json.loads(line)["rows"]) for line in lines[1:] if line.endswith("\n"))


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


class TestKilled:
    def test_a_killed_run_is_gone_on_with(self, experiment):
        unbroken, command = experiment("unbroken")
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0

        store_path, command = experiment("killed")
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        wait_until(lambda: journaled(store_path) > 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: group_is_gone(process.pid))  # its workers end with it
        kept = journaled(store_path)
        assert 0 < kept < 240
        assert not store_path.exists()

        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0
        assert f"going on with a stopped run: {kept} of 240 films" in result.stderr
        assert f"{240 - kept} decoded" in result.stderr
        assert store_path.read_bytes() == unbroken.read_bytes()
        index, other = (json.loads(path.with_suffix(".json").read_text()) for path in (store_path, unbroken))
        assert index == other

    @pytest.mark.parametrize("moment", ["workers start", "films are written"])
    def test_ctrl_c_keeps_what_is_there(self, experiment, moment):
        store_path, command = experiment("interrupted")
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: partial_paths(store_path)[1].exists())
        if moment == "workers start":
            time.sleep(0.05)
        else:
            wait_until(lambda: journaled(store_path) > 0)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert said.rstrip().endswith("stopped; what was written so far is kept")
        assert "Traceback" not in said
        assert process.returncode == 130
        assert journaled(store_path) > 0 or moment == "workers start"
        assert journaled(store_path) < 240

    @pytest.mark.parametrize("moment", ["before the index", "torn journal line"])
    def test_other_moments(self, root, manifest, store_path, moment, monkeypatch):
        def killed(*args):
            raise KeyboardInterrupt

        expected = root / "unbroken" / "images_32.npy"
        build_store(expected, manifest, TRANSFORM, root, 1)
        monkeypatch.setattr(partial_store, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            build_store(store_path, manifest, TRANSFORM, root, 1)
        monkeypatch.undo()
        pixels, journal = partial_paths(store_path)
        if moment == "torn journal line":
            store_path.rename(pixels)
            with journal.open("a") as out:
                out.write('{"rows": [1, 2')
        with pytest.raises(DataError, match="not complete"):
            PixelStore.open(store_path, manifest, TRANSFORM)
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 0
        assert store_path.read_bytes() == expected.read_bytes()
        assert not journal.exists()
        PixelStore.open(store_path, manifest, TRANSFORM)

    def test_the_rest_of_another_store_is_not_used(self, root, manifest, store_path):
        pixels, journal = partial_paths(store_path)
        store_path.parent.mkdir()
        journal.write_text('{"schema": 1, "manifest": "another"}\n{"rows": [0, 1, 2], "notes": {}}\n')
        pixels.write_bytes(bytes(20_000))
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 12
        PixelStore.open(store_path, manifest, TRANSFORM)

    def test_two_at_once(self, root, manifest, store_path):
        store_path.parent.mkdir()
        with partial_paths(store_path)[1].open("ab") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            with pytest.raises(StoreBusyError, match=r"another prepare_images is writing .*images_32\.npy"):
                build_store(store_path, manifest, TRANSFORM, root, 1)
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 12


class TestStoppedBesideAWholeStore:
    """What a run left that was killed as its last step, or while it made a whole store anew."""

    @pytest.mark.parametrize("at", ["the last step", "a rebuild"])
    def test_it_is_removed_and_the_store_kept(self, root, manifest, store_path, monkeypatch, at):
        def killed(*arguments):
            write(*arguments)
            raise KeyboardInterrupt

        write = partial_store.write_record if at == "the last step" else PartialStore.write
        owner, name = (partial_store, "write_record") if at == "the last step" else (PartialStore, "write")
        if at == "a rebuild":
            build_store(store_path, manifest, TRANSFORM, root, 1)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                build_store(store_path, manifest, TRANSFORM, root, 1, rebuild=at == "a rebuild")
        files = {path: path.read_bytes() for path in (store_path, store_path.with_suffix(".json"))}
        assert partial_paths(store_path)[1].exists()
        # Not while another process is at it.
        with partial_paths(store_path)[1].open("a+b") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 0
            assert partial_paths(store_path)[1].exists()
        assert build_store(store_path, manifest, TRANSFORM, root, 1).decoded == 0
        assert sorted(store_path.parent.iterdir()) == sorted(files)
        assert {path: path.read_bytes() for path in files} == files


class TestFullDisk:
    def test_what_fits_is_kept(self, experiment):
        """The kernel refuses to let the file grow, as a full disk would."""
        store_path, command = experiment("full")
        limit = 100 * 32 * 32

        def bounded():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        # -B: what it compiles would be cut short for all others.
        python, *rest = command
        result = subprocess.run([python, "-B", *rest], capture_output=True, text=True, check=False, preexec_fn=bounded)
        assert result.returncode == 2
        assert "could not write" in result.stderr
        assert "images_32.npy.partial" in result.stderr
        assert "of 240 films are written and kept; make room" in result.stderr
        assert "Traceback" not in result.stderr
        assert not store_path.exists()
        kept = journaled(store_path)
        assert 50 < kept < 100
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert f"{240 - kept} decoded" in result.stderr
        assert np.load(store_path).any(axis=(1, 2)).all()

    def test_too_little_room_is_said_at_the_start(self, root, manifest, store_path, monkeypatch):
        usage = shutil.disk_usage(root)._replace(free=5000)
        monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"images_32\.npy needs 0\.0 MB more, 0\.0 MB are free") as caught:
            build_store(store_path, manifest, TRANSFORM, root, 1)
        assert caught.value.errno == errno.ENOSPC
        assert "data.work_dir" in str(caught.value)
