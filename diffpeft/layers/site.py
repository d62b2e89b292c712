"""A layer seen as one linear operation: the only place that knows Linear from Conv."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffpeft.methods import Geometry

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class LinearSite:
    """nn.Linear: W [out, in]."""

    kinds = (nn.Linear,)

    def __init__(self, module: Any):
        self.module = module

    @staticmethod
    def geometry(module: Any) -> Geometry:
        return Geometry(module.out_features, module.in_features)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: float | Tensor) -> Tensor:
        """y + gate * h W^T as one product with an epilogue: no pass over y beyond it. y [*n, out], h [*n, r]."""
        if isinstance(gate, Tensor):
            h, gate = h * gate, 1.0
        return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), weight.t(), alpha=gate).view(y.shape)


class ConvSite:
    """nn.Conv1d, 2d and 3d with any stride, padding (and its mode), dilation and groups: W [out, in / groups, *kernel]."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, module: Any):
        self.module = module

    @staticmethod
    def geometry(module: Any) -> Geometry:
        return Geometry(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """[b, in, *n] -> [b, groups * r, *m]: every group is filtered by the same r filters."""
        groups = self.module.groups
        filters = weight if groups == 1 else weight.repeat(groups, *(1 for _ in weight.shape[1:]))
        return self.module._conv_forward(x, filters, None)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: float | Tensor) -> Tensor:
        """y + gate * (1x1 convolution of h by group). y [b, out, *m], h [b, groups * r, *m]; a plain contiguous one as a product with an epilogue."""
        if isinstance(gate, Tensor):
            h, gate = h * gate, 1.0
        if self.module.groups == 1 and y.dim() == weight.dim() and y.is_contiguous():
            B = weight.flatten(1).expand(len(y), -1, -1)
            return torch.baddbmm(y.flatten(2), B, h.flatten(2), alpha=gate).view(y.shape)
        return y + gate * _CONVOLUTIONS[weight.dim() - 3](h, weight, groups=self.module.groups)


SITES = (LinearSite, ConvSite)


def site_of(cls: type[nn.Module]) -> type[LinearSite] | type[ConvSite] | None:
    """The kind of site that modules of this class are, or None if no method fits them."""
    return next((site for site in SITES if issubclass(cls, site.kinds)), None)


def refusal(module: nn.Module, parent: nn.Module | None, name: str) -> str:
    """Why this layer cannot be adapted although its kind can; empty if it can."""
    weight = getattr(module, "weight", None)
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} reads its weight directly and would not see the adapter"
    if getattr(parent, "fused_projections", False) and name.rpartition(".")[2] in {"to_q", "to_k", "to_v"}:
        return "its projections are fused (call unfuse_qkv_projections first)"
    if hasattr(module, "parametrizations"):
        return "it is parametrised"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is quantised"
    if getattr(vars(module).get("_diffusers_hook"), "hooks", None):
        return "diffusers' hooks are on it (load adapters before group offloading or layerwise casting is enabled)"
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return ""


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
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(device) if device is not None else module.weight.device
