"""LTX-Video, and LTX-2, which has the same again for sound and attention between the two."""

from dataclasses import replace

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, Table, renamed, same, table, within

# {original: diffusers} of the modulations, which are all embedders of the time
_VIDEO = {"adaln_single": "time_embed"}
_SOUND = {
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _family(
    modulations: dict[str, str],
    streams: tuple[str, ...],
    crossing: tuple[str, ...],
    gates: tuple[str, ...],
    llm: Encoder,
) -> Table:
    """The table of a model with streams of tokens ("" for the video's), attention between them, and gates in the attention."""
    attentions = (*(f"{stream}attn{n}" for stream in streams for n in (1, 2)), *crossing)
    return table(
        (
            *renamed({f"{stream}patchify_proj": f"{stream}proj_in" for stream in streams}),
            *renamed({f"{old}.{layer}": f"{new}.{layer}" for old, new in modulations.items() for layer in _EMBEDDER}),
            *same(
                *(f"{stream}proj_out" for stream in streams),
                *(f"{stream}caption_projection.linear_{n}" for stream in streams for n in (1, 2)),
                *(f"transformer_blocks.{{}}.{name}.{layer}" for name in attentions for layer in (*_ATTENTION, *gates)),
                *(f"transformer_blocks.{{}}.{stream}ff.net.{layer}" for stream in streams for layer in ("0.proj", "2")),
            ),
            *within(
                "transformer_blocks.{}.",
                "transformer_blocks.{}.",
                renamed({f"{name}.{p}_norm": f"{name}.norm_{p}" for name in attentions for p in "qk"}),
            ),
        ),
        {"text_encoder": llm},
    )


LTX = _family(_VIDEO, ("",), (), (), text.t5())
# of LTX-2, between the language model and the transformer
_CONNECTORS = renamed(
    {f"{stream}aggregate_embed": f"{stream}text_proj_in" for stream in ("", "video_", "audio_")},
)
_CONNECTOR = (
    *(f"attn1.{layer}" for layer in (*_ATTENTION, "norm_q", "norm_k", "to_gate_logits")),
    "ff.net.0.proj",
    "ff.net.2",
)
_LTX2 = _family(
    _VIDEO | _SOUND,
    ("", "audio_"),
    ("audio_to_video_attn", "video_to_audio_attn"),
    ("to_gate_logits",),
    Encoder(text.inside("model.language_model", text.GEMMA3)),
)
LTX2 = replace(
    _LTX2,
    components={
        **_LTX2.components,
        "connectors": (
            *(rule.parts[0][0] for rule in _CONNECTORS),
            *(
                f"{kind}_connector.transformer_blocks.{{}}.{layer}"
                for kind in ("video", "audio")
                for layer in _CONNECTOR
            ),
        ),
    },
    rules={**_LTX2.rules, "connectors": _CONNECTORS},
    words={"connectors": "text_embedding_projection."},
)
