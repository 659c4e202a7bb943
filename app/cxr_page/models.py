"""Models in memory, and the one thread that they compute in.

MLX's streams belong to a thread, and Streamlit runs each session's script in threads of its own, so all that touches an
array of MLX goes through `compute`. Requests wait for each other there, which also keeps two browser windows from
holding two batches in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import streamlit as st

from mlx_cxr.core.labels import MAPPED

if TYPE_CHECKING:
    from mlx_cxr.explain.word_scores import TextExplanation
    from mlx_cxr.inference import Predictor, ReportReader
    from mlx_cxr.inference.answers import ImageAnswer, ImageInput, ReportAnswer

log = logging.getLogger("mlx_cxr.page")
_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="models")
_KEPT = 24
"""Answers, and stacks of maps, that a session keeps."""

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """An image model in memory: its run's folder and stamp in one word, and the model."""

    key: str
    model: Predictor

    @property
    def name(self) -> str:
        """The run's name."""
        return self.model.trained.folder.name


def compute(work: Callable[..., T], *arguments: object) -> T:
    """Call in the models' thread and wait for the result."""
    return _THREAD.submit(work, *arguments).result()


@st.cache_resource(max_entries=4, show_spinner="Loading the model …")
def predictor(folder: str, stamp: str) -> Opened:
    """An image model, opened once for all sessions.

    Args:
        folder: the run's.
        stamp: of its files (`run_index.stamp_of`): a run that was trained again is opened again.

    Raises:
        UserError: as `Predictor.from_run`.
    """
    from mlx_cxr.inference import Predictor

    log.info("opens %s", folder)
    return Opened(f"{folder} {stamp}", compute(lambda: Predictor.from_run(folder, batch_size=1)))


@st.cache_resource(max_entries=1, show_spinner="Loading the teacher …")
def reader(folder: str, stamp: str) -> ReportReader:
    """A teacher, opened once for all sessions; arguments and errors as `predictor`, with `ReportReader.from_run`."""
    from mlx_cxr.inference import ReportReader

    log.info("opens %s", folder)
    return compute(ReportReader.from_run, folder)


def answer(opened: Opened, image: ImageInput, key: str) -> ImageAnswer:
    """A model's answer for an image.

    Args:
        opened: of `predictor`.
        image: as the model's `read` gives it.
        key: of the image, the same for the same content.
    """

    def ask() -> ImageAnswer:
        log.info("%s answers for %s", opened.name, key)
        return compute(opened.model.predict, [image])[0]

    return replace(kept(("answer", opened.key, key), ask), image=image)


def maps(opened: Opened, said: ImageAnswer, key: str, method: str) -> dict[str, np.ndarray]:
    """Every finding's map (h, w) by a method, from what the model has made of the image; see `Predictor.maps`."""

    def ask() -> dict[str, np.ndarray]:
        log.info("%s maps %s by %s", opened.name, key, method)
        return dict(zip(MAPPED, compute(opened.model.maps, said, MAPPED, method), strict=True))

    return kept(("maps", opened.key, key, method), ask)


def read_report(teacher: ReportReader, text: str, image: np.ndarray | None, key: str) -> ReportAnswer:
    """A teacher's answer for a report, and for the image of that key where it looks at one.

    Raises:
        ReportReadingError: as `ReportReader.read`.
    """

    def ask() -> ReportAnswer:
        log.info("%s reads %d characters", teacher.teacher.folder.name, len(text))
        return compute(teacher.read, text, image)

    return kept(("report", teacher.teacher.adapter_sha256, text, key if teacher.needs_image else ""), ask)


def words(teacher: ReportReader, said: ReportAnswer, finding: str, name: str) -> TextExplanation:
    """The words that moved a finding; takes tens of forward passes."""

    def ask() -> TextExplanation:
        log.info("%s explains %s", teacher.teacher.folder.name, finding)
        return compute(teacher.explain, said, [finding], name)[0]

    return kept(("words", teacher.teacher.adapter_sha256, said.logits.tobytes(), said.sections, finding, name), ask)


def kept(key: tuple, make: Callable[[], T]) -> T:
    """A value that this session has already, or that is made now; the oldest ones are let go."""
    store = st.session_state.setdefault("kept", {})
    if key not in store:
        store[key] = make()
        while len(store) > _KEPT:
            del store[next(iter(store))]
    return store[key]
