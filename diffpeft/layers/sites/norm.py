"""Normalising layers, whose weight is a factor for each feature."""

from __future__ import annotations

from torch import Tensor, nn

from diffpeft.layers.sites.base import LayerSite
from diffpeft.methods import Geometry

_CHANNELS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class NormSite(LayerSite):
    """Normalising layers: W [features, 1] is their factors, whatever their class makes of them. Features are the second axis or the last.

    transformers has a class like T5LayerNorm or Qwen2RMSNorm for every model.
    """

    kinds = (nn.LayerNorm, nn.RMSNorm, *_CHANNELS)
    endings = ("RMSNorm", "T5LayerNorm")
    targets = False

    def __init__(self, module: nn.Module, *arguments: object, **keywords: object):
        super().__init__(module, *arguments, **keywords)
        self.faithful = True  # whatever the class does, `op` does

    @staticmethod
    def geometry_of(module: nn.Module) -> Geometry:
        weight = getattr(module, "weight", None)
        return Geometry(0 if weight is None else weight.numel(), 1)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.module.weight.shape)

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        """The forward of its class on a layer that differs in its weight and nothing else."""
        m = self.module
        base: type[nn.Module] = getattr(type(m), "_diffpeft_base", type(m))
        changed = {"weight": self.stored(weight).to(m.weight.dtype), "bias": self.bias if bias else None}
        other = base.__new__(base)
        other.__dict__.update(m.__dict__, _parameters={**m._parameters, **changed})
        for name in changed:
            other.__dict__.pop(name, None)  # where FSDP 1 puts what it has gathered, and which is found first
        y: Tensor = base.forward(other, x, *self.arguments, **self.keywords)
        return y

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        second = isinstance(self.module, _CHANNELS)
        return y + by.to(y.dtype).view((-1, *(1 for _ in y.shape[2:])) if second else self.module.weight.shape)
