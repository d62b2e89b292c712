"""A diffusers SD pipeline spelt as the original single-file checkpoints are (`model.diffusion_model.input_blocks...`), for tests of --base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original(pipe: Any) -> dict[str, Tensor]:
    """All weights of a StableDiffusionPipeline or StableDiffusionXLPipeline under their original names."""
    second = getattr(pipe, "text_encoder_2", None)
    prefix = "cond_stage_model.transformer" if second is None else "conditioner.embedders.0.transformer"
    text = {
        f"{prefix}.text_model.{k.removeprefix('text_model.')}": v  # older transformers has that level
        for k, v in pipe.text_encoder.state_dict().items()
    }
    if second is not None:
        text |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(second.state_dict()).items()}
    unet = {f"model.diffusion_model.{_unet_name(k, pipe.unet.config)}": v for k, v in pipe.unet.state_dict().items()}
    vae = {
        f"first_stage_model.{_vae_name(k, len(pipe.vae.config.block_out_channels))}": (
            v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v  # convolutions there
        )
        for k, v in pipe.vae.state_dict().items()
    }
    return {k: v.contiguous() for k, v in {**text, **unet, **vae}.items()}


def _open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder with a projection in OpenCLIP's names, its q, k and v in one."""
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        key = key.removeprefix("text_model.")
        for name, old in _OPEN_CLIP.items():
            key = key.replace(name, old)
        if ".self_attn.q_proj." in key:
            parts = [weights[k] for k in _joint(weights, key)]
            out[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif ".self_attn." not in key:
            out[key.removesuffix(".weight") if key in _BARE else key] = (
                value.T if key == "text_projection.weight" else value
            )
    return out


_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_ln_": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
}
_BARE = ("positional_embedding.weight", "text_projection.weight")


def _joint(weights: dict[str, Tensor], key: str) -> list[str]:
    """transformers' names of q, k and v."""
    end = key.removeprefix("transformer.resblocks.")
    return [k for part in "qkv" for k in weights if k.endswith(f"layers.{end.replace('q_proj', f'{part}_proj')}")]


def _unet_name(key: str, config: Any) -> str:
    parts, per = key.split("."), config.layers_per_block + 1
    top = {
        "conv_in": "input_blocks.0.0",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for name, old in top.items():
        if key.startswith(name + "."):
            return old + key.removeprefix(name)
    if parts[0] == "mid_block":
        kind, j, rest = parts[1], int(parts[2]), parts[3:]
        return f"middle_block.{2 * j if kind == 'resnets' else 1}." + _inner(kind, rest)
    i, kind, j, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    if parts[0] == "down_blocks":
        n = i * per + 1 + (config.layers_per_block if kind == "downsamplers" else j)
        return f"input_blocks.{n}.{int(kind == 'attentions')}." + _inner(kind, rest)
    if kind == "upsamplers":
        return (
            f"output_blocks.{i * per + config.layers_per_block}.{1 + config.up_block_types[i].startswith('Cross')}."
            + ".".join(rest)
        )
    return f"output_blocks.{i * per + j}.{int(kind == 'attentions')}." + _inner(kind, rest)


def _inner(kind: str, rest: list[str]) -> str:
    if kind == "resnets":
        return ".".join([_RESNET[rest[0]], *rest[1:]])
    return ".".join(["op", *rest[1:]] if kind == "downsamplers" else rest)


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


def _vae_name(key: str, levels: int) -> str:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return key
    side, part, *rest = parts
    if part == "mid_block" and rest[0] == "attentions":
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[rest[2]]}.{rest[-1]}"
    if part == "mid_block":
        return f"{side}.mid.block_{int(rest[1]) + 1}." + _vae_resnet(rest[2:])
    if part == "down_blocks":
        return f"{side}.down.{rest[0]}." + (
            f"downsample.{'.'.join(rest[3:])}"
            if rest[1] == "downsamplers"
            else f"block.{rest[2]}." + _vae_resnet(rest[3:])
        )
    if part == "up_blocks":
        return f"{side}.up.{levels - 1 - int(rest[0])}." + (
            f"upsample.{'.'.join(rest[3:])}" if rest[1] == "upsamplers" else f"block.{rest[2]}." + _vae_resnet(rest[3:])
        )
    return ".".join([side, "norm_out" if part == "conv_norm_out" else part, *rest])


def _vae_resnet(rest: list[str]) -> str:
    return ".".join(["nin_shortcut" if rest[0] == "conv_shortcut" else rest[0], *rest[1:]])
