"""What PEFT adapts beside whole layers: rows of embeddings (`trainable_token_indices`) and parameters themselves (`target_parameters`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from converters.opening import Opened
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
from diffpeft.layers.hooks import held_forwards, refusal
from diffpeft.layers.parameters import Factors, Stack
from diffpeft.layers.patches import Patch
from diffpeft.layers.tokens import Tokens
from diffpeft.llm.tying import tied_to_embedding
from diffpeft.methods import LoraConfig
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.target import modules_of

Patched = dict[str, tuple[nn.Module, Patch]]
_PLAIN = {"lora_dropout": 0.0, "lora_bias": False, "use_dora": False, "fan_in_fan_out": False}  # with target_parameters
_INITS = (True, False, "gaussian")


def patches_of(model: nn.Module, config: PeftConfig, layers: Iterable[str] = ()) -> Patched:
    """{name: (module, fresh patch)} of what a resolved config asks for beside its `layers`.

    Raises ConfigError, UnknownNameError or AdapterStateError.
    """
    layers = set(layers)
    rows, parameters = config.trainable_token_indices, config.target_parameters
    for name, value in (("trainable_token_indices", rows), ("target_parameters", parameters)):
        if value and config.peft_type != PeftType.LORA:
            raise ConfigError(f"{name} is {shown(value)}", remedy=f"It is for LoRA, not for {config.peft_type}.")
    tokens = _tokens(model, config, rows) if rows else {}
    factors = _factors(model, config, parameters, bool(layers)) if parameters else {}
    if twice := next((where for where in factors if where in tokens), None):
        raise ConfigError(
            f"module {shown(twice)} is in trainable_token_indices and target_parameters", remedy="Give it once."
        )
    patches = {**tokens, **factors}
    for where, (module, _) in patches.items():
        if where in layers and where in factors:
            raise ConfigError(
                f"module {shown(where)} is in target_modules and in target_parameters, which have the same keys in a file",
                remedy="Leave it out of one of them.",
            )
        if why := _refusal(module, where):
            raise AdapterStateError(f"module {shown(where)} cannot be adapted: {why}", remedy="Leave it out.")
    return patches


def _refusal(module: nn.Module, where: str) -> str:
    """Why a module's parameters cannot be changed; empty if they can."""
    if isinstance(module, (nn.Embedding, nn.Linear)):
        return refusal(module, None, where)
    if "forward" in vars(module) and not held_forwards(module):
        return "another library has replaced its forward"
    return "it is parametrised" if "parametrizations" in module._modules else ""


# Rows of embeddings


def _tokens(model: nn.Module, config: PeftConfig, rows: list[int] | Mapping[str, list[int]]) -> Patched:
    """The tables whose rows are trained, and the heads that share their weight with one."""
    tables = rows if isinstance(rows, Mapping) else {_input_embeddings(model): rows}
    patches: Patched = {}
    for name, index in tables.items():
        if name in (config.modules_to_save or ()):
            raise ConfigError(
                f"{shown(name)} is in modules_to_save and in trainable_token_indices",
                remedy="The embedding is trained whole, or some rows of it.",
            )
        for where, module in _named(model, name).items():
            if where in patches and _index(patches[where][1]) != list(index):
                raise ConfigError(f"{shown(where)} is named twice, with other indices", remedy="Name it once.")
            patches[where] = module, Tokens(index, _table_rows(where, module, index))
    if config.ensure_weight_tying:
        _check_rows_alike(model, patches)
    return _tied(model, patches)


def _check_rows_alike(model: nn.Module, patches: Patched) -> None:
    """Raise ConfigError if tied modules would have other rows each."""
    ties = tied_to_embedding(model)
    rows = {where: _index(patches[where][1]) for where in (*ties.values(), *ties) if where in patches}
    if any(index != next(iter(rows.values())) for index in rows.values()):
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied layers",
            where=", ".join(f"{where}: {index}" for where, index in rows.items()),
            remedy="Use the same indices for all tied layers or set ensure_weight_tying=False.",
        )


def _input_embeddings(model: nn.Module) -> str:
    """The name of the model's input embeddings, `embed_tokens` where it does not tell."""
    table = _table(model)
    return next((n for n, module in model.named_modules() if table is not None and module is table), "embed_tokens")


def _table(model: Any) -> nn.Module | None:
    """A language model's input embeddings."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _named(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules with this name, or with a name that ends so. Raises UnknownNameError or ConfigError."""
    modules = {n: m for n, (m, _) in modules_of(model, lambda m: m is not model).items()}
    named = {n: m for n, m in modules.items() if n == name or n.endswith(f".{name}")}
    if not named:
        ends = {n.rpartition(".")[2] for n in modules} | {*modules}
        raise UnknownNameError(
            f"trainable_token_indices names {shown(name)}, which no module is called", remedy=near(name, ends)
        )
    for where, module in named.items():
        if not isinstance(module, (nn.Embedding, nn.Linear)) or not _weight(module).is_floating_point():
            raise ConfigError(
                f"trainable_token_indices names {shown(where)}, a {base_class(module).__name__}",
                remedy="Rows of embeddings are trained, and of heads that share their weight.",
            )
    return named


def _table_rows(where: str, module: nn.Module, index: object) -> Tensor:
    """The rows [n, dim] of a table [tokens, dim] as they are, in fp32. Raises ConfigError for what are no rows of it."""
    weight = _weight(module)
    total = len(weight)
    numbers = list(index) if isinstance(index, (list, tuple)) else [index]
    wrong = [i for i in numbers if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total]
    if wrong or len(set(numbers)) < len(numbers) or not numbers:
        raise ConfigError(
            f"trainable_token_indices of {shown(where)}: {shown(wrong or numbers)}",
            remedy=f"They are different whole numbers from 0 to {total - 1}, at least one.",
        )
    return weight.detach()[torch.tensor(numbers, device=weight.device)].float()


def _weight(module: nn.Module) -> Tensor:
    """A table's weight [tokens, dim] as it is without adapters."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _tied(model: nn.Module, patches: Patched) -> Patched:
    """With the modules that share the input embeddings' weight: they get the same patch, unless they were named with other indices."""
    table = _table(model)
    source = next(((where, patch) for where, (module, patch) in patches.items() if module is table), None)
    if table is None or source is None:
        return patches
    where, patch = source
    same = modules_of(model, lambda m: isinstance(m, (nn.Embedding, nn.Linear)) and _weight(m) is _weight(table))
    tied = {n: (m, patch) for n, (m, _) in same.items() if n not in patches or _index(patches[n][1]) == _index(patch)}
    return {where: (table, patch), **{n: pair for n, pair in patches.items() if n not in tied}, **tied}


def _index(patch: Patch) -> list[int]:
    """The numbers of the rows that a patch changes."""
    assert isinstance(patch, Tokens)
    return patch.rows.tolist()


# Parameters themselves


def _factors(model: nn.Module, config: PeftConfig, targets: Sequence[str], others: bool) -> Patched:
    """The modules with a parameter that a target names by a whole name or its end. `others`: whether the adapter is on layers too."""
    assert isinstance(config, LoraConfig)
    _check_factors(config, targets)
    patches: Patched = {}
    keys: set[str] = set()
    for where, (module, _) in modules_of(model, lambda m: bool(m._parameters)).items():
        by_name = {name: f"{where}.{name}" for name, p in module._parameters.items() if p is not None}
        keys |= set(by_name.values())
        targeted = [name for name, key in by_name.items() if any(_names(target, key) for target in targets)]
        if targeted and not where:
            raise ConfigError(
                f"target_parameters names {shown(targeted[0])} of the model itself", remedy="Put it into a module."
            )
        if targeted:
            patches[where] = module, _factors_of(module, where, targeted, config)
    _check_named(targets, keys, needed=not others)
    return patches


def _check_named(targets: Sequence[str], keys: Collection[str], needed: bool) -> None:
    """Warn of targets that no parameter is called. Raises UnknownNameError if none is, and one is `needed`."""
    unknown = [target for target in targets if not any(_names(target, key) for key in keys)]
    ends = {".".join(key.split(".")[-n:]) for key in keys for n in (1, 2)} | {*keys} if unknown else ()
    if needed and len(unknown) == len(targets):
        raise UnknownNameError(
            f"target_parameters {listed(targets)} not found in the base model", remedy=near(unknown[0], ends)
        )
    for target in unknown:
        hint = near(target, ends)
        warnings.warn(
            f"target_parameters has {shown(target)}, which no parameter is called. {hint}".strip(), stacklevel=6
        )


def _names(target: str, key: str) -> bool:
    """Whether a target is a parameter's whole name, or its end."""
    return key == target or key.endswith(f".{target}")


def _check_factors(config: LoraConfig, targets: object) -> None:
    """Raise ConfigError for settings that mean nothing with target_parameters."""
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


def _factors_of(module: nn.Module, where: str, names: Sequence[str], config: LoraConfig) -> Factors:
    """Fresh LoRAs on parameters of a module. Raises ConfigError for a parameter that is no matrix, nor a stack of them."""
    stacks: list[Stack] = []
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for name in names:
        key, parameter, stack = f"{where}.{name}", module._parameters[name], Stack.of(module, name)
        assert parameter is not None
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


def _initial(init: bool | str, stack: Stack, r: int) -> tuple[Tensor, Tensor]:
    """A [experts * r, in] and B [out, r * experts]; the product is zero unless `init` is False."""
    n = r * stack.experts
    A = torch.empty(n, stack.in_).normal_(std=1 / r) if init == "gaussian" else kaiming(n, stack.in_, generator=None)
    return A, torch.zeros(stack.out, n) if init else kaiming(stack.out, n, generator=None)


# Files


def taken(
    patches: Patched, tensors: dict[str, Tensor] | Opened, prefix: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """{module: {name in its patch: tensor}} out of a file's tensors, which lose them; and the modules without any.

    Raises MissingKeysError for a part of a patch, ShapeMismatchError or NonFiniteError.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    absent: list[str] = []
    if isinstance(tensors, Opened):  # of a model without patches
        return by_module, absent
    for where, patch in {id(patch): (where, patch) for where, (_, patch) in reversed(patches.items())}.values():
        keys = {f"{prefix}{where}.{name}": name for name in patch.state_dict()}
        missing = [key for key in keys if key not in tensors]
        if len(missing) == len(keys):
            absent.append(where)
            continue
        if missing:
            raise MissingKeysError(f"there are tensors for a part of {shown(where)}", where=listed(missing))
        by_module[where] = {name: tensors.pop(key) for key, name in keys.items()}
        _check(where, patch, by_module[where])
    return by_module, absent


def _check(where: str, patch: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tensors have the shapes of a patch's, and are finite."""
    for name, place in patch.state_dict().items():
        if tensors[name].shape != place.shape:
            raise ShapeMismatchError(
                f"{name} is {tuple(tensors[name].shape)}, not {tuple(place.shape)}",
                where=where,
                remedy="It is for another model or config.",
            )
        if not finite(tensors[name]):
            raise NonFiniteError(f"{name} has values that are not finite", where=where, remedy="The file is damaged.")
