"""What PEFT has in `peft.functional`: the adapters of any model, wrapped or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from diffpeft.llm.peft_model import (
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
    users_model,
)
from diffpeft.llm.tuner import named
from diffpeft.model.activation import order_of, plan_trained, refuse_clashing
from diffpeft.model.attach import mixes_of, plan_removed
from diffpeft.model.plan import Plan, planned
from diffpeft.model.target import adapted
from diffpeft.pipeline.adapters import plan_mix

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make these adapters the active ones, in this order; they are trained (unless `inference_mode`), the others are not. Raises UnknownNameError."""
    if isinstance(model, PeftModel):
        return model.set_adapter(adapter_name, inference_mode)
    with planned({"": model}) as plan:
        _plan_active(plan, model, named(adapter_name), _names(model), inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Whether adapters are trained, active or not."""
    base = users_model(model)
    with planned({"": base}) as plan:
        plan_trained(plan, base, dict.fromkeys(named(adapter_names), requires_grad))


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "") -> list[str] | None:
    """Remove an adapter; the first that is left becomes active if it was the only active one. -> the active ones, None if there are no others.

    A `peft_config` of the model keeps the adapter's config, as in PEFT. `prefix` changes nothing.
    """
    if isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
        return model.active_adapters or None
    active = [name for name in order_of(model) if name != adapter_name]
    remaining = [name for name in _names(model) if name != adapter_name]
    configs = model.__dict__.get("peft_config")
    with planned({"": model}) as plan:
        plan_removed(plan, {"": model}, {adapter_name})
        if configs is not None:
            plan.set(model, peft_config=type(configs)(configs))
        if remaining and not active:
            active = remaining[:1]
            _plan_active(plan, model, active, remaining)
    return active or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Put an adapter's tensors of fewer bits than float32 into float32."""
    base = users_model(model)
    with planned({"": base}) as plan:
        for _, _, record in adapted(base) if autocast_adapter_dtype else ():
            for held in record.modules(adapter_name) if adapter_name in record.names else ():
                for p in held.parameters():
                    if p.is_floating_point() and p.dtype.itemsize < 4:
                        plan.numbers(p, p.detach().to(torch.float32))


def _plan_active(
    plan: Plan, model: nn.Module, names: Sequence[str], known: Sequence[str], inference_mode: bool = False
) -> None:
    """Plan to make these of a bare model's adapters the active ones, and those that are trained."""
    refuse_clashing(model, names)
    plan_mix(plan, model, {"": model}, dict.fromkeys(names, 1.0))
    plan_trained(plan, model, {name: name in names and not inference_mode for name in known})


def _names(model: nn.Module) -> list[str]:
    """The adapters on a bare model."""
    return [name for mix in mixes_of({"": model}).values() for name in mix.adapters]
