"""CogVideoX, whose original is built on SwissArmyTransformer (SAT)."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Rule, renamed, table, within

# shift, scale and gate four times: before the attention and before the feed-forward, of the video, then both of the text
_MODULATION = Rule(
    "mixins.adaln_layer.adaLN_modulations.{}.1",
    (("transformer_blocks.{}.norm1.linear", 1), ("transformer_blocks.{}.norm2.linear", 1)),
    chunks=(0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11),
)
_RULES = (
    *renamed(
        {
            "mixins.patch_embed.proj": "patch_embed.proj",
            "mixins.patch_embed.text_proj": "patch_embed.text_proj",
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "ofs_embed.0": "ofs_embedding.linear_1",
            "ofs_embed.2": "ofs_embedding.linear_2",
            "transformer.final_layernorm": "norm_final",
            "mixins.final_layer.norm_final": "norm_out.norm",
            "mixins.final_layer.linear": "proj_out",
            "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
            "mixins.adaln_layer.query_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_q",
            "mixins.adaln_layer.key_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_k",
        }
    ),
    _MODULATION,
    *within(
        "transformer.layers.{}.",
        "transformer_blocks.{}.",
        renamed(
            {
                "attention.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attention.dense": "attn1.to_out.0",
                "input_layernorm": "norm1.norm",
                "post_attention_layernorm": "norm2.norm",
                "mlp.dense_h_to_4h": "ff.net.0.proj",
                "mlp.dense_4h_to_h": "ff.net.2",
            }
        ),
    ),
)
COGVIDEOX = table(_RULES, {"text_encoder": text.t5()})
