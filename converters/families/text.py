"""Text encoders, in transformers' names: CLIP (with the level `text_model.` that files have), T5, and the language models Gemma, Llama, Qwen."""

from collections.abc import Sequence

from diffpeft.converters.families.base import Encoder

_CLIP_LAYER = (*(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2")
CLIP = (
    *(f"text_model.encoder.layers.{{}}.{layer}" for layer in (*_CLIP_LAYER, "layer_norm1", "layer_norm2")),
    "text_model.final_layer_norm",
    "text_projection",
)
T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{layer}" for layer in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{layer}" for layer in ("wi_0", "wi_1", "wo")),
    *(f"encoder.block.{{}}.layer.{n}.layer_norm" for n in (0, 1)),
    "encoder.final_layer_norm",
)


def inside(level: str, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers a level down: `model` in language models with a head, `model.language_model` in those that see."""
    return tuple(f"{level}.{layer}" for layer in layers)


LLAMA = (  # and Qwen2.5 and Mistral
    *(f"layers.{{}}.self_attn.{layer}_proj" for layer in "qkvo"),
    *(f"layers.{{}}.mlp.{layer}_proj" for layer in ("gate", "up", "down")),
    *(f"layers.{{}}.{layer}_layernorm" for layer in ("input", "post_attention")),
    "norm",
)
GLM = (
    *(name for name in LLAMA if ".mlp." not in name),
    *(f"layers.{{}}.mlp.{layer}_proj" for layer in ("gate_up", "down")),
)
_QK_NORM = tuple(f"layers.{{}}.self_attn.{layer}_norm" for layer in "qk")
QWEN3 = (*LLAMA, *_QK_NORM)
GEMMA2 = (*LLAMA, *(f"layers.{{}}.{layer}_feedforward_layernorm" for layer in ("pre", "post")))
GEMMA3 = (*GEMMA2, *_QK_NORM)


def clip(kohya: str, name: str, *, projection: bool = False) -> Encoder:
    """A CLIP: what its flat names start with, and ComfyUI's name for it; `projection`: it is a CLIPTextModelWithProjection."""
    return Encoder(CLIP, (kohya,), f"text_encoders.{name}.transformer.", projection)


def t5(*kohya: str, name: str = "t5xxl") -> Encoder:
    """As `clip`, for a T5."""
    return Encoder(T5, kohya, f"text_encoders.{name}.transformer.")


def language(layers: Sequence[str], *kohya: str, name: str) -> Encoder:
    """As `clip`, for a language model without its head. ComfyUI has a level `model.` more."""
    return Encoder(layers, kohya, f"text_encoders.{name}.transformer.model.")
