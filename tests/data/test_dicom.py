"""What a DICOM becomes, against MIMIC-CXR-JPG's own steps in OpenCV, the standard's formulas, and its own PNG."""

import builtins
import io
import logging
import os
import re
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import mlx.core as mx
import numpy as np
import pytest
from dicom_files import as_bytes, dicom_bytes, dicom_dataset, stored_values
from odd_images import jpeg_of_scans
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mlx_cxr.data.decoding import ImageError, Transform, decode_bytes
from mlx_cxr.data.dicom import equalize, read_dicom
from mlx_cxr.models.resnet import ResNet18, ResNetConfig, initialize, preprocess

REAL = Path(os.environ.get("MLX_CXR_REALCXR", Path(__file__).resolve().parents[3] / "shared" / "realcxr")) / "images"
TRANSFORM = Transform(64)
KINDS = [(photometric, bits) for photometric in ("MONOCHROME1", "MONOCHROME2") for bits in (8, 12, 16)]


@pytest.fixture
def radiograph():
    """uint8 (H, W) of smooth content from 0 to 255, an odd number of pixels, unlike its negative."""
    grain = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    levels = np.asarray(Image.fromarray(grain).resize((75, 91), Image.Resampling.BICUBIC)).copy() // 2
    levels[0, 0], levels[-1, -1] = 0, 255
    return levels


@pytest.fixture(scope="session")
def network():
    model = ResNet18(ResNetConfig(in_channels=3))
    initialize(model, seed=0)
    model.eval()
    return model


def mimic_cxr_jpg(stored, photometric):
    """The published function (MIT-LCP/mimic-cxr, issue 16), but for reading the file."""
    raw = stored.astype(np.float64)
    raw = raw - raw.min()
    levels = (raw / raw.max() * 255).astype(np.uint8)
    if photometric == "MONOCHROME1":
        levels = cv2.bitwise_not(levels)
    return cv2.equalizeHist(levels)


def as_png(levels):
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


def gray(data, recipe="mimic"):
    return np.asarray(read_dicom(data, recipe).gray)


class TestEqualization:
    @pytest.mark.parametrize("seed", range(20))
    def test_is_opencvs_bit_for_bit(self, seed):
        rng = np.random.default_rng(seed)
        shape = rng.integers(1, 300, 2)
        spread = rng.choice([0.5, 3, 20, 80])
        levels = np.clip(rng.normal(rng.integers(0, 256), spread, shape), 0, 255).astype(np.uint8)
        assert np.array_equal(equalize(levels), cv2.equalizeHist(levels))

    @pytest.mark.parametrize("levels", [[[7]], [[0, 255]], [[3, 3], [3, 4]], [[255, 255], [0, 0]]])
    def test_edge_cases(self, levels):
        levels = np.array(levels, np.uint8)
        assert np.array_equal(equalize(levels), cv2.equalizeHist(levels))

    def test_more_pixels_than_single_precision_counts(self):
        levels = np.random.default_rng(0).integers(0, 256, (4200, 4100), dtype=np.uint8)
        assert levels.size > 2**24
        assert np.array_equal(equalize(levels), cv2.equalizeHist(levels))


class TestMimicRecipe:
    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize(("photometric", "bits"), KINDS)
    def test_is_mimic_cxr_jpgs_bit_for_bit(self, photometric, bits, signed):
        # Values that no scaling divides evenly, within part of the range.
        rng = np.random.default_rng(bits)
        stored = rng.integers(2**bits // 9, 2**bits // 2, (61, 47)) - signed * 2 ** (bits - 1)
        dataset = dicom_dataset(np.zeros((61, 47), np.uint8), photometric, bits, signed)
        kind = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
        dataset.PixelData = stored.astype(kind).tobytes() + b"\0" * (bits == 8)
        assert np.array_equal(gray(as_bytes(dataset)), mimic_cxr_jpg(stored, photometric))

    @pytest.mark.parametrize(("photometric", "bits"), KINDS)
    def test_every_kind_of_file_gives_the_pixels_and_logits_of_the_png(self, radiograph, network, photometric, bits):
        png = decode_bytes(as_png(mimic_cxr_jpg(radiograph, "MONOCHROME2")), TRANSFORM)
        dicom = decode_bytes(dicom_bytes(radiograph, photometric, bits), TRANSFORM)
        assert np.array_equal(dicom.gray, png.gray)
        logits = [network(preprocess(mx.array(np.asarray(x.gray))[None], 3)) for x in (dicom, png)]
        assert np.abs(np.array(logits[0]) - np.array(logits[1])).max() <= 1e-3
        assert np.abs(np.array(logits[0])).max() > 0.01

    @pytest.mark.parametrize(("photometric", "bits"), KINDS)
    def test_on_a_real_image(self, network, photometric, bits):
        path = REAL / "nih_00000061_012.jpg"
        if not path.exists():
            pytest.skip(f"no real films in {REAL}")
        transform = Transform(224)
        real = np.asarray(Image.open(path).convert("L"))
        png = decode_bytes(as_png(mimic_cxr_jpg(real, "MONOCHROME2")), transform)
        dicom = decode_bytes(dicom_bytes(real, photometric, bits), transform)
        assert np.array_equal(dicom.gray, png.gray)
        assert dicom.concerns == ()
        logits = [network(preprocess(mx.array(np.asarray(x.gray))[None], 3)) for x in (dicom, png)]
        assert np.abs(np.array(logits[0]) - np.array(logits[1])).max() <= 1e-3

    def test_32_bit_and_floating_point_values(self, radiograph):
        values = radiograph.astype(np.int64) * 3_000_017 - 5
        wide = dicom_dataset(radiograph, BitsAllocated=32, BitsStored=32, HighBit=31, PixelRepresentation=1)
        wide.PixelData = values.astype(np.int32).tobytes()
        assert np.array_equal(gray(as_bytes(wide)), mimic_cxr_jpg(values, "MONOCHROME2"))
        real = dicom_dataset(radiograph, PixelData=None, BitsAllocated=32, BitsStored=32, HighBit=31)
        real.FloatPixelData = (radiograph / np.float32(7)).astype(np.float32).tobytes()
        assert np.array_equal(gray(as_bytes(real)), mimic_cxr_jpg(radiograph / np.float32(7), "MONOCHROME2"))

    def test_bits_above_the_stored_ones_are_no_pixels(self, radiograph):
        # An overlay kept in the upper bits, as before 2004.
        dataset = dicom_dataset(radiograph, bits=12)
        overlay = np.random.default_rng(0).integers(0, 16, radiograph.shape, dtype=np.uint16) << 12
        dataset.PixelData = (np.frombuffer(dataset.PixelData, np.uint16) | overlay.ravel()).tobytes()
        dataset.add_new(0x60000102, "US", 12)
        assert np.array_equal(gray(as_bytes(dataset)), gray(dicom_bytes(radiograph, bits=12)))

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
    def test_values_beyond_the_bits_of_the_header_do_not_wrap(self, radiograph, signed, syntax):
        """12-bit values whose header says 8 or 10."""
        for stored, high in ((8, 7), (10, 9), (10, 11)):
            dataset = self.of_words(stored_values(radiograph, bits=12, signed=signed) | 1, syntax, stored, high)
            with pytest.raises(ImageError, match=rf"of more than the {stored} bits that its header gives them"):
                read_dicom(as_bytes(dataset))

    @staticmethod
    def of_words(words, syntax, stored, high):
        dataset = dicom_dataset(np.zeros(words.shape, np.uint8), bits=16, signed=words.dtype.kind == "i")
        dataset.PixelData = words.astype(words.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.BitsStored, dataset.HighBit = stored, high
        return dataset

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
    @pytest.mark.parametrize("high", [11, 13, 15])
    def test_the_stored_bits_end_at_the_high_bit(self, radiograph, signed, syntax, high):
        """12 bits may lie anywhere in 16 (PS3.5 8.1.1)."""
        values = stored_values(radiograph, bits=12, signed=signed) | 1
        dataset = self.of_words(values << (high - 11), syntax, 12, high)
        assert np.array_equal(gray(as_bytes(dataset)), mimic_cxr_jpg(values, "MONOCHROME2"))

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize(("stored", "high"), [(12, 15), (12, 3), (12, 20), (16, 11)])
    def test_where_the_high_bit_cannot_be_meant_the_lowest_bits_are(self, radiograph, signed, stored, high):
        values = stored_values(radiograph, bits=12, signed=signed) | 1
        dataset = self.of_words(values, ExplicitVRLittleEndian, stored, high)
        assert np.array_equal(gray(as_bytes(dataset)), mimic_cxr_jpg(values, "MONOCHROME2"))

    def test_negative_values_keep_their_sign_above_the_stored_bits(self, radiograph):
        dataset = dicom_dataset(radiograph, bits=12, signed=True)
        values = np.frombuffer(dataset.PixelData, np.int16)
        assert (values < 0).any()
        expected = gray(dicom_bytes(radiograph, bits=12))
        assert np.array_equal(gray(as_bytes(dataset)), expected)
        dataset.PixelData = (values & 0x0FFF).tobytes()
        assert np.array_equal(gray(as_bytes(dataset)), expected)

    @pytest.mark.parametrize("recipe", ["mimic", "window"])
    def test_what_is_empty_or_carelessly_written(self, radiograph, recipe):
        expected = gray(dicom_bytes(radiograph, bits=12), recipe)
        for elements in (
            {"RescaleSlope": "", "RescaleIntercept": ""},
            {"VOILUTFunction": ""},
            {"PhotometricInterpretation": "monochrome2 "},
        ):
            assert np.array_equal(gray(dicom_bytes(radiograph, bits=12, **elements), recipe), expected), elements

    @pytest.mark.parametrize(("keyword", "vr", "dtype"), [("Float", "OF", "<f4"), ("DoubleFloat", "OD", "<f8")])
    @pytest.mark.parametrize("recipe", ["mimic", "window"])
    def test_floating_point_pixels(self, radiograph, recipe, keyword, vr, dtype):
        dataset = dicom_dataset(radiograph, bits=12)
        for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            del dataset[name]
        dataset.BitsAllocated = np.dtype(dtype).itemsize * 8
        values = (radiograph.astype(dtype) - 100) / 1024
        dataset.add_new(f"{keyword}PixelData", vr, values.tobytes())
        assert np.array_equal(gray(as_bytes(dataset), recipe), gray(dicom_bytes(radiograph, bits=12), recipe))

    def test_window_rescale_and_padding_change_nothing(self, radiograph):
        more = {"WindowCenter": 900, "WindowWidth": 300, "RescaleSlope": 2, "RescaleIntercept": -1000}
        changed = dicom_bytes(radiograph, bits=12, PixelPaddingValue=0, **more)
        assert np.array_equal(gray(changed), gray(dicom_bytes(radiograph, bits=12)))

    def test_a_negative_slope_turns_the_gray_scale_round(self, radiograph):
        falling = dicom_bytes(radiograph, "MONOCHROME1", 12, RescaleSlope=-1, RescaleIntercept=4095)
        assert np.array_equal(gray(falling), mimic_cxr_jpg(255 - radiograph, "MONOCHROME2"))

    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_the_presentation_lut_shape_does_not_invert_again(self, radiograph, photometric):
        data = dicom_bytes(radiograph, photometric, PresentationLUTShape="INVERSE")
        result = read_dicom(data)
        assert np.array_equal(result.gray, gray(dicom_bytes(radiograph)))
        assert any("INVERSE" in note for note in result.notes) == (photometric == "MONOCHROME2")

    def test_an_extreme_value_that_takes_up_the_range_is_a_concern(self, radiograph):
        dataset = dicom_dataset(radiograph, bits=16)
        values = radiograph.astype(np.uint16)
        values[0, 0] = 65_535
        dataset.PixelData = values.tobytes()
        assert "gray levels left" in read_dicom(as_bytes(dataset)).concerns[0]


class TestWindow:
    def test_linear_window_by_hand(self, radiograph):
        # PS3.3 C.11.2.1.2: y = ((x - (c - 0.5)) / (w - 1) + 0.5), cut to 0..1.
        stored = radiograph.astype(np.float64) * 16
        expected = (np.clip((stored - 1999.5) / 999 + 0.5, 0, 1) * 255).astype(np.uint8)
        data = dicom_bytes(radiograph, bits=12, WindowCenter=2000, WindowWidth=1000)
        assert np.abs(gray(data, "window").astype(int) - expected).max() <= 1
        assert {0, 255} <= set(np.unique(gray(data, "window")).tolist())

    @pytest.mark.parametrize("empty", [{"WindowCenter": "", "WindowWidth": ""}, {"WindowWidth": ""}])
    def test_a_window_without_values_is_none(self, radiograph, empty):
        more = {"WindowCenter": 2000, "WindowWidth": 1001} | empty
        none = gray(dicom_bytes(radiograph, bits=12), "window")
        np.testing.assert_array_equal(gray(dicom_bytes(radiograph, bits=12, **more), "window"), none)

    def test_a_window_that_cannot_be_is_named(self, radiograph):
        with pytest.raises(ImageError, match="window cannot be used; try the recipe 'mimic'"):
            gray(dicom_bytes(radiograph, bits=12, WindowCenter=2000, WindowWidth=0), "window")

    def test_the_first_of_several_windows_after_rescale_of_signed_values(self, radiograph):
        measured = (radiograph.astype(np.float64) * 16 - 2048) * 0.5 + 10
        expected = (np.clip((measured - 99.5) / 799 + 0.5, 0, 1) * 255).astype(np.uint8)
        more = {"RescaleSlope": 0.5, "RescaleIntercept": 10, "WindowCenter": [100, 5], "WindowWidth": [800, 9]}
        result = gray(dicom_bytes(radiograph, bits=12, signed=True, **more), "window")
        assert np.abs(result.astype(int) - expected).max() <= 1

    def test_monochrome1_is_inverted_after_the_window(self, radiograph):
        # Stored reversed, so the window that shows the same lies at the other end.
        plain = gray(dicom_bytes(radiograph, bits=12, WindowCenter=2000, WindowWidth=1001), "window")
        reverse = dicom_bytes(radiograph, "MONOCHROME1", 12, WindowCenter=4095 - 2000 + 1, WindowWidth=1001)
        assert np.abs(gray(reverse, "window").astype(int) - plain).max() <= 1

    def test_voi_lut(self, radiograph):
        item = Dataset()
        table = np.linspace(0, 1, 256) ** 3 * 1023
        item.add_new("LUTDescriptor", "US", [256, 0, 10])
        item.add_new("LUTData", "US", table.astype(np.uint16).tolist())
        result = gray(dicom_bytes(radiograph, VOILUTSequence=[item]), "window")
        assert np.array_equal(result, (table.astype(np.uint16)[radiograph] / 1023 * 255).astype(np.uint8))

    def test_a_modality_lut_of_12_bits(self, radiograph):
        item = Dataset()
        table = np.linspace(0, 1, 256) ** 2 * 4095
        item.add_new("LUTDescriptor", "US", [256, 0, 12])
        item.add_new("LUTData", "US", table.astype(np.uint16).tolist())
        item.add_new("ModalityLUTType", "LO", "OD")
        more = {"WindowCenter": 2048, "WindowWidth": 4096}
        measured = table.astype(np.uint16)[radiograph].astype(float)
        expected = (np.clip((measured - 2047.5) / 4095 + 0.5, 0, 1) * 255).astype(np.uint8)
        result = gray(dicom_bytes(radiograph, ModalityLUTSequence=[item], **more), "window")
        assert np.abs(result.astype(int) - expected).max() <= 1

    @pytest.mark.parametrize("signed", [False, True])
    def test_a_wide_window_without_rescale_does_not_overflow(self, radiograph, signed):
        data = dicom_bytes(radiograph, bits=16, signed=signed, WindowCenter=0 if signed else 32768, WindowWidth=65535)
        assert np.abs(gray(data, "window").astype(int) - radiograph).max() <= 1

    def test_padding_is_no_extreme_of_the_range(self, radiograph):
        dataset = dicom_dataset(radiograph // 2, bits=12, PixelPaddingValue=4095)
        values = np.frombuffer(dataset.PixelData, np.uint16).reshape(radiograph.shape).copy()
        values[:3] = 4095
        dataset.PixelData = values.tobytes()
        half = (radiograph // 2).astype(float)
        low, high = half[3:].min(), half[3:].max()
        expected = ((half - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
        result = gray(as_bytes(dataset), "window")
        assert np.array_equal(result[3:], expected[3:])
        assert (result[:3] == 0).all()

    def test_without_a_window_lowest_to_highest(self, radiograph):
        assert np.array_equal(gray(dicom_bytes(radiograph, bits=16), "window"), radiograph)

    @pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
    def test_padding_is_black(self, radiograph, photometric):
        dataset = dicom_dataset(radiograph, photometric, 12, PixelPaddingValue=4000, PixelPaddingRangeLimit=4090)
        values = np.frombuffer(dataset.PixelData, np.uint16).reshape(radiograph.shape).copy()
        values[:10] = 4050
        dataset.PixelData = values.tobytes()
        assert (gray(as_bytes(dataset), "window")[:10] == 0).all()

    def test_padding_of_signed_values_may_be_written_unsigned(self, radiograph):
        dataset = dicom_dataset(radiograph, bits=12, signed=True)
        words = np.frombuffer(dataset.PixelData, np.int16).reshape(radiograph.shape).copy()
        words[:10] = -2000
        dataset.PixelData = words.tobytes()
        dataset.add_new("PixelPaddingValue", "US", 63536)
        assert (gray(as_bytes(dataset), "window")[:10] == 0).all()

    def test_a_window_of_nothing(self, radiograph):
        with pytest.raises(ImageError, match=r"cannot be used|shows nothing"):
            decode_bytes(dicom_bytes(radiograph, WindowCenter=10, WindowWidth=0), replace(TRANSFORM, recipe="window"))


class TestEncodings:
    @pytest.mark.parametrize(
        "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
    )
    @pytest.mark.parametrize("bits", [8, 16])
    def test_lossless_ones_give_the_same(self, radiograph, syntax, bits):
        data = dicom_bytes(radiograph, bits=bits, syntax=syntax)
        assert np.array_equal(gray(data), gray(dicom_bytes(radiograph)))

    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_without_preamble(self, radiograph, syntax):
        data = as_bytes(dicom_dataset(radiograph, bits=16, syntax=syntax), preamble=False)
        assert data[128:132] != b"DICM"
        assert np.array_equal(np.asarray(decode_bytes(data, TRANSFORM).gray).max(), 255)
        assert np.array_equal(gray(data), gray(dicom_bytes(radiograph)))

    def test_jpeg(self, radiograph):
        content = io.BytesIO()
        Image.fromarray(radiograph).save(content, "JPEG", quality=95)
        expected = mimic_cxr_jpg(np.asarray(Image.open(content)), "MONOCHROME2")
        assert np.array_equal(gray(dicom_bytes(radiograph, syntax=JPEGBaseline8Bit)), expected)

    @pytest.mark.parametrize(
        ("syntax", "said", "package"),
        [
            (JPEGLosslessSV1, "JPEG Lossless, Non-Hierarchical", "pip install pylibjpeg pylibjpeg-libjpeg"),
            (JPEGLSLossless, "JPEG-LS Lossless", "pip install pyjpegls"),
            (JPEGExtended12Bit, "JPEG Extended", "pip install pylibjpeg pylibjpeg-libjpeg"),
        ],
    )
    def test_no_decoder(self, radiograph, monkeypatch, syntax, said, package):
        from pydicom.pixels.common import CoderBase

        installed = ("pillow",) if syntax == JPEGExtended12Bit else ()
        monkeypatch.setattr(CoderBase, "available_plugins", property(lambda self: installed))
        dataset = dicom_dataset(radiograph, bits=12)
        dataset.PixelData = encapsulate([b"\xff\xd8 compressed \xff\xd9"])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
        with pytest.raises(ImageError, match=f"compressed as {said}.*no decoder here: {package}"):
            decode_bytes(as_bytes(dataset), TRANSFORM)

    def test_an_unknown_transfer_syntax(self, radiograph):
        data = dicom_bytes(radiograph).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0")
        with pytest.raises(ImageError, match=r"unknown transfer syntax \(1\.2\.840\.10008\.9\.9\.9\)"):
            decode_bytes(data, TRANSFORM)


class TestRefusals:
    def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(self, radiograph):
        dataset = dicom_dataset(radiograph, syntax=JPEGBaseline8Bit)
        dataset.PixelData = encapsulate([jpeg_of_scans(3000, 2000)])
        begun = time.perf_counter()
        with pytest.raises(ImageError, match=r"a JPEG of 3,\d+ scans"):
            decode_bytes(as_bytes(dataset), TRANSFORM)
        assert time.perf_counter() - begun < 2

    def test_millions_of_elements_are_refused_at_once(self, radiograph):
        """Of a deflated file they may lie in a few bytes."""
        whole = as_bytes(dicom_dataset(radiograph, syntax=DeflatedExplicitVRLittleEndian))
        start = 144 + int.from_bytes(whole[140:144], "little")
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = whole[:start] + deflater.compress(bytes(200_000_000)) + deflater.flush()
        assert len(data) < 300_000
        begun = time.perf_counter()
        with pytest.raises(ImageError, match="a DICOM of too many elements"):
            decode_bytes(data, TRANSFORM)
        assert time.perf_counter() - begun < 4

    @pytest.mark.parametrize(
        ("elements", "reason"),
        [
            ({"NumberOfFrames": 3}, "a DICOM of 3 frames"),
            ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "pixels are RGB with 3 samples"),
            ({"PhotometricInterpretation": "PALETTE COLOR"}, "pixels are PALETTE COLOR with 1 samples"),
            ({"PhotometricInterpretation": None}, "header lacks PhotometricInterpretation; export"),
            ({"Rows": None, "BitsStored": None}, "header lacks Rows, BitsStored"),
            ({"Rows": [91, 91]}, "no single number as Rows"),
            ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 px by its header; more than 12,000 px long"),
            ({"Rows": 9_000, "Columns": 9_000}, "9000 x 9000 px by its header"),
            ({"Rows": 0}, "75 x 0 px; shorter than 32 px"),
            ({"Rows": 92}, r"cut short: 6,826 of 6,900 bytes of pixels are there"),
            ({"PixelData": b""}, "cut short: 0 of 6,825 bytes"),
            ({"PixelData": None}, r"a DICOM file without pixels \(Digital X-Ray Image Storage - For Presentation\)"),
            ({"PixelData": b"\x05" * 6826}, "blank: every pixel is 5"),
            ({"BitsStored": 99}, "whose header says 99 bits stored in 8"),
            ({"BitsAllocated": 4}, "whose header says 8 bits stored in 4"),
        ],
    )
    def test_the_reason_is_given(self, radiograph, elements, reason):
        with pytest.raises(ImageError, match=reason):
            decode_bytes(dicom_bytes(radiograph, **elements), TRANSFORM)

    def test_a_report(self, radiograph):
        dataset = dicom_dataset(radiograph, PixelData=None)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
        with pytest.raises(ImageError, match=r"without pixels \(Basic Text SR Storage\)"):
            decode_bytes(as_bytes(dataset), TRANSFORM)

    def test_nan(self, radiograph):
        values = radiograph.astype(np.float32)
        values[3, 4] = np.nan
        dataset = dicom_dataset(radiograph, PixelData=None, BitsAllocated=32, BitsStored=32, HighBit=31)
        dataset.FloatPixelData = values.tobytes()
        with pytest.raises(ImageError, match="NaN or infinite"):
            decode_bytes(as_bytes(dataset), TRANSFORM)

    def test_pixel_representation_may_be_missing(self, radiograph):
        assert np.array_equal(gray(dicom_bytes(radiograph, PixelRepresentation=None)), gray(dicom_bytes(radiograph)))

    @pytest.mark.parametrize("keep", [0.01, 0.05, 0.3, 0.9, 0.999])
    def test_a_cut_file(self, radiograph, keep):
        data = dicom_bytes(radiograph, bits=16)
        with pytest.raises(ImageError, match=r"cut short|no known kind|stopped download"):
            decode_bytes(data[: int(keep * len(data))], TRANSFORM)

    def test_a_deflated_bomb(self, radiograph, monkeypatch):
        monkeypatch.setattr("mlx_cxr.data.dicom.MAX_BYTES", 1_000_000)
        dataset = dicom_dataset(radiograph, syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(50_000_000))
        data = as_bytes(dataset)
        assert len(data) < 100_000
        with pytest.raises(ImageError, match="unpacks to more than 1,000,000 bytes"):
            decode_bytes(data, TRANSFORM)

    def test_a_run_length_bomb(self, radiograph):
        dataset = dicom_dataset(radiograph, syntax=RLELossless)
        segment = b"\x81\0" * 200_000
        dataset.PixelData = encapsulate([(1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + segment])
        with pytest.raises(ImageError, match="more than its header says"):
            decode_bytes(as_bytes(dataset), TRANSFORM)

    def test_without_pydicom(self, radiograph, monkeypatch):
        real_import = builtins.__import__

        def without(name, *args, **kwargs):
            if name.split(".")[0] == "pydicom":
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        data = dicom_bytes(radiograph)
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImageError, match=r'needs pydicom.*pip install "mlx-cxr\[dicom\]"'):
            decode_bytes(data, TRANSFORM)

    def test_an_unknown_recipe(self, radiograph):
        with pytest.raises(ValueError, match="'viewer' is not one of mimic, window"):
            read_dicom(dicom_bytes(radiograph), "viewer")


class TestHeader:
    @pytest.mark.parametrize(
        ("elements", "concern"),
        [
            ({"Modality": "CT"}, r"no plain radiograph \(Modality CT\)"),
            ({"Modality": "MG"}, r"no plain radiograph \(Modality MG\)"),
            ({"BodyPartExamined": "KNEE"}, r"another body part \(KNEE\)"),
            ({"BodyPartExamined": "LEFT HAND"}, r"another body part \(LEFT HAND\)"),
            ({"BodyPartExamined": "Crânio"}, r"another body part \(CRANIO\)"),
            ({"BodyPartExamined": "ABDOMEN"}, r"another body part \(ABDOMEN\)"),
            ({"BodyPartExamined": "HIP"}, r"another body part \(HIP\)"),
            ({"BodyPartExamined": "THORACIC SPINE"}, r"another body part \(THORACIC SPINE\)"),
            ({"BodyPartExamined": "TSPINE"}, r"another body part \(TSPINE\)"),
            ({"ViewPosition": "LL"}, "a lateral view"),
            ({"ViewPosition": "LATERAL"}, "a lateral view"),
            ({"ViewPosition": "L-LAT"}, "a lateral view"),
            ({"ViewPosition": "PERFIL"}, "a lateral view"),
            ({"ViewPosition": "LEFT DECUBITUS"}, "a decubitus view"),
            ({"ViewPosition": "RAO"}, "an oblique view"),
            ({"PresentationIntentType": "FOR PROCESSING"}, "a detector's raw image"),
        ],
    )
    def test_what_speaks_against_a_frontal_image(self, radiograph, elements, concern):
        concerns = read_dicom(dicom_bytes(radiograph, **elements)).concerns
        assert len(concerns) == 1
        assert re.search(f"^says in its header that it (is|shows) {concern}", concerns[0])

    @pytest.mark.parametrize(
        "elements",
        [
            {"Modality": None, "BodyPartExamined": None, "ViewPosition": None},
            {"Modality": "", "BodyPartExamined": "", "ViewPosition": ""},
            {"Modality": "CR", "BodyPartExamined": "PORT CHEST", "ViewPosition": "AP"},
            {"Modality": "RG", "BodyPartExamined": "THORAX", "PresentationIntentType": "FOR PRESENTATION"},
            *({"Modality": modality} for modality in ("CR", "DX", "DR", "XR", "OT")),
            *({"BodyPartExamined": part} for part in ("TÓRAX", "TORAX", "CXR", "THX", "UNKNOWN", "RIBS")),
            *(
                {"BodyPartExamined": part}
                for part in ("CHEST ABDOMEN", "POITRINE", "BRUSTKORB", "Thorax AP", "CHIP", "COLLEGE")
            ),
            *({"ViewPosition": view} for view in ("PA", "AP", "AP SUPINE", "ERECT", "XYZ")),
        ],
    )
    def test_what_does_not(self, radiograph, elements):
        assert read_dicom(dicom_bytes(radiograph, **elements)).concerns == ()

    @pytest.mark.parametrize("charset", ["iso8859", "utf-8"])
    def test_accents_in_whatever_encoding(self, radiograph, charset):
        said = "CRÂNIO".encode(charset).ljust(8)
        data = dicom_bytes(radiograph, BodyPartExamined="CRXNIOS").replace(b"CRXNIOS ", said)
        assert read_dicom(data).concerns == ("says in its header that it shows another body part (CRANIO)",)

    def test_nobody_is_named(self, radiograph, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        for elements in ({}, {"Rows": 92}, {"PatientBirthDate": "not a date", "BodyPartExamined": "SKULL"}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = dicom_bytes(radiograph, PatientComments="SECRET", **elements)
            caplog.clear()
            try:
                told = repr(decode_bytes(data, TRANSFORM))
            except ImageError as error:
                told = str(error)
            out, err = capfd.readouterr()
            assert "SECRET" not in (told + caplog.text + out + err).upper()
