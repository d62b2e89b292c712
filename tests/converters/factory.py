"""Adapter files as other programs write them, and what they do to every layer: made here, from formats.md, by none of the code under test.

Keys are spelt by the f-strings below, updates are dense formulas in float64. Taken from the package are only the rules of which rows of an original
layer are which layer of diffusers' (test_families.py traces these). Widths are tiny, names and ratios are real.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpeft.bundle import Rule
from diffpeft.converters import TABLES

ORIGINAL = ("kohya", "comfyui")  # formats with the original program's names
SINGLE = ("peft", "lycoris")  # formats of one component
FORMATS = (*ORIGINAL, "kohya-diffusers", "diffusers", "peft", "lycoris")

# {family: original layer: (rows, columns, *kernel)}
_UNET = {
    "input_blocks.4.0.in_layers.2": (12, 8, 3, 3),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (12, 24),
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": (96, 12),
    "time_embed.0": (48, 12),
}
_SD = {**_UNET, "output_blocks.2.1.conv": (12, 12, 3, 3)}
_XL = {**_UNET, "input_blocks.4.1.proj_in": (12, 12), "label_emb.0.0": (48, 20)}
SITES: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {**_SD, "input_blocks.4.1.proj_in": (12, 12, 1, 1)},
    "sd2": {**_SD, "input_blocks.4.1.proj_in": (12, 12)},
    "sdxl": {**_XL, "output_blocks.2.2.conv": (12, 12, 3, 3)},
    "sdxl_refiner": {**_XL, "output_blocks.2.1.conv": (12, 12, 3, 3)},
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": (36, 12),
        "joint_blocks.0.context_block.adaLN_modulation.1": (72, 12),
        "joint_blocks.23.context_block.adaLN_modulation.1": (24, 12),
        "x_embedder.proj": (12, 16, 2, 2),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "flux": {
        "double_blocks.0.img_attn.qkv": (36, 12),
        "double_blocks.0.txt_mlp.0": (48, 12),
        "single_blocks.1.linear1": (84, 12),
        "final_layer.adaLN_modulation.1": (24, 12),
        "img_in": (12, 8),
    },
    "chroma": {
        "double_blocks.0.txt_attn.qkv": (36, 12),
        "single_blocks.1.linear1": (84, 12),
        "distilled_guidance_layer.layers.0.in_layer": (20, 20),
        "final_layer.linear": (8, 12),
    },
    "flux2": {
        "double_blocks.0.img_attn.qkv": (36, 12),
        "single_blocks.1.linear1": (108, 12),
        "double_stream_modulation_img.lin": (72, 12),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "wan": {
        "blocks.0.self_attn.q": (12, 12),
        "blocks.0.ffn.0": (48, 12),
        "patch_embedding": (12, 16, 1, 2, 2),
        "head.head": (16, 12),
    },
    "qwen_image": {
        "transformer_blocks.0.attn.to_q": (12, 12),
        "transformer_blocks.0.img_mod.1": (72, 12),
        "img_in": (12, 8),
    },
    "z_image": {
        "layers.0.attention.qkv": (36, 12),
        "layers.0.adaLN_modulation.0": (48, 12),
        "context_refiner.0.feed_forward.w1": (24, 12),
        "final_layer.linear": (8, 12),
    },
    "lumina2": {
        "layers.0.attention.qkv": (60, 36),
        "noise_refiner.0.adaLN_modulation.1": (144, 24),
        "context_refiner.0.feed_forward.w1": (48, 36),
        "final_layer.linear": (8, 36),
    },
    "hunyuan_video": {
        "double_blocks.0.img_attn_qkv": (36, 12),
        "double_blocks.0.img_mlp.fc1": (48, 12),
        "single_blocks.1.linear1": (84, 12),
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (36, 12),
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": (24, 12),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "pixart": {
        "blocks.0.attn.qkv": (36, 12),
        "blocks.0.cross_attn.kv_linear": (24, 12),
        "blocks.0.mlp.fc1": (48, 12),
        "x_embedder.proj": (12, 4, 2, 2),
    },
    "sana": {
        "blocks.0.attn.qkv": (36, 12),
        "blocks.0.cross_attn.kv_linear": (24, 12),
        "blocks.0.mlp.inverted_conv.conv": (48, 12, 1, 1),
        "y_embedder.y_proj.fc1": (12, 20),
    },
    "auraflow": {
        "double_layers.0.attn.w2q": (12, 12),
        "double_layers.0.mlpX.c_fc1": (48, 12),
        "single_layers.0.attn.w1k": (12, 12),
        "modF.1": (24, 12),
    },
    "ltx": {
        "transformer_blocks.0.attn1.to_q": (12, 12),
        "adaln_single.linear": (72, 12),
        "patchify_proj": (12, 16),
    },
    "ltx2": {
        "transformer_blocks.0.audio_to_video_attn.to_q": (12, 12),
        "av_ca_a2v_gate_adaln_single.linear": (12, 12),
        "audio_patchify_proj": (12, 16),
    },
    "mochi": {
        "blocks.0.attn.qkv_x": (36, 12),
        "blocks.0.attn.proj_y": (12, 12),
        "blocks.0.mlp_x.w1": (48, 12),
        "final_layer.mod": (24, 12),
    },
    "cogvideox": {
        "transformer.layers.0.attention.query_key_value": (36, 12),
        "transformer.layers.0.mlp.dense_h_to_4h": (48, 12),
        "mixins.adaln_layer.adaLN_modulations.0.1": (144, 24),
    },
    "hidream": {
        "double_stream_blocks.0.block.attn1.to_q": (12, 12),
        "double_stream_blocks.0.block.adaLN_modulation.1": (144, 12),
        "p_embedder.pooled_embedder.linear_1": (12, 20),
    },
    "hunyuan_video15": {  # layers that ComfyUI calls as the original does
        "double_blocks.0.img_mlp.fc1": (48, 12),
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (36, 12),
        "byt5_in.fc1": (24, 20),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "framepack": {"double_blocks.0.img_attn_qkv": (36, 12), "image_projection.up": (36, 12)},
    "kandinsky5": {
        "visual_transformer_blocks.0.self_attention.to_query": (12, 12),
        "text_transformer_blocks.0.feed_forward.in_layer": (48, 12),
    },
    "sana_video": {"blocks.0.attn.qkv": (36, 12), "blocks.0.mlp.t_conv": (12, 12, 3, 1)},
    "skyreels_v2": {"blocks.0.self_attn.q": (12, 12), "fps_projection.2": (72, 12)},
    "helios": {"blocks.0.attn1.to_q": (12, 12), "blocks.0.ffn.0": (48, 12), "patch_short": (12, 16, 1, 2, 2)},
    "chrono_edit": {"blocks.0.self_attn.q": (12, 12), "blocks.0.cross_attn.k_img": (12, 12)},
    "wan_animate2": {"blocks.0.block.self_attn.q": (12, 12), "blocks.0.block.ffn.0": (48, 12)},
    "minimax_h3": {
        "blocks.0.attn.qkv_proj": (36, 12),
        "blocks.0.mlp.fc1": (48, 12),
        "blocks.0.adaln_proj.linear": (216, 8),
    },
    "flux3": {
        "single_blocks.0.q_proj": (12, 12),
        "content_mode_blocks.image.0.mlp_in": (72, 12),
        "final_layer.image.adaLN_modulation.1": (24, 12),
    },
    "ace_step": {"layers.0.cross_attn.q_proj": (12, 12), "layers.0.mlp.gate_proj": (48, 12)},
    "krea2": {
        "blocks.0.attn.wq": (12, 12),
        "blocks.0.mlp.down": (12, 48),
        "txtfusion.refiner_blocks.0.attn.gate": (12, 12),
        "tproj.1": (72, 12),
    },
    "cosmos": {
        "blocks.0.self_attn.q_proj": (12, 12),
        "blocks.0.cross_attn.output_proj": (12, 12),
        "blocks.0.adaln_modulation_mlp.2": (36, 4),
        "final_layer.linear": (8, 12),
    },
    "ideogram4": {
        "layers.0.attention.qkv": (36, 12),
        "layers.0.attention.o": (12, 12),
        "layers.0.feed_forward.w2": (12, 48),
        "adaln_proj": (4, 12),
    },
    "ernie_image": {
        "layers.0.self_attention.to_q": (12, 12),
        "layers.0.mlp.linear_fc2": (12, 48),
        "x_embedder.proj": (12, 8, 1, 1),
    },
    "cogview4": {
        "transformer.layers.0.attention.query_key_value": (36, 12),
        "transformer.layers.0.mlp.dense_4h_to_h": (12, 48),
        "mixins.adaln.adaln_modules.0.1": (144, 4),
        "mixins.final_layer.adaln.1": (24, 4),
        "label_emb.0.0": (4, 12),
    },
    "hunyuan_image": {
        "double_blocks.0.img_attn_qkv": (36, 12),
        "single_blocks.1.linear1": (84, 12),
        "byt5_in.fc3": (12, 20),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "qwen_image21": {
        "transformer_blocks.0.attn.to_q": (12, 12),
        "transformer_blocks.0.img_mlp.gate_up": (72, 12),
        "txt_in.in_layer": (12, 16),
    },
    "omnigen2": {
        "layers.0.attn.to_k": (4, 12),
        "ref_image_refiner.0.feed_forward.linear_1": (48, 12),
        "time_caption_embed.caption_embedder.1": (12, 20),
    },
    "longcat_image": {
        "double_blocks.0.img_attn.qkv": (36, 12),
        "single_blocks.1.linear1": (84, 12),
        "time_in.in_layer": (12, 16),
        "final_layer.adaLN_modulation.1": (24, 12),
    },
    "ovis_image": {
        "double_blocks.0.img_mlp.down_proj": (12, 48),
        "double_blocks.0.txt_attn.qkv": (36, 12),
        "single_blocks.1.linear1": (132, 12),
        "semantic_txt_in": (12, 20),
    },
    "bria": {"single_transformer_blocks.0.proj_mlp": (48, 12), "time_embed.timestep_embedder.linear_1": (12, 16)},
    "bria_fibo": {"transformer_blocks.0.attn.add_q_proj": (12, 12), "caption_projection.1.linear": (6, 8)},
    "bria_fibo2": {
        "layers.0.cross_attention.to_k": (12, 12),
        "perceiver.layers.0.self_attention.to_out.0": (12, 12),
        "final_layer.linear": (8, 12),
    },
    "prx": {"blocks.0.attention.img_qkv_proj": (36, 12), "blocks.0.gate_proj": (42, 12), "txt_in": (12, 20)},
    "glm_image": {"transformer_blocks.0.attn1.to_q": (12, 12), "glyph_projector.net.0.proj": (12, 20)},
    "nucleus_image": {
        "transformer_blocks.0.encoder_proj": (12, 20),
        "transformer_blocks.0.img_mlp.shared_expert.net.2": (12, 24),
    },
}
# {family: (original, diffusers, width)}: a norm that both programs have
NORMS = {
    "sd15": ("input_blocks.4.1.transformer_blocks.0.norm2", "down_blocks.1.attentions.0.transformer_blocks.0.norm2"),
    "sdxl": ("input_blocks.4.1.transformer_blocks.0.norm2", "down_blocks.1.attentions.0.transformer_blocks.0.norm2"),
    "wan": ("blocks.0.norm3", "blocks.0.norm2"),
}
_CLIP = ("text_model.encoder.layers.0.mlp.fc1", (48, 12))
_T5 = ("encoder.block.0.layer.0.SelfAttention.q", (12, 12))
_GEMMA = ("layers.0.self_attn.q_proj", (12, 12))
# {family: component: (what flat names start with, what ComfyUI's do, layer)}
TEXT = {
    "sd15": {"text_encoder": ("lora_te_", "clip_l.transformer.", _CLIP)},
    "sd2": {"text_encoder": ("lora_te_", "clip_h.transformer.", _CLIP)},
    "sdxl": {
        "text_encoder": ("lora_te1_", "clip_l.transformer.", _CLIP),
        "text_encoder_2": ("lora_te2_", "clip_g.transformer.", _CLIP),
    },
    "sdxl_refiner": {"text_encoder_2": ("lora_te_", "clip_g.transformer.", _CLIP)},
    "sd3": {
        "text_encoder": ("lora_te1_", "clip_l.transformer.", _CLIP),
        "text_encoder_2": ("lora_te2_", "clip_g.transformer.", _CLIP),
        "text_encoder_3": ("lora_te3_", "t5xxl.transformer.", _T5),
    },
    "flux": {
        "text_encoder": ("lora_te1_", "clip_l.transformer.", _CLIP),
        "text_encoder_2": ("lora_te3_", "t5xxl.transformer.", _T5),
    },
    "chroma": {"text_encoder": ("lora_te3_", "t5xxl.transformer.", _T5)},
    "lumina2": {"text_encoder": ("lora_te_", "gemma2_2b.transformer.model.", _GEMMA)},
    "cosmos": {"text_encoder": ("lora_te_", "qwen3_06b.transformer.model.", _GEMMA)},
}

# Methods: {suffix: tensor} in LyCORIS's spelling for a layer of this shape, and W' from them.

Tensors = dict[str, Tensor]
ROWWISE = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a", "dora_scale", "oft_blocks", "rescale")
ROWWISE += ("b1.weight", "diff", "diff_b", "w_norm", "b_norm")


@dataclass(frozen=True)
class Method:
    """How to draw the tensors of a layer [o, i, *k] of rank r, and W' = weight(W, tensors, alpha or None)."""

    draw: Callable[[tuple[int, ...], int], Tensors]
    weight: Callable[[Tensor, Tensors, float | None], Tensor]
    alphas: bool = True  # its alpha is alpha / rank's
    ranks: tuple[int, ...] = (1, 4, 7)
    kernels: bool = False  # only on convolutions with a kernel
    apart: bool = False  # a program with q, k and v apart trains first factors of their own


def _scale(alpha: float | None, r: int) -> float:
    return 1.0 if alpha is None else alpha / r


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(shape[2:])


def _lora(shape: tuple[int, ...], r: int) -> Tensors:
    o, i, *k = shape
    return {"lora_down.weight": torch.randn(r, i, *k), "lora_up.weight": torch.randn(o, r, *_ones(shape))}


def _of_lora(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    return W + _scale(alpha, len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(W.shape)


def _tucker(shape: tuple[int, ...], r: int) -> Tensors:
    o, i, *k = shape
    one = _ones(shape)
    down, up = torch.randn(r, i, *one), torch.randn(o, r, *one)
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": torch.randn(r, r, *k)}


def _of_tucker(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    down, up, mid = t["lora_down.weight"].flatten(1), t["lora_up.weight"].flatten(1), t["lora_mid.weight"]
    return W + _scale(alpha, len(down)) * torch.einsum("oa,ab...,bi->oi...", up, mid, down)


def _dora(shape: tuple[int, ...], r: int) -> Tensors:
    return {**_lora(shape, r), "dora_scale": torch.rand(shape[0], 1, *_ones(shape)) + 0.5}


def _dora_in(shape: tuple[int, ...], r: int) -> Tensors:
    return {**_lora(shape, r), "dora_scale": torch.rand(1, shape[1], *_ones(shape)) + 0.5}


def _of_dora(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    V, m = _of_lora(W, t, alpha), t["dora_scale"]
    axes = [axis for axis in range(W.ndim) if axis != int(m.shape[0] == 1)]
    return V * m / V.pow(2).sum(axes, keepdim=True).sqrt()


def _loha(shape: tuple[int, ...], r: int) -> Tensors:
    o, columns = shape[0], math.prod(shape[1:])
    sizes = {"hada_w1_a": (o, r), "hada_w1_b": (r, columns), "hada_w2_a": (o, r), "hada_w2_b": (r, columns)}
    return {name: torch.randn(size) for name, size in sizes.items()}


def _of_loha(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    first, second = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
    return W + _scale(alpha, len(t["hada_w1_b"])) * (first * second).reshape(W.shape)


def _loha_tucker(shape: tuple[int, ...], r: int) -> Tensors:
    o, i, *k = shape
    sizes = {"hada_t1": (r, r, *k), "hada_w1_a": (r, o), "hada_w1_b": (r, i)}
    sizes |= {name.replace("1", "2", 1): size for name, size in sizes.items()}
    return {name: torch.randn(size) for name, size in sizes.items()}


def _of_loha_tucker(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    one, two = (
        torch.einsum("ij...,ip,jr->pr...", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in (1, 2)
    )
    return W + _scale(alpha, len(t["hada_w1_b"])) * one * two


def _halves(n: int) -> tuple[int, int]:
    """n = a * b with a <= b as near as can be."""
    a = max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0)
    return a, n // a


def _lokr(first: bool, second: bool, tucker: bool = False) -> Callable[[tuple[int, ...], int], Tensors]:
    """Which halves have factors."""

    def draw(shape: tuple[int, ...], r: int) -> Tensors:
        (o1, o2), (i1, i2), k = _halves(shape[0]), _halves(shape[1]), shape[2:]
        if 2 * r >= max(o2, i2) or (first and 2 * r >= max(o1, i1)):
            r = 1  # PEFT, from a rank like that, makes whole halves
        sizes: dict[str, tuple[int, ...]] = (
            {"lokr_w1_a": (o1, r), "lokr_w1_b": (r, i1)} if first else {"lokr_w1": (o1, i1)}
        )
        if tucker:
            sizes |= {"lokr_t2": (r, r, *k), "lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2)}
        elif second:
            sizes |= {"lokr_w2_a": (o2, r), "lokr_w2_b": (r, i2 * math.prod(k))}
        else:
            sizes |= {"lokr_w2": (o2, i2, *k)}
        return {name: torch.randn(size) for name, size in sizes.items()}

    return draw


def _of_lokr(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = torch.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        w2 = w2.reshape(len(w2), W.shape[1] // w1.shape[1], *W.shape[2:])
    delta = torch.einsum("ac,bd...->abcd...", w1, w2).reshape(W.shape)
    r = next((len(t[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in t), None)
    return W + delta * (1.0 if r is None else _scale(alpha, r))  # two whole halves have no scale


def _oft(shape: tuple[int, ...], r: int) -> Tensors:
    b = 4 if shape[0] % 12 == 0 else 2
    return {"oft_blocks": torch.randn(shape[0] // b, b, b) / 4}


def _cayley(blocks: Tensor) -> Tensor:
    """(I + q)(I - q)^-1 with q = B - B^T."""
    q, one = blocks - blocks.mT, torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return (one + q) @ torch.linalg.inv(one - q)


def _of_oft(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    R = _cayley(t["oft_blocks"])
    new = torch.einsum("kmn,kmc->knc", R, W.reshape(R.shape[0], R.shape[1], -1)).reshape(W.shape)
    return new * t["rescale"] if "rescale" in t else new


def _rescaled(shape: tuple[int, ...], r: int) -> Tensors:
    return {**_oft(shape, r), "rescale": torch.rand(shape[0], *(1,) * (len(shape) - 1)) + 0.5}


def _boft(shape: tuple[int, ...], r: int) -> Tensors:
    return {"oft_blocks": torch.randn(2, 2, shape[0] // 2, shape[0] // 2) / 8}


def _of_boft(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    n, b = t["oft_blocks"].shape[1:3]
    w = W.flatten(1)
    for stage, R in enumerate(_cayley(t["oft_blocks"])):
        order = torch.arange(len(w)).reshape(-1, 2, 2**stage * (b // 2)).transpose(1, 2).flatten()
        turned = torch.einsum("nij,njc->nic", R, w[order].reshape(n, b, -1)).flatten(0, 1)
        w = turned[torch.argsort(order)]
    return w.reshape(W.shape)


def _ia3(on_input: int) -> Callable[[tuple[int, ...], int], Tensors]:
    def draw(shape: tuple[int, ...], r: int) -> Tensors:
        n = shape[1 - (not on_input)]
        w = torch.randn(1, n, *_ones(shape)) if len(shape) > 2 else torch.randn(n)
        return {"weight": w / 4, "on_input": torch.tensor(on_input)}

    return draw


def _of_ia3(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    axis = int(t["on_input"])
    return W * (1 + t["weight"].flatten().view([-1 if n == axis else 1 for n in range(W.ndim)]))


def _glora(shape: tuple[int, ...], r: int) -> Tensors:
    o, i, *k = shape
    one = _ones(shape)
    sizes = {"a1": (i, r, *one), "a2": (r, i, *one), "b1": (o, r, *one), "b2": (r, i, *k)}
    return {f"{name}.weight": torch.randn(size) / 4 for name, size in sizes.items()}


def _of_glora(W: Tensor, t: Tensors, alpha: float | None) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    WA = torch.einsum("oi...,ij->oj...", W, a1 @ a2)
    return W + _scale(alpha, len(a2)) * (WA + (b1 @ b2).reshape(W.shape))


def _full(shape: tuple[int, ...], r: int) -> Tensors:
    return {"diff": torch.randn(shape), "diff_b": torch.randn(shape[0])}


def _norm(shape: tuple[int, ...], r: int) -> Tensors:
    return {"w_norm": torch.randn(shape[0]), "b_norm": torch.randn(shape[0])}


METHODS = {
    "lora": Method(_lora, _of_lora, apart=True),
    "tucker": Method(_tucker, _of_tucker, kernels=True),
    "dora": Method(_dora, _of_dora, apart=True),
    "dora-in": Method(_dora_in, _of_dora),
    "loha": Method(_loha, _of_loha, ranks=(1, 2, 2)),
    "loha-tucker": Method(_loha_tucker, _of_loha_tucker, ranks=(1, 2, 2), kernels=True),
    "lokr": Method(_lokr(False, False), _of_lokr, ranks=(1, 2)),
    "lokr-second": Method(_lokr(False, True), _of_lokr, ranks=(1, 2)),
    "lokr-first": Method(_lokr(True, False), _of_lokr, ranks=(1, 2)),
    "lokr-both": Method(_lokr(True, True), _of_lokr, ranks=(1, 2)),
    "lokr-tucker": Method(_lokr(False, True, True), _of_lokr, ranks=(1, 2), kernels=True),
    "oft": Method(_oft, _of_oft, alphas=False),
    "oft-rescaled": Method(_rescaled, _of_oft, alphas=False),
    "boft": Method(_boft, _of_boft, alphas=False, apart=True),
    "ia3-in": Method(_ia3(1), _of_ia3, alphas=False),
    "ia3-out": Method(_ia3(0), _of_ia3, alphas=False),
    "glora": Method(_glora, _of_glora),
    "full": Method(_full, lambda W, t, alpha: W + t["diff"], alphas=False),
    "norm": Method(_norm, lambda W, t, alpha: W + t["w_norm"].view(W.shape), alphas=False),
}

# Alphas: {kind: the number for a rank, and its tensor in a file of a dtype}
ALPHAS: dict[str, Callable[[int, torch.dtype], Tensor | None]] = {
    "absent": lambda r, dtype: None,
    "rank": lambda r, dtype: torch.tensor(float(r)),
    "one": lambda r, dtype: torch.tensor(1.0, dtype=dtype),
    "third": lambda r, dtype: torch.tensor(1 / 3, dtype=dtype),
    "zero": lambda r, dtype: torch.tensor(0.0),
    "int64": lambda r, dtype: torch.tensor(r + 1),
    "bf16": lambda r, dtype: torch.tensor(0.3 * r, dtype=torch.bfloat16),
    "vector": lambda r, dtype: torch.tensor([2.0]),
}


@dataclass(frozen=True)
class Site:
    """A layer of the original program and the layers that diffusers has for its rows."""

    component: str
    original: str
    rule: Rule
    shape: tuple[int, ...]
    flat: str = ""  # what flat names start with, of a text encoder
    comfyui: str = ""

    @property
    def parts(self) -> dict[str, Site]:
        """{diffusers' layer: it alone}"""
        rows = [len(self.rule.rows(n, self.shape[0])) for n in range(len(self.rule.parts))]
        return {
            name: replace(self, original=name, rule=Rule(name, ((name, 1),)), shape=(n, *self.shape[1:]))
            for (name, _), n in zip(self.rule.parts, rows, strict=True)
        }


@functools.cache
def sites(family: str) -> tuple[Site, ...]:
    """Denoiser, then text encoders."""
    component = "unet" if family.startswith("sd") and family != "sd3" else "transformer"
    found = []
    for original, shape in SITES[family].items():
        rule = TABLES[family].to_diffusers(component, original, shape[0] // shape[1])
        assert rule is not None, original
        found.append(Site(component, original, rule, shape))
    for encoder, (flat, comfyui, (layer, shape)) in TEXT.get(family, {}).items():
        found.append(Site(encoder, layer, Rule(layer, ((layer, 1),)), shape, flat, f"text_encoders.{comfyui}"))
    return tuple(found)


def norm_site(family: str) -> Site:
    original, diffusers = NORMS[family]
    component = sites(family)[0].component
    return Site(component, original, Rule(original, ((diffusers, 1),)), (12, 1))


@dataclass
class Checkpoint:
    """A file: its tensors and metadata (of `peft` also the config), the layers' weights W, and what the file makes of them, by canonical name."""

    format: str
    family: str
    tensors: Tensors = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)  # as the file spells them

    def save(self, folder: Path, name: str = "a") -> Path:
        """By safetensors' own writer."""
        if self.format != "peft":
            save_file(self.tensors, folder / f"{name}.safetensors", self.metadata)
            return folder / f"{name}.safetensors"
        (folder / name).mkdir()
        save_file(self.tensors, folder / name / "adapter_model.safetensors", self.metadata)
        (folder / name / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True))
        return folder / name


def checkpoint(
    format: str,
    family: str,
    method: str = "lora",
    *,
    seed: int = 0,
    ranks: tuple[int, ...] | None = None,
    alpha: str = "mixed",
    dtype: torch.dtype = torch.float32,
    text: bool = True,
    carried: bool = True,
    layers: Callable[[Site], bool] = lambda site: True,
    apart: bool | None = None,
) -> Checkpoint:
    """A file of one method. `alpha`: one of ALPHAS, or `mixed`: a different one a layer. `apart`: parts have first factors of their own."""
    torch.manual_seed(seed)
    how = METHODS[method]
    if apart is None:
        apart = how.apart or (format == "peft" and method.startswith("lokr"))  # whose halves are as PEFT makes them
    out = Checkpoint(format, family)
    own = (norm_site(family),) if method == "norm" else sites(family)
    own = tuple(
        s for s in own if layers(s) and (text or not s.flat) and (not how.kernels or math.prod(s.shape[2:]) > 1)
    )
    alphas, told = list(ALPHAS), {}
    for n, site in enumerate(own):
        out.base |= {
            f"{site.component}.{name}": torch.randn(part.shape, dtype=torch.float64)
            for name, part in site.parts.items()
        }
        r = (ranks or how.ranks)[n % len(ranks or how.ranks)]
        kind = alphas[(n + seed) % len(alphas)] if alpha == "mixed" else alpha
        if not how.alphas:
            kind = "absent"
        elif format in ("diffusers", "peft") and alpha == "mixed" and kind == "absent":
            kind = "rank"
        if format in ORIGINAL:
            pieces = {site.original: (site, _cast(how.draw(site.shape, r), dtype))}
        elif apart:
            pieces = {name: (part, _cast(how.draw(part.shape, r), dtype)) for name, part in site.parts.items()}
        else:
            pieces = _split(site, _cast(how.draw(site.shape, r), dtype))
        for name, (piece, tensors) in pieces.items():
            r = next((len(tensors[s]) for s in _DOWN if s in tensors), r)
            number = ALPHAS[kind](r, dtype)
            _update(out, piece, tensors, number, how)
            told[piece.component, name] = (method, r, number, tensors, piece)
    _spell(out, told)
    if carried:
        out.tensors["_aux.3f2a"] = torch.randn(2, 3)
    return out


_DOWN = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2.weight")


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def _split(site: Site, tensors: Tensors) -> dict[str, tuple[Site, Tensors]]:
    """The tensors of the parts: rows of what has the layer's rows, and all of the rest."""
    out = {}
    for n, (name, part) in enumerate(site.parts.items()):
        rows, own = list(site.rule.rows(n, site.shape[0])), {}
        for suffix, t in tensors.items():
            wide = t.ndim > 1 and t.shape[0] == 1  # DoRA's or (IA)^3's, in one row
            if suffix == "weight" and not int(tensors["on_input"]):
                own[suffix] = t[:, rows] if wide else t[rows]
            elif suffix not in ROWWISE or (suffix == "dora_scale" and wide):
                own[suffix] = t.clone()
            else:
                unit = site.shape[0] // t.shape[0]
                assert not any(rows[at] % unit for at in range(0, len(rows), unit)), (site.original, suffix)
                own[suffix] = t[[rows[at] // unit for at in range(0, len(rows), unit)]]
        out[name] = part, own
    return out


def _update(out: Checkpoint, site: Site, tensors: Tensors, alpha: Tensor | None, how: Method) -> None:
    """The layer's update in float64, its rows given to diffusers' layers."""
    parts = [f"{site.component}.{name}" for name, _ in site.rule.parts]
    rows = [list(site.rule.rows(n, site.shape[0])) for n in range(len(parts))]
    W = torch.empty(site.shape, dtype=torch.float64)
    for name, own in zip(parts, rows, strict=True):
        W[own] = out.base[name]
    number = None if alpha is None else float(alpha.double())
    delta = how.weight(W, {name: t.double() for name, t in tensors.items()}, number) - W
    for name, own in zip(parts, rows, strict=True):
        out.deltas[name] = delta[own]


# Spelling

PREFIXES = {"kohya": "lora_unet_", "lycoris": "lycoris_", "comfyui": "diffusion_model.", "peft": "base_model.model."}
PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def spelt(format: str, family: str, site: Site, name: str) -> str:
    """A layer's name in a file."""
    if format == "kohya" and family in ("sd15", "sd2") and not site.flat:
        name = site.rule.parts[0][0]
    if format == "kohya-diffusers" and site.component == "transformer":
        prefix = "lora_transformer_"
    elif format in ("kohya", "kohya-diffusers"):
        prefix = site.flat or "lora_unet_"
    elif format == "diffusers":
        prefix = f"{site.component}."
    elif format == "comfyui":
        prefix = site.comfyui or "diffusion_model."
    else:
        prefix = PREFIXES[format]
    return prefix + (name if format in ("comfyui", "diffusers", "peft") else name.replace(".", "_"))


def _spell(out: Checkpoint, told: Mapping[tuple[str, str], tuple[str, int, Tensor | None, Tensors, Site]]) -> None:
    """Keys, metadata and config."""
    for (_, name), (_method, _r, alpha, tensors, site) in told.items():
        layer = spelt(out.format, out.family, site, name)
        out.layers.append(layer)
        for suffix, t in tensors.items():
            if out.format in ("diffusers", "peft"):
                if suffix == "dora_scale":
                    t = t.reshape(1, -1, *t.shape[2:]) if t.ndim > 2 else t.flatten()
                # transformers reads a text encoder's magnitude with .weight
                end = ".weight" if suffix == "dora_scale" and site.flat and out.format == "diffusers" else ""
                suffix = PEFT.get(suffix, suffix) + end
            elif out.format == "comfyui":
                suffix = suffix if suffix == "dora_scale" else PEFT.get(suffix, suffix)
            out.tensors[f"{layer}.{suffix}"] = t.contiguous()
        if alpha is not None and out.format not in ("diffusers", "peft"):
            out.tensors[f"{layer}.alpha"] = alpha.clone()
        elif "oft_blocks" in tensors:
            out.tensors[f"{layer}.alpha"] = torch.tensor(0.0)
    if out.format in ("kohya", "kohya-diffusers"):
        out.metadata = {"ss_network_module": "networks.lora", "ss_output_name": "x", "modelspec.title": "a title"}
    elif out.format == "comfyui":
        out.metadata = {"format": "pt", "software": '{"name": "ai-toolkit"}', "ss_base_model_version": "x"}
    elif out.format == "diffusers":
        config: dict[str, Any] = {}
        for component in dict.fromkeys(component for component, _ in told):
            own = {name: row for (c, name), row in told.items() if c == component}
            config |= {f"{component}.{key}": value for key, value in _config(own).items()}
        absent = all(row[2] is None for row in told.values())
        out.metadata = {"format": "pt"} | ({} if absent else {"lora_adapter_metadata": json.dumps(config, indent=2)})
    elif out.format == "peft":
        out.metadata = {"format": "pt"}
        out.config = _config({name: row for (_, name), row in told.items()})
        out.config |= {"base_model_name_or_path": "someone/some-model", "task_type": None, "peft_version": "0.21.2"}


def _config(told: Mapping[str, tuple[str, int, Tensor | None, Tensors, Site]]) -> dict[str, Any]:
    """PEFT's, with a pattern for every layer."""
    names = {name: name.removeprefix("text_model.") for name in told}
    ranks, alphas = {}, {}
    for name, (_, r, alpha, tensors, _) in told.items():
        if {"lokr_w1", "lokr_w2"} <= {*tensors}:  # PEFT tells whole halves by a rank that is too large, and scales them
            r, alpha = 64, torch.tensor(64)
        ranks[names[name]] = r
        alphas[names[name]] = float(r if alpha is None else alpha.double())
    methods = {row[0] for row in told.values()}
    (kind,) = {"LOHA" if m.startswith("loha") else "LOKR" if m.startswith("lokr") else "LORA" for m in methods}
    config: dict[str, Any] = {"peft_type": kind, "r": 8, "rank_pattern": ranks, "alpha_pattern": alphas}
    config |= {"target_modules": sorted(names.values()), "lora_alpha" if kind == "LORA" else "alpha": 8}
    if kind == "LORA":
        return config | {"use_dora": "dora" in methods, "bias": "none", "lora_bias": False}
    tucker = any(m.endswith("tucker") for m in methods)
    both = {"decompose_both": "lokr-both" in methods, "decompose_factor": -1} if kind == "LOKR" else {}
    return config | {"use_effective_conv2d": tucker} | both


def shuffled(tensors: Tensors, seed: int = 0) -> Tensors:
    """The same in another order."""
    keys = list(tensors)
    random.Random(seed).shuffle(keys)
    return {key: tensors[key] for key in keys}
