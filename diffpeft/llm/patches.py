"""What PEFT adapts beside whole layers: rows of embeddings (`trainable_token_indices`) and parameters themselves (`target_parameters`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft import patterns
from diffpeft.errors import (
    AdapterStateError,
    ConfigError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    listed,
    near,
    shown,
)
from diffpeft.io import finite
from diffpeft.layers.carried import base_class
from diffpeft.layers.parameters import Factors, Stack
from diffpeft.layers.patches import Patch
from diffpeft.layers.site import held_forwards, refusal
from diffpeft.layers.tokens import Tokens
from diffpeft.llm.tying import tied_to_embedding
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.peft_config import PeftType
from diffpeft.model.target import modules_of

Found = dict[str, tuple[nn.Module, Patch]]
_PLAIN = {"lora_dropout": 0.0, "lora_bias": False, "use_dora": False, "fan_in_fan_out": False}  # with target_parameters
_INITS = (True, False, "gaussian")


def patches_of(model: nn.Module, config: Any, layers: Iterable[str] = ()) -> Found:
    """{name: (module, fresh patch)} of what a resolved config asks for beside its `layers`.

    Raises ConfigError, UnknownNameError or AdapterStateError.
    """
    layers = set(layers)
    rows, parameters = getattr(config, "trainable_token_indices", None), getattr(config, "target_parameters", None)
    for name, value in (("trainable_token_indices", rows), ("target_parameters", parameters)):
        if value and config.peft_type != PeftType.LORA:
            raise ConfigError(f"{name} is {shown(value)}", remedy=f"It is for LoRA, not for {config.peft_type}.")
    found = {**(_tokens(model, config, rows) if rows else {})}
    parameters_of = _factors(model, config, parameters, bool(layers)) if parameters else {}
    for where, own in parameters_of.items():
        if where in found:
            raise ConfigError(
                f"module {shown(where)} is in trainable_token_indices and target_parameters", remedy="Give it once."
            )
        found[where] = own
    for where, (module, _) in found.items():
        if where in layers and where in parameters_of:
            raise ConfigError(
                f"module {shown(where)} is in target_modules and in target_parameters, which have the same keys in a file",
                remedy="Leave it out of one of them.",
            )
        if why := _refusal(module, where):
            raise AdapterStateError(f"module {shown(where)} cannot be adapted: {why}", remedy="Leave it out.")
    return found


def _refusal(module: nn.Module, where: str) -> str:
    """Why a module's parameters cannot be changed; empty if they can."""
    if isinstance(module, (nn.Embedding, nn.Linear)):
        return refusal(module, None, where)
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return "it is parametrised" if "parametrizations" in module._modules else ""


# Rows of embeddings


def _tokens(model: Any, config: Any, rows: Any) -> Found:
    """The tables whose rows are trained, and the heads that share their weight with one."""
    tables = rows if isinstance(rows, Mapping) else {_input_embeddings(model): rows}
    whole = getattr(config, "modules_to_save", None) or ()
    found: Found = {}
    for name, own in tables.items():
        if name in whole:
            raise ConfigError(
                f"{shown(name)} is in modules_to_save and in trainable_token_indices",
                remedy="The embedding is trained whole, or some rows of it.",
            )
        for where, module in _named(model, name).items():
            other = found.get(where)
            if other is not None and _index(other[1]) != list(own):
                raise ConfigError(f"{shown(where)} is named twice, with other indices", remedy="Name it once.")
            found[where] = module, Tokens(own, _rows(where, module, own))
    if getattr(config, "ensure_weight_tying", False):
        _check_rows_alike(model, found)
    return _tied(model, found)


def _check_rows_alike(model: Any, found: Found) -> None:
    """Raise ConfigError if tied modules would have other rows each."""
    ties = tied_to_embedding(model)
    rows = {where: _index(found[where][1]) for where in (*ties.values(), *ties) if where in found}
    if any(index != next(iter(rows.values())) for index in rows.values()):
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied layers",
            where=", ".join(f"{where}: {index}" for where, index in rows.items()),
            remedy="Use the same indices for all tied layers or set ensure_weight_tying=False.",
        )


def _input_embeddings(model: Any) -> str:
    """The name of the model's input embeddings, `embed_tokens` where it does not tell."""
    own = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((name for name, module in model.named_modules() if own is not None and module is own), "embed_tokens")


def _named(model: nn.Module, name: str) -> dict[str, Any]:
    """The modules with this name, or with a name that ends so."""
    modules = {n: m for n, (m, _) in modules_of(model, lambda m: m is not model).items()}
    found = {n: m for n, m in modules.items() if n == name or n.endswith(f".{name}")}
    if not found:
        ends = {n.rpartition(".")[2] for n in modules} | {*modules}
        raise UnknownNameError(
            f"trainable_token_indices names {shown(name)}, which no module is called", remedy=near(name, ends)
        )
    for where, module in found.items():
        if not isinstance(module, (nn.Embedding, nn.Linear)) or not _weight(module).is_floating_point():
            raise ConfigError(
                f"trainable_token_indices names {shown(where)}, a {base_class(module).__name__}",
                remedy="Rows of embeddings are trained, and of heads that share their weight.",
            )
    return found


def _rows(where: str, module: Any, index: Any) -> Tensor:
    """The rows as they are, in fp32."""
    weight = _weight(module)
    total = len(weight)
    index = index if isinstance(index, (list, tuple)) else [index]
    wrong = [i for i in index if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total]
    if wrong or len(set(index)) < len(index) or not index:
        raise ConfigError(
            f"trainable_token_indices of {shown(where)}: {shown(wrong or list(index))}",
            remedy=f"They are different whole numbers from 0 to {total - 1}, at least one.",
        )
    return weight.detach()[torch.tensor(list(index), device=weight.device)].float()


def _weight(module: Any) -> Tensor:
    """A module's own weight, whatever other adapters make of it."""
    return module._parameters["weight"]


def _tied(model: Any, found: Found) -> Found:
    """With the modules that share the input embeddings' weight: they get the same patch, unless they were named with other indices."""
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    source = next(((where, patch) for where, (module, patch) in found.items() if module is table), None)
    if source is None:
        return found
    where, patch = source
    same = modules_of(model, lambda m: isinstance(m, (nn.Embedding, nn.Linear)) and _weight(m) is _weight(table))
    tied = {n: (m, patch) for n, (m, _) in same.items() if n not in found or _index(found[n][1]) == _index(patch)}
    return {where: (table, patch), **{n: own for n, own in found.items() if n not in tied}, **tied}


def _index(patch: Any) -> list[int]:
    return patch.rows.tolist()


# Parameters themselves


def _factors(model: nn.Module, config: Any, targets: Sequence[str], others: bool) -> Found:
    """The modules with a parameter that a target names by a whole name or its end."""
    if isinstance(targets, str):
        raise ConfigError(f"target_parameters is {shown(targets)}", remedy="It is a list of names.")
    for field, plain in _PLAIN.items():
        if getattr(config, field) != plain:
            raise ConfigError(
                f"{field} is {shown(getattr(config, field))}", remedy="With target_parameters it stays at its default."
            )
    if config.init_lora_weights not in _INITS:
        raise ConfigError(
            f"init_lora_weights is {shown(config.init_lora_weights)}",
            remedy=f"With target_parameters it is {' or '.join(map(repr, _INITS))}.",
        )
    found: Found = {}
    names: set[str] = set()
    for where, (module, _) in modules_of(model, lambda m: bool(m._parameters)).items():
        full = {name: f"{where}.{name}" for name, p in module._parameters.items() if p is not None}
        names |= {*full.values()} | {*full} | {f"{where.rpartition('.')[2]}.{name}" for name in full}
        chosen = [n for n, key in full.items() if any(key == t or key.endswith(f".{t}") for t in targets)]
        if chosen:
            if not where:
                raise ConfigError(
                    f"target_parameters names {shown(chosen[0])} of the model itself", remedy="Put it into a module."
                )
            found[where] = module, _factors_of(module, where, chosen, config)
    keys = [f"{where}.{name}" for where, (_, patch) in found.items() for name in patch.names]
    for target in targets:
        if not any(key == target or key.endswith(f".{target}") for key in keys):
            hint = near(target, names)
            if not found and not others:
                raise UnknownNameError(f"target_parameters {listed(targets)} not found in the base model", remedy=hint)
            warnings.warn(
                f"target_parameters has {shown(target)}, which no parameter is called. {hint}".strip(), stacklevel=5
            )
    return found


def _factors_of(module: Any, where: str, names: Sequence[str], config: Any) -> Factors:
    stacks: list[Stack] = []
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for name in names:
        key, parameter, stack = f"{where}.{name}", module._parameters[name], Stack.of(module, name)
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
    return Factors(tuple(stacks), tensors, scales).train(module.training)


def _initial(init: Any, stack: Stack, r: int) -> tuple[Tensor, Tensor]:
    """A [experts * r, in] and B [out, r * experts]; the product is zero unless `init` is False."""
    n = r * stack.experts
    A = torch.empty(n, stack.in_).normal_(std=1 / r) if init == "gaussian" else kaiming(n, stack.in_, generator=None)
    return A, torch.zeros(stack.out, n) if init else kaiming(stack.out, n, generator=None)


# Files


def taken(patches: Found, tensors: Any, prefix: str) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """{module: {name in its patch: tensor}} out of a file's tensors, which lose them; and the modules without any.

    Raises MissingKeysError for a part of a patch, ShapeMismatchError or NonFiniteError.
    """
    found: dict[str, dict[str, Tensor]] = {}
    absent: list[str] = []
    for where, patch in {id(patch): (where, patch) for where, (_, patch) in reversed(patches.items())}.values():
        keys = {f"{prefix}{where}.{name}": name for name in patch.state_dict()}
        lost = [key for key in keys if key not in tensors]
        if len(lost) == len(keys):
            absent.append(where)
            continue
        if lost:
            raise MissingKeysError(f"there are tensors for a part of {shown(where)}", where=listed(lost))
        found[where] = {name: tensors.pop(key) for key, name in keys.items()}
        _check(where, patch, found[where])
    return found, absent


def _check(where: str, patch: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Raise unless tensors have the shapes of a patch's, and are finite."""
    for name, tensor in patch.state_dict().items():
        if own[name].shape != tensor.shape:
            raise ShapeMismatchError(
                f"{name} is {tuple(own[name].shape)}, not {tuple(tensor.shape)}",
                where=where,
                remedy="It is for another model or config.",
            )
        if not finite(own[name]):
            raise NonFiniteError(f"{name} has values that are not finite", where=where, remedy="The file is damaged.")
