"""The weights of one layer with adapters in them, and without: computed from the base as it was, never from what was fused before."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, NonFiniteError, shown
from diffpeft.layers.carried import FUSED, Parameters, Record, Step, base_class, effective, stamps_of
from diffpeft.layers.chain import factors_of
from diffpeft.layers.sites import site_of
from diffpeft.layers.slot import Slot
from diffpeft.methods.linalg import is_finite, wide, wide_dtype

SOME = 1 << 19  # numbers that are cheap to find memory for
WHOLE, SAMPLE = (
    4096,
    512,
)  # up to how many numbers a weight is known again by all of them, and by how many if it has more


def touched(module: nn.Module, record: Record) -> list[str]:
    """The parameters of a module that its adapters may change. A layer has a weight, and may have a bias."""
    own = module._parameters
    names = [name for name in ("weight", "bias") if record.slots and own.get(name) is not None]
    return list(dict.fromkeys((*names, *(name for patch in record.patches.values() for name in patch.names))))


def based(module: nn.Module, record: Record) -> Parameters:
    """The numbers of these parameters without anything fused: those kept, else those that are there."""
    base = record.base or {}
    return {name: base[name] if name in base else module._parameters[name].data for name in touched(module, record)}  # type: ignore[union-attr]


def fused_weights(
    layer: str,
    module: Any,
    base: Parameters,
    steps: Sequence[Any],
    scratch: Scratch,
    like: Parameters | None = None,
) -> Parameters:
    """Parameters computed from `base` in fp32 or better and rounded once, in the dtype and layout of `like`, or of the present ones."""
    present = like or {name: module._parameters[name].data for name in base}
    dtype = functools.reduce(torch.promote_types, (wide_dtype(t.dtype) for t in present.values()))
    with torch.no_grad():
        own = {name: t.to(present[name].device) for name, t in base.items()}
        rows = _by_rows(module, steps, dtype, own, scratch)
        full = effective(module, steps, dtype, own) if rows is None else {**own, "weight": rows}
    if "bias" in full and "bias" not in present:
        raise unfit(layer, "an adapter adds a bias and the layer has none")
    out = {name: laid_out(full[name], t) for name, t in present.items()}
    for name, t in out.items():
        if not is_finite(t):
            raise NonFiniteError(
                f"layer {shown(layer)} would get a {name} that is not finite",
                remedy="An adapter is broken, or too strong for the dtype.",
            )
    return {
        name: t.clone() if t.data_ptr() == base[name].data_ptr() and name != "bias" else t for name, t in out.items()
    }


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
    module: Any, steps: Sequence[Step], dtype: torch.dtype, base: Parameters, scratch: Scratch
) -> Tensor | None:
    """The weight of a large layer with factors of low rank in it, some rows at a time. None for other layers."""
    site = site_of(base_class(module))
    if site is None or not site.in_order or not all(map(_is_thin, steps)) or base["weight"].numel() < SOME:
        return None
    weight = base["weight"]
    factors = [(slot(factors_of, dtype), s) for slot, s in steps]  # type: ignore[operator]
    A, B = torch.cat([A for (A, _), _ in factors]), torch.cat([B * s for (_, B), s in factors], 1)
    out, count = torch.empty_like(weight), max(1, SOME * len(weight) // weight.numel())
    now, then = scratch.pair(count, weight[0].numel(), dtype, weight.device)
    for a in range(0, len(weight), count):
        rows = weight[a : a + count].flatten(1)
        W = torch.addmm(now[: len(rows)].copy_(rows), B[a : a + count], A, out=then[: len(rows)])
        out[a : a + count] = W.reshape(out[a : a + count].shape)
    return out


def _is_thin(step: Step) -> bool:
    """Whether what acts adds nothing but products of low rank to the weight."""
    slot = step[0]
    if not isinstance(slot, Slot) or slot.shifts or not slot.parts:
        return False
    return all(part.additive and part.method.thin for part in slot.parts)


def unfused(layer: str, module: nn.Module, record: Record) -> tuple[Record, dict[str, Tensor]]:
    """A record and parameters without anything fused, in the present dtype and on the present device; those that were shared as they were."""
    if record.base is None:
        raise AdapterStateError(
            f"layer {shown(layer)} was fused with keep_base='none'",
            remedy="Load the model again to get its own weights.",
        )
    refuse_changed(layer, module, record)
    weights: dict[str, Tensor] = {
        name: record.parted[name] if name in record.parted else old.to(module._parameters[name].data)  # type: ignore[union-attr]
        for name, old in record.base.items()
    }
    return replace(record, fused=frozenset(), base=None, sample=None, parted={}), weights


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
            remedy="Undo that change, or load the model again: unfusing would put back what was there before.",
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


def unfit(layer: str, why: str) -> AdapterStateError:
    """The error for a layer that cannot be fused."""
    return AdapterStateError(
        f"layer {shown(layer)} cannot be fused: {why}", remedy="Leave the adapter unfused; it acts all the same."
    )
