"""(IA)^3: W' = diag(l) W, or W' = W diag(l) on the inputs.  Liu et al. 2022, arXiv:2205.05638.

PEFT stores the factors, `ia3_l`, and on the outputs multiplies the layer's bias too: it scales the result. LyCORIS stores their offset from 1, `ia3_w`
(in its files `weight`), beside it `on_input`, and leaves the bias alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.errors import ConfigError, ShapeMismatchError
from diffpeft.methods import config as checks
from diffpeft.methods.base import Alpha, Fresh, Geometry, Link, Method, Shaped, Site, Spec, Strength, Tensors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import wide
from diffpeft.methods.peft_config import PeftConfig, PeftType

T = TypeVar("T")
FACTORS, OFFSETS, ON_INPUT = "ia3_l", "ia3_w", "on_input"  # the first is PEFT's, the others LyCORIS's


@dataclass
class IA3Config(PeftConfig):
    """How to make an (IA)^3. Names, meanings and defaults are PEFT's.

    Args:
        target_modules, exclude_modules, fan_in_fan_out: as in LoraConfig.
        feedforward_modules: layers whose inputs are multiplied instead of their outputs: a regular expression for whole names, or a list of what
            names end with; a list must be part of target_modules where that is a list. None: no layer.
        init_ia3_weights: True: ones, the identity. False: random numbers around 0.
        modules_to_save: as in LoraConfig.
    """

    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    feedforward_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    TYPE = PeftType(LAYOUTS["ia3"].peft)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, outer = self.feedforward_modules, self.target_modules
        if isinstance(inner, set) and isinstance(outer, set) and not inner <= outer:
            raise ConfigError(
                "`feedforward_modules` should be a subset of `target_modules`",
                where=f"It also has {', '.join(sorted(inner - outer))}",
                remedy="Name these in target_modules too.",
            )

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_choice("init_ia3_weights", self.init_ia3_weights, (True, False))
        if isinstance(self.feedforward_modules, str):
            checks.check_patterns("feedforward_modules", {self.feedforward_modules: None}, lambda *_: None)


class IA3(Method):
    """(IA)^3 on any layer: `ia3_l` [out, 1] or [1, in], on convolutions [1, out or in, *1]; or `ia3_w` [dim], on convolutions [1, dim, *1].

    options["feedforward"] says whether `ia3_l` is of the inputs where its shape does not. An `ia3_w` in use has the shape [dim, 1, *1] or [1, dim, *1].
    """

    name = "ia3"
    config = IA3Config
    shifts = frozenset({FACTORS})
    constants = frozenset({ON_INPUT})
    precise = frozenset({FACTORS, OFFSETS})

    @classmethod
    def init(cls, config: IA3Config, site: Site, **_: object) -> Fresh:
        g, inner = site.geometry, is_feedforward(config.feedforward_modules, site.name)
        n, ones = g.in_ if inner else g.out, [1] * len(g.kernel)
        l = torch.ones(1, n, *ones) if g.kernel or inner else torch.ones(n, 1)
        if not config.init_ia3_weights:
            l.normal_(generator=site.generator)
        return Fresh({FACTORS: l}, options={"feedforward": inner})

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        g = spec.geometry
        if (FACTORS in p) == (OFFSETS in p) or (FACTORS in p and ON_INPUT in p):
            return f"the layer takes ia3_l, or ia3_w and on_input, not {' and '.join(sorted(p))}"
        if ON_INPUT in p and math.prod(p[ON_INPUT].shape) != 1:
            return f"on_input {tuple(p[ON_INPUT].shape)} is not one number"
        role, t = _factors(p)
        shape, sides = tuple(t.shape), _sides(p, spec)
        if not sides or math.prod(shape) != max(shape):
            return f"{role} is {shape}, the layer has {g.in_} inputs and {g.out} outputs"
        if len(sides) > 1 and ON_INPUT not in p:
            return f"{role} {shape} can be of the inputs or the outputs, and nothing says of which"
        return ""

    @classmethod
    def adopt(cls, p: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
        role, t = _factors(p)
        g = spec.geometry
        ones = [1] * len(g.kernel)
        inner = bool(p[ON_INPUT].item()) if ON_INPUT in p else _sides(p, spec) == {"input"}
        if t.numel() != (g.in_ if inner else g.out):
            raise ShapeMismatchError(
                f"on_input is {inner}, and {role} has {t.numel()} numbers for {g.in_} inputs and {g.out} outputs",
                remedy="The file is damaged.",
            )
        is_row = inner or (role == FACTORS and bool(g.kernel))  # where PEFT puts the 1
        return {**p, role: t.reshape(1, -1, *ones) if is_row else t.reshape(-1, 1, *ones)}

    @classmethod
    def stored(cls, p: dict[str, Tensor], alpha: Alpha) -> tuple[dict[str, Tensor], Alpha]:
        """`ia3_w` in the shape that LyCORIS gives it."""
        if OFFSETS not in p:
            return p, alpha
        t = p[OFFSETS]
        return {**p, OFFSETS: t.flatten() if t.dim() == 2 else t.reshape(1, -1, *t.shape[2:])}, alpha

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        return 1

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """The factors, under the name and in the shape of what they come from."""
        role, t = _factors(p)
        return {role: wide(t) if role == FACTORS else 1 + wide(t)}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        l, g = _factors(p)[1].to(W.dtype), spec.geometry
        ones = [1] * len(g.kernel)
        if not on_input(p, spec):
            return W * l.reshape(-1, 1, *ones)
        return (W.unflatten(0, (g.groups, -1)) * l.reshape(g.groups, 1, -1, *ones)).flatten(0, 1)

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return None if b is None or FACTORS not in p or on_input(p, spec) else b * (p[FACTORS].flatten() - 1)

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x by scaling x, or W x, by l(s) = 1 + s (l - 1). The rows of an embedding are no features of x."""
        inner = on_input(p, spec)
        if inner and spec.geometry.lookup:
            return super().apply(before, x, p, spec, s, bias)
        by = (1 + s * (_factors(p)[1].flatten() - 1)).to(before.dtype)
        if inner:
            return before(before.op.scaled(x, by), bias)
        return before.op.rescaled(before(x, bias), by, bias)


def on_input(p: Mapping[str, Shaped], spec: Spec) -> bool:
    """Whether adopted factors are of the inputs."""
    role, t = _factors(p)
    return _along_inputs(t.shape, spec.geometry) if role == OFFSETS else _sides(p, spec) == {"input"}


def _factors(p: Mapping[str, T]) -> tuple[str, T]:
    """The role and the tensor of the factors."""
    role = FACTORS if FACTORS in p else OFFSETS
    return role, p[role]


def _sides(p: Mapping[str, Shaped], spec: Spec) -> set[str]:
    """Of what the factors can be by their size, by where a linear layer's 1 is, and by what the options say."""
    role, t = _factors(p)
    g, shape = spec.geometry, tuple(t.shape)
    sides = {side for side, size in (("input", g.in_), ("output", g.out)) if size == max(shape, default=0)}
    told = spec.options.get("feedforward")
    if told is not None:
        return sides & {"input" if told else "output"}
    if role == FACTORS and len(shape) == 2 and not g.kernel:
        return sides & {"input" if _along_inputs(shape, g) else "output"}
    return sides


def _along_inputs(shape: Sequence[int], g: Geometry) -> bool:
    """Whether [1, n, ..] and not [n, 1, ..]; of one number whether there are more outputs than that."""
    return shape[0] == 1 and (shape[1] != 1 or g.out != 1)


def is_feedforward(modules: str | Collection[str] | None, layer: str) -> bool:
    """PEFT's rule: an expression for the whole name, or what it ends with."""
    if isinstance(modules, str):
        return patterns.fullmatch(modules, layer)
    return any(layer.endswith(name) for name in modules or ())
