"""What PEFT adapts beside whole layers: rows of embeddings (`trainable_token_indices`) and parameters themselves (`target_parameters`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NoReturn

from torch import Tensor, nn

from diffpeft.converters.opening import Opened
from diffpeft.errors import (
    AdapterStateError,
    ConfigError,
    MissingKeysError,
    NoMatchingPeftModuleError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    WrongKindError,
    inside,
    listed,
    near,
    shown,
)
from diffpeft.io import finite
from diffpeft.llm.targets import NOTHING, ending, last_parts, raise_none
from diffpeft.llm.tying import tied_to_embedding
from diffpeft.methods import LoraConfig
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.patches import (
    Patched,
    factors_on,
    input_table,
    parameters_of,
    refusal_of,
    rows_of,
    tokens_on,
    weight_of,
    with_tied,
)
from diffpeft.model.target import kind_of, modules_of

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
                f"Trying to wrap an `nn.Parameter` of layer {shown(where)} of type {kind_of(module).__name__}, which is not a valid target.",
                where="It is in target_modules and in target_parameters, which have the same keys in a file",
                remedy="Leave it out of one of them.",
            )
        if why := refusal_of(module, where):
            raise AdapterStateError(f"module {shown(where)} cannot be adapted: {why}", remedy="Leave it out.")
    return patches


# Rows of embeddings


def _tokens(model: nn.Module, config: PeftConfig, rows: list[int] | Mapping[str, list[int]]) -> Patched:
    """The tables whose rows are trained, and the heads that share their weight with one."""
    tables = rows if isinstance(rows, Mapping) else {_input_embeddings(model): rows}
    patches: Patched = {}
    for name, index in tables.items():
        if name in (config.modules_to_save or ()):
            raise ConfigError(
                "The embedding layer is already marked to be trained fully: "
                f"{shown(name)} is in modules_to_save and in trainable_token_indices",
                remedy="Leave it out of one of them.",
            )
        for where, module in _tables(model, name).items():
            if where in patches and rows_of(patches[where][1]) != list(index):
                raise ConfigError(f"{shown(where)} is named twice, with other indices", remedy="Name it once.")
            patches[where] = module, tokens_on(where, module, index)
    if config.ensure_weight_tying:
        _check_rows_alike(model, patches)
    return with_tied(model, patches)


def _check_rows_alike(model: nn.Module, patches: Patched) -> None:
    """Raise ConfigError if tied modules would have other rows each."""
    ties = tied_to_embedding(model)
    rows = {where: rows_of(patches[where][1]) for where in (*ties.values(), *ties) if where in patches}
    if any(index != next(iter(rows.values())) for index in rows.values()):
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied layers",
            where=", ".join(f"{where}: {index}" for where, index in rows.items()),
            remedy="Use the same indices for all tied layers or set ensure_weight_tying=False.",
        )


def _input_embeddings(model: nn.Module) -> str:
    """The name of the model's input embeddings, `embed_tokens` where it does not tell."""
    table = input_table(model)
    return next((n for n, module in model.named_modules() if table is not None and module is table), "embed_tokens")


def _tables(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The embeddings, and heads, that a name means. Raises UnknownNameError, or WrongKindError for other modules."""
    meant = ending(model, [name], "trainable_token_indices")
    if not meant:
        raise UnknownNameError(
            f"Target modules {{{name!r}}} not found in the base model.",
            where="trainable_token_indices",
            remedy=near(name, last_parts([n for n, _ in model.named_modules()])) or "Name an embedding.",
        )
    for where, module in meant.items():
        if not isinstance(module, (nn.Embedding, nn.Linear)) or not weight_of(module).is_floating_point():
            raise WrongKindError(
                f"trainable_token_indices cannot be applied to modules of type {kind_of(module)}",
                where=where,
                remedy="Rows of embeddings are trained, and of heads that share their weight.",
            )
    return meant


# Parameters themselves


def _factors(model: nn.Module, config: PeftConfig, targets: Sequence[str], others: bool) -> Patched:
    """The modules with a parameter that a target names by a whole name or its end. `others`: whether the adapter is on layers too."""
    assert isinstance(config, LoraConfig)
    _check_factors(config, targets)
    patches: Patched = {}
    for where, (module, _) in modules_of(model, lambda m: bool(parameters_of(m))).items():
        by_name = {name: f"{where}.{name}" for name in parameters_of(module)}
        targeted = [name for name, key in by_name.items() if any(names_parameter(target, key) for target in targets)]
        if targeted and not where:
            raise ConfigError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter {targeted[0]!r})",
                remedy="Put it into a module.",
            )
        if targeted:
            patches[where] = module, factors_on(module, where, targeted, config)
    if not patches and not others:
        _raise_none(model, config, targets)
    return patches


def _raise_none(model: nn.Module, config: PeftConfig, targets: Sequence[str]) -> NoReturn:
    """Raise NoMatchingPeftModuleError for parameters that a model has not, nor the layers that are wanted beside them."""
    where = f"target_parameters {listed(targets)} not found in the base model"
    if config.target_modules:
        with inside(where, config=True):
            raise_none(config, [name for name, _ in model.named_modules()])
    raise NoMatchingPeftModuleError(NOTHING, where=where, remedy=near(targets[0], ends_of(parameter_keys(model))))


def parameter_keys(model: nn.Module) -> list[str]:
    """The names of all parameters that may be targets, those of the model itself with a dot before them."""
    modules = modules_of(model, lambda m: bool(parameters_of(m)))
    return [f"{where}.{name}" for where, (module, _) in modules.items() for name in parameters_of(module)]


def ends_of(keys: Collection[str]) -> set[str]:
    """The names of parameters, and what is after the last dot or two of them."""
    return {".".join(key.split(".")[-n:]) for key in keys for n in (1, 2)} | {*keys}


def names_parameter(target: str, key: str) -> bool:
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
                f"size mismatch: {name} is {tuple(tensors[name].shape)}, not {tuple(place.shape)}",
                where=where,
                remedy="It is for another model or config.",
            )
        if not finite(tensors[name]):
            raise NonFiniteError(f"{name} has values that are not finite", where=where, remedy="The file is damaged.")
