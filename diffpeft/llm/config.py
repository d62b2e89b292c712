"""PEFT's configs under one roof, and the way to the Hub for `PeftConfig.from_pretrained`."""

from __future__ import annotations

import inspect
from typing import Any

from diffpeft import methods
from diffpeft.converters.formats.schema import check_fields
from diffpeft.llm.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from diffpeft.llm.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from diffpeft.llm.prefix_tuning import PrefixTuningConfig
from diffpeft.llm.prompt import PromptLearningConfig
from diffpeft.llm.prompt_tuning import PromptTuningConfig, PromptTuningInit
from diffpeft.methods.layout import CONFIGS
from diffpeft.methods.loftq import LoftQConfig
from diffpeft.methods.lora import LoraRuntimeConfig
from diffpeft.methods.peft_config import PeftConfig, PeftType, TaskType
from diffpeft.train.hub import pushed

# the configs of all methods, which are known by their type from here on
globals().update({name: getattr(methods, name) for name in CONFIGS})
__all__ = [
    *CONFIGS,
    "LoftQConfig",
    "LoraRuntimeConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
]


def fetch(repository: str, name: str, subfolder: str | None = None, **options: Any) -> str:
    """A file of a repository on the Hub, downloaded. `options` that hf_hub_download does not have are left out."""
    from huggingface_hub import hf_hub_download

    known = inspect.signature(hf_hub_download).parameters
    return hf_hub_download(repository, name, subfolder=subfolder, **{k: v for k, v in options.items() if k in known})


PeftConfig.fetch = staticmethod(fetch)
PeftConfig.upload = staticmethod(pushed)
PeftConfig.check = staticmethod(check_fields)
