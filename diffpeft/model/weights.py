"""The weights of one layer with adapters in them, and without: computed from the base as it was, never from what was fused before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, NonFiniteError, UnfitError, shown
from diffpeft.layers.carried import FUSED, Parameters, Record, Step, base_class, effective, record_of, stamps_of
from diffpeft.layers.chain import factors_of
from diffpeft.layers.sites import parameter_names, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.linalg import is_finite, wide, wide_dtype

LARGE = 1 << 16  # from how many numbers on a weight is worked out some rows at a time
BLOCK = 1 << 20  # how many numbers these are
WHOLE, SAMPLE = (
    4096,
    512,
)  # up to how many numbers a weight is known again by all of them, and by how many if it has more


Empty = Callable[[Tensor], Tensor]  # a tensor with anything in it that lies in memory as another does


def touched(module: nn.Module, record: Record) -> list[str]:
    """The parameters of a module that its adapters may change. A layer has a weight, and may have a bias."""
    parameters = module._parameters
    names = [name for name in parameter_names(module) if record.slots and parameters.get(name) is not None]
    return list(dict.fromkeys((*names, *(name for patch in record.patches.values() for name in patch.names))))


def based(module: nn.Module, record: Record) -> Parameters:
    """The numbers of these parameters without anything fused: those kept, else those that are there."""
    base = record.base or {}
    return {name: base[name] if name in base else module._parameters[name].data for name in touched(module, record)}  # type: ignore[union-attr]


def fused_weights(
    layer: str,
    module: Any,
    base: Parameters,
    steps: Sequence[Step],
    scratch: Scratch,
    like: Parameters | None = None,
    empty: Empty = torch.empty_like,
) -> Parameters:
    """Parameters computed from `base` in fp32 or better and rounded once, in the dtype and layout of `like`, or of the present ones.

    `empty`: finds memory for the weight.
    """
    present = like or {name: module._parameters[name].data for name in base}
    dtype, (weight, bias) = computed_in(present), parameter_names(module)
    with torch.no_grad():
        start = {name: t.to(present[name].device) for name, t in base.items()}
        total = thin_sum(module, steps, dtype, start)
        by_rows = {} if total is None else {**start, weight: total.into(empty(present[weight]), scratch)}
        exact = by_rows or effective(module, steps, dtype, start)
    if bias in exact and bias not in present:
        raise no_bias(layer, steps)
    out = {name: laid_out(exact[name], t, empty if name == weight else torch.empty_like) for name, t in present.items()}
    for name, t in out.items():
        if not is_finite(t):
            raise not_finite(layer, module, steps, name, t.dtype)
    return {name: t.clone() if t.data_ptr() == base[name].data_ptr() and name != bias else t for name, t in out.items()}


def not_finite(layer: str, module: nn.Module, steps: Sequence[Step], name: str, dtype: torch.dtype) -> NonFiniteError:
    """The error for a parameter that would not be finite with what acts in it: in PEFT's words, which name an adapter."""
    record, things = record_of(module), [thing for thing, _ in steps]
    inside = [n for n in record.names if any(m in things for m in record.modules(n))] if record else []
    broken = [n for n in inside if not all(is_finite(p.data) for m in record.modules(n) for p in m.parameters())]  # type: ignore[union-attr]
    return NonFiniteError(
        f"NaNs detected in the merged weights. The adapter {(broken or inside or ['?'])[-1]} seems to be broken",
        where=f"layer {shown(layer)} would get a {name} that is not finite",
        remedy="" if broken else f"It may be too strong for {dtype}.",
    )


def computed_in(present: Parameters) -> torch.dtype:
    """The dtype that parameters are computed in."""
    return functools.reduce(torch.promote_types, (wide_dtype(t.dtype) for t in present.values()))


def laid_out(W: Tensor, like: Tensor, empty: Empty = torch.empty_like) -> Tensor:
    """W in the dtype of another tensor, and lying in memory as that does."""
    return W if W.dtype == like.dtype and W.stride() == like.stride() else empty(like).copy_(W)


class Scratch:
    """Memory for a block of rows, used for all layers: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def rows(self, count: int, columns: int, like: Tensor) -> Tensor:
        """[count, columns] in the dtype and on the device of a tensor, with anything in it. What was asked for once is found again without fail."""
        key, n = (like.dtype, like.device), count * columns
        memory = self._memory.get(key)
        if memory is None or memory.numel() < n:
            memory = self._memory[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return memory[:n].view(count, columns)


@dataclass(frozen=True)
class Sum:
    """W + B A: what adapters of low rank make of a layer's weight.  W [o, i, *k], A [r, i * prod(k)], B [o, r]; A and B in fp32 or better."""

    W: Tensor
    A: Tensor
    B: Tensor

    @property
    def count(self) -> int:
        """How many rows make a block."""
        return min(len(self.W), max(1, BLOCK // self.A.shape[1]))

    def room(self, begin: int, scratch: Scratch) -> Tensor:
        """Where the rows from `begin` on are worked out: [n, i, *k] in the dtype of A."""
        W = self.W[begin : begin + self.count]
        return scratch.rows(len(W), self.A.shape[1], self.A).view(W.shape)

    def block(self, begin: int, scratch: Scratch) -> Tensor:
        """The rows from `begin` on, in their room."""
        rows = self.room(begin, scratch).copy_(self.W[begin : begin + self.count])
        rows.view(len(rows), -1).addmm_(self.B[begin : begin + self.count], self.A)
        return rows

    def into(self, place: Tensor, scratch: Scratch) -> Tensor:
        """All of it, rounded to the dtype of a tensor that lies elsewhere than W."""
        for begin in range(0, len(self.W), self.count):
            place[begin : begin + self.count].copy_(self.block(begin, scratch))
        return place

    def is_bounded(self) -> bool:
        """Whether all of it is sure to be finite in the dtype of W: |W + B A| <= max |W| + r max |B| max |A|. What is not finite has no bound."""
        if self.W.dtype.itemsize < 2:
            return False
        ends = [torch.stack(t.aminmax()).abs().max().item() for t in (self.W, self.A, self.B)]
        # a hundredth for what fp32 rounds
        return ends[0] + 1.01 * len(self.A) * ends[1] * ends[2] < 0.99 * torch.finfo(self.W.dtype).max


@dataclass
class Rewritten:
    """A layer's weight gets the numbers of a sum in the memory that it has. There is no way back, and from any point a way on.

    A block is worked out in the scratch and written when it is there in full; whoever was stopped meanwhile writes it again, and goes on with the
    next. Nothing of that can fail: factors and scratch are there, and the sum is bounded.
    """

    weight: Tensor
    total: Sum  # its W is the weight
    scratch: Scratch  # nobody else uses it from the first block to the last
    done: int = 0  # rows that are written
    ready: int = -1  # the row from which on those lie in the scratch that are to be written

    def __post_init__(self) -> None:
        self.total.room(0, self.scratch)

    @property
    def begun(self) -> bool:
        """Whether rows may have been written."""
        return self.ready >= 0

    def go_on(self) -> None:
        """Write what is not written yet."""
        total, scratch = self.total, self.scratch
        with torch.no_grad():
            while (begin := self.done) < len(self.weight):
                if self.ready != begin:
                    total.block(begin, scratch)
                    self.ready = begin
                rows = total.room(begin, scratch)
                self.weight[begin : begin + len(rows)].copy_(rows)
                self.done = begin + len(rows)


def bounded_sum(module: nn.Module, base: Parameters, steps: Sequence[Step]) -> Sum | None:
    """What adapters make of a layer's weight, where they change nothing else and all numbers are sure to be finite; else None."""
    with torch.no_grad():
        total = thin_sum(module, steps, computed_in(base), base)
        return total if total is not None and total.is_bounded() else None


def thin_sum(module: nn.Module, steps: Sequence[Step], dtype: torch.dtype, base: Parameters) -> Sum | None:
    """What factors of low rank make of a layer's weight, in `dtype`; None for small layers, and for what is no such sum."""
    site = site_of(base_class(module))
    if (
        not steps
        or site is None
        or not site.in_order
        or not all(map(_is_thin, steps))
        or base[site.weight_name].numel() < LARGE
    ):
        return None
    W = base[site.weight_name]
    factors = [(slot(factors_of, dtype), s) for slot, s in steps]  # type: ignore[operator]
    A, B = [A for (A, _), _ in factors], [B * s for (_, B), s in factors]
    return Sum(W, A[0] if len(A) == 1 else torch.cat(A), B[0] if len(B) == 1 else torch.cat(B, 1))


def _is_thin(step: Step) -> bool:
    """Whether what acts adds nothing but products of low rank to the weight."""
    slot = step[0]
    if not isinstance(slot, Slot) or slot.shifts or not slot.parts:
        return False
    return all(part.additive and part.method.thin for part in slot.parts)


def unfused(
    layer: str, module: nn.Module, record: Record, within: Container[int] = ()
) -> tuple[Record, dict[str, Tensor]]:
    """A record and parameters without anything fused, in the present dtype and on the present device; those that were shared as they were.

    `within` has the ids of layers that layers of peft's are around: what these have added to a weight, or left of it, stays.
    """
    if record.base is None:
        raise AdapterStateError(
            f"layer {shown(layer)} was fused with keep_base='none'",
            remedy="Load the model again to get its own weights.",
        )
    weights: dict[str, Tensor] = {
        name: record.parted[name] if name in record.parted else old.to(module._parameters[name].data)  # type: ignore[union-attr]
        for name, old in record.base.items()
    }
    if id(module) in within:
        weights |= {name: weights[name] + more for name, more in _added(layer, module, record).items()}
    else:
        refuse_changed(layer, module, record)
    return record.changed(fused=frozenset(), base=None, sample=None, parted={}), weights


def _added(layer: str, module: nn.Module, record: Record) -> dict[str, Tensor]:
    """What somebody has added to parameters since adapters were fused into them; nothing of those to which nothing was."""
    again = _again(layer, module, record)
    present = {name: module._parameters[name].data for name in again}  # type: ignore[union-attr]
    return {name: t - again[name].to(t) for name, t in present.items() if not _same(t, again[name])}


def refuse_changed(layer: str, module: nn.Module, record: Record) -> None:
    """Raise AdapterStateError if the parameters of a fused module are no longer what fusing made of them: putting the kept ones back would undo that.

    Some numbers of each tensor tell a change of many of them. Where torch has counted a change, or a tensor is another one, all are compared with
    what fusing gives again, as long as they are in the dtype that they were fused in.
    """
    if record.base is None or record.sample is None:
        return
    present = {name: module._parameters[name].data for name in record.base}  # type: ignore[union-attr]
    wrong = next((name for name, t in present.items() if not _agree(t, record.sample[name])), None)
    comparable = all(t.dtype == record.base[name].dtype for name, t in present.items())
    if wrong is None and comparable and record.kept.get(FUSED) != stamps_of(module):
        again = _again(layer, module, record)
        wrong = next((name for name, t in present.items() if not _same(t, again[name])), None)
    if wrong is not None:
        raise AdapterStateError(
            f"the {wrong} of layer {shown(layer)} was changed while adapters were fused into it",
            remedy="Undo that change (pipe.unfuse_lora(), if it was peft's), or load the model again: unfusing would put back what was there before.",
        )


def sampled(weights: Parameters) -> Parameters:
    """Numbers of each parameter, some hundred of large ones, by which it is known again."""
    return {name: _some(t).clone() for name, t in weights.items()}


def _some(t: Tensor) -> Tensor:
    if t.numel() <= WHOLE:
        return t.flatten()
    return (
        t.as_strided((SAMPLE,), (t.numel() // SAMPLE,))
        if t.is_contiguous()
        else t[:: max(1, t.numel() // SAMPLE)].flatten()
    )


def _agree(t: Tensor, sample: Tensor) -> bool:
    """Whether a tensor, which may have been cast and moved, has the numbers of a sample."""
    return torch.equal(wide(_some(t)), wide(sample.to(t.device, t.dtype)))


def _again(layer: str, module: nn.Module, record: Record) -> Parameters:
    """The parameters that fusing gives once more, where the module is now."""
    assert record.base is not None
    base = {name: old.to(module._parameters[name].device) for name, old in record.base.items()}  # type: ignore[union-attr]
    inside = [n for n in record.mix.fused if n in record.fused]
    return fused_weights(layer, module, base, record.steps(record.mix.choice, inside), Scratch(), like=base)


def _same(t: Tensor, expected: Tensor) -> bool:
    """Whether a tensor is another one, but for sums in another order.

    A change moves single numbers by much or many by an ulp. Where numbers are rounded to few bits a sum in another order moves few by an ulp.
    """
    if t.shape != expected.shape or not t.numel():
        return t.shape == expected.shape
    eps, few_bits = torch.finfo(t.dtype).eps, t.dtype.itemsize < 4
    t, expected = wide(t), wide(expected.to(t.dtype))
    off = t - expected
    share = torch.linalg.vector_norm(off) / torch.linalg.vector_norm(expected).clamp_min(1e-30)
    return bool(off.abs().max() <= 4 * eps * expected.abs().max()) and bool(
        share <= (eps / 10 if few_bits else 4 * eps)
    )


def unfit(layer: str, why: str) -> UnfitError:
    """The error for a layer that cannot be fused."""
    return UnfitError(
        f"layer {shown(layer)} cannot be fused: {why}", remedy="Leave the adapter unfused; it acts all the same."
    )


def no_bias(layer: str, steps: Sequence[Step]) -> UnfitError:
    """The error for a layer whose adapters add a bias that it has no place for; PEFT's words for one of its own."""
    of_lora = any(isinstance(thing, Slot) and "lora_B_bias" in thing.tensors for thing, _ in steps)
    why = "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
    return unfit(layer, why if of_lora else "an adapter adds a bias and the layer has none")
