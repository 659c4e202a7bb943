"""What the tests of training share."""

import mlx.core as mx
import pytest


@pytest.fixture(scope="module")
def cpu_only():
    """The CPU is the device for a module's tests."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
