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

import converters
from converters.formats import FORMATS
from converters.formats.base import dotted_role, suffix
from converters.formats.fields import whole_scale
from converters.formats.peft import CONFIG, FILE, PREFIX, WEIGHTS
from converters.formats.schema import check_fields
from converters.opening import Opened, opened
from converters.writing import write_config
from diffpeft import io
from diffpeft.bundle import Bundle, Entry, Handle
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    UnknownNameError,
    inside,
    listed,
    shown,
)
from diffpeft.files import config_in
from diffpeft.layers.carried import ADAPTERS, COPIES, bare, escaped, record_of
from diffpeft.layers.slot import BIAS, Slot
from diffpeft.llm import adalora, renames, tying
from diffpeft.llm import embeddings as tables
from diffpeft.llm import patches as patching
from diffpeft.llm.dtypes import Precision, put_into
from diffpeft.methods.adalora import AdaLoraConfig
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.attach import copy_wholes, install, mixes_of, put_patches, refuse_duplicate
from diffpeft.model.banks import shared_by
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Adapter, check_name
from diffpeft.model.plan import Plan
from diffpeft.model.state import entries_of, slots_in
from diffpeft.model.target import adapted, layers_of, modules_of
from diffpeft.pipeline.match import matched

Write = tuple[nn.Module, str, Tensor, Any]  # an adapter's module, a name in it, numbers, the weight that it is for
Incompatible = namedtuple("Incompatible", ["missing_keys", "unexpected_keys", "mismatched_keys"])
_INITS = re.compile(r"pissa.*|olora|loftq")  # inits that start from a part of the weight


def wholes_of(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """{name: module} of those that `modules_to_save` names by a whole name or its end. Those inside another are that one's."""
    names = getattr(config, "modules_to_save", None)
    if not names:
        return {}
    found = {
        name: module
        for name, (module, _) in modules_of(model, lambda m: m is not model).items()
        if any(name == n or name.endswith(f".{n}") for n in names)
    }
    outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    ties = tying.ties_of(model, config, outer)
    return outer | {name: model.get_submodule(name) for name in (*ties.values(), *ties)}


def saved(config: Any) -> Any:
    """The config of a file: inits that took a part of the weight have become a LoRA of twice the rank (PEFT's own conversion of them)."""
    config = copy.deepcopy(config)
    if config.peft_type == PeftType.LORA and _INITS.fullmatch(str(getattr(config, "init_lora_weights", ""))):
        growth = math.sqrt(2) if config.use_rslora else 2
        config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, growth * config.lora_alpha
        config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
        config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
        config.loftq_config = {}
    return config


def spelt(
    model: nn.Module,
    name: str,
    config: Any,
    *,
    prefix: str = "",
    given: Mapping[str, Tensor] | None = None,
    embeddings: bool | str = "auto",
) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of one adapter. `given` {name in the model: tensor} replaces the model's own tensors (gathered from shards)."""
    slots, adapters = slots_in(model, name), {n for mix in mixes_of({"": model}).values() for n in mix.adapters}
    if name not in adapters:
        raise UnknownNameError.of("adapter", name, adapters)
    found: dict[str, Tensor] = {}
    fmt, fields = FORMATS["peft"], config.to_dict()
    for layer, slot in slots.items():
        own = _with(slot, {r: t for r in slot.tensors if (t := (given or {}).get(_inside(layer, name, r))) is not None})
        for entry in entries_of(layer, own):
            by = whole_scale(entry, fields)
            for role, handle in fmt.stored(entry).items():
                assert handle.tensor is not None  # of a model in memory
                if role == "lokr_w1" and by != 1:
                    found[f"{prefix}{layer}.{role}"] = handle.tensor.detach() / by if by else handle.tensor.detach()
                if role == "lokr_w1" and by not in (0, 1):
                    found[f"{prefix}{layer}.{role}"] = handle.tensor.detach() / by
                elif role == BIAS:
                    bias: Any = model.get_submodule(layer).bias
                    if bias is None:
                        raise AdapterStateError(
                            f"adapter {shown(name)} adds a bias on layer {shown(layer)}, which has none",
                            remedy="PEFT has no place for that; use diffpeft.save_lora.",
                        )
                    # PEFT keeps an adapted layer one level below
                    inner = f"{layer}.base_layer" if slot.parts else layer
                    found[f"{prefix}{inner}.bias"] = bias.detach() + handle.tensor.to(bias.dtype)
                elif role == tables.WHOLE:
                    found[f"{prefix}{layer}.base_layer.weight"] = handle.tensor.detach()
                else:
                    found[f"{prefix}{layer}.{suffix(role, entry.method)}"] = handle.tensor.detach()
    if getattr(config, "save_projection", True):
        keys = FORMATS["peft"].shared_keys if prefix else {}
        found |= {keys.get(role, role): tensor for role, tensor in shared_by(slots).items()}
    if isinstance(config, AdaLoraConfig):
        found = adalora.pruned(found, config, name)
    found |= whole_tensors(model, name, prefix, given)
    along = tables.saved_along(model, slots, config, embeddings)
    return {f"{prefix}{key}": tensor for key, tensor in along.items()} | found


def whole_tensors(
    model: nn.Module, name: str, prefix: str, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of the modules that an adapter trains whole, and of those whose parameters it changes."""
    found: dict[str, Tensor] = {}
    for where, _, record in adapted(model):
        for own in record.modules(name, hidden=False):
            at = f"{where}.{COPIES}.{escaped(name)}."
            for key, tensor in {} if isinstance(own, Slot) else own.state_dict().items():
                found[f"{prefix}{where}.{key}"] = (given or {}).get(at + key, tensor).detach()
    return found


def tensors_in(folder: Opened) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    return dict(zip(folder.tensors, io.load(folder.tensors.values()), strict=True))


def _inside(layer: str, name: str, role: str) -> str:
    """The name of an adapter's tensor in the model."""
    return f"{layer}.{ADAPTERS}.{escaped(name)}.{role}"


def _with(slot: Slot, given: Mapping[str, Tensor]) -> Slot:
    """A slot with other tensors."""
    if not given:
        return slot
    other = copy.copy(slot)
    other.__dict__["_parameters"] = {
        role: nn.Parameter(given[role], requires_grad=False) if role in given else p
        for role, p in slot._parameters.items()
    }
    return other


@dataclass(frozen=True)
class Found:
    """An adapter's file, told apart: what goes to slots, whole modules and embeddings. `missing` and `unexpected` are keys."""

    slots: Mapping[str, Slot] = field(default_factory=dict)
    wholes: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # {module: {name in it: tensor}}
    embeddings: tables.Tensors = field(default_factory=dict)  # {layer: {name in it: tensor}}
    patches: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # {module: {name in its patch: tensor}}
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def read(model: nn.Module, source: Any, config: Any, *, trainable: bool, chosen: Mapping[str, nn.Module]) -> Found:
    """What a folder, or a dict of tensors with PEFT's keys, holds for the layers of a model. `chosen` are the layers that the config means.

    Raises CheckpointError and its kin.
    """
    layers = {"": layers_of(model)}
    if isinstance(source, Mapping):
        known = (PREFIX, *FORMATS["peft"].shared_keys.values())
        source = {key if key.startswith(known) else PREFIX + key: tensor for key, tensor in source.items()}
    patches = patching.patches_of(model, config, chosen)
    renamed = renames.known_names(model, source if isinstance(source, Mapping) else source.tensors)
    if patches or renamed:
        source = dict(source) if isinstance(source, Mapping) else tensors_in(source)
        source = renames.fitted(model, source, renamed, patches)
    own_patches, lost = patching.taken(patches, source, PREFIX)
    bundle = _bundle(source, config, layers) if source else Bundle("peft", "", [])
    carried = dict(bundle.carried)
    modules = wholes_of(model, config)
    wholes: dict[str, dict[str, Handle]] = {}
    biases: dict[str, Handle] = {}
    embeddings: dict[str, dict[str, Handle]] = {}
    embedded = tables.embedding_layers(model)
    for key in list(carried):
        own = key.removeprefix(PREFIX)
        layer, _, last = own.replace(".base_layer.", ".").rpartition(".")
        whole = next((name for name in modules if own.startswith(f"{name}.")), None)
        if whole is not None:
            wholes.setdefault(whole, {})[own.removeprefix(f"{whole}.")] = carried.pop(key)
        elif last == "bias" and layer in layers[""] and getattr(config, "bias", "none") != "none":
            biases[layer] = carried.pop(key)
        elif at := tables.place(embedded, own):
            embeddings.setdefault(at[0], {})[at[1]] = carried.pop(key)
    entries = _with_biases(bundle, biases, layers[""], config)
    if trainable:
        entries = [replace(e, options={**e.options, **_dropouts(e.method, config)}) for e in entries]
    bundle = replace(bundle, carried=carried, entries=entries)
    slots: dict[str, dict[str, Slot]] = {"": {}}
    if bundle.entries or not own_patches:
        slots, _ = matched(bundle, {"": model}, layers, strict=True, trainable=trainable)
    read_ = _loaded(wholes)
    for where, tensors in read_.items():
        check_whole(f"{bundle.source}: {where}", modules[where], tensors)
    tying.check_alike(tying.ties_of(model, config, modules), read_, bundle.source)
    return Found(
        slots[""],
        read_,
        tables.followed(model, _loaded(embeddings), modules, bundle.source),
        own_patches,
        tuple(f"{PREFIX}{layer}" for layer in (*(n for n in chosen if n not in slots[""]), *lost)),
        tuple(carried),
    )


def _loaded(handles: Mapping[str, Mapping[str, Handle]]) -> dict[str, dict[str, Tensor]]:
    return {where: dict(zip(own, io.load(own.values()), strict=True)) for where, own in handles.items()}


def _dropouts(method: str, config: Any) -> dict[str, Any]:
    """What an adapter must know to be trained on, and its file says in the config alone."""
    names = LAYOUTS[method].dropouts.items()
    options = {option: value for field_, option in names if (value := getattr(config, field_, None))}
    return {**options, "rank_dropout_scale": True} if method == "loha" and "rank_dropout" in options else options


def _bundle(source: Any, config: Any, layers: Mapping[str, Any]) -> Bundle:
    text = {CONFIG: config.to_json()}
    try:
        return converters.read(source, format="peft", names={c: list(own) for c, own in layers.items()}, metadata=text)
    except UnknownKeysError as error:
        raise UnknownKeysError(
            "this holds no adapter that PEFT could have written", where=error.where, remedy="Check the folder."
        ) from error


def _with_biases(bundle: Bundle, biases: Mapping[str, Handle], layers: Mapping[str, Any], config: Any) -> list[Any]:
    """The entries, with the change of the bias where PEFT has the whole trained bias."""
    if not biases:
        return bundle.entries
    shifts = {}
    for layer, handle in biases.items():
        (bias,) = io.load([handle])
        own = layers[layer][0].bias
        if own is None or own.shape != bias.shape:
            raise ShapeMismatchError(
                f"layer {shown(layer)} has no bias of shape {tuple(bias.shape)}", where=bundle.source
            )
        shifts[layer] = io.handle((bias.to(own.device).float() - own.detach().float()).cpu())
    entries = [
        replace(e, tensors={**e.tensors, BIAS: shifts.pop(e.layer)}) if e.layer in shifts else e for e in bundle.entries
    ]
    return entries + [Entry("full", layer, {BIAS: shift}) for layer, shift in shifts.items()]


def check_whole(where: str, module: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Raise unless these are all of a module's tensors, in its shapes and finite."""
    mine = bare(module).state_dict()
    if other := sorted(mine.keys() ^ own.keys()):
        raise ShapeMismatchError(f"the module's tensors are others: {listed(other[:5])}", where=where)
    wrong = [key for key in mine if mine[key].shape != own[key].shape]
    if wrong:
        shapes = [f"{shown(k)} is {tuple(mine[k].shape)} in the model, not {tuple(own[k].shape)}" for k in wrong[:5]]
        rows = len(own[wrong[0]]) if mine[wrong[0]].shape[1:] == own[wrong[0]].shape[1:] else 0
        resized = f"If the vocabulary was resized, call model.resize_token_embeddings({rows}) first."
        is_table = rows and isinstance(module, (nn.Embedding, nn.Linear))
        raise ShapeMismatchError(
            "; ".join(shapes), where=where, remedy=resized if is_table else "It is for another model."
        )
    if not all(map(io.finite, own.values())):
        raise NonFiniteError("values that are not finite", where=where, remedy="The file is damaged.")


def put(
    model: nn.Module,
    name: str,
    config: Any,
    found: Found,
    *,
    trainable: bool,
    strength: float | None,
    precision: Precision,
) -> None:
    """Attach what was read as a new adapter: one commit."""
    check_name(name)
    mixes = mixes_of({"": model})
    refuse_duplicate(name, mixes.values())
    layers = layers_of(model)
    modules, patches = wholes_of(model, config), patching.patches_of(model, config, found.slots)
    precision.settle({n: m for n, (m, _) in layers.items()}, found.slots)
    precision.settle_patches(patches)
    for where, (_, patch) in patches.items():
        patch.load_state_dict(dict(found.patches.get(where, patch.state_dict())))
        patch.requires_grad_(trainable)
    slots = {**found.slots, **tying.twins(model, config, found.slots, trainable)}
    under, copied_ = tables.divided(model, found.embeddings, slots)
    slots |= under
    plan = Plan()
    everywhere = (*modules, *patches, *copied_)
    adapter = Adapter(name, tuple(slots), {CONFIG: config.to_json()}, modules=everywhere)
    mix = install(plan, "", {n: layers[n][0] for n in slots}, slots, mixes.get(""), adapter, strength)
    for where, fresh in copy_wholes(plan, mix, name, modules, ties=tying.ties_of(model, config, modules)).items():
        fresh.requires_grad_(trainable).load_state_dict(dict(found.wholes.get(where, fresh.state_dict())))
    tables.fill(copy_wholes(plan, mix, name, copied_, still=True), found.embeddings)
    put_patches(plan, mix, name, patches)
    plan.root(model, mix)
    plan.commit()


def targeting(config: Any, tensors: Mapping[str, Any]) -> Any:
    """A copy of a config that means the layers of which there are tensors."""
    if getattr(config, "target_parameters", None):
        raise ConfigError(
            f"target_parameters is {shown(config.target_parameters)}", remedy="Inject the adapter without state_dict=."
        )
    roles = {key: found for key in tensors if (found := dotted_role(key.removeprefix(PREFIX)))}
    config = copy.deepcopy(config)
    config.target_modules = sorted({layer for layer, _ in roles.values()})
    if config.peft_type == PeftType.IA3 and config.feedforward_modules is None:
        rows = (layer for key, (layer, _) in roles.items() if len(tensors[key]) == 1 < tensors[key].shape[-1])
        config.feedforward_modules = sorted(rows)  # a row scales inputs, a column outputs
    return config


def overwrite(model: nn.Module, name: str, config: Any, tensors: Mapping[str, Tensor]) -> Incompatible:
    """Put PEFT's tensors into an adapter that is there. Raises before anything has changed."""
    with exclusive({"": model}):
        return _overwrite(model, name, config, tensors)


def _overwrite(model: nn.Module, name: str, config: Any, tensors: Mapping[str, Tensor]) -> Incompatible:
    if isinstance(config, AdaLoraConfig):
        adalora.resize(model, name, config)
    slots = slots_in(model, name)
    found = read(model, tensors, config, trainable=False, chosen={layer: model for layer in slots})
    lost = [layer for layer in found.slots if layer not in slots]
    writes: list[Write] = []
    for layer, slot in found.slots.items():
        for role, new in slot.tensors.items() if layer not in lost else ():
            old = slots[layer].tensors.get(role)
            if old is None or old.shape != new.shape:
                raise ShapeMismatchError(
                    f"layer {shown(layer)}: {role} is {tuple(new.shape)}, the adapter's is {None if old is None else tuple(old.shape)}",
                    remedy="Load it under another name.",
                )
            writes.append((slots[layer], role, new, model.get_submodule(layer).weight))
    writes += _into_bank(slots, found.slots)
    for where, own in {**found.wholes, **found.patches}.items():
        module = model.get_submodule(where)
        held = _beside(module, name)
        like = next(iter(module._parameters.values()), None)
        writes += [(held, key, tensor, like) for key, tensor in own.items()]
    plan = Plan()
    writes += _plan_embeddings(plan, model, name, found.embeddings, slots)
    plan.commit()
    for adapter, key, new, weight in writes:
        put_into(adapter, key, new, weight)
    return Incompatible(list(found.missing), [*found.unexpected, *lost], [])


def _into_bank(slots: Mapping[str, Slot], others: Mapping[str, Slot]) -> list[Write]:
    """The writes of tensors that all layers share. Raises ShapeMismatchError for other shapes."""
    bank = next((slot.bank for slot in slots.values() if slot.bank is not None), None)
    if bank is None:
        return []
    tensors = shared_by(others)
    shapes = {role: tuple(t.shape) for role, t in shared_by(slots).items()}
    if bad := [role for role, t in tensors.items() if tuple(t.shape) != shapes[role]]:
        told = ", ".join(f"{role} is {tuple(tensors[role].shape)}, the adapter's is {shapes[role]}" for role in bad)
        raise ShapeMismatchError(told, remedy="Load it under another name.")
    return [(bank, role, tensor, tensor) for role, tensor in tensors.items()]


def _plan_embeddings(
    plan: Plan, model: nn.Module, name: str, found: tables.Tensors, slots: Mapping[str, Slot]
) -> list[Write]:
    """Plan to give an adapter embeddings that it has none of its own of; the writes into those that it has."""
    writes: list[Write] = []
    fresh: dict[str, Mapping[str, Tensor]] = {}
    for where, own in found.items():
        held = _beside(model.get_submodule(where), name)
        if held is not None:
            writes += [(held, key, tensor, tensor) for key, tensor in own.items()]
        elif where in slots and tables.WHOLE in slots[where].tensors:
            writes.append((slots[where], tables.WHOLE, own["weight"], own["weight"]))
        else:
            fresh[where] = own
    under, copied_ = tables.divided(model, fresh, slots)
    if not under and not copied_:
        return writes
    (mix,) = mixes_of({"": model}).values()
    old = mix.adapters[name]
    places = {layer: model.get_submodule(layer) for layer in under}
    everywhere = tuple(dict.fromkeys((*old.modules, *copied_)))
    layers = tuple(dict.fromkeys((*old.layers, *under)))
    adapter = replace(old, layers=layers, modules=everywhere)
    install(plan, "", places, under, mix, adapter, None)
    tables.fill(copy_wholes(plan, mix, name, copied_, still=True), fresh)
    return writes


def _beside(module: nn.Module, name: str) -> Any:
    """The copy or the patch that an adapter has of a module, None if there is none."""
    record = record_of(module)
    return next((own for own in record.modules(name) if not isinstance(own, Slot)), None) if record else None


def config_of(model: nn.Module, name: str) -> Any:
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


def write(folder: Path, tensors: Mapping[str, Tensor], config: Any) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, in a folder that is committed as a whole."""
    # shared tensors (a tied head) are written twice
    io.save(folder / WEIGHTS, {key: io.handle(t.contiguous()) for key, t in sorted(tensors.items())}, {"format": "pt"})
    write_config(folder / FILE, config.to_json())


def adapter_at(model_id: str | os.PathLike[str], **options: Any) -> tuple[Any, Opened]:
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


def located(model_id: str | os.PathLike[str], **options: Any) -> Opened:
    """An adapter's folder, opened: this one, or a download. Raises CheckpointError."""
    return opened(_located(model_id, **options))


def _located(model_id: str | os.PathLike[str], **options: Any) -> Path:
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
