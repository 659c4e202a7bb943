"""Images in batches: the same from memory and from disk, in the order asked for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_cxr.training.batches import ImageSource, epoch_order

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 6)).astype(np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "images.npy"
    np.save(path, IMAGES)
    return np.load(path, mmap_mode="r", allow_pickle=False)


@pytest.mark.parametrize(
    "rows",
    [[0, 1, 2], [19, 0, 7, 3], [5, 5, 2, 5], [4], list(range(19, -1, -1))],
    ids=lambda rows: f"{len(rows)}-{rows[0]}",
)
def test_memory_and_disk_give_the_same_batches(store, rows):
    resident, streamed = ImageSource(store, np.array(rows), 1.0), ImageSource(store, np.array(rows), 0.0)
    assert resident.resident
    assert not streamed.resident
    assert len(resident) == len(streamed) == len(rows)
    items = np.random.default_rng(1).permutation(len(rows))
    order = np.array_split(items, min(3, len(rows)))
    for source in (resident, streamed):
        batches = list(source.batches(order))
        assert len(batches) == len(order)
        for wanted, got in zip(order, batches, strict=True):
            assert got.dtype == mx.uint8
            np.testing.assert_array_equal(np.array(got), IMAGES[np.array(rows)[wanted]])
            np.testing.assert_array_equal(np.array(source.batch(wanted)), np.array(got))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=30), st.data())
def test_any_rows_in_any_order(rows, data):
    items = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=10)))
    for budget in (1.0, 0.0):
        source = ImageSource(IMAGES, np.array(rows), budget)
        np.testing.assert_array_equal(np.array(source.batch(items)), IMAGES[np.array(rows)[items]])


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_some_items_of_a_source_as_often_as_they_are_named(budget):
    rows = np.array([19, 3, 8, 0, 11])
    taken = ImageSource(IMAGES, rows, budget).taken(np.array([4, 0, 4, 2]))
    assert (len(taken), taken.resident) == (4, budget > 0)
    np.testing.assert_array_equal(np.array(taken.batch(np.arange(4))), IMAGES[[11, 19, 11, 8]])
    np.testing.assert_array_equal(np.array(taken.taken(np.array([3, 1])).batch(np.arange(2))), IMAGES[[8, 19]])


def test_images_reach_the_device_piece_by_piece(monkeypatch):
    monkeypatch.setattr("mlx_cxr.training.batches._PIECE", 3)
    rows = np.array([19, 3, 3, 8, 0, 11, 5, 2])
    np.testing.assert_array_equal(np.array(ImageSource(IMAGES, rows, 1.0).batch(np.arange(8))), IMAGES[rows])
    large = np.zeros((2000, 64, 64), dtype=np.uint8)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    source = ImageSource(large, np.arange(2000), 1.0)
    assert source.resident
    assert mx.get_peak_memory() - before < 1.3 * large.nbytes


def test_budget_counts_the_rows_of_this_source(store):
    bytes_of_three = 3 * 36
    assert ImageSource(store, np.arange(3), bytes_of_three / 1e9).resident
    assert not ImageSource(store, np.arange(4), bytes_of_three / 1e9).resident


def test_a_reader_that_stops_early_ends_cleanly(store):
    source = ImageSource(store, np.arange(20), 0.0)
    batches = source.batches(np.arange(20).reshape(10, 2))
    np.testing.assert_array_equal(np.array(next(batches)), IMAGES[:2])
    batches.close()
    assert list(source.batches([])) == []


def test_a_failed_read_is_raised_not_lost(store):
    source = ImageSource(store, np.array([0, 99]), 0.0)
    with pytest.raises(IndexError):
        list(source.batches([np.array([0]), np.array([1])]))


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[0]], ids=["float", "one film"])
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, S, S\)"):
        ImageSource(images, np.arange(2), 1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_without_its_tail(items, batch_size, seed, epoch):
    order = epoch_order(items, batch_size, seed, epoch)
    size = min(batch_size, items)
    assert order.shape == (items // size, size)
    flat = order.ravel()
    assert len(set(flat.tolist())) == flat.size
    assert flat.min() >= 0
    assert flat.max() < items
    assert items - flat.size < size
    np.testing.assert_array_equal(order, epoch_order(items, batch_size, seed, epoch))


def test_epochs_and_seeds_differ():
    base = epoch_order(100, 10, 0, 0)
    assert not np.array_equal(base, epoch_order(100, 10, 0, 1))
    assert not np.array_equal(base, epoch_order(100, 10, 1, 0))
    # (seed, epoch) and (epoch, seed) are not the same draw, as a sum of the two would be.
    assert not np.array_equal(epoch_order(100, 10, 1, 2), epoch_order(100, 10, 2, 1))


def test_no_image_is_left_out_for_good():
    seen = {int(i) for epoch in range(12) for i in epoch_order(23, 10, 0, epoch).ravel()}
    assert seen == set(range(23))
