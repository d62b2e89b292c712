"""Ideogram 4: one stream of blocks; only the attention has other names than diffusers'. Adapters are of the conditional one of its two transformers."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, renamed, same, table, within

_BLOCK = (
    *renamed({"attention.qkv": tuple(f"attention.to_{p}" for p in "qkv"), "attention.o": "attention.to_out.0"}),
    *same(*(f"attention.norm_{p}" for p in "qk"), *(f"feed_forward.w{n}" for n in (1, 2, 3)), "adaln_modulation"),
    *same(*(f"{part}_norm{n}" for part in ("attention", "ffn") for n in (1, 2))),
)
IDEOGRAM4 = table(
    (
        *same("input_proj", "llm_cond_norm", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out"),
        *same("adaln_proj", "final_layer.linear", "final_layer.adaln_modulation"),
        *within("layers.{}.", "layers.{}.", _BLOCK),
    ),
    {"text_encoder": Encoder(text.inside("language_model", text.QWEN3))},
    yields=True,
)
