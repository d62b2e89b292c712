"""PRX: one stream of blocks, with q, k and v of the image in one layer in diffusers too."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, same, table

_BLOCK = (
    *(
        f"attention.{layer}"
        for layer in ("img_qkv_proj", "txt_kv_proj", "to_out.0", "norm_q", "norm_k", "norm_added_k")
    ),
    *("gate_proj", "up_proj", "down_proj", "modulation.lin"),
)
PRX = table(
    same(
        *("img_in", "img_in.0", "img_in.1", "time_in.in_layer", "time_in.out_layer", "txt_in"),
        *("resolution_embedder.mlp.in_layer", "resolution_embedder.mlp.out_layer"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
        *(f"blocks.{{}}.{layer}" for layer in _BLOCK),
    ),
    {"text_encoder": Encoder(text.GEMMA2)},  # the encoder of a T5Gemma
)
