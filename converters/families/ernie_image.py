"""ERNIE-Image: the original is written in diffusers' names."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, same, table

_BLOCK = (
    *(f"self_attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")),
    *(f"mlp.{layer}" for layer in ("gate_proj", "up_proj", "linear_fc2")),
    *("adaLN_sa_ln", "adaLN_mlp_ln"),
)
ERNIE_IMAGE = table(
    same(
        *("x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
        *("adaLN_modulation.1", "final_norm.linear", "final_linear"),
        *(f"layers.{{}}.{layer}" for layer in _BLOCK),
    ),
    {"text_encoder": Encoder(text.inside("language_model", text.LLAMA))},
)
