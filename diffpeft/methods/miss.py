"""MiSS: dW[o, n r + j] = block[j, o], one small matrix beside itself along the columns.  Kang and Yin 2024, arXiv:2409.15371.

Three forms. Standard: block [r, out]. Mini: block [r, m], over and over along the rows too. Bat: block [out / r, r, r], which depends on W: each r x r
tile W_gn of it becomes W_gn + W_gn B_g + B_g.
W is flat(W) [out, in / groups * prod(kernel)]; of an embedding [features, rows]. The last columns are a part of the matrix where r does not divide them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods import config as checks
from diffpeft.methods.base import Additive, Fresh, Shaped, Site, Spec, Tensors
from diffpeft.methods.forms import Factors, Pointwise
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class MissConfig(PeftConfig):
    """How to make a MiSS. Names, meanings and defaults are PEFT's.

    Args:
        r: how many columns the matrix has, at most those of the weight.
        miss_dropout: probability of dropping inputs of the change in training. Bat has none.
        mini_r: how many rows it has with `init_weights="mini"`; it divides the features out.
        target_modules, exclude_modules: as in LoraConfig.
        init_weights: True: the standard form. "bat", "mini": the other two. All of them change nothing at first. False: the standard form, random.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
        bias: which biases are trained too: "none", "MiSS_only", "all".
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["miss"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_rank("mini_r", self.mini_r)
        checks.check_probability("miss_dropout", self.miss_dropout)
        checks.check_choice("init_weights", self.init_weights, (True, False, "bat", "mini"))
        checks.check_choice("bias", self.bias, ("none", "all", "MiSS_only"))


class Miss(Additive):
    """MiSS on any layer: `miss_block` [r, out], [r, m] or, as bat, [out / r, r, r]."""

    name = "miss"
    config = MissConfig

    @classmethod
    def additive(cls, axes: Mapping[str, int]) -> bool:
        return axes.get("miss_block") != 3

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        """r: the first axis, of bat's tiles the last."""
        shape = p["miss_block"].shape
        return shape[0] if len(shape) == 2 else shape[-1]

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        why, (*_, r), g = super().check(p, spec), p["miss_block"].shape, spec.geometry
        if why or len(p["miss_block"].shape) == 2:
            return why
        tiles = p["miss_block"].shape[0]
        fits = tiles * r == g.out and g.columns % r == 0
        return "" if fits else f"miss_block has {tiles} tiles of {r}, the weight is ({g.out}, {g.columns})"

    @classmethod
    def init(cls, config: MissConfig, site: Site, **_: object) -> Fresh:
        """PEFT's draws. Raises ConfigError where r or mini_r does not fit the layer."""
        g, r, like = site.geometry, config.r, config.init_weights
        _check_sizes(config, site)
        shape = {"bat": (g.out // r, r, r), "mini": (r, config.mini_r)}.get(str(like), (r, g.out))
        block = torch.zeros(shape) if like else kaiming(*shape, generator=site.generator)
        drops = {"dropout": config.miss_dropout} if config.miss_dropout and like != "bat" else {}
        return Fresh({"miss_block": block}, options={**({"form": like} if like in ("bat", "mini") else {}), **drops})

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        g, block = spec.geometry, p["miss_block"]
        tiles = block.t().repeat(g.out // block.shape[1], math.ceil(g.columns / len(block)))
        return tiles[:, : g.columns].reshape(g.shape)

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        if cls.additive({"miss_block": p["miss_block"].dim()}):
            return super().weight(W, p, spec)
        B = p["miss_block"].to(W.dtype)
        n, r, _ = B.shape
        tiles = W.reshape(n, r, -1, r).transpose(1, 2)  # [n, columns / r, r, r]
        changed = tiles + tiles @ B[:, None] + B[:, None]
        return changed.transpose(1, 2).reshape(W.shape)

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        """Ones and zeros that add up every r-th column, and the block."""
        g, block = spec.geometry, p["miss_block"]
        eye = torch.eye(len(block), dtype=block.dtype, device=block.device)
        A = eye.repeat(1, math.ceil(g.columns / len(block)))[:, : g.columns]
        B = block.t().repeat(g.out // block.shape[1], 1)
        return Factors(A.reshape(len(block), *g.shape[1:]), B.reshape(*B.shape, *(1 for _ in g.kernel)))

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Pointwise | Factors:
        """Every r-th feature added up, where an input has features in its last axis."""
        if spec.geometry.kernel or spec.geometry.lookup:
            return cls.factors(p, spec)
        return Pointwise(lambda x: _folded(x, p["miss_block"], spec.geometry.out))


def _folded(x: Tensor, block: Tensor, out: int) -> Tensor:
    """x [*, columns], block [r, m] -> [*, out]: every r-th feature added up, times the block, over and over."""
    r, m = block.shape
    sums = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
    y: Tensor = sums @ block.to(x.dtype)
    return y.repeat(*(1 for _ in y.shape[1:]), out // m)


def _check_sizes(config: MissConfig, site: Site) -> None:
    """Raise ConfigError where a layer cannot have the tensors of a config."""
    g, r, m = site.geometry, config.r, config.mini_r
    if r > g.columns:
        raise ConfigError(
            f"r is {r}, the weight has {g.columns} columns", where=site.name, remedy="Choose an r of at most as many."
        )
    if config.init_weights == "bat" and (g.out % r or g.columns % r):
        raise ConfigError(
            f"the weight ({g.out}, {g.columns}) has no tiles of {r} x {r}",
            where=site.name,
            remedy=f'With init_weights="bat" r divides {math.gcd(g.out, g.columns)} here.',
        )
    if config.init_weights == "mini" and g.out % m:
        raise ConfigError(
            f"mini_r {m} does not divide the {g.out} rows of the weight", where=site.name, remedy="Choose a divisor."
        )
