"""The adapter methods: mathematics only. One file a method, one line here."""

from diffpeft.methods.base import Geometry, Method, Op
from diffpeft.methods.lora import Lora, LoraConfig

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
}

__all__ = ["METHODS", "Geometry", "Lora", "LoraConfig", "Method", "Op"]
