"""Logits of many images, in evaluation mode and fixed shapes, and the validation that the loop asks for."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cxr.core.labels import SCORING_PROTOCOLS
from mlx_cxr.evaluation.metrics import both_classes, macro_auc, roc_auc_per_label
from mlx_cxr.models.folded import FoldedResNet18, evaluated
from mlx_cxr.models.resnet import ResNet18, preprocess
from mlx_cxr.training.batches import ImageSource
from mlx_cxr.training.distributed import ALONE, World
from mlx_cxr.training.loop import TrainingDataError, TrainingDivergedError


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


def validation(
    score: Callable[[nn.Module], np.ndarray], raw_labels: np.ndarray, unit: str, rate: str, undefined: str
) -> Callable[[nn.Module], dict[str, float]]:
    """Make `Task.validate`: loss and macro AUC of a split, -1 and empty counted as 0.

    Args:
        score: the model's float32 logits (N, 14).
        raw_labels: float32 (N, 14), 1 / 0 / -1 / NaN.
        unit: name of the rows, for a message.
        rate: name of the learning rate, likewise.
        undefined: message where no label has both classes.

    Raises:
        TrainingDataError: no label has both classes, so no epoch could be told from another.
    """
    targets = SCORING_PROTOCOLS["empty_negative"].apply(raw_labels)
    if not both_classes(targets).any():
        raise TrainingDataError(undefined)

    def validate(model: nn.Module) -> dict[str, float]:
        logits = score(model)
        if not np.isfinite(logits).all():
            raise TrainingDivergedError(
                f"logits of validation {unit} are not finite; lower {rate}. "
                "The last saved state and the best weights so far are kept"
            )
        loss = float(np.mean(np.logaddexp(0, logits) - targets * logits))
        return {"loss": loss, "macro_auc": macro_auc(roc_auc_per_label(targets, logits))}

    return validate
