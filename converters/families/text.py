"""Text encoders, in transformers' names: CLIP (with the level `text_model.` that files have), T5, and the language models Gemma, Llama, Qwen."""

from converters.families.base import Encoder

CLIP = (
    *(
        f"text_model.encoder.layers.{{}}.{layer}"
        for layer in (*(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2")
    ),
    "text_projection",
)
T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{layer}" for layer in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{layer}" for layer in ("wi_0", "wi_1", "wo")),
)
DECODER = (
    *(f"layers.{{}}.self_attn.{layer}_proj" for layer in "qkvo"),
    *(f"layers.{{}}.mlp.{layer}_proj" for layer in ("gate", "up", "down")),
)
CAUSAL = tuple(f"model.{layer}" for layer in DECODER)  # as Qwen3ForCausalLM has them
MULTIMODAL = tuple(f"model.language_model.{layer}" for layer in DECODER)  # as Qwen2.5-VL, Mistral3 and Gemma3 have them


def clip(kohya: str, name: str) -> Encoder:
    """A CLIP: what its flat names start with, and ComfyUI's name for it."""
    return Encoder(CLIP, (kohya,), f"text_encoders.{name}.transformer.")


def t5(*kohya: str, name: str = "t5xxl") -> Encoder:
    """As `clip`, for a T5."""
    return Encoder(T5, kohya, f"text_encoders.{name}.transformer.")


def decoder(*kohya: str, name: str) -> Encoder:
    """As `clip`, for a language model without its head. ComfyUI has a level `model.` more."""
    return Encoder(DECODER, kohya, f"text_encoders.{name}.transformer.model.")
