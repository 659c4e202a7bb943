"""Studies answered by several ranks: all answers to every rank, or batch by batch to the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mlx_cxr.config_sections import TeacherConfig
from mlx_cxr.teacher.base import Base
from mlx_cxr.teacher.prompt import Prompt, PromptFormat
from mlx_cxr.teacher.scoring import Answers, score
from mlx_cxr.training.distributed import World

Put = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Rows (M,), their logits (M, 14) and features (M, H)."""


def own_rows(prompts: Sequence[Prompt], batch_size: int, world: World) -> np.ndarray:
    """bool (N,): the studies that this rank answers; each is one rank's, and whole batches of `score` are.

    The batches, longest first as there, go to the ranks in turn, so that all of them have prompts of all lengths.
    """
    order = np.argsort([-len(prompt.ids) for prompt in prompts], kind="stable")
    mine = np.zeros(len(prompts), dtype=bool)
    mine[order] = np.arange(len(prompts)) // batch_size % world.size == world.rank
    return mine


def shared_score(
    base: Base,
    form: PromptFormat,
    prompts: Sequence[Prompt],
    films: np.ndarray | None,
    config: TeacherConfig,
    world: World,
) -> Answers:
    """As `score`, with the work divided among the ranks; every one of them has all the answers.

    `seconds` is what one rank would take, by this rank's batches; NaN where it had none.
    """
    if world.size == 1:
        return score(base, form, prompts, films, config)
    mine = own_rows(prompts, config.batch_size, world)
    answers = score(base, form, prompts, films, config, todo=mine)
    return replace(
        answers,
        logits=world.rows_of_all(answers.logits, mine),
        features=world.rows_of_all(answers.features, mine),
        tokens=sum(len(prompt.ids) for prompt in prompts),
    )


class Collector:
    """What `score` is to call after each batch, so that rank 0 gets the batches of all ranks; `finish` at the end.

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
        """Hand over a batch; on several ranks this waits until each has one, or has none left."""
        if self._world.size == 1:
            self._put(rows, logits, features)
            return
        own_rows, values = self._rows.copy(), self._values.copy()
        own_rows[: len(rows)] = rows
        values[: len(rows), :14], values[: len(rows), 14:] = logits, features
        self._exchange(own_rows, values)

    def finish(self) -> None:
        """Take what the others still have."""
        while self._world.size > 1 and self._exchange(self._rows, self._values):
            pass

    def _exchange(self, rows: np.ndarray, values: np.ndarray) -> bool:
        """Whether any rank had something."""
        every_rows, every_values = self._world.gather(rows), self._world.gather(values)
        if self._world.writes:
            for rows, values in zip(every_rows, every_values, strict=True):
                filled = rows >= 0
                if filled.any():
                    logits, features = values[filled, :14], values[filled, 14:].astype(np.float16)
                    self._put(rows[filled].astype(np.int64), logits, features)
        return bool((every_rows >= 0).any())
