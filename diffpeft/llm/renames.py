"""Adapters with the names that models had in former versions of transformers: renamed layers of vision language models, and experts of a mixture one by one.

The renamings are transformers' own (for the weights of checkpoints); where experts have become one tensor, PEFT 0.21.2's rules say what a LoRA on each
becomes: a LoRA on the stacked parameter. With transformers 4 there is nothing to rename.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from diffpeft import patterns
from diffpeft.converters.formats.base import dotted_role
from diffpeft.converters.formats.peft import PREFIX
from diffpeft.errors import CheckpointError, ConfigError, MissingKeysError, listed, shown
from diffpeft.layers.parameters import ParameterFactors
from diffpeft.methods import LoraConfig
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.patches import Patched
from diffpeft.model.target import modules_of

# {how a mixture was named: {old layer: (the parameter that it has become, or is a part of)}}, parts in the order in which they lie in it
_EXPERTS: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
Experts = dict[tuple[str, int, str], Tensor]  # {(former layer, number of the expert, A or B): tensor}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.lora_([AB])\.weight")


def parts_of(model: nn.Module) -> Mapping[str, str]:
    """{old layer: parameter} of a mixture whose experts have become stacked parameters; empty for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as kinds
    except ImportError:  # transformers 4
        return {}
    return _EXPERTS.get("mixtral" if kind == "mixtral" else kinds.get(str(kind), ""), {})


# Configs


def stacked(model: nn.Module, config: PeftConfig, linear: Iterable[str], chosen: Callable[[str], bool]) -> None:
    """Turn the targets of a config that are experts' layers into `target_parameters`, with ranks and alphas of joint ones multiplied: in place, as PEFT.

    Args:
        linear: what `all-linear` means, if that is the target.
        chosen: says whether the config chooses a name.

    Raises ConfigError for one part of what is joint without the others.
    """
    parts = parts_of(model)
    if not parts or not _is_lora(config):
        return
    targets = _targets(model, config, parts, linear, chosen)
    part_of = {target: part for target in targets if (part := _part(target, parts))}
    if not targets or not (part_of or isinstance(config.target_modules, str)):
        return
    parameters = {parts[part] for part in part_of.values()}
    for parameter in parameters:
        _multiply(config, parameter, parts, set(part_of.values()))
    config.target_parameters = sorted({*(config.target_parameters or ()), *parameters}) or None
    config.target_modules = {target for target in targets if target not in part_of}


def _is_lora(config: PeftConfig) -> TypeGuard[LoraConfig]:
    """Whether a config is of LoRA, and not of AdaLoRA."""
    return isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA


def _targets(
    model: nn.Module,
    config: LoraConfig,
    parts: Mapping[str, str],
    linear: Iterable[str],
    chosen: Callable[[str], bool],
) -> Collection[str]:
    """The names that a config means, those of former layers among them; none where it names none."""
    if not isinstance(config.target_modules, str):
        return config.target_modules or ()
    return {*(name.rpartition(".")[2] for name in linear), *parts} if linear else _meant(model, parts, chosen)


def _part(target: str, parts: Iterable[str]) -> str | None:
    """Which former layer a target names, by its whole name or its end."""
    return next((part for part in parts if target == part or target.endswith(f".{part}")), None)


def _multiply(config: LoraConfig, parameter: str, parts: Mapping[str, str], present: Collection[str]) -> None:
    """Give a parameter of which several former layers are `parts` the rank and alpha of all. Raises ConfigError if some are not `present`."""
    joint = [part for part, whose in parts.items() if whose == parameter]
    absent = [part for part in joint if part not in present]
    if absent:
        raise ConfigError(
            f"Cannot convert PEFT target(s) {', '.join(p for p in joint if p in present)} without also targeting {', '.join(absent)} "
            f"because they are fused into {parameter}.",
            remedy="Name all of them in target_modules, or the parameter in target_parameters.",
        )
    if len(joint) > 1:
        by = math.sqrt(len(joint)) if config.use_rslora else len(joint)
        config.rank_pattern = {**config.rank_pattern, rf".*\.{parameter}": config.r * len(joint)}
        config.alpha_pattern = {**config.alpha_pattern, rf".*\.{parameter}": config.lora_alpha * by}


def _meant(model: nn.Module, parts: Mapping[str, str], chosen: Callable[[str], bool]) -> set[str]:
    """The last segments of the names that an expression chooses, among them layers that have become parts of a parameter."""
    parameters = [name for name, _ in model.named_parameters()]
    names = (*(name for name, _ in model.named_modules()), *parameters)
    ends = {name.rpartition(".")[2] for name in names if chosen(name)}
    for old, new in parts.items():
        around = {n.rpartition(".")[0] for n in parameters if n.rpartition(".")[2] == new}
        if any(chosen(f"{where}.{old}") for where in around):
            ends.add(old)
    return ends


# Tensors


def mapped(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Tensors with keys renamed by {expression: replacement}, the first that matches, beyond PEFT's prefix. Raises CheckpointError for other keys."""
    if not key_mapping:
        return dict(tensors)
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise CheckpointError(
                f"key_mapping is for PEFT's keys, and {shown(key)} is none", remedy="They start with base_model."
            )
        renamed[prefix + patterns.replaced(key_mapping, key.removeprefix(prefix))] = tensor
    return renamed


def known_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{key: as the model has it now} of the keys that name layers under a former version's names."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    names = set(modules_of(model, lambda m: True))
    unknown = [key for key in keys if _layer(key) not in names]
    new = _renamed(model, [key.removeprefix(PREFIX) for key in unknown]) if unknown else []
    pairs = zip(unknown, new, strict=True)
    return {key: PREFIX + name for key, name in pairs if _layer(name) in names or _EXPERT.fullmatch(name)}


def fitted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    patches: Patched,
) -> dict[str, Tensor]:
    """Tensors with the names that a model has now (`known_names`), where the LoRAs of a layer's experts are one LoRA on their parameter.

    `patches` {module's name: (module, patch)} are what the adapter changes of parameters. Raises MissingKeysError or CheckpointError.
    """
    return _stacked({names.get(key, key): tensor for key, tensor in tensors.items()}, parts_of(model), patches)


def _layer(key: str) -> str:
    name = key.removeprefix(PREFIX)
    place = dotted_role(name)
    return (place[0] if place else name.rpartition(".")[0]).replace(".base_layer", "")


def _renamed(model: Any, names: list[str]) -> list[str]:
    """Names of former versions as they are now, as transformers renames the keys of checkpoints."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return names
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    return [rename_source_key(name, renamings, [])[0] for name in names]


def _stacked(tensors: Mapping[str, Tensor], parts: Mapping[str, str], patches: Patched) -> dict[str, Tensor]:
    """Tensors in which the LoRAs of the experts of a layer are one LoRA on their parameter."""
    stacked_tensors: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], Experts] = {}
    factors: dict[str, ParameterFactors] = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key.removeprefix(PREFIX))
        parameter = parts.get(match[3]) if match else None
        patch = patches[match[1]][1] if match and match[1] in patches else None
        if (
            match is None
            or parameter is None
            or not isinstance(patch, ParameterFactors)
            or parameter not in patch.names
        ):
            stacked_tensors[key] = tensor
        else:
            factors[match[1]] = patch
            experts.setdefault((match[1], parameter), {})[match[3], int(match[2]), match[4]] = tensor
    for (where, parameter), by_expert in experts.items():
        patch = factors[where]
        joint = [part for part in parts if parts[part] == parameter]
        A, B = _as_one(where, by_expert, joint, patch.stack_of(parameter).experts)
        for letter, tensor in (("A", A), ("B", B)):
            stacked_tensors[f"{PREFIX}{where}.{patch.place_of(parameter)}lora_{letter}.weight"] = tensor
    return stacked_tensors


def _as_one(where: str, by_expert: Experts, joint: Sequence[str], experts: int) -> tuple[Tensor, Tensor]:
    """The factors of the experts (A [r, in], B [out, r]) as those of one parameter: A [experts * r, in] expert by expert, B [out, r * experts] rank by rank.

    Parts that lie one below the other in the parameter have ranks of their own: their A one below the other, their B along a diagonal.
    """
    absent = [
        f"{where}.{e}.{part}.lora_{factor}"
        for e in range(experts)
        for part in joint
        for factor in "AB"
        if (part, e, factor) not in by_expert
    ]
    if absent:
        raise MissingKeysError(
            f"there are LoRAs for some experts only, and all of them are one parameter now: {len(absent)} are not there",
            where=listed(absent, 5),
        )
    A = [torch.cat([by_expert[part, e, "A"] for part in joint]) for e in range(experts)]
    B = [torch.block_diag(*(by_expert[part, e, "B"] for part in joint)) for e in range(experts)]
    if len({t.shape for t in A}) > 1 or len({t.shape for t in B}) > 1:
        raise CheckpointError(f"the LoRAs of the experts of {shown(where)} have different ranks")
    return torch.cat(A), torch.stack(B, -1).flatten(1)
