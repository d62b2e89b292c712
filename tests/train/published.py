"""Folders with the configs of published models, by heart, and without a weight: what a dry run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from diffpeft.pipeline.open import EMBEDDED

_DOWN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _UPCROSS = "UpBlock2D", "CrossAttnUpBlock2D"
_BETAS = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
}
_CLIP_L |= {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
}
_CLIP_G = _CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
_T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
}
_T5 |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
_UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "StableDiffusionPipeline": {},
        "unet": _UNET
        | {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "down_block_types": [_CROSS, _CROSS, _CROSS, _DOWN],
            "up_block_types": [_UP, _UPCROSS, _UPCROSS, _UPCROSS],
        },
        "vae": _VAE,
        "text_encoder": _CLIP_L,
        "scheduler": _BETAS,
    },
    "sdxl": {
        "StableDiffusionXLPipeline": {"force_zeros_for_empty_prompt": True},
        "unet": _UNET
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": [_DOWN, _CROSS, _CROSS],
            "up_block_types": [_UPCROSS, _UPCROSS, _UP],
        },
        "vae": _VAE | {"scaling_factor": 0.13025},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G | {"architectures": ["CLIPTextModelWithProjection"]},
        "scheduler": _BETAS,
    },
    "flux": {
        "FluxPipeline": {},
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
        "vae": _VAE | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0},
    },
}
# millions of numbers in each component, as the models' cards and papers have them
SIZES = {
    "sd15": {"unet": 860, "text_encoder": 123, "vae": 84},
    "sdxl": {"unet": 2567, "text_encoder": 123, "text_encoder_2": 695, "vae": 84},
    "flux": {"transformer": 11901, "text_encoder": 123, "text_encoder_2": 4762, "vae": 84},
}


def write(name: str, folder: Path) -> Path:
    """Write the configs of a model, and a small tokenizer in the place of its own."""
    (pipeline, options), *parts = MODELS[name].items()
    index: dict[str, Any] = {"_class_name": pipeline, **options}
    for part, config in parts:
        kind = config.get("_class_name") or config["architectures"][0]
        index[part] = ["transformers" if "architectures" in config else "diffusers", kind]
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config))
    for part in [p.replace("text_encoder", "tokenizer") for p in dict(parts) if p.startswith("text_encoder")]:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=77)
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", "CLIPTokenizer"]
    if pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
