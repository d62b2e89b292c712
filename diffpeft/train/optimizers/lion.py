"""Lion: steps of one size in the direction of a momentum's sign.  Chen et al. 2023, arXiv:2302.06675, program 1."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Lion(torch.optim.Optimizer):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay w);  m <- b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: torch.optim.optimizer.ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
            gradients = [p.grad for p in weights if p.grad is not None]
            (b1, b2), lr = group["betas"], group["lr"]
            momenta = [self.state[p]["momentum"] for p in weights]
            directions = torch._foreach_lerp(gradients, momenta, b1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - b2)
