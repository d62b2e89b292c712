"""AdaLoRA: dW = alpha / n * B diag(E) A, n the rank at the start.  Zhang et al. 2023, arXiv:2303.10512.

Triplets (a row of A, a number of E, a column of B) that matter little lose their number while training: diffpeft/llm/adalora.py says which. Leaving
their rows out of a file does not change the scale, which keeps the n of the start; so n is an option, and no tensor of a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from diffpeft.errors import ConfigError, ConfigWarning
from diffpeft.methods import config as checks
from diffpeft.methods.base import Additive, Fresh, Shaped, Site, Spec, Tensors
from diffpeft.methods.forms import Factors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.lora import LoraConfig
from diffpeft.methods.peft_config import PeftType

EPS = 1e-5  # PEFT's: so that a rank of 0 divides nothing by 0
STD = 0.02  # of fresh factors, PEFT's
_UNUSED = {"r": 8, "use_rslora": False, "lora_bias": False, "alpha_pattern": {}}  # LoRA's, at their defaults
_OTHER = ("peft_type", "rank_pattern", *_UNUSED)  # fields that are not what they are in a LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """How to make an AdaLoRA. Names, meanings and defaults are PEFT's; fields that are not named here are LoraConfig's.

    Args:
        target_r: the mean rank of a layer at the end.
        init_r: the rank of every layer at the start; `r` is not used.
        tinit: steps at the start in which nothing is pruned.
        tfinal: steps at the end in which the ranks stay as they are.
        deltaT: between the two, prune every so many steps.
        beta1, beta2: how slowly the means of the importance and of its uncertainty move, in (0, 1).
        orth_reg_weight: the weight in the loss of how far the rows of A and the columns of B are from being orthonormal.
        total_step: how many steps the training has; must be given.
        rank_pattern: {layer + ".lora_E": which of the `init_r` triplets are kept}, made by the training.
        init_lora_weights: True, or any name: E zero, A and B normal with a deviation of 0.02. False: all normal, not the identity.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    TYPE = PeftType(LAYOUTS["adalora"].peft)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, there in {"DoRA": self.use_dora, "LOFTQ": self.init_lora_weights == "loftq"}.items():
            if there:
                raise ConfigError(f"{self.TYPE} does not support {name}.", remedy="Use LoraConfig.")
        self._warn_unused()
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError(
                "AdaLoRA does not work when `total_step` is None, supply a value > 0.",
                where=f"It is {self.total_step}",
                remedy="It is the number of training steps.",
            )
        if self.orth_reg_weight < 0:
            raise ConfigError(
                "`orth_reg_weight` should be greater than or equal to 0, "
                f"but the value passed is {self.orth_reg_weight}"
            )
        if self.tinit >= self.last_step:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase: "
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step} steps to prune in",
                remedy="Make them smaller, or total_step larger.",
            )

    def _warn_unused(self) -> None:
        """Say which of LoRA's settings were made that mean nothing to AdaLoRA."""
        unused = [name for name, standard in _UNUSED.items() if getattr(self, name) != standard]
        if "r" in unused:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. The rank at the start is `init_r`.",
                ConfigWarning,
                stacklevel=4,
            )
        if others := [name for name in unused if name != "r"]:
            warnings.warn(
                f"{', '.join(others)} mean nothing to AdaLoRA, whose rank at the start is init_r and scale alpha / init_r",
                ConfigWarning,
                stacklevel=4,
            )

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.name not in _OTHER}).validate()
        checks.check_rank("init_r", self.init_r)
        for name, least in {"target_r": 0, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}.items():
            checks.check_whole(name, getattr(self, name), least)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}", remedy="It is between 0 and 1.")

    @property
    def last_step(self) -> int:
        """The step after which the ranks stay."""
        assert self.total_step is not None
        return self.total_step - self.tfinal


class AdaLora(Additive):
    """AdaLoRA on any layer with a weight: `lora_A` [r, in / groups * k], `lora_B` [out, r], `lora_E` [r, 1], r from 0 on.

    options["ranknum"] is the rank at the start; without it, the rank there is.
    """

    name = "adalora"
    config = AdaLoraConfig
    thin = True

    @classmethod
    def init(cls, config: AdaLoraConfig, site: Site, **_: object) -> Fresh:
        g, r = site.geometry, config.init_r
        std = STD if config.init_lora_weights else 1.0
        normal = lambda *shape: torch.empty(*shape).normal_(std=std, generator=site.generator)  # noqa: E731
        A, B = normal(r, g.columns), normal(g.out, r)
        E = torch.zeros(r, 1) if config.init_lora_weights else normal(r, 1)
        options = {"ranknum": r, **({"dropout": config.lora_dropout} if config.lora_dropout else {})}
        return Fresh({"lora_A": A, "lora_B": B, "lora_E": E}, float(config.lora_alpha), options)

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """alpha over the rank at the start. An alpha of 0 or less stands for the rank there is: PEFT's rule."""
        r = cls.rank(p)
        alpha = spec.alpha if spec.alpha and spec.alpha > 0 else r
        return alpha / (spec.options.get("ranknum", r) + EPS)

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """A and B diag(E)."""
        return {"lora_A": p["lora_A"], "lora_B": p["lora_B"] * p["lora_E"].t()}

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        r, g = cls.rank(p), spec.geometry
        return Factors(p["lora_A"].reshape(r, *g.shape[1:]), p["lora_B"].reshape(g.out, r, *(1 for _ in g.kernel)))

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        """B diag(E) A.  [out, r] [r, columns] -> [out, in / groups, *k]."""
        return (p["lora_B"] @ p["lora_A"]).reshape(spec.geometry.shape)

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Factors | None:
        return cls.factors(p, spec) if cls.rank(p) else None  # torch has no convolution to 0 channels
