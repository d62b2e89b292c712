"""LoRA+: B learns faster than A.  Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.layers.slot import BIAS, Slot
from diffpeft.methods.layout import LAYOUTS

_LORA = LAYOUTS["lora"]
_EMBEDDINGS = frozenset(_LORA.twins.values())
_UPS = frozenset(role for role, axes in _LORA.axes.items() if axes.startswith("o ")) - _EMBEDDINGS
_8_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float, *, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, object]]:
    """PEFT's four groups, which may be empty: A and everything else at `lr`, embeddings at `embedding_lr`, B and vectors at `ratio * lr`, and of these biases
    and norms once more, which do not decay."""
    if not ratio > 0 or not lr > 0:
        raise ConfigError(
            f"lr is {lr!r} and the ratio is {ratio!r}", remedy="Both are above 0; the paper's ratio is 16."
        )
    rates = {"A": lr, "embedding": embedding_lr, "B": ratio * lr, "no decay": ratio * lr}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for kind, p in _kinds(model):
        groups[kind].append(p)
    return [
        {"params": groups[kind], "lr": rate, "weight_decay": 0.0 if kind == "no decay" else weight_decay}
        for kind, rate in rates.items()
    ]


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) of all that are trained, each once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        for role, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                factor = name.rpartition(".")[2]  # LoRAs on parameters themselves have a module for each
                named = not isinstance(module, Slot) and factor in _LORA.axes
                yield _kind(factor if named else role, module, p), p


def _kind(role: str, module: nn.Module, p: nn.Parameter) -> str:
    """The group of one parameter of a module."""
    if role in _EMBEDDINGS:
        return "embedding"
    if p.dim() != 1 and role not in _UPS:
        return "A"
    return "no decay" if "bias" in role or role == BIAS or isinstance(module, nn.LayerNorm) else "B"


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
    """An optimizer over the trainable parameters with LoRA+ learning rates; `kwargs` go to `optimizer_cls`. PEFT's name, keywords and groups."""
    groups = loraplus_groups(
        model, lr, loraplus_lr_ratio, embedding_lr=loraplus_lr_embedding, weight_decay=loraplus_weight_decay
    )
    optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__name__ in _8_BITS:
        _keep_embeddings_whole(model)
    return optimizer


def _keep_embeddings_whole(model: nn.Module) -> None:
    """Have bitsandbytes keep 32 bits of what its optimizers remember of embeddings."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
