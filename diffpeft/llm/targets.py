"""Which layers PEFT would adapt: its rules for `target_modules` and the fields around it, and its defaults by type of model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from diffpeft import patterns
from diffpeft.errors import ConfigError, ConfigWarning, NoMatchingPeftModuleError, WrongKindError, listed, near, shown
from diffpeft.llm import custom, renames
from diffpeft.methods import IA3Config
from diffpeft.methods.peft_config import Config, PeftConfig, PeftType, TaskType
from diffpeft.model.target import check_target, kind_of, modules_of, with_inner
from diffpeft.model.ties import tied_to_embedding

ALL_LINEAR = "all-linear"
NOTHING = (
    "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments."
)
MANY = 20  # so many names are written as the shortest that mean the same
HEADS = ("score", "classifier")  # what transformers calls the heads of classifiers
_LINEAR = ("Linear", "Conv1D")


def _table(text: str) -> dict[str, list[str]]:
    """{model type: names} from lines `names: model types`."""
    rows = [line.split(":") for line in text.strip().splitlines()]
    return {kind: names.split() for names, kinds in rows for kind in kinds.split()}


# PEFT 0.21.2's defaults; in (IA)^3's a * is before what is feedforward
_LORA = _table("""
q v: t5 mt5
q_proj v_proj: bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3
c_attn: gpt2 gpt_bigcode
query_key_value: bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon
q v q_proj v_proj: blip-2
query value: bert roberta xlm-roberta electra layoutlm
query_proj value_proj: deberta-v2
in_proj: deberta
Wqkv: mpt
c_proj c_attn: btlm
qkv_proj: codegen
q_proj v_proj fc1 fc2: phi
q_proj k_proj v_proj o_proj: nemotron_h
key value receptance output: rwkv
r_proj k_proj v_proj o_proj key value: rwkv7
""")
_IA3 = _table("""
k v *wo: t5
k v wi_1: mt5
c_attn *mlp.c_proj: gpt2 gpt_bigcode
query_key_value *mlp.dense_4h_to_h: bloom
query_key_value *dense_4h_to_h: gpt_neox RefinedWebModel RefinedWeb falcon
key value *output.dense: bert roberta
q_proj k_proj *fc2: opt
q_proj v_proj *fc_out: gptj
q_proj v_proj *c_proj: gpt_neo
q_proj v_proj *fc2: bart phi
k_proj v_proj *down_proj: llama mistral
q_proj v_proj *down_proj: llama4 gemma gemma2 gemma3_text qwen2 qwen3
k_proj v_proj *w2: mixtral
key_proj value_proj *output.dense: deberta-v2
in_proj *output.dense: deberta
""")
_ADALORA = _table("""
q k v o wi wo: t5
q k v o wi_0 wi_1 wo: mt5
q_proj k_proj v_proj out_proj fc1 fc2: bart opt
c_attn: gpt2 gpt_bigcode
query_key_value: bloom gpt_neox
q_proj v_proj: gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3
query value: bert
query key value dense: roberta
query_proj key_proj value_proj dense: deberta-v2
in_proj: deberta
q_proj k_proj v_proj o_proj: nemotron_h
""")
_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"
LORA_TARGETS: dict[str, list[str] | str] = {**_LORA, "gemma4": _GEMMA4}
VERA_TARGETS = {**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}
ADALORA_TARGETS: dict[str, list[str] | str] = {**_ADALORA, "gemma4": _GEMMA4}
IA3_TARGETS: dict[str, list[str] | str] = {
    kind: [name.removeprefix("*") for name in names] for kind, names in _IA3.items()
}
IA3_FEEDFORWARD = {kind: [name[1:] for name in names if name.startswith("*")] for kind, names in _IA3.items()}
_TARGETS: Mapping[str, dict[str, list[str] | str]] = {
    PeftType.IA3: IA3_TARGETS,
    PeftType.ADALORA: ADALORA_TARGETS,
    PeftType.VERA: VERA_TARGETS,
}


def resolved(model: nn.Module, config: Config) -> Config:
    """A copy of a config in which defaults and `all-linear` have become names, and many names few, as in PEFT."""
    config = copy.deepcopy(config)
    linear = _linear(model, config) if _is_all_linear(config) else []
    renames.stacked(model, config, linear, lambda name: matches(config, name) and not excludes(config, name))
    if _is_all_linear(config):
        config.target_modules = set(linear)
    elif config.target_modules is None and not config.target_parameters:
        _set_default(model, config)
    if isinstance(config, IA3Config) and config.feedforward_modules is None:
        config.feedforward_modules = set(IA3_FEEDFORWARD.get(_kind(model), ()))
    _condense(model, config)
    return config


def _condense(model: nn.Module, config: PeftConfig) -> None:
    """Say what many names mean by few. Not of (IA)^3, whose `feedforward_modules` are among them."""
    targets = config.target_modules
    if not targets or isinstance(targets, str) or len(targets) < MANY or config.peft_type == PeftType.IA3:
        return
    ends = tuple(f".{target}" for target in targets)
    few = shortest(targets, (name for name in inner_modules(model) if name not in targets and not name.endswith(ends)))
    if len(few) < len(targets):
        config.target_modules = set(few)


def _set_default(model: nn.Module, config: PeftConfig) -> None:
    """Set the target modules to PEFT's default for the type of model. Raises ConfigError where there is none."""
    kind = _kind(model)
    targets = _TARGETS.get(str(config.peft_type), LORA_TARGETS).get(kind)
    if targets is None:
        raise ConfigError(
            "Please specify `target_modules` or `target_parameters` in `peft_config`",
            remedy=f'There is no default for {shown(kind)}. For example target_modules="all-linear".',
        )
    config.target_modules = targets if isinstance(targets, str) else set(targets)


def _kind(model: nn.Module) -> str:
    """The type of a model of transformers, `None` of others."""
    return str(getattr(getattr(model, "config", None), "model_type", None))


def _is_all_linear(config: PeftConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def chosen(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """{name: layer} that a resolved config chooses, in the order of the model.

    Raises NoMatchingPeftModuleError if no name fits, ConfigError or AdapterStateError for a module that cannot carry the method.
    """
    _check_patterns(config)
    modules = inner_modules(model)
    excluded = dict.fromkeys(name for name in modules if excludes(config, name))
    fitting = {name: place for name, place in modules.items() if name not in excluded and matches(config, name)}
    if not fitting and not config.target_parameters:
        raise_none(config, list(modules), list(excluded))
    _warn_unmatched(config, list(modules), list(excluded))
    _warn_tied(model, {name: module for name, (module, _) in modules.items()}, fitting)
    unknown = custom.settle(config, {name: module for name, (module, _) in fitting.items()})
    for name, (module, parent) in fitting.items():
        check_target(model, module, parent, name)
    custom.warn(unknown)
    return with_inner({name: module for name, (module, _) in fitting.items()})


def _check_patterns(config: PeftConfig) -> None:
    """Raise ConfigError for names that become parts of an expression, and are none themselves."""
    for field in ("layers_pattern", "modules_to_save"):
        value = getattr(config, field) or ()
        for pattern in (value,) if isinstance(value, str) else value:
            try:
                patterns.check(pattern)
            except ConfigError as error:
                raise ConfigError(f"{field} has {shown(pattern)}", remedy=f"{error.what}.") from error


def matches(config: PeftConfig, name: str) -> bool:
    """Whether `target_modules` and `layers_to_transform` choose a module; a whole name in a list passes over the numbers."""
    targets = config.target_modules
    if not targets:
        return False
    if isinstance(targets, str):
        return patterns.fullmatch(targets, name)
    if name in targets:
        return True
    return any(name.endswith(f".{t}") for t in targets) and _in_layers(config, name)


def excludes(config: PeftConfig, name: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keep a module from being adapted."""
    out = config.exclude_modules or ()
    if patterns.fullmatch(out, name) if isinstance(out, str) else any(name == e or name.endswith(f".{e}") for e in out):
        return True
    return any(patterns.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ())


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def ending(model: nn.Module, names: Iterable[str], field: str) -> dict[str, nn.Module]:
    """{name: module} of those whose names end as one of `names`, as PEFT finds what is trained beside layers: in the middle of a word too.

    Raises WrongKindError for a container, which has no forward. `field` is what the names are of.
    """
    ends = tuple(names)
    modules = {n: m for n, (m, _) in inner_modules(model).items() if n.endswith(ends)}
    for where, module in modules.items():
        if isinstance(module, _CONTAINERS):
            raise WrongKindError(
                f"{field} cannot be applied to modules of type {kind_of(module)}",
                where=where,
                remedy="Name what is inside.",
            )
    return modules


def _in_layers(config: PeftConfig, name: str) -> bool:
    """Whether the first number in a name is among `layers_to_transform`. A name before the list of blocks is needed."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    pattern = config.layers_pattern or ()
    blocks = (pattern,) if isinstance(pattern, str) else pattern
    numbered = [rf"(?:^|.*?\.){block}\.(\d+)\." for block in blocks] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for p in numbered if (m := patterns.match(p, name))), None)
    return match is not None and int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def meant(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """{name: module} of those that a config means, of whatever kind they are."""
    return {n: m for n, (m, _) in inner_modules(model).items() if matches(config, n) and not excludes(config, n)}


def inner_modules(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """{name: (module, its parent)} of all below the model, each once."""
    return modules_of(model, lambda module: module is not model)


def _linear(model: nn.Module, config: PeftConfig) -> list[str]:
    """The names of every linear layer but the head."""
    head = _head(model, config)
    inside = {id(m) for m in head.modules()} if head is not None else set()
    return [
        name
        for name, (module, _) in inner_modules(model).items()
        if {*_LINEAR} & {c.__name__ for c in kind_of(module).__mro__} and id(module) not in inside
    ]


def _head(model: Any, config: PeftConfig) -> nn.Module | None:
    """The head of a model of transformers."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        return next((part for name in HEADS if (part := getattr(model, name, None)) is not None), None)
    return head


def shortest(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest ends at dots of names, sorted, that choose `wanted` and none of `others`."""
    others, shorter = [f".{name}" for name in others], set()
    for name in wanted:
        segments = name.split(".")
        ends = (".".join(segments[-k:]) for k in range(1, len(segments) + 1))
        shorter.add(next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), name))
    return sorted(shorter)


def raise_none(config: PeftConfig, names: Sequence[str], excluded: Sequence[str] = ()) -> NoReturn:
    """Raise for targets that choose nothing: because all are excluded, because of the numbers of layers, or because no module is called so."""
    if excluded:
        targeted = [name for name in excluded if matches(config, name)]
        raise NoMatchingPeftModuleError(
            "All modules were excluded"
            if len(excluded) == len(names)
            else "No modules were targeted for adaptation. This might be caused by a combination of mismatched target modules and "
            f"excluded modules: {_said(config)} means nothing that is left",
            where=f"excluded are {listed(targeted, 5)}" if targeted else "",
            remedy="Loosen exclude_modules or modules_to_save.",
        )
    targets = config.target_modules
    if not targets:
        raise NoMatchingPeftModuleError(NOTHING)
    _raise_left_out(config, names)
    raise NoMatchingPeftModuleError(
        f"Target modules {_said(config)} not found in the base model.",
        remedy=near(targets if isinstance(targets, str) else min(targets), last_parts(names))
        or "Check target_modules, layers_to_transform and the model.",
    )


def _said(config: PeftConfig) -> str:
    """The targets as PEFT writes them in messages."""
    targets = config.target_modules
    return shown(targets)[1:-1] if isinstance(targets, str) else f"{{{listed(sorted(targets or ()))}}}"


def _raise_left_out(config: PeftConfig, names: Iterable[str]) -> None:
    """Raise if it is `layers_to_transform` that leaves out all that the names mean."""
    layers, pattern = config.layers_to_transform, config.layers_pattern
    anywhere = copy.copy(config)
    anywhere.layers_to_transform = None
    left_out = [] if layers is None else [name for name in names if matches(anywhere, name)]
    if not left_out:
        return
    block = "" if pattern else _list_in(left_out)
    raise NoMatchingPeftModuleError(
        f"Target modules {_said(config)} not found in the base model: "
        f"layers_to_transform={layers!r} leaves out {listed(left_out, 3)}",
        where=f"layers_pattern={pattern!r}"
        if pattern
        else "without layers_pattern the list of blocks has to be inside another module",
        remedy=f"Give layers_pattern={block!r}, the list's name." if block else "Check the numbers.",
    )


def _list_in(names: Iterable[str]) -> str:
    """What the list of blocks is called in the first name with a number; empty if there is none."""
    for name in names:
        segments = name.split(".")
        if numbers := [i for i, segment in enumerate(segments) if segment.isdigit()]:
            return next((segments[i - 1] for i in numbers if i), "")
    return ""


def _warn_unmatched(config: PeftConfig, names: list[str], excluded: list[str]) -> None:
    """Say which entries of a list chose nothing."""
    if config.exclude_modules and not excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules!r} but no modules were excluded.",
            ConfigWarning,
            stacklevel=4,
        )
    if isinstance(config.target_modules, str):
        return
    unmatched = [t for t in config.target_modules or () if not any(n == t or n.endswith(f".{t}") for n in names)]
    for target in sorted(unmatched):
        hint = near(target, last_parts(names))
        warnings.warn(
            f"target_modules has {shown(target)}, which no module is called. {hint}".strip(),
            ConfigWarning,
            stacklevel=4,
        )


def _warn_tied(model: nn.Module, modules: Mapping[str, nn.Module], fitting: Collection[str]) -> None:
    """Say which chosen layers share their weight with another module, apart from ties to the embeddings, of which `check_tying` tells."""
    ties = tied_to_embedding(model)
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        if module._parameters.get("weight") is not None:
            holders.setdefault(id(module._parameters["weight"]), []).append(name)
    embeddings = {*ties, *ties.values()}
    tied = [n for names in holders.values() if len(names) > 1 for n in names if n in fitting and n not in embeddings]
    if tied:
        warnings.warn(
            f"{listed(tied)} share their weight with another module. The adapter acts on the ones named alone, and merging unties them.",
            ConfigWarning,
            stacklevel=4,
        )


def last_parts(names: Collection[str]) -> set[str]:
    """Names, and what follows the last dot of each: what a name that is not known is compared with."""
    return {name.rpartition(".")[2] for name in names} | set(names)
