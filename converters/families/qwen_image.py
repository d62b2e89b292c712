"""Qwen-Image: the original is written in diffusers' names. Of Qwen-Image 2.1 too, but that ComfyUI has the two halves of a feed-forward in one layer."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, renamed, same, table

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

QWEN_IMAGE21 = table(
    (
        *same(
            *("img_in", "txt_in.text_norm", "txt_in.in_layer", "txt_in.out_layer", "modulation.1"),
            *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
            *("norm_out.linear", "proj_out", "transformer_blocks.{}.img_mlp.out"),
            *(f"transformer_blocks.{{}}.attn.{layer}" for layer in _ATTENTION[:6]),
        ),
        *renamed(
            {
                "transformer_blocks.{}.img_mlp.gate_up": (
                    "transformer_blocks.{}.img_mlp.gate_layer",
                    "transformer_blocks.{}.img_mlp.proj",
                )
            }
        ),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.QWEN3))},
)
