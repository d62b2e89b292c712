"""Krea 2: one stream of blocks with gated attention, and a small transformer that fuses the text encoder's layers."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, renamed, same, table, within

_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "gate": "to_gate", "wo": "to_out.0"}
_BLOCK = renamed(
    {
        **{f"attn.{old}": f"attn.{new}" for old, new in _ATTENTION.items()},
        **{f"attn.qknorm.{p}norm": f"attn.norm_{p}" for p in "qk"},
        **{f"mlp.{layer}": f"ff.{layer}" for layer in ("gate", "up", "down")},
        "prenorm": "norm1",
        "postnorm": "norm2",
    }
)
KREA2 = table(
    (
        *renamed(
            {
                "first": "img_in",
                "tmlp.0": "time_embed.linear_1",
                "tmlp.2": "time_embed.linear_2",
                "tproj.1": "time_mod_proj",
                "txtmlp.0": "txt_in.norm",
                "txtmlp.1": "txt_in.linear_1",
                "txtmlp.3": "txt_in.linear_2",
                "last.norm": "final_layer.norm",
                "last.linear": "final_layer.linear",
            }
        ),
        *within("blocks.{}.", "transformer_blocks.{}.", _BLOCK),
        *within(
            "txtfusion.",
            "text_fusion.",
            (
                *same("projector"),
                *within("layerwise_blocks.{}.", "layerwise_blocks.{}.", _BLOCK),
                *within("refiner_blocks.{}.", "refiner_blocks.{}.", _BLOCK),
            ),
        ),
    ),
    {"text_encoder": Encoder(text.inside("language_model", text.QWEN3))},
)
