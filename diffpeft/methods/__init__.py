"""The adapter methods: mathematics only. One file a method, one line here."""

from diffpeft.methods.base import Additive, Fresh, Geometry, Link, Method, Op, Site, Spec, Strength
from diffpeft.methods.boft import Boft, BOFTConfig
from diffpeft.methods.dora import Dora
from diffpeft.methods.loha import LoHa, LoHaConfig
from diffpeft.methods.lokr import LoKr, LoKrConfig
from diffpeft.methods.lora import Lora, LoraConfig
from diffpeft.methods.oft import Oft, OFTConfig

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "dora": Dora,
    "loha": LoHa,
    "lokr": LoKr,
    "oft": Oft,
    "boft": Boft,
}

__all__ = [
    "Additive",
    "BOFTConfig",
    "Boft",
    "Dora",
    "Fresh",
    "Geometry",
    "Link",
    "LoHa",
    "LoHaConfig",
    "LoKr",
    "LoKrConfig",
    "Lora",
    "LoraConfig",
    "METHODS",
    "Method",
    "OFTConfig",
    "Oft",
    "Op",
    "Site",
    "Spec",
    "Strength",
]
