import json
from pathlib import Path

import numpy as np
import pytest
from chest_views import REAL2
from PIL import Image
from pydantic import ValidationError

from mlx_cxr.core.config_schema import BoxesConfig, DataConfig, MasksConfig
from mlx_cxr.data.decoding import Transform
from mlx_cxr.data.places import Places, decode_rle
from mlx_cxr.data.tables import DataError

NIH = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00013118_008.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,
00014716_007.png,Infiltrate,686.101694915254,131.543498111678,185.491525423729,313.492246197457,,,
00029817_009.png,Atelectasis,221.830508474576,317.053115068299,155.118644067797,216.949152542373,,,
"""
"""The first row is NIH's; the last is of an image that the cohort does not have."""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path


def place(root: Path, name: str, size: tuple[int, int] = (1024, 1024)) -> str:
    Image.new("L", size, 100).save(root / "images" / name)
    return f"images/{name}"


def boxes(root: Path, text: str, paths: list[str], **more) -> Places:
    (root / "boxes.csv").write_text(text)
    return Places.of(data(root, boxes=BoxesConfig(table=root / "boxes.csv", **more)), paths)


def data(root: Path, **more) -> DataConfig:
    return DataConfig(root=root, work_dir=root, **more)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, the latter two excluded."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(("size", "frame"), [((1024, 1024), None), ((512, 512), (1024, 1024))])
def test_boxes_of_nih_in_their_frame_on_images_as_they_were_and_made_smaller(root, size, frame):
    paths = [place(root, name, size) for name in ("00013118_008.png", "00014716_007.png")]
    places = boxes(root, NIH, paths, frame=frame)
    (label, mask), *none = places.masks(paths[0], Transform(1024)).items()
    assert (label, none) == ("Atelectasis", [])
    # By hand: 225.08 + 86.78 = 311.86, 547.02 + 79.19 = 626.21.
    assert extent(mask) == (225, 547, 312, 626)
    assert mask.sum() == 87 * 79
    small = places.masks(paths[0], Transform(256))["Atelectasis"]
    np.testing.assert_allclose(extent(small), np.array((225, 547, 312, 626)) / 4, atol=0.76)
    assert list(places.masks(paths[1], Transform(64))) == ["Lung Opacity"], "NIH's Infiltrate"
    assert places.elsewhere == 1
    assert places.plain() == {
        "truth": "boxes",
        "source": "boxes.csv",
        "left_out": {"unmapped": {}, "other_images": 1, "without_place": 0},
    }


def test_boxes_of_vindr_by_corners_of_several_readers_in_an_image_that_is_no_square(root):
    path = place(root, "0a1b.png", (200, 400))
    text = (
        "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
        "0a1b,Nodule/Mass,8,R1,10,100,50,140\n0a1b,Nodule/Mass,8,R2,30,120,70,160\n"
        "0a1b,Aortic enlargement,0,R1,1,1,9,9\n0a1b,Aortic enlargement,0,R2,1,1,9,9\n0a1b,No finding,14,R3,,,,\n"
    )
    places = boxes(root, text, [path])
    assert (places.unmapped, places.empty) == ({"Aortic enlargement": 2}, 1)
    assert "Aortic enlargement (2)" in places.words()
    masks = places.masks(path, Transform(400))
    assert list(masks) == ["Lung Lesion"]
    # Letterboxed: 100 px on each side.
    assert extent(masks["Lung Lesion"]) == (110, 100, 170, 160)
    assert masks["Lung Lesion"].sum() == 2 * 40 * 40 - 20 * 20
    mapped = boxes(root, text, [path], label_map={"AORTIC ENLARGEMENT": "Enlarged Cardiomediastinum"})
    assert list(mapped.masks(path, Transform(64))) == ["Enlarged Cardiomediastinum", "Lung Lesion"]
    assert list(mapped.masks(path, Transform(64), ["Lung Lesion"])) == ["Lung Lesion"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NIH.replace("547.01", "987.01"), r"boxes\.csv, row 2: the box from \(225.*outside.*1024 x 1024.*boxes\.frame"),
        (NIH.replace("225.08", "-25.08"), "row 2: .*lies outside"),
        (NIH.replace("86.77", "-86.77"), "row 2: .* is no box: it has no area"),
        (NIH.replace("79.18", "many"), "row 2: .*many.* are not four numbers"),
        (NIH.replace("Bbox [x", "left"), r"has the columns Image Index, .*left.*a table of boxes has Image.*VinDr"),
        (NIH.replace("Atelectasis", "Shadow").replace("Infiltrate", "Shade"), "no place.*00013118_008.*Shade, Shadow"),
        (NIH.replace("0001", "9991"), "no place of a finding on an image of the manifest"),
    ],
)  # fmt: skip
def test_boxes_that_cannot_be_used_name_the_row_and_the_way_out(root, text, words):
    paths = [place(root, name) for name in ("00013118_008.png", "00014716_007.png")]
    with pytest.raises(DataError, match=words):
        boxes(root, text, paths)


def test_boxes_of_a_larger_frame_are_refused_without_it_and_of_another_shape_always(root):
    path = place(root, "00014716_007.png", (512, 512))
    with pytest.raises(
        DataError, match="outside of the image's 512 x 512; if boxes were drawn on images of another size"
    ):
        boxes(root, NIH, [path])
    with pytest.raises(
        DataError, match=r"frame of 1024 x 900, but .*007\.png has 512 x 512 px, which is another shape"
    ):
        boxes(root, NIH, [path], frame=(1024, 900)).masks(path, Transform(64))


def test_a_name_of_two_images_is_refused_and_a_path_tells_them_apart(root):
    (root / "more").mkdir()
    paths = [place(root, "00013118_008.png"), "more/00013118_008.png"]
    with pytest.raises(DataError, match=r"row 2: '00013118_008\.png' is the name of several images; give their paths"):
        boxes(root, NIH, paths)
    assert boxes(root, NIH.replace("00013118", "images/00013118"), paths).elsewhere == 2


RLE = {"size": [300, 4], "counts": r"\9\9f9\OdF"}
"""By pycocotools 2: column 1 in full, rows 10 to 289 of column 3."""


def test_run_lengths_are_those_of_pycocotools():
    expected = np.zeros((300, 4), bool)
    expected[:, 1] = expected[10:290, 3] = True
    np.testing.assert_array_equal(decode_rle(RLE, ""), expected)
    np.testing.assert_array_equal(decode_rle({"size": [300, 4], "counts": [300, 300, 310, 280, 10]}, ""), expected)
    small = np.zeros((7, 5), bool)
    small[1:4, 1:4] = True
    np.testing.assert_array_equal(decode_rle({"size": [7, 5], "counts": "8340006"}, ""), small)
    # By pycocotools, 40 x 33 with specks: 249 pixels, whose places sum to 131299.
    noisy = "01`40d00mK090?0[N:i00000000UOF<0M:b0000KF\\O:i0000VOFf0:4000MFXO:j01IEB:=FD:e00DFJ:4FN:o0FhN05"
    mask = decode_rle({"size": [40, 33], "counts": noisy}, "")
    assert (mask.sum(), (mask * np.arange(1, 40 * 33 + 1).reshape(40, 33)).sum()) == (249, 131299)
    for broken in ({"size": [300, 5], "counts": RLE["counts"]}, {"size": [7, 5]}, {"size": [2, 2], "counts": [5, -1]}):
        with pytest.raises(DataError, match="here: no mask in COCO's run lengths"):
            decode_rle(broken, "here")


def test_masks_of_chexlocalize_by_patient_study_and_view(root):
    folder = root / "valid" / "patient64541" / "study1"
    folder.mkdir(parents=True)
    Image.new("L", (8, 600), 100).save(folder / "view1_frontal.jpg")
    path = "valid/patient64541/study1/view1_frontal.jpg"
    findings = {"Airspace Opacity": RLE, "Edema": {"size": [300, 4], "counts": [1200]}}
    (root / "gt.json").write_text(json.dumps({"patient64541_study1_view1_frontal": findings}))
    config = data(root, masks=MasksConfig(table=root / "gt.json"))
    masks = Places.of(config, [path]).masks(path, Transform(300))
    assert {label: mask.any() for label, mask in masks.items()} == {"Edema": False, "Lung Opacity": True}
    # 4 of 300 columns, in the middle: 148 to 151.
    assert extent(masks["Lung Opacity"]) == (149, 0, 152, 300)
    Image.new("L", (600, 8), 100).save(folder / "view1_frontal.jpg")
    with pytest.raises(DataError, match=r"frame of 4 x 300, but .*600 x 8 px"):
        Places.of(config, [path]).masks(path, Transform(300))
    (root / "gt.json").write_text("[1]")
    with pytest.raises(DataError, match="expected image -> finding -> run lengths"):
        Places.of(config, [path])


def test_mask_files_by_a_table_and_those_of_the_folder_without_one(root):
    path = place(root, "a.png", (60, 60))
    drawn = np.zeros((60, 60), np.uint8)
    drawn[:20] = 255
    Image.fromarray(drawn).save(root / "m.png")
    (root / "masks.csv").write_text(
        "image_file,cls,mask_file\nimages/a.png,Ground Glass Opacities,m.png\na,Left Lung,m.png\n"
    )
    places = Places.of(data(root, masks=MasksConfig(table=root / "masks.csv")), [path])
    assert (places.truth, places.unmapped) == ("masks", {"Left Lung": 1})
    assert places.masks(path, Transform(60))["Lung Opacity"].sum() == 20 * 60
    assert Places.of(data(root), [path]) is None
    (root / "masks" / "images" / "a").mkdir(parents=True)
    Image.fromarray(drawn).save(root / "masks" / "images" / "a" / "Edema.png")
    for synthetic, truth in ((True, "drawn"), (False, "masks")):
        folder = Places.of(data(root, synthetic=synthetic), [path])
        assert (folder.truth, list(folder.masks(path, Transform(60)))) == (truth, ["Edema"])
    with pytest.raises(ValidationError, match="two truths about the same maps"):
        data(root, masks=MasksConfig(table=root / "m"), boxes=BoxesConfig(table=root / "m"))


@pytest.mark.skipif(not REAL2.is_dir(), reason=f"no {REAL2} here; set MLX_CXR_REALCXR2")
def test_radiologists_masks_on_real_images():
    """Share of the image's pixels, by NumPy alone."""
    paths = sorted(f"paired/images/{path.name}" for path in (REAL2 / "paired" / "images").iterdir())
    config = DataConfig(root=REAL2, work_dir=REAL2, masks=MasksConfig(table=REAL2 / "masks.csv"))
    places = Places.of(config, paths)
    assert len(places.regions) == 31
    assert places.unmapped == {"Airways": 31, "Cardiomediastinum": 31, "Left Lung": 30, "Right Lung": 30}
    path = "paired/images/cohen_covid-19-pneumonia-2.jpg"
    file = REAL2 / "paired" / "masks" / "covid-19-pneumonia-2__Ground_Glass_Opacities__456.png"
    wanted = (np.asarray(Image.open(file).convert("L")) > 127).mean()
    with Image.open(REAL2 / path) as image:
        width, height = image.size
    shown = min(width, height) / max(width, height)
    got = places.masks(path, Transform(256))
    assert list(got) == ["Lung Opacity"]
    assert got["Lung Opacity"].mean() == pytest.approx(wanted * shown, abs=0.004)
