"""What a method is: a definition on a weight, and a fast path on activations that must agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The layer as a method sees it: features or channels, the kernel (empty for a linear layer), and groups. W is [out, in / groups, *kernel]."""

    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def columns(self) -> int:
        """in / groups * prod(kernel): the width of W seen as a matrix."""
        columns = self.in_ // self.groups
        for k in self.kernel:
            columns *= k
        return columns


class Op(Protocol):
    """What a layer lends a method: its own linear operation with other weights."""

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation (stride, padding and all) with `weight` [r, in / groups, *kernel]; r features out, once a group."""

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: float | Tensor) -> Tensor:
        """y + gate x (the features of h mixed with `weight` [out, r, *1] at each position; with groups, each group mixes its own r)."""


class Method(Protocol):
    """One adapter method. All members are pure functions; `p` maps a role, which is PEFT's parameter name, to its tensor."""

    name: str
    config: Any
    roles: tuple[str, ...]

    @staticmethod
    def init(
        config: Any, layer: str, geometry: Geometry, generator: torch.Generator | None
    ) -> tuple[dict[str, Tensor], float | None]:
        """Fresh fp32 tensors for `layer`, and the alpha that belongs to them."""

    @staticmethod
    def check(p: Mapping[str, Any], geometry: Geometry) -> str:
        """What about the shapes in `p` does not fit each other or the layer; empty if they fit."""

    @staticmethod
    def adopt(p: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        """`p` reshaped (never changed) to the layer: [r, in, 1, 1] and [r, in] hold the same numbers."""

    @staticmethod
    def rank(p: Mapping[str, Any]) -> int:
        """The rank that the shapes in `p` show."""

    @staticmethod
    def scale(alpha: float | None, rank: int) -> float:
        """The factor in front of the update; 1 without an alpha."""

    @staticmethod
    def delta(p: Mapping[str, Tensor], scale: float) -> Tensor:
        """The definition: f(W) - W, in the shape of W."""

    @staticmethod
    def apply(op: Op, p: Mapping[str, Tensor], x: Tensor, y: Tensor, gate: float | Tensor) -> Tensor:
        """The fast path: the layer's output `y` for input `x`, with this adapter added; `gate` is scale x strength."""
