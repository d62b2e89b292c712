"""What PEFT has in `peft.utils.other`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError
from diffpeft.layers.kinds import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from diffpeft.llm.distributed import fsdp_auto_wrap_policy
from diffpeft.llm.kbit import prepare_model_for_kbit_training
from diffpeft.utils.constants import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)

__all__ = [
    "AuxiliaryTrainingWrapper",
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "ModulesToSaveWrapper",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "TrainableTokensWrapper",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "get_quantization_config",
    "id_tensor_storage",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]


def infer_device() -> str:
    """The kind of device that this machine computes on: its accelerator, otherwise the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight [a, b] as [b, a] where `fan_in_fan_out`, a parameter as a parameter; otherwise as it is."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """What a decoder reads to predict `input_ids` [b, n]: the start, then all but the last; -100 becomes padding. Raises ConfigError without one."""
    if pad_token_id is None:
        raise ConfigError("self.model.config.pad_token_id has to be defined.", remedy="Set pad_token_id.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """For mixed precision: frozen parameters in `dtype`, those that are trained in float32."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def get_quantization_config(model: nn.Module, method: str) -> object:
    """The config of the method by which transformers has quantised a model; None if it is not quantised by this one."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name in the parent) of a dotted name: diffusers asks for it."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tensors with the same memory have in common: the device, the address and the size of it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
