"""Slot: one adapter on one layer, a leaf module that owns its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffpeft.bundle import Handle
from diffpeft.methods import METHODS, Method, Spec
from diffpeft.methods.linalg import traced

Result = TypeVar("Result")
BIAS = "diff_b"  # a trainable change of the layer's bias, whatever the method


@dataclass(frozen=True)
class Part:
    """One method of an adapter on one layer: alpha as stored (a tensor, a number, or None), and what the method needs beside its tensors."""

    method: type[Any]  # a Method; what additive ones have besides is used where `additive` says so
    roles: tuple[str, ...]
    alpha: Handle | float | None
    spec: Spec
    axes: tuple[int, ...] = ()  # how many each of them has
    additive: bool = field(init=False)  # whether with these tensors it adds the same whatever the weight is
    bare: bool = field(init=False)  # whether the tensors are computed with as they are

    def __post_init__(self) -> None:
        prepare: Any = self.method.prepare
        axes = {**dict.fromkeys(self.roles, 0), **dict(zip(self.roles, self.axes, strict=False))}
        object.__setattr__(self, "additive", self.method.additive(axes))
        object.__setattr__(self, "bare", prepare.__func__ is Method.prepare.__func__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Piece:
    """What a slot is made of: a method's name, its tensors by role, alpha as stored, its spec, and frozen tensors by role."""

    method: str
    tensors: Mapping[str, Tensor]
    alpha: Handle | float | None
    spec: Spec
    frozen: Mapping[str, Tensor] = field(default_factory=dict)


def stamp_of(t: Tensor) -> tuple[object, ...]:
    """What stays while a tensor is the same: its memory (not its address, which another tensor may get), its version and its dtype."""
    return StorageWeakRef(t.untyped_storage()), t._version, t.dtype


_BLANK = nn.Module().__dict__
_TABLES = {name: type(table) for name, table in _BLANK.items() if isinstance(table, (dict, set))}


def blank(module: nn.Module) -> None:
    """What `nn.Module.__init__` does, many times faster: a load makes thousands of modules."""
    module.__dict__.update(_BLANK)
    module.__dict__.update({name: table() for name, table in _TABLES.items()})


class Bank(nn.Module):
    """The tensors that the layers of one adapter share: a leaf module, that one of its layers holds and all its slots refer to. They are frozen."""

    _kept: dict[object, tuple[Any, ...]]

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for role, tensor in tensors.items():
            self.register_buffer(role, tensor)
        self.__dict__["_kept"] = {}

    def forward(self, use: Callable[..., Result], *args: object) -> Result:
        """`use(bank, *args)`: within this call whoever keeps the tensors elsewhere has brought them here."""
        return use(self, *args)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role."""
        tensors: dict[str, Tensor] = self(lambda bank: dict(bank.named_buffers()))
        return tensors

    def at(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The tensors in a dtype and on a device, once for all layers."""
        tensors = self.tensors
        if traced():
            return {role: t.to(device, dtype) for role, t in tensors.items()}
        stamp, before = [stamp_of(t) for t in tensors.values()], self._kept.get((dtype, device))
        if before is None or before[0] != stamp:
            before = self._kept[dtype, device] = stamp, {role: t.to(device, dtype) for role, t in tensors.items()}
        return cast(dict[str, Tensor], before[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        """As a slot's tensors."""
        self._kept.clear()
        example = next(iter(self.buffers())).new_empty(0)
        super()._apply(with_own_dtype(fn) if fn(example).dtype in _FLOAT8 else fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}


class Slot(nn.Module):
    """The tensors of one adapter on one layer, as parameters named by their roles, in the dtype they are stored in.

    An adapter is usually one method; a file may hold several for a layer, which then act in order as one. A piece without tensors
    is nothing but what lies beside it: a change of the bias. Where the parameters are not what the adapter's file holds (another adapter was put
    into them) `source` is that; a LoRA with room for more ranks, filled up with zeros, has `stored_rank` of them in its file.
    """

    parts: tuple[Part, ...]
    source: tuple[Piece, ...] | None
    stored_rank: int | None
    shifts: bool
    bank: Bank | None  # what it shares with the adapter's other layers; no module of the slot's
    hosts: bool  # whether the bank is held by this slot's layer
    _kept: dict[object, tuple[Any, ...]]

    def __init__(self, pieces: Sequence[Piece], beside: Mapping[str, Tensor] | None = None, *, trainable: bool):
        blank(self)
        # written straight: a load makes thousands, and torch's checks take longer than all else
        parameters: dict[str, Any] = self._parameters
        for piece in pieces:
            constants = METHODS[piece.method].constants
            for role, tensor in piece.tensors.items():
                if role in constants or role in piece.frozen:
                    self.register_buffer(role, tensor)
                else:
                    parameters[role] = nn.Parameter(tensor, requires_grad=trainable)
            for role, tensor in piece.frozen.items():
                self.register_buffer(role, tensor)
        for role, tensor in (beside or {}).items():
            parameters[role] = nn.Parameter(tensor, requires_grad=trainable)
        parts = tuple(
            Part(METHODS[p.method], tuple(tensors), p.alpha, p.spec, tuple(t.dim() for t in tensors.values()))
            for p in pieces
            if (tensors := {**p.tensors, **p.frozen})
        )
        self.__dict__.update(
            parts=parts,
            source=None,
            stored_rank=None,
            bank=None,
            hosts=False,
            # whether the layer's bias may change
            shifts=BIAS in parameters or any(part.method.shifts & set(part.roles) for part in parts),
            _kept={},
        )

    @property
    def weight(self) -> Tensor:
        """The first parameter: sharding policies look for this name."""
        return next(self.parameters())

    def tensors_of(self, part: Part) -> dict[str, Tensor]:
        """The tensors of one part by role, with those that all layers share."""
        if part.method.shared and self.bank is not None:
            return {**self.own_of(part), **self.bank.tensors}
        return self.own_of(part)

    def own_of(self, part: Part) -> dict[str, Tensor]:
        """The tensors of one part by role that are this layer's."""
        parameters: Mapping[str, Any] = (
            self._parameters
        )  # looked up here: a forward does it thousands of times, and torch's way is slow
        return {role: parameters[role] if role in parameters else getattr(self, role) for role in part.roles}

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods; a change of nothing but the bias is `full`."""
        return tuple(part.method.name for part in self.parts) or ("full",)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by role."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    @property
    def rank(self) -> int:
        """The rank on this layer, of the first part if there are several."""
        if self.stored_rank is not None and self.source is None:
            return self.stored_rank
        if self.source is None and self.parts:
            return int(self.parts[0].method.rank(self.tensors_of(self.parts[0])))
        pieces = pieces_of(self)
        return METHODS[pieces[0].method].rank({**pieces[0].tensors, **pieces[0].frozen}) if pieces else 0

    @property
    def scale(self) -> float:
        """alpha / rank of the first additive part; 1 if there is none."""
        return next((p.method.scale(self.tensors_of(p), p.spec) for p in self.parts if p.additive), 1.0)

    def forward(self, use: Callable[..., Result], *args: object) -> Result:
        """`use(slot, *args)`: within this call whoever keeps the tensors elsewhere (offloading, sharding) has brought them here."""
        return use(self, *args)

    def prepared(self, part: Part, dtype: torch.dtype) -> dict[str, Tensor]:
        """The part's tensors, prepared and in the dtype of the computation. Kept for frozen adapters where no gradient is asked for."""
        p = self.own_of(part)
        if part.bare and all(t.dtype == dtype for t in p.values()):
            return p
        if part.method.shared and self.bank is not None:
            p |= self.bank.at(dtype, next(iter(p.values())).device)
        if torch.is_grad_enabled() or self.training or traced() or self._hooked:
            return self._prepared(part, p, dtype)
        stamp, key = [stamp_of(t) for t in p.values()], (part.roles, dtype)
        before = self._kept.get(key)
        if before is not None and before[0] == stamp:
            return cast(dict[str, Tensor], before[1])
        p = self._prepared(part, p, dtype)
        if not any(t.requires_grad for t in self.parameters()):
            self._kept[key] = stamp, p
        return p

    def kept_beside(
        self, part: Part, weight: Tensor, dtype: torch.dtype, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`make()`, which depends on the part's tensors and a weight alone and has no gradient: made anew when one of them is another or has other numbers.

        Torch does not count what is written through `.data`; on a CPU the adapter's numbers are compared as well.
        """
        tensors = list(self.tensors_of(part).values())
        stamp, key = [stamp_of(t) for t in (weight, *tensors)], (part.roles, dtype, "beside")
        before = self._kept.get(key)
        if before is not None and before[0] == stamp and all(map(torch.equal, before[1], tensors)):
            return cast(dict[str, Tensor], before[2])
        made = make()
        numbers = [t.detach().clone() for t in tensors] if weight.device.type == "cpu" else []
        self._kept[key] = stamp, numbers, made
        return made

    def _prepared(self, part: Part, p: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        device = next(iter(p.values())).device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # what is prepared keeps its precision
            with torch.autocast(device, enabled=False):
                p = part.method.prepare(p, part.spec, self.training)
        else:
            p = part.method.prepare(p, part.spec, self.training)
        return {role: t if role in part.method.precise else t.to(dtype) for role, t in p.items()}

    @property
    def _hooked(self) -> bool:
        return "_hf_hook" in self.__dict__

    @property
    def bare(self) -> bool:
        """Whether the tensors are simply here, so that they may be read outside `forward`."""
        return not (self._hooked or self._forward_pre_hooks or self._forward_hooks or "forward" in self.__dict__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        """Follows where its layer goes, and what dtype it is given, but for float8: that is for storing a base, and would round an adapter away."""
        self._kept.clear()
        super()._apply(fn if self._holds(fn) else with_own_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _holds(self, fn: Callable[[Tensor], Tensor]) -> bool:
        return fn(self.weight.new_empty(0)).dtype not in _FLOAT8

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}

    def extra_repr(self) -> str:
        """For example `lora, rank=8, scale=1`."""
        words = []
        for part in self.parts:
            p = self.tensors_of(part)
            words += [f"{part.method.name}, rank={part.method.rank(p)}"]
            if part.additive:
                words += [f"scale={part.method.scale(p, part.spec):g}"]
        return ", ".join(words)


@contextlib.contextmanager
def at_rest(*slots: Slot) -> Iterator[None]:
    """These adapters as they are in evaluation: no dropout decides what they do."""
    training = [slot.training for slot in slots]
    for slot in slots:
        slot.training = False
    try:
        yield
    finally:
        for slot, was in zip(slots, training, strict=True):
            slot.training = was


_FLOAT8 = frozenset(
    dtype for name in dir(torch) if name.startswith("float8") and isinstance(dtype := getattr(torch, name), torch.dtype)
)


def with_own_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module.to` applies to each tensor, without a change of dtype: only where tensors go."""
    return lambda t: t.to(fn(t.new_empty(0)).device)


def pieces_of(slot: Slot) -> tuple[Piece, ...]:
    """What the adapter is made of on this layer, as its file holds it."""
    if slot.source is not None:
        return slot.source
    return tuple(as_stored(slot, Piece(p.method.name, slot.own_of(p), p.alpha, p.spec)) for p in slot.parts)


def as_stored(slot: Slot, piece: Piece) -> Piece:
    """A part of a slot without the ranks that are room for others."""
    rank = slot.stored_rank
    if rank is None or "lora_A" not in piece.tensors:
        return piece
    A, B = piece.tensors["lora_A"], piece.tensors["lora_B"]
    alpha = cast(float, piece.alpha) * rank / len(A)
    tensors = {**piece.tensors, "lora_A": A[:rank], "lora_B": B[:, :rank]}
    return replace(piece, tensors=tensors, alpha=alpha, spec=replace(piece.spec, alpha=alpha))
