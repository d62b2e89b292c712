"""What PEFT has in `peft.tuners`: configs, tuners, prompt encoders, and the kinds of layers that `isinstance` is asked for."""

from diffpeft.layers.kinds import (
    AdaLoraLayer,
    BOFTLayer,
    HRALayer,
    IA3Layer,
    LoHaLayer,
    LoKrLayer,
    LoraLayer,
    OFTLayer,
    VeraLayer,
)
from diffpeft.llm.conversion import convert_to_lora, save_as_lora
from diffpeft.llm.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from diffpeft.llm.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from diffpeft.llm.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from diffpeft.llm.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from diffpeft.llm.tuners import (
    AdaLoraModel,
    BOFTModel,
    HRAModel,
    IA3Model,
    LoHaModel,
    LoKrModel,
    LoraModel,
    OFTModel,
    VeraModel,
)
from diffpeft.methods.adalora import AdaLoraConfig
from diffpeft.methods.boft import BOFTConfig
from diffpeft.methods.hra import HRAConfig
from diffpeft.methods.ia3 import IA3Config
from diffpeft.methods.loftq import LoftQConfig
from diffpeft.methods.loha import LoHaConfig
from diffpeft.methods.lokr import LoKrConfig
from diffpeft.methods.lora import LoraConfig, LoraRuntimeConfig
from diffpeft.methods.oft import OFTConfig
from diffpeft.methods.vera import VeraConfig

__all__ = [
    "AdaLoraConfig",
    "AdaLoraLayer",
    "AdaLoraModel",
    "BOFTConfig",
    "BOFTLayer",
    "BOFTModel",
    "HRAConfig",
    "HRALayer",
    "HRAModel",
    "IA3Config",
    "IA3Layer",
    "IA3Model",
    "LoHaConfig",
    "LoHaLayer",
    "LoHaModel",
    "LoKrConfig",
    "LoKrLayer",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OFTLayer",
    "OFTModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "VeraConfig",
    "VeraLayer",
    "VeraModel",
    "convert_to_lora",
    "save_as_lora",
]
