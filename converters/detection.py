"""Which format and which families a file's names and shapes fit. Reads the header only.

Every format's way to take keys apart is tried, and every family's tables: the family that knows the most layers is the file's. Where several know
as many, the metadata decide, then the sizes of published models, then ratios of shapes, then whose own spelling it is. What is the size of another
published model, or has names that no table knows, is of a family that is not known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from converters.families import TABLES, Table
from converters.families.text import CLIP, T5
from converters.formats import FORMATS, Format, Part
from converters.formats.wrappers import all_unwrapped
from converters.rows import aspect
from converters.sizes import Layers as Sized
from converters.sizes import grouped, published
from diffpeft.bundle import Handle
from diffpeft.errors import UnknownKeysError, listed
from diffpeft.methods.shapes import extent

Spelt = tuple[str, str]  # what says the component, the layer as the format spells it
Layers = dict[Spelt, dict[str, Handle]]
# where a file written here says its family; and the component and the format, where its keys do not
HINT, COMPONENT, FORMAT = "diffpeft.family", "diffpeft.component", "diffpeft.format"
# what metadata say, in any of these places: {family: pattern}
_PLACES = (HINT, "modelspec.architecture", "ss_base_model_version")
_SAID = {
    "sdxl_refiner": r".*xl.*refiner",
    "sdxl": r"stable-diffusion-xl|sdxl|sd_?xl",
    "sd3": r"stable-diffusion-3|sd_?3",
    "sd2": r"stable-diffusion-v2|sd_?(v?2)",
    "sd15": r"stable-diffusion-v1|sd_?(v?1)",
    "flux2": r"flux[-_. ]?2",
    "flux": r"flux",
    "chroma": r"chroma",
    "wan": r"wan",
    "qwen_image": r"qwen",
    "z_image": r"z[-_ ]?image",
    "lumina2": r"lumina",
    "hunyuan_video": r"hunyuan[-_ ]?video",
    "pixart": r"pixart",
    "sana": r"sana",
    "auraflow": r"aura|pony[-_ ]?v?7",
    "ltx2": r"ltx[-_. ]?v?2(?!b)",
    "ltx": r"ltx",
    "mochi": r"mochi",
    "cogvideox": r"cogvideo",
    "hidream": r"hidream",
}
# rows a column of layers whose names several families have
_RATIOS: dict[str, dict[str, Fraction | int]] = {
    r"single_blocks[._]\d+[._]linear1": {"flux": 7, "chroma": 7, "hunyuan_video": 7, "flux2": 9},
    r"single_blocks[._]\d+[._]linear2": {"flux": Fraction(1, 5), "chroma": Fraction(1, 5), "flux2": Fraction(1, 4)},
    r"double_blocks[._]\d+[._](img|txt)_mlp[._]0": {"flux": 4, "chroma": 4, "flux2": 6},
    r"(layers|refiner)[._]\d+[._]attention[._]qkv": {"lumina2": Fraction(5, 3), "z_image": 3},
}
_UNETS = ("sd15", "sd2", "sdxl", "sdxl_refiner")
_WIDTHS = {768: ("sd15",), 1024: ("sd2",), 2048: ("sdxl",), 1280: ("sdxl_refiner",)}
_INPUTS = ("lora_A", "hada_w1_b", "diff")  # roles whose second axis is the layer's inputs
_CROSS = re.compile(r".*transformer_blocks[._]\d+[._]attn2[._]to_[kv]")
_XL = re.compile(
    r".*attentions?[._].*transformer_blocks[._][1-9]|.*_blocks?[._]\d.*transformer_blocks[._][1-9]|add_embedding|label_emb"
)
# the share of a file's layers that a family's table must know; of UNets, which people change, half if it is only a few that it does not know
_MOST, _HALF, _FEW = 0.9, 0.5, 8
_NOT_XL = re.compile(r"(down|up)_blocks[._]3|down_blocks[._]0[._]attentions")


@dataclass(frozen=True)
class Detection:
    """What a file is: its format, its likeliest family, the methods in it, how sure that is (0 to 1), and the other families that fit."""

    format: str
    family: str
    methods: frozenset[str]
    confidence: float
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What a file fits. `families`, the likeliest first; `ambiguous` if the first of them was only the first: the names say nothing.

    No family: it is not known here, and `looks_like` may name the models without a table whose layers these are. `known` {family: how many layers it
    knows}, of `layers`; `parts` are the keys that are an adapter's, taken apart. `opened` is the file itself.
    """

    format: str
    families: tuple[str, ...]
    ambiguous: bool
    looks_like: tuple[str, ...]
    known: Mapping[str, int]
    layers: int
    parts: Mapping[str, Part]
    opened: tuple[dict[str, Handle], dict[str, str], str]  # its tensors, its metadata and where it is

    def confidence(self, keys: int) -> float:
        """The share of a file's keys that are an adapter's, times that of the layers that the family knows; a half without a family."""
        share = self.known.get(self.families[0], 0) / max(self.layers, 1) if self.families and self.families[0] else 0.5
        return len(self.parts) / max(keys, 1) * share


def fit(
    tensors: dict[str, Handle],
    metadata: dict[str, str],
    source: str,
    format: str | None = None,
    family: str | None = None,
) -> Fit:
    """What a file fits; `format` and `family` are known, and not looked for. Raises UnknownKeysError if no key is of any format."""
    parts = _most(tensors, [format] if format else list(FORMATS), source)
    formats = [f for f in parts if f == metadata.get(FORMAT)] or list(parts)
    formats = [f for f in formats if FORMATS[f].owned & metadata.keys()] or formats
    alike: dict[frozenset[Spelt], list[str]] = {}  # the formats that take the keys apart alike
    for name in formats:
        alike.setdefault(frozenset((part.word, part.layer) for part in parts[name].values()), []).append(name)
    tried = [
        (names, layers := _layers(tensors, parts[names[0]]), _counts(layers, FORMATS[names[0]], metadata))
        for names in alike.values()
    ]
    formats, layers, counts = max(tried, key=lambda t: max(t[2].values(), default=0))
    fits = _by_ratio(list(counts), layers) or [*counts]
    counts = {family: n for family, n in counts.items() if family in fits}
    most = max(counts.values(), default=0)
    fitting = [family for family in TABLES if most and counts.get(family) == most]
    own = _Own(layers, metadata, FORMATS[formats[0]].tables)
    families, ambiguous, looks_like = _decided(fitting, counts, layers, metadata, formats, own)
    best = family or (families[0] if families else "")
    able = [f for f in formats if {*([family] if family else families)} <= {*FORMATS[f].tables}] or formats
    chosen = able[0] if len(able) == 1 or not best else max(able, key=lambda f: own(f, best))
    return Fit(chosen, families, ambiguous, looks_like, counts, len(layers), parts[chosen], (tensors, metadata, source))


def _layers(tensors: Mapping[str, Handle], parts: Mapping[str, Part]) -> Layers:
    """{(what says the component, layer): {role: handle}}; of a part of a layer only the name counts."""
    layers: Layers = {}
    for key, part in parts.items():
        own = layers.setdefault((part.word, part.layer), {})
        if part.part is None:
            own[part.role] = tensors[key]
    return layers


def _most(keys: Collection[str], formats: Collection[str], source: str) -> dict[str, dict[str, Part]]:
    """{format: the keys that it takes apart}, of the formats that most keys are of."""
    found: dict[str, dict[str, Part]] = {}
    done: dict[Any, dict[str, Part]] = {}  # formats that share the way need it once
    bare_keys = all_unwrapped(keys)
    some = [*bare_keys.values()][:: max(len(keys) // 16, 1)]
    likely = sorted(formats, key=lambda f: sum(FORMATS[f].split(key) is None for key in some))
    for name in likely:  # the rest is then done with at its first key
        fmt = FORMATS[name]
        way = type(fmt).split
        if way not in done:
            every = any(len(parts) == len(keys) for parts in done.values())  # then one key less is too few
            done[way] = {}
            for key, bare_key in bare_keys.items():
                if part := fmt.split(bare_key):
                    done[way][key] = part
                elif every:
                    break
        found[name] = done[way]
    found = {name: found[name] for name in formats}
    most = max(map(len, found.values()), default=0)
    if not most:
        raise UnknownKeysError(
            "this holds no adapter that is known here",
            where=f"{source}: {listed(list(keys)[:3])}{' ...' if len(keys) > 3 else ''}",
            remedy=f"Readable are the formats {', '.join(FORMATS)}.",
        )
    return {name: parts for name, parts in found.items() if len(parts) == most}


def bare(table: Table, layers: Collection[str], fmt: Format, metadata: Mapping[str, str]) -> str:
    """The component that layers without one are of: what the metadata say, else the first of those that know most.

    The names of language models say nothing.
    """
    if metadata.get(COMPONENT) in table.components:
        return metadata[COMPONENT]
    own = [c for c in table.components if c not in table.encoders or table.encoders[c].layers in (CLIP, T5)]
    counts = {c: sum(known(fmt, table, c, layer) != "" for layer in layers) for c in own}
    best = max(counts, key=counts.__getitem__, default="")
    return best if counts.get(best) else ""


def known(fmt: Format, table: Table, component: str, layer: str) -> str:
    """In whose names a family has a layer, "original" or "diffusers"; empty if it does not have it."""
    if component in table.encoders:
        return "diffusers" if table.encoded(component, layer, fmt.flat) else ""
    names = ("original", "diffusers") if fmt.original(table) else ("diffusers", "original")
    for name in names:
        if fmt.flat:
            found = (table.dotted if name == "diffusers" else table.original_dotted)(component, layer) is not None
        else:
            found = (table.knows if name == "diffusers" else table.is_original)(component, layer)
        if found:
            return name
    return ""


def _counts(layers: Collection[Spelt], fmt: Format, metadata: Mapping[str, str]) -> dict[str, int]:
    """{family: how many of the layers it knows}. Names are first compared without their numbers, which spares most of the work."""
    shapes = Counter((word, re.sub(r"\d+", "#", layer.replace(".", "_"))) for word, layer in layers)
    rough: dict[str, int] = {}
    for family, table in fmt.tables.items():
        patterns = {c: table.patterns(c) for c in table.components}
        everything = frozenset().union(*patterns.values())
        n = 0
        for (word, shape), count in shapes.items():
            own = patterns.get(fmt.component(word, table), frozenset()) if word else everything
            n += count * bool(own & {shape, f"text_model_{shape}", shape.removeprefix("model_")})
        rough[family] = n
    counts: dict[str, int] = {}
    for family in sorted(rough, key=lambda f: -rough[f]):
        if rough[family] <= 0 or rough[family] < max(counts.values(), default=0):
            break
        table = fmt.tables[family]
        twin = next((f for f in counts if fmt.tables[f].is_named_as(table)), None)
        if twin:
            counts[family] = counts[twin]
            continue
        component = bare(table, [layer for word, layer in layers if not word], fmt, metadata)
        counts[family] = sum(
            known(fmt, table, fmt.component(word, table) if word else component, layer) != "" for word, layer in layers
        )
    return counts


class _Own:
    """How many layers are spelt as a format would spell a family's: counted when it is asked for."""

    def __init__(self, layers: Collection[Spelt], metadata: Mapping[str, str], tables: Mapping[str, Table]):
        self.layers, self.metadata, self.tables = layers, metadata, tables
        self.counts: dict[tuple[str, str], int] = {}

    def __call__(self, format: str, family: str) -> int:
        at = format, family
        if at not in self.counts:
            table = self.tables.get(family)
            self.counts[at] = _own(FORMATS[format], table, self.layers, self.metadata) if table else 0
        return self.counts[at]


class _Verdict(NamedTuple):
    """The families in order, whether the first is a mere guess, and the models without a table that the layers are of instead."""

    families: tuple[str, ...]
    ambiguous: bool = False
    looks_like: tuple[str, ...] = ()


def _decided(
    fitting: list[str],
    counts: Mapping[str, int],
    layers: Layers,
    metadata: Mapping[str, str],
    formats: list[str],
    own: _Own,
) -> _Verdict:
    """Which of the families whose tables know most layers a file is of."""
    fmt = FORMATS[formats[0]]
    best = [family for family in fitting if family in _said(metadata)] or fitting
    denoiser = _denoiser_layers(fmt, fmt.tables[best[0]] if best else Table({}), layers, metadata)
    if not best:
        return _Verdict((), looks_like=_named(grouped(denoiser)))
    spelt = lambda family: max(own(name, family) for name in formats)  # noqa: E731
    if not denoiser:  # text encoders have the same names everywhere
        return _Verdict(tuple(sorted(fitting, key=lambda f: (f not in best, -spelt(f)))))
    share = counts[best[0]] / len(layers)
    if set(best) <= set(_UNETS):
        few = len(layers) - counts[best[0]] <= _FEW
        return _Verdict(_unets(best, layers, formats) if share >= _MOST or (few and share >= _HALF) else ())
    if metadata.get(HINT) not in best:
        best, others = _by_size(best, share, grouped(denoiser))
        if not best:
            return _Verdict((), looks_like=others)
    if len(best) > 1:
        most = max(map(spelt, best))
        best = [family for family in best if spelt(family) == most]
    return _Verdict(tuple(best), len(best) > 1 and not _alike(best, fmt, layers, metadata))


def _unets(families: list[str], layers: Layers, formats: list[str]) -> tuple[str, ...]:
    """Of UNets those whose widths and levels these are."""
    best = _by_width(families, layers) or families
    if any(re.match(r"(input|middle|output)_block", layer) for _, layer in layers):  # in flat files SDXL's
        tables = FORMATS[formats[0]].tables
        best = [family for family in best if any(FORMATS[f].original(tables[family]) for f in formats)] or best
    return tuple(best)


def _denoiser_layers(
    fmt: Format, table: Table, layers: Layers, metadata: Mapping[str, str]
) -> list[tuple[str, tuple[int, int] | None]]:
    """The layers that are of no text encoder, with their rows and columns."""
    alone = bare(table, [layer for word, layer in layers if not word], fmt, metadata)
    components = {word: fmt.component(word, table) if word else alone for word, _ in layers}
    return [
        (layer, _extent(tensors))
        for (word, layer), tensors in layers.items()
        if not components[word].startswith("text_encoder")
    ]


def _by_size(families: list[str], share: float, layers: Sized) -> tuple[list[str], tuple[str, ...]]:
    """Of families whose tables know a `share` of the layers, those of whose published models they can be, and the models without a table whose they
    are instead. Layers of no published size are of the families that have their names.
    """
    exact = [model for model in published() if model.has(layers)]
    ours = [model for model in exact if model.family in families]
    full = [model for model in ours if model.is_full(layers)]
    others = [model for model in exact if not model.family]
    if ours and (full or not any(model.is_whole(layers) for model in others)):
        told = {model.family for model in full or ours}
        return [family for family in families if family in told], ()
    if others:
        return [], tuple(model.name for model in others if model.is_whole(layers)) or tuple(m.name for m in others)
    lost = (1 - share) * len(layers)
    nearer = tuple(m.name for m in published() if not m.family and len(layers) - m.knows(layers) < lost - 0.5)
    if nearer or share < _MOST:
        return [], nearer
    return _by_depth(families, layers) or families, ()


def _named(layers: Sized) -> tuple[str, ...]:
    """The models without a table that have all these names."""
    return tuple(m.name for m in published() if len(layers) and not m.family and m.knows(layers) == len(layers))


def _by_depth(families: list[str], layers: Sized) -> list[str]:
    """Without those whose published models all have fewer blocks."""
    deepest: dict[tuple[str, str], int] = {}
    for model in published():
        for stack, n in ((stack, n) for depths in model.depths for stack, n in depths.items()):
            deepest[model.family, stack] = max(deepest.get((model.family, stack), 0), n)
    return [
        family
        for family in families
        if all(max(numbers) < deepest.get((family, stack), 1 << 30) for stack, numbers in layers.blocks.items())
    ]


def _alike(families: Collection[str], fmt: Format, layers: Layers, metadata: Mapping[str, str]) -> bool:
    """Whether families call these layers the same in both programs: then nothing depends on which it is."""
    kinds: dict[Any, tuple[str, str, int | None]] = {}
    for (word, layer), found in layers.items():
        ratio = aspect({role: h.shape for role, h in found.items()})
        kinds.setdefault((word, re.sub(r"\d+", "#", layer), ratio), (word, layer, ratio))
    readings = []
    for table in (fmt.tables[family] for family in families):
        alone = bare(table, [layer for word, layer in layers if not word], fmt, metadata)
        components = {word: fmt.component(word, table) if word else alone for word, _ in layers}
        readings.append([_place(table, components[word], layer, fmt, ratio) for word, layer, ratio in kinds.values()])
    return all(reading == readings[0] for reading in readings)


def _place(table: Table, component: str, layer: str, fmt: Format, ratio: int | None) -> tuple[str, Any]:
    """The component, and the layer's rule with the part of it that it is, however it is spelt; an encoder's layer."""
    if component in table.encoders:
        return component, table.encoded(component, layer, fmt.flat)
    flat = layer.replace(".", "_")
    if known(fmt, table, component, layer) == "original":
        return component, table.to_diffusers(component, table.original_dotted(component, flat) or layer, ratio)
    return component, table.to_original(component, table.dotted(component, flat) or layer, ratio)


def _own(fmt: Format, table: Table, layers: Collection[Spelt], metadata: Mapping[str, str]) -> int:
    """How many layers are spelt as this format would spell them."""
    component = bare(table, [layer for word, layer in layers if not word], fmt, metadata)
    n = 0
    for word, layer in layers:
        own = fmt.component(word, table) if word else component
        names = "original" if fmt.original(table) and own in table.rules else "diffusers"
        n += fmt.word(own, table) == word and own in table.components and known(fmt, table, own, layer) == names
    return n


def _said(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The families that the metadata name."""
    for place in _PLACES:
        text = metadata.get(place, "").lower()
        if text in TABLES:
            return (text,)
        for family, pattern in _SAID.items():
            if text and re.match(pattern, text):
                return (family,)
    return ()


def _by_width(families: list[str], layers: Mapping[Spelt, Mapping[str, Handle]]) -> list[str]:
    """Of UNets: by the depth of transformers, the number of text encoders, the width of the cross-attention and which levels there are."""
    if not set(families) <= set(_UNETS):
        return families
    xl = any(
        _XL.match(layer) or re.match(r"lora_te2_|text_encoder_2|text_encoders\.clip_g", word) for word, layer in layers
    )
    crosses = [found for (_, layer), found in layers.items() if _CROSS.match(layer)]
    widths = {h.shape[1] for found in crosses for role, h in found.items() if role in _INPUTS and len(h.shape) > 1}
    if widths:
        told = _WIDTHS.get(min(widths), ("sdxl", "sdxl_refiner") if xl else ("sd15",))
        return [f for f in families if f in told] or families
    if xl:
        return [f for f in families if f in ("sdxl", "sdxl_refiner")]
    return [f for f in families if f in ("sd15", "sd2") or not any(_NOT_XL.match(layer) for _, layer in layers)]


def _by_ratio(families: list[str], layers: Mapping[Spelt, Mapping[str, Handle]]) -> list[str]:
    """Without those whose layers have another ratio of rows to columns: a wrong family, whatever somebody says."""
    wrong = set()
    for (_, layer), found in layers.items():
        for pattern, ratios in _RATIOS.items():
            if re.search(pattern + "$", layer) and (e := _extent(found)):
                wrong |= {family for family, ratio in ratios.items() if Fraction(e[0], e[1]) != ratio}
    return [family for family in families if family not in wrong]


def _extent(found: Mapping[str, Handle]) -> tuple[int, int] | None:
    return extent({role: h.shape for role, h in found.items()})
