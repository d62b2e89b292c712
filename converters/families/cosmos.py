"""Cosmos 1 and Predict 2, and Anima, which is a Cosmos Predict 2 with a text conditioner before it (`llm_adapter` in the original)."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Encoder, Rule, renamed, same, table, within

_ATTENTION = {
    **{f"{p}_proj": f"to_{p}" for p in "qkv"},
    "output_proj": "to_out.0",
    **{f"{p}_norm": f"norm_{p}" for p in "qk"},
}
_MODULATED = ("self_attn", "cross_attn", "mlp")  # in order of diffusers' norms
_BLOCK = renamed(
    {
        **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
        **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
        "mlp.layer1": "ff.net.0.proj",
        "mlp.layer2": "ff.net.2",
        **{f"cross_attn.{p}_img": f"attn2.{p}_img" for p in "qkv"},  # of Cosmos 2.5, as the next
        **{f"cross_attn.{p}_img_norm": f"attn2.{p}_img_norm" for p in "qk"},
        **{f"adaln_modulation_{p}.{k}": f"norm{n}.linear_{k}" for n, p in enumerate(_MODULATED, 1) for k in (1, 2)},
    }
)
_ENDS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_PREDICT2 = (
    *renamed(_ENDS | {"t_embedding_norm": "time_embed.norm"}),
    *same("crossattn_proj.0", "img_context_proj.0"),
    *renamed({f"final_layer.adaln_modulation.{n}": f"norm_out.linear_{n}" for n in (1, 2)}),
    *within("blocks.{}.", "transformer_blocks.{}.", _BLOCK),
)


def _first(number: int, layers: dict[str, str]) -> tuple[Rule, ...]:
    """Rules of one of the three parts of a block of Cosmos 1, each with a modulation of its own."""
    modulation = {f"adaLN_modulation.{n}": f"norm{number + 1}.linear_{n}" for n in (1, 2)}
    return within(
        f"blocks.{number}.", "", renamed({**{f"block.{old}": new for old, new in layers.items()}, **modulation})
    )


def _first_attention(name: str) -> dict[str, str]:
    layers = {f"to_{p}.0": f"to_{p}" for p in "qkv"} | {"to_out.0": "to_out.0", "to_q.1": "norm_q", "to_k.1": "norm_k"}
    return {f"attn.{old}": f"{name}.{new}" for old, new in layers.items()}


# The names of Cosmos 1, which nobody writes adapters in any more
_COSMOS1 = (
    *renamed({"affline_norm": "time_embed.norm"}),
    *renamed({f"final_layer.adaLN_modulation.{n}": f"norm_out.linear_{n}" for n in (1, 2)}),
    *within(
        "blocks.block{}.",
        "transformer_blocks.{}.",
        (
            *_first(0, _first_attention("attn1")),
            *_first(1, _first_attention("attn2")),
            *_first(2, {"layer1": "ff.net.0.proj", "layer2": "ff.net.2"}),
        ),
    ),
)
_CONDITIONER = (
    *("in_proj", "out_proj", "norm"),
    *(f"blocks.{{}}.norm_{part}" for part in _MODULATED),
    *(f"blocks.{{}}.mlp.{n}" for n in (0, 2)),
    *(f"blocks.{{}}.{part}.{layer}_proj" for part in ("self_attn", "cross_attn") for layer in "qkvo"),
    *(f"blocks.{{}}.{part}.{layer}_norm" for part in ("self_attn", "cross_attn") for layer in "qk"),
)
COSMOS = table(
    (*_PREDICT2, *_COSMOS1),
    {
        # Anima's, and the T5 of Cosmos, which has no flat names
        "text_encoder": Encoder((*text.QWEN3, *text.T5), ("lora_te_",), "text_encoders.qwen3_06b.transformer.model."),
        "text_conditioner": Encoder(_CONDITIONER, ("lora_unet_llm_adapter_",), "diffusion_model.llm_adapter."),
    },
    yields=True,
)
