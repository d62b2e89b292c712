"""Schedule-Free AdamW: no schedule that must know the end, an average of all steps instead.  Defazio et al. 2024, arXiv:2405.15682, algorithm 1.

z takes the steps, x is the average of the z's, and gradients are taken at y = (1 - b1) z + b1 x. While training the parameters are y; `eval()` makes them x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class AdamWScheduleFree(torch.optim.Optimizer):
    """z <- z - lr (g / sqrt(v) + weight_decay y);  x <- (1 - c) x + c z, where c is the step's share of the weights lr_max^2 until now."""

    def __init__(
        self,
        params: torch.optim.optimizer.ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "step": 0, "highest": 0.0, "weights": 0.0, "averaged": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients at y."""
        for group in self.param_groups:
            if group["averaged"]:
                raise RuntimeError("the parameters are the averages: call train() before a step")
            if ys := [p for p in group["params"] if p.grad is not None]:
                self._step(group, ys)

    def _step(self, group: dict, ys: list[torch.Tensor]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        group["step"] += 1
        group["highest"] = max(group["highest"], lr)
        weight = group["highest"] ** 2
        group["weights"] += weight
        share = weight / group["weights"] if group["weights"] else 0.0
        for y in ys:
            if not self.state[y]:
                self.state[y].update(z=y.clone(), v=torch.zeros_like(y))
        zs, vs = ([self.state[y][name] for y in ys] for name in "zv")
        gradients = [y.grad for y in ys if y.grad is not None]
        torch._foreach_mul_(vs, b2)
        torch._foreach_addcmul_(vs, gradients, gradients, 1 - b2)
        scales = torch._foreach_div(vs, 1 - b2 ** group["step"])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        directions = torch._foreach_div(gradients, scales)
        if group["weight_decay"]:
            torch._foreach_add_(directions, ys, alpha=group["weight_decay"])
        xs = torch._foreach_lerp(ys, zs, 1 - 1 / b1)
        torch._foreach_add_(zs, directions, alpha=-lr)
        torch._foreach_lerp_(xs, zs, share)
        torch._foreach_copy_(ys, torch._foreach_lerp(xs, zs, 1 - b1))

    def eval(self) -> None:
        """The parameters become the averages x."""
        self._shift(True)

    def train(self) -> None:
        """They become y again, up to rounding."""
        self._shift(False)

    @torch.no_grad()
    def _shift(self, averaged: bool) -> None:
        for group in self.param_groups:
            stepped = [p for p in group["params"] if self.state[p]] if group["averaged"] != averaged else []
            b1 = group["betas"][0]
            if stepped:
                torch._foreach_lerp_(stepped, [self.state[p]["z"] for p in stepped], 1 - (1 / b1 if averaged else b1))
            group["averaged"] = averaged
