"""Every class of diffusers that takes LoRAs, in a tiny size."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.loaders.peft import PeftAdapterMixin

# what parameters of configs are called: small values
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "adaln_lora_dim", "condition_dim"), 4),
    **dict.fromkeys(("audio_in_channels", "audio_out_channels", "in_visual_dim", "out_visual_dim"), 4),
    **dict.fromkeys(("num_layers", "num_single_layers", "num_hidden_layers", "num_visual_blocks"), 2),
    **dict.fromkeys(("num_mmdit_layers", "num_single_dit_layers", "n_layers", "nlayers", "num_text_layers"), 2),
    **dict.fromkeys(("num_refiner_layers", "n_refiner_layers", "num_text_blocks", "layers_per_block"), 1),
    **dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks", "approximator_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "nheads", "num_key_value_heads"), 2),
    **dict.fromkeys(("audio_num_attention_heads", "num_cross_attention_heads", "text_num_attention_heads"), 2),
    **dict.fromkeys(("n_kv_heads", "text_num_key_value_heads", "face_encoder_num_heads", "cross_attn_num_heads"), 2),
    **dict.fromkeys(("inject_face_latents_blocks", "cross_attn_interval", "num_kv_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "head_dim", "audio_attention_head_dim", "cross_attention_head_dim"), 16),
    **dict.fromkeys(("freq_dim", "time_dim", "cross_attn_dim_head", "adaln_dim", "timestep_channels"), 16),
    **dict.fromkeys(("time_embed_dim", "timestep_embed_dim", "sample_width", "sample_height", "sample_size"), 8),
    **dict.fromkeys(("hidden_size", "dim", "model_dim", "token_dim", "dim_cond", "cap_feat_dim", "embedding_dim"), 32),
    **dict.fromkeys(("text_dim", "text_embed_dim", "text_embed_2_dim", "text_in_dim", "in_text_dim"), 32),
    **dict.fromkeys(("in_text_dim2", "text_encoder_dim", "text_hidden_dim", "llm_features_dim"), 32),
    **dict.fromkeys(("joint_attention_dim", "pooled_projection_dim", "caption_projection_dim", "context_in_dim"), 32),
    **dict.fromkeys(("cross_attention_dim", "caption_channels", "audio_cross_attention_dim", "cond_in_channels"), 32),
    **dict.fromkeys(("image_dim", "image_proj_dim", "image_embed_dim", "time_embed_hidden_dim", "source_dim"), 32),
    **dict.fromkeys(("target_dim", "text_emb_dim", "encoder_hidden_size", "cond_embed_dim"), 32),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size", "ffn_hidden_size", "text_intermediate_size"), 64),
    **dict.fromkeys(("target_vocab_size", "vocab_size", "codebook_size"), 16),
    "pos_embed_max_size": 64,
    "norm_num_groups": 4,
    "max_size": (4, 8, 8),
    "axes_dims_rope": (4, 4, 8),
    "axes_dims": (4, 4, 8),
    "axes_lens": (64, 64, 64),
    "rope_axes_dim": (4, 4, 8),
    "rope_dim": (4, 4, 8),
}
_UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2, "num_attention_heads": None}
_LEVELS = ("CrossAttnDownBlock{}", "DownBlock{}"), ("UpBlock{}", "CrossAttnUpBlock{}")
# of classes whose parameters mean something else, or hang together, or choose more layers
_OTHERS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"block_out_channels": (8,)},
    "AutoencoderKLFlux2": {"block_out_channels": (8,) * 4},
    "ChromaTransformer2DModel": {"approximator_num_channels": 16, "approximator_hidden_dim": 32},
    "ChronoEditTransformer3DModel": {"added_kv_proj_dim": 32},
    "ControlNetModel": {**_UNET, "down_block_types": tuple(level.format("2D") for level in _LEVELS[0])},
    "CosmosTransformer3DModel": {"use_crossattn_projection": True, "crossattn_proj_in_channels": 32},
    "DreamLiteUNetModel": {
        **{k: v for k, v in _UNET.items() if k != "block_out_channels"},
        "block_out_channels": (8, 16, 16),
    },
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [32, 32],
        "llama_layers": [0, 1],
        "num_routed_experts": 2,
        "axes_dims_rope": (8, 8),
    },
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8), "guidance_embeds": True},
    "Flux3Transformer2DModel": {"axes_dims_rope": (4, 4, 4, 4), "flow_map": True},
    "HunyuanVideo15Transformer3DModel": {"use_meanflow": True},
    "HunyuanVideoFramepackTransformer3DModel": {"has_image_proj": True, "has_clean_x_embedder": True},
    "MotifVideoTransformer3DModel": dict.fromkeys(
        ("enable_text_cross_attention_dual", "enable_text_cross_attention_single"), True
    ),
    "NucleusMoEImageTransformer2DModel": {"moe_enabled": False, "num_attention_heads": 16},
    "SkyReelsV2Transformer3DModel": {"added_kv_proj_dim": 32, "inject_sample_info": True},
    "UNet2DConditionModel": {
        **_UNET,
        "down_block_types": tuple(level.format("2D") for level in _LEVELS[0]),
        "up_block_types": tuple(level.format("2D") for level in _LEVELS[1]),
        "cross_attention_dim": 768,
    },
    "UNetMotionModel": {
        **_UNET,
        "num_attention_heads": 2,
        "down_block_types": tuple(level.format("Motion") for level in _LEVELS[0]),
        "up_block_types": tuple(level.format("Motion") for level in _LEVELS[1]),
        "motion_num_attention_heads": 2,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    },
    "UVit2DModel": {
        "hidden_size": 32,
        "in_channels": 16,
        "block_out_channels": 16,
        "num_res_blocks": 1,
        "block_num_heads": 2,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 32,
        "norm_num_groups": 4,
    },
    "WanAnimate2Transformer3DModel": {"in_dim": 12, "dim": 32, "out_dim": 4},
    "WanAnimateTransformer3DModel": {
        "in_channels": 12,
        "added_kv_proj_dim": 32,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        **dict.fromkeys(("motion_style_dim", "motion_encoder_dim", "face_encoder_hidden_dim"), 16),
    },
    "WanTransformer3DModel": {"added_kv_proj_dim": 32},
    "WanVACETransformer3DModel": {"vace_layers": [0], "added_kv_proj_dim": 32},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 1],
        "control_refiner_layers_places": [0],
        "control_in_dim": 4,
        "dim": 64,
    },
}
NOT_BUILT = {"QwenImageMultiControlNetModel"}  # a list of other models


@functools.cache
def classes() -> Mapping[str, type]:
    """{name: class} of the models that take LoRAs."""
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if "Mixin" not in name}
    return {
        name: kind
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, PeftAdapterMixin)
        and issubclass(kind, diffusers.ModelMixin)
        and name not in NOT_BUILT
    }


def config(name: str) -> dict[str, Any]:
    """A small one of a class."""
    wanted = inspect.signature(getattr(diffusers, name).__init__).parameters
    values = {**{k: v for k, v in _SMALL.items() if k in wanted}, **_OTHERS.get(name, {})}
    return {k: v for k, v in values.items() if k in wanted and v is not None}


def model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """With weights that are the same each time."""
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config(name)).to(dtype).eval().requires_grad_(False)
