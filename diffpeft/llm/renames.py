"""Adapters with the names that models had in former versions of transformers: renamed layers of vision language models, and experts of a mixture one by one.

The renamings are transformers' own (for the weights of checkpoints); where experts have become one tensor, PEFT 0.21.2's rules say what a LoRA on each
becomes: a LoRA on the stacked parameter. With transformers 4 there is nothing to rename.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from converters.formats.base import dotted_role
from converters.formats.peft import PREFIX
from diffpeft import patterns
from diffpeft.errors import CheckpointError, ConfigError, MissingKeysError, listed, shown
from diffpeft.layers.parameters import Factors
from diffpeft.methods.peft_config import PeftType
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
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.lora_([AB])\.weight")


def parts_of(model: Any) -> Mapping[str, str]:
    """{old layer: parameter} of a mixture whose experts have become stacked parameters; empty for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as kinds
    except ImportError:  # transformers 4
        return {}
    return _EXPERTS.get("mixtral" if kind == "mixtral" else kinds.get(str(kind), ""), {})


# Configs


def stacked(model: Any, config: Any, linear: Iterable[str], chosen: Any) -> None:
    """Turn the targets of a config that are experts' layers into `target_parameters`, with ranks and alphas of fused ones multiplied: in place, as PEFT.

    Args:
        linear: what `all-linear` means, if that is the target.
        chosen: says whether the config chooses a name.

    Raises ConfigError for one part of what is fused without the others.
    """
    parts = parts_of(model)
    if config.peft_type != PeftType.LORA or not parts or config.target_modules is None:
        return
    targets = config.target_modules
    if isinstance(targets, str):
        targets = {*linear, *parts} if linear else _meant(model, parts, chosen)
        if not targets:
            return
    old = {t: next((part for part in parts if t == part or t.endswith(f".{part}")), None) for t in targets}
    present = {part for part in old.values() if part}
    if not present and not isinstance(config.target_modules, str):
        return
    for new in {parts[part] for part in present}:
        fused = [part for part in parts if parts[part] == new]
        lost = [part for part in fused if part not in present]
        if lost:
            raise ConfigError(
                f"Cannot convert PEFT target(s) {', '.join(p for p in fused if p in present)} without also targeting {', '.join(lost)} "
                f"because they are fused into {new}.",
                remedy="Name all of them in target_modules, or the parameter in target_parameters.",
            )
        if len(fused) > 1:
            by = math.sqrt(len(fused)) if config.use_rslora else len(fused)
            config.rank_pattern = {**config.rank_pattern, rf".*\.{new}": config.r * len(fused)}
            config.alpha_pattern = {**config.alpha_pattern, rf".*\.{new}": config.lora_alpha * by}
    config.target_parameters = sorted({*(config.target_parameters or ()), *(parts[part] for part in present)}) or None
    config.target_modules = sorted(t for t, part in old.items() if part is None)


def _meant(model: nn.Module, parts: Mapping[str, str], chosen: Any) -> set[str]:
    """The last segments of the names that an expression chooses, among them layers that have become parts of a parameter."""
    parameters = [name for name, _ in model.named_parameters()]
    found = {n.rpartition(".")[2] for n in (*(n for n, _ in model.named_modules()), *parameters) if chosen(n)}
    for old, new in parts.items():
        around = {n.rpartition(".")[0] for n in parameters if n.rpartition(".")[2] == new}
        if any(chosen(f"{where}.{old}") for where in around):
            found.add(old)
    return found


# Tensors


def mapped(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Tensors with keys renamed by {expression: replacement}, the first that matches, beyond PEFT's prefix. Raises CheckpointError for other keys."""
    if not key_mapping:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise CheckpointError(
                f"key_mapping is for PEFT's keys, and {shown(key)} is none", remedy="They start with base_model."
            )
        found[prefix + patterns.replaced(key_mapping, key.removeprefix(prefix))] = tensor
    return found


def known_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """{key: as the model has it now} of the keys that name layers under a former version's names."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    names = set(modules_of(model, lambda m: True))
    unknown = [key for key in keys if _layer(key) not in names]
    new = _renamed(model, [key.removeprefix(PREFIX) for key in unknown]) if unknown else []
    found = zip(unknown, new, strict=True)
    return {key: PREFIX + name for key, name in found if _layer(name) in names or _EXPERT.fullmatch(name)}


def fitted(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    patches: Mapping[str, tuple[nn.Module, Any]],
) -> dict[str, Tensor]:
    """Tensors with the names that a model has now (`known_names`), where the LoRAs of a layer's experts are one LoRA on their parameter.

    `patches` {module: (it, its patch)} are what the adapter changes of parameters. Raises MissingKeysError or CheckpointError.
    """
    return _stacked({names.get(key, key): tensor for key, tensor in tensors.items()}, parts_of(model), patches)


def _layer(key: str) -> str:
    own = key.removeprefix(PREFIX)
    found = dotted_role(own)
    return (found[0] if found else own.rpartition(".")[0]).replace(".base_layer", "")


def _renamed(model: Any, names: list[str]) -> list[str]:
    """Names of former versions as they are now, as transformers renames the keys of checkpoints."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return names
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    return [rename_source_key(name, renamings, [])[0] for name in names]


def _stacked(
    tensors: Mapping[str, Tensor], parts: Mapping[str, str], patches: Mapping[str, tuple[nn.Module, Any]]
) -> dict[str, Tensor]:
    """Tensors in which the LoRAs of the experts of a layer are one LoRA on their parameter."""
    found: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[tuple[str, int, str], Tensor]] = {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key.removeprefix(PREFIX))
        new = parts.get(match[3]) if match else None
        patch = patches.get(match[1], (None, None))[1] if match else None
        if match is None or new is None or not isinstance(patch, Factors) or new not in patch.names:
            found[key] = tensor
        else:
            experts.setdefault((match[1], new), {})[match[3], int(match[2]), match[4]] = tensor
    for (where, new), own in experts.items():
        patch = patches[where][1]
        fused = [part for part in parts if parts[part] == new]
        A, B = _one(where, own, fused, patch.stack_of(new).experts)
        for letter, tensor in (("A", A), ("B", B)):
            found[f"{PREFIX}{where}.{patch.place_of(new)}lora_{letter}.weight"] = tensor
    return found


def _one(
    where: str, own: Mapping[tuple[str, int, str], Tensor], fused: list[str], experts: int
) -> tuple[Tensor, Tensor]:
    """The factors of the experts as those of one parameter: A [experts * r, in] expert by expert, B [out, r * experts] rank by rank.

    Parts that lie one below the other in the parameter have ranks of their own: their A one below the other, their B along a diagonal.
    """
    lost = [f"{where}.{e}.{p}.lora_{f}" for e in range(experts) for p in fused for f in "AB" if (p, e, f) not in own]
    if lost:
        raise MissingKeysError(
            f"there are LoRAs for some experts only, and all of them are one parameter now: {len(lost)} are not there",
            where=listed(lost[:5]),
        )
    A = [torch.cat([own[p, e, "A"] for p in fused]) for e in range(experts)]
    B = [torch.block_diag(*(own[p, e, "B"] for p in fused)) for e in range(experts)]
    if len({t.shape for t in A}) > 1 or len({t.shape for t in B}) > 1:
        raise CheckpointError(f"the LoRAs of the experts of {shown(where)} have different ranks")
    return torch.cat(A), torch.stack(B, -1).flatten(1)
