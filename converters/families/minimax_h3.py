"""MiniMax H3: one stack for text, sound and video, and the same again for pictures to go by (`transformer_ref`)."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Encoder, Rule, renamed, same, table, within

_BLOCK = (
    *same("norm1", "norm2"),
    *renamed(
        {
            "attn.qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.out_proj": "attn.to_out.0",
            "attn.q_norm": "attn.norm_q",
            "attn.k_norm": "attn.norm_k",
            "mlp.fc2": "ff.net.2",
        }
    ),
    Rule("mlp.fc1", (("ff.net.0.proj", 1),), SWAPPED),  # (gate, value) there and (value, gate) here
)
MINIMAX_H3 = table(
    (
        *same("token_refiner.final_norm"),
        *renamed(
            {
                "video_patch_proj": "proj_in",
                "audio_patch_proj": "audio_proj_in",
                "condition_proj": "context_embedder",
                "time_embedder.proj_in": "time_embedder.linear_1",
                "time_embedder.proj_out": "time_embedder.linear_2",
                "final_layer.norm": "norm_out.norm",
                "final_layer.adaln_proj.linear": "norm_out.linear",
                "final_layer.video_out": "proj_out",
                "final_layer.audio_out": "audio_proj_out",
            }
        ),
        *within("token_refiner.blocks.{}.", "token_refiner.refiner_blocks.{}.", _BLOCK),
        *within("blocks.{}.", "transformer_blocks.{}.", (*_BLOCK, *same("adaln_proj.linear"))),
    ),
    {"text_encoder": Encoder(text.inside("model.language_model", text.QWEN3))},
    denoisers=("transformer", "transformer_ref"),
    unread=dict.fromkeys(
        (f"qkv_proj.lora_{ab}.default." for ab in "AB"),
        "DiffSynth-Studio has the rows of q, k and v head by head in one layer, where all others have one after the other",
    ),
)
