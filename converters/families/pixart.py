"""PixArt and Sana, which has convolutions where PixArt has a feed-forward."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import renamed, table, within

_BLOCK = renamed(
    {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.proj": "attn2.to_out.0",
    }
)
_ENDS = {
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}


def _embedder(original: str, diffusers: str) -> dict[str, str]:
    return {f"{original}.mlp.0": f"{diffusers}.linear_1", f"{original}.mlp.2": f"{diffusers}.linear_2"}


PIXART = table(
    (
        *renamed(
            {
                **_ENDS,
                "x_embedder.proj": "pos_embed.proj",
                "t_block.1": "adaln_single.linear",
                **_embedder("t_embedder", "adaln_single.emb.timestep_embedder"),
                **_embedder("csize_embedder", "adaln_single.emb.resolution_embedder"),
                **_embedder("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
            }
        ),
        *within(
            "blocks.{}.",
            "transformer_blocks.{}.",
            (*_BLOCK, *renamed({"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"})),
        ),
    ),
    {"text_encoder": text.t5("lora_te_")},
)

# of Sana 1.5
_QK_NORM = {
    f"{old}.{p}_norm": f"{new}.norm_{p}" for old, new in (("attn", "attn1"), ("cross_attn", "attn2")) for p in "qk"
}
_SANA = {
    **_ENDS,
    "attention_y_norm": "caption_norm",
    "t_block.1": "time_embed.linear",
    **_embedder("t_embedder", "time_embed.emb.timestep_embedder"),
}
_SANA_BLOCK = (
    *_BLOCK,
    *renamed(_QK_NORM),
    *renamed({f"mlp.{n}_conv.conv": f"ff.conv_{n}" for n in ("inverted", "depth", "point")}),
)
_GEMMA = {"text_encoder": text.language(text.GEMMA2, "lora_te_", name="gemma2_2b")}
SANA = table(
    (
        *renamed({**_SANA, "x_embedder.proj": "patch_embed.proj"}),
        *within("blocks.{}.", "transformer_blocks.{}.", _SANA_BLOCK),
    ),
    _GEMMA,
)
SANA_VIDEO = table(
    (
        *renamed({**_SANA, "x_embedder.proj": "patch_embedding"}),
        *within("blocks.{}.", "transformer_blocks.{}.", (*_SANA_BLOCK, *renamed({"mlp.t_conv": "ff.conv_temp"}))),
    ),
    _GEMMA,
    yields=True,
)
