"""The one switch of the CPU paths: gradients of convolution, pooling and BatchNorm, activations, batches on streams.

They serve MLX's CPU backend; other devices keep MLX's own operations. `MLX_CXR_FAST_OPS=0` starts with them off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_enabled = os.environ.get("MLX_CXR_FAST_OPS") != "0"


def use_fast_ops(enabled: bool) -> None:
    """Choose between the CPU paths (default) and MLX's own operations, for graphs built from now on."""
    global _enabled
    _enabled = enabled


@contextmanager
def fast_ops(enabled: bool) -> Iterator[None]:
    """`use_fast_ops` inside the context, and the earlier choice after it."""
    before = _enabled
    use_fast_ops(enabled)
    try:
        yield
    finally:
        use_fast_ops(before)


def fast_ops_enabled() -> bool:
    """True if graphs built now take the CPU paths: they are switched on, and the CPU is MLX's default device."""
    return _enabled and mx.default_device().type == mx.DeviceType.cpu
