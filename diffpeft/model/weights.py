"""The weights of one layer with adapters in them, and without: computed from the base as it was, never from what was fused before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffpeft.errors import AdapterStateError, NonFiniteError, shown
from diffpeft.layers.adapted import FUSED, Record, Weights, base_class, effective, stamps_of, weights_of
from diffpeft.layers.sites import ConvSite, LinearSite, site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.linalg import is_finite, wide, wide_dtype
from diffpeft.methods.lora import Lora

SOME = 1 << 19  # numbers that are cheap to find memory for
WHOLE, SAMPLE = (
    4096,
    512,
)  # up to how many numbers a weight is known again by all of them, and by how many if it has more


def fused_weights(
    layer: str,
    module: Any,
    base: Weights,
    steps: Sequence[tuple[Slot, float]],
    scratch: Scratch,
    like: Weights | None = None,
) -> Weights:
    """Weights computed from `base` in fp32 or better and rounded once, in the dtype and layout of `like`, or of the present ones."""
    weight, bias = like or weights_of(module)
    dtype = wide_dtype(weight.dtype)
    with torch.no_grad():
        own = base[0].to(weight.device), None if base[1] is None else base[1].to(weight.device)
        rows = _by_rows(module, steps, dtype, own[0], scratch)
        W, b = effective(module, steps, dtype, own) if rows is None else (rows, own[1])
    if b is not None and bias is None:
        raise unfit(layer, "an adapter adds a bias and the layer has none")
    out = laid_out(W, weight), None if b is None or bias is None else b.to(bias)
    if not all(t is None or is_finite(t) for t in out):
        raise NonFiniteError(
            f"layer {shown(layer)} would get weights that are not finite",
            remedy="An adapter is broken, or too strong for the dtype.",
        )
    return (out[0].clone() if out[0].data_ptr() == base[0].data_ptr() else out[0]), out[1]


def laid_out(W: Tensor, like: Tensor) -> Tensor:
    """W in the dtype of another tensor, and lying in memory as that does."""
    return W if W.dtype == like.dtype and W.stride() == like.stride() else torch.empty_like(like).copy_(W)


class Scratch:
    """Memory for a block of rows, twice, used for all layers: new memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def pair(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[2, rows, columns], with anything in it."""
        n = 2 * rows * columns
        if self.held.numel() < n or (self.held.dtype, self.held.device) != (dtype, device):
            self.held = torch.empty(n, dtype=dtype, device=device)
        return self.held[:n].view(2, rows, columns)


def _by_rows(
    module: Any, steps: Sequence[tuple[Slot, float]], dtype: torch.dtype, weight: Tensor, scratch: Scratch
) -> Tensor | None:
    """The weight of a large layer with plain LoRAs in it, some rows at a time. None for other layers."""
    plain = all(
        slot.parts and slot.parts[0].method is Lora and {*slot.tensors} == {"lora_A", "lora_B"} for slot, _ in steps
    )
    if weight.numel() < SOME or not plain or site_of(base_class(module)) not in (LinearSite, ConvSite):
        return None
    factors = [slot(_factors, dtype, s) for slot, s in steps]
    A, B = torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], 1)
    out, some = torch.empty_like(weight), max(1, SOME * len(weight) // weight.numel())
    now, then = scratch.pair(some, weight[0].numel(), dtype, weight.device)
    for a in range(0, len(weight), some):
        rows = weight[a : a + some].flatten(1)
        W = torch.addmm(now[: len(rows)].copy_(rows), B[a : a + some], A, out=then[: len(rows)])
        out[a : a + some] = W.reshape(out[a : a + some].shape)
    return out


def _factors(slot: Slot, dtype: torch.dtype, strength: float) -> tuple[Tensor, Tensor]:
    """A [r, in * k] and B [out, r] of a LoRA, whose product is what it adds at a strength."""
    part = slot.parts[0]
    p, method = slot.prepared(part, dtype), part.method
    A, B = method.factors(p, part.spec)
    return A.flatten(1), B.flatten(1) * (method.scale(p, part.spec) * strength)


def unfused(layer: str, module: Any, record: Record) -> tuple[Record, Weights]:
    """A layer's record and weights without anything fused, the weights in the present dtype and on the present device."""
    if record.base is None:
        raise AdapterStateError(
            f"layer {shown(layer)} was fused with keep_base='none'",
            remedy="Load the model again to get its own weights.",
        )
    refuse_changed(layer, module, record)
    weights = [
        None if old is None or now is None else old.to(device=now.device, dtype=now.dtype)
        for old, now in zip(record.base, weights_of(module), strict=True)
    ]
    assert weights[0] is not None
    return replace(record, fused=frozenset(), base=None, sample=None), (weights[0], weights[1])


def refuse_changed(layer: str, module: Any, record: Record) -> None:
    """Raise AdapterStateError if the weights of a fused layer are no longer what fusing made of them: putting the kept ones back would undo that.

    Some numbers of each tensor tell a change of many of them. Where torch has counted a change, or a tensor is another one, all are compared with
    what fusing gives again, as long as they are in the dtype that they were fused in.
    """
    if record.base is None or record.sample is None:
        return
    present = weights_of(module)
    same = all(map(_agree, present, record.sample))
    if same and record.kept.get(FUSED) != stamps_of(module) and record.base[0].dtype == present[0].dtype:
        same = all(map(_same, present, _again(layer, module, record)))
    if not same:
        raise AdapterStateError(
            f"the weight of layer {shown(layer)} was changed while adapters were fused into it",
            remedy="Undo that change, or load the model again: unfusing would put back what was there before.",
        )


def sampled(weights: Weights) -> tuple[Tensor, Tensor | None]:
    """Numbers of a weight and a bias, some hundred of large ones, by which they are known again."""
    weight, bias = weights
    return _some(weight).clone(), None if bias is None else _some(bias).clone()


def _some(t: Tensor) -> Tensor:
    if t.numel() <= WHOLE:
        return t.flatten()
    return (
        t.as_strided((SAMPLE,), (t.numel() // SAMPLE,))
        if t.is_contiguous()
        else t[:: max(1, t.numel() // SAMPLE)].flatten()
    )


def _agree(t: Tensor | None, sample: Tensor | None) -> bool:
    """Whether a tensor, which may have been cast and moved, has the numbers of a sample."""
    if t is None or sample is None:
        return t is sample
    return torch.equal(wide(_some(t)), wide(sample.to(t.device, t.dtype)))


def _again(layer: str, module: Any, record: Record) -> Weights:
    """The weights that fusing gives once more, where the layer is now."""
    assert record.base is not None
    mix, device = record.mix, module.weight.device
    base = record.base[0].to(device), None if record.base[1] is None else record.base[1].to(device)
    steps = [
        (record.slots[n], s) for n in mix.fused if n in record.fused and (s := mix.choice.strengths[n][record.index])
    ]
    return fused_weights(layer, module, base, steps, Scratch(), like=base)


def _same(t: Tensor | None, expected: Tensor | None) -> bool:
    """Whether a tensor is another one, but for sums in another order.

    A change moves single numbers by much or many by an ulp. Where numbers are rounded to few bits a sum in another order moves few by an ulp.
    """
    if t is None or expected is None:
        return t is expected
    if t.shape != expected.shape or not t.numel():
        return t.shape == expected.shape
    eps, few_bits = torch.finfo(t.dtype).eps, t.dtype.itemsize < 4
    t, expected = wide(t), wide(expected.to(t.dtype))
    off = t - expected
    share = torch.linalg.vector_norm(off) / torch.linalg.vector_norm(expected).clamp_min(1e-30)
    return bool(off.abs().max() <= 4 * eps * expected.abs().max()) and bool(
        share <= (eps / 10 if few_bits else 4 * eps)
    )


def unfit(layer: str, why: str) -> AdapterStateError:
    """The error for a layer that cannot be fused."""
    return AdapterStateError(
        f"layer {shown(layer)} cannot be fused: {why}", remedy="Leave the adapter unfused; it acts all the same."
    )
