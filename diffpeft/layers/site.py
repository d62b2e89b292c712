"""A layer seen as one linear operation: the only place that knows Linear from Conv from Embedding from a quantised Linear.

A site lends methods the layer's operation (`methods.base.Op`) and gives its weight in canonical form, [out, in / groups, *kernel].
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffpeft.layers import kernels
from diffpeft.methods import Geometry
from diffpeft.methods.linalg import added

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Site:
    """What all sites share. `rest` are the arguments of the layer's forward beside its input."""

    kinds: tuple[Any, ...]  # classes, or (module, name) of classes in libraries that may not be there
    quantised = False
    endings: tuple[str, ...] = ()  # of the names of further classes
    targets = True  # whether `attach` may choose it; else it is a norm: what changes it changes its weight and bias
    plain = False  # forward is F.linear(x, weight, bias) and no more

    def __init__(self, module: Any, *rest: Any, **named: Any):
        self.module, self.rest, self.named = module, rest, named
        self.geometry = self.geometry_of(module)
        base: Any = getattr(type(module), "_diffpeft_base", type(module))
        # else the layer is quantised, or a subclass with a forward of its own: that must run, and its result may be needed for backward
        self.faithful = not self.quantised and any(
            kind == (base.__module__, base.__name__) if isinstance(kind, tuple) else base.forward is kind.forward
            for kind in self.kinds
        )

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        """The layer without adapters, as its class `base` computes it."""
        return base.forward(self.module, x, *self.rest, **self.named)

    def weight(self) -> Tensor:
        """The layer's weight seen as [out, in / groups, *kernel]; for quantised layers a copy."""
        return self.canonical(self.module.weight)

    def canonical(self, weight: Tensor) -> Tensor:
        """A weight in the layer's own order as [out, in / groups, *kernel]: the inverse of `stored`."""
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layer's own order: the inverse of `weight`."""
        return weight

    def has_batch(self, x: Tensor) -> bool:
        """Whether the first axis of an input counts rows of a batch."""
        g = self.geometry
        return x.dim() == len(g.kernel) + 2 if g.kernel else x.dim() > (not g.lookup)

    def kron(
        self: Any, y: Tensor, x: Tensor, first: Tensor, down: Tensor | None, up: Tensor, gate: float | Tensor
    ) -> Tensor:
        h = self.mix(x if down is None else self.grouped(x, down, first.shape[1]), first)
        return added(y, self.blocks(h, up.T.expand(len(first), *up.T.shape)), gate)

    def _bias(self, like: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(like.dtype)


class _FeaturesLast(_Site):
    """Features in the last axis."""

    def positions(self, x: Tensor) -> int:
        return x.numel() // self.geometry.in_

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: float | Tensor) -> Tensor:
        """y [*n, out] + gate * h [*n, r] W^T as one product into y."""
        if isinstance(gate, Tensor):
            h, gate = h * gate, 1.0
        return kernels.add(y, h, weight, gate, last=True, into=self.faithful and y.is_contiguous())

    def blocks(self, t: Tensor, matrices: Tensor) -> Tensor:
        return kernels.block_product(t, matrices)

    def mix(self, t: Tensor, matrix: Tensor) -> Tensor:
        m, n = matrix.shape
        return (matrix @ t.reshape(-1, n, t.shape[-1] // n)).reshape(*t.shape[:-1], m * (t.shape[-1] // n))

    def butterfly(self, t: Tensor, sizes: tuple[int, ...], stages: Sequence[tuple[int, Tensor]]) -> Tensor:
        return kernels.butterfly(t.reshape(-1, t.shape[-1]), sizes, stages, last=True).view(t.shape)

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        return t * by

    def gated(self, h: Tensor, by: Tensor) -> Tensor:
        """h [b, *n, r] times by [b, r]."""
        return h * by.view(len(by), *(1 for _ in h.shape[2:]), -1)

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        return y + by

    def rescaled(self, y: Tensor, by: Tensor, bias: bool) -> Tensor:
        return kernels.rescale(y, by, self._bias(y) if bias else None)

    def less_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y - self.bias.to(y.dtype)


class LinearSite(_FeaturesLast):
    """nn.Linear: W [out, in]."""

    kinds: tuple[Any, ...] = (nn.Linear,)

    def __init__(self, module: Any, *rest: Any, **named: Any):
        super().__init__(module, *rest, **named)
        base: Any = getattr(type(module), "_diffpeft_base", None)
        self.plain = base is not None and base.forward is nn.Linear.forward

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        return Geometry(module.out_features, module.in_features)

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        return F.linear(x, weight, self._bias(x) if bias else None)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def grouped(self, x: Tensor, weight: Tensor, n: int) -> Tensor:
        return F.linear(x.reshape(*x.shape[:-1], n, x.shape[-1] // n), weight).flatten(-2)


class QuantisedSite(LinearSite):
    """bitsandbytes' Linear8bitLt and Linear4bit: W is dequantised where a method needs it, and cannot be written back."""

    kinds = (("bitsandbytes.nn.modules", "Linear8bitLt"), ("bitsandbytes.nn.modules", "Linear4bit"))
    quantised = True

    @property
    def _packed(self) -> bool:
        """Whether 4-bit numbers lie as bitsandbytes' product for inference wants them, on CPUs that have it; it knows no gradients."""
        return getattr(getattr(self.module.weight, "quant_state", None), "packing_format_for_cpu", False)

    def forward(self, base: Any, x: Tensor) -> Tensor:
        if self._packed and torch.is_grad_enabled() and x.requires_grad:
            return self.op(x, self.weight().to(x.dtype), True)
        return super().forward(base, x)

    def weight(self) -> Tensor:
        import bitsandbytes.functional as bnb

        weight = self.module.weight
        if getattr(weight, "quant_state", None) is not None:
            data, state = weight.data, weight.quant_state
            if self._packed:
                data, state = bnb._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
            return bnb.dequantize_4bit(data, state)
        # before the first forward the parameter holds the scales, afterwards the matrix-product state does
        scales = weight.SCB if weight.SCB is not None else self.module.state.SCB
        data = weight.data if weight.CB is None else weight.CB
        return bnb.int8_vectorwise_dequant(data, scales)


class GGUFSite(LinearSite):
    """diffusers' GGUFLinear, whose weight is a GGUF file's blocks of numbers: W is dequantised where a method needs it, and cannot be written back."""

    kinds = (("diffusers.quantizers.gguf.utils", "GGUFLinear"),)
    quantised = True

    def weight(self) -> Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(self.module.weight).to(self.module.compute_dtype)


class TransposedLinearSite(LinearSite):
    """GPT-2's Conv1D, a linear layer whose weight is stored [in, out]."""

    kinds = (("transformers.pytorch_utils", "Conv1D"),)

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        return Geometry(module.nf, module.nx)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t()


class EmbeddingSite(_FeaturesLast):
    """nn.Embedding, a linear layer on one-hot rows: W [features, rows] is the transposed table."""

    kinds = (nn.Embedding,)

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        return Geometry(module.embedding_dim, module.num_embeddings, lookup=True)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t()

    def positions(self, x: Tensor) -> int:
        return x.numel()

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        m = self.module
        y = F.embedding(x, weight.t(), m.padding_idx, scale_grad_by_freq=m.scale_grad_by_freq, sparse=m.sparse)
        return self._grown(y)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._grown(F.embedding(x, weight.t(), self.module.padding_idx))

    def _grown(self, y: Tensor) -> Tensor:
        """Times what transformers' scaled embeddings (Gemma, Bart) multiply their rows by."""
        scale = vars(self.module).get("embed_scale", self.module._buffers.get("embed_scale"))
        return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class ConvSite(_Site):
    """nn.Conv1d, 2d and 3d with any stride, padding (and its mode), dilation and groups; features in the axis before the kernel's."""

    kinds: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        return Geometry(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)

    def positions(self, x: Tensor) -> int:
        return x.numel() // (self.geometry.in_ * math.prod(self.module.stride))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.module._conv_forward(x, weight, bias)

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        return self._convolve(x, weight, self._bias(x) if bias else None)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """[b, in, *n] -> [b, groups * r, *m]: every group is filtered by the same r filters."""
        groups = self.geometry.groups
        return self._convolve(x, weight if groups == 1 else weight.repeat(groups, *(1 for _ in weight.shape[1:])), None)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: float | Tensor) -> Tensor:
        """y + gate * (1x1 convolution of h by group). y [b, out, *m], h [b, groups * r, *m]; a plain contiguous one as a product into y."""
        groups = self.geometry.groups
        if isinstance(gate, Tensor):
            h, gate = (
                self.scaled(h, gate.repeat(groups) if gate.numel() > 1 else gate.expand(h.shape[self._axis(h)])),
                1.0,
            )
        if groups == 1 and self._batched(y) and y.is_contiguous():
            return kernels.add(y, h, weight.flatten(1), gate, last=False, into=self.faithful)
        return y + gate * _CONVOLUTIONS[weight.dim() - 3](h, weight, groups=groups)

    def grouped(self, x: Tensor, weight: Tensor, n: int) -> Tensor:
        lead = x.shape[: self._axis(x)]
        y = self._convolve(x.reshape(-1, self.geometry.in_ // n, *x.shape[len(lead) + 1 :]), weight, None)
        return y.reshape(*lead, y.shape[1] * n, *y.shape[2:])

    def blocks(self, t: Tensor, matrices: Tensor) -> Tensor:
        n, b, c = matrices.shape
        lead, space = t.shape[: self._axis(t)], t.shape[self._axis(t) + 1 :]
        return (matrices.mT @ t.reshape(*lead, n, b, math.prod(space))).reshape(*lead, n * c, *space)

    def mix(self, t: Tensor, matrix: Tensor) -> Tensor:
        m, n = matrix.shape
        lead, space = t.shape[: self._axis(t)], t.shape[self._axis(t) + 1 :]
        f = t.shape[self._axis(t)] // n
        return (matrix @ t.reshape(*lead, n, f * math.prod(space))).reshape(*lead, m * f, *space)

    def butterfly(self, t: Tensor, sizes: tuple[int, ...], stages: Sequence[tuple[int, Tensor]]) -> Tensor:
        flat = t.reshape(-1, t.shape[self._axis(t)], math.prod(t.shape[self._axis(t) + 1 :]))
        return kernels.butterfly(flat, sizes, stages, last=False).view(t.shape)

    def _batched(self, t: Tensor) -> bool:
        return t.dim() == len(self.geometry.kernel) + 2

    def _axis(self, t: Tensor) -> int:
        return int(self._batched(t))

    def _column(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1 for _ in self.geometry.kernel))

    def scaled(self, t: Tensor, by: Tensor) -> Tensor:
        return t * self._column(by)

    def gated(self, h: Tensor, by: Tensor) -> Tensor:
        """h [b, groups * r, *m] times by [b, r]."""
        by = by.repeat(1, self.geometry.groups)
        return h * by.view(*by.shape, *(1 for _ in self.geometry.kernel))

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        return y + self._column(by)

    def rescaled(self, y: Tensor, by: Tensor, bias: bool) -> Tensor:
        if not bias or self.bias is None:
            return y * self._column(by)
        return torch.addcmul(self._column((1 - by) * self.bias.to(y.dtype)), y, self._column(by))

    def less_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y - self._column(self.bias.to(y.dtype))


class TransposedConvSite(ConvSite):
    """nn.ConvTranspose1d, 2d and 3d, whose weight is stored [in, out / groups, *kernel]."""

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def positions(self, x: Tensor) -> int:
        return x.numel() // self.geometry.in_

    def canonical(self, weight: Tensor) -> Tensor:
        return _swapped(weight, self.geometry.groups)

    def stored(self, weight: Tensor) -> Tensor:
        return _swapped(weight, self.geometry.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m, d = self.module, len(self.geometry.kernel)
        size = self.named.get("output_size", self.rest[0] if self.rest else None)
        padding = m._output_padding(x, size, m.stride, m.padding, m.kernel_size, d, m.dilation)
        return _TRANSPOSED[d - 1](
            x, _swapped(weight, m.groups), bias, m.stride, m.padding, padding, m.groups, m.dilation
        )


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """[groups * a, b, *k] <-> [groups * b, a, *k]: the first two axes exchanged within each group; its own inverse."""
    ab, b = weight.shape[:2]
    return (
        weight.reshape(groups, ab // groups, b, *weight.shape[2:])
        .transpose(1, 2)
        .reshape(groups * b, ab // groups, *weight.shape[2:])
    )


_CHANNELS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class NormSite(_Site):
    """Normalising layers: W [features, 1] is their factors, whatever their class makes of them. Features are the second axis or the last.

    transformers has a class like T5LayerNorm or Qwen2RMSNorm for every model.
    """

    kinds = (nn.LayerNorm, nn.RMSNorm, *_CHANNELS)
    endings = ("RMSNorm", "T5LayerNorm")
    targets = False

    def __init__(self, module: Any, *rest: Any, **named: Any):
        super().__init__(module, *rest, **named)
        self.faithful = True  # whatever the class does, `op` does

    @staticmethod
    def geometry_of(module: Any) -> Geometry:
        weight = getattr(module, "weight", None)
        return Geometry(0 if weight is None else weight.numel(), 1)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.module.weight.shape)

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        """The forward of its class on a layer that differs in its weight and nothing else."""
        m = self.module
        base: Any = getattr(type(m), "_diffpeft_base", type(m))
        own = {"weight": self.stored(weight).to(m.weight.dtype), "bias": self.bias if bias else None}
        other = base.__new__(base)
        other.__dict__.update(m.__dict__, _parameters={**m._parameters, **own})
        return base.forward(other, x, *self.rest, **self.named)

    def shifted(self, y: Tensor, by: Tensor) -> Tensor:
        second = isinstance(self.module, _CHANNELS)
        return y + by.to(y.dtype).view((-1, *(1 for _ in y.shape[2:])) if second else self.module.weight.shape)


SITES = (
    QuantisedSite,
    GGUFSite,
    LinearSite,
    TransposedLinearSite,
    EmbeddingSite,
    ConvSite,
    TransposedConvSite,
    NormSite,
)


def site_of(cls: type[nn.Module]) -> type[_Site] | None:
    """The kind of site that modules of this class are, or None if no method fits them."""
    if cls not in _found:
        _found[cls] = _site(cls)
    return _found[cls]


_found: dict[type, type[_Site] | None] = {}


def _site(cls: type[nn.Module]) -> type[_Site] | None:
    names = {(c.__module__, c.__name__) for c in cls.__mro__}

    def fits(kind: Any) -> bool:
        return kind in names if isinstance(kind, tuple) else issubclass(cls, kind)

    return next((s for s in SITES if any(map(fits, s.kinds)) or cls.__name__.endswith(s.endings)), None)


def refusal(module: nn.Module, parent: nn.Module | None, name: str) -> str:
    """Why this layer cannot be adapted although its kind can; empty if it can."""
    weight, site = getattr(module, "weight", None), site_of(type(module))
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} reads its weight directly and would not see the adapter"
    if getattr(parent, "__dict__", {}).get("fused_projections") and name.rpartition(".")[2] in {"to_q", "to_k", "to_v"}:
        return "its projections are fused (call unfuse_qkv_projections first)"
    if "parametrizations" in module._modules:
        return "it is parametrised"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and has no shape yet (run the model once first)"
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() or (site and site.quantised)):
        return "its weight is quantised in a way that is not known here"
    if vars(module).get("max_norm") is not None:
        return "it renormalises its weight in every forward (max_norm)"
    if unknown := {*diffusers_hooks(module)} - _KNOWN_HOOKS:
        return f"diffusers' hook {min(unknown)} is on it (load adapters before it is enabled)"
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return ""


# they hold a layer's weights elsewhere, or in another dtype, between calls
CASTING = "layerwise_casting"
_OFFLOADING = frozenset({"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"})
STORING_HOOKS = _OFFLOADING | {CASTING}
_KNOWN_HOOKS = STORING_HOOKS | {"peft_input_autocast_disable"}


def diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers that are on a module, by name."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}


def is_cast(module: nn.Module) -> bool:
    """Whether diffusers stores a layer in another dtype than it computes in, or is about to."""
    if CASTING in diffusers_hooks(module):
        return True
    frame = sys._getframe(1)  # the hook is put on the layer after it has cast it for the first time
    for _ in range(4):
        if (
            frame.f_code.co_name == "initialize_hook"
            and type(frame.f_locals.get("self")).__name__ == "LayerwiseCastingHook"
        ):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def computing_dtype(module: Any) -> torch.dtype:
    """The dtype that a layer computes in, as far as its weight and diffusers' casting tell."""
    if hook := diffusers_hooks(module).get(CASTING):
        return hook.compute_dtype
    dtype = module.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float16


def reapply_offloading(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Let diffusers' group offloading, if it is on a model, know the tensors that some of its layers have now."""
    if any(_OFFLOADING & {*diffusers_hooks(module)} for module in (model, *changed)):
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(model)


def held_forwards(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where other libraries keep the forward that the layer's class gave it, as (dict, key).

    accelerate: beside its hook, and after the hook was removed as `forward` on the layer; diffusers: in its registry of hooks.
    """
    hooks = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())
    places: list[tuple[Any, str]] = [
        (d, key) for d in (vars(module), *map(vars, hooks)) for key in ("_old_forward", "forward", "original_forward")
    ]
    return [(d, key) for d, key in places if getattr(d.get(key), "__func__", None) is type(module).forward]


def device_of(module: Any) -> torch.device:
    """Where the layer computes: an offloading hook's execution device, else where its weight is."""
    hook = vars(module).get("_hf_hook")  # vars: torch is slow to say that there is none
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else module.weight.device


def present(module: nn.Module, read: Callable[[], Any]) -> Any:
    """`read()` while the layer's own tensors are here, even where an offloading hook keeps them elsewhere."""
    if "_hf_hook" not in vars(module):
        return read()
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        return read()
