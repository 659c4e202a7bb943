"""The image of a case: where it comes from, what the models see of it, and what is shown of it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image

from cxr_page.models import Opened, kept
from cxr_page.samples import Sample
from mlx_cxr.data.decoding import ImageContent, ImageError, Transform
from mlx_cxr.inference.answers import ImageInput

SHOWN_SIDE = 768
"""Pixels per side of the image on the page, whatever the models see of it."""
MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class CaseImage:
    """An image that was chosen.

    Attributes:
        key: the same for the same content.
        name: to tell it by.
        source: its file on this machine, or the content of an upload.
        sample: the test image that it is, or None.
    """

    key: str
    name: str
    source: Path | bytes
    sample: Sample | None = None

    @classmethod
    def of_sample(cls, sample: Sample) -> CaseImage:
        """A test image."""
        file = sample.path.stat() if sample.path.exists() else None
        stamp = f"{file.st_mtime_ns} {file.st_size}" if file else ""
        key = hashlib.sha256(f"{sample.path} {stamp}".encode()).hexdigest()[:16]
        return cls(f"film {key}", f"study {sample.study_id}, film {sample.image_id}", sample.path, sample)

    @classmethod
    def of_upload(cls, name: str, content: bytes) -> CaseImage:
        """An uploaded file; of its name the first 80 characters are kept, and no folder."""
        shown = name.replace("\\", "/").rsplit("/", 1)[-1][:80] or "upload"
        return cls(f"upload {hashlib.sha256(content).hexdigest()[:16]}", shown, content)


def keep_uploads_in_memory() -> None:
    """Have the server keep an upload in memory while it arrives, as it does afterwards.

    Streamlit's server takes uploads with Starlette, which writes what is over 1 MB into a temporary file until the
    upload is complete. Older versions, with Tornado, never did.
    """
    try:
        from starlette.formparsers import MultiPartParser
    except ImportError:
        return
    MultiPartParser.spool_max_size = 2 * 2**20 * st.get_option("server.maxUploadSize")


def content_of(image: CaseImage) -> ImageContent:
    """The image's file; of the present image it stays decoded, so that models and the page need it decoded once."""
    key, content = st.session_state.get("content", ("", None))
    if key != image.key:
        content = ImageContent(image.source)
        st.session_state["content"] = image.key, content
    return content


def input_of(opened: Opened, image: CaseImage) -> ImageInput:
    """The image as a model sees it; its `error` says why it cannot be read."""
    if isinstance(image.source, bytes) and len(image.source) > MOST_BYTES:
        return ImageInput(
            image.name, None, error=f"{len(image.source):,} bytes; films of up to {MOST_BYTES:,} are read here"
        )
    key = ("input", str(opened.model.transform), image.key)
    # The same file may come back under another name.
    return replace(kept(key, lambda: opened.model.read(content_of(image), image.name)), name=image.name)


def pixels_of(image: CaseImage, transform: Transform) -> np.ndarray | None:
    """uint8 (S, S): the image by a transform, or None where it cannot be read so."""

    def read() -> np.ndarray | None:
        try:
            return np.asarray(content_of(image).decode(transform).gray)
        except ImageError:
            return None

    return kept(("pixels", str(transform), image.key), read)


def png(picture: Image.Image) -> bytes:
    """A picture's file, written for speed: it goes no further than this machine's browser."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
