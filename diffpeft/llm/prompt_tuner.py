"""PromptTuner: prompt adapters under the methods that a Tuner has for those on layers, so that PeftModel need not care which it has."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from converters.opening import Opened
from diffpeft.errors import AdapterStateError, ConfigError, ShapeMismatchError, inside
from diffpeft.layers.carried import record_of
from diffpeft.llm.prompt import EMBEDDINGS
from diffpeft.llm.prompts import PROMPTS, Prompts
from diffpeft.llm.state import Incompatible, check_module, tensors_in, whole_tensors, wholes_of
from diffpeft.llm.tuner import known, named, trainable
from diffpeft.model.attach import copy_wholes
from diffpeft.model.mix import Adapter, Choice, Mix, check_name, choose, claim, forced
from diffpeft.model.plan import Plan
from diffpeft.model.target import adapted

PREFIX = "base_model."  # of whole modules in PEFT's files of prompts


class PromptTuner(Prompts):
    """The prompt adapters of a model. A Mix without layers says which is active, also to modules that an adapter trains whole."""

    def __init__(self, model: nn.Module, task_type: Any):
        super().__init__(model, task_type)
        self.peft_config: dict[str, Any] = {}
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

    def inject(self, name: str, config: Any, *, active: bool, **_: Any) -> None:
        """Add a fresh adapter, in float32 as PEFT's. Anything wrong: nothing is added. What else `Tuner.inject` takes is for layers."""
        check_name(name)
        encoder = self.add(name, config)
        try:
            wholes = wholes_of(self.base_model, config)
            adapters = {**self.mix.adapters, name: Adapter(name, (), modules=tuple(wholes))}
            layers = tuple(dict.fromkeys((*self.mix.layers, *wholes)))
            given = {name: 1.0} if active else dict(self.mix.choice.given)
            plan = Plan()
            plan.set(self.mix, layers=layers, adapters=adapters, choice=choose("", layers, adapters, given))
            copy_wholes(plan, self.mix, name, wholes)
            plan.commit()
        except BaseException:
            self.delete(name)
            raise
        encoder.requires_grad_(not config.inference_mode)
        trainable(self.base_model, {name: active and not config.inference_mode})
        self.peft_config[name] = config

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and the one that is trained."""
        names = named(adapter_name)
        known(names, self.peft_config)
        if len(names) != 1:
            raise ConfigError(f"{len(names)} prompts cannot be active together", remedy="Name one adapter.")
        self.mix.choice = self.mix.chosen({names[0]: 1.0})
        for name in self.peft_config:
            self.set_requires_grad(name, name == names[0] and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        known(named(adapter_names), self.peft_config)
        for name in named(adapter_names):
            self.encoder(name).requires_grad_(requires_grad)
        trainable(self.base_model, dict.fromkeys(named(adapter_names), requires_grad))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first that is left becomes so."""
        known([adapter_name], self.peft_config)
        plan = Plan()
        for _, module, record in adapted(self.base_model):
            if record.mix is self.mix and adapter_name in record.names:
                plan.carry(module, record.without({adapter_name}))
        left = {n: a for n, a in self.mix.adapters.items() if n != adapter_name}
        order = [n for n in self.mix.choice.order if n != adapter_name] or list(left)[:1]
        choice = choose("", self.mix.layers, left, dict.fromkeys(order, 1.0))
        plan.set(self.mix, adapters=left, choice=choice)
        plan.commit()
        self.delete(adapter_name)
        del self.peft_config[adapter_name]

    def unload(self) -> nn.Module:
        """The model without any adapter, as it was."""
        for name in list(self.peft_config):
            self.delete_adapter(name)
        return self.base_model

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for this thread inside this block."""
        with forced(claim({self.mix.key: Choice()})):
            yield

    def call(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The model's output, with the active prompt before what it reads."""
        if not self.active_adapters:
            return self.base_model(*args, **kwargs)
        return self(self.active_adapter, self.peft_config[self.active_adapter], args, kwargs)

    def generated(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the model generates, with the active prompt before what it reads."""
        if not self.active_adapters:
            return self.base_model.generate(*args, **kwargs)
        return self.generate(self.active_adapter, self.peft_config[self.active_adapter], args, kwargs)

    def rows(self, adapter_names: Sequence[str], copies: int = 1) -> Any:
        """Prompts of several adapters do not fit in one batch."""
        raise AdapterStateError("a batch has one prompt", remedy="Leave out adapter_names, and call set_adapter.")

    def tensors(self, name: str, given: Mapping[str, Tensor] | None, embeddings: bool | str) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of one adapter's file."""
        return {
            **self.state(name, self.peft_config[name]),
            **whole_tensors(self.base_model, name, PREFIX, given),
        }

    def overwrite(self, name: str, tensors: Mapping[str, Tensor]) -> Incompatible:
        """Put a file's tensors into an adapter that is there: all or nothing."""
        wholes: dict[str, dict[str, Tensor]] = {}
        used = set()
        modules = wholes_of(self.base_model, self.peft_config[name])
        for key, tensor in tensors.items():
            own = key.removeprefix(PREFIX)
            if where := next((where for where in modules if own.startswith(f"{where}.")), None):
                wholes.setdefault(where, {})[own.removeprefix(f"{where}.")] = tensor
                used.add(key)
        for where, found in wholes.items():
            check_module(where, modules[where], found)
        used |= set(self.load_state(name, self.peft_config[name], tensors))
        for where, found in wholes.items():
            record = record_of(modules[where])
            if record is not None:
                record.copies[name].module.load_state_dict(found)
        return Incompatible([], [key for key in tensors if key not in used], [])

    def _check_shapes(self, config: Any, folder: Opened) -> None:
        """Raise ShapeMismatchError unless a file's vectors are those of a config: before any are made or read."""
        config = self.completed(copy.deepcopy(config))
        with torch.device("meta"):
            places = PROMPTS[config.peft_type](config, self.word_embeddings).places()
        for name, place in places.items():
            if name in folder.tensors and folder.tensors[name].shape != tuple(place.shape):
                raise ShapeMismatchError(
                    f"{name} is {folder.tensors[name].shape}, expected {tuple(place.shape)}",
                    where=folder.where,
                    remedy="Load it for the same model, with the config that it was saved with.",
                )

    def load(self, name: str, config: Any, folder: Opened, *, trainable: bool, active: bool, **_: Any) -> list[str]:
        """Add the adapter in a folder; nothing is missing then. What else `Tuner.load` takes is for layers."""
        with inside(folder.where, config=True):
            return self._load(name, config, folder, trainable, active)

    def _load(self, name: str, config: Any, folder: Opened, trainable: bool, active: bool) -> list[str]:
        if trainable:
            raise ConfigError(
                "Cannot set a prompt learning adapter to trainable when loading pretrained adapter.",
                remedy="Files hold the finished vectors, not what made them.",
            )
        if EMBEDDINGS not in folder.tensors:
            raise ConfigError(f"there is no {EMBEDDINGS}", where=folder.where, remedy="It is no prompt adapter.")
        self._check_shapes(config, folder)
        tensors = tensors_in(folder)
        self.inject(name, config, active=active)
        try:
            self.overwrite(name, tensors)
        except BaseException:
            self.delete_adapter(name)
            raise
        return []
