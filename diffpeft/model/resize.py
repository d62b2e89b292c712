"""`resize_token_embeddings` of a model whose embeddings carry adapters: rows of adapters follow those of the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, shown
from diffpeft.layers.carried import op_of, record_of
from diffpeft.layers.slot import BIAS, Slot
from diffpeft.layers.swap import SIZES, resizing
from diffpeft.layers.tokens import Tokens
from diffpeft.methods import Spec
from diffpeft.methods.lora import Lora
from diffpeft.model.attach import mixes_of
from diffpeft.model.embeddings import WHOLE, embedding_layers, parameter_of
from diffpeft.model.mix import Choice, claim, forced
from diffpeft.model.plan import Plan
from diffpeft.model.target import modules_of

# {role: the axis that counts tokens} on a table, and on a head
_AXES = {True: {"lora_embedding_A": 1, WHOLE: 0}, False: {"lora_B": 0, "lora_B_bias": 0, BIAS: 0, WHOLE: 0}}
_FIXED = {"lora_embedding_B", "lora_A"}
_STARTS = (WHOLE,)  # roles whose new rows are the model's own; those of others are zero
Result = TypeVar("Result")
Shared = dict[int, tuple[Tensor, Tensor]]  # {address: (memory as it was, with other rows)}: what shared it still shall


def plan_resized(plan: Plan, model: nn.Module, resized: Callable[[], Result], total: int | None = None) -> Result:
    """Plan what `resized` does, a call of the model's own `resize_token_embeddings`, with the adapters on the embeddings resized too; what it gives.

    New rows of whole copies are the model's; a LoRA changes no new token. `total` is the number of rows, if it is known. Raises AdapterStateError.
    """
    mixes = mixes_of({"": model})
    if any(mix.fused for mix in mixes.values()):
        raise AdapterStateError("adapters are in the weights", remedy="Call unmerge_adapter first.")
    layers = _layers(model)
    for where, module in layers.items():
        _check(where, module, total)
    flags = {id(p): p.requires_grad for p in model.parameters()}
    off = claim({mix.key: Choice() for mix in mixes.values()})
    with plan.recorded(model):
        with forced(off), resizing():
            result = resized()
            for where, module in layers.items():
                _put_back(model, where, module)
        for p in model.parameters():
            p.requires_grad_(flags.get(id(p), p.requires_grad))
        _fit(layers.values())
    for module in layers.values():
        if (record := record_of(module)) is not None:
            plan.carry(module, record.changed())  # one that has kept nothing of the former rows
    return result


def _fit(layers: Iterable[nn.Module]) -> None:
    """Give what adapters have on embeddings as many rows as these have now."""
    shared: Shared = {}
    for module in layers:
        if (record := record_of(module)) is not None:
            for copy in record.copies.values():
                _fit_copy(copy.module, module, shared)
            for slot in record.slots.values():
                _fit_slot(slot, module, shared)


def _put_back(model: nn.Module, where: str, module: nn.Module) -> None:
    """The module that carries the adapters, with the numbers of the one that transformers has put in its place."""
    around, _, last = where.rpartition(".")
    table = model.get_submodule(around)._modules
    new: Any = table[last]
    if new is module:
        return
    for name, p in module._parameters.items():
        if p is not None:
            p.data = new._parameters[name].data
    for name in SIZES:
        if name in vars(new):
            module.__dict__[name] = vars(new)[name]
    table[last] = module


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The embeddings, and what shares a weight with them."""
    tables = embedding_layers(model)
    shared = {id(module._parameters.get("weight")) for module in tables.values()}
    tied = {n: m for n, (m, _) in modules_of(model, lambda m: id(m._parameters.get("weight")) in shared).items()}
    return {**tables, **tied} if tables else {}


def _check(where: str, module: nn.Module, total: int | None) -> None:
    """Raise AdapterStateError for an adapter that cannot get other rows."""
    record, axes = record_of(module), _axes(module)
    if record is None:
        return
    for name, slot in record.slots.items():
        fits = (
            all(p.method is Lora or set(p.roles) == {WHOLE} for p in slot.parts)
            and slot.source is None
            and slot.stored_rank is None
        )
        if not fits or set(slot.tensors) - {*axes, *_FIXED}:
            raise AdapterStateError(
                f"adapter {shown(name)} is a {'+'.join(slot.methods)} on {shown(where)}, which cannot get other rows",
                remedy="Call resize_token_embeddings before the adapter is made.",
            )
    if not all(isinstance(patch, Tokens) for patch in record.patches.values()):
        raise AdapterStateError(
            f"an adapter changes the parameters of {shown(where)}",
            remedy="Call resize_token_embeddings before the adapter is made.",
        )
    for name, patch in record.patches.items():
        last = int(patch.rows.max())  # type: ignore[operator]
        if total is not None and last >= total:
            raise AdapterStateError(
                f"adapter {shown(name)} trains row {last} of {shown(where)}, which would have {total} rows",
                remedy="Delete the adapter first.",
            )


def _axes(module: nn.Module) -> dict[str, int]:
    return _AXES[isinstance(module, nn.Embedding)]


def _fit_copy(copy: nn.Module, module: nn.Module, shared: Shared) -> None:
    """Give a copy as many rows as its module has now."""
    for name, p in copy._parameters.items():
        theirs = module._parameters[name]
        if p is not None and theirs is not None and len(p) != len(theirs):
            p.data = _rows(p.data, 0, theirs.detach(), shared)
    for name in (*SIZES, "padding_idx"):
        if name in vars(module):
            copy.__dict__[name] = vars(module)[name]


def _fit_slot(slot: Slot, module: nn.Module, shared: Shared) -> None:
    """Give a slot as many rows as its layer has now; parameters stay the same objects."""
    axes, weight = _axes(module), parameter_of(module, "weight")
    for held in (slot._parameters, slot._buffers):
        for role, tensor in held.items():
            if role in axes and tensor is not None and tensor.shape[axes[role]] != len(weight):
                start = weight if role in _STARTS else None
                tensor.data = _rows(tensor.data, axes[role], start, shared, len(weight))
    geometry = op_of(module).geometry
    parts = (replace(p, spec=Spec(geometry, p.spec.alpha, p.spec.options)) for p in slot.parts)
    slot.__dict__["parts"] = tuple(parts)
    slot._kept.clear()


def _rows(old: Tensor, axis: int, like: Tensor | None, shared: Shared, total: int = 0) -> Tensor:
    """A tensor with as many rows along an axis as `like` has, whose rows the new ones are; or `total`, with zeros."""
    key = old.untyped_storage().data_ptr()
    if key not in shared:
        rows = old.movedim(axis, 0)
        total = total if like is None else len(like)
        more = torch.zeros(max(total - len(rows), 0), *rows.shape[1:]) if like is None else like[len(rows) :]
        shared[key] = old, torch.cat([rows[:total], more.to(rows)])
    return shared[key][1].movedim(0, axis)


Place = tuple[
    dict[str, object], str, nn.Module
]  # a module's table of modules, a name in it, and the module that is there


def refuse_replaced(place: Place | None) -> None:
    """Raise AdapterStateError if the head that adapters are on is no longer in the model: transformers' own method makes another one."""
    if place is None:
        return
    table, name, module = place
    if table.get(name) is not module and not any(m is module for m in getattr(table.get(name), "modules", list)()):
        raise AdapterStateError(
            f"the {name} that carries adapters is no longer in the model: it was given another one",
            remedy="Call resize_token_embeddings of the PeftModel, or before adapters are on the embeddings.",
        )


def head_of(model: Any, plan: Plan) -> Place | None:
    """Where a model has its head, if adapters are, or will be, on that."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or plan.record_of(head) is None:
        return None
    return next(((m._modules, n, head) for m in model.modules() for n, c in m._modules.items() if c is head), None)
