"""Logits of many films, in evaluation mode and fixed shapes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.training.batches import FilmSource


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
    forward = mx.compile(lambda films: model(preprocess(films, model.config.in_channels)), inputs=model.state)
    items = np.arange(len(source))
    starts = range(0, len(source), batch_size)
    filled = [np.resize(items[i : i + batch_size], min(batch_size, len(items))) for i in starts]
    logits = []
    try:
        for films in source.batches(filled):
            logits.append(np.array(forward(films).astype(mx.float32)))
    finally:
        model.train(was_training)
    if not logits:
        return np.zeros((0, 14), dtype=np.float32)
    return np.concatenate([rows[: len(items[i : i + batch_size])] for rows, i in zip(logits, starts, strict=True)])
