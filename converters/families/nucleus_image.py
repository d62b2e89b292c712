"""Nucleus-Image, a mixture of experts: the original is written in diffusers' names. The routed experts are no layers, but tensors of all of them."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, same, table

_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
    *("add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"),
)
_FEED_FORWARD = ("net.0.proj", "net.2", "gate", "shared_expert.net.0.proj", "shared_expert.net.2")
NUCLEUS_IMAGE = table(
    same(
        *("img_in", "txt_norm", "norm_out.linear", "proj_out", "time_text_embed.norm"),
        *(f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
        *(f"transformer_blocks.{{}}.{layer}" for layer in ("img_mod.1", "encoder_proj")),
        *(f"transformer_blocks.{{}}.attn.{layer}" for layer in _ATTENTION),
        *(f"transformer_blocks.{{}}.img_mlp.{layer}" for layer in _FEED_FORWARD),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.QWEN3))},
    yields=True,
)
