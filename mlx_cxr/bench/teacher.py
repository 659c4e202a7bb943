"""Time and memory of the teacher's LoRA step and scoring batch, of a given size, with random weights.

The arithmetic and the memory of a model do not depend on what its weights say, so this tells whether a machine can
fine-tune LFM2.5-VL-1.6B before 3 GB are fetched.
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
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.memory import Decoder, MemoryEstimate, adapted_widths, scoring_estimate, training_estimate
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.tiny import new_model
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.optimizer import make_optimizer

SECTION = "teacher"
_ROUNDS = {"tiny": 10, "full": 1}


def measure(
    size: Literal["full", "tiny"], config: TeacherConfig, tokens: int, seed: int = 0, bits: Literal[4, 8] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """A row for the LoRA step and one for scoring, and the figures they are from (`time_and_memory`).

    Of the tiny size ten steps after one that compiles; of the full size one, compiling included.

    Args:
        size: `full` or `tiny`.
        config: batch sizes, adapters and precision.
        tokens: length of each prompt.
        seed: of the weights.
        bits: of a quantized base.
    """
    rounds = _ROUNDS[size]
    figures = time_and_memory(size, config, tokens, seed, rounds, bits)
    rows = []
    for what, name in (("training", "LoRA step"), ("scoring", "scoring")):
        entry = figures[what]
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


_PRECISIONS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_YES, _NO, _FIRST_WORD = 501, 502, 503
_GROUP = 64


def time_and_memory(
    size: Literal["full", "tiny"],
    config: TeacherConfig,
    tokens: int,
    seed: int,
    rounds: int = 1,
    bits: Literal[4, 8] | None = None,
) -> dict[str, Any]:
    """Time and memory of a text teacher.

    Args:
        size: `full` for LFM2.5-VL-1.6B, `tiny` for what `make_tiny_teacher` makes.
        config: batch sizes, adapters and precision.
        tokens: length of each prompt; at least 14.
        seed: of the weights and the prompts.
        rounds: steps and batches that are timed. With more than one there is one before them that is not, in which
            the step is compiled.
        bits: quantize the base's linear layers and embedding (groups of 64), as its 4- and 8-bit copies are.

    Returns:
        `parameters` (`language`, `vision`, `trainable`), `precision`, `bits`, and `training` and `scoring`, each with
        `shape` (studies, tokens), `logits` (its shape), `seconds` of each round, `peak_bytes` (of MLX, above what was
        held before), `estimate_bytes`, their ratio `estimate_over_peak`, and the same without the weights,
        `activations_over_peak`.
    """
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    settings = full_config() if size == "full" else tiny_config(config.tiny or TinyTeacherConfig(), 2048)
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if device.device_kind() == "cpu" else "bfloat16"
    model = new_model(settings, seed, _PRECISIONS[precision], vision=False)
    vision = vision_parameters(settings)
    language = model.language_model
    parameters = parameter_count(model)
    if bits is not None:
        nn.quantize(language, group_size=_GROUP, bits=bits)
        mx.eval(model.parameters())
    names = attach_lora(model, config.lora, seed)
    decoder, widths = Decoder.of(model), adapted_widths(model, names)
    optimizer = make_optimizer(
        learning_rate=config.training.learning_rate,
        final_learning_rate=config.training.final_learning_rate,
        warmup_fraction=0.0,
        weight_decay=0.0,
        total_steps=1,
    )
    optimizer.init(model.trainable_parameters())
    mx.eval(model.state, optimizer.state)
    form = PromptFormat((), (), (), ((),) * len(LABELS), LABELS, _YES, _NO, -1, tokens, None)
    step = accumulating_step(model, form, optimizer, masked_bce(), config, arrays=3)
    rng = np.random.default_rng(seed)

    def batch(studies: int) -> tuple[mx.array, mx.array]:
        ids = rng.integers(_FIRST_WORD, settings["text_config"]["vocab_size"], (studies, tokens))
        read = np.tile(np.arange(tokens - len(LABELS), tokens), (studies, 1))
        return mx.array(ids.astype(np.int32)), mx.array(read.astype(np.int32))

    studies = config.training.batch_size
    ids, read = batch(studies)
    model.train()

    def train_once() -> float:
        with batch_parallel(rows=studies):
            loss, _ = step(ids, read, mx.zeros((studies, len(LABELS))))
            mx.eval(loss, model.trainable_parameters(), optimizer.state)
        return loss.item()

    loss, trained = _measured(train_once, rounds, held, training_estimate(decoder, widths, config, tokens, precision))
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
        "parameters": {
            "language": parameters,
            "vision": vision,
            "trainable": sum(value.size for _, value in tree_flatten(model.trainable_parameters())),
        },
        "precision": precision,
        "bits": bits,
        "training": {"shape": [studies, tokens], "logits": [studies, len(LABELS)], "loss": loss, **trained},
        "scoring": {"shape": [config.batch_size, tokens], "logits": shape, **scored},
    }


def vision_parameters(settings: dict[str, Any]) -> int:
    """Weights of the vision tower and the projector of a configuration, counted without being made."""
    model = new_model(settings, 0, made=False)
    return sum(value.size for name, value in tree_flatten(model.parameters()) if not name.startswith("language_model."))


def _measured(once: Callable[[], Any], rounds: int, held: int, estimate: MemoryEstimate) -> tuple[Any, dict[str, Any]]:
    """What the first call gave, and the times and peak of all."""
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
