"""C3A: dW is made of circulant blocks, dW[m b + j, n b + k] = w[m, n, (k - j) mod b] / columns.  Chen et al. 2024, arXiv:2407.19342.

A block of b x b holds b numbers, and its product with a vector is a circular correlation: on activations by FFT, so that nothing as large as W is made.
W is flat(W) [out, in / groups * prod(kernel)]; of an embedding [features, rows].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.errors import ConfigError
from diffpeft.methods import config as checks
from diffpeft.methods.base import Additive, Fresh, Shaped, Site, Spec, Tensors
from diffpeft.methods.forms import Pointwise
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import traced
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class C3AConfig(PeftConfig):
    """How to make a C3A. Names, meanings and defaults are PEFT's.

    Args:
        block_size: of the circulant blocks. It divides the features out and the columns of every layer: their greatest common divisor is the largest.
        target_modules: as in LoraConfig.
        bias: which biases are trained too: "none", "c3a_only", "all".
        modules_to_save, layers_to_transform, layers_pattern: as in LoraConfig.
        block_size_pattern: {pattern of layer names: block size}.
        init_weights: True: zero, which changes nothing. "gaussian", "kaiming_uniform", "xavier_uniform" (False is the same): random, so that a fresh
            one changes the output, though little.
    """

    block_size: int = 256
    target_modules: str | Collection[str] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    TYPE = PeftType(LAYOUTS["c3a"].peft)
    exclude_modules = None  # PEFT has no such field here

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("block_size", self.block_size)
        checks.check_choice("bias", self.bias, ("none", "all", "c3a_only"))
        checks.check_choice("init_weights", self.init_weights, (True, False, *_STARTS))
        checks.check_patterns("block_size_pattern", self.block_size_pattern, checks.check_rank)


class C3A(Additive):
    """C3A on any layer: `c3a_kernel` [out / b, in / groups * prod(kernel) / b, b]."""

    name = "c3a"
    config = C3AConfig

    @classmethod
    def init(cls, config: C3AConfig, site: Site, **_: object) -> Fresh:
        """PEFT's draws. Raises ConfigError where the block does not divide the layer."""
        g, b = site.geometry, patterns.first(config.block_size_pattern, (site.name,), config.block_size)
        if g.out % b or g.columns % b:
            raise ConfigError(
                f"block_size {b} does not divide the {g.out} rows and {g.columns} columns of the weight",
                where=site.name,
                remedy=f"Choose a divisor of {math.gcd(g.out, g.columns)}, for this layer alone in block_size_pattern.",
            )
        w = torch.zeros(g.out // b, g.columns // b, b)
        if config.init_weights is not True:
            _STARTS[config.init_weights or "xavier_uniform"](w, site)
        return Fresh({"c3a_kernel": w})

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """1 / columns: there is no alpha."""
        return 1.0 / spec.geometry.columns

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        w = p["c3a_kernel"]
        b = w.shape[-1]
        steps = torch.arange(b, device=w.device)
        blocks = w[:, :, (steps - steps[:, None]) % b]
        return blocks.transpose(1, 2).reshape(spec.geometry.shape)

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Pointwise | None:
        """By FFT where an input has features in its last axis."""
        if spec.geometry.kernel or spec.geometry.lookup:
            return None
        return Pointwise(lambda x: correlated(x, p["c3a_kernel"]))


def correlated(x: Tensor, w: Tensor) -> Tensor:
    """y[m b + j] = sum over n and k of w[m, n, (k - j) mod b] x[n b + k].  x [*, n b], w [m, n, b] -> [*, m b], in x's dtype."""
    _, n, b = w.shape
    if not traced() and not x.numel():  # there is no FFT of nothing
        return torch.einsum("...nb,mnb->...mb", x.unflatten(-1, (n, b)), w.to(x.dtype)).flatten(-2)
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    spectrum = torch.fft.rfft(x.to(dtype).unflatten(-1, (n, b)))
    mixed = torch.einsum("...nf,mnf->...mf", spectrum, torch.fft.rfft(w.to(dtype)).conj())
    y: Tensor = torch.fft.irfft(mixed, b)
    return y.flatten(-2).to(x.dtype)


def _xavier(w: Tensor, site: Site) -> None:
    _uniform(w, site, math.sqrt(3.0) * math.sqrt(2.0 / (site.geometry.out + site.geometry.columns)))


def _kaiming(w: Tensor, site: Site) -> None:
    _uniform(w, site, math.sqrt(1.0 / site.geometry.columns))


def _uniform(w: Tensor, site: Site, bound: float) -> None:
    w.uniform_(-bound, bound, generator=site.generator)


def _gaussian(w: Tensor, site: Site) -> None:
    w.normal_(generator=site.generator)


_STARTS: dict[str, Callable[[Tensor, Site], None]] = {
    "gaussian": _gaussian,
    "kaiming_uniform": _kaiming,
    "xavier_uniform": _xavier,
}
