"""The reading side's first step: which layers a file's keys are for, by the family's tables and by a model's own names where a model is known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffpeft import io
from diffpeft.bundle import COMPONENTS, Handle, Rule, canonical, dotted
from diffpeft.converters.detection import COMPONENT, bare
from diffpeft.converters.families import Table
from diffpeft.converters.formats import Format, KeyParts
from diffpeft.converters.formats.peft import WEIGHTS
from diffpeft.converters.formats.wrappers import all_unwrapped
from diffpeft.converters.roles import OLD_OFT
from diffpeft.converters.rows import aspect
from diffpeft.errors import CheckpointError, listed

Names = Mapping[
    str, Iterable[str] | Mapping[str, tuple[int, ...]]
]  # {component: layers}, with the shapes of their weights or without
Spelt = tuple[str, str, int | None]  # what says the component, the layer as the format spells it, the part of it
Keyed = dict[str, tuple[str, Handle]]  # one layer's tensors: {role: (key, handle)}
Place = tuple[str, Rule | None]  # the canonical layer, and its rule if it is a joint one
NUMBERS = ("alpha", "on_input")  # roles that are numbers


@dataclass(frozen=True)
class Reading:
    """What a file is read by: its format, its family's table, a model's own names, its metadata, and where it is."""

    fmt: Format
    table: Table
    names: Names
    metadata: Mapping[str, str]
    where: str


def placed(tensors: Mapping[str, Handle], parts: Mapping[str, KeyParts], by: Reading) -> dict[Place, Keyed]:
    """The tensors of each layer, of those that the format takes apart into `parts`."""
    layers = _by_layer(tensors, parts)
    words = dict.fromkeys(word for word, _, _ in layers)
    unsaid = _unsaid_component([layer for word, layer, _ in layers if not word], by)
    components = {word: _component(word, by) if word else unsaid for word in words}
    spelt: dict[str, list[str]] = {}
    for word, layer, _ in layers:
        spelt.setdefault(components[word], []).append(layer)
    spellings = {component: _Spelling(by, component, names) for component, names in spelt.items()}
    places: dict[Place, Keyed] = {}
    for (word, layer, number), keyed in layers.items():
        ratio = aspect({role: handle.shape for role, (_, handle) in keyed.items()})
        place = spellings[components[word]].place(layer, number, ratio)
        _add(places.setdefault(place, {}), keyed)
    return {place: _as_today(keyed) for place, keyed in places.items()}


def _by_layer(tensors: Mapping[str, Handle], parts: Mapping[str, KeyParts]) -> dict[Spelt, Keyed]:
    """The tensors of each layer as it is spelt. What stands beside numbered parts of a layer, an alpha, is each part's."""
    numbers = [key for key, part in parts.items() if part.role in NUMBERS]
    held = dict(zip(numbers, io.held(tensors[key] for key in numbers), strict=True))
    layers: dict[Spelt, Keyed] = {}
    for key, handle in tensors.items():
        if part := parts.get(key):
            _add(layers.setdefault((part.word, part.layer, part.part), {}), {part.role: (key, held.get(key, handle))})
    numbered = [spelt for spelt in layers if spelt[2] is not None]
    beside = {(word, layer): layers.pop((word, layer, None), {}) for word, layer in {spelt[:2] for spelt in numbered}}
    for word, layer, number in numbered:
        _add(layers[word, layer, number], beside[word, layer])
    return layers


def _add(keyed: Keyed, more: Keyed) -> None:
    """Add tensors to those of a layer. Raises CheckpointError for a role that it has already."""
    for role, (key, handle) in more.items():
        if role in keyed:
            raise CheckpointError("two keys name the same tensor", where=listed([keyed[role][0], key]))
        keyed[role] = (key, handle)


def _as_today(keyed: Keyed) -> Keyed:
    """PEFT's rotations of before 0.16 as what they are: up to 0.13 LyCORIS's of the output with another sign and scale; then, with `oft_s`, a
    BOFT of one stage (formats: PEFT's sources of these versions).
    """
    if "oft_r" not in keyed:
        return keyed
    key, blocks = keyed["oft_r"]
    others = {role: tensor for role, tensor in keyed.items() if role not in OLD_OFT}
    if "oft_s" in keyed:
        return {"boft_R": (key, io.reshaped(blocks, (1, *blocks.shape))), "boft_s": keyed["oft_s"], **others}
    return {"oft_blocks": (key, io.scaled(blocks, -0.5)), **others}


def literal(keys: Iterable[str], fmt: Format, names: Names) -> dict[str, KeyParts]:
    """Keys that would be taken for wrapped, taken apart as they stand, where the model has a layer of that name."""
    wrapped = [key for key, bare_key in all_unwrapped([*keys]).items() if bare_key != key] if names else []
    layers = {name for names_ in names.values() if wrapped for layer in names_ for name in (layer, flat(layer))}
    return {key: part for key in wrapped if (part := fmt.split(key)) and part.layer in layers}


def flat(name: str) -> str:
    """A layer's name with underscores for dots."""
    return name.replace(".", "_")


def _unsaid_component(layers: Sequence[str], by: Reading) -> str:
    """The component that layers without one are of: the one that the metadata name, the one that the file is called after if its names fit, the
    model's that has most of them, its only one, or the family's.
    """
    if not layers:
        return ""
    told = by.metadata.get(COMPONENT, "")
    if told in COMPONENTS and (told in by.names or len(by.names) > 1):
        return told
    hits = {component: _hits(component, names, {*map(flat, layers)}) for component, names in by.names.items()}
    path = Path(by.where).parent if Path(by.where).name == WEIGHTS else Path(by.where)
    if hits.get(called := path.name.removesuffix(".safetensors")):
        return called
    best = max(hits, key=hits.__getitem__, default="")
    return best if len(hits) == 1 or hits.get(best) else bare(by.table, layers, by.fmt, by.metadata)


def _hits(component: str, names: Iterable[str], layers: Collection[str]) -> int:
    """How many flat names are a component's layers; without the level of CLIP's names only if none is with it."""
    spelt = {flat(each) for name in names for each in (name, canonical(component, name))}
    return len(spelt.intersection(layers)) or len(
        {flat(n.removeprefix("text_model.")) for n in names}.intersection(layers)
    )


def _component(word: str, by: Reading) -> str:
    """The component that a word means: of several denoisers with one word the one that the metadata name, or the file is called after. Of a denoiser
    that the model calls otherwise than the family the only one that it has.
    """
    component = by.fmt.component(word, by.table)
    said = by.metadata.get(COMPONENT)  # of a half by diffusers' names too, which stock diffusers reads as the first
    told = said or Path(by.where).name.removesuffix(".safetensors")
    alike = not word.startswith(component) or (said is not None and component == next(iter(by.table.rules), ""))
    if {component, told} <= by.table.rules.keys() and alike and told in (by.names or (told,)):
        component = told
    encodes = component.startswith("text_encoder") or component in by.table.encoders
    denoisers = [name for name in by.names if not name.startswith("text_encoder")]
    if component in by.names or encodes or word.startswith(component) or not denoisers:
        return component
    return denoisers[0]


class _Spelling:
    """How a file spells one component's layers: a model's own names, where a model is known, and the family's tables, of which one program's are the
    file's. A name that both have, for other layers, means what it means in the file's spelling.
    """

    def __init__(self, by: Reading, component: str, layers: Sequence[str]):
        self.fmt, self.table, self.component = by.fmt, by.table, component
        self.names = {flat(name): name for name in by.names.get(component, ())}
        told = [(self._in_model(n) is not None, self._is_original(n)) for n in layers] if self.names else []
        self.votes = told.count((False, True)) - told.count((True, False))  # above 0 for the original's names

    def place(self, layer: str, number: int | None, aspect: int | None) -> Place:
        """The canonical layer behind a spelt one, and its rule if it is one of the original program's whose rows are not a layer of diffusers'.

        A name that nobody knows stays as it is: whoever needs the layer will miss it and say so.
        """
        name, original = self._in_model(layer), self._is_original(layer)
        if name is not None and not (original and self._is_meant(name)):
            return canonical(self.component, name), None
        if original and (place := self._by_rule(layer, number, aspect)):
            return place
        if self.component in self.table.encoders:
            layer = self.table.encoded(self.component, layer, self.fmt.flat) or layer
        elif self.fmt.flat:
            layer = self.table.dotted(self.component, layer) or layer
        return canonical(self.component, layer), None

    def _by_rule(self, layer: str, number: int | None, aspect: int | None) -> Place | None:
        """Where an original's layer is, or its part of a number; None if it has rules for other shapes alone."""
        name = self.table.original_dotted(self.component, flat(layer)) or layer
        rule = self.table.to_diffusers(self.component, name, aspect)
        if rule is None:
            return None
        part = number if number is not None and number < len(rule.parts) else 0 if rule.renames else None
        return (
            (dotted(self.component, name), rule)
            if part is None
            else (dotted(self.component, rule.parts[part][0]), None)
        )

    def _in_model(self, layer: str) -> str | None:
        """The model's layer of this name."""
        if self.fmt.flat:
            return self.names.get(layer) or self.names.get(layer.removeprefix("text_model_"))
        return layer if self.names.get(flat(layer)) == layer else None

    def _is_meant(self, name: str) -> bool:
        """Whether a name that is also the model's is the original's here: as most of the file's are, or the format's, or where the table has no other."""
        if self.votes:
            return self.votes > 0
        return self.fmt.original(self.table) or not self.table.knows(self.component, name)

    def _is_original(self, layer: str) -> bool:
        """Whether the name is the original program's, whatever else it is."""
        if self.component not in self.table.rules:
            return False
        if self.fmt.flat:
            return self.table.original_dotted(self.component, flat(layer)) is not None
        return self.table.is_original(self.component, layer)
