"""Mochi 1: blocks of a visual (x) and a text (y) stream."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Rule, renamed, table, within

_BLOCK = (
    *renamed(
        {
            "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "attn.proj_x": "attn1.to_out.0",
            "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
            "attn.proj_y": "attn1.to_add_out",
            **{f"attn.{p}_norm_x": f"attn1.norm_{p}" for p in "qk"},
            **{f"attn.{p}_norm_y": f"attn1.norm_added_{p}" for p in "qk"},
            "mod_x": "norm1.linear",
            "mod_y": "norm1_context.linear",
            "mlp_x.w2": "ff.net.2",
            "mlp_y.w2": "ff_context.net.2",
        }
    ),
    Rule("mlp_x.w1", (("ff.net.0.proj", 1),), SWAPPED),
    Rule("mlp_y.w1", (("ff_context.net.0.proj", 1),), SWAPPED),
)
_RULES = (
    *renamed(
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
            "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
            "t5_y_embedder.to_q": "time_embed.pooler.to_q",
            "t5_y_embedder.to_out": "time_embed.pooler.to_out",
            "t5_yproj": "time_embed.caption_proj",
            "final_layer.linear": "proj_out",
            "blocks.47.mod_y": "transformer_blocks.47.norm1_context.linear_1",  # the last block's, before the others'
        }
    ),
    Rule("final_layer.mod", (("norm_out.linear", 1),), SWAPPED),
    *within("blocks.{}.", "transformer_blocks.{}.", _BLOCK),
)
MOCHI = table(_RULES, {"text_encoder": text.t5()})
