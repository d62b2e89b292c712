"""PromptTuner: prompt adapters under the methods that a Tuner has for those on layers, so that PeftModel need not care which it has."""

from __future__ import annotations

import copy as copying
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from diffpeft.converters.opening import Opened
from diffpeft.errors import (
    AdapterStateError,
    AdapterStateWarning,
    ConfigError,
    ShapeMismatchError,
    WrongKindError,
    inside,
)
from diffpeft.llm.checkpointing import plan_no_hook
from diffpeft.llm.prompt import EMBEDDINGS, PromptLearningConfig, VirtualTokens
from diffpeft.llm.prompts import Arguments, Prepare, Prompts, encoder_of
from diffpeft.llm.state import Incompatible, check_module, tensors_in, wholes_of
from diffpeft.llm.tuner import OFF, WENT, LoadOptions, known, named
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.activation import plan_trained
from diffpeft.model.attach import copy_wholes
from diffpeft.model.mix import Adapter, Mix, check_name, choose, claim, forced
from diffpeft.model.plan import Plan, planned
from diffpeft.model.state import beside_slots, whole_tensors
from diffpeft.model.target import adapted

PREFIX = "base_model."  # of whole modules in PEFT's files of prompts


class PromptTuner(Prompts):
    """The prompt adapters of a model. A Mix without layers says which is active, also to modules that an adapter trains whole."""

    def __init__(self, model: nn.Module, task_type: Any):
        super().__init__(model, task_type)
        self.peft_config: dict[str, PromptLearningConfig] = {}
        self.mix = Mix("", apart=True)

    @property
    def inner(self) -> nn.Module:
        """The user's model."""
        return self.base_model

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in this thread."""
        return list(self.mix.current().order)

    @property
    def active_adapter(self) -> Any:
        """The active adapter's name; an empty list if there is none."""
        names = self.active_adapters
        return names[0] if names else []

    @property
    def enabled(self) -> bool:
        """Whether the active adapter acts here and now."""
        return self.mix.standing() is not OFF

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter: prompts are no LoRA."""
        return False

    @property
    def _parts(self) -> dict[str, nn.Module]:
        """What operations lock and change."""
        return {"": self.base_model}

    def plan_injected(self, plan: Plan, name: str, config: PeftConfig, *, active: bool, **_: object) -> VirtualTokens:
        """Plan to add a fresh adapter, in float32 as PEFT's; its encoder. What else `Tuner.plan_injected` takes is for layers."""
        check_name(name)
        config = cast(PromptLearningConfig, config)
        encoder = self.plan_added(plan, name, config)
        wholes = wholes_of(self.base_model, config)
        before = plan.view(self.mix)
        adapters = {**before.adapters, name: Adapter(name, (), modules=tuple(wholes))}
        layers = tuple(dict.fromkeys((*before.layers, *wholes)))
        strengths = {name: 1.0} if active else dict(before.choice.given)
        plan.set(self.mix, layers=layers, adapters=adapters, choice=choose("", layers, adapters, strengths))
        for copy in copy_wholes(plan, self.mix, name, wholes).values():
            copy.requires_grad_(active and not config.inference_mode)
        encoder.requires_grad_(not config.inference_mode)
        plan.entry(self.peft_config, name, config)
        return encoder

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the one that is trained."""
        names = named(adapter_name)
        known(names, self.peft_config)
        if len(names) != 1:
            raise ConfigError(f"{len(names)} prompts cannot be active together", remedy="Name one adapter.")
        with planned(self._parts) as plan:
            plan.set(self.mix, choice=self.mix.chosen({names[0]: 1.0}))
            self._plan_trained(plan, {name: name == names[0] and not inference_mode for name in self.peft_config})

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> NoReturn:
        """Prompts are trained while they are active. Raises WrongKindError."""
        kind = next(iter(self.peft_config.values())).peft_type
        raise WrongKindError(
            f"Setting `requires_grad` is not supported for prompt learning methods like {kind}",
            remedy="set_adapter(name, inference_mode=) says which prompt is trained.",
        )

    def _plan_trained(self, plan: Plan, flags: Mapping[str, bool]) -> None:
        for name, flag in flags.items():
            plan.require_grad(self.encoder(name).parameters(), flag)
        plan_trained(plan, self.base_model, flags)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several. If none is active then, the first that is left becomes so, with a warning."""
        names = named(adapter_name)
        known(names, self.peft_config, "does not exist")
        gone = [name for name in self.active_adapters if name in names]
        remaining = [name for name in self.peft_config if name not in names]
        with planned(self._parts) as plan:
            self._plan_removed(plan, {*names})
        if gone and remaining:
            warnings.warn(WENT.format(", ".join(gone), remaining[0]), AdapterStateWarning, stacklevel=3)

    def unload(self) -> nn.Module:
        """The model without any adapter, as it was."""
        with planned(self._parts) as plan:
            self._plan_removed(plan, {*self.peft_config})
            plan_no_hook(plan, self.base_model)
        return self.base_model

    def _plan_removed(self, plan: Plan, names: set[str]) -> None:
        """Plan to remove adapters. If the active one is among them, the first that is left becomes active."""
        for _, module, record in adapted(self.base_model):
            if record.mix is self.mix and names & {*record.names}:
                plan.carry(module, record.without(names))
        remaining = {name: adapter for name, adapter in self.mix.adapters.items() if name not in names}
        order = [name for name in self.mix.choice.order if name not in names] or list(remaining)[:1]
        plan.set(self.mix, adapters=remaining, choice=choose("", self.mix.layers, remaining, dict.fromkeys(order, 1.0)))
        for name in names:
            self.plan_deleted(plan, name)
            plan.entry(self.peft_config, name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for this thread inside this block."""
        with forced(claim({self.mix.key: OFF})):
            yield

    def call(self, args: Any, kwargs: dict[str, object]) -> Any:
        """The model's output, with the active prompt before what it reads."""
        if not self.active_adapters:
            return self.base_model(*args, **kwargs)
        return self(self.active_adapter, self.peft_config[self.active_adapter], args, kwargs)

    def generated(self, args: Any, kwargs: dict[str, object]) -> Any:
        """What the model generates, with the active prompt before what it reads."""
        if not self.active_adapters:
            return self.base_model.generate(*args, **kwargs)
        return self.generate(self.active_adapter, self.peft_config[self.active_adapter], args, kwargs)

    def prepared(self, prepare: Prepare, args: Sequence[object], kwargs: Arguments) -> Arguments:
        """The arguments of a step of generation that a model prepares, with the active prompt where it goes."""
        if not self.active_adapters:
            return prepare(*args, **kwargs)
        return self._steps(self.active_adapter, self.peft_config[self.active_adapter], prepare)(*args, **kwargs)

    def rows(self, adapter_names: Sequence[str], copies: int = 1, batch: int | None = None) -> Any:
        """Prompts of several adapters do not fit in one batch."""
        raise AdapterStateError("a batch has one prompt", remedy="Leave out adapter_names, and call set_adapter.")

    def tensors(self, name: str, gathered: Mapping[str, Tensor] | None, embeddings: bool | str) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of one adapter's file."""
        return {
            **self.state(name, self.peft_config[name]),
            **whole_tensors(self.base_model, name, PREFIX, gathered),
        }

    def with_ranks(self, name: str, config: PeftConfig) -> PeftConfig:
        """A config as it is: prompts have no ranks."""
        return config

    def plan_overwritten(self, plan: Plan, name: str, tensors: Mapping[str, Tensor]) -> Incompatible:
        """Plan to put a file's tensors into an adapter that is there."""
        return self._plan_tensors(plan, name, self.encoder(name), self.peft_config[name], tensors)

    def _plan_tensors(
        self, plan: Plan, name: str, encoder: VirtualTokens, config: PromptLearningConfig, tensors: Mapping[str, Tensor]
    ) -> Incompatible:
        """Plan to put a file's tensors into an encoder, and into the copies that its adapter has, or will have, of modules."""
        wholes: dict[str, dict[str, Tensor]] = {}
        used = set()
        modules = wholes_of(self.base_model, config)
        for key, tensor in tensors.items():
            inside_model = key.removeprefix(PREFIX)
            if where := next((where for where in modules if inside_model.startswith(f"{where}.")), None):
                wholes.setdefault(where, {})[inside_model.removeprefix(f"{where}.")] = tensor
                used.add(key)
        for where, of_module in wholes.items():
            check_module(where, modules[where], of_module)
        used |= set(self.plan_state(plan, name, encoder, config, tensors))
        for where, of_module in wholes.items():
            copy = beside_slots(plan, self.base_model, where, name)
            if copy is not None:
                for key, place in copy.state_dict(keep_vars=True).items():
                    plan.fill(place, of_module[key])
        return Incompatible([], [key for key in tensors if key not in used], [])

    def _check_shapes(self, config: PromptLearningConfig, folder: Opened) -> None:
        """Raise ShapeMismatchError unless a file's vectors are those of a config: before any are made or read."""
        config = self.completed(copying.deepcopy(config))
        with torch.device("meta"):
            places = encoder_of(config)(config, self.word_embeddings).places()
        for name, place in places.items():
            if name in folder.tensors and folder.tensors[name].shape != tuple(place.shape):
                raise ShapeMismatchError(
                    f"{name} is {folder.tensors[name].shape}, expected {tuple(place.shape)}",
                    where=folder.where,
                    remedy="Load it for the same model, with the config that it was saved with.",
                )

    def plan_loaded(self, plan: Plan, name: str, config: PeftConfig, folder: Opened, how: LoadOptions) -> list[str]:
        """Plan to add the adapter in a folder; nothing is missing then. Dtypes and keys are for layers."""
        config = cast(PromptLearningConfig, config)
        with inside(folder.where, config=True):
            if how.trainable:
                raise ConfigError(
                    "Cannot set a prompt learning adapter to trainable when loading pretrained adapter.",
                    remedy="Files hold the finished vectors, not what made them.",
                )
            if EMBEDDINGS not in folder.tensors:
                raise ConfigError(f"there is no {EMBEDDINGS}", where=folder.where, remedy="It is no prompt adapter.")
            self._check_shapes(config, folder)
            tensors = tensors_in(folder)
            encoder = self.plan_injected(plan, name, config, active=how.active)
            self._plan_tensors(plan, name, encoder, config, tensors)
        return []
