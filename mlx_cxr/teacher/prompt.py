"""The prompt: a study's image and report, then one line per finding, each with the position that is read.

A study is read once. After the chat's opening and the instruction come the image's image tokens and the report's
sections, as far as they are given; the assistant's turn then holds a line for each finding ("Edema:"), and the answer
to a finding is read where its line ends. The model is causal, so an answer sees the input and the lines above it, and
nothing that follows. The instruction comes first so that a batch computes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_cxr.core.errors import UserError
from mlx_cxr.core.files import hash_of
from mlx_cxr.core.labels import LABELS

INSTRUCTION = "Is each finding present on this chest radiograph? Answer yes or no."
ANSWERS = (" yes", " no")
_KEPT_LONGEST = ("impression", "last_paragraph")
_SENTINEL = "@@study@@"
_WORTH_SHARING = 64
"""Least tokens saved for a beginning to be computed apart: that pass reads all weights once more, which takes a device
of 3 TFLOP/s and 100 GB/s as long as some 30 tokens."""


class PromptError(UserError, ValueError):
    """A base whose tokenizer or chat template cannot carry the prompt, or a prompt with no room for its input."""


@dataclass(frozen=True)
class Prompt:
    """One study as the model reads it.

    Attributes:
        ids: int32 (L,) token ids.
        read: int32 (14,) positions in `ids` whose next token would be the answer, in the order of `LABELS`.
        cut: report tokens that were left out for want of room.
    """

    ids: np.ndarray
    read: np.ndarray
    cut: int


@dataclass(frozen=True)
class PromptFormat:
    """Token ids of everything in a prompt that does not change from study to study.

    Attributes:
        head: the chat's opening and the instruction.
        image: the image's tokens, with their start and end; empty without an image.
        tail: end of the user's turn, opening of the assistant's.
        lines: per finding of `order`, the line's tokens up to the one that is read.
        order: labels of the lines, as they are written.
        yes: id of the answer "yes".
        no: id of the answer "no".
        image_token: id that stands for a patch of the image.
        max_tokens: longest prompt.
    """

    head: tuple[int, ...]
    image: tuple[int, ...]
    tail: tuple[int, ...]
    lines: tuple[tuple[int, ...], ...]
    order: tuple[str, ...]
    yes: int
    no: int
    image_token: int
    max_tokens: int
    tokenizer: Any

    @classmethod
    def of(
        cls, tokenizer: Any, *, image_tokens: int = 0, max_tokens: int = 768, order: Sequence[str] = LABELS
    ) -> PromptFormat:
        """Cut the prompt's fixed parts into tokens.

        Args:
            tokenizer: of the base, with its chat template.
            image_tokens: patches of the image after the pixel unshuffle; 0 for none.
            max_tokens: longest prompt, the 14 lines included.
            order: the 14 labels in the order of their lines.

        Raises:
            PromptError: no chat template, a template that drops or changes the user's text, or answers that begin
                with the same token.
        """
        from jinja2 import TemplateError

        try:
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": _SENTINEL}], add_generation_prompt=True, tokenize=False
            )
        except (ValueError, AttributeError) as error:
            raise PromptError(
                f"the base's tokenizer has no chat template ({error}); use an instruction-tuned base"
            ) from None
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:  # A template is a program.
            raise PromptError(
                f"the base's chat template (chat_template.jinja, or in tokenizer_config.json) fails: {error}; get the "
                "base again"
            ) from None
        if chat.count(_SENTINEL) != 1:
            raise PromptError("the base's chat template does not give back the user's text once; use another base")
        head, tail = chat.split(_SENTINEL)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        yes, no = (ids(answer)[0] for answer in ANSWERS)
        if yes == no:
            raise PromptError(f"the base's tokenizer begins {ANSWERS[0]!r} and {ANSWERS[1]!r} alike; use another base")
        image, image_token = (), -1
        if image_tokens:
            image_token, start, end = (
                tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|image_start|>", "<|image_end|>")
            )
            image = (start, *[image_token] * image_tokens, end)
        return cls(
            head=ids(f"{head}{INSTRUCTION}\n"),
            image=image,
            tail=ids(tail),
            lines=tuple(ids(f"{name}:" if number == 0 else f"\n{name}:") for number, name in enumerate(order)),
            order=tuple(order),
            yes=yes,
            no=no,
            image_token=image_token,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
        )

    @property
    def fixed(self) -> int:
        """Tokens of a prompt that holds no report."""
        return sum(map(len, (self.head, self.image, self.tail, *self.lines)))

    def shared(self, studies: int) -> int:
        """Number of first tokens of a batch of `studies` prompts that are worth computing once: the head's, or 0."""
        return len(self.head) if (studies - 1) * len(self.head) >= _WORTH_SHARING else 0

    def tokens_one_by_one(self, prompt: Prompt) -> int:
        """Tokens that 14 prompts of one line each would take for the same study."""
        lines = sum(map(len, self.lines))
        return len(self.lines) * (len(prompt.ids) - lines) + lines

    def sha256(self) -> str:
        """Hash of all that decides a prompt but the study: a cache of answers is valid for this one only."""
        parts = ("head", "image", "tail", "lines", "order", "yes", "no", "max_tokens")
        return hash_of({name: getattr(self, name) for name in parts})

    def text_ids(self, text: str) -> list[int]:
        """Token ids of what a report says. A special token spelt out in it is text: it cannot end the turn."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def section_ids(self, name: str, text: str) -> list[int]:
        """Token ids of a section under its name."""
        return self.text_ids(f"{name.replace('_', ' ').capitalize()}: {text}\n")

    def prompt(self, sections: Sequence[tuple[str, str]] = ()) -> Prompt:
        """The prompt of one study.

        Args:
            sections: (name, text) of the report, in the order in which they are to be read.

        Raises:
            PromptError: `max_tokens` leaves no room for the report.
        """
        texts = [self.section_ids(name, text) for name, text in sections]
        kept = _fitted([name for name, _ in sections], texts, self.max_tokens - self.fixed)
        cut = sum(map(len, texts)) - sum(map(len, kept))
        ids = [*self.head, *self.image, *(token for text in kept for token in text), *self.tail]
        read = np.empty(len(LABELS), dtype=np.int32)
        for name, line in zip(self.order, self.lines, strict=True):
            ids += line
            read[LABELS.index(name)] = len(ids) - 1
        if len(ids) > self.max_tokens:
            raise PromptError(f"teacher.max_tokens {self.max_tokens} is less than the {self.fixed} that a prompt needs")
        return Prompt(np.array(ids, dtype=np.int32), read, cut)


def _fitted(names: Sequence[str], texts: list[list[int]], room: int) -> list[list[int]]:
    """Cut sections to the room there is: the impression last of all, a whole report from its beginning.

    Radiologists state what matters in the impression, which stands at the end of a whole report.
    """
    if room <= 0 and any(texts):
        raise PromptError("teacher.max_tokens leaves no room for the report; raise it, or lower teacher.image_size")
    excess = sum(map(len, texts)) - room
    texts = list(texts)
    # Stable: of equals, the first in the order of reading is cut first.
    for i in sorted(range(len(texts)), key=lambda i: names[i] in _KEPT_LONGEST):
        if excess <= 0:
            break
        taken = min(excess, len(texts[i]))
        kept = len(texts[i]) - taken
        texts[i] = texts[i][len(texts[i]) - kept :] if names[i] == "whole" else texts[i][:kept]
        excess -= taken
    return texts


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right to one length.

    Attributes:
        ids: int32 (B, L).
        read: int32 (B, 14).
        tokens: of the prompts, without padding.
    """

    ids: np.ndarray
    read: np.ndarray
    tokens: int


def padded(prompts: Sequence[Prompt], bucket: int) -> PromptBatch:
    """Stack prompts as `padded_ids`; padding follows all that is read and the model is causal: it changes nothing."""
    ids = padded_ids([prompt.ids for prompt in prompts], bucket)
    return PromptBatch(ids, np.stack([prompt.read for prompt in prompts]), sum(len(p.ids) for p in prompts))


def padded_ids(rows: Sequence[Sequence[int]], bucket: int, pad: int = 0) -> np.ndarray:
    """int32 (B, L): token ids padded on the right to the longest row, up to a multiple of `bucket`."""
    ids = np.full((len(rows), -(-max(map(len, rows)) // bucket) * bucket), pad, dtype=np.int32)
    for padded_row, row in zip(ids, rows, strict=True):
        padded_row[: len(row)] = row
    return ids
