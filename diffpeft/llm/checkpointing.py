"""Activations that are computed again: the part of a frozen model before the first adapter has to take part in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from diffpeft.model.plan import Plan

_IN_BITS = (
    "is_loaded_in_8bit",
    "is_loaded_in_4bit",
    "is_quantized",
)  # prepare_model_for_kbit_training does it for these


def _ask(module: nn.Module, inputs: object, output: Tensor) -> None:
    output.requires_grad_(True)


def _ask_while_adapted(module: nn.Module, inputs: object, output: Tensor) -> None:
    """The same, as a hook that goes with the adapters."""
    output.requires_grad_(True)


def require_input_grads(model: Any, hook: Callable[..., None] = _ask) -> None:
    """Let what a model's frozen embedding gives ask for gradients: by the model's own way, or by a hook."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(hook)


def is_in_bits(model: object) -> bool:
    """Whether a model says that its weights are quantised."""
    return any(getattr(model, name, False) for name in _IN_BITS)


def plan_input_grads(plan: Plan, model: nn.Module) -> None:
    """Plan `require_input_grads` for a model that checkpoints, or does not say whether it does, and is not quantised; as PEFT when it wraps one."""
    checkpoints = getattr(model, "is_activation_checkpointing", getattr(model, "is_gradient_checkpointing", True))
    if checkpoints and not is_in_bits(model):
        with plan.recorded(model):
            require_input_grads(model, _ask_while_adapted)


def plan_no_hook(plan: Plan, model: nn.Module) -> None:
    """Plan to take the hook of `plan_input_grads` away again."""
    for module in model.modules():
        hooks = cast("dict[str, object]", module._forward_hooks)
        for number in [number for number, hook in hooks.items() if hook is _ask_while_adapted]:
            plan.entry(hooks, number)
