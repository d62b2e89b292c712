"""The adapters of a layer applied in order: W_k = W_{k-1} + s_k (f_k(W_{k-1}) - W_{k-1}).

Each link is the layer with one more adapter on it. A link can be applied to an input and can give its weight; methods choose what is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpeft.layers import kernels
from diffpeft.layers.slot import BIAS, Part, Slot, stamp_of
from diffpeft.methods import Link, Strength
from diffpeft.methods.linalg import squares, traced

# One element of a weight that is copied takes as long as so many multiply-adds.
_PASS = 40


class Dial:
    """A strength that changes from step to step: what the mix in force has for it now. `level` is the schedule."""

    def __init__(self, mix: Any, row: int | None, name: str, index: int, level: Any):
        self.mix, self.row, self.name, self.index, self.level = mix, row, name, index, level

    def now(self) -> float:
        choice = self.mix.current()
        return (choice if self.row is None else choice.rows[self.row]).strengths[self.name][self.index]


Given = Strength | Dial


def now(s: Given) -> Strength:
    """A strength as it is now."""
    return s.now() if isinstance(s, Dial) else s


def is_zero(s: Strength) -> bool:
    """Whether a strength is known to be 0, so that its adapter is left out."""
    return isinstance(s, float) and s == 0


class Base:
    """The layer without adapters."""

    def __init__(
        self,
        op: Any,
        forward: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
        kept: dict[int, Any],
        own: Tensor | None = None,
    ):
        self.op, self.forward, self.dtype, self.kept, self.own = op, forward, dtype, kept, own

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        assert self.forward is not None
        if bias or self.op.bias is None:
            return self.forward(x)
        return self.op.op(x, self.weight(), False) if self.op.faithful else self.op.less_bias(self.forward(x))

    @property
    def plain(self) -> bool:
        """Whether this is F.linear with a weight that is simply here, so that one node may do it and an adapter."""
        return self.op.plain and not traced()

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, gate: Any, bias: bool, by: Tensor | None = None) -> Tensor:
        if not self.plain:
            return _low_rank(self, x, A, B, gate, bias, by)
        m = self.op.module
        return kernels.lora_linear(x, m.weight, m.bias if bias else None, A, B, gate, by)

    def weight(self) -> Tensor:
        return (self.op.weight() if self.own is None else self.own).to(self.dtype)

    def squares(self, axis: int) -> Tensor:
        """Kept while the weight is frozen and the same."""
        W = self.op.module.weight
        if self.own is not None or W.requires_grad or self.op.quantised or traced():
            return squares(self.weight(), axis)
        stamp = stamp_of(W)
        kept = self.kept.get(axis)
        if kept is None or kept[0] != stamp:
            kept = self.kept[axis] = stamp, squares(self.op.weight(), axis)
        return kept[1]


def _low_rank(link: Link, x: Tensor, A: Tensor, B: Tensor, gate: Any, bias: bool, by: Tensor | None = None) -> Tensor:
    """`Link.low_rank` by the layer's parts."""
    y = link(x, bias)
    return link.op.add(y if by is None else link.op.rescaled(y, by, bias), link.op.down(x, A), B, gate)


class Later:
    """A link after another one."""

    low_rank = _low_rank

    def __init__(self, before: Link):
        self.before, self.dtype = before, before.dtype
        self.op: Any = before.op

    def weight(self) -> Tensor:
        raise NotImplementedError

    def squares(self, axis: int) -> Tensor:
        return squares(self.weight(), axis)


class Added(Later):
    """Additive adapters side by side: they commute, so each takes its cheapest way, and those of low rank go as one."""

    def __init__(self, before: Link, terms: Sequence[tuple[Slot, Part, Given]]):
        super().__init__(before)
        self.terms = terms

    def _now(self) -> list[tuple[Slot, Part, Strength]]:
        """The terms whose strength is not 0."""
        terms = [(slot, part, now(s)) for slot, part, s in self.terms]
        return [term for term in terms if not is_zero(term[2])]

    def weight(self) -> Tensor:
        W = self.before.weight()
        for slot, part, s in self._now():
            W = slot(_with_delta, part, W, s, self.dtype)
        return W

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        if not self.op.targets:
            return self.op.op(x, self.weight(), bias)
        op, tokens = self.op, self.op.positions(x)
        W, pairs, others = None, [], []
        for slot, part, s in self._now():
            s = _dropped(slot, part, s)
            if not slot.bare:
                others.append((slot, part, s))
                continue
            p = slot.prepared(part, self.dtype)
            route = route_of(slot, part, p, tokens)
            if route == "weight" and op.faithful:
                W = (self.before.weight() if W is None else W) + s * _masked(slot, part, p)
            elif (
                route == "own"
                and len(self.terms) == 1
                and isinstance(self.before, Base)
                and self.before.plain
                and (k := part.method.kron(p, part.spec))
            ):
                first, down, up = k
                m, gate = self.op.module, s * part.method.scale(p, part.spec)
                return kernels.kron_linear(x, m.weight, m.bias if bias else None, first, down, up, gate)
            elif route == "factors":
                pairs.append((*part.method.factors(p, part.spec), s * part.method.scale(p, part.spec)))
            else:
                others.append((slot, part, s))
        y = self._with_pairs(x, bias, W, pairs)
        for slot, part, s in others:
            y = slot(_one, part, op, y, x, s, self.dtype, tokens)
        return y

    def _with_pairs(
        self, x: Tensor, bias: bool, W: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor, Any]]
    ) -> Tensor:
        """The layer before, with W in place of its weight if given, and all pairs of factors as one."""
        if not pairs:
            return self.before(x, bias) if W is None else self.op.op(x, W, bias)
        A, B, gate = _joined(pairs)
        if W is None and self._cheaper_in_weight(x, A):
            W = torch.addmm(self.before.weight().flatten(1), B.flatten(1) * gate, A.flatten(1))
            return self.op.op(x, W.view(self.op.geometry.shape), bias)
        if W is None:
            return self.before.low_rank(x, A, B, gate, bias)
        return self.op.add(self.op.op(x, W, bias), self.op.down(x, A), B, gate)

    def _cheaper_in_weight(self, x: Tensor, A: Tensor) -> bool:
        """Whether a product of low rank is better added to the weight: without a backward pass, in a dtype that does not round it away."""
        op, g, r = self.op, self.op.geometry, A.shape[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.dtype.itemsize < 4:
            return False
        if not isinstance(self.before, Base) or g.lookup or not op.faithful:
            return False
        return (r + _PASS) * g.out * g.columns < r * op.positions(x) * (g.groups * g.columns + g.out)


def _joined(pairs: Sequence[tuple[Tensor, Tensor, Any]]) -> tuple[Tensor, Tensor, Any]:
    """Pairs of factors as one pair, with the gates along the rank."""
    if len(pairs) == 1:
        return pairs[0]
    A = torch.cat([A for A, _, _ in pairs])
    B = torch.cat([B for _, B, _ in pairs], 1)
    gates = [torch.as_tensor(g, dtype=A.dtype, device=A.device).reshape(1).expand(a.shape[0]) for a, _, g in pairs]
    return A, B, torch.cat(gates)


def route_of(slot: Slot, part: Part, p: Any, tokens: int) -> str:
    """How to apply an additive part; in training dropout decides."""
    if slot.training and part.spec.options.get("rank_dropout"):
        return "weight"
    if slot.training and part.spec.options.get("dropout"):
        return "alone"
    return part.method.route(p, part.spec, tokens)


def _one(slot: Slot, part: Part, op: Any, y: Tensor, x: Tensor, s: Strength, dtype: torch.dtype, tokens: int) -> Tensor:
    """y with one additive adapter on its own added."""
    p, method, spec = slot.prepared(part, dtype), part.method, part.spec
    route = route_of(slot, part, p, tokens)
    if route == "alone":
        x, route = F.dropout(x, spec.options["dropout"]), method.route(p, spec, tokens)
    if route == "own":
        return method.add(op, y, x, p, spec, s * method.scale(p, spec))
    if route == "factors":
        A, B = method.factors(p, spec)
        return op.add(y, op.down(x, A), B, s * method.scale(p, spec))
    return y + op.op(x, s * _masked(slot, part, p), False)


def _masked(slot: Slot, part: Part, p: Any) -> Tensor:
    """scale * delta; in training with rank dropout some rows are left out, the rest is scaled up if the method says so."""
    delta = part.method.scale(p, part.spec) * part.method.delta(p, part.spec)
    rate = part.spec.options.get("rank_dropout") if slot.training else 0
    if not rate:
        return delta
    kept = (torch.rand(delta.shape[0]) > rate).to(delta)
    if part.spec.options.get("rank_dropout_scale"):
        kept = kept / kept.mean().clamp_min(1 / len(kept))
    return delta * kept.view(-1, *(1 for _ in delta.shape[1:]))


def _dropped(slot: Slot, part: Part, s: Strength) -> Strength:
    """The strength; in training with module dropout sometimes nothing."""
    rate = part.spec.options.get("module_dropout") if slot.training and part.additive else 0
    return s * (torch.rand(()) > rate).float() if rate else s


def _with_delta(slot: Slot, part: Part, W: Tensor, s: Strength, dtype: torch.dtype) -> Tensor:
    """W with one additive adapter in it."""
    p = slot.prepared(part, dtype)
    change = part.method.scale(p, part.spec) * part.method.delta(p, part.spec)
    fits = change.stride() == W.stride() and torch.promote_types(change.dtype, W.dtype) == change.dtype
    if torch.is_grad_enabled() or isinstance(s, Tensor) or not fits:  # the result lies in memory as W does
        return W + s * change
    return change.mul_(s).add_(W)  # large weights take longer to find memory for than to compute


class Changed(Later):
    """An adapter that depends on the weight before it: all its methods in order, as one at strength s."""

    def __init__(self, before: Link, slot: Slot, s: Given):
        super().__init__(before)
        self.slot, self.s = slot, s

    def weight(self) -> Tensor:
        return self.slot(_changed, self.before.weight(), now(self.s), self.dtype)

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        if is_zero(s := now(self.s)):
            return self.before(x, bias)
        if len(self.slot.parts) == 1 and self.op.targets:
            return self.slot(_applied, self.before, x, s, bias)
        if not self.op.faithful:
            return self.before(x, bias) + self.op.op(x, self.weight() - self.before.weight(), False)
        return self.op.op(x, self.weight(), bias)


def _changed(slot: Slot, W: Tensor, s: Strength, dtype: torch.dtype) -> Tensor:
    """W + s (f(W) - W), f all parts in order."""
    f = W
    for part in slot.parts:
        f = part.method.weight(f, slot.prepared(part, dtype), part.spec)
    return W + s * (f - W)


def _applied(slot: Slot, before: Link, x: Tensor, s: Strength, bias: bool) -> Tensor:
    """The one part of a slot applied to what was before; in training with dropout only the change sees the dropped input."""
    (part,) = slot.parts
    p, spec = slot.prepared(part, before.dtype), part.spec
    if not (slot.training and spec.options.get("dropout")):
        return part.method.apply(before, x, p, spec, s, bias)
    thin = F.dropout(x, spec.options["dropout"])
    return before(x, bias) + part.method.apply(before, thin, p, spec, s, False) - before(thin, False)


class Whole:
    """The layer with all its adapters on it, in order, biases included."""

    def __init__(self, base: Base, steps: Sequence[tuple[Slot, Given]]):
        self.op, self.link = base.op, _linked(base, steps)
        self.shifts = [(slot, s) for slot, s in steps if slot.shifts]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.link(x)
        shift = self.shift(y.dtype, self.op.bias)
        return y if shift is None else self.op.shifted(y, shift)

    def weight(self) -> Tensor:
        return self.link.weight()

    def shift(self, dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
        """What the adapters add to the layer's bias, if anything: b_k = b_{k-1} + s_k (f_k(b_{k-1}) - b_{k-1})."""
        total, bias = None, None if bias is None else bias.flatten()
        for slot, s in self.shifts:
            if is_zero(s := now(s)):
                continue
            by = slot(_shift, _sum(bias, total))
            total = _sum(total, None if by is None else s * by.to(dtype))
        return total


def _linked(base: Base, steps: Sequence[tuple[Slot, Given]]) -> Link:
    """The links, runs of additive adapters as one. What is no slot (a patch of the weight) makes its own."""
    link: Link = base
    waiting: list[tuple[Slot, Part, Given]] = []
    for slot, s in steps:
        if isinstance(slot, Slot) and all(part.additive for part in slot.parts):
            waiting += [(slot, part, s) for part in slot.parts]
            continue
        if waiting:
            link, waiting = Added(link, waiting), []
        link = Changed(link, slot, s) if isinstance(slot, Slot) else slot.link(link, s)
    return Added(link, waiting) if waiting else link


def _shift(slot: Slot, b: Tensor | None) -> Tensor | None:
    """What one adapter adds to the bias `b` at strength 1: all its methods in order, and its own change."""
    total = None
    for part in slot.parts:
        total = _sum(total, part.method.bias(_sum(b, total), slot.tensors_of(part), part.spec))
    return _sum(total, getattr(slot, BIAS, None))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    return b if a is None else a if b is None else a + b
