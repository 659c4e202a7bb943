"""A complete small checkpoint of LFM2.5-VL's architecture, for machines without the published one.

It has everything that the published folder has (configuration, tokenizer with the same special tokens and chat
template, image processor, safetensors), so that nothing downstream knows the difference. Its language model is trained
briefly on reports, in the chat's form: the user's turn holds the report up to the impression, the assistant's the
impression. It is never shown a label. Its vision tower stays as initialized: random features, yet of the image.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_cxr.core.config_schema import TinyTeacherConfig
from mlx_cxr.core.files import write_json
from mlx_cxr.core.labels import LABELS
from mlx_cxr.models.weight_files import write_safetensors
from mlx_cxr.ops.activations import compiled, logsumexp
from mlx_cxr.ops.streams import batch_parallel, each, split
from mlx_cxr.teacher.architecture import PAD, image_processor_config, tiny_config
from mlx_cxr.teacher.decoder import decode
from mlx_cxr.teacher.prompt import ANSWERS, INSTRUCTION, padded_ids
from mlx_cxr.teacher.tokenizer import write_tokenizer
from mlx_cxr.teacher.without_pytorch import without_pytorch

log = logging.getLogger("mlx_cxr")

_INITIAL_DEVIATION = 0.02


def make_tiny_teacher(
    folder: Path, reports: Sequence[Mapping[str, str]], settings: TinyTeacherConfig, seed: int
) -> dict[str, Any]:
    """Write the checkpoint; `config.json` comes last, so that a folder with one is complete.

    Args:
        folder: gets the files; those of an earlier checkpoint are replaced.
        reports: sections by name of the training split's reports, and of no other's.

    Returns:
        `parameters`, `reports`, `tokens`, `loss` (nats per token, mean over the last epoch), `seconds`.
    """
    with without_pytorch():
        from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    started = time.perf_counter()
    texts = [" ".join(report.values()) for report in reports]
    words = [
        INSTRUCTION,
        *(f"{name}:" for name in LABELS),
        *(f"{name}:{answer}" for name in LABELS for answer in ANSWERS),
    ]
    size = write_tokenizer(folder, [*texts, *words * 20], settings.vocabulary)
    write_json(folder / "preprocessor_config.json", image_processor_config())
    config = tiny_config(settings, size)
    model = new_model(config, seed)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    documents = [ids for report in reports if (ids := _document(tokenizer, report, settings.max_tokens))]
    with batch_parallel(rows=settings.batch_size):
        loss, tokens = train_language_model(model, documents, settings, seed)
    weights = dict(tree_flatten(model.parameters()))
    write_safetensors(folder / "model.safetensors", weights, {"format": "mlx"})
    write_json(folder / "config.json", config)
    return {
        "parameters": sum(weight.size for weight in weights.values()),
        "reports": len(documents),
        "tokens": tokens,
        "loss": loss,
        "seconds": time.perf_counter() - started,
    }


def new_model(
    config: Mapping[str, Any], seed: int, dtype: mx.Dtype = mx.float32, *, vision: bool = True, made: bool = True
) -> nn.Module:
    """A model with random weights: normal with deviation 0.02 as LFM2's `initializer_range`, norms at 1, biases at 0.

    Args:
        config: as `config.json`.
        vision: with the vision tower and the projector.
        made: compute the weights; otherwise only their shapes are of use.
    """
    with without_pytorch():
        from mlx_vlm.models import lfm2_vl

    settings = lfm2_vl.ModelConfig.from_dict(dict(config))
    settings.text_config = lfm2_vl.TextConfig.from_dict(config["text_config"])
    settings.vision_config = lfm2_vl.VisionConfig.from_dict(config["vision_config"])
    model = lfm2_vl.Model(settings)
    if not vision:
        del model.vision_tower, model.multi_modal_projector
    if not made:
        return model
    key = mx.random.key(seed)

    def drawn(name: str, weight: mx.array) -> mx.array:
        nonlocal key
        if weight.ndim < 2:
            fill = mx.ones if "norm" in name and name.endswith("weight") else mx.zeros
            return fill(weight.shape, dtype)
        key, now = mx.random.split(key)
        return (_INITIAL_DEVIATION * mx.random.normal(weight.shape, key=now)).astype(dtype)

    model.update(tree_map_with_path(drawn, model.parameters()))
    mx.eval(model.parameters())
    return model


def train_language_model(
    model: nn.Module, documents: Sequence[Sequence[int]], settings: TinyTeacherConfig, seed: int
) -> tuple[float, int]:
    """Next-token training of the language model on documents sorted into batches of like length.

    Returns:
        (mean loss of the last epoch in nats per token, tokens seen).
    """
    language = model.language_model
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    total = max(1, len(batches) * settings.epochs)
    warmup = max(1, total // 10)

    def schedule(step: mx.array) -> mx.array:
        falling = 0.5 * (1 + mx.cos(math.pi * mx.minimum((step - warmup) / max(1, total - warmup), 1.0)))
        return settings.learning_rate * mx.where(step < warmup, (step + 1) / warmup, falling)

    optimizer = optim.AdamW(schedule, weight_decay=0.01, bias_correction=True)
    optimizer.init(language.trainable_parameters())
    state = [language.state, optimizer.state]

    def objective(ids: mx.array) -> mx.array:
        model = language.model

        def nats(states: mx.array, targets: mx.array) -> mx.array:
            logits = model.embed_tokens.as_linear(model.embedding_norm(states))
            right = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return mx.sum((logsumexp(logits) - right) * (targets != PAD))

        states, targets = decode(model.layers, model.embed_tokens(ids[:, :-1])), ids[:, 1:]
        return sum(each(nats, split(states), split(targets))) / mx.sum(targets != PAD)

    @partial(compiled, inputs=state, outputs=state)
    def step(ids: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(language, objective)(ids)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(language, gradients)
        return loss

    tokens, mean = 0, math.nan
    for epoch in range(settings.epochs):
        rng = np.random.default_rng([seed, epoch])
        sums = [0.0, 0]
        for number in rng.permutation(len(batches)):
            chosen = [documents[i] for i in batches[number]]
            loss = step(mx.array(padded_ids(chosen, 32, PAD)))
            mx.eval(language.state, optimizer.state, loss)
            known = sum(len(ids) - 1 for ids in chosen)
            sums[0] += loss.item() * known
            sums[1] += known
        mean = sums[0] / max(sums[1], 1)
        tokens += sums[1]
        log.info("language model, epoch %d of %d: %.3f nats per token", epoch + 1, settings.epochs, mean)
    return mean, tokens


def _document(tokenizer: Any, report: Mapping[str, str], longest: int) -> list[int]:
    """One report as a chat: everything up to the impression from the user, the impression from the assistant."""
    parts = [f"{name.capitalize()}: {report[name]}\n" for name in ("indication", "findings") if report.get(name)]
    answer = report.get("impression") or report.get("last_paragraph") or ""
    if not parts and not answer:
        return []
    chat = [{"role": "user", "content": "".join(parts)}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)[:longest]
