"""Flux.1; Chroma, which is Flux.1 with one guidance layer instead of a modulation in each block; Flux.2; and models that are built as Flux.1 is."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import SWAPPED, Encoder, Rule, renamed, same, table, within

_ATTENTION = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_FEED_FORWARD = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_LINEAR1 = Rule("linear1", (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)))
_ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_NORM_OUT = Rule("final_layer.adaLN_modulation.1", (("norm_out.linear", 1),), SWAPPED)
_SHARED = (
    *renamed(_ENDS),
    *within("double_blocks.{}.", "transformer_blocks.{}.", renamed({**_ATTENTION, **_FEED_FORWARD})),
    *within(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        (_LINEAR1, *renamed({"linear2": "proj_out", **_SINGLE_NORMS})),
    ),
)


def _embedders(inside: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """Rules of the embedders of the time, the guidance and the pooled text."""
    layers = {"in_layer": "linear_1", "out_layer": "linear_2"}
    return renamed({f"{old}.{a}": f"{inside}.{new}.{b}" for old, new in names.items() for a, b in layers.items()})


_CONDITIONS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
_BLOCK_MODULATIONS = renamed(
    {
        "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
        "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
        "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    }
)
FLUX = table(
    (
        *_SHARED,
        _NORM_OUT,
        *_embedders("time_text_embed", _CONDITIONS | {"vector_in": "text_embedder"}),
        *_BLOCK_MODULATIONS,
    ),
    # T5 is the third to sd-scripts, which numbers as for SD3, and the second to OneTrainer
    {"text_encoder": text.clip("lora_te1_", "clip_l"), "text_encoder_2": text.t5("lora_te3_", "lora_te2_")},
)

CHROMA = table(
    (
        *_SHARED,
        *within(
            "distilled_guidance_layer.",
            "distilled_guidance_layer.",
            renamed(
                {
                    "in_proj": "in_proj",
                    "out_proj": "out_proj",
                    "layers.{}.in_layer": "layers.{}.linear_1",
                    "layers.{}.out_layer": "layers.{}.linear_2",
                    "norms.{}": "norms.{}",
                }
            ),
        ),
    ),
    {"text_encoder": text.t5("lora_te3_")},
)

_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
FLUX2 = table(
    (
        *renamed(_ENDS | {f"{name}.lin": f"{name}.linear" for name in _MODULATIONS}),
        _NORM_OUT,
        *_embedders("time_guidance_embed", _CONDITIONS),
        *within(
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            renamed(
                {
                    **_ATTENTION,
                    "img_mlp.0": "ff.linear_in",
                    "img_mlp.2": "ff.linear_out",
                    "txt_mlp.0": "ff_context.linear_in",
                    "txt_mlp.2": "ff_context.linear_out",
                }
            ),
        ),
        *within(
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            renamed({"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", **_SINGLE_NORMS}),
        ),
    ),
    # Mistral3 (dev) or Qwen3 (klein)
    {"text_encoder": Encoder((*text.inside("model.language_model", text.LLAMA), *text.inside("model", text.QWEN3)))},
)

_TIME = {"time_in": "timestep_embedder"}
_SEES = Encoder(text.inside("model.language_model", text.LLAMA))  # Qwen2.5-VL
# ComfyUI's names of it: the model was published in diffusers'
LONGCAT_IMAGE = table(
    (*_SHARED, _NORM_OUT, *_embedders("time_embed", _TIME), *_BLOCK_MODULATIONS), {"text_encoder": _SEES}, yields=True
)

# The halves of its feed-forwards are two layers in the original and one in diffusers: those have no rule
_GATED = ("ff.net.0.proj", "ff_context.net.0.proj")
_OVIS = (
    *renamed(
        {"img_in": "x_embedder", "semantic_txt_in": "context_embedder", "semantic_txt_norm": "context_embedder_norm"}
    ),
    *renamed({"final_layer.linear": "proj_out"}),
    _NORM_OUT,
    *renamed({"time_in.in_layer": "timestep_embedder.linear_1", "time_in.out_layer": "timestep_embedder.linear_2"}),
    *_BLOCK_MODULATIONS,
    *within(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        renamed({**_ATTENTION, "img_mlp.down_proj": "ff.net.2", "txt_mlp.down_proj": "ff_context.net.2"}),
    ),
    *within(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        (
            Rule("linear1", (*_LINEAR1.parts[:3], ("proj_mlp", 8))),
            *renamed({"linear2": "proj_out", **_SINGLE_NORMS}),
        ),
    ),
)
OVIS_IMAGE = table(
    _OVIS,
    {"text_encoder": Encoder(text.QWEN3)},
    layers=(
        *(name for rule in _OVIS for name, _ in rule.parts),
        *(f"transformer_blocks.{{}}.{layer}" for layer in _GATED),
    ),
    yields=True,
)

# The names of both are diffusers' alone: the models were published in them, and no other program has them
_OWN = tuple(name for rule in (*_SHARED, _NORM_OUT, *_BLOCK_MODULATIONS) for name, _ in rule.parts)
_EMBEDDER = tuple(f"time_embed.timestep_embedder.linear_{n}" for n in (1, 2))
BRIA = table(same(*_OWN, *_EMBEDDER), {"text_encoder": text.t5()}, yields=True)
BRIA_FIBO = table(
    same(*_OWN, *_EMBEDDER, "caption_projection.{}.linear"),
    {"text_encoder": Encoder(text.inside("model", text.LLAMA))},  # SmolLM3
    yields=True,
)
