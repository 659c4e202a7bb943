"""Several arrays read as one: every way of asking gives what the array of them all gives."""

import numpy as np
import pytest

from mlx_cxr.data.pixel_store import ShardedImages
from mlx_cxr.training.batches import ImageSource

WHOLE = np.random.default_rng(0).integers(0, 256, (23, 4, 4), dtype=np.uint8)


@pytest.fixture
def images():
    return ShardedImages([WHOLE[:10], WHOLE[10:11], WHOLE[11:]])


def test_it_has_the_form_of_the_whole(images):
    assert (images.shape, images.dtype, images.ndim, images.nbytes) == (WHOLE.shape, WHOLE.dtype, 3, WHOLE.nbytes)
    assert len(images) == 23
    assert (np.stack(list(images)) == WHOLE).all()


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
def test_rows_are_those_of_the_whole(images, rows):
    given = images[rows]
    assert given.dtype == np.uint8
    assert given.shape == WHOLE[rows].shape
    assert (given == WHOLE[rows]).all()


@pytest.mark.parametrize("rows", [23, -24, [0, 23], np.array([-24])], ids=str)
def test_a_row_that_is_not_there(images, rows):
    with pytest.raises(IndexError, match="of 23"):
        images[rows]


@pytest.mark.parametrize(
    "rows", [(0, 1), (0, np.array([1, 2])), np.ones(23, bool), [[0, 1]], [0.5], "0", None], ids=str
)
def test_other_ways_of_asking_are_refused(images, rows):
    with pytest.raises(IndexError, match="by number or slice"):
        images[rows]


def test_forms_that_differ_are_refused():
    with pytest.raises(ValueError, match="expected one form"):
        ShardedImages([WHOLE, WHOLE[:, :3]])
    with pytest.raises(ValueError, match="expected one form"):
        ShardedImages([])


@pytest.mark.parametrize("budget_gb", [0.0, 1.0])
def test_images_are_served_to_training(images, budget_gb):
    rows = np.array([22, 3, 10, 9, 11, 0])
    items = np.array([4, 0, 5])
    source = ImageSource(images, rows, budget_gb)
    assert source.resident is bool(budget_gb)
    assert (np.array(source.batch(items)) == WHOLE[rows[items]]).all()
