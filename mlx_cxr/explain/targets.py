"""What is explained, apart from how: a target is any callable from logits (N, 14) to one score per image (N,).

The classes here are the useful ones; a plain function serves as well. `str(target)` is the name that is
recorded. A target may use an image's own row only, so that the images of a batch cannot influence each other's
maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_cxr.core.labels import label_index

Target = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class LabelLogit:
    """The logit of one finding: what Grad-CAM explains by default, before any saturating sigmoid.

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


@dataclass(frozen=True)
class LabelProbability:
    """The calibrated probability of one finding, `sigmoid(logit / temperature)`: what faithfulness curves
    follow.

    As a target of a map its gradient vanishes where the sigmoid saturates; prefer `LabelLogit` there.

    Raises:
        KeyError: `label` is not one of the 14.
        ValueError: the temperature is not positive and finite.
    """

    label: str
    temperature: float = 1.0

    def __post_init__(self) -> None:
        label_index(self.label)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"{self.label}: temperature is {self.temperature}; it must be positive and finite")

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (N, 14) -> (N,) in [0, 1]."""
        return mx.sigmoid(logits[:, label_index(self.label)] / self.temperature)

    def __str__(self) -> str:
        return f"p({self.label})"


@dataclass(frozen=True)
class LabelDifference:
    """Logit of one finding minus another's: what speaks for `label` rather than for `against`.

    Raises:
        KeyError: one of the two is not one of the 14.
        ValueError: both are the same.
    """

    label: str
    against: str

    def __post_init__(self) -> None:
        if label_index(self.label) == label_index(self.against):
            raise ValueError(f"{self.label} against itself is 0 everywhere; name two findings")

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (N, 14) -> (N,)."""
        return logits[:, label_index(self.label)] - logits[:, label_index(self.against)]

    def __str__(self) -> str:
        return f"{self.label} - {self.against}"


@dataclass(frozen=True)
class AbsenceLogit:
    """Minus the logit of one finding: what on the image speaks against it.

    Raises:
        KeyError: `label` is not one of the 14.
    """

    label: str

    def __post_init__(self) -> None:
        label_index(self.label)

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits (N, 14) -> (N,)."""
        return -logits[:, label_index(self.label)]

    def __str__(self) -> str:
        return f"no {self.label}"


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
