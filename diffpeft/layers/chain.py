"""The adapters of a layer applied in order: W_k = W_{k-1} + s_k (f_k(W_{k-1}) - W_{k-1}).

Each link is the layer with one more adapter on it. A link can be applied to an input and can give its weight; methods choose what is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpeft.layers.caching import is_enabled
from diffpeft.layers.mixes import MixLike
from diffpeft.layers.sites import LayerSite
from diffpeft.layers.slot import BIAS, Part, Slot, stamp_of
from diffpeft.methods import Link, Strength
from diffpeft.methods.base import Tensors
from diffpeft.methods.costs import Work, cheapest
from diffpeft.methods.forms import Factors, Form
from diffpeft.methods.linalg import squares, traced


class Dial:
    """A strength that changes from step to step: what the mix in force has for it now. `level` is the schedule."""

    def __init__(self, mix: MixLike, row: int | None, name: str, index: int, level: object):
        self.mix, self.row, self.name, self.index, self.level = mix, row, name, index, level

    def now(self) -> float:
        moment = self.mix.current()
        strengths = (moment if self.row is None else moment.rows[self.row]).strengths
        return float(strengths[self.name][self.index])


Given = Strength | Dial


def now(s: Given) -> Strength:
    """A strength as it is now."""
    return s.now() if isinstance(s, Dial) else s


def is_zero(s: Strength) -> bool:
    """Whether a strength is known to be 0, so that its adapter is left out."""
    return isinstance(s, float) and s == 0


class Base:
    """The layer without adapters.

    Args:
        forward: the layer's own forward; None where only weights are asked for.
        memory: where sums of squares of its weight are kept.
        W: a canonical weight to take for the layer's.
    """

    def __init__(
        self,
        op: LayerSite,
        forward: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
        memory: dict[object, tuple[object, ...]],
        W: Tensor | None = None,
    ):
        self.op, self.forward, self.dtype, self.memory, self.W = op, forward, dtype, memory, W

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        assert self.forward is not None
        if bias or self.op.bias is None:
            return self.forward(x)
        return self.op.op(x, self.weight(), False) if self.op.faithful else self.op.less_bias(self.forward(x))

    def plus(self, x: Tensor, form: Form, gate: Strength, bias: bool, by: Tensor | None = None) -> Tensor:
        y = self.op.fused(x, form, gate, bias, by)
        return _plus(self, x, form, gate, bias, by) if y is None else y

    def weight(self) -> Tensor:
        return (self.op.weight() if self.W is None else self.W).to(self.dtype)

    def squares(self, axis: int) -> Tensor:
        """Kept while the weight is frozen and the same."""
        W = self.op.parameter
        if self.W is not None or W.requires_grad or self.op.backend or traced():
            return squares(self.weight(), axis)
        stamp = stamp_of(W)
        before = self.memory.get(axis)
        if before is not None and before[0] == stamp:
            return cast(Tensor, before[1])
        sums = squares(self.op.weight(), axis)
        self.memory[axis] = stamp, sums
        return sums


def _plus(link: Link, x: Tensor, form: Form, gate: Strength, bias: bool, by: Tensor | None = None) -> Tensor:
    """`Link.plus` by the layer's parts."""
    y = link(x, bias)
    return link.op.plus(y if by is None else link.op.rescaled(y, by, bias), x, form, gate)


class Later:
    """A link after another one."""

    plus = _plus

    def __init__(self, before: Chained):
        self.before = before
        self.op: LayerSite = before.op
        self.dtype: torch.dtype = before.dtype

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        raise NotImplementedError

    def weight(self) -> Tensor:
        raise NotImplementedError

    def squares(self, axis: int) -> Tensor:
        return squares(self.weight(), axis)


Chained = Base | Later  # a link whose layer is known


class Other:
    """What acts on a layer and is no slot (a slot may be in a wrapper of FSDP's): a patch of its weight."""

    def link(self, before: Chained, s: Given) -> Later:
        """The layer with this as the last of a chain."""
        raise NotImplementedError


class Added(Later):
    """Additive adapters side by side: they commute, so each takes its cheapest form, and those of low rank go as one."""

    def __init__(self, before: Chained, terms: Sequence[tuple[Slot, Part, Given]]):
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
        op = self.op
        if not op.targets:
            return op.op(x, self.weight(), bias)
        W, forms, apart, positions = None, [], [], op.positions(x)
        for slot, part, s in self._now():
            if slot.training:
                s = _dropped(slot, part, s)
            if not slot.bare or drops_inputs(slot, part):
                apart.append((slot, part, s))
                continue
            p = slot.prepared(part, self.dtype)
            form = form_of(slot, part, p, positions)
            if form is not None:
                forms.append((form, s * part.method.scale(p, part.spec)))
            elif op.faithful:
                W = (self.before.weight() if W is None else W) + s * _masked(slot, part, p)
            else:
                apart.append((slot, part, s))
        y = self._with_forms(x, bias, W, forms, positions)
        for slot, part, s in apart:
            y = slot(_one, part, op, y, x, s, self.dtype, positions)
        return y

    def _with_forms(
        self, x: Tensor, bias: bool, W: Tensor | None, forms: list[tuple[Form, Strength]], positions: int
    ) -> Tensor:
        """The layer before, with W in place of its weight if given, and all forms added."""
        op = self.op
        if not forms:
            return self.before(x, bias) if W is None else op.op(x, W, bias)
        (form, gate), *others = forms if len(forms) == 1 else _joined(forms)
        if W is not None:
            y = op.plus(op.op(x, W, bias), x, form, gate)
        elif isinstance(form, Factors) and self._is_cheaper_in_weight(form, positions):
            W = torch.addmm(self.before.weight().flatten(1), form.B.flatten(1) * gate, form.A.flatten(1))
            y = op.op(x, W.view(op.geometry.shape), bias)
        else:
            y = self.before.plus(x, form, gate, bias)
        for form, gate in others:
            y = op.plus(y, x, form, gate)
        return y

    def _is_cheaper_in_weight(self, form: Factors, positions: int) -> bool:
        """Whether a product of low rank is better added to the weight, where there is no backward pass."""
        op, g, r = self.op, self.op.geometry, form.A.shape[0]
        if torch.is_grad_enabled() or (g.groups == 1 and 2 * positions <= g.out and 2 * positions <= g.columns):
            return False  # with so few positions it cannot be
        if not isinstance(self.before, Base) or not op.faithful or g.lookup or torch.compiler.is_compiling():
            return False
        ways = {
            "activations": Work(r * positions * (g.groups * g.columns + g.out)),
            "weight": Work(r * g.out * g.columns, elements=g.out * g.columns),
        }
        return cheapest("inference", self.dtype, ways) == "weight"


def _joined(forms: Sequence[tuple[Form, Strength]]) -> list[tuple[Form, Strength]]:
    """All factors of low rank as one pair, with the gates along the rank, before what is of another form."""
    pairs = [(form, gate) for form, gate in forms if isinstance(form, Factors)]
    others = [(form, gate) for form, gate in forms if not isinstance(form, Factors)]
    if len(pairs) < 2:
        return [*pairs, *others]
    A = torch.cat([A for (A, _), _ in pairs])
    B = torch.cat([B for (_, B), _ in pairs], 1)
    gates = [torch.as_tensor(g, dtype=A.dtype, device=A.device).reshape(1).expand(len(a)) for (a, _), g in pairs]
    return [(Factors(A, B), torch.cat(gates)), *others]


def form_of(slot: Slot, part: Part, p: Tensors, positions: int) -> Form | None:
    """The form in which an additive part is applied; None if it is built. Rows of it are dropped in training only from what is built."""
    if slot.training and part.spec.options.get("rank_dropout"):
        return None
    form: Form | None = part.method.form(p, part.spec, positions)
    return form


def factors_of(slot: Slot, dtype: torch.dtype) -> Factors | None:
    """Exact factors of all that a slot adds, side by side, with their scale in B: A [R, columns], B [out, R].

    None if a part has none, or none of less than full rank that would be cheaper than the update itself.
    """
    pairs = []
    for part in slot.parts:
        method, g = part.method, part.spec.geometry
        if not part.additive:
            return None
        p = slot.prepared(part, dtype)
        pair: Factors | None = method.factors(p, part.spec)
        if pair is None or (len(pair.A) >= min(g.out, g.columns) and not method.thin):
            return None
        pairs.append((pair.A.flatten(1), pair.B.flatten(1) * method.scale(p, part.spec)))
    if len(pairs) == 1:
        return Factors(*pairs[0])
    if not pairs:
        return None
    return Factors(torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))


def drops_inputs(slot: Slot, part: Part) -> bool:
    """Whether a part sees an input of its own: in training some features are dropped."""
    return slot.training and bool(part.spec.options.get("dropout"))


def _one(
    slot: Slot, part: Part, op: LayerSite, y: Tensor, x: Tensor, s: Strength, dtype: torch.dtype, positions: int
) -> Tensor:
    """y with one additive adapter on its own added."""
    p = slot.prepared(part, dtype)
    form = form_of(slot, part, p, positions)
    if drops_inputs(slot, part):
        x = F.dropout(x, part.spec.options["dropout"])
    if form is None:
        return y + op.op(x, s * _masked(slot, part, p), False)
    return op.plus(y, x, form, s * part.method.scale(p, part.spec))


def _masked(slot: Slot, part: Part, p: Tensors) -> Tensor:
    """scale * delta; in training with rank dropout some rows are left out, the others are scaled up if the method says so."""
    delta: Tensor = part.method.scale(p, part.spec) * part.method.delta(p, part.spec)
    rate = part.spec.options.get("rank_dropout") if slot.training else 0
    if not rate:
        return delta
    mask = (torch.rand(delta.shape[0], device=delta.device) > rate).to(delta)
    if part.spec.options.get("rank_dropout_scale"):
        mask = mask / mask.mean().clamp_min(1 / len(mask))
    return delta * mask.view(-1, *(1 for _ in delta.shape[1:]))


def _dropped(slot: Slot, part: Part, s: Strength) -> Strength:
    """The strength in training; with module dropout sometimes nothing."""
    rate = part.spec.options.get("module_dropout")
    return s * (torch.rand(()) > rate).float() if rate else s


def _with_delta(slot: Slot, part: Part, W: Tensor, s: Strength, dtype: torch.dtype) -> Tensor:
    """W with one additive adapter in it."""
    p = slot.prepared(part, dtype)
    change: Tensor = part.method.scale(p, part.spec) * part.method.delta(p, part.spec)
    fits = change.stride() == W.stride() and torch.promote_types(change.dtype, W.dtype) == change.dtype
    if torch.is_grad_enabled() or isinstance(s, Tensor) or not fits:  # the result lies in memory as W does
        return W + s * change
    return change.mul_(s).add_(W)  # large weights take longer to find memory for than to compute


class Changed(Later):
    """An adapter that depends on the weight before it: all its methods in order, as one at strength s."""

    def __init__(self, before: Chained, slot: Slot, s: Given):
        super().__init__(before)
        self.slot, self.s = slot, s

    def weight(self) -> Tensor:
        W: Tensor = self.slot(_changed, self.before.weight(), now(self.s), self.dtype)
        return W

    def __call__(self, x: Tensor, bias: bool = True) -> Tensor:
        if is_zero(s := now(self.s)):
            return self.before(x, bias)
        if len(self.slot.parts) == 1 and self.op.targets:
            y: Tensor = self.slot(_applied, self.before, x, s, bias)
            return y
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
    if is_enabled():
        p = {**p, **_ahead(slot, part, before, p)}
    if not (slot.training and spec.options.get("dropout")):
        y: Tensor = part.method.apply(before, x, p, spec, s, bias)
        return y
    thin = F.dropout(x, spec.options["dropout"])
    change: Tensor = part.method.apply(before, thin, p, spec, s, False) - before(thin, False)
    return before(x, bias) + change


def _ahead(slot: Slot, part: Part, before: Link, p: Tensors) -> dict[str, Tensor]:
    """What a method works out of the layer's own weight, if it may be kept from one forward to the next."""
    if slot.training or traced() or not isinstance(before, Base) or before.op.backend:
        return {}
    weight = before.op.parameter if before.W is None else before.W
    return slot.kept_beside(part, weight, before.dtype, lambda: part.method.ahead(before, p, part.spec))


class Whole:
    """The layer with all its adapters on it, in order, biases included."""

    def __init__(self, base: Base, steps: Sequence[tuple[Slot | Other, Given]]):
        self.op, self.link = base.op, _linked(base, steps)
        self.shifts = [(slot, s) for slot, s in steps if not isinstance(slot, Other) and slot.shifts]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.link(x)
        if not self.shifts:
            return y
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


def _linked(base: Base, steps: Sequence[tuple[Slot | Other, Given]]) -> Chained:
    """The links, runs of additive adapters as one. What is no slot makes its own."""
    link: Chained = base
    waiting: list[tuple[Slot, Part, Given]] = []
    for slot, s in steps:
        if not isinstance(slot, Other) and all(part.additive for part in slot.parts):
            waiting += [(slot, part, s) for part in slot.parts]
            continue
        if waiting:
            link, waiting = Added(link, waiting), []
        link = slot.link(link, s) if isinstance(slot, Other) else Changed(link, slot, s)
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
