"""ACE-Step 1.5, for music. In ComfyUI its layers are in a `decoder`."""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import renamed, same, table, within

_ATTENTION = {**{f"{p}_proj": f"to_{p}" for p in "qkv"}, "o_proj": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
_TIMES = ("time_embed", "time_embed_r")
_RULES = (
    *renamed({"proj_in.1": "proj_in_conv", "proj_out.1": "proj_out_conv"}),
    *same(
        "condition_embedder",
        "norm_out",
        *(f"{time}.{layer}" for time in _TIMES for layer in ("linear_1", "linear_2", "time_proj")),
        *(f"layers.{{}}.{layer}_norm" for layer in ("self_attn", "cross_attn", "mlp")),
        *(f"layers.{{}}.mlp.{layer}_proj" for layer in ("gate", "up", "down")),
    ),
    *(
        rule
        for kind in ("self_attn", "cross_attn")
        for rule in within(f"layers.{{}}.{kind}.", f"layers.{{}}.{kind}.", renamed(_ATTENTION))
    ),
)
_DECODER = within("decoder.", "", _RULES)
_ENCODERS = {"text_encoder": text.language(text.QWEN3, name="qwen3_06b")}
ACE_STEP, ACE_STEP_COMFYUI = (
    table((*written, *read), _ENCODERS) for written, read in ((_RULES, _DECODER), (_DECODER, _RULES))
)
