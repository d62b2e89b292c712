"""HunyuanImage 2.1: HunyuanVideo's blocks, a mapper of glyphs beside the refiner of the text, no pooled text."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Encoder, Rule, renamed, respelt, table, within
from diffpeft.converters.families.hunyuan_video import DOUBLE, REFINER, SINGLE, TEXT

_EMBEDDERS = {"time_in": "timestep_embedder", "time_r_in": "timestep_embedder_r", "guidance_in": "guidance_embedder"}
_GLYPHS = {"layernorm": "norm", **{f"fc{n}": f"linear_{n}" for n in (1, 2, 3)}}
_RULES = (
    *renamed({"img_in.proj": "x_embedder.proj", "final_layer.linear": "proj_out"}),
    Rule("final_layer.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED),
    *renamed({f"{a}.mlp.0": f"time_guidance_embed.{b}.linear_1" for a, b in _EMBEDDERS.items()}),
    *renamed({f"{a}.mlp.2": f"time_guidance_embed.{b}.linear_2" for a, b in _EMBEDDERS.items()}),
    *within("byt5_in.", "context_embedder_2.", renamed(_GLYPHS)),
    *within("txt_in.", "context_embedder.", TEXT),
    *within("txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}.", REFINER),
    *within("double_blocks.{}.", "transformer_blocks.{}.", DOUBLE),
    *within("single_blocks.{}.", "single_transformer_blocks.{}.", SINGLE),
)
# ComfyUI's model calls the layers as Flux.1 does, and files with its names (diffusion-pipe's, those that sd-scripts converts) are read
COMFYUI = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_attn_q_norm": "_attn.norm.query_norm",
    "_attn_k_norm": "_attn.norm.key_norm",
    ".q_norm": ".norm.query_norm",
    ".k_norm": ".norm.key_norm",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
}
HUNYUAN_IMAGE = table(
    (*_RULES, *respelt(_RULES, COMFYUI)),
    {
        "text_encoder": Encoder(text.inside("model.language_model", text.LLAMA)),
        "text_encoder_2": text.t5(name="byt5_small"),
    },
    yields=True,
)
