"""Riemannian preconditioned LoRA: gradients that do not depend on how A and B share a product.  Zhang and Pilanci 2024, arXiv:2402.02347.

g_A <- (B^T B + reg I)^-1 g_A and g_B <- g_B (A A^T + reg I)^-1 before each step of another optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpeft.errors import ConfigError
from diffpeft.methods.linalg import wide_dtype
from diffpeft.optimizers.pairs import Pair, pairs_of


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimizer of the class `optimizer_cls` over the trained parameters, that preconditions those of LoRAs on linear layers first.

    Args:
        model: a PeftModel, or any module with LoRAs on it.
        optimizer_cls: for example torch.optim.AdamW; not one that needs a closure.
        lr, kwargs: the optimizer's.
        reg: what is added to the diagonal before a matrix is inverted.

    Raises TypeError for what is no optimizer, ConfigError where there is no LoRA or a closure is needed.
    """
    if not issubclass(optimizer_cls, Optimizer):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    pairs = [pair for pair in pairs_of(model) if _is_preconditioned(pair)]
    if not pairs:
        raise ConfigError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model",
            remedy="Add a LoRA that is trained.",
        )
    asked = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if asked is not None and asked.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients anew inside of a step",
            remedy="Use an optimizer that does not, such as AdamW.",
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return _preconditioned(optimizer_cls, pairs, reg)(trained, lr=lr, **kwargs)


def _is_preconditioned(pair: Pair) -> bool:
    """Whether both factors are matrices that are trained."""
    return not pair.lookup and all(p.dim() == 2 and p.requires_grad for p in (pair.A, pair.B))


def _preconditioned(optimizer_cls: type[Optimizer], pairs: Sequence[Pair], reg: float) -> Callable[..., Optimizer]:
    """A subclass of an optimizer's class that changes the gradients of these pairs before it steps."""

    base: Any = optimizer_cls

    class RiemannianPreconditionedOptimizer(base):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:
            if closure is not None:
                raise ConfigError(
                    "The Riemannian-preconditioned optimizer does not support closures",
                    remedy="Compute the loss and its gradients before the step.",
                )
            for pair in pairs:
                _precondition(pair, reg)
            super().step()

    return RiemannianPreconditionedOptimizer


def _precondition(pair: Pair, reg: float) -> None:
    """Change the gradients of A [r, in] and B [out, r] in place; in float32 or better."""
    A, B = (p.detach().to(wide_dtype(p.dtype)) for p in (pair.A, pair.B))
    if pair.A.grad is not None:
        pair.A.grad.copy_(_inverse(B.T @ B, reg) @ pair.A.grad.to(A.dtype))
    if pair.B.grad is not None:
        pair.B.grad.copy_(pair.B.grad.to(B.dtype) @ _inverse(A @ A.T, reg))


def _inverse(matrix: Tensor, reg: float) -> Tensor:
    return torch.linalg.pinv(matrix + reg * torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype))
