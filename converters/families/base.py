"""Tables of layer names: templates in which `{}` stands for a number, and the way from one program's names to another's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from diffpeft.bundle import Rule

Side = dict[str, list[tuple[Rule, int]]]  # {template: the rules that it is in, and as which part}
# {flat name with # for each number: {which of the numbers a template fixes: {these numbers: the templates, the first of which is written}}}
Flat = dict[str, dict[tuple[bool, ...], dict[tuple[str, ...], list[str]]]]
_NUMBER = re.compile(r"\{\}|[0-9]+")
SWAPPED = (1, 0)  # the halves the other way round, as (shift, scale) and (scale, shift) are


class Index(NamedTuple):
    """Where a component's names are looked up: diffusers' layers, and the rules by the original's names and by diffusers'."""

    own: Flat
    originals: tuple[Flat, Side]
    parts: tuple[Flat, Side]


Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def _remembered(
    method: Callable[Concatenate[Table, Asked], Answer],
) -> Callable[Concatenate[Table, Asked], Answer]:
    """A method of a table that looks each name up once: files ask for the same ones again and again."""

    @functools.wraps(method)
    def look(self: Table, *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        answers = self._answers
        key = (method.__name__, *args, *kwargs.values())
        if key not in answers:
            if len(answers) > 100_000:
                answers.clear()
            answers[key] = method(self, *args, **kwargs)
        return cast(Answer, answers[key])

    return look


@dataclass(frozen=True)
class Encoder:
    """A text encoder: its layers in transformers' names, what flat names start with (the first is written), what ComfyUI's start with.

    `level`: of a CLIP, whether its class has the level `text_model.` that files have (CLIPTextModelWithProjection) or not (CLIPTextModel).
    """

    layers: Sequence[str]
    kohya: tuple[str, ...] = ()
    comfyui: str = ""
    level: bool = False


@dataclass(frozen=True)
class Table:
    """A family: {component: templates of its layers, in diffusers' names}, {denoiser: rules from the original's names}, its text encoders.

    A component without rules has the same names in both programs. Of several originals of one layer the first is written, and all are read.
    """

    components: Mapping[str, Sequence[str]]
    rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    flat_is_diffusers: bool = False  # sd-scripts has diffusers' names in its flat ones
    yields: bool = False  # a file that a better known family's names and sizes fit as well is that one's
    words: Mapping[str, str] = field(
        default_factory=dict
    )  # {component beside the denoiser: what its names start with in the original's checkpoints}
    unread: Mapping[str, str] = field(
        default_factory=dict
    )  # {what is in keys: why layers that are so spelt cannot be read}

    @_remembered
    def dotted(self, component: str, flat: str) -> str | None:
        """The layer whose dots written as underscores give `flat`; None if the family has no such layer."""
        return next(iter(_filled(_find(self._index(component).own, flat))), None)

    def knows(self, component: str, layer: str) -> bool:
        """Whether the family has a layer of this dotted name."""
        return self.dotted(component, layer.replace(".", "_")) == layer

    @_remembered
    def encoded(self, component: str, layer: str, flat: bool) -> str | None:
        """A text encoder's layer behind a name that may lack the level `text_model` or have one `model` more."""
        dot = "_" if flat else "."
        for name in (layer, f"text_model{dot}{layer}", layer.removeprefix(f"model{dot}")):
            if known := self.dotted(component, name.replace(".", "_")):
                return known if flat or known == name else None
        return None

    def own_name(self, component: str, layer: str) -> str:
        """A layer as its model calls it."""
        encoder = self.encoders.get(component)
        return layer if encoder and encoder.level else layer.removeprefix("text_model.")

    @_remembered
    def original_dotted(self, component: str, flat: str) -> str | None:
        """As `dotted`, for the original's names."""
        return next(iter(_filled(_find(self._index(component).originals[0], flat))), None)

    def is_original(self, component: str, layer: str) -> bool:
        """As `knows`, for the original's names."""
        return layer in _filled(_find(self._index(component).originals[0], layer.replace(".", "_")))

    def is_named_as(self, other: Table) -> bool:
        """Whether another family has the same names."""
        alike = self.components.keys() == other.components.keys() and self.rules.keys() == other.rules.keys()
        return (
            alike
            and all(mine is other.components[c] for c, mine in self.components.items())
            and all(mine is other.rules[c] for c, mine in self.rules.items())
            and all(e.kohya == other.encoders[c].kohya for c, e in self.encoders.items())
        )

    @_remembered
    def patterns(self, component: str) -> frozenset[str]:
        """The flat names of both programs with # for each number: what is not among them, the family does not have."""
        index = self._index(component)
        return frozenset(index.own) | frozenset(index.originals[0])

    @_remembered
    def to_diffusers(self, component: str, layer: str, aspect: int | None = None) -> Rule | None:
        """The rule of one layer of the original, in full names. `aspect` (rows by columns) is only asked for where names do not suffice."""
        return next((rule for rule, _ in _rules(self._index(component).originals, layer, aspect)), None)

    @_remembered
    def to_original(self, component: str, layer: str, aspect: int | None = None) -> tuple[Rule, int] | None:
        """The rule of the original layer that one of diffusers' is of, in full names, and which of its parts that is."""
        return next(iter(self.all_originals(component, layer, aspect)), None)

    def all_originals(self, component: str, layer: str, aspect: int | None = None) -> Sequence[tuple[Rule, int]]:
        """As `to_original`, with all of the names that are read; the first is written."""
        return _rules(self._index(component).parts, layer, aspect)

    @_remembered
    def _index(self, component: str) -> Index:
        layers, rules = self.components.get(component, ()), self.rules.get(component, ())
        at = id(layers), id(rules)  # families share them
        if at not in _INDICES:
            _INDICES[at] = _indexed(layers, rules), layers, rules
        return _INDICES[at][0]

    @functools.cached_property
    def _answers(self) -> dict[tuple[object, ...], object]:
        return {}


_INDICES: dict[tuple[int, int], tuple[Index, object, object]] = {}  # with what the ids are of, so that they stay theirs


def _indexed(layers: Sequence[str], rules: Sequence[Rule]) -> Index:
    originals: Side = {}
    parts: Side = {}
    for rule in rules or same(*layers):
        originals.setdefault(rule.original, []).append((rule, 0))
        for part, (name, _) in enumerate(rule.parts):
            parts.setdefault(name, []).append((rule, part))
    return Index(_flat(layers), (_flat(originals), originals), (_flat(parts), parts))


def table(
    rules: Sequence[Rule],
    encoders: Mapping[str, Encoder],
    *,
    denoisers: Sequence[str] = ("transformer",),
    layers: Sequence[str] = (),
    flat_is_diffusers: bool = False,
    yields: bool = False,
    unread: Mapping[str, str] | None = None,
) -> Table:
    """A family of which one set of rules names all denoisers. `layers` are diffusers' templates if there are more than in the rules."""
    layers = layers or tuple(dict.fromkeys(name for rule in rules for name, _ in rule.parts))
    components = {**dict.fromkeys(denoisers, layers), **{name: encoder.layers for name, encoder in encoders.items()}}
    return Table(components, dict.fromkeys(denoisers, rules), encoders, flat_is_diffusers, yields, unread=unread or {})


def renamed(names: Mapping[str, str | Sequence[str]]) -> tuple[Rule, ...]:
    """Rules from {original: diffusers' layer, or the layers that share its rows equally}."""
    parts = {original: (layers,) if isinstance(layers, str) else layers for original, layers in names.items()}
    return tuple(Rule(original, tuple((name, 1) for name in layers)) for original, layers in parts.items())


def same(*names: str) -> tuple[Rule, ...]:
    """Rules of layers that are called the same in both programs."""
    return renamed({name: name for name in names})


def within(original: str, diffusers: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of what is inside a block, for the block."""
    return tuple(
        replace(rule, original=original + rule.original, parts=tuple((diffusers + n, s) for n, s in rule.parts))
        for rule in rules
    )


def respelt(rules: Iterable[Rule], spelling: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules of the same layers in another program's spelling of the original's names: {what is in a name: what it is there}."""
    spelt = []
    for rule in rules:
        name = rule.original
        for old, new in spelling.items():
            name = name.replace(old, new)
        spelt += [replace(rule, original=name)] if name != rule.original else []
    return tuple(spelt)


def _rules(rules: tuple[Flat, Side], layer: str, aspect: int | None) -> list[tuple[Rule, int]]:
    index, side = rules
    match = _find(index, layer.replace(".", "_"))
    if match is None or layer not in (names := _filled(match)):
        return []
    template, numbers = match[0][names.index(layer)], match[1]
    return [(rule.filled(numbers), part) for rule, part in side[template] if rule.aspect in (None, aspect)]


def _filled(match: tuple[list[str], list[str]] | None) -> list[str]:
    """The names of templates with these numbers in them."""
    return [template.format(*match[1]) for template in match[0]] if match else []


def _find(index: Flat, flat: str) -> tuple[list[str], list[str]] | None:
    """The templates and the numbers in them that give a flat name."""
    shape, numbers = _shape(flat)
    for mask, templates in index.get(shape, {}).items():
        literal = tuple(number for number, fixed in zip(numbers, mask, strict=True) if fixed)
        if literal in templates:
            return templates[literal], [number for number, fixed in zip(numbers, mask, strict=True) if not fixed]
    return None


@functools.lru_cache(1 << 16)
def _shape(flat: str) -> tuple[str, tuple[str, ...]]:
    """A flat name with # for each number (a template's placeholders too), and the numbers."""
    return _NUMBER.sub("#", flat), tuple(_NUMBER.findall(flat))


def _flat(templates: Iterable[str]) -> Flat:
    index: Flat = {}
    for template in templates:
        shape, numbers = _shape(template.replace(".", "_"))
        mask = tuple(number != "{}" for number in numbers)
        literal = tuple(number for number in numbers if number != "{}")
        index.setdefault(shape, {}).setdefault(mask, {}).setdefault(literal, []).append(template)
    return index
