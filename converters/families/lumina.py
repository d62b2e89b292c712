"""Lumina2 and Z-Image: one stream of blocks, with refiners of the noise and of the caption before it."""

from converters.families import text
from converters.families.base import Encoder, Rule, renamed, same, table, within

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
