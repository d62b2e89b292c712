"""LTX-Video, and LTX-2, which has the same again for sound and attention between the two."""

from converters.families import text
from converters.families.base import Encoder, renamed, same, table, within

# {original: diffusers} of the modulations, which are all embedders of the time; the first is the only one of LTX-Video
_MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_NORMS = {f"{name}.{p}_norm": f"{name}.norm_{p}" for name in _ATTENTIONS for p in "qk"}
_RULES = (
    *renamed({"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in"}),
    *renamed({f"{old}.{layer}": f"{new}.{layer}" for old, new in _MODULATIONS.items() for layer in _EMBEDDER}),
    *same(
        "proj_out",
        "audio_proj_out",
        *(f"{sound}caption_projection.linear_{n}" for sound in ("", "audio_") for n in (1, 2)),
        *(f"transformer_blocks.{{}}.{name}.{layer}" for name in _ATTENTIONS for layer in _ATTENTION),
        *(f"transformer_blocks.{{}}.{name}.net.{layer}" for name in ("ff", "audio_ff") for layer in ("0.proj", "2")),
    ),
    *within("transformer_blocks.{}.", "transformer_blocks.{}.", renamed(_NORMS)),
)
_TEXT = (*text.T5, *text.inside("model.language_model", text.GEMMA3))
LTX = table(_RULES, {"text_encoder": Encoder(_TEXT, (), "text_encoders.t5xxl.transformer.")})
