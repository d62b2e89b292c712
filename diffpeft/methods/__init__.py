"""The adapter methods: mathematics only. One file a method, one line here."""

from diffpeft.methods.adalora import AdaLora, AdaLoraConfig
from diffpeft.methods.base import Additive, Fresh, Geometry, Link, Method, Operation, Site, Spec, Strength
from diffpeft.methods.boft import Boft, BOFTConfig
from diffpeft.methods.dora import Dora
from diffpeft.methods.full import Full
from diffpeft.methods.glora import GLoRA
from diffpeft.methods.ia3 import IA3, IA3Config
from diffpeft.methods.loha import LoHa, LoHaConfig
from diffpeft.methods.lokr import LoKr, LoKrConfig
from diffpeft.methods.lora import Lora, LoraConfig
from diffpeft.methods.norm import Norm
from diffpeft.methods.oft import Oft, OFTConfig

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "dora": Dora,
    "adalora": AdaLora,
    "loha": LoHa,
    "lokr": LoKr,
    "oft": Oft,
    "boft": Boft,
    "ia3": IA3,
    "glora": GLoRA,
    "full": Full,
    "norm": Norm,
}

__all__ = [
    "AdaLora",
    "AdaLoraConfig",
    "Additive",
    "BOFTConfig",
    "Boft",
    "Dora",
    "Fresh",
    "Full",
    "GLoRA",
    "Geometry",
    "IA3",
    "IA3Config",
    "Link",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "Lora",
    "LoraConfig",
    "METHODS",
    "Method",
    "Norm",
    "OFTConfig",
    "Oft",
    "Operation",
    "Site",
    "Spec",
    "Strength",
]
