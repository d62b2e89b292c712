"""Wan 2.1 and 2.2, with the image layers of I2V, the extra blocks of VACE and the faces of Animate; Wan 2.2 has two denoisers of one shape. And what is
made of it: ChronoEdit, SkyReels-V2, Helios and Wan Animate 2.
"""

from diffpeft.converters.families import text
from diffpeft.converters.families.base import renamed, same, table, within

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = renamed(
    {
        **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
        **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",  # diffusers counts in order of use; the other two have no weights
    }
)
_IMAGE = renamed(
    {
        "cross_attn.k_img": "attn2.add_k_proj",
        "cross_attn.v_img": "attn2.add_v_proj",
        "cross_attn.norm_k_img": "attn2.norm_added_k",
    }
)
_CONDITION = renamed(
    {
        "time_embedding.0": "time_embedder.linear_1",
        "time_embedding.2": "time_embedder.linear_2",
        "time_projection.1": "time_proj",
        "text_embedding.0": "text_embedder.linear_1",
        "text_embedding.2": "text_embedder.linear_2",
        "img_emb.proj.0": "image_embedder.norm1",
        "img_emb.proj.1": "image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "image_embedder.ff.net.2",
        "img_emb.proj.4": "image_embedder.norm2",
    }
)
_FACE = renamed(  # of Wan Animate
    {
        "linear1_q": "to_q",
        "linear1_kv": ("to_k", "to_v"),
        "linear2": "to_out",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    }
)
_TEXT_TO_VIDEO = (
    *same("patch_embedding"),
    *renamed({"head.head": "proj_out"}),
    *within("", "condition_embedder.", _CONDITION),
    *within("blocks.{}.", "blocks.{}.", (*_BLOCK, *_IMAGE)),
)
_RULES = (
    *_TEXT_TO_VIDEO,
    *same("vace_patch_embedding", "pose_patch_embedding", "face_encoder.out_proj"),
    *within(
        "vace_blocks.{}.",
        "vace_blocks.{}.",
        (*_BLOCK, *_IMAGE, *renamed({"before_proj": "proj_in", "after_proj": "proj_out"})),
    ),
    *renamed({f"face_encoder.{layer}.conv": f"face_encoder.{layer}" for layer in ("conv1_local", "conv2", "conv3")}),
    *within("face_adapter.fuser_blocks.{}.", "face_adapter.{}.", _FACE),
)
_ENCODERS = {"text_encoder": text.t5(name="umt5xxl")}
WAN = table(_RULES, _ENCODERS, denoisers=("transformer", "transformer_2"))
CHRONO_EDIT = table(_TEXT_TO_VIDEO, _ENCODERS, yields=True)
SKYREELS_V2 = table(
    (
        *_TEXT_TO_VIDEO,
        *renamed({"fps_projection.0": "fps_projection.net.0.proj", "fps_projection.2": "fps_projection.net.2"}),
    ),
    _ENCODERS,
    yields=True,
)

# Helios has Wan's layers under diffusers' names, those of conditions and feed-forwards aside
HELIOS = table(
    (
        *same("proj_out", *(f"patch_{name}" for name in ("embedding", "short", "mid", "long"))),
        *within("", "condition_embedder.", (rule for rule in _CONDITION if "img" not in rule.original)),
        *within(
            "blocks.{}.",
            "blocks.{}.",
            (
                *same("norm2", *(f"attn{n}.{layer}" for n in (1, 2) for layer in _ATTENTION.values())),
                *renamed({"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}),
            ),
        ),
    ),
    _ENCODERS,
    yields=True,
)

# Wan Animate 2 in diffusers has the original's names but for attentions; in the original each block is in another
_ATTENTION_2 = {**_ATTENTION, "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
WAN_ANIMATE2 = table(
    (
        *same("patch_embedding", "head.head", *(rule.original for rule in _CONDITION)),
        *within(
            "blocks.{}.block.",
            "blocks.{}.",
            (
                *same("norm3", "ffn.0", "ffn.2"),
                *renamed({f"self_attn.{old}": f"self_attn.{new}" for old, new in _ATTENTION.items()}),
                *renamed({f"cross_attn.{old}": f"cross_attn.{new}" for old, new in _ATTENTION_2.items()}),
            ),
        ),
    ),
    _ENCODERS,
)
