"""Explanation targets: any callable from logits (N, 14) to one score per image (N,).

A finding's logit is the usual one; a plain function serves as well. `str(target)` is the name that is recorded. A
target may use an image's own row only, so that the images of a batch cannot influence each other's maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_cxr.core.labels import label_index

Target = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class LabelLogit:
    """The logit of one finding, before any saturating sigmoid; the default of Grad-CAM.

    Raises:
        KeyError: `label` is not one of the 14.
    """

    label: str

    def __post_init__(self) -> None:
        label_index(self.label)

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (N, 14) -> (N,)."""
        return logits[:, label_index(self.label)]

    def __str__(self) -> str:
        return self.label


def as_targets(targets: Iterable[Target | str]) -> tuple[Target, ...]:
    """Targets as callables; the name of a finding stands for its `LabelLogit`.

    Raises:
        KeyError: a name is not one of the 14.
        ValueError: there are none.
        TypeError: something that is neither a name nor callable, or one name where a list is meant.
    """
    if isinstance(targets, str):
        raise TypeError(f"targets is the text {targets!r}; pass a list, such as [{targets!r}]")
    found = tuple(LabelLogit(target) if isinstance(target, str) else target for target in targets)
    if not found:
        raise ValueError("no targets: name at least one finding")
    for target in found:
        if not callable(target):
            raise TypeError(f"target {target!r} is neither a finding's name nor a callable of logits")
    return found
