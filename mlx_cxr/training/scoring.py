"""Logits of many images, in evaluation mode and fixed shapes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_cxr.models.folded import FoldedResNet18, evaluated
from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.distributed import ALONE, World


def image_features(network: FoldedResNet18) -> Callable[[mx.array], mx.array]:
    """Images (B, S, S) as the pixel store has them -> the last feature map, float32 (B, h, w, 512), evaluated."""
    channels = network.config.in_channels
    return evaluated(lambda images: network.features(preprocess(images, channels)).astype(mx.float32))


def image_forward(model: ResNet18) -> Callable[[mx.array], mx.array]:
    """Images (B, S, S) as the pixel store has them -> float32 logits (B, 14), evaluated, by the present weights.

    A ResNet-18 is folded for it (`models.folded`), and scores as in evaluation, whatever mode it is in.
    """
    network = FoldedResNet18.of(model) if isinstance(model, ResNet18) else model
    channels = model.config.in_channels
    return evaluated(lambda images: network(preprocess(images, channels)).astype(mx.float32))


def predict_logits(model: ResNet18, source: ImageSource, batch_size: int, world: World = ALONE) -> np.ndarray:
    """Score every image of a source.

    Args:
        model: put into evaluation mode for the call, and back into the mode it was in.
        source: the images.
        batch_size: images per forward pass; the last batch is filled up with repeats, so that the graph is built once.
        world: the ranks, each of which scores its share of the images.

    Returns:
        float32 (len(source), 14), in the source's order; the same on every rank.
    """
    was_training = model.training
    model.eval()
    forward = image_forward(model)
    items = np.array_split(np.arange(len(source)), world.size)[world.rank]
    starts = range(0, len(items), batch_size)
    filled = [np.resize(items[i : i + batch_size], min(batch_size, len(items))) for i in starts]
    logits = []
    try:
        for images in source.batches(filled):
            logits.append(np.array(forward(images)))
    finally:
        model.train(was_training)
    answers = np.zeros((len(source), 14), dtype=np.float32)
    for rows, i in zip(logits, starts, strict=True):
        chosen = items[i : i + batch_size]
        answers[chosen] = rows[: len(chosen)]
    return world.rows_of_all(answers, np.isin(np.arange(len(source)), items))
