"""Patches for a model: rows of tables that are trained, and LoRAs on parameters themselves, made for the modules that they are to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import patterns
from diffpeft.errors import AdapterStateError, ConfigError, shown
from diffpeft.layers.hooks import held_forwards, refusal
from diffpeft.layers.parameters import ParameterFactors, Stack
from diffpeft.layers.patches import Patch, parametrised
from diffpeft.layers.tokens import Tokens
from diffpeft.methods import LoraConfig
from diffpeft.methods.linalg import kaiming
from diffpeft.model.target import modules_of

Patched = dict[str, tuple[nn.Module, Patch]]  # {name: (module, its patch)}


def refusal_of(module: nn.Module, where: str) -> str:
    """Why a module's parameters cannot be changed; empty if they can."""
    if isinstance(module, (nn.Embedding, nn.Linear)) and not parametrised(module):
        return refusal(module, None, where)
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return ""


def parameters_of(module: nn.Module) -> list[str]:
    """What a module's parameters are called, those among them that are parametrised last."""
    return [*(name for name, p in module._parameters.items() if p is not None), *parametrised(module)]


def numbers_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module; of a parametrised one what it is in evaluation, where nothing is changed by reading it."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    inner = list(module.get_submodule(f"parametrizations.{name}").modules())
    training = [m.training for m in inner]
    try:
        for m in inner:
            m.training = False
        with torch.no_grad():
            worked_out: Tensor = getattr(module, name)
            return worked_out
    finally:
        for m, was in zip(inner, training, strict=True):
            m.training = was


# Rows of embeddings


def tokens_on(where: str, module: nn.Module, index: Sequence[int]) -> Tokens:
    """Rows of a table, as they are. Raises ConfigError for what are no rows of it."""
    return Tokens(index, _table_rows(where, module, index))


def _table_rows(where: str, module: nn.Module, index: object) -> Tensor:
    """The rows [n, dim] of a table [tokens, dim] as they are, in fp32. Raises ConfigError for what are no rows of it."""
    weight = weight_of(module)
    total = len(weight)
    numbers = list(index) if isinstance(index, (list, tuple)) else [index]
    wrong = [i for i in numbers if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total]
    if wrong or len(set(numbers)) < len(numbers) or not numbers:
        raise ConfigError(
            f"trainable_token_indices of {shown(where)}: {shown(wrong or numbers)}",
            remedy=f"They are different whole numbers from 0 to {total - 1}, at least one.",
        )
    return weight.detach()[torch.tensor(numbers, device=weight.device)].float()


def weight_of(module: nn.Module) -> Tensor:
    """A table's weight [tokens, dim] as it is without adapters. Raises AdapterStateError for a parametrised one."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise AdapterStateError(
            f"the weight of a {type(module).__name__} is parametrised, and has no rows of its own",
            remedy="Leave it out of trainable_token_indices.",
        )
    return weight


def with_tied(model: nn.Module, patches: Patched) -> Patched:
    """With the modules that share the input embeddings' weight: they get the same patch, unless they were named with other indices."""
    table = input_table(model)
    source = next(((where, patch) for where, (module, patch) in patches.items() if module is table), None)
    if table is None or source is None:
        return patches
    (where, patch), shared = source, weight_of(table)
    same = modules_of(
        model, lambda m: isinstance(m, (nn.Embedding, nn.Linear)) and m._parameters.get("weight") is shared
    )
    tied = {n: (m, patch) for n, (m, _) in same.items() if n not in patches or rows_of(patches[n][1]) == rows_of(patch)}
    return {where: (table, patch), **{n: pair for n, pair in patches.items() if n not in tied}, **tied}


def input_table(model: Any) -> nn.Module | None:
    """A language model's input embeddings."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def rows_of(patch: Patch) -> list[int]:
    """The numbers of the rows that a patch changes."""
    assert isinstance(patch, Tokens)
    return patch.rows.tolist()


# Parameters themselves


def factors_on(module: nn.Module, where: str, names: Sequence[str], config: LoraConfig) -> ParameterFactors:
    """Fresh LoRAs on parameters of a module. Raises ConfigError for a parameter that is no matrix, nor a stack of them."""
    stacks: list[Stack] = []
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for name in names:
        key, parameter = f"{where}.{name}", numbers_of(module, name)
        stack = Stack.of(module, name, parameter.shape)
        if stack is None or not parameter.is_floating_point():
            raise ConfigError(
                f"target_parameters has {shown(key)}, of shape {tuple(parameter.shape)} and {parameter.dtype}",
                remedy="A parameter of two or three axes and of floating-point numbers is needed.",
            )
        r = patterns.first(config.rank_pattern, (key,), config.r)
        alpha = patterns.first(config.alpha_pattern, (key,), config.lora_alpha)
        scales[name] = alpha / (math.sqrt(r) if config.use_rslora else r)
        A, B = _initial(config.init_lora_weights, stack, r)
        tensors[name] = A.to(parameter.device), B.to(parameter.device)
        stacks.append(stack)
    return ParameterFactors(tuple(stacks), tensors, scales).train(module.training)


def _initial(init: bool | str, stack: Stack, r: int) -> tuple[Tensor, Tensor]:
    """A [experts * r, in] and B [out, r * experts]; the product is zero unless `init` is False."""
    n = r * stack.experts
    A = torch.empty(n, stack.in_).normal_(std=1 / r) if init == "gaussian" else kaiming(n, stack.in_, generator=None)
    return A, torch.zeros(stack.out, n) if init else kaiming(stack.out, n, generator=None)
