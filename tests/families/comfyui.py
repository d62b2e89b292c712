"""ComfyUI's own loader, from a checkout that the environment variable COMFYUI names: `model_lora_keys_unet`, `load_lora` and `calculate_weight` on models of
its own, as small as those of the tests.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import os
import sys
import types
from types import SimpleNamespace
from unittest.mock import MagicMock

import diffusers  # noqa: F401  before what stands for packages that are not here
import torch
from torch import nn

CHECKOUT = os.environ.get("COMFYUI")
_FLUX = {
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 8],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": None,
    "context_in_dim": 48,
    "mlp_ratio": 3.0,
    "axes_dim": [4, 4, 4, 4],
    "patch_size": 1,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "txt_ids_dims": [3],
}
_CHROMA = {
    **{name: value for name, value in _FLUX.items() if name != "guidance_embed"},
    "in_channels": 16,
    "out_channels": 16,
    "in_dim": 8,
    "out_dim": 32,
    "hidden_dim": 16,
    "n_layers": 1,
}
_LUMINA = {"patch_size": 2, "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
_CONTEXT = {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": 128}}
# {kind of pipeline: (its class in model_base, the class in ldm, its config)}
MODELS = {
    "flux dev": ("Flux", "flux.model.Flux", _FLUX),
    "flux2 klein": ("Flux2", "flux.model.Flux", _FLUX2),
    "chroma": ("Chroma", "chroma.model.Chroma", _CHROMA),
    "z_image": (
        "Lumina2",
        "lumina.model.NextDiT",
        {
            **_LUMINA,
            "n_kv_heads": 2,
            "multiple_of": 1,
            "ffn_dim_multiplier": 8 / 3 * 0.999,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [600, 64, 64],
            "z_image_modulation": True,
        },
    ),
    "lumina2": (
        "Lumina2",
        "lumina.model.NextDiT",
        {**_LUMINA, "n_kv_heads": 1, "qk_norm": True, "cap_feat_dim": 16, "axes_dims": [4, 4, 8]},
    ),
    "qwen_image": (
        "QwenImage",
        "qwen_image.model.QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "wan": (
        "WAN21",
        "wan.model.WanModel",
        {
            "in_dim": 4,
            "dim": 24,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 32,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
    ),
    "ltx": (
        "LTXV",
        "lightricks.model.LTXVModel",
        {
            "in_channels": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "num_layers": 2,
        },
    ),
    "hunyuan_video": (
        "HunyuanVideo",
        "hunyuan_video.model.HunyuanVideo",
        {
            **{name: value for name, value in _FLUX.items() if name != "txt_ids_dims"},
            "vec_in_dim": 24,
            "context_in_dim": 16,
            "theta": 256,
            "patch_size": [1, 2, 2],
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
    ),
    "hidream": (
        "HiDream",
        "hidream.model.HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 48,
            "axes_dims_rope": (4, 4, 8),
            "llama_layers": [0, 1],
        },
    ),
    "auraflow": (
        "AuraFlow",
        "aura.mmdit.MMDiT",
        {"dim": 32, "n_layers": 4, "n_double_layers": 2, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": 32},
    ),
    "pixart alpha": (
        "PixArt",
        "pixart.pixartms.PixArtMS",
        {"input_size": 16, "hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 32},
    ),
    "sd3.5": (
        "SD3",
        "modules.diffusionmodules.mmdit.MMDiT",
        {
            "input_size": 16,
            "depth": 2,
            "adm_in_channels": 48,
            "pos_embed_max_size": 48,
            "context_embedder_config": _CONTEXT,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
            "context_size": 96,
        },
    ),
    "ernie_image": (
        "ErnieImage",
        "ernie.model.ErnieImageModel",
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
}


class _Absent(types.ModuleType):
    """Stands for a package that ComfyUI imports and nothing here calls."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def loaded():
    """comfy's modules, imported once."""
    if CHECKOUT not in sys.path:
        sys.path.insert(0, CHECKOUT)
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    logging.disable(logging.ERROR)
    try:
        while True:
            try:
                importlib.import_module("comfy.options").enable_args_parsing()
                names = ("lora", "lora_convert", "model_base", "ops")
                return SimpleNamespace(**{name: importlib.import_module(f"comfy.{name}") for name in names})
            except ModuleNotFoundError as error:
                assert not error.name.startswith("comfy."), error
                sys.modules[error.name] = _Absent(error.name)
                for name in [n for n in sys.modules if n == "comfy" or n.startswith("comfy.")]:
                    del sys.modules[name]
    finally:
        sys.argv = argv
        logging.disable(logging.NOTSET)


def model(comfy, kind):
    """ComfyUI's model of a kind, as its loader sees it."""
    base, path, config = MODELS[kind]
    module, name = path.rsplit(".", 1)
    operations = comfy.ops.disable_weight_init
    inner = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(
        **config, device="cpu", dtype=torch.float32, operations=operations
    )
    kinds = (getattr(comfy.model_base, base),)
    outer = type("Small", kinds, {"__init__": lambda self: nn.Module.__init__(self)})()
    outer.diffusion_model, outer.model_config = inner, SimpleNamespace(unet_config=config)
    return outer


def changes(comfy, outer, tensors, shapes):
    """{weight: what a file's tensors add to it}, and the keys of which nothing was read. `shapes`: of weights that are smaller here than in ComfyUI."""
    tensors = comfy.lora_convert.convert_lora(tensors)
    patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(outer, {}), log_missing=False)
    weights, read = {name: t.shape for name, t in outer.state_dict().items()} | shapes, set()
    by_weight = {}
    for place, patch in patches.items():
        key, offset, function = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        by_weight.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
        read |= patch.loaded_keys
    added = {key: comfy.lora.calculate_weight(p, torch.zeros(weights[key]), key) for key, p in by_weight.items()}
    return added, {key for key in tensors if key not in read and not key.endswith(".alpha")}
