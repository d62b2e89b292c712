"""Lumina2 and Z-Image: one stream of blocks, with refiners of the noise and of the caption before it; and the models that were made from either."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, Rule, renamed, same, table, within

# 24 heads of queries share 8 of keys and values
_QKV = Rule("attention.qkv", (("attn.to_q", 3), ("attn.to_k", 1), ("attn.to_v", 1)))
_BLOCK = (
    _QKV,
    *renamed({"attention.out": "attn.to_out.0"}),
    *renamed({f"attention.{p}_norm": f"attn.norm_{p}" for p in "qk"}),
    *renamed({f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)}),
    *renamed({"attention_norm2": "norm2"}),
    *same("ffn_norm1", "ffn_norm2"),
)
_MODULATED = (*_BLOCK, *renamed({"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}))
_PLAIN = (*_BLOCK, *renamed({"attention_norm1": "norm1"}))
LUMINA2 = table(
    (
        *same("x_embedder"),
        *renamed(
            {
                "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
                "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
                "cap_embedder.0": "time_caption_embed.caption_embedder.0",
                "cap_embedder.1": "time_caption_embed.caption_embedder.1",
                "final_layer.adaLN_modulation.1": "norm_out.linear_1",
                "final_layer.linear": "norm_out.linear_2",
            }
        ),
        *within("layers.{}.", "layers.{}.", _MODULATED),
        *within("noise_refiner.{}.", "noise_refiner.{}.", _MODULATED),
        *within("context_refiner.{}.", "context_refiner.{}.", _PLAIN),
    ),
    {"text_encoder": text.language(text.GEMMA2, "lora_te_", name="gemma2_2b")},
)

# Trainers of Z-Image write q, k and v apart, so files in ComfyUI's spelling have diffusers' names there
_Z_BLOCK = (
    *renamed({"attention.qkv": tuple(f"attention.to_{p}" for p in "qkv"), "attention.out": "attention.to_out.0"}),
    *renamed({f"attention.{p}_norm": f"attention.norm_{p}" for p in "qk"}),
    *same(*(f"feed_forward.w{n}" for n in (1, 2, 3))),
    *same(*(f"{part}_norm{n}" for part in ("attention", "ffn") for n in (1, 2))),
)
_Z_MODULATED = (*_Z_BLOCK, *same("adaLN_modulation.0"))
_Z_TEXT = (*text.QWEN3, *text.inside("model", text.QWEN3))
Z_IMAGE = table(
    (
        *renamed(
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            }
        ),
        *same(*(f"{embedder}.{n}" for embedder in ("cap_embedder", "siglip_embedder") for n in (0, 1))),
        *same("t_embedder.mlp.0", "t_embedder.mlp.2"),
        *within("layers.{}.", "layers.{}.", _Z_MODULATED),
        *within("noise_refiner.{}.", "noise_refiner.{}.", _Z_MODULATED),
        *within("context_refiner.{}.", "context_refiner.{}.", _Z_BLOCK),
        *within("siglip_refiner.{}.", "siglip_refiner.{}.", _Z_BLOCK),
    ),
    {"text_encoder": Encoder(_Z_TEXT, (), "text_encoders.qwen3_4b.transformer.")},
)

# A Z-Image that reads the text in a Perceiver and in some blocks, published in diffusers' names
_FEED_FORWARD = tuple(f"w{n}" for n in (1, 2, 3))
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_FIBO_BLOCK = (
    *(f"attention.{layer}" for layer in _LAYERS),
    *(f"feed_forward.{layer}" for layer in _FEED_FORWARD),
    *(f"{part}_norm{n}" for part in ("attention", "ffn") for n in (1, 2)),
    "adaLN_modulation.0",
)
_READS = (*(f"cross_attention.{layer}" for layer in _LAYERS), "cross_attn_norm1", "cross_attn_norm2")
_PERCEIVER = (
    *(f"{attention}_attention.{layer}" for attention in ("cross", "self") for layer in _LAYERS),
    *(f"ffn.{layer}" for layer in _FEED_FORWARD),
    *("cross_attn_norm", "self_attn_norm", "ffn_norm"),
)
BRIA_FIBO2 = table(
    same(
        *("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "perceiver.norm_out"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
        *(f"layers.{{}}.{layer}" for layer in (*_FIBO_BLOCK, *_READS)),
        *(f"noise_refiner.{{}}.{layer}" for layer in _FIBO_BLOCK),
        *(f"perceiver.layers.{{}}.{layer}" for layer in _PERCEIVER),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.QWEN3))},
    yields=True,
)

# The original is written in the names that diffusers has for Lumina2
OMNIGEN2 = table(
    same(
        *LUMINA2.components["transformer"],
        "ref_image_patch_embedder",
        *(n.replace("noise", "ref_image") for n in LUMINA2.components["transformer"] if n.startswith("noise_refiner")),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.LLAMA))},
    yields=True,
)
