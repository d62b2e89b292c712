"""The factors of LoRAs in a model, as pairs of parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diffpeft.layers.parameters import ParameterFactors
from diffpeft.layers.slot import Slot


@dataclass(frozen=True)
class Pair:
    """A LoRA's A [r, in, ...] and B [out, r, ...] on one layer, of an embedding A [r, number] and B [dim, r], and its alpha / r."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    lookup: bool = False  # of an embedding


def pairs_of(model: nn.Module) -> list[Pair]:
    """The pairs in a model."""
    pairs = []
    for module in model.modules():
        if isinstance(module, ParameterFactors):
            pairs.append(Pair(module.lora_A.weight, module.lora_B.weight, module.scale))
        elif isinstance(module, Slot):
            held = dict(module.named_parameters(recurse=False))
            for lookup, (a, b) in enumerate((("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))):
                if a in held and b in held:
                    pairs.append(Pair(held[a], held[b], module.scale, bool(lookup)))
    return pairs
