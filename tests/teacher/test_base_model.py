"""The base: found, complete, counted, and told from every other."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from toy_teacher import copied_base, opened, quantized_copy

from mlx_cxr.core.config_schema import TeacherConfig, TinyTeacherConfig
from mlx_cxr.core.files import read_json, write_json
from mlx_cxr.models.hub import WeightsCorruptError
from mlx_cxr.models.weight_files import write_safetensors
from mlx_cxr.teacher.architecture import full_config, tiny_config
from mlx_cxr.teacher.base_model import (
    Base,
    BaseUnavailableError,
    base_sha256,
    chosen_precision,
    find_base,
    parameter_count,
)
from mlx_cxr.teacher.tiny import new_model


def decoder_parameters(hidden: int, inner: int, keys: int, head: int, attention: list[bool], vocabulary: int) -> int:
    """LFM2's language model, written out."""
    total = vocabulary * hidden + hidden
    for is_attention in attention:
        total += 2 * hidden + 3 * hidden * inner
        if is_attention:
            total += 2 * hidden * hidden + 2 * hidden * keys + 2 * head
        else:
            total += 3 * hidden * hidden + 3 * hidden + hidden * hidden
    return total


def vision_parameters(width: int, inner: int, layers: int, patches: int, projector: int, hidden: int) -> int:
    """SigLIP2's tower without its head, and the projector."""
    layer = 4 * (width * width + width) + 2 * 2 * width + 2 * width * inner + inner + width
    tower = (768 * width + width) + patches * width + layers * layer + 2 * width
    return tower + (4 * width * projector + projector) + (projector * hidden + hidden)


def test_parameters_of_the_tiny_base_are_the_closed_form(toy, base):
    vocabulary = read_json(toy.base / "config.json")["text_config"]["vocab_size"]
    language = decoder_parameters(64, 192, 32, 32, [False, True], vocabulary)
    assert base.parameters == language + vision_parameters(64, 128, 2, 64, 128, 64)


def test_parameters_of_the_published_size_are_the_closed_form():
    """1.17 B of language and 0.4 B of vision, from shapes alone: nothing is computed."""
    model = new_model(full_config(), 0, mx.bfloat16, made=False)
    attention = [i in (2, 5, 8, 10, 12, 14) for i in range(16)]
    language = decoder_parameters(2048, 8192, 512, 64, attention, 65536)
    vision = vision_parameters(1152, 4304, 27, 256, 2560, 2048)
    assert parameter_count(model) == language + vision
    assert language == pytest.approx(1.17e9, rel=0.005)
    assert vision == pytest.approx(0.43e9, rel=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_count_as_what_they_stand_for(toy, base, tmp_path, bits):
    quantized = opened(quantized_copy(tmp_path / "q", toy.base, bits), vision=True)
    assert quantized.parameters == base.parameters
    assert quantized.bits == bits
    assert quantized.sha256 != base.sha256
    assert base.bits is None


def test_leaving_vision_out_changes_what_is_kept_and_not_what_is_counted(toy, base):
    text = opened(toy.base)
    assert "vision_tower" not in text.model
    assert text.parameters == base.parameters
    assert text.sha256 == base.sha256
    assert (text.hidden_size, base.downsample) == (64, 32)


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        ("preprocessor_config.json", "preprocessor_config.json (or processor_config.json) is missing"),
        ("model.safetensors", "no .safetensors file"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(toy, tmp_path, left_out, named):
    folder = copied_base(tmp_path / "base", toy.base, left_out)
    with pytest.raises(WeightsCorruptError) as raised:
        opened(folder)
    assert named in str(raised.value)
    assert str(folder) in str(raised.value)


def test_weights_cut_short_are_refused(toy, tmp_path):
    folder = copied_base(tmp_path / "base", toy.base)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(WeightsCorruptError, match="its header says"):
        opened(folder)


def test_weights_that_lack_an_array_are_refused(toy, tmp_path):
    folder = copied_base(tmp_path / "base", toy.base)
    arrays = mx.load(str(toy.base / "model.safetensors"))
    del arrays["language_model.model.layers.1.self_attn.q_proj.weight"]
    write_safetensors(folder / "model.safetensors", arrays, {"format": "mlx"})
    with pytest.raises(
        WeightsCorruptError, match=r"mlx-vlm cannot open it: Missing 1 parameters:\s+language_model.*q_proj"
    ):
        opened(folder)


def test_another_architecture_is_refused(toy, tmp_path):
    folder = copied_base(tmp_path / "base", toy.base)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "qwen2_vl"})
    with pytest.raises(WeightsCorruptError, match="model_type is 'qwen2_vl', not 'lfm2_vl'"):
        opened(folder)


def test_a_tokenizer_without_chat_template_is_named(toy, tmp_path):
    from mlx_cxr.teacher.prompt import PromptError, PromptFormat

    folder = copied_base(tmp_path / "base", toy.base, "chat_template.jinja")
    settings = read_json(folder / "tokenizer_config.json")
    del settings["chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    with pytest.raises(PromptError, match="no chat template"):
        PromptFormat.of(opened(folder).tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if", "chat template .* fails: unexpected 'end of template'"),
        ("{{ nonsense() }}", "chat template .* fails: 'nonsense' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "chat template .* fails"),
        ("{{ 1 / 0 }}", "chat template .* fails: division by zero"),
        ("{{ messages[0].nothing }}", "does not give back the user's text once"),
        ("", "does not give back the user's text once"),
    ],
)
def test_a_chat_template_that_was_damaged_is_named(toy, tmp_path, template, words):
    from mlx_cxr.teacher.prompt import PromptError, PromptFormat

    folder = copied_base(tmp_path / "base", toy.base)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(PromptError, match=words):
        PromptFormat.of(opened(folder).tokenizer)


def test_bases_are_found_by_path_or_by_the_last_part_of_a_hub_id(tmp_path):
    (tmp_path / "LFM2.5-VL-1.6B-4bit").mkdir()
    assert find_base("mlx-community/LFM2.5-VL-1.6B-4bit", tmp_path) == tmp_path / "LFM2.5-VL-1.6B-4bit"
    assert find_base(str(tmp_path), tmp_path / "elsewhere") == tmp_path


@pytest.mark.parametrize(
    ("base", "way"),
    [
        ("LiquidAI/LFM2.5-VL-1.6B", "fetch_weights --what lfm"),
        ("mlx-community/other-4bit", "hf download mlx-community/other-4bit --local-dir"),
        ("./weights/none", "make_tiny_teacher"),
        ("/absent/deep/folder", "make_tiny_teacher"),
    ],
)
def test_a_base_that_is_not_here_says_how_it_gets_here(tmp_path, base, way):
    with pytest.raises(BaseUnavailableError) as raised:
        Base.open(TeacherConfig(base=base), tmp_path)
    assert way in str(raised.value)
    assert repr(base) in str(raised.value)


def test_the_hash_follows_weights_configuration_and_tokenizer_only(toy, tmp_path):
    folder = copied_base(tmp_path / "base", toy.base)
    wanted = base_sha256(toy.base)
    assert base_sha256(folder) == wanted
    (folder / "README.md").write_text("about")
    assert base_sha256(folder) == wanted
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "kept")
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        assert base_sha256(folder) != wanted, name
        shutil.copy(tmp_path / "kept", folder / name)
    assert base_sha256(folder) == wanted


def test_precision_is_float32_on_the_cpu_unless_asked_for(toy):
    model = opened(toy.base).model
    if mx.default_device().type == mx.DeviceType.cpu:
        assert chosen_precision("auto", model) == "float32"
    assert chosen_precision("bfloat16", model) == "bfloat16"
    half = opened(toy.base, training={"precision": "bfloat16"})
    assert half.precision == "bfloat16"
    assert half.model.language_model.model.embed_tokens.weight.dtype == mx.bfloat16
    assert half.sha256 == opened(toy.base).sha256


def test_an_opened_base_is_frozen_and_says_what_it_is(toy, caplog):
    with caplog.at_level(logging.INFO, logger="mlx_cxr"):
        base = opened(toy.base)
    assert f"{base.parameters:,} parameters, float32" in caplog.text
    assert not base.model.trainable_parameters().get("language_model", {}).get("model", {}).get("embed_tokens")
    assert not base.model.training


def test_a_random_model_has_the_published_initializer():
    config = tiny_config(TinyTeacherConfig(hidden_size=64, layers=2), 600)
    model = new_model(config, 0)
    embedding = np.array(model.language_model.model.embed_tokens.weight)
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert np.array(model.language_model.model.embedding_norm.weight).tolist() == [1.0] * 64
    assert np.array(model.vision_tower.post_layernorm.bias).tolist() == [0.0] * 64
    other = np.array(new_model(config, 1).language_model.model.embed_tokens.weight)
    assert np.abs(other - embedding).max() > 0.01


def test_a_base_with_a_tail_of_zeros_is_refused_with_a_record_and_without(toy, tmp_path):
    """Of full length and with a sound header: such a base trained to AUC 0.5000."""
    by_hand = copied_base(tmp_path / "by_hand", toy.base)
    weights = by_hand / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: -len(data) // 5] + bytes(len(data) - len(data[: -len(data) // 5])))
    with pytest.raises(
        WeightsCorruptError, match=r"has nothing but zeros in [\d,]+ of [\d,]+ rows.*whole copy"
    ) as refused:
        opened(by_hand, vision=True)
    assert str(by_hand) in str(refused.value)
    recorded = tmp_path / "recorded"
    shutil.copytree(toy.base, recorded)
    opened(recorded)
    shutil.copy(weights, recorded / "model.safetensors")
    with pytest.raises(
        WeightsCorruptError, match=r"model\.safetensors has SHA-256 .*python -m mlx_cxr\.make_tiny_teacher"
    ):
        opened(recorded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_flipped_bit_of_a_recorded_base_is_found(toy, tmp_path, name):
    folder = tmp_path / "base"
    shutil.copytree(toy.base, folder)
    data = bytearray((folder / name).read_bytes())
    place = max(data.rfind(digit) for digit in b"02468") if name.endswith(".json") else len(data) - 100
    data[place] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(WeightsCorruptError, match=f"{name} has SHA-256"):
        opened(folder)


def test_pytorch_is_neither_loaded_nor_asked_for(toy):
    """Transformers' tokenizer alone is used; PyTorch can be had afterwards where it is installed."""
    code = "import importlib.util, pathlib, sys; from mlx_cxr.core.config_schema import TeacherConfig\n"
    code += "there = importlib.util.find_spec('torch'); from mlx_cxr.teacher.base_model import Base\n"
    code += f"folder = pathlib.Path({str(toy.base)!r}); base = Base.open(TeacherConfig(base=str(folder)), folder)\n"
    code += "assert 'torch' not in sys.modules; assert base.tokenizer.encode('edema')\n"
    code += "assert (importlib.util.find_spec('torch') is None) == (there is None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stdout + done.stderr
