import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prepared_images import apply
from scipy import ndimage

from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.masks import apply_mask, has_masks, load_masks, mask_files, mask_folder
from mlx_cxr.data.tables import DataError

IMAGE = "files/p10/p10000032/s50414267/abc-1.jpg"


@pytest.fixture
def write(tmp_path):
    """Write an image, or a mask of it, under the data root."""

    def make(relative, array, **options):
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
        return path

    return make


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return np.hypot(rows + 0.5 - y, columns + 0.5 - x) < radius


class TestWhereMasksLie:
    @pytest.mark.parametrize(
        ("image", "folder"),
        [
            (IMAGE, "masks/p10/p10000032/s50414267/abc-1"),
            ("a/b/x.png", "masks/a/b/x"),
            ("x.v2.jpg", "masks/x.v2"),
            ("other/files/x.jpg", "masks/other/files/x"),
        ],
    )
    def test_folder(self, tmp_path, image, folder):
        assert mask_folder(tmp_path, image) == tmp_path / folder

    def test_none_at_all(self, tmp_path, write):
        write(IMAGE, np.zeros((40, 40)))
        assert not has_masks(tmp_path)
        assert load_masks(tmp_path, IMAGE, Transform(32)) == {}
        write("masks/p11/x/y/Edema.png", np.zeros((40, 40)))
        assert has_masks(tmp_path)
        assert load_masks(tmp_path, IMAGE, Transform(32)) == {}


class TestLoadMasks:
    @pytest.mark.parametrize("fit", ["letterbox", "center_crop"])
    def test_a_mask_lies_on_its_finding(self, tmp_path, write, fit):
        # The image shows nothing but the finding, so the mask has to be where the prepared image is bright.
        finding = disc(700, 500, 300, 260, 90)
        write(IMAGE, finding * 255, quality=95)
        write("masks/p10/p10000032/s50414267/abc-1/Pleural_Effusion.png", finding * 255)
        transform = Transform(64, fit)
        (label, mask), *others = load_masks(tmp_path, IMAGE, transform).items()
        assert (label, others) == ("Pleural Effusion", [])
        assert (mask.dtype, mask.shape) == (np.bool_, (64, 64))
        image = apply(np.asarray(Image.open(tmp_path / IMAGE)), transform)
        assert (mask == (image > 127)).mean() > 0.999
        assert mask.sum() == pytest.approx(finding.sum() * (64 / (700 if fit == "letterbox" else 500)) ** 2, rel=0.03)

    def test_labels_come_in_their_order_and_only_those_asked_for(self, tmp_path, write):
        write("a/x.png", np.eye(50) * 255)
        for name in ("Support_Devices", "Edema", "Lung_Opacity"):
            write(f"masks/a/x/{name}.png", np.ones((50, 50)) * 255)
        assert list(load_masks(tmp_path, "a/x.png", Transform(32))) == ["Edema", "Lung Opacity", "Support Devices"]
        some = load_masks(tmp_path, "a/x.png", Transform(32), ["Support Devices", "Fracture", "Edema"])
        assert list(some) == ["Edema", "Support Devices"]
        with pytest.raises(KeyError, match="Oedema"):
            load_masks(tmp_path, "a/x.png", Transform(32), ["Oedema"])

    def test_an_empty_mask_stays_empty(self, tmp_path, write):
        write("x.png", np.eye(50) * 255)
        write("masks/x/Edema.png", np.zeros((50, 50)))
        assert not load_masks(tmp_path, "x.png", Transform(32))["Edema"].any()

    def test_a_finding_outside_a_crop(self, tmp_path, write):
        finding = np.zeros((200, 100))
        finding[:20] = 255
        write("x.png", np.eye(200, 100) * 255)
        write("masks/x/Edema.png", finding)
        assert not load_masks(tmp_path, "x.png", Transform(32, "center_crop"))["Edema"].any()
        assert load_masks(tmp_path, "x.png", Transform(32))["Edema"].any()

    def test_a_mask_of_another_size_names_both(self, tmp_path, write):
        image = write("x.png", np.eye(50) * 255)
        mask = write("masks/x/Edema.png", np.zeros((50, 51)))
        with pytest.raises(DataError, match=r"51 x 50 px.*50 x 50") as caught:
            load_masks(tmp_path, "x.png", Transform(32))
        assert str(image) in str(caught.value)
        assert str(mask) in str(caught.value)

    def test_the_size_is_that_of_the_upright_image(self, tmp_path, write):
        exif = Image.Exif()
        exif[274] = 6
        write("x.jpg", np.eye(60, 90) * 255, exif=exif)
        write("masks/x/Edema.png", np.ones((90, 60)) * 255)
        assert load_masks(tmp_path, "x.jpg", Transform(30))["Edema"].sum() == 30 * 20

    def test_what_macos_puts_beside_a_mask_is_none(self, tmp_path, write):
        write("x.png", np.eye(50) * 255)
        mask = write("masks/x/Edema.png", np.ones((50, 50)) * 255)
        mask.with_name("._Edema.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        assert {label: found.sum() for label, found in load_masks(tmp_path, "x.png", Transform(30)).items()} == {
            "Edema": 30 * 30
        }
        assert mask_files(mask.parent) == [mask]

    def test_a_name_of_no_finding(self, tmp_path, write):
        write("x.png", np.eye(50) * 255)
        write("masks/x/Effusion.png", np.zeros((50, 50)))
        with pytest.raises(DataError, match=r"Effusion\.png: no finding has that name.*Pleural_Effusion"):
            load_masks(tmp_path, "x.png", Transform(32))

    def test_damaged_files(self, tmp_path, write):
        image = write("x.png", np.eye(50) * 255)
        mask = write("masks/x/Edema.png", np.eye(50) * 255)
        mask.write_bytes(mask.read_bytes()[:60])
        with pytest.raises(DataError, match=r"Edema\.png cannot be read"):
            load_masks(tmp_path, "x.png", Transform(32))
        image.unlink()
        with pytest.raises(DataError, match=r"x\.png, whose masks are asked for"):
            load_masks(tmp_path, "x.png", Transform(32))


@pytest.mark.parametrize("mask", [np.zeros(4), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)])
def test_apply_mask_refuses_what_is_no_mask(mask):
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
