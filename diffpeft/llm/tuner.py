"""Tuner: what stands between a PeftModel and the user's model, with the methods that PEFT's `base_model` has."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from converters.formats.peft import CONFIG, PREFIX
from converters.opening import Opened
from diffpeft import patterns
from diffpeft.errors import AdapterStateError, CheckpointError, ConfigError, UnknownNameError, inside, shown
from diffpeft.layers.slot import Slot
from diffpeft.llm import adalora
from diffpeft.llm.dtypes import AUTOCAST, PLAIN, Precision
from diffpeft.llm.kbit import forget_quantization
from diffpeft.llm.patches import patches_of
from diffpeft.llm.renames import mapped
from diffpeft.llm.replication import replicated
from diffpeft.llm.resize import head_of, refuse_replaced, resize
from diffpeft.llm.state import Incompatible, config_of, overwrite, put, read, spelt, tensors_in, wholes_of
from diffpeft.llm.targets import chosen, resolved
from diffpeft.llm.tying import check_tying, loosen, ties_of, twin, twinned
from diffpeft.llm.weighted import Weighting, add_weighted
from diffpeft.model.attach import attach_to, method_of, mixes_of, take_off
from diffpeft.model.fuse import fuse, unfuse
from diffpeft.model.lock import exclusive
from diffpeft.model.merge import plan_merged
from diffpeft.model.mix import Choice, check_name, claim, forced
from diffpeft.model.state import slots_in
from diffpeft.model.target import adapted
from diffpeft.pipeline.adapters import adapters, set_adapters

BASE = "__base__"  # in a mixed batch: no adapter
OFF = Choice()  # the mix of a `disable_adapter` block, where batches are of the base too


def inject(model: nn.Module, config: Any, name: str, *, active: bool, precision: Precision = PLAIN) -> Any:
    """Add a fresh adapter to a model; the resolved config. The base is frozen.

    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    check_name(name)
    if config.is_prompt_learning:
        raise ConfigError(f"{type(config).__name__} adds tokens and not layers", remedy="Use get_peft_model.")
    with patterns.limited(ConfigError), exclusive({"": model}):
        config = resolved(model, config)
        config.validate()
        others = found_configs(model) if config.layer_replication else {}
        with replicated(model, config, others):
            return _inject(model, config, name, active, precision)


def _inject(model: nn.Module, config: Any, name: str, active: bool, precision: Precision) -> Any:
    layers, twins = twinned(chosen(model, config), model, config)
    method = method_of(config, {})
    wholes, patches = wholes_of(model, config), patches_of(model, config, layers)
    check_tying(model, config, (*wholes, *layers))
    precision.settle_patches(patches)
    own = base_of(model)

    def finish(modules: Mapping[str, Any], slots: dict[str, Slot]) -> dict[str, Slot]:
        precision.settle(modules, slots)
        return slots | {layer: twin(slots[other], modules[layer], True) for layer, other in twins.items()}

    attach_to(
        {"": model},
        {"": layers},
        config,
        name,
        method=method,
        strength=1.0 if active else None,
        wholes=wholes,
        ties=ties_of(model, config, wholes),
        finish=finish,
        patches=patches,
        quiet=True,
        metadata={CONFIG: config.to_json()},
    )
    for p in own:
        p.requires_grad_(False)
    trainable(model, {name: active and not config.inference_mode})
    return config


def base_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the first adapter freezes; none if there is one already."""
    return [] if mixes_of({"": model}) else list(model.parameters())


def trainable(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Whether the tensors of these adapters get gradients, whole modules among them."""
    for _, _, record in adapted(model):
        for name in record.names:
            if name in flags and not (name in record.copies and record.copies[name].still):
                for own in record.modules(name):
                    own.requires_grad_(flags[name])


def refuse_clashing(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterStateError if two of these adapters train the same module whole, or the same rows of an embedding."""
    for where, _, record in adapted(model):
        for one, other in itertools.combinations([name for name in names if name in record.names], 2):
            if record.clashing(one, other):
                raise AdapterStateError(
                    f"Only one adapter can be set at a time for {shown(where)}, got {one} and {other}: each has values of its own there",
                    remedy="Activate one of them.",
                )


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
        self._head: Any = None  # where the model's head is, if adapters are on it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; AdaLoRA adds its penalty to a loss."""
        refuse_replaced(self.model, self._head)
        return adalora.regularised(self.model(*args, **kwargs), self.model, self.peft_config)

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's schedule: call it in each training step between backward and zero_grad. Raises AdapterStateError if no such adapter is trained."""
        name = adalora.trained(self.peft_config)
        if name is None:
            raise AdapterStateError(
                "no adapter of AdaLoRA is trained", remedy="Use get_peft_model with an AdaLoraConfig."
            )
        adalora.update_and_allocate(self.model, name, self.peft_config[name], global_step)

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
        names = named(adapter_name)
        known(names, self.peft_config)
        refuse_clashing(self.model, names)
        set_adapters(self.model, dict.fromkeys(names, 1.0))
        self._off = None
        trainable(self.model, {name: name in names and not inference_mode for name in self.peft_config})

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        names = named(adapter_names)
        known(names, self.peft_config)
        trainable(self.model, dict.fromkeys(names, requires_grad))

    def inject_adapter(self, model: nn.Module, adapter_name: str, **_: Any) -> None:
        """Put the adapter whose config is in `peft_config` on the model, inactive."""
        self.inject(adapter_name, self.peft_config[adapter_name], active=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first that is left becomes so, with a warning."""
        known([adapter_name], self.peft_config)
        if adapter_name in fused_of(self.model):
            raise AdapterStateError(
                f"Cannot delete adapter(s) {shown(adapter_name)} while they are merged",
                remedy="Call unmerge_adapter first.",
            )
        before = self.active_adapters
        take_off({"": self.model}, {adapter_name})
        del self.peft_config[adapter_name]
        self._head = head_of(self.model)
        left = [name for name in before if name != adapter_name]
        if adapter_name in before and not left and self.peft_config:
            first = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {first}.",
                stacklevel=3,
            )
            self.set_adapter(first)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *how: Any, **named: Any
    ) -> None:
        """Put adapters together as a new one, inactive and frozen. Without a type: as their exact weighted sum, whatever the methods.

        What follows are PEFT's arguments, by place or by name: combination_type, svd_rank and so on, see `weighted.Weighting`.
        """
        for name in adapters:
            for field in ("trainable_token_indices", "target_parameters"):
                if value := getattr(self.peft_config.get(name), field, None):
                    raise ConfigError(
                        f"add_weighted_adapter does not support {field}, and adapter {shown(name)} has {shown(value)}",
                        remedy="Merge the adapters one after the other.",
                    )
        with patterns.limited(ConfigError), exclusive({"": self.model}):
            self.peft_config[adapter_name] = add_weighted(
                self.model, self.peft_config, adapters, weights, adapter_name, Weighting(*how, **named)
            )

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put active adapters into the weights. What would not be finite is refused, with or without `safe_merge`."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        known(names, self.peft_config)
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
                refuse_clashing(self.model, [*order_of(self.model), *inactive])
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
        known(names or (), self.peft_config)
        refuse_clashing(self.model, names or ())
        with exclusive({"": self.model}):
            plan, report = plan_merged({"": self.model}, names, dequantize=dequantize)
            loosen(plan, self.model)
            plan.set(self, peft_config={}, _head=None, last_merge_report=report)
            plan.commit()
        if dequantize:
            forget_quantization(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """The model without any adapter, as it was."""
        take_off({"": self.model}, None)
        self.peft_config.clear()
        self._head = None
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
        off = claim({mix.key: OFF for mix in mixes_of({"": self.model}).values()})
        try:
            with adapters(self.model, {}), forced(off):
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
        if self._off is not None or any(mix.standing() is OFF for mix in mixes_of({"": self.model}).values()):
            return nullcontext()
        return adapters(self.model, [{} if n == BASE else {n: 1.0} for n in adapter_names], images_per_prompt=copies)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with the adapters on its embeddings: new rows of whole copies are the model's, and a LoRA changes no new token.

        Raises AdapterStateError while adapters are merged, and for methods that cannot get other rows.
        """
        model: Any = self.model
        total = kwargs.get("new_num_tokens", args[0] if args else None)
        with exclusive({"": model}):
            return resize(model, lambda: model.resize_token_embeddings(*args, **kwargs), total)

    @property
    def inner(self) -> nn.Module:
        """The user's model."""
        return self.model

    def call(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The model's output."""
        return self(*args, **kwargs)

    def generated(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the model generates."""
        refuse_replaced(self.model, self._head)
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def tensors(self, name: str, given: Mapping[str, Tensor] | None, embeddings: bool | str) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of one adapter's file."""
        return spelt(self.model, name, self.peft_config[name], prefix=PREFIX, gathered=given, embeddings=embeddings)

    def overwrite(self, name: str, tensors: Mapping[str, Tensor]) -> Incompatible:
        """Put a file's tensors into an adapter that is there: all or nothing."""
        with patterns.limited(ConfigError, name):
            return overwrite(self.model, name, self.peft_config[name], tensors)

    def inject(self, name: str, config: Any, *, active: bool, precision: Precision = AUTOCAST) -> None:
        """Add a fresh adapter."""
        adalora.trained({**self.peft_config, name: config})
        self.peft_config[name] = inject(self.model, config, name, active=active, precision=precision)
        self._head = head_of(self.model)

    def load(
        self,
        name: str,
        config: Any,
        folder: Opened,
        *,
        trainable: bool,
        active: bool,
        precision: Precision = AUTOCAST,
        key_mapping: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Add the adapter in a folder. -> the keys of layers that it should have and has not, which is warned of."""
        where = folder.where
        with patterns.limited(CheckpointError, where), exclusive({"": self.model}), inside(where, config=True):
            source = mapped(tensors_in(folder), key_mapping) if key_mapping else folder
            return self._load(name, config, source, trainable, active, precision)

    def _load(
        self, name: str, config: Any, source: Any, trainable: bool, active: bool, precision: Precision
    ) -> list[str]:
        config = resolved(self.model, config)
        config.validate()
        with replicated(self.model, config, self.peft_config):
            found = read(self.model, source, config, trainable=trainable, chosen=chosen(self.model, config))
            check_tying(self.model, config, (*found.wholes, *found.slots))
            if found.missing:
                warnings.warn(
                    f"Found missing adapter keys while loading the checkpoint: {list(found.missing)}.", stacklevel=5
                )
            own = base_of(self.model)
        strength = 1.0 if active else None
        put(self.model, name, config, found, trainable=trainable, strength=strength, precision=precision)
        for p in own:
            p.requires_grad_(False)
        self.peft_config[name] = config
        self._head = head_of(self.model)
        return list(found.missing)


def named(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def known(names: Iterable[str], configs: Mapping[str, Any]) -> None:
    """Raise UnknownNameError for a name that no adapter has."""
    for name in names:
        if name not in configs:
            raise UnknownNameError(
                f"Adapter {name} not found: it does not exist", remedy=f"There are {', '.join(configs) or 'none'}."
            )


def found_configs(model: nn.Module) -> dict[str, Any]:
    """{name: config} of the adapters that are on a model already."""
    return {name: config_of(model, name) for mix in mixes_of({"": model}).values() for name in mix.adapters}
