"""HunyuanVideo 1.5: double blocks alone, whose q, k and v are layers of their own in the original and one layer in ComfyUI."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Rule, renamed, respelt, table, within
from diffpeft.converters.families.hunyuan_image import COMFYUI
from diffpeft.converters.families.hunyuan_video import DOUBLE, REFINER, TEXT

_APART = renamed(
    {
        **{f"img_attn_{p}": f"attn.to_{p}" for p in "qkv"},
        **{f"txt_attn_{p}": f"attn.add_{p}_proj" for p in "qkv"},
    }
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
    *within("txt_in.", "context_embedder.", TEXT),
    *within("txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}.", REFINER),
)
_JOINT = (*DOUBLE, *respelt(DOUBLE, COMFYUI))  # what ComfyUI reads; the first are written
_ENCODERS = {
    "text_encoder": text.language(text.LLAMA, name="qwen25_7b"),
    "text_encoder_2": text.t5(name="byt5_small_glyph"),
}
HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_COMFYUI = (
    table((*_RULES, *within("double_blocks.{}.", "transformer_blocks.{}.", block)), _ENCODERS, yields=True)
    for block in ((*_APART, *_JOINT), (*_JOINT, *_APART))
)
