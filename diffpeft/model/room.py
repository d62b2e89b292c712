"""Room for ranks: a LoRA whose tensors are filled up with zeros, so that another of a higher rank can be put into them later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError, ShapeMismatchError
from diffpeft.layers.slot import Piece, Slot
from diffpeft.methods.lora import Lora
from diffpeft.model.plan import Plan
from diffpeft.model.target import adapted

LORAS = ("lora", "dora")


def plan_room(plan: Plan, model: nn.Module, ranks: Mapping[str, Mapping[str, int]]) -> None:
    """Plan to give slots room for ranks, {adapter: {layer: rank}}; nothing else changes.

    What is trained stays so: zeros in both factors get no gradients. Raises ConfigError for a rank below the one that is there.
    """
    for layer, module, _ in adapted(model):
        record = plan.record_of(module)
        assert record is not None
        roomy: dict[str, Slot] = {}
        for name, slot in record.slots.items():
            now, rank = room_of(slot), ranks.get(name, {}).get(layer, 0)
            if not now or not rank or now == rank:
                continue
            if now > rank:
                raise ConfigError(
                    f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({now})",
                    where=f"{name}: {layer}",
                    remedy="Give target_rank=, the highest rank of all adapters.",
                )
            roomy[name] = _roomy(slot, rank, layer)
        if roomy:
            plan.carry(module, record.changed(slots={**record.slots, **roomy}))


def room_of(slot: Slot) -> int:
    """The rank that a slot's tensors have room for; 0 if it can have no other."""
    tensors = slot.tensors
    return len(tensors["lora_A"]) if slot.methods[0] in LORAS and "lora_A" in tensors else 0


def is_lora(slot: Slot) -> bool:
    """Whether a slot is a LoRA or a DoRA."""
    return slot.methods[0] in LORAS


def rank_and_scale(slot: Slot) -> tuple[int, float]:
    """A LoRA's rank and scale."""
    p = slot.tensors_of(slot.parts[0])
    return Lora.rank(p), Lora.scale(p, slot.parts[0].spec)


def plan_slots(plan: Plan, model: nn.Module, name: str, slots: Mapping[str, Slot]) -> None:
    """Plan to give an adapter other slots, {layer: slot}, on layers that carry some."""
    for layer, module, _ in adapted(model):
        record = plan.record_of(module)
        if record is not None and layer in slots:
            plan.carry(module, record.changed(slots={**record.slots, name: slots[layer]}))


def _roomy(slot: Slot, rank: int, where: str) -> Slot:
    """The slot with zeros up to a rank. Its file is what it was."""
    parts = []
    for part in slot.parts:
        tensors = {role: t.detach() for role, t in slot.tensors_of(part).items()}
        parts.append(padded(Piece(part.method.name, tensors, part.alpha, part.spec), rank, where))
    beside = {role: t.detach() for role, t in slot.tensors.items() if not any(role in p.roles for p in slot.parts)}
    roomy = Slot(parts, beside, trainable=slot.weight.requires_grad)
    roomy.source, roomy.stored_rank = slot.source, slot.rank
    return roomy.train(slot.training)


def padded(piece: Piece, rank: int, where: str) -> Piece:
    """A LoRA with room for a rank. Raises ShapeMismatchError for one of a higher rank, ConfigError for another method."""
    if piece.method not in LORAS or "lora_A" not in piece.tensors or "lora_mid" in piece.tensors:
        raise ConfigError(f"max_rank is for LoRA and DoRA, this is {piece.method}", where=where)
    scale = Lora.scale(piece.tensors, piece.spec)
    tensors = fitted(piece.tensors, rank, scale, scale, where)
    return replace(piece, tensors=tensors, alpha=scale * rank, spec=replace(piece.spec, alpha=scale * rank))


def fitted(tensors: Mapping[str, Tensor], rank: int, scale: float, to: float, where: str) -> dict[str, Tensor]:
    """A LoRA's tensors (A [r, i, *k], B [o, r, *1]) with zeros up to a rank, its scale turned into another one. Raises ShapeMismatchError if that cannot be."""
    A, B = tensors["lora_A"], tensors["lora_B"]
    room = rank - A.shape[0]
    if room < 0:
        raise ShapeMismatchError(
            f"rank {A.shape[0]} is above {rank}", where=where, remedy="Load the first adapter with a higher max_rank=."
        )
    if scale != to and not to:
        raise ShapeMismatchError(
            "the first adapter has scale 0", where=where, remedy="Unload it, and load the new one."
        )
    if scale != to:
        B = (B.double() * (scale / to)).to(B.dtype)
    groups = len(A) // B.shape[1]  # of a branch beside a convolution: B's ranks are those of a group
    if rank % groups:
        raise ShapeMismatchError(
            f"Trying to pad a Conv{A.dim() - 2}d LoRA adapter with groups={groups} to target rank {rank}, but the target rank "
            f"is not divisible by {groups}. Please choose a target rank that is divisible by {groups}.",
            where=where,
        )
    A = A.unflatten(0, (groups, -1))
    A = torch.cat([A, A.new_zeros(groups, room // groups, *A.shape[2:])], 1).flatten(0, 1)
    B = torch.cat([B, B.new_zeros(B.shape[0], room // groups, *B.shape[2:])], 1)
    return {**tensors, "lora_A": A, "lora_B": B}
