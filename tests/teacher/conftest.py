"""The toy teacher that all tests of this room share."""

from __future__ import annotations

import pytest
from toy_teacher import ToyTeacher, opened, shared

from mlx_cxr.teacher.base_model import Base
from mlx_cxr.teacher.prompt import PromptFormat


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> ToyTeacher:
    """The cohort with its base."""
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def base(toy) -> Base:
    """The tiny base, with its vision tower; nothing may be attached to it."""
    return opened(toy.base, vision=True)


@pytest.fixture(scope="module")
def form(base) -> PromptFormat:
    """Prompts without an image."""
    return PromptFormat.of(base.tokenizer, max_tokens=320)
