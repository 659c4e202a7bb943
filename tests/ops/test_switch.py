"""One switch turns all of the CPU paths off: at start, from now on, or for a while."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_cxr.ops import activations, conv, streams
from mlx_cxr.ops.switch import fast_ops, fast_ops_enabled, use_fast_ops

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="the fast operations serve the CPU backend only"
)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_off_every_operation_is_mlx_own_and_a_batch_is_one_part():
    x, weight = normal(4, 9, 9, 64), normal(64, 3, 3, 64, seed=1)

    def dilated() -> tuple[mx.array, mx.array]:
        return conv.conv3x3(x, weight, 1, 2), mx.conv2d(x, weight, 1, 2, 2)

    assert not mx.array_equal(*dilated()).item(), "the two round alike, so this test would see nothing"
    with fast_ops(False):
        assert mx.array_equal(*dilated()).item()
        assert mx.array_equal(activations.exp(x), mx.exp(x)).item()
        assert streams.available() == 1
        with streams.batch_parallel(2) as parts:
            assert (parts, len(streams.split(x))) == (1, 1)
    with streams.batch_parallel(2) as parts:
        assert (parts, len(streams.split(x))) == (2, 2)
        with fast_ops(False):
            assert len(streams.split(x)) == 1


def test_the_earlier_choice_comes_back():
    with pytest.raises(ZeroDivisionError), fast_ops(False):
        1 / 0  # noqa: B018
    assert fast_ops_enabled()
    with fast_ops(True):
        use_fast_ops(False)
        assert not fast_ops_enabled()
        with fast_ops(False):
            pass
        assert not fast_ops_enabled()
    assert fast_ops_enabled()


@pytest.mark.parametrize(("asked", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_environment_turns_them_off_at_start(asked, enabled):
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_CXR_FAST", "MLX_BFS"))}
    environment = unset if asked is None else unset | {"MLX_CXR_FAST_OPS": asked}
    code = "import os, mlx_cxr; from mlx_cxr.ops import streams, switch\n"
    code += "print(switch.fast_ops_enabled(), 'MLX_BFS_MAX_WIDTH' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(enabled)] * 2
