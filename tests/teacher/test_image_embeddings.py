"""Images as the vision tower takes them, against the processor's own patches; stored embeddings, resumed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from toy_teacher import opened

from mlx_cxr.core.files import read_json, write_json
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.manifest import load_manifest
from mlx_cxr.data.pixel_store import PixelStore
from mlx_cxr.teacher import image_embeddings as module
from mlx_cxr.teacher.image_embeddings import (
    ImageEmbeddingError,
    encode_images,
    image_embeddings,
    image_patches,
    image_tokens,
)


@pytest.fixture(scope="module")
def store(toy) -> PixelStore:
    config = toy.config()
    return PixelStore.open(config.pixels_path, load_manifest(config.manifest_path), Transform.of(config))


@pytest.fixture
def ids(toy) -> list[str]:
    return load_manifest(toy.config().manifest_path).frame["image_id"].tolist()[:21]


def noise(side: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (count, side, side)).astype(np.uint8)


@pytest.mark.parametrize("size", [256, 320, 512])
def test_patches_are_those_of_the_processor(toy, size):
    """One tile of a square image that needs no resizing; the processor pads to 1024 patches, left out here."""
    from mlx_vlm import load

    processor = load(str(toy.base), lazy=True)[1].image_processor
    theirs = processor.preprocess([Image.fromarray(f) for f in noise(size)], do_image_splitting=False)
    ours = image_patches(noise(size), size, (0.5, 0.5))
    side = size // 16
    assert theirs["spatial_shapes"].tolist() == [[side, side]] * 2
    np.testing.assert_allclose(ours, theirs["pixel_values"][:, : side * side], atol=1e-6)
    assert theirs["pixel_attention_mask"].sum(axis=1).tolist() == [side * side] * 2


def test_resizing_is_bilinear_as_the_processors(toy):
    """An image of 100 px, which the processor brings to 256."""
    from mlx_vlm import load

    processor = load(str(toy.base), lazy=True)[1].image_processor
    theirs = processor.preprocess([Image.fromarray(f) for f in noise(100)], do_image_splitting=False)
    assert theirs["spatial_shapes"].tolist() == [[16, 16]] * 2
    np.testing.assert_allclose(image_patches(noise(100), 256, (0.5, 0.5)), theirs["pixel_values"][:, :256], atol=1e-6)


def test_patches_lie_in_rows_and_keep_the_grey_levels():
    image = np.zeros((1, 64, 64), np.uint8)
    image[0, 16:32, 48:64] = 255
    patches = image_patches(image, 64, (0.5, 0.25))
    assert patches.shape == (1, 16, 768)
    assert np.unique(np.delete(patches[0], 7, axis=0)).tolist() == [-2.0]
    assert np.unique(patches[0, 7]).tolist() == [2.0]


def test_padding_an_image_changes_nothing(base):
    """The published processor's 1024 patches with a mask give the embeddings of the bare patches."""
    images = noise(64)
    padded = np.zeros((2, 1024, 768), np.float32)
    padded[:, :16] = image_patches(images, 64, base.grey)
    mask = mx.array((np.arange(1024) < 16)[None].repeat(2, axis=0).astype(np.int32))
    theirs = base.model.encode_images(
        mx.array(padded), spatial_shapes=mx.array([[4, 4]] * 2), pixel_attention_mask=mask
    )
    ours = encode_images(base, images, 64)
    assert ours.shape == (2, image_tokens(64, base), base.hidden_size) == (2, 4, 64)
    np.testing.assert_allclose(np.array(ours), np.array(mx.stack(theirs)), atol=1e-5)


def test_an_images_embedding_does_not_see_its_neighbours(base):
    images = noise(64, 5)
    together = np.array(encode_images(base, images, 64))
    for i in range(5):
        np.testing.assert_allclose(together[i], np.array(encode_images(base, images[i : i + 1], 64))[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_embeddings_are_stored_once_and_resumed(base, store, ids, tmp_path, monkeypatch):
    wanted = np.array(encode_images(base, store.images[store.rows(ids)], 64)).astype(np.float16)
    whole = image_embeddings(base, store, "s", ids, 64, tmp_path / "whole", batch_size=1)
    np.testing.assert_allclose(whole, wanted, atol=2e-3)
    assert whole.dtype == np.float16
    assert not whole.flags.writeable
    calls = []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == 19:
            raise KeyboardInterrupt
        return encode_images(*arguments)

    monkeypatch.setattr(module, "encode_images", counting)
    image_embeddings(base, store, "s", ids, 64, tmp_path / "whole", batch_size=1)
    assert not calls, "computed again what was on the disk"
    with pytest.raises(KeyboardInterrupt):
        image_embeddings(base, store, "s", ids, 64, tmp_path / "stopped", batch_size=1)
    resumed = image_embeddings(base, store, "s", ids, 64, tmp_path / "stopped", batch_size=1)
    # 16 were on the disk, two more done and lost, the 19th stopped it; the five others are done now.
    assert len(calls) == 19 + 5
    np.testing.assert_array_equal(resumed, whole)


def test_another_base_store_size_or_list_has_embeddings_of_its_own(toy, base, store, ids, tmp_path):
    image_embeddings(base, store, "s", ids[:2], 64, tmp_path)
    image_embeddings(base, store, "other", ids[:2], 64, tmp_path)
    image_embeddings(base, store, "s", ids[1::-1], 64, tmp_path)
    image_embeddings(base, store, "s", ids[:2], 128, tmp_path)
    assert len(list(tmp_path.glob("film_embeddings_*.npy"))) == 4
    turned = image_embeddings(base, store, "s", ids[1::-1], 64, tmp_path)
    straight = np.array(image_embeddings(base, store, "s", ids[:2], 64, tmp_path))
    np.testing.assert_allclose(turned[::-1], straight, atol=1e-3)
    assert np.abs(straight[0] - straight[1]).max() > 0.05


def test_a_file_cut_short_is_made_again(base, store, ids, tmp_path):
    whole = np.array(image_embeddings(base, store, "s", ids, 64, tmp_path))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(image_embeddings(base, store, "s", ids, 64, tmp_path), whole)
    path.write_bytes(b"nothing")
    np.testing.assert_array_equal(image_embeddings(base, store, "s", ids, 64, tmp_path), whole)
    record = next(tmp_path.glob("*.json"))
    write_json(record, {**read_json(record), "header": {}})
    np.testing.assert_array_equal(image_embeddings(base, store, "s", ids, 64, tmp_path), whole)


def test_embeddings_too_large_for_float16_are_refused(toy, store, ids, tmp_path):
    base = opened(toy.base, vision=True)
    base.model.multi_modal_projector.linear_2.bias = mx.full((64,), 1e6)
    with pytest.raises(ImageEmbeddingError, match=f"film {ids[0]} or its neighbours is not finite in float16"):
        image_embeddings(base, store, "s", ids, 64, tmp_path)
    base.release_vision()
    assert "vision_tower" not in base.model
    base.release_vision()


def test_a_full_disk_is_an_error_before_the_first_image(base, store, ids, small_disk):
    """Writing into the map ended the process with SIGBUS."""
    disk = small_disk("20k")
    with pytest.raises(OSError, match=r"could not write .*film_embeddings_256_.*: No space left on device"):
        image_embeddings(base, store, "s", ids, 256, disk)
    assert list(disk.iterdir()) == []
