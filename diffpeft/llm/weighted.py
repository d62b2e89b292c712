"""add_weighted_adapter: one new adapter from several, as their exact weighted sum or by one of PEFT's algorithms (model/weighted.py), and its config.

The sum is sum_i w_i dW_i, whatever the methods.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from diffpeft.converters.formats.peft import CONFIG
from diffpeft.errors import AdapterStateError, ConfigError, ConfigWarning, UnknownNameError, listed, near, shown
from diffpeft.llm import attentions
from diffpeft.llm.state import saved
from diffpeft.llm.targets import meant
from diffpeft.methods import IA3Config, LoraConfig
from diffpeft.methods.config import check_choice, check_rank
from diffpeft.methods.lora import is_across
from diffpeft.methods.merging import HOW
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.activation import clashes
from diffpeft.model.attach import Addition, install, method_of, mixes_of, plan_attached, put_patches
from diffpeft.model.combine import combined, exact_sum
from diffpeft.model.mix import Adapter, check_name
from diffpeft.model.patches import Patched, rows_of
from diffpeft.model.plan import Plan
from diffpeft.model.target import with_inner
from diffpeft.model.weighted import (
    Recipe,
    Values,
    Weighted,
    copied_by,
    draw_on,
    filled,
    layers_with,
    merged_loras,
    plan_summed_copies,
    same_sides,
    slots_on,
    summed_factors,
    summed_rows,
    with_biases,
)

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


@dataclass(frozen=True)
class Request:
    """What is asked for: PEFT's arguments of `add_weighted_adapter`, and the configs of the adapters in their order."""

    model: nn.Module
    name: str
    weighted: Weighted
    configs: Sequence[PeftConfig]

    @property
    def adapters(self) -> list[str]:
        """The adapters in their order."""
        return [adapter for adapter, _ in self.weighted]


@dataclass(frozen=True)
class SumOptions:
    """How PEFT's types go about it: see `Tuner.add_weighted_adapter`."""

    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


def plan_weighted(
    plan: Plan,
    model: nn.Module,
    configs: Mapping[str, PeftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str | None,
    options: SumOptions,
) -> Any:
    """Plan to put a new adapter, inactive and frozen, on a model; its config. The arguments are those of `Tuner.add_weighted_adapter`.

    Raises ConfigError, UnknownNameError or AdapterStateError.
    """
    numbers = _checked(model, configs, adapters, weights, name)
    weighted = list(zip(adapters, numbers, strict=True))
    request = Request(model, name, weighted, [configs[adapter] for adapter in adapters])
    kinds = {type(config) for config in request.configs}
    if combination_type is None:
        alike = kinds == {IA3Config} and same_sides(model, adapters)
        return _ia3(plan, request, 1) if alike else _sum(plan, request)
    if combination_type not in TYPES:
        raise ConfigError(
            f"Invalid combination_type: {combination_type}",
            remedy=near(str(combination_type), TYPES) or f"It is one of {', '.join(TYPES)}, or None for the exact sum.",
        )
    if kinds == {IA3Config} and combination_type == "linear":
        return _ia3(plan, request, 0)
    if kinds != {LoraConfig}:
        raise ConfigError(
            f"combination_type {shown(combination_type)} is for LoRA, not for {' and '.join(sorted(c.__name__ for c in kinds))}",
            remedy="Leave it out for the exact weighted sum, which is for all methods.",
        )
    loras = [config for config in request.configs if isinstance(config, LoraConfig)]
    return _lora(plan, request, loras, _recipe(loras, combination_type, options))


def _checked(
    model: nn.Module, configs: Mapping[str, PeftConfig], adapters: Sequence[str], weights: Sequence[float], name: str
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
        if configs[adapter].target_parameters:
            raise ConfigError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter {adapter!r})",
                remedy="Merge the adapters one after the other.",
            )
    if not adapters:
        raise ConfigError(f"Found no adapter matching the names in {list(adapters)}", remedy="Name one at least.")
    if len(weights) != len(adapters):
        raise ConfigError(f"there are {len(adapters)} adapters and {len(weights)} weights", remedy="Give one for each.")
    numbers = [float(w) for w in weights]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"weights is {shown(numbers)}", remedy="A weight is a finite number.")
    shared = [*dict.fromkeys(where for where, what in clashes(model, adapters) if what == "copies")]
    if shared:
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)",
            where=listed(shared),
        )
    return numbers


def _recipe(configs: Sequence[LoraConfig], kind: str, options: SumOptions) -> Recipe:
    """PEFT's rules for a type; one adapter is always `linear`."""
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
    if options.svd_rank is not None:
        check_rank("svd_rank", options.svd_rank)
    check_choice("majority_sign_method", options.majority_sign_method, ("total", "frequency"))
    _check_density(options.density, kind, how)
    rank = {"factors": ranks[0], "sides": sum(ranks), "deltas": options.svd_rank or max(ranks)}[what]
    return Recipe(
        what,
        how,
        rank,
        1.0 if options.density is None else options.density,
        options.majority_sign_method,
        options.svd_clamp,
        options.svd_full_matrices,
        options.svd_driver,
    )


def _check_density(density: float | None, kind: str, how: str) -> None:
    """Raise ConfigError unless a type that leaves out entries is told how many to keep."""
    if HOW[how][0] is None:
        return
    least = "above 0" if "dare" in how else "of at least 0"
    if not isinstance(density, (int, float)) or not (density > 0 if "dare" in how else density >= 0):
        raise ConfigError(f"density is {density}, with {kind!r}", remedy=f"It is a number {least} and below 1.")
    if density >= 1:
        warnings.warn(f"density is {density}: at 1 and above nothing is left out", ConfigWarning, stacklevel=7)


def _lora(plan: Plan, request: Request, configs: Sequence[LoraConfig], recipe: Recipe) -> PeftConfig:
    """Plan a LoRA by one of PEFT's types; its config."""
    model, leading = request.model, configs[0]
    layers = layers_with(model, request.adapters)
    config = _changed(
        saved(leading),
        r=recipe.rank,
        lora_alpha=recipe.rank,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        modules_to_save=None,
        trainable_token_indices=None,
    )
    config = _changed(config, **_targets(model, config, request.configs, layers))
    left_out = [
        adapter
        for adapter, c in zip(request.adapters, configs, strict=True)
        if c.lora_bias or _has_more(model, adapter)
    ]
    if left_out:
        warnings.warn(
            "what adapters train beside the weights of their layers (lora_bias, modules_to_save, trainable_token_indices) "
            f"is left out: {listed(left_out)}",
            ConfigWarning,
            stacklevel=6,
        )
    draw_on(model, request.adapters, leading, recipe.rank)
    return _plan_fresh(plan, request, config, layers, merged_loras(model, request.weighted, recipe))


def _ia3(plan: Plan, request: Request, origin: float) -> PeftConfig:
    """Plan an (IA)^3 that is a sum of others; its config."""
    model = request.model
    if not same_sides(model, request.adapters):
        raise ConfigError(
            "feedforward_modules puts the factors of one layer on different sides",
            remedy="Leave combination_type out for the exact sum.",
        )
    layers = layers_with(model, request.adapters)
    inner = _joined("feedforward_modules", [c.feedforward_modules for c in request.configs if isinstance(c, IA3Config)])
    config = _changed(request.configs[0], feedforward_modules=inner or None, modules_to_save=None)
    config = _changed(config, **_targets(model, config, request.configs, layers))
    if not isinstance(inner, str) and not {*inner} <= {*config.target_modules}:
        ends = tuple(inner)
        config = _changed(config, feedforward_modules={t for t in config.target_modules if t.endswith(ends)})
    return _plan_fresh(plan, request, config, layers, summed_factors(model, request.weighted, origin))


def _plan_fresh(
    plan: Plan, request: Request, config: PeftConfig, layers: Mapping[str, nn.Module], values: Values
) -> PeftConfig:
    """Plan to attach the new adapter with these values."""
    config.validate()
    addition = Addition(
        request.name,
        config,
        method_of(config, {}),
        strength=None,
        trainable=False,
        quiet=True,
        finish=lambda modules, slots: filled(values)(modules, attentions.doubled(slots)),
        metadata={CONFIG: config.to_json()},
        as_in_peft=any(
            is_across(slots_on(m)[n].tensors) for m in layers.values() for n in request.adapters if n in slots_on(m)
        ),
    )
    with torch.random.fork_rng(devices=[]):
        plan_attached(plan, {"": request.model}, {"": layers}, addition)
    return config


# The exact sum


def _sum(plan: Plan, request: Request) -> PeftConfig:
    """Plan a LoRA on every layer that has one of the adapters, at scale 1, of the rank that it takes; its config."""
    model, name = request.model, request.name
    weights: dict[str, float] = {}
    for adapter, weight in request.weighted:
        weights[adapter] = weights.get(adapter, 0.0) + weight
    _joined("target_modules", [c.target_modules for c in request.configs])  # before what takes long
    slots, _ = combined({"": model}, weights, name, exact_sum)
    biases, named = with_biases(attentions.as_in_files(slots[""]))
    modules, rows = copied_by(model, weights), summed_rows(model, weights)
    ranks = {layer: slot.rank for layer, slot in attentions.said(named).items() if slot.parts}
    config = _config_of_sum(request, ranks, _BIASES[biases], modules, rows)
    (mix,) = mixes_of({"": model}).values()
    adapter_ = Adapter(name, tuple(named), {CONFIG: config.to_json()}, modules=(*modules, *rows))
    install(plan, "", layers_with(model, weights), named, mix, adapter_, None)
    plan_summed_copies(plan, model, name, weights)
    put_patches(plan, mix, name, rows)
    for _, patch in rows.values():
        patch.requires_grad_(False)
    plan.root(model, mix)
    return config


_BIASES: dict[str, dict[str, object]] = {
    "": {},
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
}
_COMMON = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out")


def _config_of_sum(
    request: Request, ranks: Mapping[str, int], biases: Mapping[str, object], modules: Sequence[str], rows: Patched
) -> Any:
    """The config with which PEFT makes a LoRA of these ranks on these layers."""
    leading = request.configs[0]
    r = statistics.mode(ranks.values()) if ranks else LoraConfig.r
    pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != r}
    ranked = {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    common = {field: getattr(leading, field) for field in _COMMON if hasattr(leading, field)}
    index = {where: rows_of(patch) for where, (_, patch) in rows.items()}
    config = _changed(
        LoraConfig(),
        **common,
        **biases,
        **ranked,
        modules_to_save=sorted(modules) or None,
        trainable_token_indices=index or None,
    )
    return _changed(config, **_targets(request.model, config, request.configs, ranks))


# What they have in common


def _has_more(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter has copies of modules, or rows of tables."""
    return any(adapter in mix.adapters and mix.adapters[adapter].modules for mix in mixes_of({"": model}).values())


def _changed(config: PeftConfig, **values: object) -> Any:
    """A copy of a config with other values. (dataclasses.replace makes one of the class that a config passes for: PEFT's.)"""
    config = copy.copy(config)
    vars(config).update(values)
    return config


def _joined(field: str, values: Sequence[Any]) -> str | set[str]:
    """Expressions as alternatives, or names as one set."""
    if all(isinstance(v, str) for v in values):
        return "|".join(f"({v})" for v in values)
    if any(isinstance(v, str) for v in values):
        raise ConfigError(
            f"all adapter configs should follow the same target modules type: {field} is a string in some and a list in others",
            remedy="Give all as lists, or all as expressions.",
        )
    return {name for v in values for name in v or ()}


def _targets(
    model: nn.Module, config: PeftConfig, configs: Sequence[PeftConfig], layers: Iterable[str]
) -> dict[str, Any]:
    """The fields with which a config means these layers: those of the adapters' configs joined if that does, else all names."""
    joined = {"target_modules": _joined("target_modules", [c.target_modules for c in configs])}
    like_them = _changed(config, **joined)
    if {*with_inner(meant(model, like_them))} == {*layers}:
        return joined
    others = {f.name for f in fields(config)} & {"exclude_modules", "layers_to_transform", "layers_pattern"}
    spoken = attentions.said(dict.fromkeys(layers))
    return {"target_modules": set(spoken), **dict.fromkeys(others)}
