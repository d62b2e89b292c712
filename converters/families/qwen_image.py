"""Qwen-Image: the original is written in diffusers' names."""

from converters.families import text
from converters.families.base import Encoder, same, table

_STREAM = ("mod.1", "mlp.net.0.proj", "mlp.net.2")
_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
)
QWEN_IMAGE = table(
    same(
        "img_in",
        "txt_in",
        "txt_norm",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
        *(f"transformer_blocks.{{}}.attn.{layer}" for layer in _ATTENTION),
        *(f"transformer_blocks.{{}}.{stream}_{layer}" for stream in ("img", "txt") for layer in _STREAM),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.LLAMA))},
)
