"""hotswap_adapter: another LoRA into the tensors of one that is there, so that a compiled model stays compiled. PEFT's names and errors.

Ranks below the room there is are filled with zeros, and where the new scale differs the ratio goes into B. Files still get the adapter's own tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import converters, io
from diffpeft.bundle import Bundle, canonical
from diffpeft.converters.formats import attention
from diffpeft.converters.formats.base import dotted_role
from diffpeft.converters.formats.peft import CONFIG, PREFIX
from diffpeft.errors import (
    AdapterStateError,
    AdapterStateWarning,
    ConfigError,
    ShapeMismatchError,
    UnknownNameError,
    joined,
    listed,
    shown,
)
from diffpeft.layers.slot import Slot
from diffpeft.llm.peft_model import PeftModel, users_model
from diffpeft.llm.state import adapter_at, config_of, tensors_in
from diffpeft.methods.config import check_rank
from diffpeft.methods.lora import Lora
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.activation import fused_of
from diffpeft.model.attach import mixes_of
from diffpeft.model.plan import Plan, planned
from diffpeft.model.room import is_lora, plan_room, plan_slots, rank_and_scale, room_of
from diffpeft.model.state import slots_in
from diffpeft.model.target import COMPILED, components, layers_of
from diffpeft.pipeline.hotswap import plan_replaced
from diffpeft.pipeline.match import matched

SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")  # what PEFT does not let change
_RANKED = ("r", "lora_alpha", "rank_pattern")
_FROZEN = "adapter {} has room for, or is of, another rank or alpha than it was trained with, and is no longer trained"


def hotswap_adapter(
    model: nn.Module, model_name_or_path: Any, adapter_name: str, torch_device: object = None, **kwargs: Any
) -> None:
    """Put the LoRA in a folder or a repository on the Hub in the place of one of a model; the name stays.

    It may leave out layers, not add any. Its rank may be any up to that of `prepare_model_for_compiled_hotswap`; higher ones only while the model
    is not compiled. `torch_device` changes nothing: the tensors stay where they are.
    Raises ConfigError, UnknownNameError, AdapterStateError, or CheckpointError and its kin, in which case nothing has changed.
    """
    config, folder = adapter_at(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(_parts(model, adapter_name)[1], config)
    hotswap_adapter_from_state_dict(model, tensors_in(folder), adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """`hotswap_adapter` for tensors with PEFT's keys, with the adapter's name in them or without.

    A trainable adapter stays so if neither ranks nor alpha change; else it is frozen, with a warning.
    Raises ShapeMismatchError (a RuntimeError) for keys that the adapter in place has not.
    """
    base, _ = _parts(model, adapter_name)
    if adapter_name in fused_of(base):
        raise AdapterStateError(
            f"Cannot hot-swap adapter {shown(adapter_name)} because it is currently merged into the base weights: it is fused",
            remedy="Call unmerge_adapter first.",
        )
    parts = components(base)
    with planned(parts) as plan:
        _refuse_keys(base, state_dict, adapter_name)
        bundle = _bundle(base, state_dict, adapter_name, config, parameter_prefix)
        _refuse_others(base, adapter_name, bundle)
        slots = slots_in(base, adapter_name)
        trained = [layer for layer, slot in slots.items() if any(p.requires_grad for p in slot.parameters())]
        _plan_room(plan, model, base, adapter_name, bundle)
        plan_replaced(plan, parts, adapter_name, bundle)
        slots = slots_in(base, adapter_name, plan)
        trained_with = config_of(base, adapter_name)
        lasting = all(getattr(config, name) == getattr(trained_with, name) for name in _RANKED)
        for layer in trained:
            plan.require_grad(slots[layer].parameters(), lasting)
            if lasting:
                plan.set(slots[layer], source=None)  # its file is what it becomes
        if trained and not lasting:
            warnings.warn(_FROZEN.format(shown(adapter_name)), AdapterStateWarning, stacklevel=2)
        wrapper = getattr(model, COMPILED, model)
        if isinstance(wrapper, PeftModel):
            plan.entry(wrapper.peft_config, adapter_name, PeftConfig.from_peft_type(**config.to_dict()))


def _refuse_keys(base: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise ShapeMismatchError for keys of layers that the adapter in place is not on."""
    slots, plain = slots_in(base, name), {_without_name(key, name): key for key in tensors}
    places = {key: dotted_role(key.removeprefix(PREFIX)) for key in plain}
    unexpected = [key for key, place in places.items() if place and attention.read(place[0]) not in slots]
    if unexpected:
        told = joined(shown(_with_name(key, name))[1:-1] for key in unexpected)
        raise ShapeMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {told}",
            remedy="The new adapter may be on fewer layers than the one in place, not on others.",
        )


def _refuse_others(base: nn.Module, name: str, bundle: Bundle) -> None:
    """Raise AdapterStateError if the adapter in place trains more than layers, ShapeMismatchError if the new one has more than that."""
    modules = [m for mix in mixes_of({"": base}).values() for m in mix.adapters[name].modules]
    if modules:
        raise AdapterStateError(
            f"adapter {shown(name)} trains more than layers",
            where=listed(modules, 5),
            remedy="Load the new one under another name.",
        )
    present = _canonical(base, slots_in(base, name))
    unexpected = [*bundle.carried, *(e.layer for e in bundle.entries if e.layer not in present)]
    if unexpected:
        raise ShapeMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {listed(unexpected)}",
            remedy="The new adapter may be on fewer layers than the one in place, not on others.",
        )


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ConfigError unless both are of LoRA and agree in what no tensor says."""
    kinds = [str(config.peft_type) for config in (config0, config1)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    if kinds[0] != PeftType.LORA:
        raise ConfigError(f"Hotswapping only supports {PeftType.LORA} but {kinds[0]} was passed")
    for name in SAME:
        one, other = getattr(config0, name), getattr(config1, name)
        if one != other:
            raise ConfigError(f"Configs are incompatible: for {name}, {one} != {other}", remedy="Load it as another.")


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Give the LoRAs of a model room for ranks up to `target_rank`: after the first adapter is there, before the model is compiled.

    Args:
        config: a LoraConfig, or a dict of them, whose ranks become `target_rank`; `model.peft_config` too. A file says the ranks that it has.
        check_compiled: what to do about a compiled model: "error", "warn" or "ignore".

    Adapters on embeddings keep their ranks. What is trained stays so. The outputs and the files are as before.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if target_rank is not None:
        check_rank("target_rank", target_rank)
    _check_not_compiled(model, check_compiled)
    wrapper = getattr(model, COMPILED, model)
    base = users_model(wrapper)
    slots = _slots_by_adapter(base)
    if target_rank is None:
        return
    with planned({"": base}) as plan:
        ranks = {name: dict.fromkeys(of_adapter, target_rank) for name, of_adapter in slots.items()}
        plan_room(plan, base, ranks)
        for other in config.values() if isinstance(config, Mapping) else filter(None, [config]):
            plan.set(other, r=target_rank, rank_pattern=dict.fromkeys(other.rank_pattern or {}, target_rank))


def _slots_by_adapter(base: nn.Module) -> dict[str, dict[str, Slot]]:
    """{adapter: {layer: slot}} of a model. Raises ConfigError if none is a LoRA."""
    slots = {name: slots_in(base, name) for mix in mixes_of({"": base}).values() for name in mix.adapters}
    if not any(is_lora(slot) for of_adapter in slots.values() for slot in of_adapter.values()):
        raise ConfigError(
            "No adapter layers found on the model",
            remedy="Call prepare_model_for_compiled_hotswap after loading the first adapter.",
        )
    return slots


def _check_not_compiled(model: object, check_compiled: str) -> None:
    """Raise ConfigError, or warn, for a model that is compiled already."""
    if _is_compiled(model) and check_compiled != "ignore":
        if check_compiled == "error":
            raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled. It will be compiled again: "
            "call the function before compiling the model.",
            AdapterStateWarning,
            stacklevel=3,
        )


def _parts(model: nn.Module, name: str) -> tuple[nn.Module, PeftConfig]:
    """The user's model in a PeftModel, compiled or not, or a bare module, and an adapter's config. Raises UnknownNameError."""
    model = getattr(model, COMPILED, model)
    if not isinstance(model, PeftModel):
        return model, config_of(model, name)
    if name not in model.peft_config:
        raise UnknownNameError.of("adapter", name, model.peft_config)
    return model.get_base_model(), model.peft_config[name]


def _is_compiled(model: object) -> bool:
    return hasattr(model, COMPILED) or bool(getattr(model, "_compiled_call_impl", None))


def _canonical(base: nn.Module, layers: Iterable[str]) -> set[str]:
    """The names that a Bundle has for layers."""
    (component,) = components(base)
    return {canonical(component, layer) for layer in layers}


def _bundle(base: nn.Module, tensors: Mapping[str, Tensor], name: str, config: PeftConfig, prefix: str) -> Bundle:
    """The new adapter. Weights of the base that are the model's own (embeddings are saved with adapters on them) are left out."""
    plain = {_without_name(key, name, prefix).removeprefix(PREFIX): t for key, t in tensors.items()}
    layers = layers_of(base)
    for key in list(plain):
        layer, _, last = key.replace(".base_layer.", ".").rpartition(".")
        weight: Any = layers[layer][0].weight if layer in layers and last == "weight" else None
        if (
            weight is not None
            and weight.shape == plain[key].shape
            and torch.equal(weight.detach(), plain[key].to(weight))
        ):
            del plain[key]
    names = {component: list(layers) for component in components(base)}
    spelt = {f"{PREFIX}{key}": t for key, t in plain.items()}
    return converters.read(spelt, format="peft", names=names, metadata={CONFIG: config.to_json()})


def _without_name(key: str, name: str, prefix: str = "lora_") -> str:
    """PEFT's key without the adapter's name in it."""
    return re.sub(rf"(\.{prefix}[^.]+)\.{re.escape(name)}(?=\.|$)", r"\1", key)


def _with_name(key: str, name: str) -> str:
    """PEFT's key as a module has it."""
    layer, _, last = key.rpartition(".")
    return f"{layer}.{name}.{last}" if last in ("weight", "bias") else f"{key}.{name}"


def _plan_room(plan: Plan, model: nn.Module, base: nn.Module, name: str, bundle: Bundle) -> None:
    """Plan what cannot be done within the tensors that are there: room for a higher rank, and a slot for an embedding whose rank or scale differs.

    Raises ShapeMismatchError if the model is compiled.
    """
    parts = components(base)
    ((component, _),) = parts.items()
    small, other = _unfit(component, base, name, bundle)
    if (small or other) and (_is_compiled(model) or _is_compiled(base)):
        raise ShapeMismatchError(
            "the new adapter has ranks for which there is no room, or an embedding of another rank or scale",
            where=listed([*small, *other]),
            remedy="Call prepare_model_for_compiled_hotswap(model, target_rank=...) before compiling.",
        )
    plan_room(plan, base, {name: small})
    if other:
        fresh, _ = matched(bundle, parts, {component: layers_of(base)}, strict=True, trainable=False)
        plan_slots(plan, base, name, {layer: fresh[component][layer] for layer in other})


def _unfit(component: str, base: nn.Module, name: str, bundle: Bundle) -> tuple[dict[str, int], list[str]]:
    """{layer: rank} of the layers without room for the new adapter's rank, and those that can have no other rank or scale, and would need one."""
    entries = {e.layer: e for e in bundle.entries}
    small: dict[str, int] = {}
    other: list[str] = []
    for layer, slot in slots_in(base, name).items():
        entry, room = entries.get(canonical(component, layer)), room_of(slot)
        if entry is None or not is_lora(slot):
            continue
        rank = Lora.rank({role: torch.empty(h.shape, device="meta") for role, h in entry.tensors.items()})
        if room and rank > room:
            small[layer] = rank
        elif not room and (rank, (io.number(entry.alpha) or 0) / rank) != rank_and_scale(slot):
            other.append(layer)
    return small, other
