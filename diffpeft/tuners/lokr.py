"""What PEFT has in `peft.tuners.lokr`, as far as users and libraries ask for it."""

from diffpeft.layers.kinds import LoKrLayer
from diffpeft.llm.tuners import LoKrModel
from diffpeft.methods.lokr import LoKrConfig, factorization

__all__ = ["LoKrConfig", "LoKrLayer", "LoKrModel", "factorization"]
