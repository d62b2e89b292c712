"""AuraFlow (and Pony v7): a few joint blocks, then single ones."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Rule, renamed, table, within

_FEED_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_IMAGE = {"q": "attn.to_q", "k": "attn.to_k", "v": "attn.to_v", "o": "attn.to_out.0"}
_CONTEXT = {"q": "attn.add_q_proj", "k": "attn.add_k_proj", "v": "attn.add_v_proj", "o": "attn.to_add_out"}
_JOINT = renamed(
    {
        **{f"attn.w1{old}": new for old, new in _CONTEXT.items()},
        **{f"attn.w2{old}": new for old, new in _IMAGE.items()},
        **{f"mlpX.{old}": f"ff.{new}" for old, new in _FEED_FORWARD.items()},
        **{f"mlpC.{old}": f"ff_context.{new}" for old, new in _FEED_FORWARD.items()},
        "modX.1": "norm1.linear",
        "modC.1": "norm1_context.linear",
    }
)
_SINGLE = renamed(
    {
        **{f"attn.w1{old}": new for old, new in _IMAGE.items()},
        **{f"mlp.{old}": f"ff.{new}" for old, new in _FEED_FORWARD.items()},
        "modCX.1": "norm1.linear",
    }
)
_RULES = (
    *renamed(
        {
            "init_x_linear": "pos_embed.proj",
            "cond_seq_linear": "context_embedder",
            "t_embedder.mlp.0": "time_step_proj.linear_1",
            "t_embedder.mlp.2": "time_step_proj.linear_2",
            "final_linear": "proj_out",
        }
    ),
    Rule("modF.1", (("norm_out.linear", 1),), SWAPPED),
    *within("double_layers.{}.", "joint_transformer_blocks.{}.", _JOINT),
    *within("single_layers.{}.", "single_transformer_blocks.{}.", _SINGLE),
)
AURAFLOW = table(_RULES, {"text_encoder": text.t5("lora_te_", name="pile_t5xl")})
