"""LoRA+: B learns faster than A.  Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.layers.slot import Slot
from diffpeft.methods.layout import LAYOUTS

_LORA = LAYOUTS["lora"]
_EMBEDDINGS = frozenset(_LORA.twins.values())
_UPS = frozenset(role for role, axes in _LORA.axes.items() if axes.startswith("o ")) - _EMBEDDINGS


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float, *, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """Parameter groups: A and everything else at `lr`, B and biases at `ratio * lr` (biases without weight decay), embeddings at `embedding_lr`."""
    if not ratio > 0 or not lr > 0:
        raise ConfigError(
            f"lr is {lr!r} and the ratio is {ratio!r}", remedy="Both are above 0; the paper's ratio is 16."
        )
    rates = {"A": lr, "B": ratio * lr, "bias": ratio * lr, "embedding": embedding_lr}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    roles = {id(p): role for m in model.modules() if isinstance(m, Slot) for role, p in m.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[kind_of(roles.get(id(p), name), p)].append(p)
    return [
        {"params": groups[kind], "lr": rate, "weight_decay": 0.0 if kind == "bias" else weight_decay}
        for kind, rate in rates.items()
        if groups[kind]
    ]


def kind_of(role: str, p: nn.Parameter) -> str:
    """What a tensor of this role in its layer is: A, B, bias or embedding. All that is none of the others is A."""
    if role in _EMBEDDINGS:
        return "embedding"
    return "bias" if p.dim() == 1 else "B" if role in _UPS else "A"


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
    """An optimizer over the trainable parameters with LoRA+ learning rates; `kwargs` go to `optimizer_cls`. PEFT's name and keywords."""
    groups = loraplus_groups(
        model, lr, loraplus_lr_ratio, embedding_lr=loraplus_lr_embedding, weight_decay=loraplus_weight_decay
    )
    return optimizer_cls(groups, **{"lr": lr, **kwargs})
