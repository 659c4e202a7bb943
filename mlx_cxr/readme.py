"""Figures in a README come from a run: the text between two markers is replaced, the rest is left alone."""

from __future__ import annotations

from pathlib import Path

from mlx_cxr.errors import UserError
from mlx_cxr.runs import write_text


def replace_block(path: str | Path, name: str, text: str) -> Path:
    """Put `text` between the lines `<!-- begin NAME -->` and `<!-- end NAME -->` of a Markdown file, atomically.

    Args:
        path: the file.
        name: of the block.
        text: Markdown, without the markers.

    Returns:
        `path`.

    Raises:
        UserError: the file is missing, or does not hold each marker once and in order.
    """
    path = Path(path)
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's top folder") from None
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise UserError(f"{path}: expected one line '{begin.strip()}' and, below it, one '{end}'")
    head, tail = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    return write_text(path, f"{head}\n{text.strip()}\n\n{tail}")
