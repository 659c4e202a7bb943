"""Time that counts the work."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_cxr.core.files import read_record
from mlx_cxr.inference import cost
from mlx_cxr.inference.cost import milliseconds_per_sample, write_cost


def test_the_clock_runs_while_the_work_is_done_and_not_in_the_warm_up(monkeypatch, tmp_path):
    """MLX is lazy: only evaluation costs time, here 3 s to begin with and then 0.5, 0.1, 0.5, 0.1 …"""
    now, costs = [0.0], iter([3.0] + [0.5, 0.1, 0.5] * 10)

    def evaluate(array: mx.array) -> None:
        now[0] += next(costs)

    monkeypatch.setattr(cost.mx, "eval", evaluate)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    per_sample, samples = milliseconds_per_sample(lambda: mx.zeros(1), 8, seconds=2.0)
    # 0.5 + 0.1 + 0.5 + 0.5 + 0.1 + 0.5 = 2.2 s: six rounds, whose median is 0.5 s.
    assert samples == 6 * 8
    assert per_sample == pytest.approx(1000 * 0.5 / 8)
    _, samples = milliseconds_per_sample(lambda: mx.zeros(1), 8, seconds=0.0)
    assert samples == 3 * 8

    counts, device = {"total": 5, "trainable": 2}, {"kind": "cpu"}
    write_cost(
        tmp_path, parameters=counts, ms_per_sample=62.5, samples=48, batch_size=8, what="one film", device=device
    )
    assert read_record(tmp_path / "cost.json") == {
        "schema": 1,
        "parameters": counts,
        "ms_per_sample": 62.5,
        "samples": 48,
        "batch_size": 8,
        "what": "one film",
        "device": device,
    }
