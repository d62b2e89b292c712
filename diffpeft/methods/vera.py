"""VeRA: dW = diag(b) B diag(d) A, with A and B random, frozen and the same for all layers.  Kopiczko et al. 2023, arXiv:2310.11454.

A [r, widest] and B [tallest, r] are the adapter's: a layer takes A's first in / groups * prod(kernel) columns, as filters, and B's first out rows; it
trains d [r] and b [out]. They come from a seed (`projection_prng_key`), so that a file may leave them out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigWarning
from diffpeft.methods import config as checks
from diffpeft.methods.base import Additive, Fresh, Shaped, Site, Spec, Tensors
from diffpeft.methods.forms import Factors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class VeraConfig(PeftConfig):
    """How to make a VeRA. Names, meanings and defaults are PEFT's.

    Args:
        r: rank, at least 1; larger than a LoRA's, since it costs r numbers a layer.
        target_modules, fan_in_fan_out: as in LoraConfig.
        projection_prng_key: the seed of A and B.
        save_projection: A and B are in the file. False: they are made anew from the seed, for the same layers.
        vera_dropout: probability, in [0, 1), with which an input feature of A is dropped while training.
        d_initial: what d starts with.
        bias: which biases are trained too: "none", "vera_only", "all".
        init_weights: True: b zero, the identity. False: b ones and d normal.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    """

    r: int = 256
    target_modules: str | Collection[str] | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    TYPE = PeftType(LAYOUTS["vera"].peft)
    exclude_modules = None  # PEFT has no such field here

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            warnings.warn(
                "Specified to not save vera_A and vera_B: a file without them is right only where torch draws the same "
                "numbers from `projection_prng_key`",
                ConfigWarning,
                stacklevel=3,
            )

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_whole("projection_prng_key", self.projection_prng_key, 0)
        checks.check_alpha("d_initial", self.d_initial)
        checks.check_probability("vera_dropout", self.vera_dropout)
        checks.check_choice("save_projection", self.save_projection, (True, False))
        checks.check_choice("init_weights", self.init_weights, (True, False))
        checks.check_choice("bias", self.bias, ("none", "all", "vera_only"))


class Vera(Additive):
    """VeRA on any layer: `vera_lambda_b` [out], `vera_lambda_d` [r]; shared `vera_A` [r, widest], `vera_B` [tallest, r]."""

    name = "vera"
    config = VeraConfig

    @classmethod
    def init(cls, config: VeraConfig, site: Site, **_: object) -> Fresh:
        out, r = site.geometry.out, config.r
        d = torch.randn(r, generator=site.generator)  # drawn in any case, as PEFT does
        tensors = {"vera_lambda_b": torch.ones(out), "vera_lambda_d": d}
        if config.init_weights:
            tensors = {"vera_lambda_b": torch.zeros(out), "vera_lambda_d": torch.full((r,), float(config.d_initial))}
        options = {"projection_prng_key": config.projection_prng_key, "save_projection": config.save_projection}
        return Fresh(tensors, options={**options, **({"dropout": config.vera_dropout} if config.vera_dropout else {})})

    @classmethod
    def bank(cls, layers: Sequence[tuple[Mapping[str, Shaped], Spec]]) -> dict[str, Tensor]:
        """A and B as PEFT draws them for layers of these tensors: bit for bit, A first."""
        r, key = cls.rank(layers[0][0]), layers[0][1].options.get("projection_prng_key", 0)
        generator = torch.Generator("cpu").manual_seed(key)
        widest, tallest = (max(g) for g in zip(*((s.geometry.columns, s.geometry.out) for _, s in layers), strict=True))
        return {"vera_A": _kaiming(r, widest, generator), "vera_B": _kaiming(tallest, r, generator)}

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """1: there is no alpha."""
        return 1.0

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """What the layer takes of A, as filters [r, in / groups, *k], and of B [out, r, *1]: views; b and d."""
        g = spec.geometry
        A, B = p["vera_A"][:, : g.columns], p["vera_B"][: g.out]
        return {
            "A": A.unflatten(1, g.shape[1:]),
            "B": B.reshape(*B.shape, *(1 for _ in g.kernel)),
            "b": p["vera_lambda_b"],
            "d": p["vera_lambda_d"],
        }

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        return Factors(p["A"] * _along(p["d"], p["A"]), p["B"] * _along(p["b"], p["B"]))

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Factors:
        return cls.factors(p, spec)


def _along(t: Tensor, like: Tensor) -> Tensor:
    """A vector as a column that goes with the first axis of a tensor."""
    return t.view(-1, *(1 for _ in like.shape[1:]))


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform within sqrt(3) sqrt(2) / sqrt(columns), in the order of PEFT's roundings."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
