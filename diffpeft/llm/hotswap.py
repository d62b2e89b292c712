"""hotswap_adapter: another LoRA into the tensors of one that is there, so that a compiled model stays compiled. PEFT's names and errors.

Ranks below the room there is are filled with zeros, and where the new scale differs the ratio goes into B. Files still get the adapter's own tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import converters
from converters.formats.peft import CONFIG, PREFIX
from diffpeft import io
from diffpeft.bundle import Bundle, canonical
from diffpeft.errors import AdapterStateError, ConfigError, ShapeMismatchError, UnknownNameError, listed, shown
from diffpeft.layers.carried import record_of, weights_of
from diffpeft.layers.slot import Piece, Slot, pieces_of
from diffpeft.llm.peft_model import PeftModel
from diffpeft.llm.state import adapter_at, config_of, tensors_in
from diffpeft.methods import LoraConfig
from diffpeft.methods.config import check_choice, check_rank
from diffpeft.methods.lora import Lora
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.attach import mixes_of
from diffpeft.model.plan import Plan
from diffpeft.model.state import slots_in
from diffpeft.model.target import COMPILED, adapted, adapted_layers, components, layers_of
from diffpeft.pipeline.hotswap import replace as put_in_place
from diffpeft.pipeline.match import LORAS, matched, padded

SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")  # what PEFT does not let change
_RANKED = ("r", "lora_alpha", "rank_pattern")
_FROZEN = "adapter {} has room for, or is of, another rank or alpha than it was trained with, and is no longer trained"


def hotswap_adapter(
    model: Any, model_name_or_path: Any, adapter_name: str, torch_device: Any = None, **kwargs: Any
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
    model: Any, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """`hotswap_adapter` for tensors with PEFT's keys, with the adapter's name in them or without.

    A trainable adapter stays so if neither ranks nor alpha change; else it is frozen, with a warning.
    Raises ShapeMismatchError (a RuntimeError) for keys that the adapter in place has not.
    """
    base, old = _parts(model, adapter_name)
    whole = [m for mix in mixes_of({"": base}).values() for m in mix.adapters[adapter_name].modules]
    if whole:
        raise AdapterStateError(
            f"adapter {shown(adapter_name)} trains more than layers",
            where=listed(whole[:5]),
            remedy="Load the new one under another name.",
        )
    slots = slots_in(base, adapter_name)
    bundle = _bundle(base, state_dict, adapter_name, config, parameter_prefix)
    unexpected = [*bundle.carried, *(e.layer for e in bundle.entries if e.layer not in _canonical(base, slots))]
    if unexpected:
        raise ShapeMismatchError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {listed(unexpected)}",
            remedy="The new adapter may be on fewer layers than the one in place, not on others.",
        )
    lasting = all(getattr(config, name) == getattr(old, name) for name in _RANKED)
    before = Plan()
    for module in adapted_layers(base).values():
        before.carry(module, record_of(module), weights_of(module))
    trained = [slot for slot in slots.values() if any(p.requires_grad for p in slot.parameters())]
    try:
        _make_room(model, base, adapter_name, bundle)
        for slot in trained:
            slot.requires_grad_(False)
        put_in_place(base, adapter_name, bundle)
    except BaseException:
        before.commit()
        for slot in trained:
            slot.requires_grad_(True)
        raise
    if trained and lasting:
        for slot in trained:
            slot.source = None  # its file is what it becomes
            slot.requires_grad_(True)
    elif trained:
        warnings.warn(_FROZEN.format(shown(adapter_name)), stacklevel=2)
    own = getattr(model, COMPILED, model)
    if isinstance(own, PeftModel):
        own.peft_config[adapter_name] = PeftConfig.from_peft_type(**config.to_dict())


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
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
    model: Any, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Give the LoRAs of a model room for ranks up to `target_rank`: after the first adapter is there, before the model is compiled.

    Args:
        config: a LoraConfig, or a dict of them, whose ranks become `target_rank`. Those of the model itself stay: they say what a file would hold.
        check_compiled: what to do about a compiled model: "error", "warn" or "ignore".

    Adapters on embeddings keep their ranks. Trainable adapters are frozen, with a warning. The outputs and the files are as before.
    """
    check_choice("check_compiled", check_compiled, ("error", "warn", "ignore"))
    if target_rank is not None:
        check_rank("target_rank", target_rank)
    _refuse_compiled(model, check_compiled)
    wrapper = getattr(model, COMPILED, model)
    base = wrapper.get_base_model() if isinstance(wrapper, PeftModel) else wrapper
    slots = [(name, layer, slot) for layer, _, record in adapted(base) for name, slot in record.slots.items()]
    _refuse_none(slot for _, _, slot in slots)
    if target_rank is None:
        return
    ranks: dict[str, dict[str, int]] = {}
    for name, layer, _ in slots:
        ranks.setdefault(name, {})[layer] = target_rank
    _pad(base, ranks)
    live = wrapper.peft_config if isinstance(wrapper, PeftModel) else {}
    for other in config.values() if isinstance(config, Mapping) else [config]:
        if other is not None and not any(other is c for c in live.values()):
            _set_rank(other, target_rank)


def _refuse_none(slots: Iterable[Slot]) -> None:
    """Raise ConfigError if there is no LoRA."""
    if not any(slot.methods[0] in LORAS for slot in slots):
        raise ConfigError(
            "No adapter layers found on the model",
            remedy="Call prepare_model_for_compiled_hotswap after loading the first adapter.",
        )


def _set_rank(config: LoraConfig, rank: int) -> None:
    """Give a config this rank everywhere."""
    config.r = rank
    config.rank_pattern = dict.fromkeys(config.rank_pattern or {}, rank)


def _refuse_compiled(model: nn.Module, check_compiled: str) -> None:
    """Raise ConfigError, or warn, if a model is compiled already."""
    if not _is_compiled(model) or check_compiled == "ignore":
        return
    said = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
    if check_compiled == "error":
        raise ConfigError(said)
    warnings.warn(f"{said}: it will be compiled again", stacklevel=3)


def _parts(model: Any, name: str) -> tuple[nn.Module, Any]:
    """The user's model in a PeftModel, compiled or not, or a bare module, and an adapter's config. Raises UnknownNameError."""
    model = getattr(model, COMPILED, model)
    if not isinstance(model, PeftModel):
        return model, config_of(model, name)
    if name not in model.peft_config:
        raise UnknownNameError.of("adapter", name, model.peft_config)
    return model.get_base_model(), model.peft_config[name]


def _is_compiled(model: Any) -> bool:
    return hasattr(model, COMPILED) or bool(getattr(model, "_compiled_call_impl", None))


def _canonical(base: nn.Module, layers: Iterable[str]) -> set[str]:
    """The names that a Bundle has for layers."""
    (component,) = components(base)
    return {canonical(component, layer) for layer in layers}


def _bundle(base: Any, tensors: Mapping[str, Tensor], name: str, config: Any, prefix: str) -> Bundle:
    """The new adapter. Weights of the base that are the model's own (embeddings are saved with adapters on them) are left out."""
    infix = re.compile(rf"(\.{prefix}[^.]+)\.{re.escape(name)}(?=\.|$)")
    given = {infix.sub(r"\1", key).removeprefix(PREFIX): t for key, t in tensors.items()}
    layers = layers_of(base)
    for key in list(given):
        layer, _, last = key.replace(".base_layer.", ".").rpartition(".")
        own: Any = layers[layer][0].weight if layer in layers and last == "weight" else None
        if own is not None and own.shape == given[key].shape and torch.equal(own.detach(), given[key].to(own)):
            del given[key]
    names = {component: list(layers) for component in components(base)}
    given = {f"{PREFIX}{key}": t for key, t in given.items()}
    return converters.read(given, format="peft", names=names, metadata={CONFIG: config.to_json()})


def _make_room(model: Any, base: nn.Module, name: str, bundle: Bundle) -> None:
    """What cannot be done within the tensors that are there: room for a higher rank, and a slot for an embedding whose rank or scale differs.

    Raises ShapeMismatchError if the model is compiled.
    """
    ((component, _),) = components(base).items()
    entries = {e.layer: e for e in bundle.entries}
    small: dict[str, int] = {}
    other: list[str] = []
    for layer, slot in slots_in(base, name).items():
        entry, room = entries.get(canonical(component, layer)), _room(slot)
        if entry is None or slot.methods[0] not in LORAS:
            continue
        rank = Lora.rank({role: torch.empty(h.shape, device="meta") for role, h in entry.tensors.items()})
        if room and rank > room:
            small[layer] = rank
        elif not room and (rank, (io.number(entry.alpha) or 0) / rank) != _shape(slot):
            other.append(layer)
    if (small or other) and (_is_compiled(model) or _is_compiled(base)):
        raise ShapeMismatchError(
            "the new adapter has ranks for which there is no room, or an embedding of another rank or scale",
            where=listed([*small, *other]),
            remedy="Call prepare_model_for_compiled_hotswap(model, target_rank=...) before compiling.",
        )
    _pad(base, {name: small})
    if other:
        fresh, _ = matched(bundle, {component: base}, {component: layers_of(base)}, strict=True, trainable=False)
        plan = Plan()
        for layer in other:
            module = base.get_submodule(layer)
            record: Any = record_of(module)
            slots = {**record.slots, name: fresh[component][layer]}
            plan.carry(module, replace(record, slots=slots))
        plan.commit()


def _shape(slot: Slot) -> tuple[int, float]:
    """A LoRA's rank and scale."""
    p = slot.tensors_of(slot.parts[0])
    return Lora.rank(p), Lora.scale(p, slot.parts[0].spec)


def _pad(base: nn.Module, ranks: Mapping[str, Mapping[str, int]]) -> None:
    """Give slots, {adapter: {layer: rank}}, room for ranks; nothing else changes."""
    plan, frozen = Plan(), set()
    for layer, module in adapted_layers(base).items():
        record: Any = record_of(module)
        roomy: dict[str, Slot] = {}
        for name, slot in record.slots.items():
            now, rank = _room(slot), ranks.get(name, {}).get(layer, 0)
            if not now or not rank or now == rank:
                continue
            if now > rank:
                raise ConfigError(
                    f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({now})",
                    where=f"{name}: {layer}",
                    remedy="Give target_rank=, the highest rank of all adapters.",
                )
            roomy[name] = _roomy(slot, rank, layer)
            frozen |= {name} if slot.weight.requires_grad else set()
        if roomy:
            plan.carry(module, replace(record, slots={**record.slots, **roomy}))
    plan.commit()
    for name in sorted(frozen):
        warnings.warn(_FROZEN.format(shown(name)), stacklevel=3)


def _room(slot: Slot) -> int:
    """The rank that a slot's tensors have room for; 0 if it can have no other."""
    tensors = slot.tensors
    return len(tensors["lora_A"]) if slot.methods[0] in LORAS and "lora_A" in tensors else 0


def _roomy(slot: Slot, rank: int, where: str) -> Slot:
    """The slot with zeros up to a rank. Its file is what it was."""
    parts = []
    for part in slot.parts:
        tensors = {role: t.detach() for role, t in slot.tensors_of(part).items()}
        parts.append(padded(Piece(part.method.name, tensors, part.alpha, part.spec), rank, where))
    beside = {role: t.detach() for role, t in slot.tensors.items() if not any(role in p.roles for p in slot.parts)}
    other = Slot(parts, beside, trainable=False)
    other.source = pieces_of(slot)
    return other.train(slot.training)
