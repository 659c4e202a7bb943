"""What the tests of the pixel store build it from."""

import pytest
from few_images import image, manifest_of


@pytest.fixture
def root(tmp_path):
    """Twelve small images of random content in `images/`."""
    (tmp_path / "films").mkdir()
    for number in range(12):
        image(number).save(tmp_path / "films" / f"f{number:02d}.jpg", quality=95)
    return tmp_path


@pytest.fixture
def manifest():
    # Not in the order of the names, so that sorting somewhere would be noticed.
    return manifest_of([f"films/f{number:02d}.jpg" for number in (5, 0, 7, 1, 2, 11, 3, 4, 6, 8, 10, 9)])


@pytest.fixture
def store_path(root):
    return root / "work" / "images_32.npy"
