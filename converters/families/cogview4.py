"""CogView4, whose original is built on SwissArmyTransformer (SAT), and GLM-Image, which is CogView4 with more to read and has diffusers' names alone."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Encoder, Rule, renamed, same, table, within

_BLOCK = renamed(
    {
        "attention.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attention.dense": "attn1.to_out.0",
        "mlp.dense_h_to_4h": "ff.net.0.proj",
        "mlp.dense_4h_to_h": "ff.net.2",
    }
)
COGVIEW4 = table(
    (
        *renamed(
            {
                "mixins.patch_embed.proj": "patch_embed.proj",
                "mixins.patch_embed.text_proj": "patch_embed.text_proj",
                "time_embed.0": "time_condition_embed.timestep_embedder.linear_1",
                "time_embed.2": "time_condition_embed.timestep_embedder.linear_2",
                "label_emb.0.0": "time_condition_embed.condition_embedder.linear_1",
                "label_emb.0.2": "time_condition_embed.condition_embedder.linear_2",
                "mixins.adaln.adaln_modules.{}.1": "transformer_blocks.{}.norm1.linear",
                "mixins.final_layer.linear": "proj_out",
            }
        ),
        Rule("mixins.final_layer.adaln.1", (("norm_out.linear", 1),), SWAPPED),
        *within("transformer.layers.{}.", "transformer_blocks.{}.", _BLOCK),
    ),
    {"text_encoder": Encoder(text.GLM)},
)

_EMBEDDERS = ("timestep_embedder", "condition_embedder")
GLM_IMAGE = table(
    same(
        *("image_projector.proj", "norm_out.linear", "proj_out"),
        *(f"{part}_projector.net.{layer}" for part in ("glyph", "prior") for layer in ("0.proj", "2")),
        *(f"time_condition_embed.{part}.linear_{n}" for part in _EMBEDDERS for n in (1, 2)),
        *(f"transformer_blocks.{{}}.attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.{{}}.{layer}" for layer in ("norm1.linear", "ff.net.0.proj", "ff.net.2")),
    ),
    {"text_encoder": text.t5()},
    yields=True,
)
