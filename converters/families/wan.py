"""Wan 2.1 and 2.2, with the image layers of I2V and the extra blocks of VACE. Wan 2.2 has two denoisers of one shape."""

from converters.families import text
from converters.families.base import renamed, same, table, within

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = renamed(
    {
        **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
        **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",  # diffusers counts in order of use; the other two have no weights
    }
)
_IMAGE = renamed(
    {
        "cross_attn.k_img": "attn2.add_k_proj",
        "cross_attn.v_img": "attn2.add_v_proj",
        "cross_attn.norm_k_img": "attn2.norm_added_k",
    }
)
_CONDITION = renamed(
    {
        "time_embedding.0": "time_embedder.linear_1",
        "time_embedding.2": "time_embedder.linear_2",
        "time_projection.1": "time_proj",
        "text_embedding.0": "text_embedder.linear_1",
        "text_embedding.2": "text_embedder.linear_2",
        "img_emb.proj.0": "image_embedder.norm1",
        "img_emb.proj.1": "image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "image_embedder.ff.net.2",
        "img_emb.proj.4": "image_embedder.norm2",
    }
)
_RULES = (
    *same("patch_embedding", "vace_patch_embedding"),
    *renamed({"head.head": "proj_out"}),
    *within("", "condition_embedder.", _CONDITION),
    *within("blocks.{}.", "blocks.{}.", (*_BLOCK, *_IMAGE)),
    *within(
        "vace_blocks.{}.",
        "vace_blocks.{}.",
        (*_BLOCK, *_IMAGE, *renamed({"before_proj": "proj_in", "after_proj": "proj_out"})),
    ),
)
WAN = table(_RULES, {"text_encoder": text.t5(name="umt5xxl")}, denoisers=("transformer", "transformer_2"))
