"""Tuner: what stands between a PeftModel and the user's model, with the methods that PEFT's `base_model` has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from converters.formats.peft import CONFIG
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, shown
from diffpeft.layers.whole import copied, copies_of, place, replace_tensors
from diffpeft.llm.state import config_of, wholes_of
from diffpeft.llm.targets import chosen, resolved
from diffpeft.model.attach import attach_to, method_of, mixes_of, take_off
from diffpeft.model.fuse import fuse, unfuse
from diffpeft.model.merge import merge_for_good
from diffpeft.model.mix import check_name
from diffpeft.model.state import slots_in
from diffpeft.model.target import modules_of
from diffpeft.pipeline.adapters import adapters, set_adapters

BASE = "__base__"  # in a mixed batch: no adapter


def inject(model: nn.Module, config: Any, name: str, *, active: bool) -> Any:
    """Add a fresh adapter to a model; the resolved config. The base is frozen.

    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    check_name(name)
    if config.is_prompt_learning:
        raise ConfigError(f"{type(config).__name__} adds tokens and not layers", remedy="Use get_peft_model.")
    config = resolved(model, config)
    config.validate()
    layers = chosen(model, config)
    method = method_of(config, {})
    wholes = wholes_of(model, config)
    trained = [p for p in model.parameters() if p.requires_grad] if not mixes_of({"": model}) else []
    attach_to(
        {"": model},
        {"": layers},
        config,
        name,
        method=method,
        strength=1.0 if active else None,
        wholes=wholes,
        quiet=True,
        metadata={CONFIG: config.to_json()},
    )
    for p in trained:
        p.requires_grad_(False)
    trainable(model, name, active and not config.inference_mode)
    return config


def trainable(model: nn.Module, name: str, flag: bool) -> None:
    """Whether an adapter's tensors get gradients, whole modules among them."""
    for slot in slots_in(model, name).values():
        slot.requires_grad_(flag)
    for module, _ in modules_of(model, copied).values():
        copies = copies_of(module)
        if copies is not None and name in copies.modules:
            copies.modules[name].requires_grad_(flag)


def order_of(model: nn.Module) -> list[str]:
    """The active adapters, in order."""
    return [name for mix in mixes_of({"": model}).values() for name in mix.choice.order]


def fused_of(model: nn.Module) -> list[str]:
    """The adapters that are in the weights."""
    return [name for mix in mixes_of({"": model}).values() for name in mix.fused]


class Tuner(nn.Module):
    """The user's model with adapters on it. What it does not have itself is the model's."""

    def __init__(self, model: nn.Module, configs: dict[str, Any]):
        super().__init__()
        self.model = model
        self.peft_config = configs
        self.last_merge_report: dict[str, float] = {}
        self._off: Mapping[str, Any] | None = None  # the mix that disable_adapter_layers has put aside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        return list(self._off) if self._off is not None else order_of(self.model)

    @property
    def active_adapter(self) -> Any:
        """The active adapter's name, or a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers that carry adapters."""
        return list(dict.fromkeys(layer for name in self.peft_config for layer in slots_in(self.model, name)))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order; they are trained (unless `inference_mode`), the others are not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        set_adapters(self.model, dict.fromkeys(names, 1.0))
        self._off = None
        for name in self.peft_config:
            trainable(self.model, name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._known(names)
        for name in names:
            trainable(self.model, name, requires_grad)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **_: Any) -> None:
        """Put the adapter whose config is in `peft_config` on the model, inactive."""
        self.peft_config[adapter_name] = inject(model, self.peft_config[adapter_name], adapter_name, active=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first that is left becomes so, with a warning."""
        self._known([adapter_name])
        if adapter_name in fused_of(self.model):
            raise AdapterStateError(
                f"Cannot delete adapter(s) {shown(adapter_name)} while they are merged",
                remedy="Call unmerge_adapter first.",
            )
        before = self.active_adapters
        take_off({"": self.model}, {adapter_name})
        del self.peft_config[adapter_name]
        left = [name for name in before if name != adapter_name]
        if adapter_name in before and not left and self.peft_config:
            first = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {first}.",
                stacklevel=3,
            )
            self.set_adapter(first)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put active adapters into the weights. What would not be finite is refused, with or without `safe_merge`."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        merged = fused_of(self.model)
        todo = [name for name in names if name not in merged]
        if len(todo) < len(names):
            warnings.warn(
                f"Already following adapters were merged {','.join(n for n in names if n in merged)}. "
                f"You are now additionally merging {','.join(todo) or 'none'}.",
                stacklevel=2,
            )
        if todo:
            inactive = [name for name in todo if name not in order_of(self.model)]
            if inactive:
                set_adapters(self.model, {**dict.fromkeys(order_of(self.model), 1.0), **dict.fromkeys(inactive, 1.0)})
            fuse(self.model, todo)

    def unmerge_adapter(self) -> None:
        """Take the adapters out of the weights again, to the last bit."""
        if not fused_of(self.model):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        unfuse(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The plain model with the active (or named) adapters in its weights, and the modules that they train whole in their places.

        `dequantize` makes plain layers of quantised ones. `last_merge_report` has the relative error of each layer afterwards.
        """
        names = None if adapter_names is None else list(adapter_names)
        self._known(names or ())
        order = names or self.active_adapters
        wholes = [(m, copies) for m, _ in modules_of(self.model, copied).values() if (copies := copies_of(m))]
        self.last_merge_report = merge_for_good(self.model, names, dequantize=dequantize, safe=safe_merge)
        for module, copies in wholes:
            acting = next((copies.modules[name] for name in reversed(order) if name in copies.modules), None)
            place(module, None)
            if acting is not None:
                replace_tensors(module, acting)
        self.peft_config.clear()
        return self.model

    def unload(self) -> nn.Module:
        """The model without any adapter, as it was."""
        take_off({"": self.model}, None)
        self.peft_config.clear()
        return self.model

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        if self._off is None:
            mixes = mixes_of({"": self.model})
            self._off = {n: s for mix in mixes.values() for n, s in mix.choice.given.items()}
            set_adapters(self.model, {})

    def enable_adapter_layers(self) -> None:
        """Switch on what was active before `disable_adapter_layers`."""
        if self._off is not None:
            set_adapters(self.model, self._off)
            self._off = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for this thread inside this block; adapters that are merged are taken out for everybody and put back after it."""
        merged = fused_of(self.model)
        if merged:
            unfuse(self.model)
        try:
            with adapters(self.model, {}):
                yield
        finally:
            if merged:
                fuse(self.model, merged)

    def rows(self, adapter_names: Sequence[str], copies: int = 1) -> AbstractContextManager[None]:
        """A mixed batch: row i has the adapter `adapter_names[i // copies]`, or none where that is `__base__`."""
        if self.model.training:
            raise AdapterStateError(
                "Cannot pass `adapter_names` when the model is in training mode.", remedy="Call model.eval() first."
            )
        if fused_of(self.model):
            raise AdapterStateError(
                "Cannot pass `adapter_names` when there are merged adapters", remedy="Call `unmerge_adapter` first."
            )
        lost = sorted(set(adapter_names) - {BASE, *self.peft_config})
        if lost:
            raise UnknownNameError.of("adapter", lost[0], self.peft_config)
        return adapters(self.model, [{} if n == BASE else {n: 1.0} for n in adapter_names], images_per_prompt=copies)

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise UnknownNameError(
                    f"Adapter {name} not found: it does not exist", remedy=f"There are {', '.join(self.peft_config)}."
                )


def found_configs(model: nn.Module) -> dict[str, Any]:
    """{name: config} of the adapters that are on a model already."""
    return {name: config_of(model, name) for mix in mixes_of({"": model}).values() for name in mix.adapters}
