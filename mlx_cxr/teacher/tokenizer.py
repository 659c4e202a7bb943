"""The tokenizer of the small base: byte-level BPE trained on report text, with LFM2's special tokens at their ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlx_cxr.core.files import write_json, write_text
from mlx_cxr.teacher.architecture import BOS, EOS, IM_END, IM_START, IMAGE, IMAGE_END, IMAGE_START, PAD, THUMBNAIL

_SPECIAL_TOKENS = 500
_GRID = 10
_NAMED = {
    PAD: "<|pad|>",
    BOS: "<|startoftext|>",
    2: "<|endoftext|>",
    IM_START: "<|im_start|>",
    IM_END: "<|im_end|>",
    IMAGE: "<image>",
    THUMBNAIL: "<|img_thumbnail|>",
    IMAGE_START: "<|image_start|>",
    IMAGE_END: "<|image_end|>",
}
_CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def special_tokens() -> list[str]:
    """The 500 special tokens in the order of their ids; those without a role here are reserved."""
    tokens = [_NAMED.get(i, f"<|reserved_{i}|>") for i in range(_SPECIAL_TOKENS)]
    for row in range(_GRID):
        for column in range(_GRID):
            tokens[IMAGE + 1 + row * _GRID + column] = f"<|img_row_{row + 1}_col_{column + 1}|>"
    return tokens


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> int:
    """Train a tokenizer and write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    Args:
        vocabulary: at most so many tokens, the 500 special ones and 256 bytes included; at least 800, or there are too
            few others for "yes" and "no" to begin differently.

    Returns:
        The number of tokens; fewer than asked for where the texts have no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    named = {
        "bos_token": _NAMED[BOS],
        "eos_token": _NAMED[EOS],
        "pad_token": _NAMED[PAD],
        "image_token": _NAMED[IMAGE],
        "image_start_token": _NAMED[IMAGE_START],
        "image_end_token": _NAMED[IMAGE_END],
        "image_thumbnail": _NAMED[THUMBNAIL],
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Lfm2VlProcessor",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "chat_template": _CHAT_TEMPLATE,
            **named,
        },
    )
    write_text(folder / "chat_template.jinja", _CHAT_TEMPLATE)
    return tokenizer.get_vocab_size()
