"""A diffusers SD pipeline spelt as the original single-file checkpoints are (`model.diffusion_model.input_blocks...`), for tests of --base."""

from __future__ import annotations

from typing import Any

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
    """All weights of a StableDiffusionPipeline under their original names."""
    text = {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v  # older transformers has that level
        for k, v in pipe.text_encoder.state_dict().items()
    }
    unet = {f"model.diffusion_model.{_unet_name(k, pipe.unet.config)}": v for k, v in pipe.unet.state_dict().items()}
    vae = {
        f"first_stage_model.{_vae_name(k, len(pipe.vae.config.block_out_channels))}": v
        for k, v in pipe.vae.state_dict().items()
    }
    return {k: v.contiguous() for k, v in {**text, **unet, **vae}.items()}


def _unet_name(key: str, config: Any) -> str:
    parts, per = key.split("."), config.layers_per_block + 1
    top = {
        "conv_in": "input_blocks.0.0",
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


def _vae_name(key: str, levels: int) -> str:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return key
    side, part, *rest = parts
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
