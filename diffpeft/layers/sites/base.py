"""A layer seen as one linear operation, with its weight in canonical form: [out, in / groups, *kernel]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpeft.layers import kernels
from diffpeft.layers.backends import Kind, backend_of
from diffpeft.methods import Geometry, Strength
from diffpeft.methods.forms import Factors, Form, Kronecker, Pointwise, Stage
from diffpeft.methods.linalg import added


class LayerSite:
    """What layers and models need of a layer; with what it lends methods (`methods.Operation`).

    A kind of layer is a subclass. Where `targets` is False it is a norm: it is changed through its weight and bias alone, and lends `op` only.

    Args:
        module: the layer, adapted or not.
        arguments, keywords: those of its forward beside the input.
    """

    kinds: ClassVar[tuple[type[nn.Module] | Kind, ...]]
    endings: ClassVar[tuple[str, ...]] = ()  # of the names of further classes
    targets: ClassVar[bool] = True  # whether `attach` may choose it
    in_order: ClassVar[bool] = False  # whether the layer stores its weight as the canonical one is, output by output
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    along: ClassVar[tuple[str, ...]] = ()  # layers inside that are adapted where this one is

    def __init__(self, module: Any, *arguments: object, **keywords: object):
        self.module, self.arguments, self.keywords = module, arguments, keywords
        self.geometry = self.geometry_of(module)
        self.backend = backend_of(module)
        # else the layer is quantised, or a subclass with a forward of its own: that must run, and its result may be needed for backward
        self.faithful = self.backend is None and self._runs_as_its_kind()

    def _runs_as_its_kind(self) -> bool:
        base: type[nn.Module] = getattr(type(self.module), "_diffpeft_base", type(self.module))
        name = (base.__module__, base.__name__)
        return any(kind == name if isinstance(kind, tuple) else base.forward is kind.forward for kind in self.kinds)

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        """The geometry of a layer of this kind."""
        raise NotImplementedError

    @staticmethod
    def unfit(module: nn.Module) -> str:
        """Why a layer of this kind cannot be adapted as it is made; empty if it can."""
        return ""

    @property
    def parameter(self) -> Tensor:
        """The layer's own weight, as it stores it."""
        weight: Tensor = getattr(self.module, self.weight_name)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        bias: Tensor | None = getattr(self.module, self.bias_name, None)
        return bias

    def forward(self, base: type[nn.Module], x: Tensor) -> Tensor:
        """The layer without adapters, as its class `base` computes it; with a gradient for x also where its quantised product has none."""
        backend = self.backend
        if backend is None or not x.requires_grad or not torch.is_grad_enabled() or backend.differentiable(self.module):
            return base.forward(self.module, x, *self.arguments, **self.keywords)  # type: ignore[no-any-return]
        return kernels.quantised_linear(x, lambda x: base.forward(self.module, x), self.weight)

    def weight(self) -> Tensor:
        """The layer's weight seen as [out, in / groups, *kernel]; for quantised layers a copy."""
        return self.canonical(self.parameter if self.backend is None else self.backend.dequantised(self.module))

    def canonical(self, weight: Tensor) -> Tensor:
        """A weight in the layer's own order as [out, in / groups, *kernel]: the inverse of `stored`."""
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layer's own order: the inverse of `canonical`."""
        return weight

    @property
    def takes_branches(self) -> bool:
        """Whether PEFT's LoRA of this layer is a branch beside it (`forms.Branch`)."""
        return False

    def has_batch(self, x: Tensor) -> bool:
        """Whether the first axis of an input counts rows of a batch."""
        g = self.geometry
        return x.dim() == len(g.kernel) + 2 if g.kernel else x.dim() > (not g.lookup)

    def positions(self, x: Tensor) -> int:
        """At how many positions the operation is done for this input, about."""
        raise NotImplementedError

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        """The layer's operation with another canonical weight, with or without the layer's own bias."""
        raise NotImplementedError

    def fused(self, x: Tensor, form: Form, gate: Strength, bias: bool, by: Tensor | None = None) -> Tensor | None:
        """by * W x + gate * form x and the bias in one kernel, where there is one."""
        return None

    def plus(self, y: Tensor, x: Tensor, form: Form, gate: Strength) -> Tensor:
        """y + gate * form x. May write into y."""
        if isinstance(form, Factors):
            return self.add(y, self.down(x, form.A), form.B, gate)
        if isinstance(form, Pointwise):
            return added(y, form.of(x), gate)
        assert isinstance(form, Kronecker), "only rows that are looked up are products of two"
        return added(y, self._halves(x, form), gate)

    def _halves(self, x: Tensor, form: Kronecker) -> Tensor:
        """kron(first, second) x, one half after the other: x is c blocks of d features, the result a blocks of b."""
        (a, c), second = sides(form.first), form.second
        if len(second) == 2:
            up, down = second
            h = self._mixed(self.grouped(x, down, c), form.first)
            return self.blocks(h, up.T.expand(a, *up.T.shape))
        if not mixes_first(form):
            return self._mixed(self.grouped(x, second[0], c), form.first)
        h = self._mixed(x, form.first)
        return self.blocks(h, second[0].T.expand(a, *second[0].T.shape))

    def _mixed(self, t: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
        """Blocks of features mixed by a matrix, or by two of which it is the product where that is clearly less work."""
        if len(matrices) == 1:
            return self.mix(t, matrices[0])
        (a, q), c = matrices[0].shape, matrices[1].shape[1]
        return (
            self.mix(self.mix(t, matrices[1]), matrices[0])
            if 2 * q * (a + c) < a * c
            else self.mix(t, matrices[0] @ matrices[1])
        )

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operation with `weight` [r, in / groups, *kernel] and no bias; r features out, once a group."""
        raise NotImplementedError

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: Strength) -> Tensor:
        """y + gate * (the features of h mixed with `weight` [out, r, *1] at each position). May write into y; gate: a number or [r]."""
        raise NotImplementedError

    def grouped(self, x: Tensor, weight: Tensor, n: int) -> Tensor:
        """The operation with `weight` [f, in / n, *kernel] on each of n equal slices of the input features -> features [n * f]."""
        raise NotImplementedError

    def mix(self, t: Tensor, matrix: Tensor) -> Tensor:
        """Whole blocks of features mixed: features [n * f], matrix [m, n] -> [m * f], y[a] = sum_c matrix[a, c] t[c]."""
        raise NotImplementedError

    def blocks(self, t: Tensor, matrices: Tensor) -> Tensor:
        """Each block of features multiplied as a row vector: features [n * b], matrices [n, b, c] -> [n * c]."""
        raise NotImplementedError

    def stages(self, t: Tensor, sizes: Sequence[int], stages: Sequence[Stage]) -> Tensor:
        """Features, seen as an array of `sizes`, through stages in order."""
        raise NotImplementedError

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        """Features multiplied by `by` [features]."""
        raise NotImplementedError

    def gated(self, h: Tensor, by: Tensor) -> Tensor:
        """Features of h multiplied by `by` [b, r], other numbers for each row of a batch."""
        raise NotImplementedError

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        """y + by [features]."""
        raise NotImplementedError

    def rescaled(self, y: Tensor, by: Tensor, bias: bool) -> Tensor:
        """Features multiplied by `by` [features], except that the layer's bias in y stays; exactly y where `by` is 1."""
        raise NotImplementedError

    def less_bias(self, y: Tensor) -> Tensor:
        """y without the layer's bias."""
        raise NotImplementedError

    def _bias(self, like: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(like.dtype)


def sides(product: tuple[Tensor, ...]) -> tuple[int, int]:
    """How many rows and columns a matrix has, or the product of two."""
    return product[0].shape[0], product[-1].shape[1]


def mixes_first(form: Kronecker) -> bool:
    """Whether x is mixed by the first half before it goes through a whole second one: the other order is no less work, and there is no kernel."""
    (a, c), (b, d, *kernel) = sides(form.first), form.second[0].shape
    return not kernel and a * d * (c + b) <= c * b * (d + a)


class FeaturesLast(LayerSite):
    """Features in the last axis."""

    def positions(self, x: Tensor) -> int:
        return x.numel() // self.geometry.in_

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: Strength) -> Tensor:
        """y [*n, out] + gate * h [*n, r] W^T as one product into y."""
        if isinstance(gate, Tensor):
            h, gate = h * gate, 1.0
        return kernels.add(y, h, weight, gate, last=True, into=self.faithful and y.is_contiguous())

    def blocks(self, t: Tensor, matrices: Tensor) -> Tensor:
        return kernels.block_product(t, matrices)

    def mix(self, t: Tensor, matrix: Tensor) -> Tensor:
        m, n = matrix.shape
        return (matrix @ t.reshape(-1, n, t.shape[-1] // n)).reshape(*t.shape[:-1], m * (t.shape[-1] // n))

    def stages(self, t: Tensor, sizes: Sequence[int], stages: Sequence[Stage]) -> Tensor:
        return kernels.stages(t.reshape(-1, t.shape[-1]), sizes, stages, last=True).view(t.shape)

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        return t * by

    def gated(self, h: Tensor, by: Tensor) -> Tensor:
        """h [b, *n, r] times by [b, r]."""
        return h * by.view(len(by), *(1 for _ in h.shape[2:]), -1)

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        return y + by

    def rescaled(self, y: Tensor, by: Tensor, bias: bool) -> Tensor:
        return kernels.rescale(y, by, self._bias(y) if bias else None)

    def less_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y - self.bias.to(y.dtype)
