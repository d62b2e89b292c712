"""What an adapter's tensors do not say, in the fields of PEFT's config: written, compared and read back, one class a way of saying it.

A method needs no class of its own where its layout says it all: a rank, an alpha, and fields that are options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from diffpeft import io, patterns
from diffpeft.bundle import Entry, parted
from diffpeft.converters.formats import config as configs
from diffpeft.converters.formats.base import dotted_role
from diffpeft.converters.formats.schema import Config
from diffpeft.converters.formats.wrappers import PEFT as PREFIX
from diffpeft.converters.formats.wrappers import unwrapped
from diffpeft.methods.axes import triangle
from diffpeft.methods.layout import LAYOUTS, Field, Layout, is_scaled

TYPES = {method: layout.peft for method, layout in LAYOUTS.items() if layout.peft}
VERSION, OLD_SERIES = "0.21.2", "0.17.1"
Fields = dict[str, object]
Value = TypeVar("Value")


class Unsayable(Exception):
    """Why PEFT has no config for these layers."""

    def __init__(self, why: str, layers: Iterable[str]):
        super().__init__(why)
        self.why, self.layers = why, list(layers)


def fields(entries: Sequence[Entry]) -> Fields:
    """The fields for entries of one method. Raises Unsayable."""
    method = entries[0].method
    if method not in TYPES:
        raise Unsayable(f"PEFT has no {method}", layers_of(entries))
    return {"peft_type": TYPES[method], "peft_version": VERSION, **dialect_of(method).fields(entries)}


def own_name(entry: Entry) -> str:
    """An entry's layer as the model itself names it. Where no model and no family told it, a first text encoder is taken for a CLIPTextModel, which
    has no `text_model.` in transformers 5.
    """
    component, name = parted(entry.layer)
    if entry.own is not None:
        return entry.own
    return name.removeprefix("text_model.") if component == "text_encoder" else name


def names_of(entry: Entry) -> tuple[str, ...]:
    """What a config may call a layer: its canonical name, that without CLIP's level, and the name in the keys, which may be the original program's."""
    name = parted(entry.layer)[1]
    spelt = (split[0] for key in entry.keys[:1] if (split := dotted_role(unwrapped(key).removeprefix(PREFIX))))
    return tuple({name, name.removeprefix("text_model."), *spelt})


def layers_of(entries: Sequence[Entry], method: str = "") -> list[str]:
    """The layers of the entries, or of those of one method."""
    return [e.layer for e in entries if method in ("", e.method)]


class Dialect:
    """A rank, an alpha if the method has one, and fields that are options: what a layout says."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def fields(self, entries: Sequence[Entry]) -> Fields:
        """The fields of a config with which PEFT makes these tensors. Raises Unsayable."""
        return {**self.scales(entries, configs.ranks_of(entries)), **self.options(entries)}

    def disagreement(self, entry: Entry, config: Config) -> str:
        """What a config says of a layer that its tensors do not; empty if they agree."""
        r = configs.ranks_of([entry])[entry.layer]
        told = self.rank(entry, config)
        return f"the rank is {told}, not {r}" if r and r != told else ""

    def configured(self, entry: Entry, config: Config) -> Entry:
        """The entry with the alpha and the options that a config gives it."""
        options = {row.option: config.get(row.name, row.default) for row in self.layout.options}
        entry = replace(entry, options=options or entry.options)
        if not self.layout.alpha_field:
            return entry
        r = configs.ranks_of([entry])[entry.layer]
        alpha = configs.alpha({self.layout.alpha_field: 8, **config}, names_of(entry), r)
        return replace(entry, alpha=alpha)

    def rank(self, entry: Entry, config: Config) -> int:
        """The rank that a config gives a layer."""
        by_layer = config.get(self.layout.patterns) if self.layout.patterns else None
        return int(
            patterns.first(by_layer, names_of(entry), config.get(self.layout.rank_field, self.layout.rank_default))
        )

    def scales(self, entries: Sequence[Entry], ranks: Mapping[str, int]) -> Fields:
        """The fields for rank and alpha."""
        if self.layout.patterns:
            scales = configs.scales(
                entries, {e.layer: self.layout.key(own_name(e)) for e in entries}, self.layout, ranks
            )
            self._refuse_ambiguous(
                cast(Mapping[str, int], scales[self.layout.patterns]), {own_name(e): ranks[e.layer] for e in entries}
            )
            return scales
        if not self.layout.ranks:
            return {}
        return {self.layout.rank_field: _common(entries, "rank", lambda e: ranks[e.layer])}

    def _refuse_ambiguous(self, keys: Mapping[str, int], ranks: Mapping[str, int]) -> None:
        """Raise Unsayable where a name that has a rank of its own is the end of another's."""
        others = [
            name for name, r in ranks.items() if any(name.endswith(f".{key}") and r != n for key, n in keys.items())
        ]
        if others:
            raise Unsayable("in PEFT a layer has the rank of one that its name ends with", others)

    def options(self, entries: Sequence[Entry]) -> Fields:
        """The fields that are options, of which a config has one for all layers."""
        return {row.name: _common(entries, row.name, _option(row)) for row in self.layout.options}


def _option(row: Field) -> Callable[[Entry], object]:
    """What an entry has of a field."""
    return lambda e: e.options.get(row.option, row.default)


def _common(entries: Sequence[Entry], what: str, value: Callable[[Entry], Value]) -> Value:
    """What all entries have. Raises Unsayable, which blames those that have another than most."""
    by_value: dict[Value, list[str]] = {}
    for entry in entries:
        by_value.setdefault(value(entry), []).append(entry.layer)
    most = max(by_value, key=lambda v: len(by_value[v]))
    others = [layer for v, layers in by_value.items() if v != most for layer in layers]
    if others:
        raise Unsayable(f"in PEFT all layers of such an adapter have the same {what}", others)
    return most


class LoraDialect(Dialect):
    """LoRA and DoRA over it."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        biased = [e for e in entries if "lora_B_bias" in e.tensors]
        if biased and len(biased) < len(entries):
            raise Unsayable("in PEFT all layers have a lora_B.bias, or none", layers_of(biased))
        return {**super().fields(entries), "use_dora": self.layout.over, "lora_bias": bool(biased)}

    def disagreement(self, entry: Entry, config: Config) -> str:
        if bool(config.get("use_dora")) != self.layout.over:
            return f"use_dora is {config.get('use_dora', False)}"
        return super().disagreement(entry, config)


class AdaLoraDialect(Dialect):
    """A training of one step, and which triplets of the rank at the start are left."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        ranks = configs.ranks_of(entries)
        told = {(io.number(e.alpha), e.options.get("ranknum", ranks[e.layer])) for e in entries}
        if len(told) > 1:
            raise Unsayable(
                "in PEFT all layers of an AdaLoRA have the same alpha and the same rank at the start", ranks
            )
        ((alpha, start),) = told
        if alpha is None or max(ranks.values()) > start:
            raise Unsayable("PEFT has no AdaLoRA without an alpha, or above its rank at the start", ranks)
        masks = {f"{own_name(e)}.lora_E": [n < ranks[e.layer] for n in range(start)] for e in entries}
        return {"lora_alpha": alpha, "init_r": start, "total_step": 1, "rank_pattern": masks}

    def rank(self, entry: Entry, config: Config) -> int:
        masks = config.get("rank_pattern") or {}
        ranks = (sum(masks[key]) for name in names_of(entry) if (key := f"{name}.lora_E") in masks)
        return int(next(ranks, config["init_r"]))

    def disagreement(self, entry: Entry, config: Config) -> str:
        r, told = configs.ranks_of([entry])[entry.layer], self.rank(entry, config)
        return f"the rank is {told}, not {r}" if r != told else ""

    def configured(self, entry: Entry, config: Config) -> Entry:
        """It has no patterns of alpha."""
        return replace(entry, alpha=float(config.get("lora_alpha", 8)), options={"ranknum": config["init_r"]})


class LoHaDialect(Dialect):
    """LoHa, with Tucker cores or without."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        return {**super().fields(entries), **_cores(entries, "hada_t1", "hada_w1_b")}


def _cores(entries: Sequence[Entry], core: str, factor: str) -> Fields:
    cored = [e for e in entries if core in e.tensors]
    without = [e for e in entries if core not in e.tensors and factor in e.tensors and {1} < {1, *(e.shape or ())[2:]}]
    if cored and without:
        raise Unsayable("in PEFT all kernels above 1 have a Tucker core, or none", layers_of(without))
    return {"use_effective_conv2d": bool(cored)}


class LoKrDialect(Dialect):
    """LoKr. PEFT scales two whole halves too, by alpha / r, where everywhere else their scale is 1: that is an option of the adapter."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        splits = {e.layer: _Halves(e) for e in entries}
        both = any("lokr_w1_a" in e.tensors for e in entries)
        factor = _factor(splits)
        ranks = {e.layer: splits[e.layer].rank(factor, both) for e in entries}
        scaled = [self._with_alpha(e, ranks[e.layer]) for e in entries]
        return {
            **self.scales(scaled, ranks),
            **_cores(entries, "lokr_t2", "lokr_w2_b"),
            "decompose_both": both,
            "decompose_factor": factor,
        }

    def configured(self, entry: Entry, config: Config) -> Entry:
        if is_scaled(entry.method, entry.tensors):
            return super().configured(entry, config)
        scale = self.whole_scale(entry, config)
        return replace(entry, options={"scale": scale}) if scale != 1 else entry

    def whole_scale(self, entry: Entry, config: Config) -> float:
        """By what PEFT multiplies two whole halves."""
        r = self.rank(entry, config)
        return (configs.alpha({"alpha": 8, **config}, names_of(entry), r) or 0) / r

    def _with_alpha(self, entry: Entry, r: int) -> Entry:
        """The entry with an alpha that gives its scale in PEFT."""
        scaled = is_scaled(entry.method, entry.tensors)
        return entry if scaled else replace(entry, alpha=r * float(entry.options.get("scale", 1)))


class _Halves:
    """How a LoKr splits a layer: (o1, i1), o2, and what i2 may be: a kernel that no tensor and no model shows is 1, 3, 3 x 3 or 3 x 3 x 3."""

    def __init__(self, entry: Entry):
        s = entry.shapes
        self.layer, self.tensors = entry.layer, s
        self.first = (s["lokr_w1"][0], s["lokr_w1"][1]) if "lokr_w1" in s else (s["lokr_w1_a"][0], s["lokr_w1_b"][1])
        if "lokr_w2" in s:
            self.o2, self.widths = s["lokr_w2"][0], [s["lokr_w2"][1]]
        elif "lokr_t2" in s:
            self.o2, self.widths = s["lokr_w2_a"][1], [s["lokr_w2_b"][1]]
        else:
            kernels = [math.prod(entry.shape[2:])] if entry.shape else [1, 9, 3, 27]
            width = s["lokr_w2_b"][1]
            self.o2, self.widths = s["lokr_w2_a"][0], [width // k for k in kernels if width % k == 0]

    def width(self, factor: int) -> int | None:
        """The i2 with which a decompose_factor gives these halves; None if it does not."""
        from diffpeft.methods.lokr import factorization

        (o1, i1), o2 = self.first, self.o2
        if factorization(o1 * o2, factor) != (o1, o2):
            return None
        return next((i2 for i2 in self.widths if factorization(i1 * i2, factor) == (i1, i2)), None)

    def rank(self, factor: int, both: bool) -> int:
        """The rank with which PEFT makes the same halves whole and factored."""
        (o1, i1), i2 = self.first, self.width(factor)
        assert i2 is not None
        limits = {"lokr_w2": max(self.o2, i2) / 2, **({"lokr_w1": max(o1, i1) / 2} if both else {})}
        shown = {self.tensors[b][0] for b in ("lokr_w1_b", "lokr_w2_b") if b in self.tensors}
        r = min(shown) if shown else math.ceil(max(limits.values()))
        if len(shown) > 1 or any((r >= limit) != (half in self.tensors) for half, limit in limits.items()):
            raise Unsayable("PEFT would make other halves of them than these, whole or factored", [self.layer])
        return r


def _factor(splits: Mapping[str, _Halves]) -> int:
    """The decompose_factor that gives all layers' halves. Raises Unsayable."""
    factors = [-1, *sorted({side for halves in splits.values() for side in halves.first})]
    lacking = {f: [layer for layer, halves in splits.items() if halves.width(f) is None] for f in factors}
    best = min(factors, key=lambda f: len(lacking[f]))
    if lacking[best]:
        raise Unsayable("no decompose_factor gives these halves in PEFT", lacking[best])
    return best


class OftDialect(Dialect):
    """OFT on the inputs."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        told = {tuple(sorted((k, v) for k, v in e.options.items() if v is not None)) for e in entries}
        if len(told) > 1:
            raise Unsayable("PEFT computes the rotations of all layers in one way", layers_of(entries))
        return {**_blocks(entries), **_series(entries[0].options)}

    def disagreement(self, entry: Entry, config: Config) -> str:
        if is_old_oft(entry):
            n = (entry.shapes.get("oft_blocks") or entry.shapes["boft_R"][1:])[0]
            return "" if n == config.get("r", 8) else f"there are {n} blocks, not {config.get('r', 8)}"
        if config.get("block_share"):
            return ""
        from diffpeft.methods.oft import nearest_divisor

        (n, b), size = blocks_of(entry), config.get("oft_block_size", 32)
        used = nearest_divisor(n * b, size or config["r"])
        return "" if used == (b if size else n) else f"its blocks are not of {b}, there are not {n}"

    def configured(self, entry: Entry, config: Config) -> Entry:
        return configs.turned(entry, config)


def is_old_oft(entry: Entry) -> bool:
    """Whether these are rotations of PEFT before 0.16."""
    return any(key.endswith((".oft_r", ".oft_s")) or ".oft_r." in key for key in entry.keys)


def blocks_of(entry: Entry) -> tuple[int, int]:
    """(n, b) of an input-side OFT."""
    n, width = next(h.shape for role, h in entry.tensors.items() if role.startswith("oft_"))
    return n, triangle(width)


def _blocks(entries: Sequence[Entry]) -> Fields:
    """The size or the number of blocks, and whether all of a layer are one."""
    blocks = {e.layer: blocks_of(e) for e in entries}
    features = {e.layer: _turned(e, math.prod(blocks[e.layer])) for e in entries}
    shared = _are_shared(entries, blocks, features)
    rows = {(features[layer], features[layer] // b if shared else n, b) for layer, (n, b) in blocks.items()}
    sizes = [{"r": 0, "oft_block_size": b} for b in sorted({b for _, _, b in rows}, reverse=True)]
    counts = [{"r": n, "oft_block_size": 0} for n in sorted({n for _, n, _ in rows})]
    chosen = next((row for row in (*sizes, *counts) if _gives(row, rows)), None)
    if chosen is None:
        raise Unsayable("no block size and no number of blocks gives these blocks in PEFT", blocks)
    return {**chosen, "block_share": shared}


def _are_shared(entries: Sequence[Entry], blocks: Mapping[str, tuple[int, int]], features: Mapping[str, int]) -> bool:
    """Whether one block stands for all of a layer. Raises Unsayable if that is so of some layers only."""
    single = all(n == 1 for n, _ in blocks.values())
    partial = [layer for layer, (n, b) in blocks.items() if n * b != features[layer]]
    if partial and not single:
        raise Unsayable("in PEFT all layers share one block each, or none", partial)
    return single and (bool(partial) or all(e.shape is None for e in entries))


def _gives(fields: Mapping[str, int], rows: Iterable[tuple[int, int, int]]) -> bool:
    """Whether PEFT makes n blocks of b of so many features: (features, n, b)."""
    from diffpeft.methods.oft import nearest_divisor

    size = fields["oft_block_size"]
    return all(nearest_divisor(f, size or fields["r"]) == (b if size else n) for f, n, b in rows)


def _series(options: Mapping[str, object]) -> Fields:
    """How the rotation is computed."""
    terms, eps = options.get("neumann", 0), options.get("coft")
    return {
        "use_cayley_neumann": bool(terms),
        **({"num_cayley_neumann_terms": terms} if terms else {}),
        **({"coft": True, "eps": eps} if eps is not None else {"coft": False}),
        **({"peft_version": OLD_SERIES} if options.get("neumann_last") == 2 else {}),
    }


def _turned(entry: Entry, shown: int) -> int:
    """How many features are turned, as the model told or else as the blocks show."""
    if entry.shape is None:
        return shown
    return entry.shape[0] if "oft_embedding_R" in entry.tensors else math.prod(entry.shape[1:])


class BoftDialect(Dialect):
    """BOFT on the inputs."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        shapes = {e.layer: e.tensors["boft_R"].shape for e in entries}
        (m, *more), numbers, sizes = ({s[axis] for s in shapes.values()} for axis in (0, 1, 2))
        if more or len(numbers) > 1 < len(sizes):
            raise Unsayable("in PEFT all layers have the same stages, and the same size or number of blocks", shapes)
        size = min(sizes) if len(sizes) == 1 else 0
        number = 0 if size else min(numbers)
        return {"boft_block_size": size, "boft_block_num": number, "boft_n_butterfly_factor": m}

    def disagreement(self, entry: Entry, config: Config) -> str:
        n, b = entry.shapes["boft_R"][1:3]
        size, number = config.get("boft_block_size", 4), config.get("boft_block_num", 0)
        return "" if b == size or n == number else f"its blocks are not of {b}, there are not {n}"

    def configured(self, entry: Entry, config: Config) -> Entry:
        return configs.turned(entry, config)


class IA3Dialect(Dialect):
    """(IA)^3: a config names the layers whose inputs are scaled."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        return {"feedforward_modules": sorted(own_name(e) for e in entries if on_inputs(e))}

    def disagreement(self, entry: Entry, config: Config) -> str:
        return ""

    def configured(self, entry: Entry, config: Config) -> Entry:
        """PEFT's rule: an expression for whole names, or what names end with."""
        modules, names = config.get("feedforward_modules") or [], names_of(entry)
        if isinstance(modules, str):
            return replace(entry, options={"feedforward": any(patterns.fullmatch(modules, name) for name in names)})
        inner = any(name == end or name.endswith(f".{end}") for name in names for end in modules)
        return replace(entry, options={"feedforward": inner})


def on_inputs(entry: Entry) -> bool:
    """Whether PEFT's (IA)^3 scales a layer's inputs, which it calls feedforward: a row does, a column does not, of a convolution the config says."""
    rows, columns, *kernel = entry.tensors["ia3_l"].shape
    return bool(entry.options.get("feedforward")) if kernel or rows == columns == 1 else rows == 1


class HiraDialect(Dialect):
    """HiRA, of which PEFT gives the first adapter of a model one rank everywhere, whatever its rank_pattern says: either is meant by a config."""

    def disagreement(self, entry: Entry, config: Config) -> str:
        one_rank = {**config, "rank_pattern": {}}
        return super().disagreement(entry, config) and super().disagreement(entry, one_rank)


class MissDialect(Dialect):
    """MiSS in one of its three forms, of which a config has one for all layers. The shapes do not tell a mini one of as many rows as the layer has."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        form = _common(entries, "form", _miss_form)
        mini = {"mini_r": _common(entries, "mini_r", lambda e: e.shapes["miss_block"][1])} if form == "mini" else {}
        return {**super().fields(entries), "init_weights": form, **mini}

    def configured(self, entry: Entry, config: Config) -> Entry:
        form = config.get("init_weights")
        return replace(entry, options={"form": form}) if form in ("bat", "mini") else entry


class RoadDialect(Dialect):
    """RoAd, whose tensors tell the variant where a layer's size is known."""

    def fields(self, entries: Sequence[Entry]) -> Fields:
        return {**super().fields(entries), "variant": _common(entries, "variant", self._variant)}

    @staticmethod
    def _variant(entry: Entry) -> object:
        (n,) = entry.shapes["road_theta"]
        told = entry.options.get("variant", "road_1")
        return told if entry.shape is None else ("road_1", "road_2", "road_4")[n // entry.shape[0]]


def _miss_form(entry: Entry) -> object:
    """What `init_weights` is of a MiSS in PEFT's config."""
    shape = entry.shapes["miss_block"]
    if len(shape) == 3:
        return "bat"
    other = entry.shape is not None and shape[1] != entry.shape[0]
    return "mini" if other or entry.options.get("form") == "mini" else True


_DIALECTS: dict[str, type[Dialect]] = {
    "lora": LoraDialect,
    "dora": LoraDialect,
    "adalora": AdaLoraDialect,
    "loha": LoHaDialect,
    "lokr": LoKrDialect,
    "oft": OftDialect,
    "boft": BoftDialect,
    "ia3": IA3Dialect,
    "hira": HiraDialect,
    "miss": MissDialect,
    "road": RoadDialect,
}


def dialect_of(method: str) -> Dialect:
    """How PEFT's config speaks of a method."""
    return _DIALECTS.get(method, Dialect)(LAYOUTS[method])


def whole_scale(entry: Entry, config: Config) -> float:
    """By what PEFT multiplies the first half of a LoKr beyond the scale that the entry has: 1 but for two whole halves."""
    dialect = dialect_of(entry.method)
    if not isinstance(dialect, LoKrDialect) or is_scaled(entry.method, entry.tensors):
        return 1.0
    theirs, ours = dialect.whole_scale(entry, config), float(entry.options.get("scale", 1))
    return theirs / ours if ours and theirs != ours else 1.0


def without_scale(entry: Entry) -> Entry:
    """The entry for programs that know no scale of two whole halves: the first half takes it."""
    if "scale" not in entry.options:
        return entry
    tensors = {**entry.tensors, "lokr_w1": io.scaled(entry.tensors["lokr_w1"], entry.options["scale"])}
    return replace(entry, tensors=tensors, options={k: v for k, v in entry.options.items() if k != "scale"})
