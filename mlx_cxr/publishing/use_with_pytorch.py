"""Read chest films with the model of this folder on plain PyTorch:

    python use_with_pytorch.py FILM [FILM ...]

Research only, not for clinical use; read MODEL_CARD.md first. Needs torch, safetensors, numpy and pillow, and pydicom
for DICOM. A film is taken as a study of its own; for a study of several films, average their logits. Nothing here
checks that an image is a frontal chest film: it answers for a photograph too.

Other frameworks take the same weights: timm.create_model("resnet18", in_chans=C, num_classes=14, output_stride=S), or
for S = 32 torchvision.models.resnet18(num_classes=14) with conv1 replaced where C = 1. C and S are in the header of
model.torchvision.safetensors. A torchvision resnet18 at S = 16 would compute something else without an error.
"""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "model.torchvision.safetensors"
EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC = 274, 258, 262


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, added to their input."""

    def __init__(self, inside, outside, stride, dilation):
        super().__init__()
        first, second = dilation
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, first, first, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, second, second, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet18(nn.Module):
    """torchvision's resnet18 by its names; at output stride 16 layer4 is dilated, as timm does it."""

    def __init__(self, channels, classes, output_stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        plain = (1, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1, plain), BasicBlock(64, 64, 1, plain))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2, plain), BasicBlock(128, 128, 1, plain))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2, plain), BasicBlock(256, 256, 1, plain))
        stride, first, second = (1, (1, 2), (2, 2)) if output_stride == 16 else (2, plain, plain)
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride, first), BasicBlock(512, 512, 1, second))
        self.fc = nn.Linear(512, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def load_model():
    """The network with the weights beside this file, in evaluation mode."""
    with safe_open(WEIGHTS, framework="pt") as file:
        header = file.metadata()
    model = ResNet18(*(int(header[key]) for key in ("in_channels", "num_classes", "output_stride")))
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def equalize(levels):
    """Histogram equalization as `cv2.equalizeHist` does it."""
    histogram = np.bincount(levels.ravel(), minlength=256)
    lowest = int(np.flatnonzero(histogram)[0])
    scale = np.float32(255) / np.float32(levels.size - histogram[lowest])
    above = (np.cumsum(histogram) - histogram[lowest]).clip(0)
    return np.rint(above.astype(np.float32) * scale).clip(0, 255).astype(np.uint8)[levels]


def dicom_levels(path):
    """Gray levels as MIMIC-CXR-JPG made them: stored values to 0..255, MONOCHROME1 inverted, histogram equalized."""
    import pydicom

    dataset = pydicom.dcmread(path)
    values = dataset.pixel_array.astype(np.float64)
    if values.ndim != 2 or values.min() == values.max():
        raise SystemExit(f"{path}: not a single gray film, or blank")
    part = values - values.min()
    levels = (part / part.max() * 255).astype(np.uint8)
    if (dataset.PhotometricInterpretation == "MONOCHROME1") != ((dataset.get("RescaleSlope") or 1) < 0):
        levels = 255 - levels
    return Image.fromarray(equalize(levels))


def gray_levels(image):
    """8-bit gray: more bits from lowest to highest, colour as ITU-R 601 luma, transparent parts black."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image)
        values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
        low, high = values.min(), values.max()
        if not low < high:
            raise SystemExit("a blank film: every pixel has the same value")
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == 0
        part = high - values if white_is_zero else values - low
        return Image.fromarray((part * 255 // (high - low)).astype(np.uint8))
    if image.mode not in ("1", "L") and image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.composite(image.convert("RGB").convert("L"), Image.new("L", image.size), image.getchannel("A"))
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB").convert("L")


def read_image(path, size, fit, recipe="mimic"):
    """A file's image, 8-bit (size, size), made as those of training were."""
    with Path(path).open("rb") as file:
        head = file.read(132)
    is_dicom = head[128:] == b"DICM"
    if is_dicom and recipe != "mimic":
        raise ValueError("a DICOM; this network knows films as viewers show them: export it from one as PNG")
    image, reduction = dicom_levels(path) if is_dicom else Image.open(path), 1
    bits = (
        head[24] if image.format == "PNG" else max(image.tag_v2.get(TIFF_BITS, (8,))) if image.format == "TIFF" else 8
    )
    if bits > 8 and image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        raise ValueError("colours of more than 8 bits, of which Pillow keeps 8; save it as gray PNG")
    turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION, 1) != 1
    width, height = image.size
    if image.format in ("JPEG", "MPO") and not turned:
        # A large JPEG is reduced while it is decoded, never below twice the size that is wanted.
        side = max(width, height) if fit == "letterbox" else min(width, height)
        reduction = next(r for r in (8, 4, 2, 1) if r == 1 or side >= 2 * size * r)
        image.draft("L", (width // reduction, height // reduction))
    image.load()
    if turned:
        ImageOps.exif_transpose(image, in_place=True)
    if reduction == 1:
        width, height = image.size
    gray = gray_levels(image)
    if fit == "letterbox":
        longest = max(width, height)
        across, down = (max(1, round(side * size / longest)) for side in (width, height))
        box = (0, 0, width, height)
    else:
        across = down = size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    box = tuple(edge / reduction for edge in box)
    shown = gray.resize((across, down), Image.Resampling.BICUBIC, box=box)
    square = Image.new("L", (size, size))
    square.paste(shown, ((size - across) // 2, (size - down) // 2))
    return np.asarray(square)


def network_input(image, mean, std):
    """(1, C, S, S) float32 of an image (S, S); three channels are the image three times."""
    x = torch.from_numpy(image.astype(np.float32) / 255)[None, None]
    mean, std = (torch.tensor(values, dtype=torch.float32)[None, :, None, None] for values in (mean, std))
    return (x - mean) / std


def decide(logit, point, alpha):
    """Calibrated probability, and `present`, `absent` or `abstain`: a call only where it alone is plausible.

    With too few validation studies of either class a finding is never called.
    """
    needed = math.ceil(1 / Fraction(str(alpha))) - 1
    probability = float(1 / (1 + np.exp(-np.float64(logit) / point["temperature"])))
    called = probability >= point["threshold"]
    present, absent = probability >= point["lower"], probability <= point["upper"]
    if min(point["positives"], point["negatives"]) >= needed and present != absent and called == present:
        return probability, "present" if called else "absent"
    return probability, "abstain"


def main(paths):
    """Print probabilities and calls for each file; name those that cannot be read, and continue."""
    about = json.loads((HERE / "preprocessing.json").read_text(encoding="utf-8"))
    points = json.loads((HERE / "operating_points.json").read_text(encoding="utf-8"))
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))["labels"]
    transform, normalization = about["transform"], about["normalization"]
    model = load_model()
    for path in paths:
        try:
            image = read_image(path, transform["size"], transform["fit"], about["dicom_recipe"])
        except (OSError, ValueError, SyntaxError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            continue
        with torch.inference_mode():
            logits = model(network_input(image, normalization["mean"], normalization["std"]))[0]
        print(f"{path}\n  {'finding':28} probability  call")
        for label, logit in zip(labels, logits.tolist(), strict=True):
            probability, call = decide(logit, points["labels"][label], points["alpha"])
            print(f"  {label:28} {probability:11.4f}  {call}")
    print(about["notice"])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
