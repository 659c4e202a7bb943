"""Markdown pages that the stages wrote, shown with the pictures beside them and nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import streamlit as st

from cxr_page.look import picture

_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)]+)\)\s*$", re.MULTILINE)
_WIDEST = 820
"""Pixels: pictures of images are no sharper than that."""
_NOTICE = re.compile(r"^> \*\*.*\n?", re.MULTILINE)


def sections_of(text: str) -> dict[str, str]:
    """Head to body of a page's `## ` sections; what is before the first one is under an empty head."""
    parts = re.split(r"(?m)^## (.+)$", text)
    return {"": parts[0]} | {head.strip(): body.strip() for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def show_markdown(text: str, folder: Path) -> None:
    """A page, or a part of one.

    A picture is shown where it lies in the page's folder; any other is left as text, so that no page makes the browser
    ask another machine for one. Heads become smaller, as the page stands inside a tab; the banner stands above all.

    Args:
        text: Markdown.
        folder: that the page lies in.
    """
    text = _NOTICE.sub("", text)
    at = 0
    for match in _PICTURE.finditer(text):
        _text(text[at : match.start()])
        path = (folder / match[2]).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            with st.container(width=_WIDEST):
                picture(path.read_bytes(), match[1])
        else:
            _text(f"(picture {match[1]} is missing)")
        at = match.end()
    _text(text[at:])


def without_pictures(text: str) -> str:
    """Markdown of a run's files that can ask no other host for a picture."""
    return text.replace("![", r"\![")


def _text(text: str) -> None:
    text = re.sub(r"(?m)^(#{1,4}) ", r"##\1 ", without_pictures(text))
    if text.strip():
        st.markdown(text.strip())
