"""Logits of many films, in evaluation mode and fixed shapes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.training.batches import FilmSource


def compiled_forward(model: ResNet18) -> Callable[[mx.array], mx.array]:
    """Films (B, S, S) as the pixel store has them -> float32 logits (B, 14), by the model's weights of the moment.

    The mode that the model is in at the first call stays.
    """

    def forward(films: mx.array) -> mx.array:
        return model(preprocess(films, model.config.in_channels)).astype(mx.float32)

    return mx.compile(forward, inputs=model.state)


def predict_logits(model: ResNet18, source: FilmSource, batch_size: int) -> np.ndarray:
    """Score every film of a source.

    Args:
        model: put into evaluation mode for the call, and back into the mode it was in.
        source: the films.
        batch_size: films per forward pass; the last batch is filled up with repeats, so that the graph is built once.

    Returns:
        float32 (len(source), 14), in the source's order.
    """
    was_training = model.training
    model.eval()
    forward = compiled_forward(model)
    items = np.arange(len(source))
    starts = range(0, len(source), batch_size)
    filled = [np.resize(items[i : i + batch_size], min(batch_size, len(items))) for i in starts]
    logits = []
    try:
        for films in source.batches(filled):
            logits.append(np.array(forward(films)))
    finally:
        model.train(was_training)
    if not logits:
        return np.zeros((0, 14), dtype=np.float32)
    return np.concatenate([rows[: len(items[i : i + batch_size])] for rows, i in zip(logits, starts, strict=True)])
