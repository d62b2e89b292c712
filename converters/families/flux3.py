"""Flux.3: blocks by what the tokens are (images, images to go by, sound, text), and blocks for all of them."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Encoder, Rule, renamed, table, within

_BLOCK = renamed(
    {
        **{f"{p}_proj": f"attn.to_{p}" for p in "qkv"},
        "attn_out": "attn.to_out.0",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "mlp_in": "ff.linear_in",
        "mlp_out": "ff.linear_out",
    }
)
_MODES = ("image", "image_cond")
FLUX3 = table(
    (
        *renamed({"txt_in": "context_embedder", "final_layer.image.linear": "proj_out"}),
        Rule("final_layer.image.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED),
        *renamed({f"emb_in.{mode}": f"x_embedders.{mode}" for mode in _MODES}),
        *renamed(
            {
                f"{old}.{a}": f"{new}.{b}"
                for old, new in (("time_in", "timestep_embedder"), ("ref_time_in", "target_timestep_embedder"))
                for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
            }
        ),
        *renamed(
            {
                f"{stage}_stream_modulations.{mode}.lin": f"{stage}_stream_modulations.{mode}.linear"
                for stage in ("early", "single")
                for mode in (*_MODES, "txt")
            }
        ),
        *(
            rule
            for mode in _MODES
            for rule in within(f"content_mode_blocks.{mode}.{{}}.", f"mode_blocks.{mode}.{{}}.", _BLOCK)
        ),
        *within("txt_mode_blocks.{}.", "txt_mode_blocks.{}.", _BLOCK),
        *within("single_blocks.{}.", "single_transformer_blocks.{}.", _BLOCK),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.QWEN3))},
)
