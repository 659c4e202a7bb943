import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from prepared_images import read_image

from mlx_cxr.data.decode_pool import Decoded, WorkerDiedError, decode_images
from mlx_cxr.data.decoding import Transform

TRANSFORM = Transform(32)


@pytest.fixture
def large_image(tmp_path):
    grain = np.random.default_rng(0).integers(0, 256, (300, 240), dtype=np.uint8)
    Image.fromarray(grain).resize((1200, 1500), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    return tmp_path / "large.jpg"


@pytest.mark.parametrize("workers", [1, 2])
def test_each_image_comes_back_once_under_its_row(large_image, workers):
    missing = large_image.with_name("none.jpg")
    jobs = [(row, missing if row == 103 else large_image) for row in range(100, 130)]
    results = sorted(decode_images(jobs, TRANSFORM, workers), key=lambda result: result.row)
    pixels = read_image(large_image, TRANSFORM).tobytes()
    expected = [Decoded(row, pixels) for row in range(100, 130)]
    expected[3] = Decoded(103, None, "no such file")
    assert [(r.row, r.pixels, r.reason) for r in results] == [(r.row, r.pixels, r.reason) for r in expected]


class WatchedList(list):
    """Remembers how far it was read."""

    read_to = 0

    def __getitem__(self, key):
        self.read_to = max(self.read_to, key.stop)
        return super().__getitem__(key)


def test_images_are_handed_out_as_they_are_needed(large_image):
    jobs = WatchedList((row, large_image) for row in range(10_000))
    results = decode_images(jobs, TRANSFORM, 2)
    for _ in range(20):
        next(results)
    results.close()
    assert jobs.read_to <= 20 + 2 * 3 * 4 + 4
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named_as_such(large_image):
    results = decode_images([(row, large_image) for row in range(200)], TRANSFORM, 2)
    next(results)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(WorkerDiedError, match=r"large\.jpg.*pixels\.workers=1"):
        list(results)


UNGUARDED = """
import pandas, mlx.core
from pathlib import Path
import mlx_cxr.data.decode_pool as pool
import mlx_cxr.core.workers as workers
from mlx_cxr.data.decoding import Transform

print("main module runs")
LOADED = "__import__('mlx_cxr.data.decode_pool') and print(*__import__('sys').modules, flush=True) or []"

class Watched(workers.WorkerPool):
    def submit(self, *args):
        return super().submit(eval, LOADED)

workers.WorkerPool = Watched
list(pool.decode_images([(0, Path("x"))] * 8, Transform(32), 2))
"""


def test_a_worker_imports_little(tmp_path):
    """Pillow alone as a worker starts, whatever the main module imports; nor is that module run again."""
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("main module runs") == 1
    assert "mlx_cxr.data.decoding" in result.stdout
    loaded = set(result.stdout.split())
    assert not loaded & {"numpy", "pandas", "pydantic", "mlx", "mlx.core"}
