"""The small machine that turns a grammar into a sentence, and sentences into a page that looks like MIMIC-CXR's."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")


def spin(text: str, rng: np.random.Generator, fields: Mapping[str, str] | None = None) -> str:
    """One sentence of a grammar: fields filled in, a branch taken at each choice, articles and spaces set right."""
    for _ in range(6):
        filled = re.sub(r"<(\w+)>", lambda m: (fields or {}).get(m.group(1), m.group(0)), text)
        if filled == text:
            break
        text = filled
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda m: pick(m.group(1).split("|"), rng), text)
    text = re.sub(r"@\s*(\w)", lambda m: ("an " if m.group(1) in "aeioAEIO" else "a ") + m.group(1), text)
    return re.sub(r"\s+([.,;])", r"\1", re.sub(r"\s{2,}", " ", text)).strip()


def pick(options: Sequence[Option], rng: np.random.Generator) -> Option:
    """One of them, all alike in chance."""
    return options[int(rng.integers(len(options)))]


def capital(text: str) -> str:
    """The text with its first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def page(parts: list[tuple[str, str]], rng: np.random.Generator) -> str:
    """Header, indents and line breaks as MIMIC-CXR has them."""
    lines = [" " * 33 + "FINAL REPORT"]
    for name, text in parts:
        blocks = text.split("\n")
        blocks[0] = f"{name}:  {blocks[0]}" if name else blocks[0]
        if name and rng.random() < 0.3 and name in ("FINDINGS", "IMPRESSION"):
            lines += [f" {name}:  ", " "]
            blocks = text.split("\n")
        for block in blocks:
            lines += textwrap.wrap(block, 78, initial_indent=" ", subsequent_indent=" ") or [" "]
        lines.append(" ")
    return "\n".join(lines).rstrip() + "\n"


def typo(text: str, rng: np.random.Generator) -> str:
    """Now and then two letters change places inside a long word that no labeler looks for."""
    if rng.random() > 0.05:
        return text
    long = r"\b(compared|unchanged|interval|approximately|terminates|identified|demonstrated|contours)\b"
    words = list(re.finditer(long, text))
    if not words:
        return text
    word = words[int(rng.integers(len(words)))]
    at = word.start() + int(rng.integers(2, len(word.group()) - 2))
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
