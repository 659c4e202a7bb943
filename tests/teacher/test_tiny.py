"""The tiny base: complete, opened by mlx-vlm as any other, trained as a language model, the same for the same seed."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_cxr.core.config_schema import TinyTeacherConfig
from mlx_cxr.core.files import sha256_file
from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.architecture import tiny_config
from mlx_cxr.teacher.tiny import make_tiny_teacher, new_model, train_language_model
from mlx_cxr.teacher.tokenizer import special_tokens, write_tokenizer

REPORTS = [
    {"indication": "Cough.", "findings": f"The lungs are clear, case {i}.", "impression": "No edema.", "whole": "w"}
    for i in range(12)
]
SETTINGS = TinyTeacherConfig(hidden_size=32, layers=2, vocabulary=800, epochs=2, max_tokens=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_teacher(folder, REPORTS, SETTINGS, 3)


def test_the_folder_is_complete_and_mlx_vlm_opens_it(made):
    from mlx_vlm import load

    folder, about = made
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "preprocessor_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    model, processor = load(str(folder))
    assert type(model).__module__ == "mlx_vlm.models.lfm2_vl.lfm2_vl"
    assert processor.tokenizer.eos_token_id == 7
    assert about["reports"] == 12
    arrays = mx.load(str(folder / "model.safetensors"))
    assert about["parameters"] == sum(array.size for array in arrays.values())


def test_mlx_vlm_generates_from_an_image(made):
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template
    from PIL import Image

    folder, _ = made
    model, processor = load(str(folder), do_image_splitting=False)
    prompt = apply_chat_template(processor, model.config, "Edema?", num_images=1)
    image = Image.fromarray(np.full((256, 256, 3), 90, np.uint8))
    said = generate(model, processor, prompt, image=[image], max_tokens=2, temperature=0.0)
    assert said.generation_tokens == 2
    assert said.prompt_tokens > 64, "the film has a token for each 32 x 32 px"


def test_two_makes_with_one_seed_are_the_same_bytes(made, tmp_path):
    folder, _ = made
    make_tiny_teacher(tmp_path / "again", REPORTS, SETTINGS, 3)
    make_tiny_teacher(tmp_path / "other", REPORTS, SETTINGS, 4)
    for path in folder.iterdir():
        assert sha256_file(path) == sha256_file(tmp_path / "again" / path.name), path.name
    assert sha256_file(folder / "model.safetensors") != sha256_file(tmp_path / "other" / "model.safetensors")


def test_special_tokens_have_the_published_ids(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(made[0]))
    published = {
        **{"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7},
        **{"<image>": 396, "<|img_thumbnail|>": 497, "<|image_start|>": 498, "<|image_end|>": 499},
        **{"<|img_row_1_col_1|>": 397, "<|img_row_10_col_10|>": 496},
    }
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in published} == published
    assert len(special_tokens()) == len(set(special_tokens())) == 500
    for name in (*LABELS, " yes", " no", "Cough."):
        assert tokenizer.decode(tokenizer.encode(name, add_special_tokens=False)) == name
    assert len(tokenizer.encode(" yes", add_special_tokens=False)) == 1
    assert len(tokenizer.encode(" no", add_special_tokens=False)) == 1


def test_any_text_survives_the_tokenizer(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(made[0]))
    text = "Größe 3,5 × 2 cm – „unverändert“\n\tNo 肺 change. 🫁  two  blanks ."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_vocabulary_has_no_more_than_was_asked_for(tmp_path):
    size = write_tokenizer(tmp_path, ["the heart is large " * 9], 2000)
    assert 756 <= size < 800, "there are no more pairs to merge"
    assert write_tokenizer(tmp_path, [" ".join(f"word{i} part{i}" for i in range(400))] * 3, 800) == 800
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["image_token"] == "<image>"


def test_language_training_lowers_the_loss_it_reports():
    """The mean over the last epoch, in nats per token, against cross-entropy computed here."""
    rng = np.random.default_rng(0)
    documents = [[1, *rng.choice([510, 520, 530], 20).tolist(), 7] for _ in range(12)]
    settings = SETTINGS.model_copy(update={"epochs": 1, "batch_size": 12, "learning_rate": 1e-9})
    model = new_model(tiny_config(settings, 600), 0)
    ids = mx.array(documents)
    each = nn.losses.cross_entropy(model.language_model(ids[:, :-1]).logits, ids[:, 1:])
    loss, tokens = train_language_model(model, documents, settings, 0)
    assert loss == pytest.approx(float(mx.mean(each)), rel=1e-4)
    assert tokens == 12 * 21
    settings = settings.model_copy(update={"epochs": 60, "learning_rate": 1e-2})
    lower, _ = train_language_model(model, documents, settings, 0)
    assert lower < 0.6 * loss
    assert lower > 0.9 * 20 / 21 * np.log(3), "the three words are drawn: nobody can know which comes next"


def test_a_report_without_any_section_is_no_document(tmp_path):
    empty = dict.fromkeys(("indication", "findings", "impression", "last_paragraph", "whole"), "")
    about = make_tiny_teacher(tmp_path, [*REPORTS, empty], SETTINGS.model_copy(update={"epochs": 1}), 0)
    assert about["reports"] == 12
