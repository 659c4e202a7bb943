"""DICOM files of an image, as detectors, archives and careless exports write them."""

import io

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)


def stored_values(image, photometric="MONOCHROME2", bits=8, signed=False):
    """What a detector stores of an image: its levels spread over `bits`, reversed for MONOCHROME1.

    Each level of 8 bits becomes a multiple (1, 16 or 257 for 8, 12 and 16 bits), so the recipe can lose nothing.
    """
    values = image.astype(np.int64) * {8: 1, 12: 16, 16: 257}[bits]
    if photometric == "MONOCHROME1":
        values = 2**bits - 1 - values
    if signed:
        return (values - 2 ** (bits - 1)).astype(np.int8 if bits == 8 else np.int16)
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def dicom_dataset(image, photometric="MONOCHROME2", bits=8, signed=False, syntax=ExplicitVRLittleEndian, **elements):
    """A data set with its file meta information, not yet written.

    Args:
        image: uint8 (H, W), as it is to look.
        photometric: MONOCHROME1 stores it reversed.
        bits: 8, 12 (in 16) or 16.
        signed: two's complement.
        syntax: a transfer syntax; RLE and JPEG Baseline (8-bit) are compressed here.
        elements: set last, so they may contradict the rest; None removes one.
    """
    values = stored_values(image, photometric, bits, signed)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["film"])
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID = "Secret^Name", "SECRET-ID"
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "DX", "CHEST", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.Rows, dataset.Columns = image.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    order = values.dtype.newbyteorder(">" if not syntax.is_little_endian else "<")
    dataset.PixelData = values.astype(order).tobytes() + b"\0" * (values.nbytes % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    elif syntax == JPEGBaseline8Bit:
        content = io.BytesIO()
        Image.fromarray(values).save(content, "JPEG", quality=95)
        dataset.PixelData = encapsulate([content.getvalue()])
    dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, value in elements.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def as_bytes(dataset, preamble=True):
    """A file's content; without preamble and meta information where `preamble` is False, as old archives keep it."""
    syntax = dataset.file_meta.TransferSyntaxUID
    content = io.BytesIO()
    if preamble:
        dataset.save_as(content, enforce_file_format=True)
    else:
        del dataset.file_meta
        dataset.save_as(content, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return content.getvalue()


def dicom_bytes(image, *args, **kwargs):
    """A DICOM file's content; arguments as for `dicom_dataset`."""
    return as_bytes(dicom_dataset(image, *args, **kwargs))
