"""HiRA: W' = W + W * (B A), element by element.  Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", ICLR.

The update has the rank of W, though its own tensors have the shapes of LoRA's. What it does to an input needs the product as large as W;
W + s W * (B A) is built in one pass over W, and the layer's operation runs once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.methods import config as checks
from diffpeft.methods.base import Fresh, Link, Method, Site, Spec, Strength, Tensors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class HiraConfig(PeftConfig):
    """How to make a HiRA. Names, meanings and defaults are PEFT's.

    Args:
        r: the rank of B A.
        target_modules, exclude_modules: as in LoraConfig.
        hira_dropout: probability of dropping inputs of the change in training.
        fan_in_fan_out: accepted for PEFT's sake; the layer says how it stores its weight.
        modules_to_save: as in LoraConfig.
        init_weights: True: B is zero, which changes nothing. "gaussian": A of deviation 1 / r. False: both are random.
        layers_to_transform, layers_pattern: as in LoraConfig.
        rank_pattern: {pattern of layer names: rank}.
    """

    r: int = 32
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_weights: bool | str | None = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)

    TYPE = PeftType(LAYOUTS["hira"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_probability("hira_dropout", self.hira_dropout)
        checks.check_choice("init_weights", self.init_weights, (True, False, None, "gaussian"))
        checks.check_patterns("rank_pattern", self.rank_pattern, checks.check_rank)


class Hira(Method):
    """HiRA on any layer: `hira_A` [r, in / groups, *kernel] and `hira_B` [out, r, *1]; of an embedding `hira_embedding_A` [r, rows] and `_B` [features, r]."""

    name = "hira"
    config = HiraConfig

    @classmethod
    def init(cls, config: HiraConfig, site: Site, **_: object) -> Fresh:
        """PEFT's draws in PEFT's order: both factors, and then what they begin with."""
        g, r, like = site.geometry, patterns.first(config.rank_pattern, (site.name,), config.r), config.init_weights
        inside = (g.in_,) if g.lookup else g.shape[1:]
        A = torch.randn(r, *inside, generator=site.generator)
        B = torch.randn(g.out, r, *(1 for _ in g.kernel), generator=site.generator)
        if like and g.lookup:
            A, B = torch.zeros_like(A), torch.randn(B.shape, generator=site.generator)
        elif like:
            gaussian = like == "gaussian" and not g.kernel
            A = (
                A.normal_(std=1 / r, generator=site.generator)
                if gaussian
                else kaiming(*A.shape, generator=site.generator)
            )
            B = torch.zeros_like(B)
        tensors = {"hira_embedding_A": A, "hira_embedding_B": B} if g.lookup else {"hira_A": A, "hira_B": B}
        return Fresh(tensors, options={"dropout": config.hira_dropout} if config.hira_dropout else {})

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        return torch.addcmul(W, W, _product(p, W))

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W x + s (W * B A) x as one operation with the weight W + s W * B A."""
        W = before.weight()
        change = s * (W * _product(p, W))
        if not before.op.faithful:
            return before(x, bias) + before.op.op(x, change, False)
        return before.op.op(x, W + change, bias)


def _product(p: Mapping[str, Tensor], W: Tensor) -> Tensor:
    """B A in the shape of W."""
    A, B = (next(t for role, t in p.items() if role.endswith(end)) for end in ("_A", "_B"))
    return (B.flatten(1).to(W.dtype) @ A.flatten(1).to(W.dtype)).view(W.shape)
