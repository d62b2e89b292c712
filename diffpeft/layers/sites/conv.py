"""Convolutions and transposed convolutions, with features in the axis before the kernel's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpeft.layers import kernels
from diffpeft.layers.backends import Kind
from diffpeft.layers.sites.base import LayerSite
from diffpeft.methods import Geometry, Strength
from diffpeft.methods.forms import Branch, Form, Stage

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class ConvSite(LayerSite):
    """nn.Conv1d, 2d and 3d with any stride, padding (and its mode), dilation and groups; features in the axis before the kernel's."""

    kinds: ClassVar[tuple[type[nn.Module] | Kind, ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    in_order = True

    @staticmethod
    def geometry_of(module: nn.modules.conv._ConvNd) -> Geometry:
        return Geometry(module.out_channels, module.in_channels, tuple(module.kernel_size), module.groups)

    def positions(self, x: Tensor) -> int:
        stride: tuple[int, ...] = self.module.stride
        return x.numel() // (self.geometry.in_ * math.prod(stride))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.module._conv_forward(x, weight, bias)
        return y

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        return self._convolve(x, weight, self._bias(x) if bias else None)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """[b, in, *n] -> [b, groups * r, *m]: every group is filtered by the same r filters."""
        groups = self.geometry.groups
        return self._convolve(x, weight if groups == 1 else weight.repeat(groups, *(1 for _ in weight.shape[1:])), None)

    @property
    def takes_branches(self) -> bool:
        """PEFT's has the layer's stride and padding, and no dilation."""
        return type(self) is ConvSite and self.geometry.groups > 1 and set(self.module.dilation) == {1}

    def plus(self, y: Tensor, x: Tensor, form: Form, gate: Strength) -> Tensor:
        if not isinstance(form, Branch):
            return super().plus(y, x, form, gate)
        m, convolve = self.module, _CONVOLUTIONS[len(self.geometry.kernel) - 1]
        h = convolve(x, form.A, None, m.stride, m.padding)
        change = convolve(h, form.B, groups=self.geometry.groups)
        return y + gate * change if isinstance(gate, Tensor) else torch.add(y, change, alpha=gate)

    def add(self, y: Tensor, h: Tensor, weight: Tensor, gate: Strength) -> Tensor:
        """y + gate * (1x1 convolution of h by group). y [b, out, *m], h [b, groups * r, *m]; a plain contiguous one as a product into y."""
        groups = self.geometry.groups
        if isinstance(gate, Tensor):
            h, gate = (
                self.scaled(h, gate.repeat(groups) if gate.numel() > 1 else gate.expand(h.shape[self._axis(h)])),
                1.0,
            )
        if groups == 1 and self._batched(y) and y.is_contiguous() and not kernels.is_small(y):
            return kernels.add(y, h, weight.flatten(1), gate, last=False, into=self.faithful)
        return torch.add(y, _CONVOLUTIONS[weight.dim() - 3](h, weight, groups=groups), alpha=gate)

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

    def stages(self, t: Tensor, sizes: Sequence[int], stages: Sequence[Stage]) -> Tensor:
        flat = t.reshape(-1, t.shape[self._axis(t)], math.prod(t.shape[self._axis(t) + 1 :]))
        return kernels.stages(flat, sizes, stages, last=False).view(t.shape)

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

    kinds: ClassVar[tuple[type[nn.Module] | Kind, ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    in_order = False

    def positions(self, x: Tensor) -> int:
        return x.numel() // self.geometry.in_

    def canonical(self, weight: Tensor) -> Tensor:
        return _swapped(weight, self.geometry.groups)

    def stored(self, weight: Tensor) -> Tensor:
        return _swapped(weight, self.geometry.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m, d = self.module, len(self.geometry.kernel)
        size = self.keywords.get("output_size", self.arguments[0] if self.arguments else None)
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
