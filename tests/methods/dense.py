"""A linear layer or an embedding in float64 as a method sees it, in few words: Link and Operation in one, to hold fast paths against W x."""

import torch
import torch.nn.functional as F


class Dense:
    dtype = torch.float64

    def __init__(self, geometry, bias=True):
        self.geometry, self.W = geometry, torch.randn(geometry.shape, dtype=self.dtype)
        self.b = torch.randn(geometry.out, dtype=self.dtype) if bias and not geometry.lookup else None

    @property
    def op(self):
        return Operation(self)

    def __call__(self, x, bias=True):
        return self.op.op(x, self.W, bias)

    def weight(self):
        return self.W

    def inputs(self):
        if self.geometry.lookup:
            return torch.randint(self.geometry.in_, (2, 5))
        return torch.randn(2, 5, self.geometry.in_, dtype=self.dtype)


class Operation:
    faithful = True

    def __init__(self, layer):
        self.layer, self.geometry = layer, layer.geometry

    def op(self, x, weight, bias):
        return (
            F.embedding(x, weight.t()) if self.geometry.lookup else F.linear(x, weight, self.layer.b if bias else None)
        )

    def positions(self, x):
        return x.numel() if self.geometry.lookup else x.numel() // self.geometry.in_

    def blocks(self, t, matrices):
        return torch.einsum("...kb,kbc->...kc", t.unflatten(-1, (len(matrices), -1)), matrices).flatten(-2)

    def stages(self, t, sizes, stages):
        shape = t.shape
        for axes, matrices in stages:
            to = range(-len(axes), 0)
            t = t.reshape(-1, *sizes).movedim([a + 1 for a in axes], [*to])
            seen = t.shape
            t = torch.einsum("zkb,kbc->zkc", t.reshape(len(t), len(matrices), -1), matrices).reshape(seen)
            t = t.movedim([*to], [a + 1 for a in axes])
        return t.reshape(shape)

    def scaled(self, t, by):
        return t * by

    def rescaled(self, y, by, bias):
        return y * by if not bias or self.layer.b is None else y * by + (1 - by) * self.layer.b

    def less_bias(self, y):
        return y if self.layer.b is None else y - self.layer.b
