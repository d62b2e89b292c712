"""PEFT's constants: the names of files, and the layers that a type of model is adapted on by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffpeft.converters.formats.peft import FILE, WEIGHTS
from diffpeft.llm.targets import (
    ADALORA_TARGETS,
    ALL_LINEAR,
    HEADS,
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    LORA_TARGETS,
    VERA_TARGETS,
)

CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, INCLUDE_LINEAR_LAYERS_SHORTHAND = FILE, WEIGHTS, ALL_LINEAR
WEIGHTS_NAME = "adapter_model.bin"  # a pickle, which is refused
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SEQ_CLS_HEAD_NAMES = list(HEADS)
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(name for name in dir(torch) if name.startswith("float8_e") and "x" not in name)

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = ADALORA_TARGETS
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = IA3_TARGETS
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = IA3_FEEDFORWARD
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = VERA_TARGETS
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = LORA_TARGETS

# {type of model: how it wants a prefix}: none of the models of transformers 5 wants another than the usual
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable[..., object]] = {}


def bloom_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """A prefix, [layers, b, heads, n, dim] of keys and then of values in pieces, as BLOOM's cache once was: [b heads, dim, n] and [b heads, n, dim]."""
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, b, heads, n, dim = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, b * heads, dim, n)  # PEFT's order, in which dim and n are not turned
    return tuple(zip(keys, values.reshape(layers, b * heads, n, dim), strict=True))
