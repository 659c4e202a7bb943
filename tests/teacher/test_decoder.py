"""The decoder's layers: against mlx-vlm's, a beginning that is shared, positions that are read, dropout."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm.trainer.peft.lora_layers import LoRALinear
from toy_teacher import opened, perturbed_adapters, prompts_of, quantized_copy

from mlx_cxr.core.config_schema import LoraConfig, TeacherConfig
from mlx_cxr.ops import activations
from mlx_cxr.ops.streams import batch_parallel
from mlx_cxr.ops.switch import fast_ops
from mlx_cxr.teacher.decoder import Dropout, decode, decoder_layer, projections
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.prompt import PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings, score

TEXTS = ("Edema. Clear lungs, normal heart.", "The heart is enlarged " * 9, "No acute process.")


@pytest.fixture(params=[True, False], ids=["fast", "stock"])
def either(request):
    """With the CPU paths and without."""
    with fast_ops(request.param):
        yield request.param


def adapted(folder, **settings: object):
    base = opened(folder)
    attach_lora(base.model, LoraConfig(**({"rank": 4, "dropout": 0.0} | settings)), seed=1)
    perturbed_adapters(base.model)
    return base


@pytest.mark.parametrize("number", [0, 1], ids=["convolution", "attention"])
def test_a_layer_is_mlx_vlms(toy, either, number):
    """With adapters; output, and gradients of input and adapters."""
    layer = adapted(toy.base).model.language_model.model.layers[number]
    assert layer.is_attention_layer == (number == 1)
    x, weights = (mx.random.normal((3, 21, 64), key=mx.random.key(i)) for i in range(2))
    mask = "causal" if layer.is_attention_layer else None

    def of(forward: Callable[[mx.array], mx.array]) -> list[np.ndarray]:
        def total(parameters: dict, x: mx.array) -> mx.array:
            layer.update(parameters)
            return mx.sum(forward(x) * weights)

        slopes = mx.grad(total, argnums=(0, 1))(layer.trainable_parameters(), x)
        return [np.array(a) for a in (forward(x), slopes[1], *(v for _, v in tree_flatten(slopes[0])))]

    ours, theirs = of(lambda x: decoder_layer(layer, x, (), None)[0]), of(lambda x: layer(x, mask))
    assert len(ours) == len(theirs) > 6
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("layers", [1, 2], ids=["ends in a convolution", "ends in attention"])
@pytest.mark.parametrize("shared", [0, 1, 7])
def test_reading_some_positions_is_reading_all_and_choosing(base, either, layers, shared):
    tower = base.model.language_model.model.layers[:layers]
    x = mx.random.normal((3, 40, 64), key=mx.random.key(0))
    x[:, :7] = x[:1, :7]
    read = mx.array(np.random.default_rng(0).integers(7, 40, (3, 14)).astype(np.int32))
    whole = np.array(decode(tower, x))
    some = np.array(decode(tower, x, read, shared))
    np.testing.assert_allclose(some, np.take_along_axis(whole, np.array(read)[..., None], axis=1), atol=2e-5)
    np.testing.assert_allclose(np.array(decode(tower, x, shared=shared)), whole[:, shared:], atol=2e-5)


def slopes(base, form: PromptFormat, shared: int, checkpoint: bool, image: mx.array | None) -> dict[str, np.ndarray]:
    """Logits, and gradients of a weighted sum of them, by adapter."""
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    direction = answer_direction(language, form.yes, form.no)
    weights = mx.array(np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32))

    def logits() -> mx.array:
        embeddings = prompt_embeddings(language, form, mx.array(batch.ids), image)
        return finding_logits(language, embeddings, mx.array(batch.read), direction, checkpoint, shared)

    _, gradients = nn.value_and_grad(base.model, lambda: mx.sum(logits() * weights))()
    return {"logits": np.array(logits())} | {name: np.array(value) for name, value in tree_flatten(gradients)}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["float32", "4 bits", "film"])
def test_a_shared_beginning_changes_neither_answers_nor_gradients(toy, tmp_path, kind, checkpoint):
    base = adapted(quantized_copy(tmp_path / "q", toy.base, 4) if kind == "4 bits" else toy.base)
    image = mx.random.normal((3, 4, 64), key=mx.random.key(2)) if kind == "film" else None
    form = PromptFormat.of(base.tokenizer, image_tokens=4 if kind == "film" else 0, max_tokens=320)
    assert len(form.head) > 10
    plain = slopes(base, form, 0, checkpoint, image)
    shared = slopes(base, form, len(form.head), checkpoint, image)
    assert set(shared) == set(plain)
    largest = max(np.abs(value).max() for value in plain.values())
    for name, value in plain.items():
        np.testing.assert_allclose(shared[name], value, atol=1e-5 * largest, err_msg=name)
    assert min(np.abs(plain[name]).max() for name in plain) > 1e-4 * largest, "each adapter has a gradient"


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="batches are cut on the CPU backend only")
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_in_parts_gives_the_same_answers_and_gradients_dropout_included(toy, parts, shared, checkpoint):
    base = adapted(toy.base, dropout=0.3)
    form = PromptFormat.of(base.tokenizer, image_tokens=0, max_tokens=320)
    base.model.train()

    def computed(count: int) -> dict[str, np.ndarray]:
        mx.random.seed(5)
        with batch_parallel(count) as active:
            assert active == count
            return slopes(base, form, len(form.head) if shared else 0, checkpoint, None)

    whole, cut = computed(1), computed(parts)
    largest = max(np.abs(value).max() for value in whole.values())
    for name, value in whole.items():
        np.testing.assert_allclose(cut[name], value, atol=1e-5 * largest, err_msg=name)
    base.model.eval()
    without = slopes(base, form, 0, checkpoint, None)["logits"]
    assert np.abs(without - whole["logits"]).max() > 1e-3, "dropout did something"


def test_a_beginning_is_shared_where_it_saves_enough_and_scores_are_the_same(base, form, monkeypatch):
    head = len(form.head)
    assert form.shared(1) == 0
    assert form.shared(64 // head + 2) == head
    few = prompts_of(form, ["Edema.", "Clear.", "No acute process. " * 4] * 3)
    shared = score(base, form, few, None, TeacherConfig(batch_size=9)).logits
    monkeypatch.setattr(PromptFormat, "shared", lambda self, studies: 0)
    np.testing.assert_allclose(shared, score(base, form, few, None, TeacherConfig(batch_size=9)).logits, atol=2e-5)


def transparent(dropout: float) -> LoRALinear:
    """An adapted layer that gives back twice what its adapter sees, and nothing else."""
    layer = LoRALinear(64, 64, r=64, dropout=dropout, scale=2.0)
    layer.linear.weight = mx.zeros((64, 64))
    layer.lora_a = layer.lora_b = mx.eye(64)
    return layer


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean_with_one_mask_for_one_input(dropout):
    layers = transparent(dropout), transparent(dropout)
    x = mx.full((50, 40, 64), 1.5)
    first, second = (np.array(y) / 3 for y in projections(x, Dropout(mx.random.key(0), 0, 50), *layers))
    np.testing.assert_array_equal(first, second)
    kept = first > 0
    assert kept.mean() == pytest.approx(1 - dropout, abs=0.006)
    assert len(np.unique(first)) == 2
    assert first.mean() == pytest.approx(1.0, abs=0.005)
    assert kept.mean(axis=(0, 1)).std() < 0.02, "no input is dropped more often than others"
    other = np.array(projections(x, Dropout(mx.random.key(1), 0, 50), layers[0])[0]) > 0
    assert (other != kept).mean() == pytest.approx(2 * dropout * (1 - dropout), abs=0.01)
    np.testing.assert_array_equal(np.array(projections(x, None, layers[0])[0]), 3.0)
    rows = Dropout(mx.random.key(0), 20, 50)
    np.testing.assert_array_equal(np.array(projections(x[20:33], rows, layers[0])[0]) / 3, first[20:33])


def test_compiled_on_the_cpu_is_the_function_itself():
    def function(x: mx.array) -> mx.array:
        return x + 1

    assert (activations.compiled(function) is function) == (mx.default_device().type == mx.DeviceType.cpu)
