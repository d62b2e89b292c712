"""Linear layers: a matrix on the last axis. Quantised ones are linear layers too (backends.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from diffpeft.layers import kernels
from diffpeft.layers.backends import Kind
from diffpeft.layers.sites.base import FeaturesLast, mixes_first
from diffpeft.methods import Geometry, Strength
from diffpeft.methods.forms import Factors, Form, Kronecker
from diffpeft.methods.linalg import traced


class LinearSite(FeaturesLast):
    """nn.Linear and its quantised subclasses: W [out, in]."""

    kinds: ClassVar[tuple[type[nn.Module] | Kind, ...]] = (nn.Linear,)
    in_order = True

    def __init__(self, module: nn.Module, *arguments: object, **keywords: object):
        super().__init__(module, *arguments, **keywords)
        base: type[nn.Module] | None = getattr(type(module), "_diffpeft_base", None)
        # F.linear with a weight that is simply here, and no more: one kernel may do it together with an adapter, where nothing is traced
        self.plain = self.backend is None and base is not None and base.forward is nn.Linear.forward and not traced()

    @staticmethod
    def geometry_of(module: nn.Linear) -> Geometry:
        return Geometry(module.out_features, module.in_features)

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        return F.linear(x, weight, self._bias(x) if bias else None)

    def fused(self, x: Tensor, form: Form, gate: Strength, bias: bool, by: Tensor | None = None) -> Tensor | None:
        if not self.plain:
            return None
        parameters = (
            self.module._parameters
        )  # torch's own way to a parameter is slow, and only for those that are elsewhere
        W, b = parameters.get("weight"), parameters.get("bias")
        if W is None:
            W, b = self.module.weight, self.module.bias
        b = b if bias else None
        if isinstance(form, Factors):
            return kernels.lora_linear(x, W, b, form.A, form.B, gate, by)
        if by is None and isinstance(form, Kronecker) and not isinstance(gate, Tensor) and _fits(form):
            up, *down = form.second
            return kernels.kron_linear(x, W, b, form.first[0], down[0] if down else None, up, gate)
        return None

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def grouped(self, x: Tensor, weight: Tensor, n: int) -> Tensor:
        return F.linear(x.reshape(*x.shape[:-1], n, x.shape[-1] // n), weight).flatten(-2)


def _fits(form: Kronecker) -> bool:
    """Whether `kernels.kron_linear` has the order of its products."""
    return len(form.first) == 1 and (len(form.second) == 2 or mixes_first(form))


class TransposedLinearSite(LinearSite):
    """GPT-2's Conv1D, a linear layer whose weight is stored [in, out]."""

    kinds: ClassVar[tuple[type[nn.Module] | Kind, ...]] = (("transformers.pytorch_utils", "Conv1D"),)
    in_order = False

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        return Geometry(module.nf, module.nx)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t()
