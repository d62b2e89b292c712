"""add_weighted_adapter: one new adapter from several, as their exact weighted sum or by one of PEFT's algorithms.

The sum is sum_i w_i dW_i, whatever the methods. PEFT's algorithms are for LoRAs, of dW_i = s_i B_i A_i: `cat` puts factors side by side; `svd` cuts the
sum to a rank; `linear` adds sqrt(w_i s_i) A_i and sqrt(w_i s_i) B_i, which is not the sum: it has the products of every A_i with every B_j. TIES
(arXiv:2306.01708), DARE (arXiv:2311.03099) and pruning by magnitude leave out entries first, of the factors, or (`_svd`) of dW_i.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from converters.formats.peft import CONFIG
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, listed, near, shown
from diffpeft.layers.carried import Copy, Record, bare, bare_copy, op_of, record_of
from diffpeft.layers.hooks import present
from diffpeft.layers.slot import BIAS, Slot, pieces_of
from diffpeft.llm.state import saved
from diffpeft.llm.targets import excludes, matches
from diffpeft.methods import IA3Config, LoraConfig
from diffpeft.methods.base import Geometry
from diffpeft.methods.config import check_choice, check_rank
from diffpeft.methods.ia3 import FACTORS
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.lora import Lora
from diffpeft.methods.merging import HOW, merged
from diffpeft.model.attach import attach_to, method_of, mixes_of, take_off
from diffpeft.model.combine import combine
from diffpeft.model.mix import check_name
from diffpeft.model.plan import Plan
from diffpeft.model.state import slots_in
from diffpeft.model.target import adapted, adapted_layers, modules_of

# PEFT's types: (what is put together, how)
TYPES: dict[str, tuple[str, str]] = {
    "linear": ("factors", "linear"),
    "ties": ("factors", "ties"),
    "dare_linear": ("factors", "dare"),
    "dare_ties": ("factors", "dare_ties"),
    "magnitude_prune": ("factors", "magnitude"),
    "cat": ("sides", "linear"),
    "svd": ("deltas", "svd"),
    "ties_svd": ("deltas", "ties"),
    "dare_linear_svd": ("deltas", "dare"),
    "dare_ties_svd": ("deltas", "dare_ties"),
    "magnitude_prune_svd": ("deltas", "magnitude"),
}
Factors = tuple[Tensor, Tensor]  # A [r, i, *k], B [o, r, *1], or both as matrices


@dataclass(frozen=True)
class Weighting:
    """How adapters are put together: what PEFT's `add_weighted_adapter` takes beside them, in its order and with its defaults.

    Args:
        combination_type: None for the exact weighted sum, whatever the methods; or PEFT's algorithm of this name: svd, linear, cat, ties, ties_svd,
            dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, magnitude_prune, magnitude_prune_svd (LoRA); linear ((IA)^3).
        svd_rank: of the types that end in svd; default: the largest rank among the adapters.
        svd_clamp: the quantile of the factors' entries that these are cut at.
        svd_full_matrices, svd_driver: torch.linalg.svd's.
        density: the share of entries that ties, dare and magnitude_prune keep.
        majority_sign_method: how TIES elects a sign: by the "total" of the values or the "frequency" of the signs.
    """

    combination_type: str | None = None
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class Recipe:
    """How the LoRAs of a layer become one: what is put together (factors, sides or deltas), how, and to which rank."""

    what: str
    how: str
    rank: int
    weighting: Weighting

    def merged(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Tensors of one shape put together."""
        density = 1.0 if self.weighting.density is None else self.weighting.density
        return merged(self.how, tensors, weights, density, self.weighting.majority_sign_method)


@dataclass(frozen=True)
class Source:
    """One LoRA on one layer, and the weight that the user gives it."""

    weight: float
    scale: float
    A: Tensor
    B: Tensor


def add_weighted(
    model: nn.Module,
    configs: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    weighting: Weighting,
) -> Any:
    """Put a new adapter, inactive and frozen, on a model; its config.

    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    numbers = _checked(model, configs, adapters, weights, name)
    sources = [configs[adapter] for adapter in adapters]
    kinds = {type(config) for config in sources}
    kind = weighting.combination_type
    if kind is None:
        if kinds == {IA3Config} and _same_sides(model, adapters):
            return _ia3(model, sources, adapters, numbers, name, 1)
        return _sum(model, sources, adapters, numbers, name)
    if kind not in TYPES:
        raise ConfigError(
            f"Invalid combination_type: {kind}",
            remedy=near(str(kind), TYPES) or f"It is one of {', '.join(TYPES)}, or None for the exact sum.",
        )
    if kinds == {IA3Config} and kind == "linear":
        return _ia3(model, sources, adapters, numbers, name, 0)
    if kinds != {LoraConfig}:
        raise ConfigError(
            f"combination_type {shown(kind)} is for LoRA, not for {' and '.join(sorted(c.__name__ for c in kinds))}",
            remedy="Leave it out for the exact weighted sum, which is for all methods.",
        )
    return _lora(model, sources, adapters, numbers, name, _recipe(sources, weighting, kind))


def _checked(
    model: nn.Module, configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], name: str
) -> list[float]:
    """The weights as numbers, if adapters of these names can be put together under the new one."""
    check_name(name)
    if name in configs:
        raise AdapterStateError(f"Adapter with name {name!r} already exists.", remedy="Choose another adapter_name.")
    for adapter in adapters:
        if adapter not in configs:
            raise UnknownNameError(
                f"Adapter {adapter} does not exist", remedy=near(adapter, configs) or f"There are {', '.join(configs)}."
            )
    if not adapters:
        raise ConfigError(f"Found no adapter matching the names in {list(adapters)}", remedy="Name one at least.")
    if len(weights) != len(adapters):
        raise ConfigError(f"there are {len(adapters)} adapters and {len(weights)} weights", remedy="Give one for each.")
    numbers = [float(w) for w in weights]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"weights is {shown(numbers)}", remedy="A weight is a finite number.")
    shared = [
        where
        for where, _, record in adapted(model)
        if _clash(record, [name for name in adapters if name in record.names])
    ]
    if shared:
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)",
            where=listed(shared),
        )
    return numbers


def _clash(record: Record, names: Sequence[str]) -> bool:
    return any(record.clashing(one, other) for one, other in itertools.combinations(dict.fromkeys(names), 2))


def _recipe(configs: Sequence[LoraConfig], weighting: Weighting, kind: str) -> Recipe:
    """PEFT's rules for a type; one adapter is always `linear`. Raises ConfigError."""
    what, how = TYPES["linear" if len(configs) == 1 else kind]
    ranks = [max(c.r, *c.rank_pattern.values()) if c.rank_pattern else c.r for c in map(saved, configs)]
    if what == "factors" and len({*ranks}) > 1:
        raise ConfigError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear",
            where=f"r is {', '.join(map(str, ranks))}",
            remedy="Leave combination_type out for the exact sum, or take 'cat' or 'svd'.",
        )
    if any(c.bias != "none" for c in configs):
        raise ConfigError(
            "these adapters train biases, of which PEFT's types have no sum",
            remedy="Leave combination_type out, or set bias to 'none' for all adapters.",
        )
    if weighting.svd_rank is not None:
        check_rank("svd_rank", weighting.svd_rank)
    check_choice("majority_sign_method", weighting.majority_sign_method, ("total", "frequency"))
    if HOW[how][0] is not None:
        _check_density(weighting.density, kind, drops="dare" in how)
    rank = {"factors": ranks[0], "sides": sum(ranks), "deltas": weighting.svd_rank or max(ranks)}[what]
    return Recipe(what, how, rank, weighting)


def _check_density(density: object, kind: str, drops: bool) -> None:
    """Raise ConfigError for a density that leaves nothing out of which `drops` (DARE) can draw. Warns of one that leaves out nothing."""
    if not isinstance(density, (int, float)) or not (density > 0 if drops else density >= 0):
        least = "above 0" if drops else "of at least 0"
        raise ConfigError(f"density is {density}, with {kind!r}", remedy=f"It is a number {least} and below 1.")
    if density >= 1:
        warnings.warn(f"density is {density}: at 1 and above nothing is left out", stacklevel=6)


# LoRA, by PEFT's types


def _lora(
    model: nn.Module, own: Sequence[Any], adapters: Sequence[str], weights: Sequence[float], name: str, recipe: Recipe
) -> Any:
    layers = _layers(model, adapters)
    config = _changed(
        saved(own[0]),
        r=recipe.rank,
        lora_alpha=recipe.rank,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        modules_to_save=None,
    )
    config = _changed(config, **_targets(model, config, own, layers))
    lost = [a for a, c in zip(adapters, own, strict=True) if c.lora_bias or _has_copies(model, a)]
    if lost:
        warnings.warn(
            f"what adapters train beside the weights of their layers (lora_bias, modules_to_save) is left out: {listed(lost)}",
            stacklevel=4,
        )
    for module in layers.values():
        _draw(own[0], op_of(module).geometry, recipe.rank)
    found = {layer: _sources(module, adapters, weights) for layer, module in layers.items()}
    made = {layer: _MADE[recipe.what](recipe, found[layer], op_of(module)) for layer, module in layers.items()}

    def written(layer: str, slot: Slot) -> Mapping[str, Tensor]:
        A, B = (role for role in Lora.roles[:4] if role in slot.tensors)
        return dict(zip((A, B), _padded(made[layer], slot.tensors[A], slot.tensors[B]), strict=True))

    return _attached(model, config, name, layers, written)


def _sources(module: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> list[Source]:
    """Those of the adapters that are on a layer, in their order, in fp32 or better."""
    slots: Any = getattr(record_of(module), "slots", {})
    return [_source(slots[a], w) for a, w in zip(adapters, weights, strict=True) if a in slots]


def _source(slot: Slot, weight: float) -> Source:
    (part,) = slot.parts

    def read() -> Source:
        p = {role: t.detach() for role, t in slot.tensors_of(part).items()}
        A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in Lora.factors(p, part.spec))
        return Source(weight, Lora.scale(p, part.spec), A, B)

    return present(slot, read)


def _of_factors(recipe: Recipe, sources: Sequence[Source], op: Any) -> Factors:
    """Both factors, A [r, i, *k] and B [o, r, *1], merged on their own, half of each weight in either, its sign in A."""
    if len({s.A.shape for s in sources}) > 1:
        raise ConfigError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear",
            where=f"on a layer r is {', '.join(str(len(s.A)) for s in sources)}",
            remedy="Leave combination_type out for the exact sum, or take 'cat' or 'svd'.",
        )
    weights = [s.weight * s.scale for s in sources]
    halves = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(half, w) for half, w in zip(halves, weights, strict=True)]
    A = recipe.merged([s.A for s in sources], signed)
    return A, recipe.merged([s.B for s in sources], halves)


def _of_sides(recipe: Recipe, sources: Sequence[Source], op: Any) -> Factors:
    """Factors side by side, A [R, i, *k] and B [o, R, *1] of the ranks' sum R, the weights in A."""
    return torch.cat([s.weight * s.scale * s.A for s in sources]), torch.cat([s.B for s in sources], 1)


def _of_deltas(recipe: Recipe, sources: Sequence[Source], op: Any) -> Factors:
    """The deltas merged, in the layer's own order (so DARE draws for their entries), and cut to the rank: A [r, i k], B [o, r]."""
    shape, options = op.geometry.shape, recipe.weighting
    deltas = [op.stored((s.scale * (s.B.flatten(1) @ s.A.flatten(1))).reshape(shape)) for s in sources]
    delta = recipe.merged(deltas, [s.weight for s in sources])
    # of full matrices only the first columns are used: they tell, if anything, in the signs that clamping sees
    full = options.svd_full_matrices and options.svd_clamp is not None
    U, S, Vh = torch.linalg.svd(op.canonical(delta).flatten(1), full_matrices=full, driver=options.svd_driver)
    k = min(recipe.rank, len(S))
    A, B = Vh[:k], U[:, :k] * S[:k]
    if options.svd_clamp is None:
        return A, B
    top = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), options.svd_clamp))
    return torch.clamp(A, -top, top), torch.clamp(B, -top, top)


_MADE = {"factors": _of_factors, "sides": _of_sides, "deltas": _of_deltas}


def _padded(factors: Factors, likeA: Tensor, likeB: Tensor) -> Factors:
    """Factors in the shapes of a slot's, with zeros up to its rank."""
    k = len(factors[0])
    A, B = torch.zeros_like(likeA, dtype=factors[0].dtype), torch.zeros_like(likeB, dtype=factors[1].dtype)
    A[:k] = factors[0].reshape(k, *A.shape[1:])
    B[:, :k] = factors[1].reshape(len(B), k, *B.shape[2:])
    return A, B


def _draw(config: Any, g: Geometry, r: int) -> None:
    """Draw from torch's default generator what PEFT draws for a fresh adapter on a layer, so that DARE's numbers are the same after it."""
    init, ones = config.init_lora_weights, [1] * len(g.kernel)
    if g.lookup:
        torch.randn(r, g.in_), torch.randn(g.out, r)
        if init:
            torch.empty(g.out, r).normal_()
        return
    kaiming(r, g.in_, *g.kernel), kaiming(g.out, max(1, r // g.groups), *ones)
    if config.lora_bias:
        torch.empty(g.out).uniform_()
    if init is True:
        kaiming(r, g.in_, *g.kernel)
    elif init == "gaussian":
        torch.empty(r, g.in_, *g.kernel).normal_()
    elif init == "orthogonal":
        torch.randn(r, r), torch.randn(g.in_, r // 2), torch.randn(r // 2, g.out)


# IA3


def _same_sides(model: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether on every layer the factors are all of the inputs or all of the outputs."""
    slots: Any = [getattr(record_of(m), "slots", {}) for m in _layers(model, adapters).values()]
    return all(len({found[a].tensors[FACTORS].shape for a in adapters if a in found}) == 1 for found in slots)


def _ia3(
    model: nn.Module, own: Sequence[Any], adapters: Sequence[str], weights: Sequence[float], name: str, origin: float
) -> Any:
    """l = o + sum_i w_i (l_i - o): with the identity, 1, as origin the exact sum, with 0 what PEFT calls linear."""
    if not _same_sides(model, adapters):
        raise ConfigError(
            "feedforward_modules puts the factors of one layer on different sides",
            remedy="Leave combination_type out for the exact sum.",
        )
    layers = _layers(model, adapters)
    inner = _joined("feedforward_modules", [c.feedforward_modules for c in own])
    config = _changed(own[0], feedforward_modules=inner or None, modules_to_save=None)
    config = _changed(config, **_targets(model, config, own, layers))
    if not isinstance(inner, str) and not {*inner} <= {*config.target_modules}:
        ends = tuple(inner)
        config = _changed(config, feedforward_modules=[t for t in config.target_modules if t.endswith(ends)])

    def written(layer: str, slot: Slot) -> Mapping[str, Tensor]:
        found: Any = getattr(record_of(layers[layer]), "slots", {})
        pairs = [(w, found[a].tensors[FACTORS].detach()) for a, w in zip(adapters, weights, strict=True) if a in found]
        if pairs[0][1].shape != slot.tensors[FACTORS].shape:
            raise ConfigError(f"feedforward_modules of the adapters do not say one side for layer {shown(layer)}")
        return {FACTORS: origin + sum((w * (l - origin) for w, l in pairs), torch.zeros_like(pairs[0][1]))}

    return _attached(model, config, name, layers, written)


# The exact sum


def _sum(model: nn.Module, own: Sequence[Any], adapters: Sequence[str], weights: Sequence[float], name: str) -> Any:
    """A LoRA on every layer that has one of the adapters, at scale 1, of the rank that it takes."""
    totals: dict[str, float] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        totals[adapter] = totals.get(adapter, 0.0) + weight
    _joined("target_modules", [c.target_modules for c in own])  # before anything has changed
    combine(model, totals, name=name)
    try:
        config, plan = _described(model, own, totals, name)
        plan.commit()
    except BaseException:
        take_off({"": model}, {name})
        raise
    return config


def _described(model: nn.Module, own: Sequence[Any], weights: Mapping[str, float], name: str) -> tuple[Any, Plan]:
    """The config with which PEFT makes a sum that is there already, and the writes that make it one of PEFT's."""
    bias, slots = _biased(slots_in(model, name))
    wholes = _wholes(model, weights)
    ranks = {layer: slot.rank for layer, slot in slots.items() if slot.parts}
    r = statistics.mode(ranks.values()) if ranks else LoraConfig.r
    pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != r}
    ranked = {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    first = {field: getattr(own[0], field) for field in _COMMON if hasattr(own[0], field)}
    config = _changed(LoraConfig(), **first, **bias, **ranked, modules_to_save=sorted(wholes) or None)
    config = _changed(config, **_targets(model, config, own, ranks))
    plan, (mix,) = Plan(), mixes_of({"": model}).values()
    adapter = replace(mix.adapters[name], metadata={CONFIG: config.to_json()}, modules=tuple(wholes))
    plan.set(mix, adapters={**mix.adapters, name: adapter})
    for layer, module in _layers(model, [name]).items():
        record: Any = record_of(module)
        plan.carry(module, replace(record, slots={**record.slots, name: slots[layer]}))
    for module, merged_ in wholes.values():
        old: Any = plan.record_of(module)
        still = any(old.copies[adapter].still for adapter in weights.keys() & old.copies.keys())
        plan.carry(module, replace(old, copies={**old.copies, name: Copy(merged_, still)}))
    return config, plan


_COMMON = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out")


def _biased(slots: Mapping[str, Slot]) -> tuple[dict[str, Any], Mapping[str, Slot]]:
    """Changes of the bias as a LoRA has them in PEFT, a bias of B on every layer; where that cannot be, they stay changes of the layer's own."""
    if not any(BIAS in slot.tensors for slot in slots.values()):
        return {}, slots
    if not all(slot.parts for slot in slots.values()):
        return {"bias": "all"}, slots
    if any(slot.parts[0].spec.geometry.lookup for slot in slots.values()):
        return {"bias": "lora_only"}, slots
    return {"lora_bias": True}, {layer: _with_bias(slot) for layer, slot in slots.items()}


def _with_bias(slot: Slot) -> Slot:
    (piece,) = pieces_of(slot)
    tensors = {role: t.detach() for role, t in piece.tensors.items()}
    shift = slot.tensors.get(BIAS, tensors["lora_B"].new_zeros(piece.spec.geometry.out)).detach()
    other = Slot([replace(piece, tensors={**tensors, "lora_B_bias": shift})], trainable=False)
    return other.train(slot.training)


def _wholes(model: nn.Module, weights: Mapping[str, float]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """{name: (module, W + w (W_i - W))} of the modules of which one of the adapters has a copy W_i; W_i itself where that came with its file."""
    found = {}
    for where, module, record in adapted(model):
        for adapter in weights.keys() & record.copies.keys():
            merged_ = bare_copy(record.copies[adapter].module).requires_grad_(False)
            for p, base in zip(merged_.parameters(), bare(module).parameters(), strict=True):
                p.data = p if record.copies[adapter].still else base.detach().to(p).lerp(p, weights[adapter])
            found[where] = module, merged_
    return found


# What they have in common


def _layers(model: nn.Module, adapters: Iterable[str]) -> dict[str, nn.Module]:
    """{name: layer} of those that carry one of the adapters, in the order of the model."""
    names = {*adapters}
    return {n: m for n, m in adapted_layers(model).items() if (r := record_of(m)) and names & {*r.slots}}


def _has_copies(model: nn.Module, adapter: str) -> bool:
    return any(adapter in mix.adapters and mix.adapters[adapter].modules for mix in mixes_of({"": model}).values())


def _changed(config: Any, **values: Any) -> Any:
    """A copy of a config with other values. (dataclasses.replace makes one of the class that a config passes for: PEFT's.)"""
    config = copy.copy(config)
    vars(config).update(values)
    return config


def _joined(field: str, values: Sequence[Any]) -> str | list[str]:
    """Expressions as alternatives, or lists as one."""
    if all(isinstance(v, str) for v in values):
        return "|".join(f"({v})" for v in values)
    if any(isinstance(v, str) for v in values):
        raise ConfigError(
            f"all adapter configs should follow the same target modules type: {field} is a string in some and a list in others",
            remedy="Give all as lists, or all as expressions.",
        )
    return sorted({name for v in values for name in v or ()})


def _targets(model: nn.Module, config: Any, own: Sequence[Any], layers: Iterable[str]) -> dict[str, Any]:
    """The fields with which a config means these layers: the adapters' own joined if that does, else all names."""
    own_fields = {f.name for f in fields(config)}
    joined = {"target_modules": _joined("target_modules", [c.target_modules for c in own])}
    given = _changed(config, **joined)
    names = modules_of(model, lambda m: m is not model)
    if {n for n in names if matches(given, n) and not excludes(given, n)} == {*layers}:
        return joined
    others = own_fields & {"exclude_modules", "layers_to_transform", "layers_pattern"}
    return {"target_modules": sorted(layers), **dict.fromkeys(others)}


def _attached(model: nn.Module, config: Any, name: str, layers: Mapping[str, nn.Module], written: Any) -> Any:
    """Attach a new adapter and give its tensors the values that `written(layer, slot)` says by role."""
    config.validate()
    with torch.random.fork_rng(devices=[]):
        attach_to(
            {"": model},
            {"": layers},
            config,
            name,
            method=method_of(config, {}),
            strength=None,
            quiet=True,
            metadata={CONFIG: config.to_json()},
        )
    try:
        for layer, slot in slots_in(model, name).items():
            slot.requires_grad_(False)
            for role, value in written(layer, slot).items():
                slot.get_parameter(role).data = value
    except BaseException:
        take_off({"": model}, {name})
        raise
    return config
