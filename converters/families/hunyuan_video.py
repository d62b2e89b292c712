"""HunyuanVideo: Flux.1's blocks in other words, and a refiner of the text's tokens. FramePack, which is made from it."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Rule, renamed, same, table, within

DOUBLE = renamed(
    {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn_proj": "attn.to_out.0",
        "img_attn_q_norm": "attn.norm_q",
        "img_attn_k_norm": "attn.norm_k",
        "img_mod.linear": "norm1.linear",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn_proj": "attn.to_add_out",
        "txt_attn_q_norm": "attn.norm_added_q",
        "txt_attn_k_norm": "attn.norm_added_k",
        "txt_mod.linear": "norm1_context.linear",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
    }
)
SINGLE = (
    Rule("linear1", (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4))),
    *renamed(
        {
            "linear2": "proj_out",
            "modulation.linear": "norm.linear",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
        }
    ),
)
REFINER = (
    *same("norm1", "norm2"),
    *renamed(
        {
            "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",  # two gates, so nothing is swapped
        }
    ),
)
TEXT = renamed(
    {
        "input_embedder": "proj_in",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "c_embedder.linear_1": "time_text_embed.text_embedder.linear_1",
        "c_embedder.linear_2": "time_text_embed.text_embedder.linear_2",
    }
)
_RULES = (
    *renamed(
        {
            "img_in.proj": "x_embedder.proj",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    Rule("final_layer.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED),
    *within("txt_in.", "context_embedder.", TEXT),
    *within("txt_in.individual_token_refiner.blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}.", REFINER),
    *within("double_blocks.{}.", "transformer_blocks.{}.", DOUBLE),
    *within("single_blocks.{}.", "single_transformer_blocks.{}.", SINGLE),
)
_ENCODERS = {
    "text_encoder": text.language(text.LLAMA, "lora_te1_", name="llama"),
    "text_encoder_2": text.clip("lora_te2_", "clip_l"),
}
HUNYUAN_VIDEO = table(_RULES, _ENCODERS)
# FramePack is HunyuanVideo with frames that are clean and an image
FRAMEPACK = table(
    (
        *_RULES,
        *same(
            *(f"clean_x_embedder.proj{size}" for size in ("", "_2x", "_4x")),
            *(f"image_projection.{layer}" for layer in ("up", "down")),
        ),
    ),
    _ENCODERS,
    yields=True,
)
