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


def _llm(width: int, inner: int, layers: int, heads: int, groups: int, head: int, words: int) -> dict[str, Any]:
    """A language model."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head}


def _t5(width: int, inner: int, heads: int, words: int) -> dict[str, Any]:
    gated = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}
    sizes = {"d_model": width, "d_ff": inner, "d_kv": 64, "num_heads": heads, "num_layers": 24, "vocab_size": words}
    return sizes | gated


_T5_XXL, _PILE_T5 = _t5(4096, 10240, 64, 32128), _t5(2048, 5120, 32, 32128)
_QWEN3_4B, _QWEN3_8B = _llm(2560, 9728, 36, 32, 8, 128, 151936), _llm(4096, 12288, 36, 32, 8, 128, 151936)
_QWEN25_7B = _llm(3584, 18944, 28, 28, 4, 128, 152064)
_GEMMA2_2B, _GEMMA3_12B = _llm(2304, 9216, 26, 8, 4, 256, 256000), _llm(3840, 15360, 48, 16, 8, 256, 262208)
_LLAMA_8B, _GLM_9B = _llm(4096, 14336, 32, 32, 8, 128, 128320), _llm(4096, 13696, 40, 32, 2, 128, 151552)
_QWEN3_VL_4B = {
    "text_config": _QWEN3_4B,
    "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
}
_QWEN3_VL_4B["vision_config"] |= {"num_heads": 16, "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]}
_QWEN3_VL_8B = {
    "text_config": _QWEN3_8B,
    "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
}
_QWEN3_VL_8B["vision_config"] |= {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}
_MISTRAL_24B = _llm(5120, 32768, 40, 32, 8, 128, 131072)
_MINISTRAL_3B = _llm(3072, 9216, 26, 32, 8, 128, 131072)
_ERNIE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "text_in_dim": 3072,
}
_LONG_CLIP_L, _LONG_CLIP_G = ({**clip, "max_position_embeddings": 248} for clip in (_CLIP_L, _CLIP_G))
_UMT5_XXL = {**_T5_XXL, "vocab_size": 256384}
_WAN = {"transformer": {}, "vae": {}, "text_encoder": _UMT5_XXL}
_VAE16 = _VAE | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_VAE_XL = _VAE | {"scaling_factor": 0.13025}
_BIG = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
_SD35 = {"vae": _VAE16, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
_HIDREAM = {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": [64, 32, 32]}
_HIDREAM |= {"llama_layers": [*range(32), *[31] * 16], "out_channels": 16}
_NEWER = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True, "patch_size_t": 2}
_NEWER |= {"patch_bias": False, "sample_height": 96, "sample_width": 170, "max_text_seq_length": 224}

# {model: (the tiny pipeline of tests/families that it is, {component: config})}. Of diffusers' classes what is not said is the class's default, which mostly
# is the published model. Where tests have a language model in the place of a larger class, so has this: towers for pictures are left out.
GROWN: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "sd3.5-medium": (
        "sd3.5",
        {"transformer": _MEDIUM | {"qk_norm": "rms_norm", "dual_attention_layers": [*range(13)]}, **_SD35},
    ),
    "sd3.5-large": ("sd3.5", {"transformer": _BIG | {"qk_norm": "rms_norm"}, **_SD35}),
    "flux2-klein-4b": (
        "flux2 klein",
        {"transformer": _KLEIN_4B | {"guidance_embeds": False}, "vae": {}, "text_encoder": _QWEN3_4B},
    ),
    "flux2-klein-9b": (
        "flux2 klein",
        {"transformer": _KLEIN_9B | {"guidance_embeds": False}, "vae": {}, "text_encoder": _QWEN3_8B},
    ),
    "z-image": ("z_image", {"transformer": {}, "vae": _VAE16, "text_encoder": _QWEN3_4B}),
    "qwen-image": ("qwen_image", {"transformer": {}, "vae": {}, "text_encoder": _QWEN25_7B}),
    "flux2-dev": ("flux2 dev", {"transformer": {}, "vae": {}, "text_encoder": _MISTRAL_24B}),
    "ideogram-4": (
        "ideogram4",
        {"transformer": {}, "unconditional_transformer": {}, "vae": {}, "text_encoder": _QWEN3_VL_8B},
    ),
    "ernie-image": ("ernie_image", {"transformer": _ERNIE, "vae": {}, "text_encoder": _MINISTRAL_3B}),
    "krea-2": ("krea2", {"transformer": {}, "vae": {}, "text_encoder": _QWEN3_VL_4B}),
    "wan-2.1-14b": ("wan", _WAN),
    "wan-2.2-a14b": ("wan, two experts", _WAN | {"transformer_2": {}}),
    "chroma": ("chroma", {"transformer": {}, "vae": _VAE16, "text_encoder": _T5_XXL}),
    "lumina-2": ("lumina2", {"transformer": {"cap_feat_dim": 2304}, "vae": _VAE16, "text_encoder": _GEMMA2_2B}),
    "pixart-sigma": (
        "pixart sigma",
        {
            "transformer": {"caption_channels": 4096, "use_additional_conditions": False},
            "vae": _VAE_XL,
            "text_encoder": _T5_XXL,
        },
    ),
    "sana-1.6b": ("sana", {"transformer": {}, "vae": {}, "text_encoder": _GEMMA2_2B}),
    "auraflow": ("auraflow", {"transformer": {"pos_embed_max_size": 9216}, "vae": _VAE_XL, "text_encoder": _PILE_T5}),
    "cogview4": (
        "cogview4",
        {
            "transformer": {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
            "vae": _VAE16,
            "text_encoder": _GLM_9B,
        },
    ),
    "hidream-i1": (
        "hidream",
        {"transformer": _HIDREAM, "vae": _VAE16, "text_encoder": _LONG_CLIP_L, "text_encoder_2": _LONG_CLIP_G}
        | {"text_encoder_3": _T5_XXL, "text_encoder_4": _LLAMA_8B},
    ),
    "ltx-video-2b": ("ltx", {"transformer": {}, "vae": {}, "text_encoder": _T5_XXL}),
    "ltx-2": ("ltx2", {"transformer": {}, "connectors": {}, "vae": {}, "text_encoder": _GEMMA3_12B}),
    "hunyuan-video": (
        "hunyuan_video",
        {"transformer": {}, "vae": {}, "text_encoder": _LLAMA_8B, "text_encoder_2": _CLIP_L},
    ),
    "cogvideox-5b": (
        "cogvideox",
        {
            "transformer": _NEWER
            | {"patch_size_t": None, "patch_bias": True, "max_text_seq_length": 226}
            | {"sample_height": 60, "sample_width": 90},
            "vae": {},
            "text_encoder": _T5_XXL,
        },
    ),
    "cogvideox-1.5": ("cogvideox 1.5", {"transformer": _NEWER, "vae": {}, "text_encoder": _T5_XXL}),
    "mochi-1": ("mochi", {"transformer": {}, "vae": {}, "text_encoder": _T5_XXL}),
}
GROWN_SIZES = {  # of the denoiser, in millions, as the models' cards have them: to 3 %
    "sd3.5-medium": 2243, "sd3.5-large": 8057, "flux2-klein-4b": 3876, "flux2-klein-9b": 9079, "z-image": 6155, "qwen-image": 20430,
    "chroma": 8900, "lumina-2": 2610, "pixart-sigma": 611, "sana-1.6b": 1604, "auraflow": 6858, "cogview4": 6369, "wan-2.1-14b": 14290, "hidream-i1": 17100,
    "ltx-video-2b": 1923, "hunyuan-video": 12821, "cogvideox-5b": 5570, "cogvideox-1.5": 5570,
    "mochi-1": 10030, "flux2-dev": 32200, "ideogram-4": 9279, "ernie-image": 8033,
}  # fmt: skip


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


def write_grown(name: str, folder: Path) -> Path:
    """Write the configs of a model that is as a tiny one of the tests, but for its sizes."""
    import torch

    from tests.families.pipelines import pipeline

    kind, parts = GROWN[name]
    pipeline(kind, torch.float32).save_pretrained(folder)
    for part, config in parts.items():
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
        file = folder / part / "config.json"
        tiny = json.loads(file.read_text())
        file.write_text(
            json.dumps({"_class_name": tiny["_class_name"]} | config if "_class_name" in tiny else _over(tiny, config))
        )
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("text_encoder_select_layers", None)  # Krea's own are those of the full text encoder
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _over(tiny: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers with other sizes."""
    kept = {name: value for name, value in tiny.items() if name != "layer_types"}
    sizes = {
        n: _over(kept[n], value) if isinstance(value, dict) else value
        for n, value in config.items()
        if n not in ("architectures", "model_type")
    }
    return kept | sizes
