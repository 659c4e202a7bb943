"""LFM2.5-VL as configuration: the published 1.6B model, and a small one of the same architecture.

Facts of the 1.6B model are from its published `config.json`; every size keeps the special token ids, the alternation of
short convolutions and grouped-query attention, SigLIP2 NaFlex vision and the 2 x 2 pixel unshuffle.
"""

from __future__ import annotations

from typing import Any

from mlx_cxr.core.config_schema import TinyTeacherConfig

PAD, BOS, EOS = 0, 1, 7
IM_START, IM_END = 6, 7
IMAGE, THUMBNAIL, IMAGE_START, IMAGE_END = 396, 497, 498, 499
PATCH = 16
DOWNSAMPLE = 2
_FULL_ATTENTION_LAYERS = (2, 5, 8, 10, 12, 14)


def full_config() -> dict[str, Any]:
    """`config.json` of LFM2.5-VL-1.6B: 1.17 B parameters of language, 0.4 B of vision."""
    layers = ["full_attention" if i in _FULL_ATTENTION_LAYERS else "conv" for i in range(16)]
    text = {
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "block_auto_adjust_ff_dim": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 65536,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_patches": 256,
    }
    return _config(layers, text, vision, projector=2560)


def tiny_config(settings: TinyTeacherConfig, vocabulary: int) -> dict[str, Any]:
    """`config.json` of a small model.

    Args:
        vocabulary: rows of the embedding, as the tokenizer has them.
    """
    hidden = settings.hidden_size
    layers = ["full_attention" if i % 2 else "conv" for i in range(settings.layers)]
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "block_auto_adjust_ff_dim": False,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": max(1, hidden // 64),
        "vocab_size": vocabulary,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_patches": 64,
    }
    return _config(layers, text, vision, projector=2 * hidden)


def image_processor_config() -> dict[str, Any]:
    """`preprocessor_config.json`: one tile of at most 512 x 512 px, grey levels scaled to [-1, 1]."""
    return {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "processor_class": "Lfm2VlProcessor",
        "do_image_splitting": False,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "downsample_factor": DOWNSAMPLE,
        "encoder_patch_size": PATCH,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_tokens": 256,
        "max_num_patches": 1024,
        "min_image_tokens": 64,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "tile_size": 512,
        "use_thumbnail": False,
    }


def _config(layers: list[str], text: dict[str, Any], vision: dict[str, Any], projector: int) -> dict[str, Any]:
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "image_token_id": IMAGE,
        "downsample_factor": DOWNSAMPLE,
        "encoder_patch_size": PATCH,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": projector,
        "projector_bias": True,
        "projector_use_layernorm": False,
        "text_config": {
            "model_type": "lfm2",
            "num_hidden_layers": len(layers),
            "layer_types": layers,
            "block_dim": text["hidden_size"],
            "conv_dim": text["hidden_size"],
            "conv_dim_out": text["hidden_size"],
            "conv_L_cache": 3,
            "conv_bias": False,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            **text,
        },
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "num_channels": 3,
            "patch_size": PATCH,
            "vision_use_head": False,
            **vision,
        },
    }
