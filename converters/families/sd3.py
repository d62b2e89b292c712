"""SD3 and SD3.5: joint blocks of an image and a text stream."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Rule, renamed, table, within

_BLOCK = renamed(
    {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn.ln_q": "attn.norm_q",
        "x_block.attn.ln_k": "attn.norm_k",
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.attn2.ln_q": "attn2.norm_q",
        "x_block.attn2.ln_k": "attn2.norm_k",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.attn.ln_q": "attn.norm_added_q",
        "context_block.attn.ln_k": "attn.norm_added_k",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    }
)
# The last block's text stream ends with its attention: scale and shift instead of six. Which block is the last, no name tells.
_CONTEXT = ("context_block.adaLN_modulation.1", (("norm1_context.linear", 1),))
_RULES = (
    *renamed(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    Rule("final_layer.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED),
    *within(
        "joint_blocks.{}.",
        "transformer_blocks.{}.",
        (*_BLOCK, Rule(*_CONTEXT, aspect=6), Rule(*_CONTEXT, SWAPPED, aspect=2)),
    ),
)
SD3 = table(
    _RULES,
    {
        "text_encoder": text.clip("lora_te1_", "clip_l", projection=True),
        "text_encoder_2": text.clip("lora_te2_", "clip_g", projection=True),
        "text_encoder_3": text.t5("lora_te3_"),
    },
)
