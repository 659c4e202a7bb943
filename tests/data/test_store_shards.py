"""A store in several files: the same images as in one, made by one process or several, whichever dies."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from few_images import TRANSFORM, image, manifest_of
from PIL import Image
from prepared_images import read_image

from mlx_cxr.data import partial_store, store_writer
from mlx_cxr.data.decode_pool import decode_images
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.partial_store import StoreBusyError, claimed
from mlx_cxr.data.pixel_store import PixelStore, ShardedImages, partial_paths, shard_paths, store_files
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.data.tables import DataError


def build(store_path, manifest, root, shard_films=5, **options):
    return build_store(store_path, manifest, TRANSFORM, root, 1, shard_films=shard_films, **options)


def names(store_path):
    return sorted(path.name for path in store_path.parent.iterdir())


SHARDS = [f"images_32-{k}-of-3.{suffix}" for k in (1, 2, 3) for suffix in ("json", "npy")]


class TestTheWhole:
    def test_it_holds_what_one_file_holds(self, root, manifest, store_path):
        (root / "films/f07.jpg").write_bytes(b"")
        values = np.asarray(image(0, 64, 64)).astype(np.uint16) * 200
        Image.fromarray(values).save(root / "films/f09.jpg", "PNG")
        one = root / "one" / store_path.name
        in_one = build(one, manifest, root, 12)
        in_three = build(store_path, manifest, root)
        assert (in_three.images, in_three.decoded, in_three.lacking) == (12, 12, ())
        assert (in_three.unreadable, in_three.notes) == (in_one.unreadable, in_one.notes)
        assert list(in_three.unreadable) == ["id0002"]
        assert "16-bit" in in_three.notes["id0011"]
        assert names(store_path) == [*SHARDS, "images_32.json"]
        store, other = (PixelStore.open(path, manifest, TRANSFORM) for path in (store_path, one))
        assert isinstance(store.images, ShardedImages)
        assert store.images.shape == (12, 32, 32)
        assert (store.images[:] == other.images).all()
        assert (store.missing, store.notes) == (other.missing, other.notes)
        assert store.rows(["id0011", "id0004"]).tolist() == [11, 4]

    def test_shards_are_of_the_next_rows_of_the_manifest(self, root, manifest, store_path):
        build(store_path, manifest, root)
        arrays = [np.load(path, allow_pickle=False) for path in shard_paths(store_path, 3)]
        assert [len(array) for array in arrays] == [5, 5, 2]
        assert (arrays[1][2] == read_image(root / manifest.frame["path"][7], TRANSFORM)).all()
        index = json.loads(store_path.with_name("images_32-2-of-3.json").read_text())
        assert index["image_ids"] == manifest.frame["image_id"].tolist()[5:10]

    def test_nothing_is_done_twice(self, root, manifest, store_path):
        build(store_path, manifest, root)
        before = {path: path.stat().st_mtime_ns for path in store_path.parent.iterdir()}
        assert build(store_path, manifest, root).decoded == 0
        assert {path: path.stat().st_mtime_ns for path in store_path.parent.iterdir()} == before
        assert build(store_path, manifest, root, rebuild=True).decoded == 12

    def test_a_mended_image_makes_its_shard_anew(self, root, manifest, store_path):
        good = (root / "films/f03.jpg").read_bytes()
        (root / "films/f03.jpg").write_bytes(good[:-30])
        assert list(build(store_path, manifest, root).unreadable) == ["id0006"]
        (root / "films/f03.jpg").write_bytes(good)
        report = build(store_path, manifest, root)
        assert (report.decoded, report.unreadable) == (5, {})
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        assert (store.images[6] == read_image(root / "films/f03.jpg", TRANSFORM)).all()

    def test_more_than_half_of_a_shard(self, root, manifest, store_path):
        for name in ("f10", "f09"):
            (root / f"films/{name}.jpg").write_bytes(b"<html>")
        with pytest.raises(DataError, match=r"2 of 2 films cannot be used"):
            build(store_path, manifest, root)
        with pytest.raises(DataError, match="is not complete"):
            PixelStore.open(store_path, manifest, TRANSFORM)

    @pytest.mark.parametrize("size", [3, 12])
    def test_other_shards_replace_it(self, root, manifest, store_path, size):
        build(store_path, manifest, root)
        build(store_path, manifest, root, size)
        wanted = shard_paths(store_path, 12 // size)
        assert names(store_path) == sorted(
            {"images_32.json"} | {path.with_suffix(suffix).name for path in wanted for suffix in (".npy", ".json")}
        )
        expected = np.stack([read_image(root / path, TRANSFORM) for path in manifest.frame["path"]])
        assert (PixelStore.open(store_path, manifest, TRANSFORM).images[:] == expected).all()

    def test_shards_replace_one_file(self, root, manifest, store_path):
        build(store_path, manifest, root, 12)
        build(store_path, manifest, root)
        assert names(store_path) == [*SHARDS, "images_32.json"]

    def test_a_full_disk_is_foreseen(self, root, manifest, store_path, monkeypatch):
        usage = shutil.disk_usage(root)._replace(free=10_000)
        monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"images_32\.npy needs 0\.0 MB more"):
            build(store_path, manifest, root)
        # What is left to make fits.
        monkeypatch.undo()
        build(store_path, manifest, root, share=(1, 2))
        monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda folder: usage)
        assert build(store_path, manifest, root).decoded == 5


class TestStopped:
    def test_finished_shards_are_kept_and_the_others_gone_on_with(self, root, manifest, store_path, monkeypatch):
        def stop_in_the_second(jobs, transform, workers):
            for number, job in enumerate(jobs):
                if "f03" in str(job[1]) and number:
                    raise KeyboardInterrupt
                yield from decode_images([job], transform, 1)

        monkeypatch.setattr(store_writer, "decode_images", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            build(store_path, manifest, root)
        monkeypatch.undo()
        with pytest.raises(DataError, match="is not complete: prepare_images was stopped"):
            PixelStore.open(store_path, manifest, TRANSFORM)
        report = build(store_path, manifest, root)
        assert report.decoded == 12 - 5 - 1
        expected = np.stack([read_image(root / path, TRANSFORM) for path in manifest.frame["path"]])
        assert (PixelStore.open(store_path, manifest, TRANSFORM).images[:] == expected).all()
        assert names(store_path) == [*SHARDS, "images_32.json"]

    def test_a_store_whose_shard_changes_is_none(self, root, manifest, store_path, monkeypatch):
        """The index of the whole goes before the first shard does."""
        build(store_path, manifest, root)

        def killed(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(partial_store, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            build(store_path, manifest, root, rebuild=True)
        monkeypatch.undo()
        assert not store_path.with_suffix(".json").exists()
        assert build(store_path, manifest, root).decoded == 0
        PixelStore.open(store_path, manifest, TRANSFORM)

    @pytest.mark.parametrize("what", ["a missing shard", "a cut shard", "a shard from elsewhere", "a damaged index"])
    def test_damage_is_seen_and_mended(self, root, manifest, store_path, what):
        build(store_path, manifest, root)
        shard = shard_paths(store_path, 3)[1]
        index = json.loads(store_path.with_suffix(".json").read_text())
        if what == "a missing shard":
            shard.unlink()
        elif what == "a cut shard":
            shard.write_bytes(shard.read_bytes()[:-1])
        elif what == "a shard from elsewhere":
            np.save(shard, np.zeros((5, 32, 32), np.uint8))
        else:
            store_path.with_suffix(".json").write_text(json.dumps({**index, "shards": [{"file": "x.npy"}]}))
        with pytest.raises(DataError, match="run prepare_images") as caught:
            PixelStore.open(store_path, manifest, TRANSFORM)
        assert what == "a damaged index" or shard.name in str(caught.value)
        assert build(store_path, manifest, root).decoded == (0 if what == "a damaged index" else 5)
        PixelStore.open(store_path, manifest, TRANSFORM)

    def test_another_manifest_or_transform(self, root, manifest, store_path):
        build(store_path, manifest, root)
        other = manifest_of(manifest.frame["path"], "b" * 64)
        with pytest.raises(DataError, match="another manifest"):
            PixelStore.open(store_path, other, TRANSFORM)
        with pytest.raises(DataError, match="another transform"):
            PixelStore.open(store_path, manifest, Transform(32, "center_crop"))
        assert build(store_path, other, root).decoded == 12


class TestTogether:
    def test_shares_make_the_whole_and_the_last_writes_the_index(self, root, manifest, store_path):
        first = build(store_path, manifest, root, share=(2, 2))
        assert (first.images, first.decoded) == (5, 5)
        assert [path.name for path in first.lacking] == ["images_32-1-of-3.npy", "images_32-3-of-3.npy"]
        assert not store_path.with_suffix(".json").exists()
        last = build(store_path, manifest, root, share=(1, 2))
        assert (last.images, last.decoded, last.lacking) == (12, 7, ())
        alone = root / "alone" / store_path.name
        build(alone, manifest, root)
        assert {p.name: p.read_bytes() for p in store_path.parent.iterdir()} == {
            p.name: p.read_bytes() for p in alone.parent.iterdir()
        }

    def test_a_share_without_a_shard_does_nothing(self, root, manifest, store_path):
        report = build(store_path, manifest, root, 12, share=(3, 3))
        assert (report.images, report.decoded, len(report.lacking)) == (0, 0, 1)
        build(store_path, manifest, root, 12)
        assert build(store_path, manifest, root, 12, share=(3, 3)).lacking == ()
        assert names(store_path) == ["images_32.json", "images_32.npy"]

    def test_a_claimed_share_is_refused(self, root, manifest, store_path):
        store_path.parent.mkdir()
        with claimed(shard_paths(store_path, 3)[1]), pytest.raises(StoreBusyError, match=r"images_32-2-of-3\.npy"):
            build(store_path, manifest, root, share=(2, 3))

    def test_what_another_makes_is_waited_for(self, root, manifest, store_path, monkeypatch, caplog):
        """Another process holds a shard and finishes it; it is not made again, nor are the others by that process."""
        caplog.set_level("INFO", "mlx_cxr")
        monkeypatch.setattr(store_writer, "_POLL_SECONDS", 0.05)
        store_path.parent.mkdir()
        waiting, decoded = threading.Event(), []

        def count(jobs, transform, workers):
            decoded.extend(jobs)
            yield from decode_images(jobs, transform, 1)

        monkeypatch.setattr(store_writer, "decode_images", count)
        monkeypatch.setattr(store_writer.time, "sleep", lambda seconds: waiting.set() or time.monotonic())
        with claimed(shard_paths(store_path, 3)[0]):
            helper = threading.Thread(target=build, args=(store_path, manifest, root), daemon=True)
            helper.start()
            assert waiting.wait(20)
            assert len(decoded) == 7
        helper.join(20)
        assert len(decoded) == 12
        assert caplog.text.count("images_32-1-of-3.npy is being made by another process") == 1
        PixelStore.open(store_path, manifest, TRANSFORM)

    def test_three_processes_at_once(self, root, manifest, store_path):
        """Each image is decoded once, whoever does it, and all three end when the store is there."""
        (root / "frame.json").write_text(json.dumps(manifest.frame["path"].tolist()))
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[2])\n"
            "from pathlib import Path; from few_images import TRANSFORM, manifest_of\n"
            "from mlx_cxr.data import store_writer; store_writer._POLL_SECONDS = 0.05\n"
            "root = Path(sys.argv[1]); manifest = manifest_of(json.loads((root / 'frame.json').read_text()))\n"
            "path = root / 'work' / 'images_32.npy'\n"
            "report = store_writer.build_store(path, manifest, TRANSFORM, root, 1, shard_films=2)\n"
            "print(report.decoded, len(report.lacking), path.with_suffix('.json').exists())"
        )
        here = __file__.rsplit("/data/", 1)[0]
        command = [sys.executable, "-c", code, str(root), here]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = [process.communicate(timeout=120)[0].split() for process in running]
        assert sum(int(decoded) for decoded, *_ in said) == 12
        assert all(rest == ["0", "True"] for _, *rest in said)
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        expected = np.stack([read_image(root / path, TRANSFORM) for path in manifest.frame["path"]])
        assert (store.images[:] == expected).all()
        assert not list(store_path.parent.glob("*partial*"))

    def test_one_who_claims_a_finished_file_looks_again(self, root, manifest, store_path):
        """The journal that was opened before its holder removed it is not taken for a claim."""
        store_path.parent.mkdir()
        journal = partial_paths(store_path)[1]
        with journal.open("a+b") as stale, claimed(store_path) as held:
            assert held.fileno() != stale.fileno()
            journal.unlink()
            with claimed(store_path) as fresh:
                assert journal.stat().st_ino == os.fstat(fresh.fileno()).st_ino


def test_the_files_of_a_store(root, manifest, store_path):
    index = store_path.with_suffix(".json")
    assert store_files(store_path) == [index, store_path]
    build(store_path, manifest, root)
    assert store_files(store_path) == [index, *shard_paths(store_path, 3)]
    assert [path.name for path in shard_paths(store_path, 10)][::9] == [
        "images_32-01-of-10.npy",
        "images_32-10-of-10.npy",
    ]
    index.write_text("{")
    assert store_files(store_path) == [index, store_path]
