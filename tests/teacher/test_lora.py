"""Adapters: what they change and how much, in mlx-vlm's schema, on bases quantized or not; and bad adapters."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toy_teacher import arrays_of, opened, perturbed_adapters, prompts_of, quantized_copy

from mlx_cxr.core.config_schema import LoraConfig, TeacherConfig
from mlx_cxr.core.files import read_json, write_json
from mlx_cxr.models.weight_files import ModelFormatError, write_safetensors
from mlx_cxr.teacher.base_model import parameter_count
from mlx_cxr.teacher.lora import AdapterError, adapters_off, attach_lora, load_adapter, save_adapter, target_layers
from mlx_cxr.teacher.prompt import PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings, score

TEXTS = ("Edema. Clear lungs.", "The heart is enlarged.", "No acute process.")
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)
SCORING = TeacherConfig(batch_size=2)


def answers(base) -> np.ndarray:
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    return score(base, form, prompts_of(form, TEXTS), None, SCORING).logits


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    """An adapter folder with its base's identity and its answers."""
    base = opened(toy.base)
    attach_lora(base.model, LORA, seed=1)
    perturbed_adapters(base.model)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, base.model, base.identity)
    return folder, base.identity, answers(base)


def test_fresh_adapters_change_nothing(toy):
    base = opened(toy.base)
    before = answers(base)
    names = attach_lora(base.model, LORA, seed=1)
    np.testing.assert_array_equal(answers(base), before)
    weights = dict(tree_flatten(base.model.trainable_parameters()))
    assert set(weights) == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    for name, value in weights.items():
        assert np.any(np.array(value)) == name.endswith("lora_a"), name


def test_the_seed_fixes_the_adapters(toy):
    def drawn(seed: int) -> np.ndarray:
        base = opened(toy.base)
        attach_lora(base.model, LORA, seed)
        return np.concatenate([np.array(w).ravel() for _, w in tree_flatten(base.model.trainable_parameters())])

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()


@pytest.mark.parametrize("rank", [1, 8])
def test_the_count_of_trained_parameters_is_the_closed_form(toy, rank):
    """Width 64: a short convolution, an attention of 2 heads with 1 key head of 32, both with a feed-forward of 192."""
    base = opened(toy.base)
    attach_lora(base.model, LoraConfig(rank=rank), seed=0)
    convolution = (64 + 192) + (64 + 64)
    attention = (64 + 64) + (64 + 32) + (64 + 32) + (64 + 64)
    feed_forward = 2 * (3 * (64 + 192))
    trained = sum(value.size for _, value in tree_flatten(base.model.trainable_parameters()))
    assert trained == rank * (convolution + attention + feed_forward)
    assert parameter_count(base.model) == base.parameters - vision_parameters(toy), "adapters are counted apart"


def vision_parameters(toy) -> int:
    names = ("vision_tower", "multi_modal_projector")
    return sum(w.size for n, w in mx.load(str(toy.base / "model.safetensors")).items() if n.startswith(names))


def test_modules_and_layers_choose_what_is_adapted(toy):
    model = opened(toy.base).model
    prefix = "language_model.model.layers"
    assert target_layers(model, LoraConfig(layers=1, modules=("conv.in_proj", "self_attn.q_proj"))) == [
        f"{prefix}.1.self_attn.q_proj"
    ]
    assert target_layers(model, LoraConfig(modules=("feed_forward.w2",))) == [
        f"{prefix}.0.feed_forward.w2",
        f"{prefix}.1.feed_forward.w2",
    ]
    assert len(target_layers(model, LoraConfig())) == 5 + 7


def test_names_that_the_base_has_not_are_refused_with_those_that_it_has(toy):
    model = opened(toy.base).model
    with pytest.raises(AdapterError, match=r"the base has no self_attn.o_proj, gate_proj; .*self_attn.out_proj"):
        attach_lora(model, LoraConfig(modules=("self_attn.o_proj", "feed_forward.w1", "gate_proj")), 0)
    with pytest.raises(AdapterError, match=r"teacher.lora.layers 3: the base has 2 decoder layers"):
        attach_lora(model, LoraConfig(layers=3), 0)
    with pytest.raises(AdapterError, match=r"the last 1 decoder layers have none of teacher.lora.modules"):
        attach_lora(model, LoraConfig(layers=1, modules=("conv.in_proj",)), 0)


def test_dropout_acts_in_training_and_not_in_scoring(toy):
    base = opened(toy.base)
    attach_lora(base.model, LoraConfig(rank=4, dropout=0.5), seed=1)
    perturbed_adapters(base.model, size=0.3)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    direction = answer_direction(language, form.yes, form.no)

    def forward() -> np.ndarray:
        embeddings = prompt_embeddings(language, form, mx.array(batch.ids))
        return np.array(finding_logits(language, embeddings, mx.array(batch.read), direction))

    base.model.train()
    assert np.abs(forward() - forward()).max() > 1e-3
    scored = answers(base)
    assert base.model.training, "scoring leaves the mode as it was"
    np.testing.assert_array_equal(answers(base), scored)
    base.model.eval()
    np.testing.assert_allclose(forward(), scored, atol=2e-5)
    answers(base)
    assert not base.model.training


def test_a_saved_adapter_gives_the_same_answers_on_a_fresh_base(toy, saved):
    folder, identity, wanted = saved
    base = opened(toy.base)
    plain = answers(base)
    load_adapter(base.model, folder, identity)
    np.testing.assert_array_equal(answers(base), wanted)
    assert np.abs(wanted - plain).max() > 1e-2
    assert not tree_flatten(base.model.trainable_parameters())
    with adapters_off(base.model):
        np.testing.assert_array_equal(answers(base), plain)
    np.testing.assert_array_equal(answers(base), wanted)


def test_mlx_vlm_loads_the_adapter_and_answers_alike(toy, saved):
    """`mlx_vlm.load(base, adapter_path=...)`, its own forward pass over the whole vocabulary."""
    from mlx_vlm import load

    folder, _, wanted = saved
    model, processor = load(str(toy.base), adapter_path=str(folder))
    model.eval()
    form = PromptFormat.of(processor.tokenizer, max_tokens=320)
    batch = padded(prompts_of(form, TEXTS), 32)
    whole = np.array(model.language_model(mx.array(batch.ids)).logits)
    read = np.take_along_axis(whole, batch.read[..., None], axis=1)
    np.testing.assert_allclose(read[..., form.yes] - read[..., form.no], wanted, atol=2e-5)


@pytest.mark.slow
def test_mlx_vlm_generate_accepts_the_adapter(toy, saved):
    folder, _, _ = saved
    command = [sys.executable, "-m", "mlx_vlm.generate", "--model", str(toy.base), "--adapter-path", str(folder)]
    command += ["--prompt", "Edema?", "--max-tokens", "4", "--temperature", "0", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Prompt:" in done.stdout
    assert re.search(r"Generation: [1-4] tokens", done.stdout)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantized_base(toy, tmp_path, bits):
    """QLoRA: the answers are those of the dequantized weights, gradients reach the adapters only, saving goes round."""
    base = opened(quantized_copy(tmp_path / "base", toy.base, bits))
    assert base.bits == bits
    attach_lora(base.model, LoraConfig(rank=4, dropout=0.0), seed=1)
    perturbed_adapters(base.model)
    wanted = answers(base)
    dequantized = opened(toy.base)
    weights = {}
    for name, module in base.model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            whole = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
            weights[name.replace(".linear", "") + ".weight"] = whole
    assert len(weights) == 13
    dequantized.model.load_weights(list(weights.items()), strict=False)
    attach_lora(dequantized.model, LoraConfig(rank=4, dropout=0.0), seed=1)
    perturbed_adapters(dequantized.model)
    np.testing.assert_allclose(answers(dequantized), wanted, atol=2e-4)
    save_adapter(tmp_path / "adapter", base.model, base.identity)
    again = opened(tmp_path / "base")
    load_adapter(again.model, tmp_path / "adapter", again.identity)
    np.testing.assert_array_equal(answers(again), wanted)
    with pytest.raises(AdapterError, match="belongs to another base"):
        load_adapter(opened(toy.base).model, tmp_path / "adapter", opened(toy.base).identity)


def bad_copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "bad")
    return tmp_path / "bad", mx.load(str(saved[0] / "adapters.safetensors"))


def refused(toy, folder, identity, error=AdapterError) -> str:
    base = opened(toy.base)
    before = arrays_of(base.model)
    with pytest.raises(error) as raised:
        load_adapter(base.model, folder, identity)
    after = arrays_of(base.model)
    assert set(after) == set(before), "a refused adapter is not half attached"
    return str(raised.value)


def test_an_adapter_of_another_rank_is_refused(toy, saved, tmp_path):
    folder, _ = bad_copy(saved, tmp_path)
    settings = read_json(folder / "adapter_config.json")
    settings["lora_parameters"]["rank"] = 6
    write_json(folder / "adapter_config.json", settings)
    message = refused(toy, folder, saved[1])
    assert "lora_a is (64, 4), expected (64, 6)" in message
    assert "and 19 more" in message


def test_an_adapter_of_another_base_is_refused(toy, saved):
    message = refused(toy, saved[0], {**saved[1], "sha256": "f" * 64})
    assert "belongs to another base" in message
    assert saved[1]["sha256"] in message
    assert "f" * 64 in message


def test_an_adapter_with_arrays_too_few_or_too_many_is_refused(toy, saved, tmp_path):
    folder, arrays = bad_copy(saved, tmp_path)
    first, *_ = sorted(arrays)
    write_safetensors(folder / "adapters.safetensors", {k: v for k, v in arrays.items() if k != first}, {})
    assert f"{first} is missing" in refused(toy, folder, saved[1])
    write_safetensors(folder / "adapters.safetensors", arrays | {"other": mx.zeros(1)}, {})
    assert "other is not expected" in refused(toy, folder, saved[1])


def test_an_adapter_for_more_layers_is_refused(toy, saved, tmp_path):
    folder, _ = bad_copy(saved, tmp_path)
    settings = read_json(folder / "adapter_config.json")
    settings["lora_parameters"]["keys"].append("language_model.model.layers.7.conv.in_proj")
    write_json(folder / "adapter_config.json", settings)
    assert "the base has no layer language_model.model.layers.7.conv.in_proj" in refused(toy, folder, saved[1])


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_an_adapter_of_another_kind_is_refused(toy, saved, tmp_path, kind):
    folder, _ = bad_copy(saved, tmp_path)
    settings = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**settings, "fine_tune_type": kind})
    assert f"fine_tune_type is '{kind}'" in refused(toy, folder, saved[1])


def test_missing_and_damaged_files_are_named(toy, saved, tmp_path):
    folder, _ = bad_copy(saved, tmp_path)
    weights, settings = folder / "adapters.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert f"{weights} is damaged, cut short" in refused(toy, folder, saved[1], ModelFormatError)
    weights.unlink()
    assert f"{weights} is missing: no teacher is saved there; run lfm_finetune" in refused(toy, folder, saved[1])
    shutil.copy(saved[0] / "adapters.safetensors", weights)
    write_json(settings, {"base": saved[1]})
    assert "lacks lora_parameters with keys and rank" in refused(toy, folder, saved[1])
    settings.unlink()
    assert f"{settings} is missing" in refused(toy, folder, saved[1])
