"""LoRA: dW = (alpha / r) B A.  Hu et al. 2021, arXiv:2106.09685.

rsLoRA divides alpha by sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732).
On a grouped convolution A [r, in / groups, *k] is shared by the groups and the same equation holds for every row of W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods.base import Geometry, Op


def delta(p: Mapping[str, Tensor], scale: float) -> Tensor:
    """scale * B A.  A [r, i, *k], B [o, r, *1] -> [o, i, *k]."""
    A, B = p["lora_A"], p["lora_B"]
    return (scale * (B.flatten(1) @ A.flatten(1))).reshape(B.shape[0], *A.shape[1:])


@dataclass
class LoraConfig:
    """How to make a LoRA. Names, meanings and defaults are PEFT's.

    Args:
        r: rank, at least 1.
        lora_alpha: the scale is lora_alpha / r.
        target_modules: a preset (`attn`, `attn-mlp`, `full`), a regular expression that matches whole names, or a list of names or suffixes.
        exclude_modules: like target_modules; these layers are left alone.
        lora_dropout: probability, in [0, 1), with which an input feature of A is dropped while training.
        use_rslora: the scale is lora_alpha / sqrt(r).
        init_lora_weights: True: A kaiming uniform, B zero. "gaussian": A ~ N(0, 1 / r), B zero. False: both random, not the identity.
        rank_pattern, alpha_pattern: {regular expression: value} for layers that differ; a pattern matches a name or its end.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        for name, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ConfigError(f"{name} is {r!r}", remedy="A rank is a whole number of at least 1.")
        for name, alpha in [
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ConfigError(f"{name} is {alpha!r}", remedy="An alpha is a finite number.")
        for name, pattern in [(n, p) for n in ("rank_pattern", "alpha_pattern") for p in getattr(self, n)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{name} has {pattern!r}", remedy=f"It is no regular expression: {error}.") from error
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout!r}", remedy="It is a probability: at least 0 and less than 1."
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"init_lora_weights is {self.init_lora_weights!r}", remedy="It is True, False or 'gaussian'."
            )

    @property
    def dropout(self) -> float:
        """The name that the layers read."""
        return self.lora_dropout


def _pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first pattern that matches `layer` or its end at a dot: PEFT's rule."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


class Lora:
    """LoRA on linear and convolutional layers."""

    name = "lora"
    config = LoraConfig
    roles: tuple[str, ...] = ("lora_A", "lora_B")

    @staticmethod
    def delta(p: Mapping[str, Tensor], scale: float) -> Tensor:
        return delta(p, scale)

    @staticmethod
    def init(
        config: LoraConfig, layer: str, geometry: Geometry, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], float]:
        r, alpha = (
            _pattern(config.rank_pattern, layer, config.r),
            float(_pattern(config.alpha_pattern, layer, config.lora_alpha)),
        )
        A = torch.empty(r, geometry.in_ // geometry.groups, *geometry.kernel)
        B = torch.zeros(geometry.out, r, *(1 for _ in geometry.kernel))
        if config.init_lora_weights == "gaussian":
            A.normal_(std=1 / r, generator=generator)
        else:
            bound = 1 / math.sqrt(geometry.columns)  # kaiming_uniform_(a=sqrt(5)), the init of nn.Linear
            A.uniform_(-bound, bound, generator=generator)
            if config.init_lora_weights is False:
                B.uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r), generator=generator)
        return {"lora_A": A, "lora_B": B}, alpha * math.sqrt(
            r
        ) if config.use_rslora else alpha  # so that scale is alpha / r in every file

    @staticmethod
    def check(p: Mapping[str, Any], geometry: Geometry) -> str:
        (r, *a), (o, r2, *b) = p["lora_A"].shape, p["lora_B"].shape
        if r != r2 or r < 1:
            return f"lora_A {tuple(p['lora_A'].shape)} and lora_B {tuple(p['lora_B'].shape)} have different ranks"
        i, k = geometry.in_ // geometry.groups, geometry.kernel
        fits = (
            o == geometry.out and set(b) <= {1} and a[:1] == [i] and (tuple(a[1:]) == k or set(a[1:]) | set(k) <= {1})
        )
        layer = f"lora_A (r, {', '.join(map(str, (i, *k)))}) and lora_B ({geometry.out}, r{', 1' * len(k)})"
        return "" if fits else f"the layer takes {layer}, not {tuple(p['lora_A'].shape)} and {tuple(p['lora_B'].shape)}"

    @staticmethod
    def adopt(p: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
        A, B = p["lora_A"], p["lora_B"]
        return {
            "lora_A": A.reshape(A.shape[0], geometry.in_ // geometry.groups, *geometry.kernel),
            "lora_B": B.reshape(geometry.out, A.shape[0], *(1 for _ in geometry.kernel)),
        }

    @staticmethod
    def rank(p: Mapping[str, Any]) -> int:
        return p["lora_A"].shape[0]

    @staticmethod
    def scale(alpha: float | None, rank: int) -> float:
        return 1.0 if alpha is None else alpha / rank

    @staticmethod
    def apply(op: Op, p: Mapping[str, Tensor], x: Tensor, y: Tensor, gate: float | Tensor) -> Tensor:
        return op.add(y, op.down(x, p["lora_A"]), p["lora_B"], gate)
