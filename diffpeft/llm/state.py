"""Adapters of a model and PEFT's tensors: the keys of `adapter_model.safetensors`, both ways.

A key is `base_model.model.<layer>.<tensor>` in a PeftModel and its files, and `<layer>.<tensor>` on a module without that wrapper.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffpeft import converters, io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.converters.formats import FORMATS, attention
from diffpeft.converters.formats.base import suffix
from diffpeft.converters.formats.fields import whole_scale
from diffpeft.converters.formats.peft import CONFIG, FILE, PREFIX, WEIGHTS
from diffpeft.converters.formats.schema import check_fields
from diffpeft.converters.opening import Opened, opened
from diffpeft.converters.writing import write_config
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    UnknownNameError,
    inside,
    joined,
    listed,
    shown,
)
from diffpeft.files import config_in
from diffpeft.layers.carried import op_of
from diffpeft.layers.slot import BIAS, Bank, Slot
from diffpeft.llm import adalora, renames, tying
from diffpeft.llm import embeddings as tables
from diffpeft.llm import patches as patching
from diffpeft.llm.targets import ending
from diffpeft.methods import LoraConfig
from diffpeft.methods.adalora import AdaLoraConfig
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.peft_config import Config, PeftConfig, PeftType
from diffpeft.model import embeddings as embedded
from diffpeft.model.attach import copy_wholes, install, mixes_of, put_patches, refuse_duplicate
from diffpeft.model.banks import shared_by
from diffpeft.model.mix import Adapter, check_name
from diffpeft.model.plan import Plan
from diffpeft.model.precision import Precision, plan_into
from diffpeft.model.state import beside_slots, entries_of, gathered_slot, slots_in, tensors_of, whole_tensors
from diffpeft.model.target import layers_of
from diffpeft.model.ties import twins
from diffpeft.pipeline.match import LayersByComponent, matched

Incompatible = namedtuple("Incompatible", ["missing_keys", "unexpected_keys", "mismatched_keys"])
Layers = Mapping[str, tuple[nn.Module, nn.Module | None]]  # {name: (layer, its parent)}
_INITS = re.compile(r"pissa.*|olora|loftq")  # inits that start from a part of the weight


def wholes_of(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """{name: module} of those that `modules_to_save` means. Those inside another are that one's. Raises WrongKindError for a container."""
    if not config.modules_to_save:
        return {}
    meant = ending(model, config.modules_to_save, "modules_to_save")
    outer = {n: m for n, m in meant.items() if not any(n.startswith(f"{other}.") for other in meant)}
    ties = tying.ties_of(model, config, outer)
    return outer | {name: model.get_submodule(name) for name in (*ties.values(), *ties)}


def saved(config: Config) -> Config:
    """The config of a file: inits that took a part of the weight have become a LoRA of twice the rank (PEFT's own conversion of them)."""
    config = copy.deepcopy(config)
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        return config
    if _INITS.fullmatch(str(config.init_lora_weights)):
        growth = math.sqrt(2) if config.use_rslora else 2
        config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, growth * config.lora_alpha
        config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
        config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
        config.loftq_config = {}
    return config


def spelt(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    *,
    prefix: str = "",
    gathered: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of one adapter. `gathered` {name in the model: tensor} replaces the model's own tensors, which are shards."""
    slots, adapters = slots_in(model, name), {n for mix in mixes_of({"": model}).values() for n in mix.adapters}
    if name not in adapters:
        raise UnknownNameError.of("adapter", name, adapters)
    tensors: dict[str, Tensor] = {}
    fields = config.to_dict()
    for layer, slot in slots.items():
        for entry in entries_of(layer, gathered_slot(layer, name, slot, gathered or {})):
            for key, tensor in _spelt(entry, fields, name, model.get_submodule(layer), bool(slot.parts)).items():
                tensors[f"{prefix}{attention.spelt(layer, slots)}{key}"] = tensor
    if getattr(config, "save_projection", True):
        keys = FORMATS["peft"].shared_keys if prefix else {}
        tensors |= {keys.get(role, role): tensor for role, tensor in shared_by(slots).items()}
    if isinstance(config, AdaLoraConfig):
        tensors = adalora.pruned(tensors, config, name)
    tensors |= whole_tensors(model, name, prefix, gathered)
    along = tables.saved_along(model, slots, config, embeddings)
    return {f"{prefix}{key}": tensor for key, tensor in along.items()} | tensors


def _spelt(
    entry: Entry, fields: Mapping[str, object], name: str, module: nn.Module, adapted: bool
) -> dict[str, Tensor]:
    """{what follows the layer in PEFT's key: tensor} of one entry. `adapted`: whether PEFT has a layer of its own around the module."""
    by = whole_scale(entry, fields)
    tensors: dict[str, Tensor] = {}
    for role, handle in FORMATS["peft"].stored(entry).items():
        assert handle.tensor is not None  # of a model in memory
        tensor = handle.tensor.detach()
        if role == "lokr_w1":
            tensors[f".{role}"] = tensor / by if by not in (0, 1) else tensor
        elif role == BIAS:
            # PEFT keeps an adapted layer one level below
            bias = op_of(module).bias_name
            tensors[f".base_layer.{bias}" if adapted else f".{bias}"] = _full_bias(entry.layer, name, module, tensor)
        elif role == embedded.WHOLE:
            tensors[".base_layer.weight"] = tensor
        else:
            tensors[f".{suffix(role, entry.method)}"] = tensor
    return tensors


def _full_bias(layer: str, name: str, module: nn.Module, change: Tensor) -> Tensor:
    """A layer's bias [o] with an adapter's change of it. Raises AdapterStateError where the layer has none."""
    bias = op_of(module).bias
    if bias is None:
        raise AdapterStateError(
            f"adapter {shown(name)} adds a bias on layer {shown(layer)}, which has none",
            remedy="PEFT has no place for that; use diffpeft.save_lora.",
        )
    return bias.detach() + change.to(bias.dtype)


def tensors_in(folder: Opened) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    return dict(zip(folder.tensors, io.load(folder.tensors.values()), strict=True))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file, told apart: what goes to slots, whole modules and embeddings. `missing` and `unexpected` are keys."""

    slots: Mapping[str, Slot] = field(default_factory=dict)
    wholes: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # {module: {name in it: tensor}}
    embeddings: embedded.TensorsByLayer = field(default_factory=dict)  # {layer: {name in it: tensor}}
    patches: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # {module: {name in its patch: tensor}}
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass
class _Beside:
    """What a file has beside the tensors of its methods, by what it is for; `unexpected` is for nothing here."""

    wholes: dict[str, dict[str, Handle]] = field(default_factory=dict)
    biases: dict[str, Handle] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Handle]] = field(default_factory=dict)
    unexpected: dict[str, Handle] = field(default_factory=dict)


def read(
    model: nn.Module,
    source: Mapping[str, Tensor] | Opened,
    config: PeftConfig,
    *,
    trainable: bool,
    chosen: Mapping[str, nn.Module],
) -> AdapterFile:
    """What a folder, or a dict of tensors with PEFT's keys, holds for the layers of a model. `chosen` are the layers that the config means.

    Raises CheckpointError and its kin.
    """
    layers = {"": layers_of(model)}
    patches = patching.patches_of(model, config, chosen)
    source = _renamed(model, source, patches)
    patch_tensors, absent = patching.taken(patches, source, PREFIX)
    bundle = _bundle(source, config, layers) if source else Bundle("peft", "", [])
    modules = wholes_of(model, config)
    beside = _divided(model, bundle.carried, modules, layers[""] if config.bias != "none" else {})
    entries = _with_biases(bundle, beside.biases, layers[""])
    if trainable:
        entries = [replace(e, options={**e.options, **_dropouts(e.method, config)}) for e in entries]
    bundle = replace(bundle, carried=beside.unexpected, entries=entries)
    slots: Mapping[str, Slot] = {}
    if bundle.entries or not patch_tensors:
        slots = matched(bundle, {"": model}, layers, strict=True, trainable=trainable)[0][""]
    wholes = _loaded(beside.wholes)
    for where, tensors in wholes.items():
        check_module(f"{bundle.source}: {where}", modules[where], tensors)
    tying.check_alike(tying.ties_of(model, config, modules), wholes, bundle.source)
    return AdapterFile(
        slots,
        wholes,
        tables.followed(model, _loaded(beside.embeddings), modules, bundle.source),
        patch_tensors,
        tuple(f"{PREFIX}{layer}" for layer in (*(n for n in chosen if n not in slots), *absent)),
        tuple(beside.unexpected),
    )


def _renamed(
    model: nn.Module, source: Mapping[str, Tensor] | Opened, patches: patching.Patched
) -> dict[str, Tensor] | Opened:
    """The source with the names that the model has now; opened files stay so where they have them, and need no patch."""
    if not isinstance(source, Opened):
        shared = FORMATS["peft"].shared_keys  # on a module without wrapper they go by their roles
        known = (PREFIX, *shared.values())
        source = {
            key if key.startswith(known) else shared.get(key, PREFIX + key): tensor for key, tensor in source.items()
        }
    names = renames.known_names(model, source.tensors if isinstance(source, Opened) else source)
    if not patches and not names:
        return source
    return renames.fitted(model, tensors_in(source) if isinstance(source, Opened) else source, names, patches)


def _divided(
    model: nn.Module, carried: Mapping[str, Handle], modules: Mapping[str, nn.Module], biased: Layers
) -> _Beside:
    """What of a file is for `modules` that are trained whole, for the biases of the layers `biased`, and for embeddings."""
    known, beside = embedded.embedding_layers(model), _Beside()
    for key, handle in carried.items():
        name = key.removeprefix(PREFIX)
        layer, _, last = name.replace(".base_layer.", ".").rpartition(".")
        module = next((where for where in modules if name.startswith(f"{where}.")), None)
        if module is not None:
            beside.wholes.setdefault(module, {})[name.removeprefix(f"{module}.")] = handle
        elif layer in biased and last == op_of(biased[layer][0]).bias_name:
            beside.biases[layer] = handle
        elif at := tables.place(known, name):
            beside.embeddings.setdefault(at[0], {})[at[1]] = handle
        else:
            beside.unexpected[key] = handle
    return beside


def _loaded(handles: Mapping[str, Mapping[str, Handle]]) -> dict[str, dict[str, Tensor]]:
    """The tensors of {module: {name: handle}}, each module's read together."""
    return {where: dict(zip(by, io.load(by.values()), strict=True)) for where, by in handles.items()}


def _dropouts(method: str, config: PeftConfig) -> dict[str, object]:
    """What an adapter must know to be trained on, and its file says in the config alone."""
    names = LAYOUTS[method].dropouts.items()
    options = {option: value for field_, option in names if (value := getattr(config, field_, None))}
    return {**options, "rank_dropout_scale": True} if method == "loha" and "rank_dropout" in options else options


def _bundle(source: dict[str, Tensor] | Opened, config: PeftConfig, layers: LayersByComponent) -> Bundle:
    """The Bundle of a source with PEFT's names. Raises UnknownKeysError if it holds no adapter."""
    names = {component: list(by_layer) for component, by_layer in layers.items()}
    try:
        return converters.read(source, format="peft", names=names, metadata={CONFIG: config.to_json()})
    except UnknownKeysError as error:
        raise UnknownKeysError(
            "this holds no adapter that PEFT could have written", where=error.where, remedy="Check the folder."
        ) from error


def _with_biases(bundle: Bundle, biases: Mapping[str, Handle], layers: Layers) -> list[Entry]:
    """The entries, with the change of the bias where PEFT has the whole trained bias."""
    shifts = {}
    for layer, handle in biases.items():
        (bias,) = io.load([handle])
        present = op_of(layers[layer][0]).bias
        if present is None or present.shape != bias.shape:
            raise ShapeMismatchError(
                f"layer {shown(layer)} has no bias of shape {tuple(bias.shape)}", where=bundle.source
            )
        shifts[layer] = io.handle((bias.to(present.device).float() - present.detach().float()).cpu())
    entries = [
        replace(e, tensors={**e.tensors, BIAS: shifts.pop(e.layer)}) if e.layer in shifts else e for e in bundle.entries
    ]
    return entries + [Entry("full", layer, {BIAS: shift}) for layer, shift in shifts.items()]


def check_module(where: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless these are all of a module's tensors, in its shapes and finite."""
    present = tensors_of(module)
    if other := sorted(present.keys() ^ tensors.keys()):
        raise ShapeMismatchError(f"the module's tensors are others: {listed(other, 5)}", where=where)
    wrong = [key for key in present if present[key].shape != tensors[key].shape]
    if wrong:
        shapes = (f"{shown(k)} is {tuple(present[k].shape)} in the model, not {tuple(tensors[k].shape)}" for k in wrong)
        old, new = present[wrong[0]], tensors[wrong[0]]
        resized = isinstance(module, (nn.Embedding, nn.Linear)) and old.shape[1:] == new.shape[1:] and len(new)
        raise ShapeMismatchError(
            f"size mismatch: {joined(shapes, 5)}",
            where=where,
            remedy=f"If the vocabulary was resized, call model.resize_token_embeddings({len(new)}) first."
            if resized
            else "It is for another model.",
        )
    if not all(map(io.finite, tensors.values())):
        raise NonFiniteError("values that are not finite", where=where, remedy="The file is damaged.")


def plan_read(
    plan: Plan,
    model: nn.Module,
    name: str,
    config: PeftConfig,
    file: AdapterFile,
    *,
    trainable: bool,
    strength: float | None,
    precision: Precision,
) -> None:
    """Plan to attach what was read as a new adapter."""
    check_name(name)
    mixes = mixes_of({"": model})
    refuse_duplicate(name, mixes.values())
    layers = layers_of(model)
    modules, patches = wholes_of(model, config), patching.patches_of(model, config, file.slots)
    precision.settle({n: m for n, (m, _) in layers.items()}, file.slots)
    precision.settle_patches(patches)
    for where, (_, patch) in patches.items():
        patch.load_state_dict(dict(file.patches.get(where, patch.state_dict())))
        patch.requires_grad_(trainable)
    slots = {**file.slots, **twins(model, tying.ties_of(model, config, file.slots), file.slots, trainable)}
    under, copied_tables = embedded.divided(model, file.embeddings, slots)
    slots |= under
    everywhere = (*modules, *patches, *copied_tables)
    adapter = Adapter(name, tuple(slots), {CONFIG: config.to_json()}, modules=everywhere)
    mix = install(plan, "", {n: layers[n][0] for n in slots}, slots, mixes.get(""), adapter, strength)
    for where, fresh in copy_wholes(plan, mix, name, modules, ties=tying.ties_of(model, config, modules)).items():
        fresh.requires_grad_(trainable).load_state_dict(dict(file.wholes.get(where, fresh.state_dict())))
    embedded.fill(copy_wholes(plan, mix, name, copied_tables, still=True), file.embeddings)
    put_patches(plan, mix, name, patches)
    plan.root(model, mix)


def plan_overwritten(
    plan: Plan, model: nn.Module, name: str, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> Incompatible:
    """Plan to put PEFT's tensors into an adapter that is there. Raises ShapeMismatchError, or what `read` raises."""
    slots = slots_in(model, name)
    resized = adalora.plan_resized(plan, model, name, config) if isinstance(config, AdaLoraConfig) else {}
    file = read(model, tensors, config, trainable=False, chosen={layer: model for layer in slots})
    others = [layer for layer in file.slots if layer not in slots]
    for layer, slot in file.slots.items():
        if layer in slots:
            weight = op_of(model.get_submodule(layer)).parameter
            tensors = _at_the_scale_of(slots[layer], slot)
            _plan_slot(plan, layer, slots[layer], tensors, resized.get(layer, {}), weight)
    for bank, role, tensor in _into_bank(slots, file.slots):
        plan.fill(bank.get_buffer(role), tensor)
    for where, of_module in {**file.wholes, **file.patches}.items():
        parameter = next(iter(model.get_submodule(where)._parameters.values()), None)
        copy = beside_slots(plan, model, where, name)
        assert copy is not None
        for key, tensor in of_module.items():
            plan_into(plan, copy, key, tensor, parameter)
    _plan_embeddings(plan, model, name, file.embeddings, slots)
    return Incompatible(list(file.missing), [*file.unexpected, *others], [])


def _at_the_scale_of(present: Slot, new: Slot) -> dict[str, Tensor]:
    """The tensors of a slot that was read, for one that is there: where a file's LoKr of two whole halves has a scale, the first half gets it."""
    tensors, by = new.tensors, new.scale / present.scale if present.scale else 1.0
    if by != 1 and {"lokr_w1", "lokr_w2"} <= tensors.keys():
        tensors["lokr_w1"] = tensors["lokr_w1"] * by
    return tensors


def _plan_slot(
    plan: Plan,
    layer: str,
    slot: Slot,
    tensors: Mapping[str, Tensor],
    resized: Mapping[str, Tensor],
    weight: object,
) -> None:
    """Plan to put tensors into a slot for a weight; `resized` are those that it will have in the place of others. Raises ShapeMismatchError."""
    present = {**slot.tensors, **resized}
    for role, new in tensors.items():
        before = present.get(role)
        if before is None or before.shape != new.shape:
            raise ShapeMismatchError(
                f"size mismatch: layer {shown(layer)}: {role} is {tuple(new.shape)}, the adapter's is {None if before is None else tuple(before.shape)}",
                remedy="Load it under another name.",
            )
        if role in resized:
            plan.fill(before, new)
        else:
            plan_into(plan, slot, role, new, weight)


def _into_bank(slots: Mapping[str, Slot], others: Mapping[str, Slot]) -> list[tuple[Bank, str, Tensor]]:
    """The writes of tensors that all layers share: a bank, the role, the tensor. Raises ShapeMismatchError for other shapes."""
    bank = next((slot.bank for slot in slots.values() if slot.bank is not None), None)
    if bank is None:
        return []
    tensors, shapes = shared_by(others), {role: tuple(t.shape) for role, t in bank.tensors.items()}
    if bad := [role for role, t in tensors.items() if tuple(t.shape) != shapes[role]]:
        told = ", ".join(f"{role} is {tuple(tensors[role].shape)}, the adapter's is {shapes[role]}" for role in bad)
        raise ShapeMismatchError(told, remedy="Load it under another name.")
    return [(bank, role, tensor) for role, tensor in tensors.items()]


def _plan_embeddings(
    plan: Plan, model: nn.Module, name: str, file: embedded.TensorsByLayer, slots: Mapping[str, Slot]
) -> None:
    """Plan to put embeddings into an adapter: into those of its own that it has, and as new ones."""
    fresh: dict[str, Mapping[str, Tensor]] = {}
    for where, of_module in file.items():
        copy = beside_slots(plan, model, where, name)
        if copy is not None:
            for key, tensor in of_module.items():
                plan_into(plan, copy, key, tensor, tensor)
        elif where in slots and embedded.WHOLE in slots[where].tensors:
            plan_into(plan, slots[where], embedded.WHOLE, of_module["weight"], of_module["weight"])
        else:
            fresh[where] = of_module
    under, copied_tables = embedded.divided(model, fresh, slots)
    if not under and not copied_tables:
        return
    (mix,) = mixes_of({"": model}).values()
    old = plan.view(mix).adapters[name]
    places = {layer: model.get_submodule(layer) for layer in under}
    everywhere = tuple(dict.fromkeys((*old.modules, *copied_tables)))
    layers = tuple(dict.fromkeys((*old.layers, *under)))
    install(plan, "", places, under, mix, replace(old, layers=layers, modules=everywhere), None)
    embedded.fill(copy_wholes(plan, mix, name, copied_tables, still=True), fresh)


def config_of(model: nn.Module, name: str) -> PeftConfig:
    """The config that an adapter on a module was made from. Raises UnknownNameError."""
    adapters = {n: a for mix in mixes_of({"": model}).values() for n, a in mix.adapters.items()}
    if name not in adapters:
        raise UnknownNameError.of("adapter", name, adapters)
    text = adapters[name].metadata.get(CONFIG)
    if text is None:
        raise ConfigError(
            f"adapter {shown(name)} was not made from a config of PEFT's kind",
            remedy="Use inject_adapter_in_model, or diffpeft.save_lora(format='peft').",
        )
    return PeftConfig.from_peft_type(**json.loads(text))


def write(folder: Path, tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, in a folder that is committed as a whole."""
    # shared tensors (a tied head) are written twice
    io.save(folder / WEIGHTS, {key: io.handle(t.contiguous()) for key, t in sorted(tensors.items())}, {"format": "pt"})
    write_config(folder / FILE, config.to_json())


def adapter_at(model_id: str | os.PathLike[str], **options: object) -> tuple[PeftConfig, Opened]:
    """An adapter's config and its tensors, both of one save: in a folder, or in a repository on the Hub. Raises CheckpointError."""
    folder = located(model_id, **options)
    if CONFIG not in folder.metadata:
        raise CheckpointError(f"Can't find {FILE!r} at {os.fspath(model_id)!r}", remedy="Check the path.")
    fields = config_in(folder.metadata[CONFIG], FILE, folder.where)
    check_fields(fields, f"{folder.where}: {FILE}")
    if not fields.get("peft_type"):
        raise CheckpointError(
            "the config says no peft_type",
            where=f"{folder.where}: {FILE}",
            remedy=f"It is one of {', '.join(PeftConfig.types)}.",
        )
    with inside(f"{folder.where}: {FILE}", config=True):
        return PeftConfig.from_fields(fields, **options), folder


def located(model_id: str | os.PathLike[str], **options: object) -> Opened:
    """An adapter's folder, opened: this one, or a download. Raises CheckpointError."""
    return opened(_located(model_id, **options))


def _located(model_id: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of an adapter, downloaded if it is on the Hub. Raises CheckpointError."""
    path = Path(model_id, options.get("subfolder") or "")
    if io.present(path / WEIGHTS):
        return path
    pickled = path / "adapter_model.bin"
    if pickled.is_file():
        io.refuse_pickle(pickled)
    if path.exists() or PeftConfig.fetch is None:
        raise CheckpointError(f"there is no {WEIGHTS}", where=path, remedy="Save the adapter with save_pretrained.")
    for name in (FILE, WEIGHTS):
        try:
            path = Path(PeftConfig.fetch(os.fspath(model_id), name, **options))
        except Exception as error:
            raise CheckpointError(
                f"Can't find {name!r} at {os.fspath(model_id)!r}", remedy="Check the path, or the id and the network."
            ) from error
    return path.parent
