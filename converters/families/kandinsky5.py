"""Kandinsky 5, for videos and images: the original and ComfyUI have diffusers' names."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, same, table

_ATTENTION = ("to_query", "to_key", "to_value", "out_layer", "query_norm", "key_norm")
_KINDS = {"text": ("self",), "visual": ("self", "cross")}  # of blocks, and of attention in them
KANDINSKY5 = table(
    same(
        *(f"{kind}_transformer_blocks.{{}}.{kind}_modulation.out_layer" for kind in _KINDS),
        *(
            f"{kind}_transformer_blocks.{{}}.{attention}_attention.{layer}"
            for kind, attentions in _KINDS.items()
            for attention in attentions
            for layer in _ATTENTION
        ),
        *(f"{kind}_transformer_blocks.{{}}.feed_forward.{layer}_layer" for kind in _KINDS for layer in ("in", "out")),
        *(
            f"{embeddings}.{layer}"
            for embeddings in ("text_embeddings", "pooled_text_embeddings")
            for layer in ("in_layer", "norm")
        ),
        *("time_embeddings.in_layer", "time_embeddings.out_layer", "visual_embeddings.in_layer"),
        *("out_layer.modulation.out_layer", "out_layer.out_layer"),
    ),
    {
        "text_encoder": Encoder(
            text.inside("model.language_model", text.LLAMA), (), "text_encoders.qwen25_7b.transformer."
        ),
        "text_encoder_2": text.clip("lora_te2_", "clip_l"),
    },
)
