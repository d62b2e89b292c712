"""PEFT's tables: the config, the tuner and the model class of each method and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffpeft.errors import UnknownNameError
from diffpeft.llm.config import PeftConfig as PeftConfig
from diffpeft.llm.peft_model import MODELS
from diffpeft.llm.peft_model import get_peft_model as get_peft_model
from diffpeft.llm.peft_model import inject_adapter_in_model as inject_adapter_in_model
from diffpeft.llm.prompts import PROMPTS
from diffpeft.llm.tuners import TUNERS
from diffpeft.methods.peft_config import PeftType

MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {str(task): model for task, model in MODELS.items()}
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = {PeftType(kind): c for kind, c in PeftConfig.types.items()}
PEFT_TYPE_TO_TUNER_MAPPING = dict[str, type[nn.Module]](TUNERS) | PROMPTS
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = dict(TUNERS)  # any of them may stand beside each other
PEFT_TYPE_TO_PREFIX_MAPPING = {kind: tuner.prefix for kind, tuner in TUNERS.items()} | {
    kind: f"{kind.value.lower()}_" for kind in PROMPTS
}


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """A config from its fields, of the class that `peft_type` names. Raises KeyError without one, UnknownNameError for one that is not known."""
    kind = config_dict["peft_type"]
    UnknownNameError.check("peft_type", kind, PEFT_TYPE_TO_CONFIG_MAPPING)
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**config_dict)
