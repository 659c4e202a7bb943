"""One LoRA step and one scoring batch of a teacher of a given size, with random weights: time, memory, shapes.

The arithmetic and the memory of a model do not depend on what its weights say, so this tells whether a machine can
fine-tune LFM2.5-VL-1.6B before 3 GB are fetched.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_cxr import runtime
from mlx_cxr.config_sections import TeacherConfig, TinyTeacherConfig
from mlx_cxr.labels import LABELS
from mlx_cxr.teacher.architecture import full_config, tiny_config
from mlx_cxr.teacher.base import parameter_count
from mlx_cxr.teacher.fine_tuning import accumulating_step
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.memory import Decoder, MemoryEstimate, adapted_widths, scoring_estimate, training_estimate
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.tiny import new_model
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.optimizer import make_optimizer

_PRECISIONS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_YES, _NO, _FIRST_WORD = 501, 502, 503


def measure(size: Literal["full", "tiny"], config: TeacherConfig, tokens: int, seed: int) -> dict[str, Any]:
    """Time and memory of a text teacher.

    Args:
        size: `full` for LFM2.5-VL-1.6B, `tiny` for what `make_tiny_teacher` makes.
        config: batch sizes, adapters and precision.
        tokens: length of each prompt; at least 14.
        seed: of the weights and the prompts.

    Returns:
        `parameters` (`language`, `vision`, `trainable`), `precision`, and `training` and `scoring`, each with `shape`
        (studies, tokens), `logits` (its shape), `seconds`, `peak_bytes`, `estimate_bytes`, their ratio
        `estimate_over_peak`, and the same without the weights, `activations_over_peak`.
    """
    settings = full_config() if size == "full" else tiny_config(config.tiny or TinyTeacherConfig(), 2048)
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if runtime.device_kind() == "cpu" else "bfloat16"
    model = new_model(settings, seed, _PRECISIONS[precision], vision=False)
    vision = vision_parameters(settings)
    language = model.language_model
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
    started = _fresh_peak()
    loss, _ = step(ids, read, mx.zeros((studies, len(LABELS))))
    mx.eval(loss, model.trainable_parameters())
    trained = _measured(started, training_estimate(decoder, widths, config, tokens, precision))
    model.eval()
    ids, read = batch(config.batch_size)
    direction = answer_direction(language, _YES, _NO)
    started = _fresh_peak()
    logits = finding_logits(language, language.model.embed_tokens(ids), read, direction)
    mx.eval(logits)
    scored = _measured(started, scoring_estimate(decoder, config, tokens, precision))
    return {
        "size": size,
        "parameters": {
            "language": parameter_count(model),
            "vision": vision,
            "trainable": sum(value.size for _, value in tree_flatten(model.trainable_parameters())),
        },
        "precision": precision,
        "training": {"shape": [studies, tokens], "logits": [studies, len(LABELS)], "loss": loss.item(), **trained},
        "scoring": {"shape": [config.batch_size, tokens], "logits": list(logits.shape), **scored},
    }


def vision_parameters(settings: dict[str, Any]) -> int:
    """Weights of the vision tower and the projector of a configuration, counted without being made."""
    model = new_model(settings, 0, made=False)
    return sum(value.size for name, value in tree_flatten(model.parameters()) if not name.startswith("language_model."))


def _fresh_peak() -> float:
    mx.clear_cache()
    mx.reset_peak_memory()
    return time.perf_counter()


def _measured(started: float, estimate: MemoryEstimate) -> dict[str, Any]:
    seconds, peak = time.perf_counter() - started, mx.get_peak_memory()
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "estimate_bytes": estimate.total,
        "estimate_over_peak": estimate.total / peak,
        "activations_over_peak": (estimate.total - estimate.weights) / max(peak - estimate.weights, 1),
    }
