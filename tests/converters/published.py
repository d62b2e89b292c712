"""What the published models' layers are called and how large they are, from diffusers' own classes: `converters/published.json`.

    python -m tests.converters.published         writes it anew

A model is built with a few blocks on the meta device, and its names are then multiplied to the depth that it was published with. The sizes are those
of the checkpoints (their transformer/config.json), or the defaults of the class. A family of "" has no table here: its files are to be called unknown.
"""

from __future__ import annotations

# ruff: noqa: E501
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffpeft.converters import TABLES
from diffpeft.converters.families import Table

PATH = Path(__file__).parents[2] / "converters" / "published.json"
_FEW = (7, 9, 11)  # blocks to build, of each kind another number, so that each stack tells its kind


@dataclass(frozen=True)
class Model:
    """A published model: its family, diffusers' class, its config, and how many blocks of each kind it has {config's key: number}.

    `like` is the family whose table turns its names into the original program's. `twins` {name's start: another} are blocks that diffusers' class
    lacks, with the layers of others. `stacks` are the lengths of lists that follow from no key of the config.
    """

    family: str
    kind: str
    depth: Mapping[str, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""
    twins: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, int] = field(default_factory=dict)


def _heads(n: int, dim: int = 128) -> dict[str, int]:
    return {"num_attention_heads": n, "attention_head_dim": dim}


_SD3 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
_GUIDED = {"guidance_embeds": True}
_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_CROSS = {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240}
_SMALL_SANA = {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152}
_NORMED = {"qk_norm": "rms_norm_across_heads"}
_HIDREAM = {"patch_size": 2, "caption_channels": [4096, 4096], "llama_layers": [0, 1]}
_PIXART = {"cross_attention_dim": 1152, "caption_channels": 4096, "attention_head_dim": 72, "num_attention_heads": 16}
_GATES = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
_DIT = {"patch_size": 2, "in_channels": 4, "sample_size": 128}

MODELS: dict[str, Model] = {
    "Stable Diffusion 3 Medium": Model("sd3", "SD3Transformer2DModel", {"num_layers": 24}, {**_SD3, **_heads(24, 64), "caption_projection_dim": 1536}),
    "Stable Diffusion 3.5 Large": Model("sd3", "SD3Transformer2DModel", {"num_layers": 38}, {**_SD3, **_heads(38, 64), "caption_projection_dim": 2432, "qk_norm": "rms_norm"}),
    "Stable Diffusion 3.5 Medium": Model("sd3", "SD3Transformer2DModel", {"num_layers": 24}, {**_SD3, **_heads(24, 64), "caption_projection_dim": 1536, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "FLUX.1": Model("flux", "FluxTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}, _GUIDED),
    "Chroma": Model("chroma", "ChromaTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}),
    "FLUX.2 dev": Model("flux2", "Flux2Transformer2DModel", {"num_layers": 8, "num_single_layers": 48}),
    "FLUX.2 klein 4B": Model("flux2", "Flux2Transformer2DModel", {"num_layers": 5, "num_single_layers": 20}, {**_heads(24), "joint_attention_dim": 7680}),
    "FLUX.2 klein 9B": Model("flux2", "Flux2Transformer2DModel", {"num_layers": 8, "num_single_layers": 24}, {**_heads(32), "joint_attention_dim": 12288}),
    "Wan 14B": Model("wan", "WanTransformer3DModel", {"num_layers": 40}),
    "Wan 14B I2V": Model("wan", "WanTransformer3DModel", {"num_layers": 40}, _IMAGE),
    "Wan 1.3B": Model("wan", "WanTransformer3DModel", {"num_layers": 30}, {**_heads(12), "ffn_dim": 8960, "image_dim": 1280, "added_kv_proj_dim": 1536}),
    "Wan 5B": Model("wan", "WanTransformer3DModel", {"num_layers": 30}, {**_heads(24), "ffn_dim": 14336}),
    "Wan VACE 14B": Model("wan", "WanVACETransformer3DModel", {"num_layers": 40}, {"vace_layers": list(range(6))}, stacks={"vace_blocks": 8}),
    "Wan VACE 1.3B": Model("wan", "WanVACETransformer3DModel", {"num_layers": 30}, {**_heads(12), "ffn_dim": 8960, "vace_layers": list(range(6))}, stacks={"vace_blocks": 15}),
    "Qwen-Image": Model("qwen_image", "QwenImageTransformer2DModel", {"num_layers": 60}),
    "Z-Image": Model("z_image", "ZImageTransformer2DModel", {"n_layers": 30}, {"siglip_feat_dim": 1152}),
    "Lumina 2": Model("lumina2", "Lumina2Transformer2DModel", {"num_layers": 26}, {"cap_feat_dim": 2304}),
    "HunyuanVideo": Model("hunyuan_video", "HunyuanVideoTransformer3DModel", {"num_layers": 20, "num_single_layers": 40}),
    "PixArt": Model("pixart", "PixArtTransformer2DModel", {"num_layers": 28}, {**_PIXART, "use_additional_conditions": True}),
    "Sana 1.6B": Model("sana", "SanaTransformer2DModel", {"num_layers": 20}, {**_CROSS, **_NORMED}),
    "Sana 4.8B": Model("sana", "SanaTransformer2DModel", {"num_layers": 60}, {**_CROSS, **_NORMED}),
    "Sana 0.6B": Model("sana", "SanaTransformer2DModel", {"num_layers": 28}, {**_SMALL_SANA, **_heads(36, 32), **_NORMED}),
    "AuraFlow": Model("auraflow", "AuraFlowTransformer2DModel", {"num_mmdit_layers": 4, "num_single_dit_layers": 32}),
    "LTX-Video 2B": Model("ltx", "LTXVideoTransformer3DModel", {"num_layers": 28}),
    "LTX-Video 13B": Model("ltx", "LTXVideoTransformer3DModel", {"num_layers": 48}, {**_heads(32), "cross_attention_dim": 4096}),
    "LTX-2": Model("ltx2", "LTX2VideoTransformer3DModel", {"num_layers": 48}),
    "LTX-2.3": Model("ltx2", "LTX2VideoTransformer3DModel", {"num_layers": 48}, _GATES),
    "Mochi": Model("mochi", "MochiTransformer3DModel", {"num_layers": 48}),
    "CogVideoX 2B": Model("cogvideox", "CogVideoXTransformer3DModel", {"num_layers": 30}),
    "CogVideoX 5B": Model("cogvideox", "CogVideoXTransformer3DModel", {"num_layers": 42}, {**_heads(48, 64), "ofs_embed_dim": 512}),
    "HiDream-I1": Model("hidream", "HiDreamImageTransformer2DModel", {"num_layers": 16, "num_single_layers": 32}, _HIDREAM),
    "Krea 2": Model("krea2", "Krea2Transformer2DModel", {"num_layers": 28}),
    "Cosmos 7B": Model("cosmos", "CosmosTransformer3DModel", {"num_layers": 28}),
    "Cosmos 14B": Model("cosmos", "CosmosTransformer3DModel", {"num_layers": 36}, _heads(40)),
    "Cosmos Predict2 2B": Model("cosmos", "CosmosTransformer3DModel", {"num_layers": 28}, _heads(16)),
    "Cosmos Predict2.5 2B": Model("cosmos", "CosmosTransformer3DModel", {"num_layers": 28}, {**_heads(16), "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352, "img_context_dim_in": 1152}),
    "Ideogram 4": Model("ideogram4", "Ideogram4Transformer2DModel", {"num_layers": 34}),
    "ERNIE-Image": Model("ernie_image", "ErnieImageTransformer2DModel", {"num_layers": 36}, {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288}),
    "ERNIE-Image (default)": Model("ernie_image", "ErnieImageTransformer2DModel", {"num_layers": 24}),
    "CogView4": Model("cogview4", "CogView4Transformer2DModel", {"num_layers": 28}, {**_heads(32), "time_embed_dim": 512}),
    "HunyuanImage 2.1": Model("hunyuan_image", "HunyuanImageTransformer2DModel", {"num_layers": 20, "num_single_layers": 40}, {"text_embed_2_dim": 1472, "use_meanflow": True, **_GUIDED}),
    "Qwen-Image 2.1": Model("qwen_image21", "QwenImage21Transformer2DModel", {"num_layers": 32}),
    "OmniGen 2": Model("omnigen2", "Lumina2Transformer2DModel", {"num_layers": 32}, {"hidden_size": 2520, "num_attention_heads": 21, "num_kv_heads": 7, "axes_dim_rope": (40, 40, 40), "cap_feat_dim": 2048}, twins={"x_embedder": "ref_image_patch_embedder", "noise_refiner.": "ref_image_refiner."}),
    "LongCat-Image": Model("longcat_image", "LongCatImageTransformer2DModel", {"num_layers": 10, "num_single_layers": 20}),
    "Ovis-Image": Model("ovis_image", "OvisImageTransformer2DModel", {"num_layers": 6, "num_single_layers": 27}),
    "Bria 3.2": Model("bria", "BriaTransformer2DModel", {"num_layers": 8, "num_single_layers": 28}, {**_heads(24, 96), "axes_dims_rope": [0, 48, 48]}),
    "Bria FIBO": Model("bria_fibo", "BriaFiboTransformer2DModel", {"num_layers": 8, "num_single_layers": 38}),
    "Bria FIBO 2": Model("bria_fibo2", "BriaFibo2Transformer2DModel", {"n_layers": 44}, {"injection_layer_ids": (2,), "perceiver_num_layers": 2}),
    "PRX": Model("prx", "PRXTransformer2DModel", {"depth": 16}),
    "GLM-Image": Model("glm_image", "GlmImageTransformer2DModel", {"num_layers": 30}, _heads(32)),
    "Nucleus": Model("nucleus_image", "NucleusMoEImageTransformer2DModel", {"num_layers": 24}),
    "HunyuanVideo 1.5": Model("hunyuan_video15", "HunyuanVideo15Transformer3DModel", {"num_layers": 54}),
    "FramePack": Model("framepack", "HunyuanVideoFramepackTransformer3DModel", {"num_layers": 20, "num_single_layers": 40}, {"has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True}),
    "Kandinsky 5 Lite": Model("kandinsky5", "Kandinsky5Transformer3DModel", {"num_visual_blocks": 32}, {"model_dim": 1792, "ff_dim": 7168}),
    "Kandinsky 5 Pro": Model("kandinsky5", "Kandinsky5Transformer3DModel", {"num_visual_blocks": 60}, {"model_dim": 4096, "ff_dim": 16384, "time_dim": 1024}),
    "Sana Video": Model("sana_video", "SanaVideoTransformer3DModel", {"num_layers": 20}, {"mlp_ratio": 3.0}),
    "SkyReels V2 (default)": Model("skyreels_v2", "SkyReelsV2Transformer3DModel", {"num_layers": 32}),
    "Helios": Model("helios", "HeliosTransformer3DModel", {"num_layers": 40}),
    "MiniMax H3": Model("minimax_h3", "MiniMaxH3Transformer3DModel", {"num_layers": 50}),
    "FLUX.3": Model("flux3", "Flux3Transformer2DModel", {"num_layers": 5, "num_single_layers": 28}),
    "ACE-Step": Model("ace_step", "AceStepTransformer1DModel", {"num_hidden_layers": 24}),
    "Kandinsky 5 Image Lite": Model("kandinsky5", "Kandinsky5Transformer3DModel", {"num_visual_blocks": 50}, {"model_dim": 2560, "ff_dim": 10240, "axes_dims": (32, 48, 48)}),
    "SkyReels V2 1.3B": Model("skyreels_v2", "SkyReelsV2Transformer3DModel", {"num_layers": 30}, {**_heads(12), "ffn_dim": 8960, "inject_sample_info": True}),
    "SkyReels V2 14B": Model("skyreels_v2", "SkyReelsV2Transformer3DModel", {"num_layers": 40}, {**_heads(40), "ffn_dim": 13824, **_IMAGE}),
    "ChronoEdit 14B": Model("chrono_edit", "ChronoEditTransformer3DModel", {"num_layers": 40}, _IMAGE),
    "Wan Animate 14B": Model("wan", "WanAnimateTransformer3DModel", {"num_layers": 40}, {"added_kv_proj_dim": 5120}),
    "Wan Animate 2": Model("wan_animate2", "WanAnimate2Transformer3DModel", {"num_layers": 40}),
    # without a table
    "Allegro": Model("", "AllegroTransformer3DModel", {"num_layers": 32}),
    "AnyFlow": Model("", "AnyFlowTransformer3DModel", {"num_layers": 40}, like="wan"),
    "AnyFlow FAR": Model("", "AnyFlowFARTransformer3DModel", {"num_layers": 40}, like="wan"),
    "Bria": Model("", "BriaTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}, like="flux"),
    "CogView3 Plus": Model("", "CogView3PlusTransformer2DModel", {"num_layers": 30}),
    "ConsisID": Model("", "ConsisIDTransformer3DModel", {"num_layers": 42}, _heads(48, 64)),
    "DiT": Model("", "DiTTransformer2DModel", {"num_layers": 28}, {"sample_size": 32}),
    "EasyAnimate": Model("", "EasyAnimateTransformer3DModel", {"num_layers": 48}, {"in_channels": 16, "out_channels": 16, "patch_size": 2}),
    "HunyuanDiT": Model("", "HunyuanDiT2DModel", {"num_layers": 40}, {**_DIT, "hidden_size": 1408}),
    "JoyImage": Model("", "JoyImageEditTransformer3DModel", {"num_layers": 20}),
    "Kandinsky Prior": Model("", "PriorTransformer", {"num_layers": 20}),
    "Latte": Model("", "LatteTransformer3DModel", {"num_layers": 28}, {"in_channels": 4, "out_channels": 8, "patch_size": 2, "attention_head_dim": 72, "num_attention_heads": 16, "cross_attention_dim": 1152, "caption_channels": 4096, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_bias": True}),
    "Lumina-Next": Model("", "LuminaNextDiT2DModel", {"num_layers": 24}, {"num_kv_heads": 8}),
    "MiniMax Music 3": Model("", "MiniMaxMusic3Transformer1DModel", {"num_layers": 36}),
    "Motif Video": Model("", "MotifVideoTransformer3DModel", {"num_layers": 20, "num_single_layers": 40}, like="hunyuan_video"),
    "Motif Video 2B": Model("", "MotifVideoTransformer3DModel", {"num_layers": 12, "num_single_layers": 24}, _heads(12), like="hunyuan_video"),
    "Stable Audio": Model("", "StableAudioDiTModel", {"num_layers": 24}),
}  # fmt: skip


@functools.cache
def extents(name: str) -> dict[str, tuple[int, int] | None]:
    """{diffusers' name: (rows, columns), None for a norm} of all layers of a published model."""
    model = MODELS[name]
    few = dict(zip(model.depth, _FEW, strict=False))
    with torch.device("meta"):
        net = getattr(diffusers, model.kind)(**{**model.config, **few})
    layers = {n: e for n, m in net.named_modules() if (e := _extent(m)) != ()}
    layers |= {
        n.replace(old, new, 1): e for old, new in model.twins.items() for n, e in layers.items() if n.startswith(old)
    }
    depth = depths(name, net)
    found: dict[str, tuple[int, int] | None] = {}
    for layer, size in layers.items():
        stack = next((s for s in depth if layer.startswith(f"{s}.")), None)
        if stack is None:
            found[layer] = size
            continue
        number, _, rest = layer[len(stack) + 1 :].partition(".")
        last = few_of(net, stack) - 1
        if int(number) == last:
            found[f"{stack}.{depth[stack] - 1}.{rest}"] = size
        elif int(number) == last - 1:
            found |= {f"{stack}.{n}.{rest}": size for n in range(last - 1, depth[stack] - 1)}
        elif int(number) < depth[stack] - 1:
            found[layer] = size
    return found


def few_of(net: nn.Module, stack: str) -> int:
    """How many blocks were built of a kind."""
    return len(net.get_submodule(stack))  # type: ignore[arg-type]


def _extent(module: nn.Module) -> tuple[int, int] | tuple[()] | None:
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.weight.shape[0], module.weight.shape[1]
    weight = getattr(module, "weight", None)
    return None if isinstance(weight, nn.Parameter) and weight.ndim == 1 else ()


def depths(name: str, net: nn.Module | None = None) -> dict[str, int]:
    """{stack of blocks: how many}."""
    model = MODELS[name]
    if net is None:
        with torch.device("meta"):
            net = getattr(diffusers, model.kind)(**{**model.config, **dict(zip(model.depth, _FEW, strict=False))})
    wanted = dict(zip(_FEW, model.depth.values(), strict=False))
    stacks = {n: len(m) for n, m in net.named_modules() if isinstance(m, nn.ModuleList) and not re.search(r"\d", n)}
    return {n: wanted[size] for n, size in stacks.items() if size in wanted}


def originals(name: str, spelling: int = 0) -> dict[str, tuple[int, int] | None]:
    """As `extents`, in the original program's names where a table here knows them: joint layers have the rows of all their parts.

    `spelling`: of several that are read, which; where a layer has fewer its last.
    """
    model = MODELS[name]
    table = TABLES.get(model.family or model.like, Table({}))
    found: dict[str, tuple[int, int] | None] = {}
    for layer, size in extents(name).items():
        rules = table.all_originals("transformer", layer, size and size[0] // size[1])
        if not rules:
            continue
        original = rules[min(spelling, len(rules) - 1)][0].original
        before = found.get(original)
        found[original] = (size[0] + before[0], size[1]) if size and before else size
    return found


def spellings(name: str) -> list[dict[str, tuple[int, int] | None]]:
    """The layers in all names that are read: diffusers', and each of the original's."""
    ways = [extents(name), originals(name)]
    while (way := originals(name, len(ways) - 1)) != ways[-1]:
        ways.append(way)
    return [way for way in ways if way]


def sizes(name: str) -> dict[str, Any]:
    """One model's row: its family, its stacks' depths, and {flat name with # for each number: the (rows, columns) that such layers have}."""
    layers: dict[str, set[tuple[int, int]]] = {}
    ways = spellings(name)
    for layer, size in [pair for found in ways for pair in found.items()]:
        template = re.sub(r"\d+", "#", layer.replace(".", "_"))
        layers.setdefault(template, set()).update([size] if size else [])
    return {
        "family": MODELS[name].family,
        "depths": [stacks for found in ways if (stacks := _counted(found, MODELS[name].stacks))],
        "layers": {template: sorted(found) for template, found in sorted(layers.items())},
    }


def _counted(layers: Iterable[str], told: Mapping[str, int]) -> dict[str, int]:
    """{stack of blocks, flat: how many it has}, of layers in one program's spelling. A list of single layers is no stack of blocks."""
    numbers: dict[str, set[int]] = {}
    kinds: dict[str, set[str]] = {}
    for layer in layers:
        if match := re.match(r"([^\d.]+(?:\.[^\d.]+)*)\.(\d+)\.(.+)", layer):
            stack = match[1].replace(".", "_")
            numbers.setdefault(stack, set()).add(int(match[2]))
            kinds.setdefault(stack, set()).add(match[3])
    whole = {s: len(own) for s, own in numbers.items() if len(kinds[s]) > 1 < len(own) and own == {*range(len(own))}}
    return dict(sorted({**whole, **{stack: n for stack, n in told.items() if stack in whole}}.items()))


def text() -> str:
    """The whole file: a line a model."""
    rows = [f" {json.dumps(name)}: {json.dumps(sizes(name), separators=(',', ':'))}" for name in MODELS]
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
