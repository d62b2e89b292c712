"""Prodigy: Adam that estimates its own learning rate.  Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 4.

d estimates the distance from the start w0 to the solution: never less than before, d <- max(d, r / |s|_1) with r = sum of d^2 <g, w0 - w> and
s = sum of d^2 g, both fading with b3. d and r stay on the device as tensors: no step waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Prodigy(torch.optim.Optimizer):
    """Adam's step times d, with weight decay apart. `lr` is a factor for d (1, or a schedule's), the same for all parameters."""

    def __init__(
        self,
        params: torch.optim.optimizer.ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
    ):
        """`d_coef` scales what d is estimated as, `growth_rate` bounds its growth a step; `safeguard_warmup` leaves the schedule out of s."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        options = {"d0": d0, "d_coef": d_coef, "growth_rate": growth_rate}
        switches = {"use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup}
        super().__init__(params, {**defaults, **options, **switches})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients."""
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("m", "v", "s")}
                self.state[p].update(start=p.clone(), **zeros)
        group, (d, highest, r) = self.param_groups[0], self._estimates(weights[0])
        group["step"] += 1
        new_d, new_highest, new_r = self._estimated(group, weights, d, highest, r)
        self._moved(weights, d * (group["lr"] * self._correction(group)), new_d)
        self.state[weights[0]].update(d=new_d, highest=new_highest, r=new_r)

    def _estimates(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d, the highest d and r, kept with a parameter."""
        state, d0 = self.state[w], self.param_groups[0]["d0"]
        if "d" not in state:
            zero = torch.zeros((), dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
            state.update(d=zero + d0, highest=zero + d0, r=zero)
        return state["d"], state["highest"], state["r"]

    @staticmethod
    def _correction(group: dict) -> float:
        """Adam's correction of both moments' bias, in the rate."""
        if not group["use_bias_correction"]:
            return 1.0
        (b1, b2), k = group["betas"], group["step"]
        return math.sqrt(1 - b2**k) / (1 - b1**k)

    def _estimated(
        self, group: dict, weights: list[Tensor], d: Tensor, highest: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update the moments and s; the new d, its highest estimate, and r."""
        gradients, (b1, b2) = [p.grad for p in weights if p.grad is not None], group["betas"]
        b3, d0 = math.sqrt(b2), group["d0"]
        m, v, s, start = ([self.state[p][name] for p in weights] for name in ("m", "v", "s", "start"))
        rate = d * (group["lr"] * self._correction(group))
        products = torch._foreach_mul(gradients, torch._foreach_sub(start, weights))
        r = b3 * r + d / d0 * rate * torch.stack([t.sum() for t in products]).sum().to(r)
        for moments, fading, terms in (
            (m, b1, torch._foreach_mul(gradients, d * (1 - b1))),
            (v, b2, torch._foreach_mul(torch._foreach_mul(gradients, gradients), d * d * (1 - b2))),
            (s, b3, torch._foreach_mul(gradients, d / d0 * (d if group["safeguard_warmup"] else rate))),
        ):
            torch._foreach_mul_(moments, fading)
            torch._foreach_add_(moments, terms)
        size = torch.stack(torch._foreach_norm(s, 1)).sum().to(r)
        estimate = torch.where(size > 0, group["d_coef"] * r / size, d)
        raised = torch.where(d == d0, torch.maximum(d, estimate), d)
        highest = torch.maximum(highest, estimate)
        grown = raised if math.isinf(group["growth_rate"]) else raised * group["growth_rate"]
        return (highest if math.isinf(group["growth_rate"]) else torch.minimum(highest, grown)), highest, r

    def _moved(self, weights: list[Tensor], rate: Tensor, d: Tensor) -> None:
        """Take the step: Adam's direction, and weight decay apart."""
        m, v = ([self.state[p][name] for p in weights] for name in "mv")
        decays = {id(p): group["weight_decay"] for group in self.param_groups for p in group["params"]}
        eps = self.param_groups[0]["eps"]
        scales = torch._foreach_sqrt(v)
        torch._foreach_add_(scales, [d * eps] * len(scales))
        directions = torch._foreach_div(m, scales)
        if any(decays[id(p)] for p in weights):
            torch._foreach_add_(directions, torch._foreach_mul(weights, [decays[id(p)] for p in weights]))
        torch._foreach_sub_(weights, torch._foreach_mul(directions, rate))
