"""The optimizer of every training here: AdamW with warm-up and cosine, decay on matrices and kernels only."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_cxr.core.config_schema import FineTuningConfig, TrainingConfig


def make_optimizer(
    *, learning_rate: float, final_learning_rate: float, warmup_fraction: float, weight_decay: float, total_steps: int
) -> optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with linear warm-up and one half period of a cosine.

    Args:
        learning_rate: its peak, reached at the end of the warm-up.
        final_learning_rate: that of the last step.
        warmup_fraction: share of the steps that rise, in [0, 1]; one step at least.
        weight_decay: of weights with more than one dimension; BatchNorm and biases have none.
        total_steps: of the whole training; the rate stays at its last value after them.

    Returns:
        The optimizer; call `init` on it with the trainable parameters.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    peak, last = learning_rate, final_learning_rate

    def schedule(step: mx.array) -> mx.array:
        rising = peak * (step + 1) / warmup
        done = mx.minimum((step + 1 - warmup) / max(total_steps - warmup, 1), 1.0)
        falling = last + 0.5 * (peak - last) * (1 + mx.cos(math.pi * done))
        return mx.where(step < warmup, rising, falling)

    decayed = optim.AdamW(schedule, weight_decay=weight_decay, bias_correction=True)
    plain = optim.AdamW(schedule, weight_decay=0.0, bias_correction=True)
    return optim.MultiOptimizer([decayed, plain], [lambda _, weight: weight.ndim > 1])


def optimizer_of(model: nn.Module, training: TrainingConfig | FineTuningConfig, total_steps: int) -> optim.Optimizer:
    """`make_optimizer` with a configuration's rates, initialized with the model's trainable parameters."""
    names = ("learning_rate", "final_learning_rate", "warmup_fraction", "weight_decay")
    optimizer = make_optimizer(**{name: getattr(training, name) for name in names}, total_steps=total_steps)
    optimizer.init(model.trainable_parameters())
    return optimizer
