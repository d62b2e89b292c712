"""What diffusers' LoRA methods do to a model, done to all its layers at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffpeft.converters.formats.peft import CONFIG
from diffpeft.converters.writing import by_component
from diffpeft.converters.writing import planned as drafted
from diffpeft.errors import CannotConvertError, ConfigError
from diffpeft.layers.carried import Record
from diffpeft.llm.state import config_of, spelt
from diffpeft.methods import LoraConfig
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.activation import plan_trained
from diffpeft.model.attach import mix_of, plan_removed
from diffpeft.model.fuse import plan_fused, plan_unfused
from diffpeft.model.merge import plan_merged
from diffpeft.model.mix import Level, Single, check_strength, scaled_level
from diffpeft.model.plan import ABSENT, Plan, planned
from diffpeft.model.single import plan_each
from diffpeft.model.state import bundle_of
from diffpeft.model.target import adapted

COMPONENT = "_diffpeft_component"  # where a model that was taken over has its name in the pipeline
BEFORE = "_diffpeft_before_fusing"  # where it has {column: Single} from before `fuse_lora`, while adapters are in its weights
Strengths = Callable[[str, str], float]  # (adapter, layer) -> how strong


def component_of(model: nn.Module) -> str:
    """What the pipeline calls a model that was taken over."""
    return str(model.__dict__.get(COMPONENT, ""))


def adapters_on(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order in which they came."""
    mix = mix_of(model)
    return [] if mix is None else list(mix.adapters)


def active_on(model: nn.Module) -> list[str]:
    """Those that are active, in order, switched off or not."""
    mix = mix_of(model)
    return [] if mix is None else list(mix.choice.order)


def fused_on(model: nn.Module) -> list[str]:
    """Those that are in the weights, in order."""
    mix = mix_of(model)
    return [] if mix is None else list(mix.fused)


def plan_active(plan: Plan, model: nn.Module, names: Iterable[str], strengths: Strengths | None = None) -> None:
    """Plan to make those of some adapters that a model has its active ones, in this order, as strong as they were or as is said."""
    known = adapters_on(model)
    having = [name for name in names if name in known]

    def setting(record: Record, single: Single) -> Single:
        levels: dict[str, Level] = dict(single.strengths)
        if strengths is not None:
            levels |= {name: strengths(name, record.where) for name in having}
        return Single(tuple(having), levels, single.enabled)

    plan_each(plan, model, setting)


def activate(model: nn.Module, names: Sequence[str], train: bool = False) -> None:
    """Make adapters the active ones of a model; with `train` they are trained, and the others are not."""
    with planned({"": model}) as plan:
        plan_active(plan, model, names)
        if train:
            plan_trained(plan, model, {name: name in names for name in adapters_on(model)})


def plan_enabled(plan: Plan, model: nn.Module, enabled: bool) -> None:
    """Plan to let active adapters act, or none; what is in the weights comes out for that."""
    if not enabled:
        plan_unfused_on(plan, model)
    plan_each(plan, model, lambda record, single: Single(single.active, single.strengths, enabled))


def plan_fused_on(plan: Plan, model: nn.Module, names: Sequence[str] | None, scale: float) -> None:
    """Plan to put adapters (all active ones, or those of `names` that the model has) into the weights, `scale` times as strong as they are."""
    mix = mix_of(model)
    if mix is None:
        return
    chosen = mix.choice.order if names is None else [name for name in names if name in mix.adapters]
    fresh = [name for name in chosen if name not in mix.fused]
    if not fresh or not all(single.enabled for single in mix.choice.singles.values()):
        return  # what is switched off acts in no way
    check_strength("lora_scale", scale)
    before: dict[int, Single] = dict(model.__dict__.get(BEFORE, {}))

    def raised(record: Record, single: Single) -> Single:
        before.setdefault(record.index, single)
        scaled = {name: scaled_level(single.strengths.get(name, 1.0), scale) for name in fresh}
        return Single(tuple(dict.fromkeys((*single.active, *fresh))), {**single.strengths, **scaled}, single.enabled)

    plan_each(plan, model, raised)
    plan_fused(plan, {component_of(model): model}, fresh, untie=True)
    plan.set(model, **{BEFORE: before})


def plan_unfused_on(plan: Plan, model: nn.Module) -> None:
    """Plan to take adapters out of the weights; they are as active, and as strong, as before they were put in."""
    fused = fused_on(model)
    before: Mapping[int, Single] = model.__dict__.get(BEFORE, {})
    if not fused:
        return
    plan_unfused(plan, {component_of(model): model})

    def lowered(record: Record, single: Single) -> Single:
        earlier = before.get(record.index, single)
        strengths = {name: earlier.strengths.get(name, 1.0) for name in fused}
        active = tuple(name for name in single.active if name not in fused or name in earlier.active)
        return Single(active, {**single.strengths, **strengths}, single.enabled)

    plan_each(plan, model, lowered)
    plan.set(model, **{BEFORE: ABSENT})


def plan_unloaded(plan: Plan, model: nn.Module) -> None:
    """Plan to take all adapters off. Those that are in the weights stay in them for good, as diffusers leaves them."""
    fused, parts = fused_on(model), {component_of(model): model}
    if fused:
        plan_merged(plan, parts, fused, untie=True)
    else:
        plan_removed(plan, parts, None)
    plan.set(model, **{BEFORE: ABSENT})


def plan_deleted(plan: Plan, model: nn.Module, names: Iterable[str]) -> None:
    """Plan to take off those of some adapters that a model has."""
    going = {*names} & {*adapters_on(model)}
    if going:
        plan_removed(plan, {component_of(model): model}, going)


def delete(models: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Take adapters off models. Where none is active then, the first that is left becomes so."""
    models = [*models]
    with planned({str(place): model for place, model in enumerate(models)}) as plan:
        for model in models:
            plan_deleted(plan, model, names)
    for model in models:
        remaining = adapters_on(model)
        if remaining and not active_on(model):
            activate(model, remaining[:1])


def move(models: Iterable[nn.Module], names: Iterable[str], device: torch.device | str | int) -> None:
    """Move adapters' tensors to a device; those that are not there are passed over."""
    wanted = [*names]
    for model in models:
        for _, _, record in adapted(model):
            for name in [name for name in wanted if name in record.names]:
                for module in record.modules(name):
                    module.to(device)


def configs_on(model: nn.Module) -> dict[str, PeftConfig]:
    """{adapter: its config} of all adapters of a model."""
    listed = model.__dict__.get("peft_config", {})
    return {name: listed[name] if name in listed else config_on(model, name) for name in adapters_on(model)}


def config_on(model: nn.Module, name: str) -> PeftConfig:
    """The config that an adapter was made from, else the one that its file would have in PEFT's format; that of a LoRA if PEFT cannot hold it."""
    try:
        return config_of(model, name)
    except ConfigError:
        pass
    try:
        (part,) = by_component(bundle_of(model, name, ""), "peft").values()
        return PeftConfig.from_peft_type(**json.loads(drafted(part).metadata[CONFIG]))
    except CannotConvertError:
        return LoraConfig()


def tensors_on(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{PEFT's key: tensor} of one adapter."""
    return spelt(model, name, config_on(model, name))
