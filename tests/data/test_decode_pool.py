import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_cxr.data.decode_pool import Decoded, WorkerDiedError, decode_films
from mlx_cxr.data.image_arrays import Transform, read_film

TRANSFORM = Transform(32)


@pytest.fixture
def large_film(tmp_path):
    grain = np.random.default_rng(0).integers(0, 256, (300, 240), dtype=np.uint8)
    Image.fromarray(grain).resize((1200, 1500), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg")
    return tmp_path / "large.jpg"


@pytest.mark.parametrize("workers", [1, 2])
def test_each_film_comes_back_once_under_its_row(large_film, workers):
    missing = large_film.with_name("none.jpg")
    jobs = [(row, missing if row == 103 else large_film) for row in range(100, 130)]
    results = sorted(decode_films(jobs, TRANSFORM, workers), key=lambda result: result.row)
    pixels = read_film(large_film, TRANSFORM).tobytes()
    expected = [Decoded(row, pixels) for row in range(100, 130)]
    expected[3] = Decoded(103, None, "no such file")
    assert [(r.row, r.pixels, r.reason) for r in results] == [(r.row, r.pixels, r.reason) for r in expected]


class WatchedList(list):
    """Remembers how far it was read."""

    read_to = 0

    def __getitem__(self, key):
        self.read_to = max(self.read_to, key.stop)
        return super().__getitem__(key)


def test_films_are_handed_out_as_they_are_needed(large_film):
    jobs = WatchedList((row, large_film) for row in range(10_000))
    results = decode_films(jobs, TRANSFORM, 2)
    for _ in range(20):
        next(results)
    results.close()
    assert jobs.read_to <= 20 + 2 * 3 * 4 + 4
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named_as_such(large_film):
    results = decode_films([(row, large_film) for row in range(200)], TRANSFORM, 2)
    next(results)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(WorkerDiedError, match=r"large\.jpg.*pixels\.workers=1"):
        list(results)


UNGUARDED = """
import pandas, mlx.core
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import mlx_cxr.data.decode_pool as pool
import mlx_cxr.core.workers as workers
from mlx_cxr.data.image_arrays import Transform

print("main module runs")
LOADED = "__import__('mlx_cxr.data.decode_pool') and print(*__import__('sys').modules, flush=True) or []"

class Watched(ProcessPoolExecutor):
    def submit(self, *args):
        return super().submit(eval, LOADED)

workers.ProcessPoolExecutor = Watched
list(pool.decode_films([(0, Path("x"))] * 8, Transform(32), 2))
"""


def test_a_worker_imports_little(tmp_path):
    """Pillow alone in the workers, whatever the main module imports; nor is that module run again."""
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("main module runs") == 1
    assert "mlx_cxr.data.decoding" in result.stdout
    loaded = set(result.stdout.split())
    assert not loaded & {"numpy", "pandas", "pydantic", "mlx", "mlx.core"}
