"""What PEFT has in `peft.tuners`: configs, tuners, prompt encoders, and the kinds of layers that `isinstance` is asked for."""

from __future__ import annotations

from diffpeft.layers import kinds
from diffpeft.llm import config, tuners
from diffpeft.llm.conversion import convert_to_lora, save_as_lora
from diffpeft.llm.multitask_prompt_tuning import MultitaskPromptEmbedding
from diffpeft.llm.p_tuning import PromptEncoder
from diffpeft.llm.prefix_tuning import PrefixEncoder
from diffpeft.llm.prompt_tuning import PromptEmbedding

_HOMES = {
    **dict.fromkeys(kinds.NAMES, kinds),
    **dict.fromkeys(tuners.NAMES, tuners),
    **{
        name: config
        for name in config.__all__
        if name not in ("PeftConfig", "PeftType", "PromptLearningConfig", "TaskType")
    },
}
__all__ = [
    *_HOMES,
    "MultitaskPromptEmbedding",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoder",
    "convert_to_lora",
    "save_as_lora",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(_HOMES[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
