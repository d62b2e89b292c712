"""Which format and which families a file's names and shapes fit. Reads the header only.

Every format's way to take keys apart is tried, and every family's tables: the family that knows the most layers is the file's. Where several know
as many, the metadata decide, then the sizes of published models, then ratios of shapes, then whose own spelling it is. What is the size of another
published model, or has names that no table knows, is of a family that is not known.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from diffpeft.bundle import Handle
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.families.text import CLIP, T5
from diffpeft.converters.formats import FORMATS, Format, KeyParts
from diffpeft.converters.formats.wrappers import all_unwrapped
from diffpeft.converters.roles import split
from diffpeft.converters.rows import aspect
from diffpeft.converters.sizes import LayerKinds, Published, grouped, published
from diffpeft.errors import UnknownKeysError, listed
from diffpeft.methods.layout import named
from diffpeft.methods.shapes import extent, width
from diffpeft.readable import Readable

Spelt = tuple[str, str]  # what says the component, the layer as the format spells it
Layers = dict[Spelt, dict[str, Handle]]
# where a file written here says its family; and the component and the format, where its keys do not
HINT, COMPONENT, FORMAT = "diffpeft.family", "diffpeft.component", "diffpeft.format"
NO_FAMILY = "none"  # what a file says whose model was of no family that is known, whatever its layers are called
# what metadata say, in any of these places: {family: pattern}
_PLACES = (HINT, "modelspec.architecture", "ss_base_model_version")
_TOLD = (*_PLACES, COMPONENT, FORMAT)  # all metadata that are looked into
_SAID = {
    "sdxl_refiner": r".*xl.*refiner",
    "sdxl": r"stable-diffusion-xl|sdxl|sd_?xl",
    "sd3": r"stable-diffusion-3|sd_?3",
    "sd2": r"stable-diffusion-v2|sd_?(v?2)",
    "sd15": r"stable-diffusion-v1|sd_?(v?1)",
    "flux2": r"flux[-_. ]?2",
    "flux3": r"flux[-_. ]?3",
    "flux": r"flux",
    "chroma": r"chroma",
    "wan_animate2": r"wan[-_. ]?animate[-_. ]?2",
    "wan": r"wan",
    "qwen_image21": r"qwen[-_. ]?image[-_. ]?v?2[-_.]?1(?!\d)",
    "qwen_image": r"qwen",
    "z_image": r"z[-_ ]?image",
    "lumina2": r"lumina",
    "hunyuan_video15": r"hunyuan[-_ ]?video[-_ ]?1[-_.]?5",
    "hunyuan_video": r"hunyuan[-_ ]?video",
    "framepack": r"frame[-_ ]?pack",
    "hunyuan_image": r"hunyuan[-_ ]?image",
    "pixart": r"pixart",
    "sana_video": r"sana[-_ ]?video",
    "sana": r"sana",
    "auraflow": r"aura|pony[-_ ]?v?7",
    "ltx2": r"ltx[-_. ]?v?2(?!b)",
    "ltx": r"ltx",
    "mochi": r"mochi",
    "cogvideox": r"cogvideo",
    "kandinsky5": r"kandinsky[-_ ]?5",
    "skyreels_v2": r"sky[-_ ]?reels",
    "helios": r"helios",
    "chrono_edit": r"chrono[-_ ]?edit",
    "minimax_h3": r"minimax[-_ ]?h3",
    "ace_step": r"ace[-_ ]?step",
    "hidream": r"hidream(?![-_ ]?o)",
    "krea2": r"krea[-_. ]?2",
    "cosmos": r"cosmos|anima(?!te)",
    "ideogram4": r"ideogram",
    "ernie_image": r"ernie",
    "cogview4": r"cogview[-_ ]?4",
    "omnigen2": r"omnigen[-_ ]?2",
    "longcat_image": r"longcat[-_ ]?image",
    "ovis_image": r"ovis",
    "bria_fibo2": r"(bria[-_ ]?)?fibo[-_ ]?2",
    "bria_fibo": r"(bria[-_ ]?)?fibo",
    "bria": r"bria",
    "prx": r"prx",
    "glm_image": r"glm[-_ ]?image",
    "nucleus_image": r"nucleus",
}
# rows a column of layers whose names several families have
_RATIOS: dict[re.Pattern[str], dict[str, Fraction | int]] = {
    re.compile(r"single_blocks[._]\d+[._]linear1$"): {
        **dict.fromkeys(("flux", "chroma", "longcat_image", "hunyuan_video", "hunyuan_image", "framepack"), 7),
        "flux2": 9,
        "ovis_image": 11,
    },
    re.compile(r"single_blocks[._]\d+[._]linear2$"): {
        **dict.fromkeys(("flux", "chroma", "longcat_image", "hunyuan_image", "ovis_image"), Fraction(1, 5)),
        "flux2": Fraction(1, 4),
    },
    re.compile(r"double_blocks[._]\d+[._](img|txt)_mlp[._]0$"): {
        **dict.fromkeys(("flux", "chroma", "longcat_image", "hunyuan_image", "hunyuan_video15"), 4),
        "flux2": 6,
    },
    re.compile(r"(layers|refiner)[._]\d+[._]attention[._]qkv$"): {
        "lumina2": Fraction(5, 3),
        "z_image": 3,
        "ideogram4": 3,
    },
}
_NUMBER = re.compile(r"\d+")
UNETS = {768: "sd15", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}  # {width of the cross-attention: the family}
_ALONE = {width: (family,) for width, family in UNETS.items()}
_CROSS = re.compile(r".*transformer_blocks[._]\d+[._]attn2[._]to_[kv]")
_XL = re.compile(
    r".*attentions?[._].*transformer_blocks[._][1-9]|.*_blocks?[._]\d.*transformer_blocks[._][1-9]|add_embedding|label_emb"
)
_XL_WORD = re.compile(r"lora_te2_|text_encoder_2|text_encoders\.clip_g")
# the share of a file's layers that a family's table must know; of UNets, which people change, half if it is only a few that it does not know
_MOST, _HALF, _FEW = 0.9, 0.5, 8
_NOT_XL = re.compile(r"(down|up)_blocks[._]3|down_blocks[._]0[._]attentions")


@dataclass(frozen=True, repr=False)
class Detection(Readable):
    """What a file is: its format, its likeliest family, the methods in it, how sure that is (0 to 1), and the other families that fit."""

    format: str
    family: str
    methods: frozenset[str]
    confidence: float
    alternatives: tuple[str, ...] = ()


def methods_of(layers: Iterable[Mapping[str, tuple[int, ...]]]) -> frozenset[str]:
    """The methods of layers of which the shapes are given by role."""
    split_ = {(method, tuple(roles)) for shapes in layers for method, roles in split(shapes).items()}
    return frozenset(name for method, roles in split_ for name in named(method, roles))


# names and shapes; what some metadata say; which others there are
Signature = tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[tuple[str, str], ...], frozenset[str]]


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
    parts: Mapping[str, KeyParts]
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
    """What a file fits; `format` and `family` are known, and not looked for. Raises UnknownKeysError if no key is of any format.

    Files of one trainer have the same names and shapes: what the last few kinds of file fit is remembered.
    """
    fits = _fit(*signature(tensors, metadata), format, family)
    if fits is None:
        raise UnknownKeysError(
            "this holds no adapter that is known here",
            where=f"{source}: {listed(tensors, 3)}",
            remedy=f"Readable are the formats {', '.join(FORMATS)}.",
        )
    return replace(fits, opened=(tensors, metadata, source))


def signature(tensors: Mapping[str, Handle], metadata: Mapping[str, str]) -> Signature:
    """All of a file that `fit` depends on: files of one signature fit the same."""
    shapes = tuple((key, handle.shape) for key, handle in tensors.items())
    told = tuple((key, metadata[key]) for key in _TOLD if key in metadata)
    return shapes, told, _owned().intersection(metadata)


@functools.cache
def _owned() -> frozenset[str]:
    """The metadata of which it counts that they are there, whatever they say."""
    return frozenset().union(*(fmt.owned for fmt in FORMATS.values()))


@functools.lru_cache(maxsize=8)
def _fit(
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    told: tuple[tuple[str, str], ...],
    owned: frozenset[str],
    format: str | None,
    family: str | None,
) -> Fit | None:
    """`fit` by all that it depends on: names and shapes, what some metadata say, and which others there are. None if no key is of any format."""
    tensors, metadata = {key: Handle("", shape) for key, shape in shapes}, {**dict.fromkeys(owned, ""), **dict(told)}
    parts = _most(tensors, [format] if format else list(FORMATS))
    if not parts:
        return None
    formats, layers, counts = _likeliest(parts, tensors, metadata)
    fitting = _by_ratio(list(counts), layers) or [*counts]
    counts = {family: n for family, n in counts.items() if family in fitting}
    spelt_by = _Own(layers, metadata, FORMATS[formats[0]].tables)
    if metadata.get(HINT) == NO_FAMILY and not family:
        families, ambiguous, looks_like = _Verdict(())
    else:
        families, ambiguous, looks_like = _decided(counts, layers, metadata, formats, spelt_by, family)
    chosen = _format_of(formats, [family] if family else families, spelt_by)
    return Fit(chosen, families, ambiguous, looks_like, counts, len(layers), parts[chosen], ({}, {}, ""))


def _likeliest(
    parts: Mapping[str, Mapping[str, KeyParts]], tensors: Mapping[str, Handle], metadata: Mapping[str, str]
) -> tuple[list[str], Layers, dict[str, int]]:
    """Formats that take the keys apart alike, with the layers as they do and {family: how many of these it knows}: those of which a family knows most.

    Formats that the metadata name, or that alone write some of them, come before all others.
    """
    formats = [name for name in parts if name == metadata.get(FORMAT)] or list(parts)
    formats = [name for name in formats if FORMATS[name].owned & metadata.keys()] or formats
    alike: dict[frozenset[Spelt], list[str]] = {}
    for name in formats:
        alike.setdefault(frozenset((part.word, part.layer) for part in parts[name].values()), []).append(name)
    tried = []
    for names in alike.values():
        layers = _layers(tensors, parts[names[0]])
        tried.append((names, layers, _counts(layers, FORMATS[names[0]], metadata)))
    return max(tried, key=lambda row: max(row[2].values(), default=0))


def _format_of(formats: Sequence[str], families: Sequence[str], spelt_by: _Own) -> str:
    """Of formats that take the keys apart alike the first that is for these families; of several the one that would spell most layers so."""
    able = [name for name in formats if {*families} <= FORMATS[name].tables.keys()] or formats
    return able[0] if len(able) == 1 or not families else max(able, key=lambda name: spelt_by(name, families[0]))


def _layers(tensors: Mapping[str, Handle], parts: Mapping[str, KeyParts]) -> Layers:
    """{(what says the component, layer): {role: handle}}; of a part of a layer only the name counts."""
    layers: Layers = {}
    for key, part in parts.items():
        roles = layers.setdefault((part.word, part.layer), {})
        if part.part is None:
            roles[part.role] = tensors[key]
    return layers


def _most(keys: Collection[str], formats: Collection[str]) -> dict[str, dict[str, KeyParts]]:
    """{format: the keys that it takes apart}, of the formats that most keys are of; empty if none is of any."""
    bare_keys = all_unwrapped(keys)
    sample = [*bare_keys.values()][:: max(len(keys) // 16, 1)]
    ways: dict[object, dict[str, KeyParts]] = {}  # formats that share the way need it once
    for name in sorted(
        formats, key=lambda f: sum(FORMATS[f].split(key) is None for key in sample)
    ):  # likely ones first
        way = type(FORMATS[name]).split
        if way not in ways:
            all_taken = any(len(parts) == len(keys) for parts in ways.values())  # then one key less is too few
            ways[way] = _taken_apart(bare_keys, FORMATS[name], all_taken)
    apart = {name: ways[type(FORMATS[name]).split] for name in formats}
    most = max(map(len, apart.values()), default=0)
    return {name: parts for name, parts in apart.items() if len(parts) == most > 0}


def _taken_apart(bare_keys: Mapping[str, str], fmt: Format, every: bool) -> dict[str, KeyParts]:
    """The keys that a format takes apart, of {key: without wrappers}; `every`: up to the first that it does not."""
    parts: dict[str, KeyParts] = {}
    for key, bare_key in bare_keys.items():
        if part := fmt.split(bare_key):
            parts[key] = part
        elif every:
            break
    return parts


def bare(table: Table, layers: Collection[str], fmt: Format, metadata: Mapping[str, str]) -> str:
    """The component that layers without one are of: what the metadata say, else the first of those that know most.

    The names of language models say nothing.
    """
    if metadata.get(COMPONENT) in table.components:
        return metadata[COMPONENT]
    candidates = [c for c in table.components if c not in table.encoders or table.encoders[c].layers in (CLIP, T5)]
    counts = {c: sum(known(fmt, table, c, layer) != "" for layer in layers) for c in candidates}
    best = max(counts, key=counts.__getitem__, default="")
    return best if counts.get(best) else ""


def known(fmt: Format, table: Table, component: str, layer: str) -> str:
    """In whose names a family has a layer, "original" or "diffusers"; empty if it does not have it."""
    if component in table.encoders:
        return "diffusers" if table.encoded(component, layer, fmt.flat) else ""
    tests = {
        "diffusers": (table.knows, table.dotted),
        "original": (table.is_original, table.original_dotted),
    }
    for name in ("original", "diffusers") if fmt.original(table) else ("diffusers", "original"):
        dotted_, flat = tests[name]
        if flat(component, layer) is not None if fmt.flat else dotted_(component, layer):
            return name
    return ""


def _counts(layers: Collection[Spelt], fmt: Format, metadata: Mapping[str, str]) -> dict[str, int]:
    """{family: how many of the layers it knows}. Names are first compared without their numbers, which spares most of the work."""
    rough = _rough_counts(layers, fmt)
    counts: dict[str, int] = {}
    for family in sorted(rough, key=lambda f: -rough[f]):
        if rough[family] <= 0 or rough[family] < max(counts.values(), default=0):
            break
        table = fmt.tables[family]
        if twin := next((f for f in counts if fmt.tables[f].is_named_as(table)), None):
            counts[family] = counts[twin]
            continue
        components = _components(layers, fmt, table, metadata)
        counts[family] = sum(known(fmt, table, components[word], layer) != "" for word, layer in layers)
    return counts


def _rough_counts(layers: Collection[Spelt], fmt: Format) -> dict[str, int]:
    """{family: how many of the layers it may know}, by names without numbers."""
    shapes = Counter((word, _numberless(layer)) for word, layer in layers)
    counts: dict[str, int] = {}
    for family, table in fmt.tables.items():
        patterns = {component: table.patterns(component) for component in table.components}
        everything = frozenset().union(*patterns.values())
        counts[family] = 0
        for (word, shape), count in shapes.items():
            names = patterns.get(fmt.component(word, table), frozenset()) if word else everything
            counts[family] += count * bool(names & {shape, f"text_model_{shape}", shape.removeprefix("model_")})
    return counts


def _numberless(layer: str) -> str:
    """A layer's flat name with # for each number."""
    return _NUMBER.sub("#", layer.replace(".", "_"))


def _components(layers: Collection[Spelt], fmt: Format, table: Table, metadata: Mapping[str, str]) -> dict[str, str]:
    """{what says the component: the component}, with "" for layers without such a word."""
    words = {word for word, _ in layers}
    components = {word: fmt.component(word, table) for word in words if word}
    alone = [layer for word, layer in layers if not word]
    return {**components, "": bare(table, alone, fmt, metadata)} if "" in words else components


class _Own:
    """How many layers are spelt as a format would spell a family's: counted when it is asked for."""

    def __init__(self, layers: Collection[Spelt], metadata: Mapping[str, str], tables: Mapping[str, Table]):
        self.layers, self.metadata, self.tables = layers, metadata, tables
        self.counts: dict[tuple[str, str], int] = {}

    def __call__(self, format: str, family: str) -> int:
        at = format, family
        if at not in self.counts:
            table = self.tables.get(family)
            self.counts[at] = _count_spelt(FORMATS[format], table, self.layers, self.metadata) if table else 0
        return self.counts[at]

    def most(self, family: str, formats: Collection[str]) -> int:
        """By the format that would spell most of them so."""
        return max(self(name, family) for name in formats)

    def best(self, families: Collection[str], formats: Collection[str]) -> list[str]:
        """The families of which most layers are spelt so."""
        counts = {family: self.most(family, formats) for family in families}
        return [family for family, count in counts.items() if count == max(counts.values())]


class _Verdict(NamedTuple):
    """The families in order, whether the first is a mere guess, and the models without a table that the layers are of instead."""

    families: tuple[str, ...]
    ambiguous: bool = False
    looks_like: tuple[str, ...] = ()


def _decided(
    counts: Mapping[str, int],
    layers: Layers,
    metadata: Mapping[str, str],
    formats: list[str],
    spelt_by: _Own,
    asked: str | None,
) -> _Verdict:
    """Which of the families whose tables know most layers a file is of; `asked` is one that it may be of."""
    most = max(counts.values(), default=0)
    fitting = [family for family in TABLES if most and counts.get(family) == most]
    best = [family for family in fitting if family in _said(metadata)] or fitting
    fmt = FORMATS[formats[0]]
    denoiser = _denoiser_layers(fmt, fmt.tables[best[0]] if best else Table({}), layers, metadata)
    if not best:
        return _Verdict((), looks_like=_named(grouped(denoiser)))
    if not denoiser:  # text encoders have the same names everywhere
        return _Verdict(tuple(sorted(fitting, key=lambda f: (f not in best, -spelt_by.most(f, formats)))))
    if set(best) <= set(UNETS.values()):
        return _Verdict(_unets(best, most, layers, formats))
    if metadata.get(HINT) not in best:
        best, others = _by_size(best, most / len(layers), grouped(denoiser))
        if not best:
            return _Verdict((), looks_like=others)
    best = _better_known(best, asked)
    best = spelt_by.best(best, formats) if len(best) > 1 else best
    return _Verdict(tuple(best), len(best) > 1 and not _alike(best, fmt, layers, metadata))


def _better_known(families: list[str], asked: str | None) -> list[str]:
    """Without those that yield to others, but for the one that is asked for."""
    return [family for family in families if family == asked or not TABLES[family].yields] or families


def _unets(families: list[str], known: int, layers: Layers, formats: list[str]) -> tuple[str, ...]:
    """Of UNets those whose widths and levels these are; none if their tables know too few of the layers."""
    share = known / len(layers)
    if share < _MOST and not (len(layers) - known <= _FEW and share >= _HALF):
        return ()
    best = _by_width(families, layers) or families
    if any(re.match(r"(input|middle|output)_block", layer) for _, layer in layers):  # in flat files SDXL's
        tables = FORMATS[formats[0]].tables
        best = [family for family in best if any(FORMATS[f].original(tables[family]) for f in formats)] or best
    return tuple(best)


def _denoiser_layers(
    fmt: Format, table: Table, layers: Layers, metadata: Mapping[str, str]
) -> list[tuple[str, tuple[int, int] | None]]:
    """The layers that are of no text encoder, with their rows and columns."""
    components = _components(layers, fmt, table, metadata)
    return [
        (layer, _extent(tensors))
        for (word, layer), tensors in layers.items()
        if not components[word].startswith("text_encoder") and components[word] not in table.encoders
    ]


def _by_size(families: list[str], share: float, layers: LayerKinds) -> tuple[list[str], tuple[str, ...]]:
    """Of families whose tables know a `share` of the layers, those of whose published models they can be, and the models without a table whose they
    are instead. Layers of no published size are of the families that have their names.
    """
    exact = [model for model in published() if model.has(layers)]
    ours = [model for model in exact if model.family in families]
    full = [model for model in ours if model.is_full(layers)]
    complete, others = _without_table(exact, layers)
    if full or (ours and not complete):
        return _of(full or ours, families), ()
    others = others or _nearer((1 - share) * len(layers), layers)
    return ([], others) if others or share < _MOST else (_by_depth(families, layers) or families, ())


def _of(models: Collection[Published], families: Collection[str]) -> list[str]:
    """The families that models are of."""
    told = {model.family for model in models}
    return [family for family in families if family in told]


def _nearer(unknown: float, layers: LayerKinds) -> tuple[str, ...]:
    """The models without a table that have other names for fewer of the layers than are `unknown`."""
    return tuple(m.name for m in published() if not m.family and len(layers) - m.knows(layers) < unknown - 0.5)


def _without_table(models: Collection[Published], layers: LayerKinds) -> tuple[bool, tuple[str, ...]]:
    """Of models without a table: whether the layers are all that one of them has, and the names of those, or else of all."""
    others = [model for model in models if not model.family]
    complete = [model for model in others if model.is_whole(layers)]
    return bool(complete), tuple(model.name for model in complete or others)


def _named(layers: LayerKinds) -> tuple[str, ...]:
    """The models without a table that have all these names."""
    return tuple(m.name for m in published() if len(layers) and not m.family and m.knows(layers) == len(layers))


def _by_depth(families: list[str], layers: LayerKinds) -> list[str]:
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
    kinds: dict[tuple[str, str, int | None], tuple[str, str, int | None]] = {}
    for (word, layer), tensors in layers.items():
        ratio = aspect({role: handle.shape for role, handle in tensors.items()})
        kinds.setdefault((word, _NUMBER.sub("#", layer), ratio), (word, layer, ratio))
    readings = []
    for table in (fmt.tables[family] for family in families):
        components = _components(layers, fmt, table, metadata)
        readings.append([_place(table, components[word], layer, fmt, ratio) for word, layer, ratio in kinds.values()])
    return all(reading == readings[0] for reading in readings)


def _place(table: Table, component: str, layer: str, fmt: Format, ratio: int | None) -> tuple[str, object]:
    """The component, and the layer's rule with the part of it that it is, however it is spelt; an encoder's layer."""
    if component in table.encoders:
        return component, table.encoded(component, layer, fmt.flat)
    flat = layer.replace(".", "_")
    if known(fmt, table, component, layer) == "original":
        return component, table.to_diffusers(component, table.original_dotted(component, flat) or layer, ratio)
    return component, table.to_original(component, table.dotted(component, flat) or layer, ratio)


def _count_spelt(fmt: Format, table: Table, layers: Collection[Spelt], metadata: Mapping[str, str]) -> int:
    """How many layers are spelt as this format would spell them."""
    components = _components(layers, fmt, table, metadata)
    words = {word: fmt.word(component, table) for word, component in components.items()}
    count = 0
    for word, layer in layers:
        component = components[word]
        names = "original" if fmt.original(table) and component in table.rules else "diffusers"
        is_so = words[word] == word and component in table.components
        count += is_so and known(fmt, table, component, layer) == names
    return count


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


def _by_width(families: list[str], layers: Layers) -> list[str]:
    """Of UNets: by the depth of transformers, the number of text encoders, the width of the cross-attention and which levels there are."""
    is_xl = any(_XL.match(layer) or _XL_WORD.match(word) for word, layer in layers)
    if widths := _cross_attention_widths(layers):
        told = _ALONE.get(min(widths), ("sdxl", "sdxl_refiner") if is_xl else ("sd15",))
        return [family for family in families if family in told] or families
    if is_xl:
        return [family for family in families if family in ("sdxl", "sdxl_refiner")]
    if not any(_NOT_XL.match(layer) for _, layer in layers):
        return families
    return [family for family in families if family in ("sd15", "sd2")]


def _cross_attention_widths(layers: Layers) -> set[int]:
    """The inputs of layers that see the text."""
    crossing = [tensors for (_, layer), tensors in layers.items() if _CROSS.match(layer)]
    widths = (width({role: handle.shape for role, handle in tensors.items()}) for tensors in crossing)
    return {*filter(None, widths)}


def _by_ratio(families: list[str], layers: Layers) -> list[str]:
    """Without those whose layers have another ratio of rows to columns: a wrong family, whatever somebody says."""
    wrong: set[str] = set()
    for (_, layer), tensors in layers.items():
        for pattern, ratios in _RATIOS.items():
            if pattern.search(layer) and (extent_ := _extent(tensors)):
                wrong |= {family for family, ratio in ratios.items() if Fraction(*extent_) != ratio}
    return [family for family in families if family not in wrong]


def _extent(tensors: Mapping[str, Handle]) -> tuple[int, int] | None:
    return extent({role: handle.shape for role, handle in tensors.items()})
