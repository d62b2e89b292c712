"""Where a model that is trained on lives, and in how many bits: blocks in few bits, some of them on the host, all else on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from diffpeft.layers.packed import packed
from diffpeft.layers.streaming import Carrier, size_in_memory, stream, streamed_parameters
from diffpeft.model.units import repeated


@dataclass(frozen=True)
class Placing:
    """How a frozen model is held.

    Args:
        device: where it computes.
        quantize: a name in PACKINGS; None: as it is.
        offload: the share of its blocks that live on the host.
        carrier: what brings these to the device; default: what is best there.
    """

    device: str
    quantize: str | None = None
    offload: float = 0.0
    carrier: Carrier | None = None

    def __call__(self, model: nn.Module) -> nn.Module:
        """A model, which is on the host, so held. Never is more of it on the device than stays there, and a layer."""
        device = torch.device(self.device)
        if self.quantize:
            quantise(model, self.quantize, device)
        if self.offload:
            stream(model, offloaded(repeated(model), self.offload), device, self.carrier)
            return model
        return model.to(device)


def quantise(model: nn.Module, kind: str, device: torch.device) -> None:
    """Hold the linear layers of a model's blocks in few bits, one layer on the device at a time.

    What is no block stays: it is small, and numbers there matter.
    """
    for layer, parent, name in linears(model):
        setattr(parent, name, packed(layer, kind, device))


def held_at_once(model: nn.Module, offload: float) -> int:
    """The most bytes of a model that are on the device, where a share of its blocks lives on the host: all else, and two blocks that follow each other."""
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if not offload:
        return size
    streamed = streamed_parameters(model, offloaded(repeated(model), offload))
    sizes = [size_in_memory(parameters) for parameters in streamed.values()]
    stays = size - sum(p.numel() * p.element_size() for parameters in streamed.values() for p in parameters)
    return stays + max((sum(pair) for pair in zip(sizes, sizes[1:] + [0], strict=True)), default=0)


def linears(model: nn.Module) -> list[tuple[nn.Linear, nn.Module, str]]:
    """(layer, the module that holds it, its name there) of the plain linear layers in a model's blocks; not those whose weights their holder reads itself."""
    reads = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return [
        (child, parent, name)
        for block in repeated(model).values()
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not isinstance(parent, reads)
    ]


def offloaded(blocks: Mapping[str, nn.Module], share: float) -> dict[str, nn.Module]:
    """A share of the blocks, spread over all of them, so that there is something to compute while the next one is on its way. At least one."""
    number = max(round(share * len(blocks)), min(1, len(blocks)))
    places = {int((i + 0.5) * len(blocks) / number) for i in range(number)}
    return {name: block for i, (name, block) in enumerate(blocks.items()) if i in places}
