"""What other libraries do to a layer: hooks that replace its forward or keep its weights elsewhere, and what makes a layer unfit for adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from diffpeft.layers.backends import backend_of, backend_of_weight
from diffpeft.layers.sites import parameter_names, site_of
from diffpeft.layers.streaming import STREAMED


def refusal(module: nn.Module, parent: nn.Module | None, name: str) -> str:
    """Why this layer cannot be adapted although its kind can; empty if it can."""
    weight, backend = getattr(module, parameter_names(module)[0], None), backend_of(module)
    if why := _unread(module, parent):
        return why
    if getattr(parent, "__dict__", {}).get("fused_projections") and name.rpartition(".")[2] in {"to_q", "to_k", "to_v"}:
        return "its projections are fused (call unfuse_qkv_projections first)"
    if "parametrizations" in module._modules:
        return "it is parametrised"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and has no shape yet (run the model once first)"
    if not isinstance(weight, Tensor) or not (
        backend or (weight.is_floating_point() and not backend_of_weight(weight))
    ):
        return "its weight is quantised in a way that is not known here"
    if vars(module).get("max_norm") is not None:
        return "it renormalises its weight in every forward (max_norm)"
    if unknown := {*diffusers_hooks(module)} - _KNOWN_HOOKS:
        return f"diffusers' hook {min(unknown)} is on it (load adapters before it is enabled)"
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return ""


def _unread(module: nn.Module, parent: nn.Module | None) -> str:
    """Why a layer is not made so that an adapter's numbers can be put into its weight, where that is read; empty if it is, or is not read."""
    site = site_of(getattr(type(module), "_diffpeft_base", type(module)))
    if site is not None and (why := site.unfit(module)):
        return why
    if backend_of(module) and isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} reads its weight directly, which is quantised, and would not see the adapter"
    return ""


Result = TypeVar("Result")

# they hold a layer's weights elsewhere, or in another dtype, between calls
CASTING = "layerwise_casting"
_OFFLOADING = frozenset({"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"})
STORING_HOOKS = _OFFLOADING | {CASTING}
_KNOWN_HOOKS = STORING_HOOKS | {"peft_input_autocast_disable"}


def diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers that are on a module, by name."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}


def is_cast(module: nn.Module) -> bool:
    """Whether diffusers stores a layer in another dtype than it computes in, or is about to."""
    if CASTING in diffusers_hooks(module):
        return True
    frame = sys._getframe(1)  # the hook is put on the layer after it has cast it for the first time
    for _ in range(4):
        if (
            frame.f_code.co_name == "initialize_hook"
            and type(frame.f_locals.get("self")).__name__ == "LayerwiseCastingHook"
        ):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def computing_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a layer computes in, as far as its weight and diffusers' casting tell."""
    if hook := diffusers_hooks(module).get(CASTING):
        computing: torch.dtype = hook.compute_dtype
        return computing
    dtype = cast(Tensor, getattr(module, parameter_names(module)[0])).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float16


def reapply_offloading(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Let diffusers' group offloading, if it is on a model, know the tensors that some of its layers have now."""
    if any(_OFFLOADING & {*diffusers_hooks(module)} for module in (model, *changed)):
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(model)


_FORWARDS = ("_old_forward", "forward", "original_forward")
_HOLDING = frozenset({*_FORWARDS, "_diffusers_hook"})


def held_forwards(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where other libraries keep the forward that the layer's class gave it, as (dict, key).

    accelerate: beside its hook, and after the hook was removed as `forward` on the layer; diffusers: in its registry of hooks.
    """
    if _HOLDING.isdisjoint(vars(module)):  # nearly all layers
        return []
    hooks = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())
    places: list[tuple[Any, str]] = [(d, key) for d in (vars(module), *map(vars, hooks)) for key in _FORWARDS]
    return [(d, key) for d, key in places if getattr(d.get(key), "__func__", None) is type(module).forward]


def device_of(module: nn.Module) -> torch.device:
    """Where the layer computes: an offloading hook's execution device, else where its weight is."""
    if (streamed := vars(module).get(STREAMED)) is not None:
        streaming: torch.device = streamed.stream.device
        return streaming
    hook = vars(module).get("_hf_hook")  # vars: torch is slow to say that there is none
    device = None if hook is None else getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    weight = module._parameters.get("weight")  # torch is slow to find it
    return (cast(Tensor, getattr(module, parameter_names(module)[0])) if weight is None else weight).device


def present(module: nn.Module, read: Callable[[], Result]) -> Result:
    """`read()` while the layer's own tensors are here, even where an offloading hook keeps them elsewhere."""
    if (streamed := vars(module).get(STREAMED)) is not None:
        streamed.bring()
    if "_hf_hook" not in vars(module):
        return read()
    from accelerate.utils import align_module_device

    with align_module_device(module, "cpu"):
        return read()
