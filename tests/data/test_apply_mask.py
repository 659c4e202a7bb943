import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.masks import apply_mask


def grain(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return np.hypot(rows + 0.5 - y, columns + 0.5 - x) < radius


@pytest.mark.parametrize("mask", [np.zeros(4), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)])
def test_refuses_what_is_no_mask(mask):
    with pytest.raises(ValueError, match=r"expected a mask \(H, W\), got"):
        apply_mask(mask, Transform(8))


class TestThinFindings:
    @pytest.mark.parametrize("width", [1, 3, 8, 14])
    @pytest.mark.parametrize("offset", [0, 5, 9])
    def test_a_line_thinner_than_a_pixel_stays_whole(self, width, offset):
        # 20 px of the image make one of the result: half the area alone would lose or break it.
        mask = np.zeros((1000, 1000), bool)
        mask[100:900, 500 + offset : 500 + offset + width] = True
        result = apply_mask(mask, Transform(50))
        assert ndimage.label(result, np.ones((3, 3)))[1] == 1
        assert result[5:45].any(axis=1).all()
        assert not result[:5].any()
        assert not result[45:].any()
        assert result.sum(axis=1).max() <= 2

    def test_a_slanted_line_stays_whole(self):
        rows, columns = np.mgrid[:1200, :1000]
        mask = np.abs(columns - 200 - 0.43 * rows) < 3
        result = apply_mask(mask, Transform(60))
        assert ndimage.label(result, np.ones((3, 3)))[1] == 1
        assert result.any(axis=1).all()

    def test_a_line_beside_something_large_stays(self):
        # What a threshold relative to the whole mask's maximum would lose.
        mask = disc(1000, 1000, 700, 300, 150)
        mask[50:450, 700:703] = True
        result = apply_mask(mask, Transform(50))
        assert result[3:22, 35].all()

    def test_large_findings_follow_the_area(self):
        finding = disc(960, 960, 470, 500, 210)
        area = np.asarray(finding, float).reshape(64, 15, 64, 15).mean((1, 3))
        assert (apply_mask(finding, Transform(64)) == (area >= 0.5)).all()

    def test_the_pixel_that_a_box_filter_misses(self):
        # Row 112 of 300 ends on the border between rows 41 and 42 of 112; Pillow's BOX counts it to neither.
        mask = np.zeros((300, 200), bool)
        mask[112, 0] = True
        assert apply_mask(mask, Transform(112)).any()

    @pytest.mark.parametrize("fit", ["letterbox", "center_crop"])
    def test_uneven_sizes_follow_the_area(self, fit):
        # The area by brute force: each pixel of the image split into 7 x 7, each of the result made of 11 x 11 of them.
        finding = disc(77, 77, 40, 35, 25)
        fine = np.kron(finding, np.ones((7, 7)))
        area = fine.reshape(49, 11, 49, 11).mean((1, 3))
        assert ((area >= 0.5) == apply_mask(finding, Transform(49, fit))).all()

    @settings(max_examples=50, deadline=None)
    @given(
        row=st.integers(0, 299),
        column=st.integers(0, 199),
        size=st.integers(4, 400),
        fit=st.sampled_from(["letterbox", "center_crop"]),
    )
    def test_a_single_pixel_is_never_lost(self, row, column, size, fit):
        mask = np.zeros((300, 200), bool)
        mask[row, column] = True
        transform = Transform(size, fit)
        left, top, right, bottom = transform.shown(200, 300)
        seen = left <= column < right and top <= row < bottom
        assert apply_mask(mask, transform).any() == seen
