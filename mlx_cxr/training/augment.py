"""Label-safe augmentation on the device: shift, scale, rotation, brightness and contrast.

There is no flip: it would put the heart on the right, and MIMIC's reports and masks name sides.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_cxr.core.config_schema import AugmentConfig


def augment(images: mx.array, key: mx.array, config: AugmentConfig, part: tuple[int, int] = (0, 1)) -> mx.array:
    """One random variant of each image.

    Args:
        images: uint8 or float (N, S, S); uint8 is scaled to [0, 1].
        key: an `mx.random.key`; the same key gives the same variants.
        config: largest amounts; each is drawn uniformly from its symmetric range.
        part: (i, n): the images are part i of n equal ones of a batch, and get the variants of their places in it.

    Returns:
        float32 (N, S, S) in [0, 1]; 0 outside the image, as letterbox padding is.
    """
    x = images.astype(mx.float32) / 255.0 if images.dtype == mx.uint8 else images.astype(mx.float32)
    n, side, _ = x.shape
    angle, scale, shift, contrast, brightness = mx.random.split(key, 5)

    def drawn(key: mx.array, *shape: int) -> mx.array:
        index, parts = part
        return mx.random.uniform(-1, 1, (parts * n, 1, 1, *shape), key=key)[index * n : (index + 1) * n]

    radians = drawn(angle) * math.radians(config.rotate)
    zoom = 1 + config.scale * drawn(scale)
    offset = config.shift * side * drawn(shift, 2)
    x = affine(x, radians, zoom, offset)
    gain = 1 + config.contrast * drawn(contrast)
    lift = config.brightness * drawn(brightness)
    return mx.clip((x - 0.5) * gain + 0.5 + lift, 0, 1)


def affine(x: mx.array, radians: mx.array, zoom: mx.array, offset: mx.array) -> mx.array:
    """Rotate about the centre, enlarge and shift, by bilinear sampling.

    Args:
        x: float (N, S, S).
        radians: (N, 1, 1), counter-clockwise on the displayed image.
        zoom: (N, 1, 1), above 1 enlarges.
        offset: (N, 1, 1, 2), rows and columns in pixels; positive moves the content down and right.

    Returns:
        float (N, S, S), 0 where the sample falls outside.
    """
    n, side, _ = x.shape
    middle = (side - 1) / 2
    axis = mx.arange(side, dtype=mx.float32) - middle
    row = axis[None, :, None] - offset[..., 0]
    column = axis[None, None, :] - offset[..., 1]
    cosine, sine = mx.cos(radians) / zoom, mx.sin(radians) / zoom
    from_row = cosine * row + sine * column + middle
    from_column = cosine * column - sine * row + middle
    # A border of zeros, so that samples outside need no mask of their own.
    padded = mx.pad(x, ((0, 0), (1, 2), (1, 2))).reshape(n, -1)
    width = side + 3
    from_row = mx.clip(from_row + 1, 0, side + 1)
    from_column = mx.clip(from_column + 1, 0, side + 1)
    top, left = mx.floor(from_row), mx.floor(from_column)
    down, right = from_row - top, from_column - left
    index = (top * width + left).astype(mx.int32).reshape(n, -1)

    def corner(step: int) -> mx.array:
        return mx.take_along_axis(padded, index + step, axis=1).reshape(n, side, side)

    upper = corner(0) * (1 - right) + corner(1) * right
    lower = corner(width) * (1 - right) + corner(width + 1) * right
    return upper * (1 - down) + lower * down
