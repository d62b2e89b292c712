"""Mix: which adapters of one component are active, in which order, and how strong each is on each layer.

A component has one Mix, its adapted layers hold it, and it holds names and numbers only, so deepcopy and pickle of the model work.
`adapters(...)` puts another choice in force for one thread and one block.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffpeft.bundle import Entry, Handle, dotted
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, near, shown
from diffpeft.model.target import spellings

Strength = float | Mapping[str, float]
NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")

_here = threading.local()  # `choices`: {mix key: Choice} inside this thread's `adapters(...)` blocks, else absent
_lock = threading.Lock()
_keys = itertools.count()


@dataclass(frozen=True)
class Choice:
    """A mix in force: active adapters in activation order, what the user set, and the strength of each on each layer (a column)."""

    order: tuple[str, ...] = ()
    given: Mapping[str, Strength] = field(default_factory=dict)
    strengths: Mapping[str, Sequence[float]] = field(default_factory=dict)
    table: Tensor = field(
        default_factory=lambda: torch.zeros(0, 0)
    )  # [active adapter, layer] fp32: what compiled code reads


@dataclass(frozen=True)
class Adapter:
    """One adapter of one component: its layers, and what its file held beside them."""

    name: str
    layers: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, Handle] = field(default_factory=dict)
    absent: tuple[Entry, ...] = ()  # entries for components that the pipeline lacks


@dataclass
class Mix:
    """The strengths of one component."""

    component: str
    layers: tuple[str, ...] = ()  # the layer of each column; a column is never given to another layer
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)
    fused: Mapping[str, Strength] = field(
        default_factory=dict
    )  # adapters that are in the weights, in order, and how strong
    live: Counter[str] = field(default_factory=Counter)  # adapters named by `adapters(...)` blocks that are running
    key: str = ""

    def __post_init__(self) -> None:
        self.key = f"mix{next(_keys)}"  # a copy is another mix: a thread's choice for the one is not for the other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "live": Counter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def current(self) -> Choice:
        """The choice that holds here and now: this thread's, or the one that was set."""
        if hasattr(_here, "choices"):
            return _here.choices.get(self.key, self.choice)
        return self.choice

    def chosen(self, given: Mapping[str, Strength]) -> Choice:
        """The choice in which the adapters in `given` that this component has are active at these strengths."""
        return choose(self.component, self.layers, self.adapters, given)

    def used(self, given: Mapping[str, Strength]) -> set[str]:
        """The patterns in `given` that match a layer of their adapter here."""
        return {
            pattern
            for name, strength in given.items()
            if name in self.adapters and isinstance(strength, Mapping)
            for pattern in strength
            if any(_matches(pattern, self.component, layer) for layer in self.adapters[name].layers)
        }


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` may name an adapter."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {shown(name)}", remedy="A name is 1 to 128 letters, digits, dots, underscores and hyphens."
        )


def choose(
    component: str, layers: Sequence[str], adapters: Mapping[str, Adapter], given: Mapping[str, Strength]
) -> Choice:
    """`given`, for the adapters that this component has, worked out layer by layer."""
    order = tuple(name for name in given if name in adapters)
    strengths = {name: _strengths(given[name], component, layers) for name in order}
    table = torch.tensor([list(strengths[name]) for name in order], dtype=torch.float32, device="cpu").reshape(
        len(order), len(layers)
    )
    return Choice(
        order, {name: dict(s) if isinstance(s := given[name], Mapping) else s for name in order}, strengths, table
    )


def _strengths(strength: Strength, component: str, layers: Sequence[str]) -> list[float]:
    if not isinstance(strength, Mapping):
        return [float(strength)] * len(layers)
    return [_strength(strength, component, layer) for layer in layers]


def _strength(patterns: Mapping[str, float], component: str, layer: str) -> float:
    """The value of the pattern with most literal segments that matches, then the longer, then the later; 1 if none does."""
    best, value = (-1, -1), 1.0
    for pattern, strength in patterns.items():
        segments = [
            s for s in pattern.split(".") if s != "text_model"
        ]  # a level that may be there or not counts for nothing
        rank = (sum("*" not in s and "?" not in s for s in segments), len(segments))
        if rank >= best and _matches(pattern, component, layer):
            best, value = rank, float(strength)
    return value


def _matches(pattern: str, component: str, layer: str) -> bool:
    """Whether `pattern` matches a leading run of whole segments of the layer's dotted name. CLIP's `text_model.` may be there or not."""
    names = {name for spelt in spellings(layer) for name in (spelt, dotted(component, spelt))}
    return any(_leads(pattern.split("."), name.split(".")) for name in names)


def _leads(pattern: list[str], name: list[str]) -> bool:
    return len(pattern) <= len(name) and all(_glob(p).fullmatch(s) for p, s in zip(pattern, name, strict=False))


def _glob(segment: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in segment))


def check_mix(given: Any, mixes: Iterable[Mix]) -> None:
    """Raise unless `given` is {known adapter: finite number or {pattern that matches: finite number}}."""
    mixes = list(mixes)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"a mix is a dict of strengths by adapter name, not {shown(given)}", remedy='For example {"style": 0.8}.'
        )
    known = {name for mix in mixes for name in mix.adapters}
    for name, strength in given.items():
        if name not in known:
            raise UnknownNameError.of("adapter", name, known)
        check_strength(name, strength)
        if isinstance(strength, Mapping):
            used = set().union(*(mix.used({name: strength}) for mix in mixes))
            for pattern in strength:
                if pattern not in used:
                    raise _no_layer(name, pattern, mixes)


def check_strength(name: str, strength: Any) -> None:
    """Raise ConfigError unless `strength` is a finite number or {pattern: finite number}."""
    for where, value in strength.items() if isinstance(strength, Mapping) else [("", strength)]:
        if (
            not isinstance(where, str)
            or isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ConfigError(
                f"the strength of {shown(name)}{f' at {shown(where)}' if where else ''} is {shown(value)}",
                remedy="A strength is a finite number, or a dict of such numbers by component or block.",
            )


def _no_layer(name: str, pattern: str, mixes: list[Mix]) -> UnknownNameError:
    names = [
        dotted(mix.component, layer) for mix in mixes if name in mix.adapters for layer in mix.adapters[name].layers
    ]
    prefixes = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
    return UnknownNameError(
        f"pattern {shown(pattern)} matches no layer of adapter {shown(name)}",
        remedy=f"{near(pattern, prefixes)} A pattern is a component or a block, such as 'unet.up_blocks.*'.".strip(),
    )


@contextlib.contextmanager
def forced(choices: Mapping[str, Choice], mixes: Sequence[Mix]) -> Iterator[None]:
    """These choices, by mix key, in this thread inside this block."""
    before: dict[str, Choice] | None = getattr(_here, "choices", None)
    _count(choices, mixes, 1)
    _here.choices = {**(before or {}), **choices}
    try:
        yield
    finally:
        if before is None:
            del _here.choices  # absent, not None: a third state would be a third compiled graph
        else:
            _here.choices = before
        _count(choices, mixes, -1)


def _count(choices: Mapping[str, Choice], mixes: Sequence[Mix], by: int) -> None:
    with _lock:
        for mix in mixes:
            for name in choices[mix.key].order if mix.key in choices else ():
                mix.live[name] += by


def check_idle(mix: Mix, names: Iterable[str]) -> None:
    """Raise AdapterStateError if an `adapters(...)` block that is running uses one of `names`."""
    busy = sorted(name for name in names if mix.live[name] > 0)
    if busy:
        raise AdapterStateError(
            f"adapter {shown(busy[0])} is busy: a running adapters(...) block uses it",
            remedy="Unload it after the block.",
        )
