"""Time and memory of the teacher's LoRA step and scoring batch, at a given size and with random weights.

Neither depends on the values of the weights, so this tells whether a machine can fine-tune LFM2.5-VL-1.6B before 3 GB
are fetched.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr.bench.contenders import Row
from mlx_cxr.bench.timing import summary
from mlx_cxr.core import device
from mlx_cxr.core.config_schema import TeacherConfig, TinyTeacherConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.teacher.architecture import full_config, tiny_config
from mlx_cxr.teacher.base_model import parameter_count
from mlx_cxr.teacher.fine_tuning import accumulating_step
from mlx_cxr.teacher.lora import adapter_parameters, attach_lora
from mlx_cxr.teacher.memory import Decoder, MemoryEstimate, adapted_widths, scoring_estimate, training_estimate
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.tiny import new_model
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.optimizer import optimizer_of

SECTION = "teacher"
_ROUNDS = {"tiny": 10, "full": 1}
_YES, _NO, _FIRST_WORD = 501, 502, 503
_GROUP = 64


def measure(
    size: Literal["full", "tiny"], config: TeacherConfig, tokens: int, seed: int = 0, bits: Literal[4, 8] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Time the LoRA step and the scoring batch, a row for each, with the figures that they are from.

    Of the tiny size ten rounds after one that compiles; of the full size one, compiling included.

    Args:
        size: `full` for LFM2.5-VL-1.6B, `tiny` for the base that `make_tiny_teacher` makes.
        config: batch sizes, adapters and precision.
        tokens: length of each prompt; at least 14.
        seed: of the weights and the prompts.
        bits: quantize the base's linear layers and embedding (groups of 64), as its 4- and 8-bit copies are.

    Returns:
        The rows, and `time_and_memory`.
    """
    rounds = _ROUNDS[size]
    figures = time_and_memory(size, config, tokens, seed, rounds, bits)
    rows = []
    for part, name in (("training", "LoRA step"), ("scoring", "scoring")):
        entry = figures[part]
        memory = f"peak {entry['peak_bytes'] / 1e9:.2f} GB, estimate {entry['estimate_bytes'] / 1e9:.2f} GB"
        once = "" if rounds > 1 else "; once, compiling included"
        rows.append(
            Row(
                SECTION,
                f"{name}, {size} teacher" + (f", {bits} bits" if bits else ""),
                "mlx",
                device.device_kind(),
                figures["precision"],
                entry["shape"][0],
                "timed",
                note=f"{tokens} tokens a study; {memory}{once}",
                timing=summary(entry["seconds"], int(rounds > 1)),
            )
        )
    return rows, figures


def time_and_memory(
    size: Literal["full", "tiny"],
    config: TeacherConfig,
    tokens: int,
    seed: int,
    rounds: int,
    bits: Literal[4, 8] | None,
) -> dict[str, Any]:
    """Time and memory of a text teacher; arguments as `measure`, and `rounds`, before which one compiles if several.

    Returns:
        `parameters` (`language`, `vision`, `trainable`), `precision`, `bits`, and `training` and `scoring`, each with
        `shape` (studies, tokens), `logits` (its shape), `seconds` of each round, `peak_bytes` (of MLX, above those
        held before), `estimate_bytes`, their ratio `estimate_over_peak`, and the same without the weights,
        `activations_over_peak`.
    """
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()

    # A base with random weights and fresh adapters; the vision tower is counted without being made.
    settings = full_config() if size == "full" else tiny_config(config.tiny or TinyTeacherConfig(), 2048)
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if device.device_kind() == "cpu" else "bfloat16"
    model = new_model(settings, seed, getattr(mx, precision), vision=False)
    parameters = {
        "language": parameter_count(model),
        "vision": sum(
            value.size
            for name, value in tree_flatten(new_model(settings, 0, made=False).parameters())
            if not name.startswith("language_model.")
        ),
    }
    language = model.language_model
    if bits is not None:
        nn.quantize(language, group_size=_GROUP, bits=bits)
        mx.eval(model.parameters())
    widths = adapted_widths(model, attach_lora(model, config.lora, seed))
    decoder = Decoder.of(model)
    parameters["trainable"] = adapter_parameters(model)
    rng = np.random.default_rng(seed)

    def batch(studies: int) -> tuple[mx.array, mx.array]:
        ids = rng.integers(_FIRST_WORD, settings["text_config"]["vocab_size"], (studies, tokens))
        read = np.tile(np.arange(tokens - len(LABELS), tokens), (studies, 1))
        return mx.array(ids.astype(np.int32)), mx.array(read.astype(np.int32))

    # The LoRA step.
    optimizer = optimizer_of(model, config.training.model_copy(update={"weight_decay": 0.0}), 1)
    mx.eval(model.state, optimizer.state)
    form = PromptFormat((), (), (), ((),) * len(LABELS), LABELS, _YES, _NO, -1, tokens, None)
    step = accumulating_step(model, form, optimizer, masked_bce(), config, arrays=3)
    studies = config.training.batch_size
    ids, read = batch(studies)
    model.train()

    def train_once() -> float:
        with batch_parallel(rows=studies):
            loss, _ = step(ids, read, mx.zeros((studies, len(LABELS))))
            mx.eval(loss, model.trainable_parameters(), optimizer.state)
        return loss.item()

    loss, trained = _measured(train_once, rounds, held, training_estimate(decoder, widths, config, tokens, precision))

    # The scoring batch.
    model.eval()
    direction = answer_direction(language, _YES, _NO)
    scored_ids, scored_read = batch(config.batch_size)

    def score_once() -> list[int]:
        with batch_parallel(rows=config.batch_size):
            logits = finding_logits(language, language.model.embed_tokens(scored_ids), scored_read, direction)
            mx.eval(logits)
        return list(logits.shape)

    shape, scored = _measured(score_once, rounds, held, scoring_estimate(decoder, config, tokens, precision))
    return {
        "size": size,
        "parameters": parameters,
        "precision": precision,
        "bits": bits,
        "training": {"shape": [studies, tokens], "logits": [studies, len(LABELS)], "loss": loss, **trained},
        "scoring": {"shape": [config.batch_size, tokens], "logits": shape, **scored},
    }


def _measured(once: Callable[[], Any], rounds: int, held: int, estimate: MemoryEstimate) -> tuple[Any, dict[str, Any]]:
    """The first call's result, with the times of the last `rounds` calls and the peak of all."""
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds, results = [], []
    for _ in range(rounds + (rounds > 1)):
        started = time.perf_counter()
        results.append(once())
        seconds.append(time.perf_counter() - started)
    peak = mx.get_peak_memory() - held
    return results[0], {
        "seconds": seconds[-rounds:],
        "peak_bytes": peak,
        "estimate_bytes": estimate.total,
        "estimate_over_peak": estimate.total / peak,
        "activations_over_peak": (estimate.total - estimate.weights) / max(peak - estimate.weights, 1),
    }
