"""Tiny denoisers of several families, and a call of each."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.pipeline import lorable

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 8,
            **HEADS,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
            **HEADS,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, **HEADS},
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 4, 4),
            **HEADS,
        },
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
            "axes_lens": [64, 64, 64],
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
    ),
}


_SD = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 768,
}
_REFINER = {
    **{k: v for k, v in MODELS["sdxl"][1].items() if not k.endswith("types")},
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
}
_FLUX = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, **HEADS}
_LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    **HEADS,
}
_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 32,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
# families that no call is needed of
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "sd15": ("UNet2DConditionModel", _SD),
    "sd2": ("UNet2DConditionModel", {**_SD, "cross_attention_dim": 1024, "use_linear_projection": True}),
    "sdxl_refiner": ("UNet2DConditionModel", _REFINER),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
        },
    ),
    "flux2": ("Flux2Transformer2DModel", {**_FLUX, "axes_dims_rope": (4, 4, 4, 4)}),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            **HEADS,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"sample_size": 8, "num_layers": 2, "caption_channels": 32, "cross_attention_dim": 32, **HEADS},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "caption_channels": 32,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "sample_size": 8,
            **HEADS,
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
            **HEADS,
        },
    ),
    "ltx": ("LTXVideoTransformer3DModel", _LTX),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {
            **_LTX,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 32,
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"num_layers": 2, "pooled_projection_dim": 32, "in_channels": 4, "text_embed_dim": 32, **HEADS},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            **HEADS,
        },
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [32, 32],
            "text_emb_dim": 32,
            "num_routed_experts": 2,
            "axes_dims_rope": (8, 8),
            "llama_layers": [0, 1],
            **HEADS,
        },
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 24,
            "axes_dims_rope": (4, 4, 8),
            **HEADS,
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 32,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,  # which diffusers computes in float32 alone
            **HEADS,
        },
    ),
    "ideogram4": (
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "intermediate_size": 24,
            "adaln_dim": 8,
            "llm_features_dim": 32,
            "mrope_section": (4, 2, 2),
            **HEADS,
        },
    ),
    "ernie_image": (
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 4, 8),
        },
    ),
    "cogview4": ("CogView4Transformer2DModel", {**_COGVIEW, **HEADS}),
    "hunyuan_image": (
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "text_embed_2_dim": 16,
            "rope_axes_dim": (8, 8),
            **HEADS,
        },
    ),
    "qwen_image21": (
        "QwenImage21Transformer2DModel",
        {"in_channels": 16, "out_channels": 16, "num_layers": 2, "context_in_dim": 32, "axes_dims_rope": (4, 6, 6)}
        | HEADS,
    ),
    "longcat_image": (
        "LongCatImageTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
    ),
    "ovis_image": ("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 4, "axes_dims_rope": (4, 4, 8)}),
    "bria": ("BriaTransformer2DModel", {**_FLUX, "axes_dims_rope": [4, 4, 8]}),
    "bria_fibo": (
        "BriaFiboTransformer2DModel",
        {**_FLUX, "text_encoder_dim": 16, "axes_dims_rope": [4, 4, 8]},
    ),
    "bria_fibo2": (
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
        },
    ),
    "prx": (
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
    ),
    "glm_image": ("GlmImageTransformer2DModel", {**_COGVIEW, "prior_vq_quantizer_codebook_size": 16, **HEADS}),
    "nucleus_image": (
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "joint_attention_dim": 32,
            "axes_dims_rope": (16, 24, 24),
            "moe_enabled": False,
        },
    ),
}
SAVED |= {
    family: (name, lorable.config(name))
    for family, name in {
        "hunyuan_video15": "HunyuanVideo15Transformer3DModel",
        "framepack": "HunyuanVideoFramepackTransformer3DModel",
        "kandinsky5": "Kandinsky5Transformer3DModel",
        "sana_video": "SanaVideoTransformer3DModel",
        "skyreels_v2": "SkyReelsV2Transformer3DModel",
        "helios": "HeliosTransformer3DModel",
        "chrono_edit": "ChronoEditTransformer3DModel",
        "wan_animate2": "WanAnimate2Transformer3DModel",
        "minimax_h3": "MiniMaxH3Transformer3DModel",
        "flux3": "Flux3Transformer2DModel",
        "ace_step": "AceStepTransformer1DModel",
    }.items()
}
CALLED_TOO = ("krea2", "cosmos", "cogview4", "hunyuan_image")  # of these `output` knows a call, too
# models of no family that is known
UNNAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "cogview3": ("CogView3PlusTransformer2DModel", {**_COGVIEW, **HEADS}),
    "kandinsky6": ("Kandinsky6Transformer3DModel", lorable.config("Kandinsky6Transformer3DModel")),
}


def model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """With weights that are the same each time, none of them zero."""
    name, config = {**SAVED, **UNNAMED}[family]
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for p in made.parameters():
            if not p.abs().max():
                p.normal_(std=0.05)
    return made.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def output(net: Any, family: str, **kwargs: Any) -> Tensor:
    """What a denoiser makes of a fixed input; `kwargs` are further arguments of its call."""
    run = functools.partial(net, **kwargs)
    g, dtype = torch.Generator().manual_seed(1), next(net.parameters()).dtype
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    t = torch.tensor([300.0], dtype=dtype)
    if family == "sdxl":
        added = {"text_embeds": new(1, 32), "time_ids": torch.arange(6.0)[None].to(dtype)}
        return run(new(1, 4, 8, 8), t, new(1, 5, 2048), added_cond_kwargs=added).sample
    if family == "sd3":
        return run(new(1, 4, 8, 8), new(1, 5, 32), new(1, 64), t).sample
    if family == "flux":
        ids = torch.stack(
            [
                torch.zeros(16),
                *torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")[0].flatten().expand(2, 16),
            ],
            -1,
        )
        return run(
            new(1, 16, 4),
            new(1, 5, 32),
            new(1, 32),
            t / 1000,
            ids.to(dtype),
            torch.zeros(5, 3, dtype=dtype),
            guidance=t / 100,
        ).sample
    if family == "wan":
        return run(new(1, 4, 2, 8, 8), t, new(1, 5, 32)).sample
    if family == "qwen_image":
        mask = torch.ones(1, 5, dtype=torch.bool)
        return run(new(1, 16, 16), new(1, 5, 32), mask, t / 1000, [[(1, 4, 4)]]).sample
    if family == "z_image":
        return run([new(4, 1, 8, 8)], t / 1000, [new(5, 32)]).sample[0]
    if family == "lumina2":
        return run(new(1, 4, 8, 8), t / 1000, new(1, 5, 32), torch.ones(1, 5, dtype=torch.bool)).sample
    if family == "krea2":
        return run(new(1, 9, 16), new(1, 5, 2, 16), t / 1000, torch.arange(42.0).reshape(14, 3).to(dtype)).sample
    if family == "cosmos":
        return run(new(1, 4, 2, 8, 8), t / 1000, new(1, 5, 32), fps=16).sample
    if family == "cogview4":
        size = torch.tensor([[32.0, 32.0]], dtype=dtype)
        return run(new(1, 4, 8, 8), new(1, 5, 32), t, size, size, size).sample
    if family == "hunyuan_image":
        seen = torch.ones(1, 5, dtype=torch.bool)
        return run(new(1, 4, 8, 8), t, new(1, 5, 32), seen, None, new(1, 5, 16), seen).sample
    raise KeyError(family)
