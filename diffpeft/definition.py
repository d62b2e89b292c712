"""What entries do to weights, by the methods' definitions in float64: the standard that every faster way is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffpeft.entries import Entry, Rule
from diffpeft.errors import ConfigError, shown
from diffpeft.handles import load, number
from diffpeft.methods.layout import BIAS
from diffpeft.methods.shapes import weight_shape

if TYPE_CHECKING:
    import torch

    from diffpeft.methods import Additive, Method, Spec

_BIASES = frozenset({BIAS, "b_norm"})


class Definition(NamedTuple):
    """What a method's functions take: the method, an entry's prepared tensors in float64 by role, and its spec."""

    method: type[Method]
    tensors: dict[str, torch.Tensor]
    spec: Spec

    @property
    def additive(self) -> type[Additive] | None:
        """The method, if with these tensors it adds the same whatever the weight is."""
        from diffpeft.methods import Additive

        method = self.method
        return (
            method
            if issubclass(method, Additive) and method.additive({role: t.dim() for role, t in self.tensors.items()})
            else None
        )


def deltas(entries: Iterable[Entry], base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{canonical layer: f(W) - W in float64} of entries one after the other; `base` {layer: W}, for methods that need W.

    Entries that change nothing but a bias are left out. Raises ConfigError if W is needed and not there.
    """
    changes: dict[str, torch.Tensor] = {}
    for entry in entries:
        if not {*entry.tensors} - _BIASES:
            continue
        weights = [_weight(base.get(layer), changes.get(layer)) for layer in entry.targets]
        for layer, delta in zip(entry.targets, _changes(entry, weights), strict=True):
            changes[layer] = changes[layer] + delta if layer in changes else delta
    return changes


def _weight(W: torch.Tensor | None, change: torch.Tensor | None) -> torch.Tensor | None:
    """A layer's weight after what changed it before."""
    return W if W is None or change is None else W.double() + change


def _changes(entry: Entry, weights: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The changes of an entry's targets. A joint layer's weight is put together and its change taken apart."""
    if (rule := entry.rule) is None:
        return [_delta(entry, weights[0])]
    parts = [W for W in weights if W is not None]
    delta = _delta(entry, _joint(rule, parts) if len(parts) == len(weights) else None)
    return [delta[list(rule.rows(part, len(delta)))] for part in range(len(weights))]


def _joint(rule: Rule, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights of the rule's parts [o_n, ...] as the weight of the original layer [sum of o_n, ...]."""
    import torch

    stacked = torch.cat(list(weights))
    joint = torch.empty_like(stacked)
    joint[[row for part in range(len(weights)) for row in rule.rows(part, len(stacked))]] = stacked
    return joint


def _delta(entry: Entry, W: torch.Tensor | None) -> torch.Tensor:
    """f(W) - W in float64, in the shape of W; where f is additive W is not needed."""
    definition = definition_of(entry, W)
    method, p, spec = definition
    if additive := definition.additive:
        delta = additive.scale(p, spec) * additive.delta(p, spec)
        column = any(len(entry.tensors[role].shape) == 1 for role in ("diff", "w_norm") if role in p)
        return delta.reshape(W.shape) if W is not None else delta.flatten() if column else delta
    assert W is not None
    before = W.double().reshape(spec.geometry.shape)
    return (method.weight(before, p, spec) - before).reshape(W.shape)


def definition_of(entry: Entry, W: torch.Tensor | None = None) -> Definition:
    """An entry's method, its prepared tensors in float64, and its spec: what the method's functions take.

    Without W the layer's shape is what the tensors show. Raises ConfigError if the method needs W.
    """
    from diffpeft.methods import METHODS, Geometry, Spec

    method = METHODS[entry.method]
    roles = [role for role in entry.tensors if role in method.roles]
    _check_shared(entry, method, W)
    handles = {**{role: entry.tensors[role] for role in roles}, **{role: entry.shared[role] for role in method.shared}}
    p = {role: t.double() for role, t in zip(handles, load(handles.values()), strict=True)}
    if W is None and not method.additive({role: t.dim() for role, t in p.items()}):
        raise ConfigError(
            f"{entry.method} on {shown(entry.layer)} changes what is there", remedy="Pass base={layer: W}."
        )
    o, *columns = (entry.shape or weight_shape(entry.method, entry.shapes)) if W is None else W.shape
    i, *kernel = columns or [1]  # a norm's factors are a column
    geometry = Geometry(o, i, tuple(kernel), lookup=any("_embedding_" in role for role in roles))
    spec = Spec(geometry, number(entry.alpha), entry.options)
    return Definition(method, method.prepare(method.adopt(p, spec), spec, False), spec)


def _check_shared(entry: Entry, method: type[Method], W: torch.Tensor | None) -> None:
    """Raise ConfigError for an entry that lacks tensors of its whole adapter, or with nothing that tells how much of these is for it."""
    if missing := {*method.shared} - {*entry.shared}:
        raise ConfigError(
            f"{entry.method} on {shown(entry.layer)} needs {' and '.join(sorted(missing))}, which its file leaves out",
            remedy="Load it onto its model.",
        )
    if method.shared and W is None and entry.shape is None:
        raise ConfigError(f"nothing tells the columns of {shown(entry.layer)}", remedy="Pass base={layer: W}.")
