"""Slot: one adapter on one layer, a leaf module that owns its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.methods import METHODS, Op


class Slot(nn.Module):
    """The tensors of one adapter on one layer, as parameters named by their roles, in the dtype they are stored in.

    `alpha` is kept as stored (a tensor, a number, or None); the scale follows from it.
    """

    def __init__(
        self,
        method: str,
        tensors: Mapping[str, Tensor],
        alpha: Handle | float | None,
        *,
        dropout: float = 0.0,
        trainable: bool,
    ):
        super().__init__()
        self.method, self.alpha, self.dropout = method, alpha, dropout
        for role, tensor in tensors.items():
            self.register_parameter(role, nn.Parameter(tensor, requires_grad=trainable))
        self.scale = METHODS[method].scale(io.number(alpha), self.rank)

    @property
    def weight(self) -> Tensor:
        """The first parameter: sharding policies look for this name."""
        return next(self.parameters())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role."""
        return {role: p for role, p in self._parameters.items() if p is not None}

    @property
    def rank(self) -> int:
        """The adapter's rank on this layer."""
        return METHODS[self.method].rank(self.tensors)

    def forward(self, op: Op, x: Tensor, y: Tensor, strength: float | Tensor) -> Tensor:
        """The layer's output `y` for input `x`, with this adapter added."""
        gate = strength * self.scale
        if isinstance(gate, Tensor):
            gate = gate.to(x.dtype)
        p = self.tensors
        if not torch.is_autocast_enabled(x.device.type):
            p = {role: t.to(x.dtype) for role, t in p.items()}
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        return METHODS[self.method].apply(op, p, x, y, gate)

    def extra_repr(self) -> str:
        return f"{self.method}, rank={self.rank}, scale={self.scale:g}"
