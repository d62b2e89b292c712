"""HunyuanVideo 1.5: double blocks alone, whose q, k and v are layers of their own in the original and one layer in ComfyUI."""

from converters.families import text
from converters.families.base import SWAPPED, Rule, renamed, table, within
from converters.families.hunyuan_video import DOUBLE, REFINED

_APART = renamed(
    {
        **{f"img_attn_{p}": f"attn.to_{p}" for p in "qkv"},
        **{f"txt_attn_{p}": f"attn.add_{p}_proj" for p in "qkv"},
    }
)
_ATTENTION = {
    "img": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.norm_q", "attn.norm_k", "ff", "norm1"),
    "txt": (
        *(f"attn.add_{p}_proj" for p in "qkv"),
        *("attn.to_add_out", "attn.norm_added_q", "attn.norm_added_k", "ff_context", "norm1_context"),
    ),
}
_COMFYUI = tuple(  # as it calls the layers of its own model; of those that it reads, these are written: DOUBLE
    rule
    for stream, (q, k, v, out, norm_q, norm_k, ff, norm) in _ATTENTION.items()
    for rule in renamed(
        {
            f"{stream}_attn.qkv": (q, k, v),
            f"{stream}_attn.proj": out,
            f"{stream}_attn.norm.query_norm": norm_q,
            f"{stream}_attn.norm.key_norm": norm_k,
            f"{stream}_mlp.0": f"{ff}.net.0.proj",
            f"{stream}_mlp.2": f"{ff}.net.2",
            f"{stream}_mod.lin": f"{norm}.linear",
        }
    )
)
_RULES = (
    *renamed(
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
            "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
            "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
            "byt5_in.layernorm": "context_embedder_2.norm",
            **{f"byt5_in.fc{n}": f"context_embedder_2.linear_{n}" for n in (1, 2, 3)},
            "vision_in.proj.0": "image_embedder.norm_in",
            "vision_in.proj.1": "image_embedder.linear_1",
            "vision_in.proj.3": "image_embedder.linear_2",
            "vision_in.proj.4": "image_embedder.norm_out",
            "final_layer.linear": "proj_out",
        }
    ),
    Rule("final_layer.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED),
    *REFINED,
)
_BLOCKS = {  # {whose names come first: the rules of a block}
    "original": (*_APART, *DOUBLE, *_COMFYUI),
    "comfyui": (*DOUBLE, *_COMFYUI, *_APART),
}
_ENCODERS = {
    "text_encoder": text.language(text.LLAMA, name="qwen25_7b"),
    "text_encoder_2": text.t5(name="byt5_small_glyph"),
}
HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_COMFYUI = (
    table(
        (*_RULES, *within("double_blocks.{}.", "transformer_blocks.{}.", block)),
        _ENCODERS,
        yields_to=("flux", "chroma", "flux2", "hunyuan_video"),
    )
    for block in _BLOCKS.values()
)
