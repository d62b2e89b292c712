"""DeLoRA: dW = (lambda / r) sum_j b_j a_j^T / (|b_j| |a_j|) diag(n), n the lengths of W's columns at the start.  Bini et al. 2025, arXiv:2503.18225.

How far and in which direction W moves are parted: r steps of length lambda / r each, which the layer's own columns scale.
The columns are those of flat(W) [out, in / groups * prod(kernel)]; of an embedding [features, rows].
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.methods import config as checks
from diffpeft.methods.base import Additive, Fresh, Site, Spec, Tensors
from diffpeft.methods.forms import Factors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.peft_config import PeftConfig, PeftType

LEAST = 1e-4  # the shortest length that is divided by


@dataclass
class DeloraConfig(PeftConfig):
    """How to make a DeLoRA. Names, meanings and defaults are PEFT's.

    Args:
        r: rank.
        delora_lambda: what lambda begins with, which is trained: a bound of how far the weight moves.
        module_dropout: probability of dropping inputs of the change in training.
        target_modules, exclude_modules: as in LoraConfig.
        bias: which biases are trained too: "none", "delora_only", "all".
        init_weights: True: B is zero, which changes nothing. False: it is random.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
        rank_pattern, lambda_pattern: {pattern of layer names: rank, or lambda}.
    """

    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["delora"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_alpha("delora_lambda", self.delora_lambda)
        checks.check_probability("module_dropout", self.module_dropout)
        checks.check_choice("init_weights", self.init_weights, (True, False))
        checks.check_choice("bias", self.bias, ("none", "all", "delora_only"))
        checks.check_patterns("rank_pattern", self.rank_pattern, checks.check_rank)
        checks.check_patterns("lambda_pattern", self.lambda_pattern, checks.check_alpha)


class Delora(Additive):
    """DeLoRA on any layer: `delora_A` [r, in / groups, *kernel], `delora_B` [out, r, *1], `delora_lambda` [1], `delora_w_norm` [in / groups, *kernel]."""

    name = "delora"
    config = DeloraConfig
    constants = frozenset({"delora_w_norm"})
    thin = True

    @classmethod
    def init(cls, config: DeloraConfig, site: Site, **_: object) -> Fresh:
        """PEFT's draws."""
        g = site.geometry
        r = patterns.first(config.rank_pattern, (site.name,), config.r)
        size = patterns.first(config.lambda_pattern, (site.name,), config.delora_lambda)
        A, ones = kaiming(r, *g.shape[1:], generator=site.generator), [1] * len(g.kernel)
        B = torch.zeros(g.out, r, *ones) if config.init_weights else kaiming(g.out, r, *ones, generator=site.generator)
        lengths = site.weight().norm(dim=0).float()
        tensors = {"delora_A": A, "delora_B": B, "delora_lambda": torch.full((1,), float(size))}
        options = {"dropout": config.module_dropout} if config.module_dropout else {}
        return Fresh({**tensors, "delora_w_norm": lengths}, options=options)

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        A, B = p["delora_A"], p["delora_B"]
        lengths = _lengths(A.flatten(1), 1) * _lengths(B.flatten(1), 0)
        by = p["delora_lambda"] / (len(A) * lengths)
        return Factors(A * p["delora_w_norm"], B * by.view(-1, *(1 for _ in B.shape[2:])))

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Factors:
        return cls.factors(p, spec)


def _lengths(t: Tensor, axis: int) -> Tensor:
    """The lengths of vectors along an axis, as far as they can be divided by."""
    return t.norm(dim=axis).clamp(min=LEAST)
