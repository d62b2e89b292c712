"""Tables of layer names: templates in which `{}` stands for a number, and the way from one program's names to another's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from diffpeft.bundle import Rule

Side = dict[str, list[tuple[Rule, int]]]  # {template: the rules that it is in, and as which part}
_NUMBER = re.compile(r"\{\}|[0-9]+")
SWAPPED = (1, 0)  # the halves the other way round, as (shift, scale) and (scale, shift) are


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a table that looks each name up once: files ask for the same ones again and again."""

    @functools.wraps(method)
    def look(self: Table, *args: Any, **kwargs: Any) -> Any:
        found = self._found
        key = (method.__name__, *args, *kwargs.values())
        if key not in found:
            if len(found) > 100_000:
                found.clear()
            found[key] = method(self, *args, **kwargs)
        return found[key]

    return look


@dataclass(frozen=True)
class Encoder:
    """A text encoder: its layers in transformers' names, what flat names start with (the first is written), what ComfyUI's start with."""

    layers: Sequence[str]
    kohya: tuple[str, ...] = ()
    comfyui: str = ""


@dataclass(frozen=True)
class Table:
    """A family: {component: templates of its layers, in diffusers' names}, {denoiser: rules from the original's names}, its text encoders.

    A component without rules has the same names in both programs.
    """

    components: Mapping[str, Sequence[str]]
    rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    flat_is_diffusers: bool = False  # sd-scripts has diffusers' names in its flat ones

    @_remembered
    def dotted(self, component: str, flat: str) -> str | None:
        """The layer whose dots written as underscores give `flat`; None if the family has no such layer."""
        return _filled(_find(tuple(self.components.get(component, ())), flat))

    def knows(self, component: str, layer: str) -> bool:
        """Whether the family has a layer of this dotted name."""
        return self.dotted(component, layer.replace(".", "_")) == layer

    @_remembered
    def encoded(self, component: str, layer: str, flat: bool) -> str | None:
        """A text encoder's layer behind a name that may lack the level `text_model` or have one `model` more."""
        dot = "_" if flat else "."
        for name in (layer, f"text_model{dot}{layer}", layer.removeprefix(f"model{dot}")):
            if found := self.dotted(component, name.replace(".", "_")):
                return found if flat or found == name else None
        return None

    @_remembered
    def original_dotted(self, component: str, flat: str) -> str | None:
        """As `dotted`, for the original's names."""
        return _filled(_find(tuple(self._sides(component)[0]), flat))

    def is_original(self, component: str, layer: str) -> bool:
        """As `knows`, for the original's names."""
        return self.original_dotted(component, layer.replace(".", "_")) == layer

    def patterns(self, component: str) -> frozenset[str]:
        """The flat names of both programs with # for each number: what is not among them, the family does not have."""
        if component not in self._patterns:
            names = (tuple(self.components.get(component, ())), tuple(self._sides(component)[0]))
            self._patterns[component] = frozenset(name for templates in names for name in _flat(templates))
        return self._patterns[component]

    @functools.cached_property
    def _found(self) -> dict[tuple[Any, ...], Any]:
        return {}

    @functools.cached_property
    def _patterns(self) -> dict[str, frozenset[str]]:
        return {}

    @_remembered
    def to_diffusers(self, component: str, layer: str, aspect: int | None = None) -> Rule | None:
        """The rule of one layer of the original, in full names. `aspect` (rows by columns) is only asked for where names do not suffice."""
        found = _rule(self._sides(component)[0], layer, aspect)
        return found and found[0]

    @_remembered
    def to_original(self, component: str, layer: str, aspect: int | None = None) -> tuple[Rule, int] | None:
        """The rule of the original layer that one of diffusers' is of, in full names, and which of its parts that is."""
        return _rule(self._sides(component)[1], layer, aspect)

    def _sides(self, component: str) -> tuple[Side, Side]:
        """The rules of a component by the original's templates and by diffusers'."""
        if component not in self._indexed:
            originals: Side = {}
            parts: Side = {}
            for rule in self.rules.get(component) or same(*self.components.get(component, ())):
                originals.setdefault(rule.original, []).append((rule, 0))
                for part, (name, _) in enumerate(rule.parts):
                    parts.setdefault(name, []).append((rule, part))
            self._indexed[component] = originals, parts
        return self._indexed[component]

    @functools.cached_property
    def _indexed(self) -> dict[str, tuple[Side, Side]]:
        return {}


def table(
    rules: Sequence[Rule],
    encoders: Mapping[str, Encoder],
    *,
    denoisers: Sequence[str] = ("transformer",),
    layers: Sequence[str] = (),
    flat_is_diffusers: bool = False,
) -> Table:
    """A family of which one set of rules names all denoisers. `layers` are diffusers' templates if there are more than in the rules."""
    layers = layers or tuple(dict.fromkeys(name for rule in rules for name, _ in rule.parts))
    components = {**dict.fromkeys(denoisers, layers), **{name: encoder.layers for name, encoder in encoders.items()}}
    return Table(components, dict.fromkeys(denoisers, rules), encoders, flat_is_diffusers)


def renamed(names: Mapping[str, str | Sequence[str]]) -> tuple[Rule, ...]:
    """Rules from {original: diffusers' layer, or the layers that share its rows equally}."""
    parts = {original: (own,) if isinstance(own, str) else own for original, own in names.items()}
    return tuple(Rule(original, tuple((name, 1) for name in own)) for original, own in parts.items())


def same(*names: str) -> tuple[Rule, ...]:
    """Rules of layers that are called the same in both programs."""
    return renamed({name: name for name in names})


def within(original: str, diffusers: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of what is inside a block, for the block."""
    return tuple(
        replace(rule, original=original + rule.original, parts=tuple((diffusers + n, s) for n, s in rule.parts))
        for rule in rules
    )


def _rule(side: Side, layer: str, aspect: int | None) -> tuple[Rule, int] | None:
    found = _find(tuple(side), layer.replace(".", "_"))
    if found is None or _filled(found) != layer:
        return None
    template, numbers = found
    fitting = [(rule.filled(numbers), part) for rule, part in side[template] if rule.aspect in (None, aspect)]
    return fitting[0] if fitting else None


def _filled(found: tuple[str, list[str]] | None) -> str | None:
    return found and found[0].format(*found[1])


def _find(templates: tuple[str, ...], flat: str) -> tuple[str, list[str]] | None:
    """The template and the numbers in it that give a flat name. Of templates that fit, the first counts."""
    numbers = _NUMBER.findall(flat)
    for template, own in _flat(templates).get(_NUMBER.sub("#", flat), ()):
        if all(want in ("{}", number) for want, number in zip(own, numbers, strict=True)):
            return template, [number for want, number in zip(own, numbers, strict=True) if want == "{}"]
    return None


@functools.cache
def _flat(templates: tuple[str, ...]) -> dict[str, list[tuple[str, list[str]]]]:
    """{flat name with # for each number: [(template, its numbers)]}: which templates a name may be of, without trying all."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for template in templates:
        found.setdefault(_NUMBER.sub("#", template.replace(".", "_")), []).append((template, _NUMBER.findall(template)))
    return found
