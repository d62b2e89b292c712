"""LoRA+: B learns faster than A.  Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.layers.slot import BIAS, Slot
from diffpeft.methods.layout import LAYOUTS

_LORA = LAYOUTS["lora"]
_EMBEDDINGS = frozenset(_LORA.twins.values())
_UPS = frozenset(role for role, axes in _LORA.axes.items() if axes.startswith("o ")) - _EMBEDDINGS
_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")  # optimizers of bitsandbytes


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float, *, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Four groups of the trainable parameters, some perhaps empty, in PEFT's order.

    A and everything else at `lr`; A and B of embeddings at `embedding_lr`; B and vectors at `ratio * lr`; and of these the biases and what is in a
    LayerNorm, without weight decay. Raises ConfigError for rates that are not above 0.
    """
    if not ratio > 0 or not lr > 0:
        raise ConfigError(
            f"lr is {lr!r} and the ratio is {ratio!r}", remedy="Both are above 0; the paper's ratio is 16."
        )
    rates = {"A": lr, "embedding": embedding_lr, "B": ratio * lr, "no decay": ratio * lr}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    roles = {id(p): role for m in model.modules() if isinstance(m, Slot) for role, p in m.named_parameters()}
    normed = {id(p) for m in model.modules() if m is not model and isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[kind_of(roles.get(id(p), name), p, id(p) in normed)].append(p)
    return [
        {"params": groups[kind], "lr": rate, "weight_decay": 0.0 if kind == "no decay" else weight_decay}
        for kind, rate in rates.items()
    ]


def kind_of(role: str, p: nn.Parameter, normed: bool = False) -> str:
    """The group of a parameter, by its role in an adapter or its name in the model: A, embedding, B or no decay."""
    if any(part in role for part in _EMBEDDINGS):
        return "embedding"
    if p.dim() > 1 and not any(part in role for part in _UPS):
        return "A"
    return "no decay" if normed or "bias" in role or role == BIAS else "B"


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters with LoRA+ learning rates, in the groups of `loraplus_groups`. PEFT's name and keywords.

    Args:
        lr: of A; `loraplus_lr_ratio` times it of B, `loraplus_lr_embedding` of embeddings.
        kwargs: go to `optimizer_cls`.
    """
    groups = loraplus_groups(
        model, lr, loraplus_lr_ratio, embedding_lr=loraplus_lr_embedding, weight_decay=loraplus_weight_decay
    )
    optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings(model)
    return optimizer


def _keep_embeddings(model: nn.Module) -> None:
    """Let optimizers of bitsandbytes keep 32 bits for the state of embeddings."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
