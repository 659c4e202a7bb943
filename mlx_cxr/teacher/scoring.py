"""Answers for many studies, and the work divided among ranks.

Batches hold prompts of like length and are compiled once per shape; the answers come in the order that was asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cxr.core.config_schema import TeacherConfig
from mlx_cxr.ops.activations import compiled
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.prompt import Prompt, PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, answers, finding_states
from mlx_cxr.training.distributed import World

Put = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Takes the rows (M,) of a batch, their logits (M, 14) and features (M, H)."""


@dataclass(frozen=True)
class Answers:
    """A teacher's answers for some studies.

    Attributes:
        logits: float32 (N, 14), in the order of `LABELS`.
        features: float16 (N, H), mean of the normed states that the answers are read from.
        tokens: read, without padding.
        seconds: median time of a batch times the number of batches, the first of each shape (compiled then) left out.
    """

    logits: np.ndarray
    features: np.ndarray
    tokens: int
    seconds: float


def prompt_embeddings(
    language_model: nn.Module, form: PromptFormat, ids: mx.array, image: mx.array | None = None
) -> mx.array:
    """(B, L, H): token embeddings, with the image's in the place of its tokens.

    Args:
        form: says where the image's tokens stand: at the same place in every prompt.
        ids: int (B, L).
        image: (B, T, H), or None.
    """
    embeddings = language_model.model.embed_tokens(ids)
    if image is None:
        return embeddings
    start = len(form.head) + 1
    stop = start + image.shape[1]
    return mx.concatenate([embeddings[:, :start], image.astype(embeddings.dtype), embeddings[:, stop:]], axis=1)


def score(
    base: Base,
    form: PromptFormat,
    prompts: Sequence[Prompt],
    images: np.ndarray | None,
    config: TeacherConfig,
    done: Put | None = None,
    todo: np.ndarray | None = None,
) -> Answers:
    """Score studies, the longest first, so that what does not fit in memory fails at once.

    Args:
        base: the model, with or without adapters; left in the mode that it was in.
        images: float16 (N, T, H), or None.
        config: `batch_size` and `training.bucket` are used.
        done: called after each batch, as for a cache.
        todo: bool (N,), the studies that are still to be answered; batches with none of them are left out, and have
            NaN for logits and features. The batches are the same ones whatever is done, so that the answers are too.
    """
    language = base.model.language_model
    was_training = base.model.training
    base.model.eval()
    direction = answer_direction(language, form.yes, form.no)

    def forward(ids: mx.array, read: mx.array, *image: mx.array) -> tuple[mx.array, mx.array]:
        embeddings = prompt_embeddings(language, form, ids, *image)
        states = finding_states(language, embeddings, read, shared=form.shared(len(ids)))
        return answers(states, direction), mx.mean(states.astype(mx.float32), axis=1)

    answered = compiled(forward, inputs=base.model.state)
    order = _longest_first(prompts)
    logits = np.full((len(prompts), 14), np.nan, dtype=np.float32)
    features = np.full((len(prompts), base.hidden_size), np.nan, dtype=np.float16)
    seen: set[tuple[int, ...]] = set()
    times: list[float] = []
    tokens = 0
    try:
        with batch_parallel(rows=config.batch_size):
            for start in range(0, len(order), config.batch_size):
                rows = order[start : start + config.batch_size]
                if todo is not None and not todo[rows].any():
                    continue
                batch = padded([prompts[i] for i in rows], config.training.bucket)
                image = () if images is None else (mx.array(images[rows]),)
                # The first batch of a shape compiles, and is not timed.
                begun = time.perf_counter()
                answer, feature = answered(mx.array(batch.ids), mx.array(batch.read), *image)
                mx.eval(answer, feature)
                if batch.ids.shape in seen:
                    times.append((time.perf_counter() - begun) / len(rows))
                seen.add(batch.ids.shape)
                logits[rows], features[rows] = np.array(answer), np.array(feature).astype(np.float16)
                tokens += batch.tokens
                if done is not None:
                    done(rows, logits[rows], features[rows])
    finally:
        base.model.train(was_training)
    return Answers(logits, features, tokens, float(np.median(times)) * len(prompts) if times else float("nan"))


def own_rows(prompts: Sequence[Prompt], batch_size: int, world: World) -> np.ndarray:
    """bool (N,): the studies that this rank answers, in whole batches of `score`; each study is one rank's.

    The batches go to the ranks in turn, so that all of them have prompts of all lengths.
    """
    mine = np.zeros(len(prompts), dtype=bool)
    mine[_longest_first(prompts)] = np.arange(len(prompts)) // batch_size % world.size == world.rank
    return mine


def shared_score(
    base: Base,
    form: PromptFormat,
    prompts: Sequence[Prompt],
    images: np.ndarray | None,
    config: TeacherConfig,
    world: World,
) -> Answers:
    """Score studies with the work divided among the ranks; every one of them has all the answers.

    `seconds` is what one rank would take, by this rank's batches; NaN where it had none.
    """
    if world.size == 1:
        return score(base, form, prompts, images, config)
    mine = own_rows(prompts, config.batch_size, world)
    answers = score(base, form, prompts, images, config, todo=mine)
    return replace(
        answers,
        logits=world.rows_of_all(answers.logits, mine),
        features=world.rows_of_all(answers.features, mine),
        tokens=sum(len(prompt.ids) for prompt in prompts),
    )


class Collector:
    """Gathers the batches of all ranks on rank 0: `score`'s `done` on each of them, then `finish`.

    Args:
        put: stores a batch; called on rank 0 alone.
        batch_size: studies in a batch, at most.
        feature_size: H.
        world: the ranks; each collects, also one with nothing to answer.
    """

    def __init__(self, put: Put, batch_size: int, feature_size: int, world: World) -> None:
        self._put, self._world = put, world
        self._rows = np.full(batch_size, -1, dtype=np.int32)
        self._values = np.zeros((batch_size, 14 + feature_size), dtype=np.float32)

    def __call__(self, rows: np.ndarray, logits: np.ndarray, features: np.ndarray) -> None:
        """Hand over a batch; with several ranks this waits until each has one, or has none left."""
        if self._world.size == 1:
            self._put(rows, logits, features)
            return
        own_rows, values = self._rows.copy(), self._values.copy()
        own_rows[: len(rows)] = rows
        values[: len(rows), :14], values[: len(rows), 14:] = logits, features
        self._exchange(own_rows, values)

    def finish(self) -> None:
        """Take the batches that other ranks still have."""
        while self._world.size > 1 and self._exchange(self._rows, self._values):
            pass

    def _exchange(self, rows: np.ndarray, values: np.ndarray) -> bool:
        """Store one batch of each rank; false when none of them had any left."""
        every_rows, every_values = self._world.gather(rows), self._world.gather(values)
        if self._world.writes:
            for rows, values in zip(every_rows, every_values, strict=True):
                if (filled := rows >= 0).any():
                    features = values[filled, 14:].astype(np.float16)
                    self._put(rows[filled].astype(np.int64), values[filled, :14], features)
        return bool((every_rows >= 0).any())


def _longest_first(prompts: Sequence[Prompt]) -> np.ndarray:
    return np.argsort([-len(prompt.ids) for prompt in prompts], kind="stable")
