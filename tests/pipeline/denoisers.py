"""Tiny denoisers of several families, and a call of each."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from torch import Tensor

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


def model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """With weights that are the same each time, none of them zero."""
    name, config = MODELS[family]
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
    raise KeyError(family)
