import os

import numpy as np
import pytest
from few_images import TRANSFORM, image, manifest_of
from PIL import Image
from prepared_images import read_image

from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import Manifest
from mlx_cxr.data.pixel_store import PixelStore, ShardedImages, partial_paths
from mlx_cxr.data.store_writer import build_store
from mlx_cxr.data.tables import DataError
from mlx_cxr.training.batches import ImageSource

WHOLE = np.random.default_rng(0).integers(0, 256, (23, 4, 4), dtype=np.uint8)


class TestBuiltStore:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_each_row_is_the_image_of_its_manifest_row(self, root, manifest, store_path, workers):
        report = build_store(store_path, manifest, TRANSFORM, root, workers)
        assert (report.images, report.decoded, report.unreadable) == (12, 12, {})
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        expected = np.stack([read_image(root / path, TRANSFORM) for path in manifest.frame["path"]])
        assert store.images.dtype == np.uint8
        assert (store.images == expected).all()
        assert isinstance(store.images, np.memmap)
        assert not store.images.flags.writeable
        assert (np.load(store_path, allow_pickle=False) == expected).all()

    def test_nothing_but_store_and_index_is_left(self, root, manifest, store_path):
        build_store(store_path, manifest, TRANSFORM, root, 1)
        assert sorted(path.name for path in store_path.parent.iterdir()) == ["images_32.json", "images_32.npy"]

    def test_rows_follow_the_ids_asked_for(self, root, manifest, store_path):
        build_store(store_path, manifest, TRANSFORM, root, 1)
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        rows = store.rows(manifest.frame["image_id"].iloc[[7, 2, 2]])
        assert rows.tolist() == [7, 2, 2]
        assert rows.dtype == np.int64
        assert len(store.rows([])) == 0
        with pytest.raises(DataError, match="'other' is not in the pixel store"):
            store.rows(["id0001", "other"])

    def test_a_bad_image_is_listed_and_the_others_are_kept(self, root, manifest, store_path):
        (root / "films/f07.jpg").write_bytes(b"")
        (root / "films/f03.jpg").unlink()
        report = build_store(store_path, manifest, TRANSFORM, root, 1)
        assert list(report.unreadable) == ["id0002", "id0006"]
        assert "0 bytes" in report.unreadable["id0002"]
        assert report.unreadable["id0006"] == "no such file"
        store = PixelStore.open(store_path, manifest, TRANSFORM)
        assert dict(store.missing) == report.unreadable
        assert not store.images[[2, 6]].any()
        assert store.images[[0, 1, 3, 4, 5]].any(axis=(1, 2)).all()
        # As the training stage leaves them out.
        kept = ~manifest.frame["image_id"].isin(store.missing).to_numpy()
        assert store.rows(manifest.frame["image_id"][kept]).tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 10, 11]
        with pytest.raises(DataError, match=r"id0002.*0 bytes"):
            store.rows(["id0000", "id0002"])

    def test_the_last_images_may_be_the_bad_ones(self, root, manifest, store_path):
        (root / "films/f09.jpg").write_bytes(b"GIF89a")
        build_store(store_path, manifest, TRANSFORM, root, 1)
        assert PixelStore.open(store_path, manifest, TRANSFORM).images.shape == (12, 32, 32)

    def test_notes_are_kept_with_the_store(self, root, manifest, store_path):
        values = np.asarray(image(0, 64, 64)).astype(np.uint16) * 200
        Image.fromarray(values).save(root / "films/f05.jpg", "PNG")
        report = build_store(store_path, manifest, TRANSFORM, root, 1)
        assert "16-bit" in report.notes["id0000"]
        assert PixelStore.open(store_path, manifest, TRANSFORM).notes == report.notes


class TestOpenRefuses:
    @pytest.fixture(autouse=True)
    def _built(self, root, manifest, store_path):
        build_store(store_path, manifest, TRANSFORM, root, 1)

    def refused(self, store_path, manifest, reason, transform=TRANSFORM):
        with pytest.raises(DataError, match=reason) as caught:
            PixelStore.open(store_path, manifest, transform)
        assert "run prepare_images" in str(caught.value)
        assert str(store_path.with_suffix("")) in str(caught.value)

    @pytest.mark.parametrize("suffix", [".npy", ".json"])
    def test_a_missing_file(self, manifest, store_path, suffix):
        store_path.with_suffix(suffix).unlink()
        self.refused(store_path, manifest, "is missing")

    def test_a_store_that_was_never_finished(self, manifest, store_path):
        store_path.unlink()
        partial_paths(store_path)[1].touch()
        self.refused(store_path, manifest, "not complete")

    def test_another_manifest(self, manifest, store_path):
        other = manifest_of(manifest.frame["path"], "b" * 64)
        self.refused(store_path, other, r"another manifest \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)")

    def test_another_transform(self, manifest, store_path):
        self.refused(store_path, manifest, "another transform .*letterbox.*center_crop", Transform(32, "center_crop"))

    def test_other_ids(self, manifest, store_path):
        other = Manifest(manifest.frame.iloc[::-1].reset_index(drop=True), manifest.raw_labels, manifest.sha256)
        self.refused(store_path, other, "other films than the manifest")

    def test_a_cut_array(self, manifest, store_path):
        os.truncate(store_path, store_path.stat().st_size - 1)
        self.refused(store_path, manifest, "damaged or cut short")

    def test_an_array_of_another_shape(self, manifest, store_path):
        np.save(store_path, np.zeros((12, 32, 31), np.uint8))
        self.refused(store_path, manifest, r"\(12, 32, 31\), its index says uint8 \(12, 32, 32\)")

    def test_an_array_from_elsewhere(self, manifest, store_path):
        np.save(store_path, np.zeros((12, 32, 32), np.uint8))
        self.refused(store_path, manifest, "is not what its index")

    def test_a_pickle_is_never_opened(self, manifest, store_path):
        np.save(store_path, np.array([{}] * 12, dtype=object), allow_pickle=True)
        self.refused(store_path, manifest, "Python objects in dtype")

    @pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 1}'])
    def test_a_damaged_index(self, manifest, store_path, text):
        store_path.with_suffix(".json").write_text(text)
        self.refused(store_path, manifest, "not readable JSON|carries no 'self_sha256'")


@pytest.fixture
def sharded():
    return ShardedImages([WHOLE[:10], WHOLE[10:11], WHOLE[11:]])


def test_sharded_images_have_the_form_of_the_whole(sharded):
    assert (sharded.shape, sharded.dtype, sharded.ndim, sharded.nbytes) == (WHOLE.shape, WHOLE.dtype, 3, WHOLE.nbytes)
    assert len(sharded) == 23
    assert (np.stack(list(sharded)) == WHOLE).all()


@pytest.mark.parametrize(
    "rows",
    [
        *(0, 9, 10, 11, 22, -1, -23, np.int64(12)),
        *(slice(None), slice(8, 13), slice(20, 2, -3), slice(5, 5), slice(-4, None)),
        *([], [3], [22, 0, 10, 10, 9, 11], [-1, 0, -13]),
        *(np.array([11, 10, 9]), np.arange(23)[::-1], np.array([], np.int64), np.array([7, 21], np.uint8)),
    ],
    ids=str,
)
def test_rows_are_those_of_the_whole(sharded, rows):
    given = sharded[rows]
    assert given.dtype == np.uint8
    assert given.shape == WHOLE[rows].shape
    assert (given == WHOLE[rows]).all()


@pytest.mark.parametrize("rows", [23, -24, [0, 23], np.array([-24])], ids=str)
def test_a_row_that_is_not_there(sharded, rows):
    with pytest.raises(IndexError, match="of 23"):
        sharded[rows]


@pytest.mark.parametrize(
    "rows", [(0, 1), (0, np.array([1, 2])), np.ones(23, bool), [[0, 1]], [0.5], "0", None], ids=str
)
def test_other_ways_of_asking_are_refused(sharded, rows):
    with pytest.raises(IndexError, match="by number or slice"):
        sharded[rows]


def test_forms_that_differ_are_refused():
    with pytest.raises(ValueError, match="expected one form"):
        ShardedImages([WHOLE, WHOLE[:, :3]])
    with pytest.raises(ValueError, match="expected one form"):
        ShardedImages([])


@pytest.mark.parametrize("budget_gb", [0.0, 1.0])
def test_sharded_images_are_served_to_training(sharded, budget_gb):
    rows = np.array([22, 3, 10, 9, 11, 0])
    items = np.array([4, 0, 5])
    source = ImageSource(sharded, rows, budget_gb)
    assert source.resident is bool(budget_gb)
    assert (np.array(source.batch(items)) == WHOLE[rows[items]]).all()
