import io
import logging
import os
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from dicom_files import dicom_bytes
from mutated_files import mutations, whole_files
from odd_images import gray_png, jpeg_of_scans, tiff
from PIL import Image, ImageOps
from prepared_images import apply, read_image
from scipy import ndimage

from mlx_cxr.data import decoding
from mlx_cxr.data.decoding import INVERTED, ImageContent, ImageError, Transform, decode_bytes, looks_inverted
from mlx_cxr.data.dicom import read_dicom

REAL = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[3] / "shared" / "realcxr")) / "images"


@pytest.fixture
def picture():
    """Something with a chest's coarse contrast: uint8 (H, W)."""

    def make(height, width, noise=0.0, seed=0):
        chest = Image.fromarray(((np.reshape(decoding.CHEST, (8, 8)) + 10) * 12).astype(np.uint8))
        smooth = np.asarray(chest.resize((width, height), Image.Resampling.BICUBIC), np.float32) + 10
        grain = np.random.default_rng(seed).standard_normal((height, width), dtype=np.float32)
        return np.clip(smooth + noise * grain, 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def saved(tmp_path):
    def save(image, name, **options):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def decode(path, transform):
    """uint8 (S, S) and notes."""
    radiograph = decoding.decode(path, transform)
    return Decoded(np.asarray(radiograph.gray), radiograph.notes)


class Decoded(NamedTuple):
    pixels: np.ndarray
    notes: tuple[str, ...]


def real_images(step):
    found = sorted(REAL.glob("*.jpg"))[::step] if REAL.is_dir() else []
    if not found:
        pytest.skip(f"no real films in {REAL}")
    return found


class TestGeometry:
    @pytest.mark.parametrize(
        ("width", "height", "placed"),
        [
            (300, 200, (0, 16, 100, 67)),
            (200, 300, (16, 0, 67, 100)),
            (50, 50, (0, 0, 100, 100)),
            (9000, 32, (0, 49, 100, 1)),
        ],
    )
    def test_letterbox_keeps_the_aspect_ratio_and_centres(self, width, height, placed):
        assert Transform(100).placed(width, height) == placed
        assert Transform(100).shown(width, height) == (0, 0, width, height)

    def test_center_crop_shows_the_central_square(self):
        crop = Transform(100, "center_crop")
        assert crop.shown(301, 200) == (50.5, 0, 250.5, 200)
        assert crop.shown(200, 400) == (0, 100, 200, 300)
        assert crop.placed(301, 200) == (0, 0, 100, 100)

    @pytest.mark.parametrize("name", ["film.png", "film.jpg"])
    @pytest.mark.parametrize("fit", ["letterbox", "center_crop"])
    def test_a_disc_lands_where_the_geometry_says(self, saved, name, fit):
        # Odd sizes, which a reduced JPEG does not divide; the disc's place is known in closed form.
        width, height, x, y = 1211, 1403, 500.5, 800.5
        rows, columns = np.mgrid[:height, :width]
        disc = (np.hypot(rows + 0.5 - y, columns + 0.5 - x) < 200).astype(np.uint8) * 200
        transform = Transform(64, fit)
        result = read_image(saved(disc, name), transform).astype(float)
        left, top, right, bottom = transform.shown(width, height)
        at_left, at_top, across, down = transform.placed(width, height)
        found_y, found_x = ndimage.center_of_mass(np.where(result > 20, result, 0))
        assert found_x + 0.5 == pytest.approx(at_left + (x - left) * across / (right - left), abs=0.05)
        assert found_y + 0.5 == pytest.approx(at_top + (y - top) * down / (bottom - top), abs=0.05)

    def test_letterbox_pads_with_black(self, picture):
        square = apply(picture(300, 150) // 2 + 100, Transform(64))
        assert (square[:, :16] == 0).all()
        assert (square[:, 48:] == 0).all()
        assert square[:, 16:48].min() >= 95

    def test_plain_and_key_tell_transforms_apart(self):
        assert Transform(224).plain() == {"version": 1, "size": 224, "fit": "letterbox"}  # as in every store of MIMIC's
        assert Transform(224).key() == "letterbox-224-v1"
        assert Transform(224, recipe="window").key() == "letterbox-224-v1-window"
        kinds = (Transform(224), Transform(224, "center_crop"), Transform(96), Transform(224, recipe="window"))
        assert len({str(kind.plain()) for kind in kinds}) == len({kind.key() for kind in kinds}) == 4

    def test_a_dicom_is_decoded_again_for_another_recipe(self, picture):
        data = dicom_bytes(picture(90, 70), bits=12)
        image = ImageContent(data)
        for recipe in ("mimic", "window", "mimic"):
            expected = read_dicom(data, recipe).gray.resize((50, 64), Image.Resampling.BICUBIC)
            found = image.decode(Transform(64, recipe=recipe)).gray.crop((7, 0, 57, 64))
            np.testing.assert_array_equal(found, expected)


class TestReducedDecoding:
    @pytest.mark.parametrize(
        ("size", "width", "height", "letterbox", "crop"),
        [
            (224, 2500, 3000, 4, 4),
            (96, 2500, 3000, 8, 8),
            (512, 2500, 3000, 2, 2),
            (224, 400, 400, 1, 1),
            (224, 800, 1800, 4, 1),
        ],
    )
    def test_keeps_twice_the_pixels(self, size, width, height, letterbox, crop):
        assert Transform(size).reduction(width, height) == letterbox
        assert Transform(size, "center_crop").reduction(width, height) == crop

    @pytest.mark.parametrize("fit", ["letterbox", "center_crop"])
    def test_loses_nothing_that_matters_on_a_grainy_image(self, saved, picture, fit):
        # Measured: mean 0.15 and at most 3 gray levels on real images enlarged to 2500 x 3000, at 224 px.
        radiograph = saved(picture(1500, 1250, noise=8), "film.jpg", quality=95)
        transform = Transform(112, fit)
        assert transform.reduction(1250, 1500) >= 4
        full = apply(np.asarray(Image.open(radiograph)), transform)
        difference = np.abs(read_image(radiograph, transform).astype(int) - full)
        assert difference.mean() < 0.5
        assert difference.max() <= 5

    def test_loses_nothing_that_matters_on_real_images(self):
        transform = Transform(64)
        means = []
        for radiograph in real_images(30):
            image = Image.open(radiograph).convert("L")
            assert transform.reduction(*image.size) == 4
            difference = read_image(radiograph, transform).astype(int) - apply(np.asarray(image), transform)
            means.append(np.abs(difference).mean())
        assert np.mean(means) < 0.5
        assert max(means) < 1

    def test_colour_jpeg_gives_its_luma(self, saved, picture):
        gray = picture(400, 400)
        image = Image.merge("RGB", [Image.fromarray(c) for c in (gray, gray // 2, 255 - gray)])
        radiograph = saved(image, "colour.jpg", quality=95)
        expected = apply(np.asarray(Image.open(radiograph).convert("L")), Transform(64))
        result = decode(radiograph, Transform(64))
        assert np.abs(result.pixels.astype(int) - expected).mean() < 0.5
        assert "RGB" in result.notes

    @pytest.mark.parametrize("options", [{"progressive": True}, {"format": "MPO", "save_all": True}])
    def test_other_kinds_of_jpeg(self, saved, picture, options):
        gray = picture(600, 500, noise=5)
        more = {"append_images": [Image.fromarray(255 - gray)]} if "save_all" in options else {}
        result = decode(saved(gray, "film.jpg", quality=95, **options, **more), Transform(64))
        assert np.abs(result.pixels.astype(int) - apply(gray, Transform(64))).mean() < 1
        assert bool(result.notes) == bool(more)


class TestWork:
    """Small files that would keep a decoder busy for minutes."""

    @staticmethod
    def seconds(data, message=None):
        begun = time.perf_counter()
        if message is None:
            notes = decode_bytes(data, Transform(64)).notes
        else:
            with pytest.raises(ImageError, match=message):
                decode_bytes(data, Transform(64))
            notes = ()
        return time.perf_counter() - begun, notes

    @pytest.mark.parametrize(("scans", "side"), [(3000, 2000), (100, 8000)])
    def test_a_jpeg_of_very_many_scans(self, scans, side):
        took, _ = self.seconds(jpeg_of_scans(scans, side), rf"a JPEG of {scans // 1000 or ''},?\d+ scans")
        assert took < 2

    def test_progressive_jpegs_are_read(self, picture):
        """Of gray and colour; and the file of the test above with twenty scans more than usual."""
        for mode, data in (("L", picture(900, 800)), ("RGB", np.dstack([picture(900, 800)] * 3))):
            plain, progressive = io.BytesIO(), io.BytesIO()
            Image.fromarray(data, mode).save(plain, "JPEG")
            Image.fromarray(data, mode).save(progressive, "JPEG", progressive=True)
            expected = np.asarray(decode_bytes(plain.getvalue(), Transform(64)).gray)
            np.testing.assert_array_equal(decode_bytes(progressive.getvalue(), Transform(64)).gray, expected)
        few, more = (decode_bytes(jpeg_of_scans(n, 1000), Transform(64)).gray for n in (0, 20))
        assert np.abs(np.asarray(few, int) - more).max() <= 1

    def test_a_tiff_whose_strips_cover_it_many_times(self):
        values = (np.arange(2000 * 2000) % 251).astype(np.uint8).reshape(2000, 2000)
        strips = {278: [1999], 273: [8] * 50_000, 279: [values.size] * 50_000}
        took, _ = self.seconds(tiff(values, tags=strips), "strips cover its pixels many times over; save it as PNG")
        assert took < 2

    def test_a_tiff_of_very_many_images(self):
        values = (np.arange(64 * 64) % 251).astype(np.uint8).reshape(64, 64)
        took, notes = self.seconds(tiff(values, directories=20_000))
        assert "several images in the file, the first is used" in notes
        assert took < 2

    def test_strips_and_separate_colours_are_read(self):
        values = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        expected = np.asarray(decode_bytes(tiff(values), Transform(64)).gray)
        rows = {278: [1], 273: [8 + 192 * n for n in range(64)], 279: [192] * 64}
        for data in (tiff(values, tags=rows), tiff(values, planar=True)):
            np.testing.assert_array_equal(decode_bytes(data, Transform(64)).gray, expected)


class TestGrayLevels:
    def test_8_bit_is_taken_as_it_is(self, saved):
        radiograph = np.full((64, 64), 90, np.uint8)
        radiograph[:, 32:] = 130
        result = decode(saved(radiograph, "film.png"), Transform(64))
        assert (result.pixels == radiograph).all()
        assert not set(result.notes) - {INVERTED}

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bit_is_scaled_over_its_own_range(self, saved, suffix):
        # A 12-bit ramp in 16 bits; taking the high byte, as a plain conversion does, would leave 0..15.
        values = np.linspace(100, 4000, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        expected = ((values.astype(float) - 100) / 3900 * 255 + 1e-9).astype(np.uint8)
        result = decode(saved(values, f"film.{suffix}"), Transform(64))
        assert (result.pixels == expected).all()
        assert result.pixels.min() == 0
        assert result.pixels.max() == 255
        assert "16-bit" in result.notes

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    @pytest.mark.parametrize("channels", [3, 4])
    @pytest.mark.parametrize(("low", "high"), [(100, 4000), (0, 65535), (30_000, 30_255)])
    def test_16_bit_colour_is_read_whole(self, tmp_path, saved, suffix, channels, low, high):
        """The same image as gray PNG gives the same pixels; its high bytes alone would be 16, 256 or 2 levels."""
        values = np.linspace(low, high, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        expected = decode(saved(values, "gray.png"), Transform(64)).pixels
        stack = np.dstack([values] * 3 + [np.full_like(values, 65535)] * (channels - 3))
        assert cv2.imwrite(str(tmp_path / f"film.{suffix}"), stack)
        result = decode(tmp_path / f"film.{suffix}", Transform(64))
        np.testing.assert_array_equal(result.pixels, expected)
        assert any(note.startswith("16-bit") for note in result.notes)

    def test_16_bit_colours_become_luma_and_what_is_transparent_black(self, tmp_path):
        rng = np.random.default_rng(0)
        blue, green, red = (rng.integers(0, 65536, (64, 64)).astype(np.uint16) for _ in range(3))
        alpha = np.full((64, 64), 65535, np.uint16)
        alpha[:, 32:] = 0
        assert cv2.imwrite(str(tmp_path / "film.png"), np.dstack([blue, green, red, alpha]))
        luma = (red * 0.299 + green * 0.587 + blue * 0.114) * (alpha / 65535)
        expected = (luma - luma.min()) / (luma.max() - luma.min()) * 255
        result = decode(tmp_path / "film.png", Transform(64)).pixels
        assert np.abs(result - expected).max() < 1.01
        assert (result[:, 32:] == 0).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_16_bit_colour_is_turned_as_8_bit_is(self, saved, tmp_path, orientation):
        exif = Image.Exif()
        exif[decoding.EXIF_ORIENTATION] = orientation
        values = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
        values[:16] //= 3
        expected = decode(saved(np.dstack([values] * 3), "eight.png", exif=exif), Transform(64)).pixels
        deep = np.dstack([values.astype(np.uint16) * 257] * 3)
        data = cv2.imencode(".png", deep)[1].tobytes()
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        inserted = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        (tmp_path / "sixteen.png").write_bytes(data[:33] + inserted + data[33:])
        result = decode(tmp_path / "sixteen.png", Transform(64)).pixels
        assert np.abs(result.astype(int) - expected).max() <= 1

    def test_a_tiff_of_signed_bytes(self, saved):
        values = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
        expected = decode(saved(values, "plain.tif"), Transform(64)).pixels
        signed = saved(values ^ 0x80, "signed.tif", tiffinfo={339: 2})
        result = decode(signed, Transform(64))
        np.testing.assert_array_equal(result.pixels, expected)
        assert "8-bit signed" in result.notes

    @pytest.mark.parametrize("depth", [2, 4, 8, 16])
    def test_what_is_transparent_in_a_gray_png_is_black(self, saved, tmp_path, depth):
        """Of each depth, as the same PNG with the value 0 in its place."""
        top = 2**depth - 1
        values = np.random.default_rng(depth).integers(0, top + 1, (64, 64)).astype(np.uint16)
        values[:, 32:] = clear = top * 2 // 3
        plain = np.where(values == clear, 0, values)
        (tmp_path / "clear.png").write_bytes(gray_png(values, depth, clear))
        (tmp_path / "plain.png").write_bytes(gray_png(plain, depth))
        expected = decode(tmp_path / "plain.png", Transform(64)).pixels
        np.testing.assert_array_equal(decode(tmp_path / "clear.png", Transform(64)).pixels, expected)
        assert (expected[:, 32:] == 0).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("channels", [3, 4])
    def test_16_bit_colours_of_a_tiff_are_turned_as_its_gray_is(self, tmp_path, orientation, channels):
        values = np.random.default_rng(0).integers(100, 4000, (48, 64)).astype(np.uint16)
        alpha = {338: [2]} if channels == 4 else {}
        stack = np.dstack([values] * 3 + [np.full_like(values, 65535)] * (channels - 3))
        (tmp_path / "gray.tif").write_bytes(tiff(values, tags={274: [orientation]}))
        (tmp_path / "colour.tif").write_bytes(tiff(stack, tags={274: [orientation], **alpha}))
        expected = decode(tmp_path / "gray.tif", Transform(64)).pixels
        np.testing.assert_array_equal(decode(tmp_path / "colour.tif", Transform(64)).pixels, expected)

    def test_a_fourth_sample_that_is_no_transparency_is_left_out(self, tmp_path):
        values = np.random.default_rng(0).integers(100, 4000, (64, 64)).astype(np.uint16)
        stack = np.dstack([values] * 3 + [values[::-1]])
        (tmp_path / "gray.tif").write_bytes(tiff(values))
        (tmp_path / "colour.tif").write_bytes(tiff(stack, tags={338: [0]}))
        expected = decode(tmp_path / "gray.tif", Transform(64)).pixels
        np.testing.assert_array_equal(decode(tmp_path / "colour.tif", Transform(64)).pixels, expected)

    def test_colours_that_lie_apart_are_read_right_or_refused(self, saved, tmp_path):
        """OpenCV 5.0 reads those of 16 bits as if they lay together."""
        values = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
        (tmp_path / "eight.tif").write_bytes(tiff(np.dstack([values] * 3), planar=True))
        expected = decode(saved(values, "gray.png"), Transform(64)).pixels
        np.testing.assert_array_equal(decode(tmp_path / "eight.tif", Transform(64)).pixels, expected)
        (tmp_path / "deep.tif").write_bytes(tiff(np.dstack([values.astype(np.uint16) * 16] * 3), planar=True))
        with pytest.raises(ImageError, match="in a form that is not read whole here; save it as gray PNG"):
            decode(tmp_path / "deep.tif", Transform(64))

    @pytest.mark.parametrize(
        ("dtype", "low", "high", "note"),
        [
            (np.uint32, 0, 2**32 - 1, "32-bit"),
            (np.uint32, 2**31 - 5000, 2**31 + 5000, "32-bit"),
            (np.int32, -(2**31), 2**31 - 1, "32-bit"),
            (np.int16, -2000, 2000, "16-bit"),
            (np.uint16, 100, 4000, "16-bit"),
        ],
    )
    def test_integers_of_a_tiff_do_not_wrap(self, tmp_path, dtype, low, high, note):
        values = np.linspace(low, high, 64 * 64).round().astype(dtype).reshape(64, 64)
        (tmp_path / "film.tif").write_bytes(tiff(values))
        result = decode(tmp_path / "film.tif", Transform(64))
        wide = values.astype(object)
        expected = ((wide - low) * 255 // (high - low)).astype(np.uint8)
        np.testing.assert_array_equal(result.pixels, expected)
        assert note in result.notes

    @pytest.mark.parametrize(("dtype", "note"), [(np.int32, "32-bit"), (np.float32, "floating point")])
    def test_32_bit_tiff(self, saved, dtype, note):
        values = np.linspace(-1000, 70000, 64 * 64).astype(dtype).reshape(64, 64)
        expected = np.floor((values.astype(float) + 1000) * 255 / 71000)
        result = decode(saved(values, "film.tif"), Transform(64))
        assert np.abs(result.pixels - expected).max() == 0
        assert note in result.notes

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_a_tiff_whose_white_is_0_is_inverted(self, saved, dtype):
        values = np.linspace(0, np.iinfo(dtype).max, 64 * 64).astype(dtype).reshape(64, 64)
        plain = decode(saved(values, "black.tif"), Transform(64)).pixels
        white = saved(values, "white.tif")
        content = white.read_bytes()
        entry = struct.pack("<HHI", 262, 3, 1)
        at = content.index(entry) + len(entry)
        white.write_bytes(content[:at] + struct.pack("<HH", 0, 0) + content[at + 4 :])
        result = decode(white, Transform(64)).pixels
        assert np.abs(result.astype(int) - (255 - plain.astype(int))).max() <= 1

    def test_palette_is_looked_up(self, saved):
        # Indices run against the gray levels that they stand for.
        indices = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
        image = Image.fromarray(indices).convert("P")
        image.putpalette([255 - 4 * (i // 3) if i < 192 else 0 for i in range(768)])
        result = decode(saved(image, "film.png"), Transform(64))
        assert (result.pixels == 255 - 4 * indices).all()
        assert "palette" in result.notes

    def test_cmyk_jpeg(self, saved, picture):
        gray = picture(256, 256)
        radiograph = saved(Image.fromarray(gray).convert("RGB").convert("CMYK"), "film.jpg", quality=95)
        result = decode(radiograph, Transform(64))
        assert np.abs(result.pixels.astype(int) - apply(gray, Transform(64))).mean() < 1.5
        assert "CMYK" in result.notes

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_transparent_parts_are_black(self, saved, picture, mode):
        gray = picture(64, 64)
        alpha = np.full((64, 64), 255, np.uint8)
        alpha[:8] = 0
        image = Image.fromarray(gray).convert(mode)
        image.putalpha(Image.fromarray(alpha))
        result = decode(saved(image, "film.png"), Transform(64))
        assert (result.pixels[:8] == 0).all()
        assert (result.pixels[8:] == gray[8:]).all()
        assert mode in result.notes

    def test_black_and_white(self, saved):
        bits = np.zeros((64, 64), np.uint8)
        bits[20:] = 255
        result = decode(saved(Image.fromarray(bits).convert("1"), "film.png"), Transform(64))
        assert (result.pixels == bits).all()
        assert "black and white" in result.notes

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("name", ["film.jpg", "film.png", "film.tif"])
    def test_exif_orientation_is_applied(self, saved, picture, orientation, name):
        upright = Image.fromarray(picture(300, 200))
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[274] = orientation
        result = read_image(saved(stored, name, exif=exif), Transform(64)).astype(int)
        assert np.abs(result - apply(np.asarray(upright), Transform(64))).mean() < 1


def png_with_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(radiograph):
    out = io.BytesIO()
    Image.fromarray(radiograph).save(out, "JPEG", quality=95)
    return out.getvalue()


class TestImagesThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", r"empty \(0 bytes\)"),
            (b"no image at all", "a text file, not an image"),
            (b"\0" * 128 + b"DICM" + b"\0" * 50, "a DICOM file without pixels"),
            (b"\n<!DOCTYPE html><html>log in</html>", "a web page"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document"),
            (b"BM no more", "a text file, not an image"),
            (b"BM\x36\x30\0\0\0\0\0\0\x36\4\0\0\x28\0", "damaged"),
            # By their headers alone: there are no pixels in these.
            (png_with_header(20_000, 20_000), "more than 80,000,000 pixels by its header"),
            (png_with_header(20_000, 2_000), "20000 x 2000 px by its header; more than 12,000 px long"),
            (png_with_header(9_000, 8_900), "9000 x 8900 px by its header; more than"),
            (png_with_header(13_000, 100), "more than 12,000 px long"),
            (png_with_header(1, 1), "1 x 1 px; shorter than 32 px"),
            (png_with_header(31, 900), "31 x 900 px; shorter"),
            (png_with_header(64, 64), "damaged or cut short"),
        ],
    )
    def test_the_reason_is_given(self, tmp_path, content, reason):
        (tmp_path / "film.jpg").write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            decode(tmp_path / "film.jpg", Transform(64))

    @pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
    def test_a_cut_jpeg(self, tmp_path, picture, keep):
        content = jpeg(picture(500, 500, noise=10))
        (tmp_path / "film.jpg").write_bytes(content[: int(keep * len(content))])
        with pytest.raises(ImageError, match=r"cut short|damaged"):
            decode(tmp_path / "film.jpg", Transform(64))

    def test_a_jpeg_with_a_tail_of_zeros(self, tmp_path, picture):
        # What a stopped download leaves where the file was allocated ahead; Pillow decodes it, in part gray.
        content = jpeg(picture(500, 500, noise=10))
        half = len(content) // 2
        (tmp_path / "film.jpg").write_bytes(content[:half] + bytes(half))
        with pytest.raises(ImageError, match="cut short"):
            decode(tmp_path / "film.jpg", Transform(64))

    def test_a_few_bytes_after_the_jpeg_do_no_harm(self, tmp_path, picture):
        radiograph = picture(200, 200)
        (tmp_path / "film.jpg").write_bytes(jpeg(radiograph) + b"\n\0\0")
        assert decode(tmp_path / "film.jpg", Transform(64)).pixels.max() > 100

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_cut_files_of_other_formats(self, saved, picture, suffix):
        radiograph = saved(picture(300, 300, noise=10), f"film.{suffix}")
        radiograph.write_bytes(radiograph.read_bytes()[:-20_000])
        with pytest.raises(ImageError, match=r"damaged"):
            decode(radiograph, Transform(64))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_a_blank_image(self, saved, dtype):
        with pytest.raises(ImageError, match=r"blank: every pixel is .*77"):
            decode(saved(np.full((100, 100), 77, dtype), "film.png"), Transform(64))

    def test_a_blank_jpeg_with_its_noise(self, saved):
        grain = np.random.default_rng(0).integers(127, 129, (256, 256)).astype(np.uint8)
        with pytest.raises(ImageError, match="blank"):
            decode(saved(grain, "film.jpg"), Transform(64))

    def test_not_a_number(self, saved):
        values = np.full((64, 64), 0.5, np.float32)
        values[3, 4] = np.nan
        with pytest.raises(ImageError, match="NaN"):
            decode(saved(values, "film.tif"), Transform(64))

    def test_no_file_and_a_folder(self, tmp_path):
        with pytest.raises(ImageError, match="no such file"):
            decode(tmp_path / "none.jpg", Transform(64))
        with pytest.raises(ImageError, match="a folder, not a file"):
            decode(tmp_path, Transform(64))

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "film.jpg")
        with pytest.raises(ImageError, match="no ordinary file"):
            decode(tmp_path / "film.jpg", Transform(64))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_that_may_not_be_read(self, tmp_path):
        (tmp_path / "film.jpg").write_bytes(b"x")
        (tmp_path / "film.jpg").chmod(0)
        with pytest.raises(ImageError, match="cannot be read: Permission denied"):
            decode(tmp_path / "film.jpg", Transform(64))

    def test_more_bytes_than_any_image(self, tmp_path, monkeypatch):
        monkeypatch.setattr(decoding, "MAX_BYTES", 1000)
        (tmp_path / "film.jpg").write_bytes(bytes(1001))
        for call in (
            lambda: decode(tmp_path / "film.jpg", Transform(64)),
            lambda: decode_bytes(bytes(1001), Transform(64)),
        ):
            with pytest.raises(ImageError, match="1,001 bytes; no film is larger than 1,000"):
                call()

    def test_120_million_bytes_of_nothing(self):
        with pytest.raises(ImageError, match="begins with zeros"):
            decode_bytes(bytes(120_000_000), Transform(64))


class TestContentDecides:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "dcm", "txt", "pdf"])
    def test_not_the_suffix(self, tmp_path, picture, suffix):
        gray = picture(80, 80)
        content = io.BytesIO()
        Image.fromarray(gray).save(content, "PNG")
        for data in (content.getvalue(), dicom_bytes(gray)):
            (tmp_path / f"film.{suffix}").write_bytes(data)
            found = decode(tmp_path / f"film.{suffix}", Transform(64))
            assert np.array_equal(found.pixels, decode_bytes(data, Transform(64)).gray)
            assert np.array_equal(found.pixels, read_image(tmp_path / f"film.{suffix}", Transform(64)))

    def test_bytes_and_file_agree(self, saved, picture):
        path = saved(picture(300, 200, noise=5), "film.jpg")
        assert np.array_equal(decode(path, Transform(64)).pixels, decode_bytes(path.read_bytes(), Transform(64)).gray)


def undecided(content):
    """Its pixels or its reason; anything else that is raised goes through."""
    try:
        radiograph = decode_bytes(content, Transform(48))
    except ImageError as error:
        return str(error)
    assert radiograph.gray.size == (48, 48)
    return None


class TestDamagedFiles:
    """More than 300 damaged images: each decodes or gives a reason, in silence."""

    def test_whole_files_decode(self, picture):
        for name, content in whole_files(picture(120, 100, noise=4)).items():
            assert undecided(content) is None, name

    def test_damaged_files_decode_or_say_why(self, picture, capsys, caplog):
        reasons = {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, content in mutations(picture(120, 100, noise=4)):
                reasons[name] = undecided(content)
        assert len(reasons) > 300
        told = [reason for reason in reasons.values() if reason]
        assert 150 < len(told) < len(reasons)
        assert not [reason for reason in told if "\n" in reason or "0x" in reason or not reason.strip()]
        assert all(reason is None for name, reason in reasons.items() if "-renamed-" in name)
        cut = [name for name in reasons if "-cut-" in name]
        assert sum(reasons[name] is not None for name in cut) >= 0.95 * len(cut)
        assert capsys.readouterr().out == ""
        assert caplog.text == ""

    def test_warnings_are_silenced_here_only(self, picture):
        before = list(warnings.filters)
        contents = [content for _, content in mutations(picture(64, 64, noise=4), seed=3, rounds=1)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            filters = list(warnings.filters)
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(undecided, contents * 2))
            assert list(warnings.filters) == filters
            with pytest.raises(UserWarning):
                warnings.warn("heard", UserWarning, stacklevel=1)
        assert list(warnings.filters) == before
        assert logging.getLogger("pydicom").propagate


class TestNotes:
    def test_a_negative_is_noted_and_left_as_it_is(self, saved, picture):
        radiograph = picture(128, 128)
        assert decode(saved(radiograph, "film.png"), Transform(64)).notes == ()
        negative = decode(saved(255 - radiograph, "negative.png"), Transform(64))
        assert negative.notes == (INVERTED,)
        assert (negative.pixels == apply(255 - radiograph, Transform(64))).all()

    def test_an_image_smaller_than_the_store(self, saved, picture):
        assert decode(saved(picture(60, 50), "film.png"), Transform(64)).notes == ("smaller than the store, enlarged",)
        assert decode(saved(picture(64, 50), "film.png"), Transform(64)).notes == ()

    def test_error_rate_of_the_negative_check_on_real_images(self):
        found = real_images(1)
        images = {radiograph.name: Image.open(radiograph).convert("L") for radiograph in found}
        wrong = [name for name, image in images.items() if looks_inverted(image)]
        missed = [name for name, image in images.items() if not looks_inverted(ImageOps.invert(image))]
        assert wrong == missed == ["mhh_17ad0a56.jpg"]


@pytest.mark.parametrize(("kind", "opened"), [("PNG", 1), ("JPEG", 2)])
def test_a_content_is_decoded_once_for_all_transforms_a_jpeg_once_a_reduction(monkeypatch, kind, opened):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 300), np.uint8)).save(content, kind)
    transforms = [Transform(48), Transform(300), Transform(250, "center_crop")]
    wanted = [decode_bytes(content.getvalue(), transform) for transform in transforms]
    opens, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **known: opens.append(given) or original(*given, **known))
    image = ImageContent(content.getvalue())
    for transform, other in zip(transforms, wanted, strict=True):
        made = image.decode(transform)
        np.testing.assert_array_equal(made.gray, other.gray)
        assert (made.notes, made.concerns) == (other.notes, other.concerns)
    assert len(opens) == opened
