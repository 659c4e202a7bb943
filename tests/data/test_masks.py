import numpy as np
import pytest
from PIL import Image
from prepared_images import apply

from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.masks import has_masks, load_masks, mask_folder
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
