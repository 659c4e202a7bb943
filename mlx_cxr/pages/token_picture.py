"""A report with the words that moved the answer, as a picture; drawn with Pillow, like the maps' overlays."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mlx_cxr.core.formatting import footer
from mlx_cxr.explain.word_scores import READING, WHITE, TextExplanation, WordScores, shade, signed
from mlx_cxr.pages.overlay import fitted, font

_TEXT, _DIM, _LINE, _NOTICE = (24, 26, 30), (96, 101, 110), (210, 213, 218), (150, 75, 0)
_MARGIN, _WIDTH = 32, 1120


def draw_picture(explanation: TextExplanation, scale: float) -> Image.Image:
    """The same as a picture, 1120 pixels wide and as high as the report needs; `scale` is of `shared_scale`.

    Words of at least a quarter of the scale carry their figure.
    """
    e, room = explanation, _WIDTH - 2 * _MARGIN
    lines = _laid_out(e.scores, scale, room - 24)
    # A line with figures under its words is higher.
    heights = [50 if any(_marked(value, scale) for *_, value in line) else 36 for line in lines]
    top = 118 + (24 if e.abstention else 0)
    box = (_MARGIN, top, _MARGIN + room, top + sum(heights) + 20)
    account = e.account()
    below = [*_wrapped(e.check(), 14, room), *_wrapped(e.cut_note(), 14, room), *_wrapped(READING, 14, room)]
    height = box[3] + 74 + 24 * len(account) + 16 + 22 * len(below) + 60
    canvas = Image.new("RGB", (_WIDTH, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 22), e.finding, _TEXT, font(26, bold=True))
    draw.text((_MARGIN, 60), e.summary(), _TEXT, font(16))
    about = fitted(f"study {e.study_id}; the teacher reads: {e.reads}", 14, room)
    draw.text((_MARGIN, 86), about, _DIM, font(14))
    if e.abstention:
        draw.text((_MARGIN, 110), fitted(e.abstention_note(), 14, room), _NOTICE, font(14, bold=True))
    draw.rectangle(box, outline=_LINE)
    y = top + 14
    for line, line_height in zip(lines, heights, strict=True):
        for x, width, word, value in line:
            left = box[0] + 12 + x
            draw.rounded_rectangle((left, y, left + width, y + 27), 4, shade(value, scale))
            draw.text((left + width / 2, y + 20), word, _TEXT, font(17), anchor="ms")
            if _marked(value, scale):
                draw.text((left + width / 2, y + 30), signed(value), _DIM, font(11), anchor="ma")
        y += line_height
    y = box[3] + 18
    _legend(draw, (_MARGIN, y), scale)
    y += 56
    for text, value in account:
        face = font(14, bold=text == account[-1][0])
        draw.text((_MARGIN + 54, y), signed(value), _TEXT, face, anchor="ra")
        draw.text((_MARGIN + 68, y), text, _TEXT, face)
        y += 24
    y += 16
    for text in below:
        draw.text((_MARGIN, y), text, _DIM, font(14))
        y += 22
    draw.text((_MARGIN, height - 36), footer(e.synthetic), _NOTICE, font(14, bold=True))
    return canvas


def _marked(value: float, scale: float) -> bool:
    return abs(value) >= scale / 4


def _laid_out(scores: WordScores, scale: float, room: float) -> list[list[tuple[float, float, str, float]]]:
    """Lines of (x, width, word, effect); a word that is wider than a line is cut."""
    lines: list[list[tuple[float, float, str, float]]] = [[]]
    x = 0.0
    for i, (word, value) in enumerate(zip(scores.words, np.asarray(scores.shown).tolist(), strict=True)):
        word = fitted(word, 17, room - 8)
        width = font(17).getlength(word) + 8
        if _marked(value, scale):
            width = max(width, font(11).getlength(signed(value)) + 4)
        if lines[-1] and (x + width > room or i in scores.line_starts):
            lines.append([])
            x = 0.0
        lines[-1].append((x, width, word, value))
        x += width + 2
    return lines


def _legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], scale: float) -> None:
    x, y = at
    length = 420
    for step in range(length):
        draw.line((x + step, y, x + step, y + 14), shade(2 * step / (length - 1) - 1, 1.0))
    draw.rectangle((x - 1, y - 1, x + length, y + 15), outline=_LINE)
    ticks = ((0, "la", f"≤ {signed(-scale, 1)}"), (0.5, "ma", "0"), (1, "ra", f"≥ {signed(scale, 1)}"))
    for share, anchor, text in ticks:
        draw.text((x + share * length, y + 20), text, _TEXT, font(12), anchor=anchor)
    meaning = "effect on the logit: orange raised it, blue lowered it"
    draw.text((x + length + 18, y + 7), meaning, _TEXT, font(14), anchor="lm")


def _wrapped(text: str, size: int, room: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
