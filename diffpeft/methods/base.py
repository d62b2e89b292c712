"""What a method is: one definition on a weight, W' = f(W; p), and optional faster ways to the same numbers.

W is canonical whatever the layer: [out, in / groups, *kernel]; a lookup (an embedding) is [features, number of rows].
A method knows no layer: it sees a Geometry, and works through what a layer lends it (`Operation`) and what came before it (`Link`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffpeft.methods.fit import LayerShape, fitted, misfit
from diffpeft.methods.forms import Factors, Form, Stage
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.shapes import block

Tensors = Mapping[str, Tensor]
Strength = float | Tensor  # a number, or a tensor of one number in compiled code
Alpha = Tensor | float | None  # as a file has it


class Shaped(Protocol):
    """What has a shape: a tensor, or one that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""


@dataclass(frozen=True)
class Geometry:
    """The layer as a method sees it: features or channels, the kernel (empty for a linear layer), groups, and whether it looks rows up (an embedding)."""

    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    lookup: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the canonical weight."""
        return (self.out, self.in_ // self.groups, *self.kernel)

    @property
    def layer(self) -> LayerShape:
        """What of it decides which tensors fit."""
        return LayerShape(self.shape, self.lookup, self.groups)

    @property
    def columns(self) -> int:
        """in / groups * prod(kernel): the width of W seen as a matrix."""
        return math.prod(self.shape[1:])

    @property
    def pointwise(self) -> bool:
        """Whether W x is one matrix product at each position, so that what is done to W's columns can be done to x instead."""
        return not self.lookup and self.groups == 1 and set(self.kernel) <= {1}


@dataclass(frozen=True)
class Spec:
    """One adapter on one layer apart from its tensors: the layer, alpha as a number, and what the config or file chose (plain values)."""

    geometry: Geometry
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fresh:
    """A new adapter for one layer: trainable tensors by role, alpha, options, and frozen tensors by role."""

    tensors: dict[str, Tensor]
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What `init` may ask about a layer: its name, geometry, and (slow: it may have to be dequantised) its weight in fp32 or better."""

    name: str
    geometry: Geometry
    weight: Callable[[], Tensor]
    generator: torch.Generator | None = None


class Operation(Protocol):
    """What a layer lends a method: its own operation with other weights, and its features seen apart from where they lie."""

    @property
    def geometry(self) -> Geometry:
        """The layer's features, kernel and groups."""

    @property
    def faithful(self) -> bool:
        """Whether `op(x, W)` is all that the layer does; else what a method changes is added to the layer's own result."""

    def positions(self, x: Tensor) -> int:
        """At how many positions the operation is done for this input, about: what a cost model needs."""

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        """The layer's operation (stride, padding and all) with another canonical weight, with or without the layer's own bias."""

    def plus(self, y: Tensor, x: Tensor, form: Form, gate: Strength) -> Tensor:
        """y + gate * form x, without building what the form stands for. May write into y. gate: a number, or of Factors also [r]."""

    def blocks(self, t: Tensor, matrices: Tensor) -> Tensor:
        """Each block of features multiplied as a row vector: features [n * b], matrices [n, b, c] -> [n * c]."""

    def stages(self, t: Tensor, sizes: Sequence[int], stages: Sequence[Stage]) -> Tensor:
        """Features, seen as an array of `sizes`, through stages in order."""

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        """Features multiplied by `by` [features]."""

    def rescaled(self, y: Tensor, by: Tensor, bias: bool) -> Tensor:
        """Features multiplied by `by` [features], except that the layer's bias in y stays; exactly y where `by` is 1."""

    def less_bias(self, y: Tensor) -> Tensor:
        """y without the layer's bias."""


class Link(Protocol):
    """What came before a method: the layer with the earlier adapters applied."""

    @property
    def op(self) -> Operation:
        """The layer's operation."""

    @property
    def dtype(self) -> torch.dtype:
        """What activations and weights are computed in."""

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        """W x, with the layer's bias or without."""

    def plus(self, x: Tensor, form: Form, gate: Strength, bias: bool, by: Tensor | None = None) -> Tensor:
        """by * W x + gate * form x and the bias, as one kernel where there is one. by [out]; gate as in `Operation.plus`."""

    def weight(self) -> Tensor:
        """W, canonical, in `dtype`."""

    def squares(self, axis: int) -> Tensor:
        """Sums of squares of W over all axes but `axis`, in fp32 or better, without gradient: [out] or [in / groups]."""


class Method:
    """One adapter method. All members are pure; `p` maps a role, which is PEFT's parameter name, to its tensor.

    A subclass needs `name`, `config`, `roles`, `init` and `weight` (or, of Additive, `delta`); the rest has a default that is right but not fast.
    One that only files hold has no `config` and no `init`.
    """

    name: ClassVar[str]
    config: ClassVar[Any] = None
    roles: ClassVar[tuple[str, ...]]  # every role that can occur; where nothing else is said, those of the layout
    shifts: ClassVar[frozenset[str]] = frozenset()  # roles that change the layer's bias
    constants: ClassVar[frozenset[str]] = frozenset()  # roles that say something and are never trained
    options: ClassVar[frozenset[str]] = frozenset()  # keywords of `attach` that the method takes
    shared: ClassVar[tuple[str, ...]] = ()  # roles of tensors that all layers of an adapter share: those of the layout
    ranked: ClassVar[
        tuple[tuple[str, int], ...]
    ] = ()  # (role, axis) of the tensors that show the rank: those of the layout
    precise: ClassVar[frozenset[str]] = frozenset()  # prepared tensors that stay in fp32 or better

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "roles" not in vars(cls) and vars(cls).get("name") in LAYOUTS:
            cls.roles = LAYOUTS[cls.name].roles
        if vars(cls).get("name") in LAYOUTS:
            cls.shared = tuple(LAYOUTS[cls.name].shared)
            cls.ranked = LAYOUTS[cls.name].ranked

    @classmethod
    def init(cls, config: Any, site: Site, **options: Any) -> Fresh:
        """Fresh fp32 tensors for a layer; W' = W unless the config asks for something else."""
        raise NotImplementedError

    @classmethod
    def bank(cls, layers: Sequence[tuple[Mapping[str, Shaped], Spec]]) -> dict[str, Tensor]:
        """The tensors that the layers of an adapter share, {role: tensor}, made anew for layers (tensors by role, spec). They are frozen."""
        return {}

    @classmethod
    def additive(cls, axes: Mapping[str, int]) -> bool:
        """Whether with these tensors {role: number of axes} W' = W + scale * delta(p), so that it commutes with others of the kind."""
        return False

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        """What about the shapes in `p` does not fit each other or the layer; empty if they fit. Read from the method's layout."""
        if cls.name not in LAYOUTS:
            return ""
        return misfit(
            cls.name, {role: t.shape for role, t in p.items()}, spec.geometry.layer, spec.options.get("side", "")
        )

    @classmethod
    def adopt(cls, p: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
        """`p` reshaped (never changed) to the layer: [r, in, 1, 1] and [r, in] hold the same numbers. Read from the method's layout."""
        if cls.name not in LAYOUTS:
            return p
        twins = LAYOUTS[cls.name].twins
        names = twins if spec.geometry.lookup else {name: role for role, name in twins.items()}
        shapes = fitted(cls.name, {role: t.shape for role, t in p.items()}, spec.geometry.layer)[1]
        return {
            names.get(role, role): t if t.shape == shapes.get(role, t.shape) else t.reshape(shapes[role])
            for role, t in p.items()
        }

    @classmethod
    def stored(cls, p: dict[str, Tensor], alpha: Alpha) -> tuple[dict[str, Tensor], Alpha]:
        """The tensors and alpha that a file should hold: those in use, unless some of them mean nothing to other programs."""
        return p, alpha

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        """The rank that the shapes in `p` show; for a rotation the size of its blocks."""
        for role, axis in cls.ranked:
            if role in p:
                return int(p[role].shape[axis])
        if cls.name not in LAYOUTS:
            return min(int(t.shape[0]) for t in p.values())
        return block({role: tuple(t.shape) for role, t in p.items()})

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        """The definition: f(W) at strength 1, in the shape of W. `p` is prepared."""
        raise NotImplementedError

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        """What the adapter adds to the bias `b` (None: there is none) at strength 1, if anything."""
        return None

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """What can be computed from the tensors alone, in their precision (a rotation from its generator). Kept for frozen adapters."""
        return dict(p)

    @classmethod
    def ahead(cls, before: Link, p: Tensors, spec: Spec) -> dict[str, Tensor]:
        """What `apply` would work out of the weight before it and `p` in any case, without gradient: it takes it from `p` where it is among that."""
        return {}

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x with W(s) = W + s (f(W) - W), and the layer's bias if `bias`. `p` is prepared."""
        W = before.weight()
        change = s * (cls.weight(W, p, spec) - W)
        if not before.op.faithful:
            return before(x, bias) + before.op.op(x, change, False)
        return before.op.op(x, W + change, bias)


class Additive(Method):
    """A method with W' = W + scale * delta(p), whatever W is."""

    thin: ClassVar[bool] = False  # whether its tensors are `factors`, so that those are the cheapest way to delta too

    @classmethod
    def additive(cls, axes: Mapping[str, int]) -> bool:
        return True

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """The factor in front of the update: alpha / rank; 1 without an alpha."""
        return 1.0 if spec.alpha is None else spec.alpha / cls.rank(p)

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        """The update without its scale, in the shape of W: B A, unless a method says otherwise."""
        factors = cls.factors(p, spec)
        assert factors is not None
        return (factors.B.flatten(1) @ factors.A.flatten(1)).reshape(spec.geometry.shape)

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        return W + cls.scale(p, spec) * cls.delta(p, spec)

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors | None:
        """A and B with delta = B A exactly, if there is such a form."""
        return None

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Form | None:
        """The form in which delta is cheapest to apply at so many positions; None where it is best built."""
        return None
