"""HiDream-I1: the original is written in diffusers' names. Its feed-forwards are mixtures of experts."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, same, table

_ATTENTION = tuple(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm"))
_EXPERTS = tuple(f"ff_i.{part}.w{n}" for part in ("shared_experts", "experts.{}") for n in (1, 2, 3))
_SINGLE = ("adaLN_modulation.1", *_ATTENTION, *_EXPERTS)
_DOUBLE = (*_SINGLE, *(f"{layer}_t" for layer in _ATTENTION), *(f"ff_t.w{n}" for n in (1, 2, 3)))
HIDREAM = table(
    same(
        "x_embedder.proj",
        *(f"t_embedder.timestep_embedder.linear_{n}" for n in (1, 2)),
        *(f"p_embedder.pooled_embedder.linear_{n}" for n in (1, 2)),
        "caption_projection.{}.linear",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
        *(f"double_stream_blocks.{{}}.block.{layer}" for layer in _DOUBLE),
        *(f"single_stream_blocks.{{}}.block.{layer}" for layer in _SINGLE),
    ),
    {
        "text_encoder": text.clip("lora_te1_", "clip_l", projection=True),
        "text_encoder_2": text.clip("lora_te2_", "clip_g", projection=True),
        "text_encoder_3": text.t5("lora_te3_"),
        "text_encoder_4": Encoder(text.inside("model", text.LLAMA), ("lora_te4_",), "text_encoders.llama.transformer."),
    },
)
