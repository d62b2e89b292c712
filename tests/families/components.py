"""Tiny random components that pipelines of several kinds have."""

from __future__ import annotations

import functools
from typing import Any

import transformers

from diffpeft.pipeline.open import EMBEDDED

_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "max_position_embeddings": 77,
}
_T5 = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4}


@functools.cache
def tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")


def clip(projected: bool = False, wide: bool = True) -> Any:
    t = tokenizer()
    ids = {"vocab_size": len(t), "bos_token_id": t.bos_token_id, "eos_token_id": t.eos_token_id}
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    width = {"hidden_size": 40} if projected and wide else {}  # single files are told apart by it
    return kind(transformers.CLIPTextConfig(**{**_CLIP, **width}, **ids))


LLM = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(side: str = "right") -> Any:
    """A tokenizer with a template for conversations, which reads as much as it is told and fills up at a side."""
    made = transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", padding_side=side)
    made.chat_template, made.model_max_length = _CHAT, 4096
    return made


def llm(kind: str, layers: int, **config: Any) -> Any:
    """A language model of transformers by the beginning of its classes' names."""
    ids = {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    settings = getattr(transformers, f"{kind}Config")(num_hidden_layers=layers, **LLM, **ids, **config)
    return getattr(transformers, f"{kind}Model")(settings)


def t5(kind: str = "T5", **config: Any) -> Any:
    settings = {**_T5, **config}
    return getattr(transformers, f"{kind}EncoderModel")(
        getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer()), **settings)
    )


CLIPS_OF_FRAMES = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.1, -1, 2, 0],
    "latents_std": [1.0, 2, 0.5, 3],
}
HUNYUAN_VAE = {
    "latent_channels": 4,
    "block_out_channels": (8,) * 4,
    "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
    "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.476986,
    "mid_block_add_attention": False,
}
