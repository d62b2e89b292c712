"""LoRA on parameters themselves (PEFT's `target_parameters`): for what no layer kind knows, such as the experts of a mixture in one tensor.

For each expert e: dW_e = (alpha / r) B_e A_e (Hu et al. 2021, arXiv:2106.09685), with the experts' factors in one tensor each, as PEFT has them:
A [experts * r, in] goes expert by expert, B [out, r * experts] rank by rank. A parameter of two axes is one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diffpeft.layers.chain import Chained
from diffpeft.layers.patches import Patch


@dataclass(frozen=True)
class Stack:
    """A parameter seen as matrices: [out, in], [experts, out, in], or where `turned` [experts, in, out]."""

    name: str
    experts: int
    out: int
    in_: int
    turned: bool = False

    @classmethod
    def of(cls, module: nn.Module, name: str, shape: torch.Size | None = None) -> Stack | None:
        """How to see a module's parameter, of this shape if it is parametrised; None if it has another number of axes."""
        shape = cast(Tensor, module._parameters[name]).shape if shape is None else shape
        if len(shape) not in (2, 3):
            return None
        turned = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
        o, i = reversed(shape[-2:]) if turned else shape[-2:]
        return cls(name, shape[0] if len(shape) == 3 else 1, o, i, turned)


class _Matrix(nn.Module):
    """A tensor called `weight`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class ParameterFactors(Patch):
    """The factors of one or several parameters of a module. Those of the last are its own; those of the others lie inside, as PEFT's wrappers do.

    Args:
        stacks: the parameters, in the order in which the module has them.
        tensors: {name: (A [experts * r, in], B [out, r * experts])}.
        scales: {name: alpha / r}.
    """

    commutes = True
    base_layer: ParameterFactors

    def __init__(self, stacks: tuple[Stack, ...], tensors: dict[str, tuple[Tensor, Tensor]], scales: dict[str, float]):
        super().__init__()
        *inner, self.stack = stacks
        self.scale = scales[self.stack.name]
        self.names = tuple(stack.name for stack in stacks)
        if inner:
            self.base_layer = ParameterFactors(tuple(inner), tensors, scales)
        self.lora_A, self.lora_B = map(_Matrix, tensors[self.stack.name])

    def stack_of(self, name: str) -> Stack:
        """How a parameter is seen."""
        return self.stack if name == self.stack.name else self.base_layer.stack_of(name)

    def place_of(self, name: str) -> str:
        """What is before the names of a parameter's factors: a level for each parameter that lies outside."""
        return "" if name == self.stack.name else f"base_layer.{self.base_layer.place_of(name)}"

    def changed(self, name: str, W: Tensor, s: float) -> Tensor:
        if name != self.stack.name:
            return self.base_layer.changed(name, W, s)
        left, right = self._factors(W.dtype)
        with torch.autocast(W.device.type, enabled=False):  # a parameter keeps its dtype
            return torch.baddbmm(W if W.dim() == 3 else W[None], left, right, alpha=s * self.scale).view(W.shape)

    def after(self, before: Chained, x: Tensor, s: float, bias: bool) -> Tensor:
        y, op = before(x, bias), before.op
        left, right = self._factors(before.dtype)
        change = op.canonical(self.scale * (left @ right)[0])
        return y + s * op.op(x, change, False)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two matrices for each expert whose product is the change: [experts, out, r] and [experts, r, in], or turned."""
        A, B = (t.weight.to(dtype) for t in (self.lora_A, self.lora_B))
        A = A.unflatten(0, (self.stack.experts, -1))
        B = B.unflatten(1, (-1, self.stack.experts)).permute(2, 0, 1)
        return (A.mT, B.mT) if self.stack.turned else (B, A)
