"""The memory estimate: monotone, near MLX's own peak, and a refusal names a setting that fits."""

from __future__ import annotations

import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from toy_teacher import opened, quantized_copy

from mlx_cxr.core.config_schema import FineTuningConfig, LoraConfig, TeacherConfig, TinyTeacherConfig
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.teacher.architecture import tiny_config
from mlx_cxr.teacher.fine_tuning import accumulating_step
from mlx_cxr.teacher.lora import attach_lora, target_layers
from mlx_cxr.teacher.memory import (
    Decoder,
    MemoryEstimate,
    MemoryLimitError,
    adapted_widths,
    check_training_fits,
    memory_limit,
    scoring_estimate,
    training_estimate,
)
from mlx_cxr.teacher.tiny import new_model
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.optimizer import make_optimizer

PUBLISHED = Decoder(
    attention=tuple(i in (2, 5, 8, 10, 12, 14) for i in range(16)),
    hidden=2048,
    inner=8192,
    keys=512,
    heads=32,
    weight_bytes=int(2.3e9),
)
WIDTHS = [(2048, 8192), (8192, 2048)] * 16


def config(
    limit: float | None = None, rank: int = 8, dropout: float = 0.1, scoring: int = 8, **training: object
) -> TeacherConfig:
    return TeacherConfig(
        memory_limit_gb=limit,
        batch_size=scoring,
        lora=LoraConfig(rank=rank, dropout=dropout),
        training=FineTuningConfig(**training),
    )


def total(settings: TeacherConfig, longest: int = 512, precision: str = "bfloat16") -> int:
    return training_estimate(PUBLISHED, WIDTHS, settings, longest, precision).total


def test_more_of_anything_takes_more():
    plain = total(config())
    assert total(config(batch_size=8)) > plain
    assert total(config(), longest=600) > plain
    assert total(config(), longest=513) > plain
    assert total(config(), longest=510) == plain, "the same bucket"
    assert total(config(rank=16)) > plain
    assert total(config(), precision="float32") > plain
    assert total(config(dropout=0.0)) < plain
    assert total(config(gradient_checkpointing=True)) < plain
    assert total(config(accumulate=64)) == plain, "one pass is in memory at a time"
    sizes = [total(config(batch_size=size)) for size in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes)
    scoring = [scoring_estimate(PUBLISHED, config(scoring=n), 512, "bfloat16").total for n in (1, 4, 16)]
    assert scoring == sorted(scoring)
    assert scoring[0] < total(config(batch_size=1)), "nothing is kept for a backward pass"


def test_adapters_are_counted_five_times_in_float32():
    estimate = training_estimate(PUBLISHED, [(10, 20), (30, 40)], config(rank=3), 512, "bfloat16")
    assert estimate.adapters == 5 * 4 * 3 * (10 + 20 + 30 + 40)
    assert estimate.weights == PUBLISHED.weight_bytes
    assert str(MemoryEstimate(10**9, 2 * 10**9, 3 * 10**9)) == (
        "6.00 GB (weights 1.00, adapters and optimizer 2.00, activations 3.00)"
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_a_refusal_names_settings_that_then_fit_and_keep_the_step(precision, batch_size):
    settings = config(batch_size=batch_size, accumulate=4)
    whole = total(settings, precision=precision)
    least = total(config(batch_size=1, gradient_checkpointing=True), precision=precision)
    for share in np.linspace(0.02, 0.98, 12):
        limit = (least + share * (whole - least)) / 1e9
        tight = settings.model_copy(update={"memory_limit_gb": limit})
        with pytest.raises(MemoryLimitError) as raised:
            check_training_fits(PUBLISHED, WIDTHS, tight, 512, precision)
        message = str(raised.value)
        named = dict(re.findall(r"--set teacher\.(\S+)=(\S+)", message))
        assert named, message
        training = {key.removeprefix("training."): value for key, value in named.items()}
        values = {key: value == "true" or (value.isdigit() and int(value)) for key, value in training.items()}
        chosen = tight.training.model_copy(update=values)
        fitting = tight.model_copy(update={"training": chosen})
        estimate = check_training_fits(PUBLISHED, WIDTHS, fitting, 512, precision)
        assert f"would take {estimate}" in message
        studies = settings.training.batch_size * settings.training.accumulate
        assert chosen.batch_size * chosen.accumulate == pytest.approx(studies, abs=chosen.batch_size - 1)


def test_what_cannot_fit_says_so_and_what_fits_is_let_through():
    with pytest.raises(MemoryLimitError, match=r"even one study at a time.*4-bit copy.*teacher.max_tokens"):
        check_training_fits(PUBLISHED, WIDTHS, config(limit=1.0), 512, "bfloat16")
    estimate = check_training_fits(PUBLISHED, WIDTHS, config(limit=1000.0), 512, "bfloat16")
    assert estimate.total == total(config())
    assert memory_limit(config(limit=1.5)) == 1_500_000_000
    assert 0 < memory_limit(config()) < 10**13


def test_the_decoders_numbers_are_read_from_the_model(toy, tmp_path):
    base = opened(toy.base)
    decoder = Decoder.of(base.model)
    assert (decoder.attention, decoder.hidden, decoder.inner) == ((False, True), 64, 192)
    assert (decoder.keys, decoder.heads) == (32, 2)
    vision = sum(
        array.nbytes
        for name, array in mx.load(str(toy.base / "model.safetensors")).items()
        if not name.startswith("language_model")
    )
    assert decoder.weight_bytes == 4 * base.parameters - vision
    names = target_layers(base.model, LoraConfig())
    widths = adapted_widths(base.model, names)
    assert widths[:2] == [(64, 192), (64, 64)]
    attach_lora(base.model, LoraConfig(), 0)
    assert Decoder.of(base.model) == decoder, "adapters are counted apart"
    assert adapted_widths(base.model, names) == widths
    quantized = opened(quantized_copy(tmp_path / "q", toy.base, 4))
    smaller = Decoder.of(quantized.model)
    assert smaller.weight_bytes < 0.25 * decoder.weight_bytes
    assert (smaller.inner, smaller.hidden) == (192, 64)
    assert adapted_widths(quantized.model, names) == widths


def measured_and_estimated(settings: TeacherConfig, length: int) -> tuple[int, int]:
    """MLX's peak over two steps on a model of width 256 with 6 layers, and the estimate."""
    model = new_model(tiny_config(TinyTeacherConfig(hidden_size=256, layers=6), 2000), 0, vision=False)
    widths = adapted_widths(model, target_layers(model, settings.lora))
    estimate = training_estimate(Decoder.of(model), widths, settings, length, "float32").total
    attach_lora(model, settings.lora, 0)
    form = SimpleNamespace(yes=7, no=9, head=(), shared=lambda _: 0)
    optimizer = make_optimizer(
        learning_rate=1e-3, final_learning_rate=1e-3, warmup_fraction=0, weight_decay=0, total_steps=4
    )
    optimizer.init(model.trainable_parameters())
    step = accumulating_step(model, form, optimizer, masked_bce(), settings, arrays=3)
    rng = np.random.default_rng(0)
    size, passes = settings.training.batch_size, settings.training.accumulate
    batch = []
    for _ in range(passes):
        batch += [
            mx.array(rng.integers(500, 2000, (size, length)).astype(np.int32)),
            mx.array(np.sort(rng.integers(0, length, (size, 14))).astype(np.int32)),
            mx.array(rng.integers(0, 2, (size, 14)).astype(np.float32)),
        ]
    model.train()
    mx.eval(batch, model.state, optimizer.state)
    mx.clear_cache()
    held = mx.get_active_memory() - sum(a.nbytes for a in batch)
    mx.reset_peak_memory()
    for _ in range(2):
        mx.eval(*step(*batch), model.state, optimizer.state)
    known = Decoder.of(model).weight_bytes
    # What this process held before is not the model's.
    adapters = sum(4 * 3 * settings.lora.rank * (a + b) for a, b in widths)
    return mx.get_peak_memory() - max(0, held - known - adapters), estimate


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        pytest.param(config(batch_size=2, accumulate=2, dropout=0.0), 256, id="kept"),
        pytest.param(config(batch_size=2, accumulate=2, dropout=0.1), 256, id="kept-dropout"),
        pytest.param(config(batch_size=1, accumulate=2), 512, id="kept-long"),
        pytest.param(config(batch_size=4, accumulate=2, gradient_checkpointing=True), 256, id="recomputed"),
        pytest.param(config(batch_size=2, accumulate=2, gradient_checkpointing=True), 512, id="recomputed-long"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_estimate_is_near_mlx_peak(settings, length, parts):
    with batch_parallel(parts, rows=settings.training.batch_size):
        measured, estimated = measured_and_estimated(settings, length)
    assert estimated == pytest.approx(measured, rel=0.2)
