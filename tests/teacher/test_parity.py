"""The teacher against an independent LFM2-VL: that of transformers, in PyTorch, with the tiny checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toy_teacher import opened, perturbed_adapters, prompts_of

from mlx_cxr.core.config_schema import LoraConfig
from mlx_cxr.core.files import read_json
from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.decoder import decode
from mlx_cxr.teacher.image_embeddings import encode_images, image_patches
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.prompt import PromptFormat, padded
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings
from mlx_cxr.training.losses import masked_bce

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity with it is not checked here")

TEXTS = ("Edema. Clear lungs, normal heart.", "The heart is enlarged " * 9, "No acute process.")


def torch_model(folder: Path) -> torch.nn.Module:
    """Transformers' model in float32 and evaluation mode; every weight is given, and none is left over."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    settings = Lfm2VlConfig(**read_json(folder / "config.json"))
    settings._attn_implementation = "eager"
    model = Lfm2VlForConditionalGeneration(settings).float().eval()
    state = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        array = np.array(value)
        if name.endswith("conv.conv.weight"):
            array = array.transpose(0, 2, 1)
        name = name.removeprefix("language_model.model.")
        top = name.split(".")[0]
        prefix = "model." if top in ("vision_tower", "multi_modal_projector") else "model.language_model."
        state[prefix + name] = torch.from_numpy(np.ascontiguousarray(array))
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if ".head." not in name]
    return model


@pytest.fixture(scope="module")
def reference(toy) -> torch.nn.Module:
    return torch_model(toy.base)


def torch_readout(logits: torch.Tensor, read: np.ndarray, form: PromptFormat) -> torch.Tensor:
    """(B, 14): yes minus no of the whole vocabulary's logits."""
    at = torch.gather(logits, 1, torch.from_numpy(read).long()[..., None].expand(-1, -1, logits.shape[-1]))
    return at[..., form.yes] - at[..., form.no]


def test_states_and_answers_of_text_equal_transformers(base, form, reference):
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    embeddings = prompt_embeddings(language, form, mx.array(batch.ids))
    with torch.no_grad():
        wanted = reference(torch.from_numpy(batch.ids).long(), output_hidden_states=True)
    states = language.model.embedding_norm(decode(language.model.layers, embeddings))
    np.testing.assert_allclose(np.array(states), wanted.hidden_states[-1].numpy(), atol=1e-4)
    answers = finding_logits(language, embeddings, mx.array(batch.read), answer_direction(language, form.yes, form.no))
    theirs = torch_readout(wanted.logits, batch.read, form).numpy()
    np.testing.assert_allclose(np.array(answers), theirs, atol=1e-4)
    # The comparison says something only if answers differ between studies and findings.
    assert theirs.std(axis=0).min() > 3e-4
    assert theirs.std(axis=1).min() > 1e-2


def test_answers_are_those_of_mlx_vlm_itself(base, form):
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    whole = np.array(language(mx.array(batch.ids)).logits)
    theirs = np.take_along_axis(whole, batch.read[..., None], axis=1)
    answers = finding_logits(
        language,
        prompt_embeddings(language, form, mx.array(batch.ids)),
        mx.array(batch.read),
        answer_direction(language, form.yes, form.no),
    )
    np.testing.assert_allclose(np.array(answers), theirs[..., form.yes] - theirs[..., form.no], atol=1e-5)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_image_embeddings_equal_transformers(base, reference, size):
    images = np.random.default_rng(1).integers(0, 256, (2, 70, 70)).astype(np.uint8)
    ours = np.array(encode_images(base, images, size))
    patches = torch.from_numpy(image_patches(images, size, base.grey))
    side = size // 16
    with torch.no_grad():
        wanted = reference.model.get_image_features(
            pixel_values=patches,
            spatial_shapes=torch.full((2, 2), side),
            pixel_attention_mask=torch.ones(2, side * side, dtype=torch.long),
        ).pooler_output
    wanted = torch.stack(list(wanted)).numpy()
    assert ours.shape == wanted.shape == (2, (side // 2) ** 2, 64)
    np.testing.assert_allclose(ours, wanted, atol=1e-3 * np.abs(wanted).max())
    assert np.abs(wanted[0] - wanted[1]).max() > 0.05 * np.abs(wanted).max(), "two films look alike to the tower"


def test_image_and_text_together_equal_transformers(base, reference):
    """One padded batch through the whole model, images as the published processor pads them."""
    form = PromptFormat.of(base.tokenizer, image_tokens=4, max_tokens=320)
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64)).astype(np.uint8)
    batch = padded(prompts_of(form, TEXTS), 32)
    language = base.model.language_model
    embeddings = prompt_embeddings(language, form, mx.array(batch.ids), encode_images(base, images, 64))
    ours = finding_logits(language, embeddings, mx.array(batch.read), answer_direction(language, form.yes, form.no))
    patches = np.zeros((3, 1024, 768), np.float32)
    patches[:, :16] = image_patches(images, 64, base.grey)
    mask = np.zeros((3, 1024), np.int64)
    mask[:, :16] = 1
    with torch.no_grad():
        wanted = reference(
            torch.from_numpy(batch.ids).long(),
            pixel_values=torch.from_numpy(patches),
            spatial_shapes=torch.full((3, 2), 4),
            pixel_attention_mask=torch.from_numpy(mask),
        )
    np.testing.assert_allclose(np.array(ours), torch_readout(wanted.logits, batch.read, form).numpy(), atol=1e-3)


class TorchLora(torch.nn.Module):
    """LoRA written out: `W x + alpha / rank * (x A) B`."""

    def __init__(self, linear: torch.nn.Linear, a: np.ndarray, b: np.ndarray, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.lora_a, self.lora_b = (torch.nn.Parameter(torch.from_numpy(np.array(value))) for value in (a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * (x @ self.lora_a) @ self.lora_b


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_the_masked_loss_equal_pytorch(toy, checkpoint):
    """Loss, and the gradient of every A and B, under soft, masked and weighted labels."""
    base, reference = opened(toy.base), torch_model(toy.base)
    attach_lora(base.model, LoraConfig(rank=4, alpha=12.0, dropout=0.0), seed=5)
    perturbed_adapters(base.model)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    batch = padded(prompts_of(form, TEXTS), 32)
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 2, (3, len(LABELS))).astype(np.float32)
    targets[rng.random(targets.shape) < 0.3] = np.nan
    targets[0, 0] = 0.5
    positive = rng.uniform(0.5, 3, len(LABELS)).astype(np.float32)
    language, loss = base.model.language_model, masked_bce(positive)
    direction = answer_direction(language, form.yes, form.no)

    def objective() -> mx.array:
        embeddings = prompt_embeddings(language, form, mx.array(batch.ids))
        logits = finding_logits(language, embeddings, mx.array(batch.read), direction, checkpoint)
        return loss(logits, mx.array(targets))

    value, gradients = nn.value_and_grad(base.model, objective)()
    ours = {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}
    weights = {name: np.array(weight) for name, weight in tree_flatten(base.model.trainable_parameters())}
    reference.requires_grad_(False)
    theirs = {}
    for name in {name.rsplit(".", 1)[0] for name in weights}:
        path = name.replace("language_model.model.", "model.language_model.", 1)
        parent = reference.get_submodule(path.rsplit(".", 1)[0])
        leaf = path.rsplit(".", 1)[1]
        layer = TorchLora(getattr(parent, leaf), weights[f"{name}.lora_a"], weights[f"{name}.lora_b"], 12.0 / 4)
        setattr(parent, leaf, layer)
        theirs |= {f"{name}.lora_a": layer.lora_a, f"{name}.lora_b": layer.lora_b}
    logits = torch_readout(reference(torch.from_numpy(batch.ids).long()).logits, batch.read, form)
    known = ~np.isnan(targets)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(np.nan_to_num(targets)), pos_weight=torch.from_numpy(positive), reduction="none"
    )
    wanted = each[torch.from_numpy(known)].mean()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert set(ours) == set(theirs)
    largest = max(np.abs(gradient).max() for gradient in ours.values())
    assert largest > 1e-3
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight.grad.numpy(), atol=2e-4 * largest, err_msg=name)
