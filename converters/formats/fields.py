"""The fields of a config with which PEFT makes given tensors: it has no other way to say what shapes they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.formats import config as configs
from diffpeft import io
from diffpeft.bundle import Entry, parted

TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "loha": "LOHA",
    "lokr": "LOKR",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
}
VERSION, OLD_SERIES = "0.21.2", "0.17.1"


class Unfit(Exception):
    """Why PEFT has no config for these layers."""

    def __init__(self, why: str, layers: list[str]):
        super().__init__(why)
        self.why, self.layers = why, layers


def fields(entries: Sequence[Entry]) -> dict[str, Any]:
    """The fields for entries of one type. Raises Unfit."""
    kind = TYPES.get(entries[0].method)
    if kind not in _MAKERS:
        raise Unfit(f"PEFT has no {entries[0].method}", layers_of(entries))
    return {"peft_type": kind, "peft_version": VERSION, **_MAKERS[kind](entries)}


def own_name(entry: Entry) -> str:
    """An entry's layer as the model itself names it. Where no model and no family told it, a first text encoder is taken for a CLIPTextModel, which
    has no `text_model.` in transformers 5.
    """
    component, name = parted(entry.layer)
    if entry.own is not None:
        return entry.own
    return name.removeprefix("text_model.") if component == "text_encoder" else name


def layers_of(entries: Sequence[Entry], method: str = "") -> list[str]:
    """The layers of the entries, or of those of one method."""
    return [e.layer for e in entries if method in ("", e.method)]


def _lora(entries: Sequence[Entry]) -> dict[str, Any]:
    biased = [e for e in entries if "lora_B_bias" in e.tensors]
    if biased and len(biased) < len(entries):
        raise Unfit("in PEFT all layers have a lora_B.bias, or none", layers_of(biased))
    return {
        **_scales(entries, configs.ranks_of(entries)),
        "use_dora": entries[0].method == "dora",
        "lora_bias": bool(biased),
    }


def _adalora(entries: Sequence[Entry]) -> dict[str, Any]:
    """A training of one step, and which triplets of the rank at the start are left."""
    ranks = configs.ranks_of(entries)
    told = {(io.number(e.alpha), e.options.get("ranknum", ranks[e.layer])) for e in entries}
    if len(told) > 1:
        raise Unfit("in PEFT all layers of an AdaLoRA have the same alpha and the same rank at the start", [*ranks])
    ((alpha, first),) = told
    if alpha is None or max(ranks.values()) > first:
        raise Unfit("PEFT has no AdaLoRA without an alpha, or above its rank at the start", [*ranks])
    names = {e.layer: own_name(e) for e in entries}
    masks = {f"{names[layer]}.lora_E": [n < r for n in range(first)] for layer, r in ranks.items()}
    return {"lora_alpha": alpha, "init_r": first, "total_step": 1, "rank_pattern": masks}


def _loha(entries: Sequence[Entry]) -> dict[str, Any]:
    return {**_scales(entries, configs.ranks_of(entries)), **_cores(entries, "hada_t1", "hada_w1_b")}


def _lokr(entries: Sequence[Entry]) -> dict[str, Any]:
    from diffpeft.methods.lokr import factorization

    splits = {e.layer: _halves(e) for e in entries}
    both = any("lokr_w1_a" in e.tensors for e in entries)
    factors = [-1, *sorted({side for (first, _, _) in splits.values() for side in first})]

    def fits(layer: str, f: int) -> bool:
        (o1, i1), o2, widths = splits[layer]
        return factorization(o1 * o2, f) == (o1, o2) and any(factorization(i1 * i2, f) == (i1, i2) for i2 in widths)

    factor = next((f for f in factors if all(fits(layer, f) for layer in splits)), None)
    if factor is None:
        most = max(factors, key=lambda f: sum(fits(layer, f) for layer in splits))
        raise Unfit(
            "no decompose_factor gives these halves in PEFT", [layer for layer in splits if not fits(layer, most)]
        )
    ranks = {}
    for e in entries:
        (o1, i1), o2, widths = splits[e.layer]
        i2 = next(i2 for i2 in widths if factorization(i1 * i2, factor) == (i1, i2))
        limits = {"lokr_w2": max(o2, i2) / 2, **({"lokr_w1": max(o1, i1) / 2} if both else {})}
        own = {e.tensors[b].shape[0] for b in ("lokr_w1_b", "lokr_w2_b") if b in e.tensors}
        r = ranks[e.layer] = min(own) if own else math.ceil(max(limits.values()))
        if len(own) > 1 or any((r >= limit) != (whole in e.tensors) for whole, limit in limits.items()):
            raise Unfit("PEFT would make other halves of them than these, whole or factored", [e.layer])
    scaled = [replace(e, alpha=float(ranks[e.layer])) if {"lokr_w1", "lokr_w2"} <= {*e.tensors} else e for e in entries]
    return {
        **_scales(scaled, ranks),
        **_cores(entries, "lokr_t2", "lokr_w2_b"),
        "decompose_both": both,
        "decompose_factor": factor,
    }


def _halves(entry: Entry) -> tuple[tuple[int, int], int, list[int]]:
    """((o1, i1), o2, what i2 may be): a kernel that no tensor and no model shows is 1, 3, 3 x 3 or 3 x 3 x 3."""
    s = entry.shapes
    first = (s["lokr_w1"][0], s["lokr_w1"][1]) if "lokr_w1" in s else (s["lokr_w1_a"][0], s["lokr_w1_b"][1])
    if "lokr_w2" in s:
        return first, s["lokr_w2"][0], [s["lokr_w2"][1]]
    if "lokr_t2" in s:
        return first, s["lokr_w2_a"][1], [s["lokr_w2_b"][1]]
    kernels = [math.prod(entry.shape[2:])] if entry.shape else [1, 9, 3, 27]
    width = s["lokr_w2_b"][1]
    return first, s["lokr_w2_a"][0], [width // k for k in kernels if width % k == 0]


def _scales(entries: Sequence[Entry], ranks: Mapping[str, int]) -> dict[str, Any]:
    names = {e.layer: own_name(e).replace(".", "\\.") for e in entries}
    return configs.scales(entries, names, configs.ALPHA[TYPES[entries[0].method]], ranks)


def _cores(entries: Sequence[Entry], core: str, factor: str) -> dict[str, Any]:
    cored = [e for e in entries if core in e.tensors]
    without = [e for e in entries if core not in e.tensors and factor in e.tensors and {1} < {1, *(e.shape or ())[2:]}]
    if cored and without:
        raise Unfit("in PEFT all kernels above 1 have a Tucker core, or none", layers_of(without))
    return {"use_effective_conv2d": bool(cored)}


def blocks_of(entry: Entry) -> tuple[int, int]:
    """(n, b) of an input-side OFT."""
    n, size = next(h.shape for role, h in entry.tensors.items() if role.startswith("oft_"))
    return n, (1 + math.isqrt(1 + 8 * size)) // 2


def _oft(entries: Sequence[Entry]) -> dict[str, Any]:
    from diffpeft.methods.oft import nearest_divisor

    told = {tuple(sorted((k, v) for k, v in e.options.items() if v is not None)) for e in entries}
    if len(told) > 1:
        raise Unfit("PEFT computes the rotations of all layers in one way", layers_of(entries))
    blocks = {e.layer: blocks_of(e) for e in entries}
    features = {e.layer: _turned(e, math.prod(blocks[e.layer])) for e in entries}
    single = all(n == 1 for n, _ in blocks.values())
    partial = [layer for layer, (n, b) in blocks.items() if n * b != features[layer]]
    shared = single and (bool(partial) or all(e.shape is None for e in entries))
    if partial and not single:
        raise Unfit("in PEFT all layers share one block each, or none", partial)
    rows = {
        (f, *((f // b, b) if shared else (n, b))) for f, (n, b) in zip(features.values(), blocks.values(), strict=True)
    }
    sizes = [{"r": 0, "oft_block_size": b} for b in sorted({b for _, _, b in rows}, reverse=True)]
    counts = [{"r": n, "oft_block_size": 0} for n in sorted({n for _, n, _ in rows})]
    for fields in (*sizes, *counts):
        asked = fields["oft_block_size"] or fields["r"]
        if all(nearest_divisor(f, asked) == (b if fields["oft_block_size"] else n) for f, n, b in rows):
            break
    else:
        raise Unfit("no block size and no number of blocks gives these blocks in PEFT", list(blocks))
    options = entries[0].options
    terms, eps = options.get("neumann", 0), options.get("coft")
    return {
        **fields,
        "block_share": shared,
        "use_cayley_neumann": bool(terms),
        **({"num_cayley_neumann_terms": terms} if terms else {}),
        **({"coft": True, "eps": eps} if eps is not None else {"coft": False}),
        **({"peft_version": OLD_SERIES} if options.get("neumann_last") == 2 else {}),
    }


def _turned(entry: Entry, shown_: int) -> int:
    """How many features are turned, as the model told or else as the blocks show."""
    if entry.shape is None:
        return shown_
    return entry.shape[0] if "oft_embedding_R" in entry.tensors else math.prod(entry.shape[1:])


def _boft(entries: Sequence[Entry]) -> dict[str, Any]:
    shapes = {e.layer: e.tensors["boft_R"].shape for e in entries}
    (m, *more), numbers, sizes = ({s[axis] for s in shapes.values()} for axis in (0, 1, 2))
    if more or len(numbers) > 1 < len(sizes):
        raise Unfit("in PEFT all layers have the same stages, and the same size or number of blocks", list(shapes))
    fields = {"boft_block_size": min(sizes), "boft_block_num": 0}
    return {
        **(fields if len(sizes) == 1 else {"boft_block_size": 0, "boft_block_num": min(numbers)}),
        "boft_n_butterfly_factor": m,
    }


def _ia3(entries: Sequence[Entry]) -> dict[str, Any]:
    return {"feedforward_modules": sorted(own_name(e) for e in entries if on_inputs(e))}


def on_inputs(entry: Entry) -> bool:
    """Whether PEFT's (IA)^3 scales a layer's inputs, which it calls feedforward: a row does, a column does not, of a convolution the config says."""
    first, second, *kernel = entry.tensors["ia3_l"].shape
    return bool(entry.options.get("feedforward")) if kernel or first == second == 1 else first == 1


_MAKERS = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
    "BOFT": _boft,
    "IA3": _ia3,
}
