"""RoAd: W' = R W, R turns and stretches pairs of outputs, the bias with them.  Liao and Monz 2024, arXiv:2409.00119.

In each group of outputs the first half is paired with the second: y1 = f1 x1 - g1 x2, y2 = f2 x2 + g2 x1, with f = alpha cos theta and g = alpha sin theta.
Variant 1 has one theta and alpha a pair, 2 one an output, 4 one for each of an output's two numbers; how many tensors hold tells which it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods import config as checks
from diffpeft.methods.base import Fresh, Link, Method, Shaped, Site, Spec, Strength, Tensors
from diffpeft.methods.forms import Stage
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import wide
from diffpeft.methods.peft_config import PeftConfig, PeftType

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # numbers of theta for each output


@dataclass
class RoadConfig(PeftConfig):
    """How to make a RoAd. Names, meanings and defaults are PEFT's.

    Args:
        variant: "road_1", "road_2" or "road_4": how many numbers an output has.
        group_size: the outputs whose halves are paired with each other: even, and a divisor of every layer's features out.
        init_weights: True: no turn and no stretch, which changes nothing. False: random ones.
        target_modules, modules_to_save: as in LoraConfig.
    """

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True
    target_modules: str | Collection[str] | None = None
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["road"].peft)
    exclude_modules = None  # PEFT has no such fields here
    layers_to_transform = None
    layers_pattern = None

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_choice("variant", self.variant, SIZES)
        checks.check_choice("init_weights", self.init_weights, (True, False))
        checks.check_whole("group_size", self.group_size, 2)
        if self.group_size % 2:
            raise ConfigError(f"group_size is {self.group_size}", remedy="It is even: halves are paired.")


class Road(Method):
    """RoAd on any layer: `road_theta` and `road_alpha`, each of half, all, or twice as many numbers as the layer has features out."""

    name = "road"
    config = RoadConfig
    shifts = frozenset({"road_theta"})
    precise = frozenset({"change"})

    @classmethod
    def init(cls, config: RoadConfig, site: Site, **_: object) -> Fresh:
        """PEFT's draws. Raises ConfigError where the group does not divide the layer."""
        out, size = site.geometry.out, config.group_size
        if out % size:
            raise ConfigError(
                f"group_size {size} does not divide the {out} features out",
                where=site.name,
                remedy="Choose an even divisor.",
            )
        n = int(out * SIZES[config.variant])
        theta, alpha = torch.zeros(n), torch.ones(n)
        if not config.init_weights:
            theta.normal_(0, 0.5, generator=site.generator)
            alpha.normal_(1, 0.5, generator=site.generator)
        options = {"variant": config.variant, "group_size": size}
        return Fresh({"road_theta": theta, "road_alpha": alpha}, options=options)

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        if why := super().check(p, spec):
            return why
        n, out = p["road_theta"].shape[0], spec.geometry.out
        if n not in [out * size for size in SIZES.values()]:
            return f"road_theta has {n} numbers, the layer {out} features out: it takes half of that, as many or twice as many"
        size = _group(spec)
        return f"the {out} features out are no groups of {size}" if out % size or size % 2 else ""

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        return {**p, "change": _change(p, spec)}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        return (W.flatten(1) + _turned(W.flatten(1), p["change"].to(W.dtype), spec)).reshape(W.shape)

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return None if b is None else _turned(b[:, None], _change(p, spec).to(b.dtype), spec)[:, 0]

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x = W x + s (R - I) W x. Through the weight where a pair is of two groups of channels."""
        g, size = spec.geometry, _group(spec)
        if g.out // g.groups % size:
            return super().apply(before, x, p, spec, s, bias)
        y, change = before(x, bias), (s * p["change"]).to(before.dtype)
        turned = before.op.stages(
            before.op.less_bias(y) if bias else y, (g.out // size, 2, size // 2), [Stage((1,), change)]
        )
        return y + turned


def _group(spec: Spec) -> int:
    """How many outputs a group has. Where no config says it, PEFT's 64, or what of that divides the layer."""
    return int(spec.options.get("group_size") or math.gcd(64, spec.geometry.out))


def _change(p: Tensors, spec: Spec) -> Tensor:
    """R - I as 2 x 2 matrices that multiply pairs as rows, [out / 2, 2, 2], in fp32 or better."""
    if "change" in p:
        return p["change"]
    h, out = _group(spec) // 2, spec.geometry.out
    theta, alpha = wide(p["road_theta"]), wide(p["road_alpha"])
    f, g = alpha * theta.cos(), alpha * theta.sin()
    if len(theta) == 2 * out:
        f, g = f.view(-1, 2, 2 * h)[:, 0], g.view(-1, 2, 2 * h)[:, 1]
    shape = (-1, 1, h) if 2 * len(theta) == out else (-1, 2, h)
    f, g = (t.reshape(shape).expand(-1, 2, h) for t in (f, g))
    rows = torch.stack([f[:, 0] - 1, g[:, 1], -g[:, 0], f[:, 1] - 1], -1)
    return rows.reshape(out // 2, 2, 2)


def _turned(rows: Tensor, change: Tensor, spec: Spec) -> Tensor:
    """(R - I) rows.  rows [out, n], change [out / 2, 2, 2] -> [out, n]."""
    h = _group(spec) // 2
    pairs, matrices = rows.unflatten(0, (-1, 2, h)), change.view(-1, h, 2, 2)
    return torch.einsum("gbhn,ghbc->gchn", pairs, matrices).reshape(rows.shape)
