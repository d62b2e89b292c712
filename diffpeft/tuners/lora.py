"""What PEFT has in `peft.tuners.lora`, as far as users and libraries ask for it."""

from diffpeft.layers.kinds import LoraConv2d as Conv2d
from diffpeft.layers.kinds import LoraConv3d as Conv3d
from diffpeft.layers.kinds import LoraEmbedding as Embedding
from diffpeft.layers.kinds import LoraLayer, ParamWrapper
from diffpeft.layers.kinds import LoraLinear as Linear
from diffpeft.llm.conversion import convert_to_lora, save_as_lora
from diffpeft.llm.tuners import LoraModel
from diffpeft.methods.loftq import LoftQConfig
from diffpeft.methods.lora import LoraConfig, LoraRuntimeConfig

__all__ = [
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "ParamWrapper",
    "convert_to_lora",
    "save_as_lora",
]
