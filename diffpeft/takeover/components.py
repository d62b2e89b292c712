"""The LoRA methods of a pipeline's models, in place of those of diffusers' and transformers' mixins of the same names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from torch import Tensor, nn

from diffpeft import io
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, WrongKindError, listed, shown
from diffpeft.llm.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from diffpeft.llm.injection import targeting
from diffpeft.llm.peft_model import set_peft_model_state_dict
from diffpeft.llm.tuner import inject
from diffpeft.methods import LoraConfig
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.mix import check_strength
from diffpeft.model.plan import planned
from diffpeft.model.precision import Precision
from diffpeft.pipeline.load import load_lora
from diffpeft.takeover import acts
from diffpeft.takeover.sources import Source, located

Value = TypeVar("Value")
Weight = float | Mapping[str, object] | None
ROOM = "_prepare_lora_hotswap_kwargs"  # where a model has what `enable_lora_hotswap` was told
METADATA = "lora_adapter_metadata"  # where diffusers' files have PEFT's config


class ModelMethods:
    """What diffusers' and transformers' models have in common."""

    _wrong_config: type[ConfigError] = ConfigError

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """{adapter: its config}. Without adapters there is no such attribute."""
        configs = acts.configs_on(_model(self))
        if not configs:
            raise AttributeError("peft_config")
        return configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfig]) -> None:
        self.__dict__["peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("peft_config", None)

    def add_adapter(self, adapter_config: object, adapter_name: str | None = "default") -> None:
        """Add a fresh adapter, which is trained, as the active one."""
        name = adapter_name or "default"
        if name in acts.adapters_on(_model(self)):
            raise AdapterStateError(f"Adapter with name {name} already exists", remedy="Please use a different name.")
        if not hasattr(adapter_config, "peft_type"):
            told = f"adapter_config should be an instance of PeftConfig. Got {type(adapter_config)} instead"
            raise self._wrong_config(told, remedy="Pass for example a LoraConfig.")
        config = PeftConfig.of(adapter_config)
        _inject(_model(self), config, name)
        acts.activate(_model(self), [name], train=True)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make adapters the active ones, and those that are trained; each is as strong as it was."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        known = self._loaded()
        if missing := [name for name in names if name not in known]:
            raise UnknownNameError(
                f"Following adapter(s) could not be found: {listed(missing)}. Make sure you are passing the correct adapter name(s)",
                remedy=f"current loaded adapters are: {known}",
            )
        acts.activate(_model(self), names, train=True)

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        self._loaded()
        _enable(_model(self), False)

    def enable_adapters(self) -> None:
        """Let active adapters act again."""
        self._loaded()
        _enable(_model(self), True)

    def active_adapters(self) -> list[str]:
        """The active adapters, in order."""
        self._loaded()
        return acts.active_on(_model(self))

    def _loaded(self) -> list[str]:
        """The model's adapters. Raises AdapterStateError if there are none."""
        known = acts.adapters_on(_model(self))
        if not known:
            raise AdapterStateError("No adapter loaded", remedy="Please load an adapter first.")
        return known


class DenoiserMethods(ModelMethods):
    """Those of `diffusers.loaders.peft.PeftAdapterMixin`."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: object,
    ) -> None:
        """Load a LoRA of this model, whose keys begin with `prefix`."""
        model, name = _model(self), cast("str | None", kwargs.get("adapter_name"))
        told = cast("Mapping[str, object] | None", kwargs.get("metadata"))
        alphas = cast("Mapping[str, float] | None", kwargs.get("network_alphas"))
        if alphas and prefix is None:
            raise ConfigError("`network_alphas` cannot be None when `prefix` is None", remedy="Pass a prefix.")
        if alphas and told:
            raise ConfigError("Both `network_alphas` and `metadata` cannot be specified", remedy="Pass one of them.")
        everything, said = _tensors(pretrained_model_name_or_path_or_dict, kwargs)
        tensors = _without(prefix, everything)
        told = said if told is None else told
        told = None if told is None else _without(prefix, told)
        if not tensors:
            return _log_no_keys(model, prefix)
        name = _checked(model, name, hotswap)
        if any(".lokr_" in key for key in tensors):
            load_lora(model, tensors, name=name, strict=False)
        else:
            tensors = _in_pefts_words(tensors)
            alphas = None if alphas is None else _without(prefix, alphas)
            config = _config(name, tensors, alphas, told)
            _put(model, name, config, tensors, hotswap)
            _make_room(model, config)
        if not hotswap:
            acts.activate(model, [name])

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter's tensors, with its config, into a folder. Pickles are not written."""
        name = "default" if adapter_name is None else adapter_name
        if name not in acts.adapters_on(_model(self)):
            raise UnknownNameError(f"Adapter name {name} not found in the model", remedy="See peft_config.")
        if os.path.isfile(save_directory):
            raise ConfigError(f"Provided path ({os.fspath(save_directory)}) should be a directory, not a file")
        if not safe_serialization:
            raise ConfigError("no pickles are written", remedy="Leave out safe_serialization=False.")
        tensors = {key: t.detach().cpu().contiguous() for key, t in acts.tensors_on(_model(self), name).items()}
        if upcast_before_saving:
            tensors = {key: tensor.float() for key, tensor in tensors.items()}
        os.makedirs(save_directory, exist_ok=True)
        told = {"format": "pt", METADATA: acts.config_on(_model(self), name).to_json()}
        path = os.path.join(save_directory, weight_name or "pytorch_lora_weights.safetensors")
        io.save(path, {key: io.handle(tensor) for key, tensor in tensors.items()}, told)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Weight | list[Weight] = None) -> None:
        """Make adapters the active ones, each with a weight, or weights by blocks: all layers at once."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with planned({"": _model(self)}) as plan:
            acts.plan_active(plan, _model(self), names, strengths_of(_model(self), names, weights))

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Put active adapters, or those that are named, into the weights. What would not be finite is refused in any case."""
        with planned({"": _model(self)}) as plan:
            acts.plan_fused_on(plan, _model(self), adapter_names, lora_scale)

    def unfuse_lora(self) -> None:
        """Take the adapters out of the weights again, to the last bit."""
        with planned({"": _model(self)}) as plan:
            acts.plan_unfused_on(plan, _model(self))

    def unload_lora(self) -> None:
        """Take all adapters off. Those that are in the weights stay there."""
        with planned({"": _model(self)}) as plan:
            acts.plan_unloaded(plan, _model(self))

    def disable_lora(self) -> None:
        """Let no adapter act until `enable_lora`."""
        _enable(_model(self), False)

    def enable_lora(self) -> None:
        """Let active adapters act again."""
        _enable(_model(self), True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off."""
        acts.delete([_model(self)], [adapter_names] if isinstance(adapter_names, str) else adapter_names)


class EncoderMethods(ModelMethods):
    """Those of `transformers.integrations.PeftAdapterMixin`."""

    _wrong_config = WrongKindError

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: object = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        **kwargs: object,
    ) -> None:
        """Load an adapter of this model: a PEFT folder, or tensors with a config."""
        name = adapter_name or "default"
        known = name in acts.adapters_on(_model(self))
        if hotswap == "auto":  # as `enable_peft_hotswap` was told
            hotswap = known and bool(getattr(self, "_hotswap_enabled", False))
        if known and not hotswap:
            raise AdapterStateError(f"Adapter with name {name} already exists", remedy="Please use a different name.")
        if hotswap and not known:
            raise UnknownNameError("To hotswap an adapter, there must already be an existing adapter with its name")
        if adapter_state_dict is not None and peft_config is not None:
            _put(_model(self), name, PeftConfig.of(peft_config), dict(adapter_state_dict), bool(hotswap))
        elif peft_model_id is not None:
            load_lora(_model(self), peft_model_id, name=name, trainable=is_trainable)
        else:
            raise ConfigError(
                "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an adapter"
            )
        acts.activate(_model(self), [name])

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of an adapter, by default of the first that is active."""
        self._loaded()
        return acts.tensors_on(_model(self), adapter_name or self.active_adapters()[0])

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off."""
        known = self._loaded()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if missing := [name for name in names if name not in known]:
            raise UnknownNameError(
                f"The following adapter(s) are not present and cannot be deleted: {listed(missing)}",
                remedy=f"Known: {listed(known)}.",
            )
        acts.delete([_model(self)], names)


def _model(methods: object) -> nn.Module:
    return cast(nn.Module, methods)


def _enable(model: nn.Module, enabled: bool) -> None:
    with planned({"": model}) as plan:
        acts.plan_enabled(plan, model, enabled)


def strengths_of(model: nn.Module, names: Sequence[str], weights: Weight | Sequence[Weight]) -> acts.Strengths:
    """How strong adapters act on layers by what diffusers' `set_adapters` is told: a number, or numbers by blocks, for all or each. None is 1.

    Raises ConfigError for weights that are not as many as adapters, and what diffusers raises for blocks that the model lacks.
    """
    told = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(told) != len(names):
        raise ConfigError(
            f"Length of adapter names {len(names)} is not equal to the length of their weights {len(told)}",
            remedy="Pass a weight for each.",
        )
    from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING

    expand: Callable[..., list[object]] = _SET_ADAPTER_SCALE_FN_MAPPING[type(model).__name__]
    expanded = expand(model, [1.0 if weight is None else weight for weight in told])
    by_name = dict(zip(names, expanded, strict=True))
    return lambda name, layer: _weight(by_name[name], layer)


def _weight(told: object, layer: str) -> float:
    """What a layer gets of numbers by blocks: that of the first block that it is in; 1 if it is in none. Raises ConfigError for what is no number."""
    weight = next((w for block, w in told.items() if block in layer), 1.0) if isinstance(told, Mapping) else told
    check_strength("the adapter", weight)
    return float(cast(float, weight))


def _tensors(source: Source, options: Mapping[str, object]) -> tuple[dict[str, Tensor], Mapping[str, object] | None]:
    """The tensors of a source, and the config that its file holds."""
    place = located(source, options)
    if isinstance(place, Mapping):
        return dict(place), None
    import safetensors.torch
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    return safetensors.torch.load_file(place, device="cpu"), _load_sft_state_dict_metadata(str(place))


def _without(prefix: str | None, table: Mapping[str, Value]) -> dict[str, Value]:
    """What begins with a prefix, without it."""
    if prefix is None:
        return dict(table)
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in table.items() if key.startswith(start)}


def _in_pefts_words(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under PEFT's keys, whatever words of diffusers' they have."""
    if "lora_A" in next(iter(tensors)):
        return dict(tensors)
    from diffusers.utils import convert_unet_state_dict_to_peft

    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(dict(tensors))
    return renamed


def _checked(model: nn.Module, name: str | None, hotswap: bool) -> str:
    """The name of an adapter that is to be loaded, or in whose place another is to be put. Raises AdapterStateError or UnknownNameError."""
    known = acts.adapters_on(model)
    if hotswap and name not in known:
        raise UnknownNameError(
            f"Trying to hotswap LoRA adapter {shown(name)} but there is no existing adapter by that name",
            remedy="Please choose an existing adapter name or set `hotswap=False` to prevent hotswapping.",
        )
    if name in known and not hotswap:
        raise AdapterStateError(
            f"Adapter name {name} already in use in the model", remedy="Please select a new adapter name."
        )
    return fresh_name(known) if name is None else name


def fresh_name(known: Sequence[str]) -> str:
    """diffusers' name for an adapter without one: `default_` and the number of those that are there."""
    number = len(known)
    while f"default_{number}" in known:
        number += 1
    return f"default_{number}"


def _config(
    name: str,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float] | None,
    told: Mapping[str, object] | None,
) -> PeftConfig:
    """The config of a LoRA in diffusers' words: what its file says, or its ranks and alphas."""
    if told:
        return LoraConfig(**{key: value for key, value in told.items() if key in LoraConfig.__dataclass_fields__})
    from diffusers.utils import get_peft_kwargs

    ranks = {f"^{key}": t.shape[1] for key, t in tensors.items() if "lora_B" in key and t.dim() > 1}
    return LoraConfig(**get_peft_kwargs(ranks, alphas, tensors, model_state_dict={}, adapter_name=name))


def _put(model: nn.Module, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], hotswap: bool) -> None:
    """Load tensors under PEFT's keys as an adapter, or in the place of one. What fails leaves nothing."""
    if hotswap:
        hotswap_adapter_from_state_dict(model, tensors, name, config)
        return
    try:
        _inject(model, targeting(model, config, tensors), name)
        set_peft_model_state_dict(model, tensors, name)
    except Exception:
        acts.delete([model], [name])
        raise


def _make_room(model: nn.Module, config: PeftConfig) -> None:
    """Let other adapters be put in the place of the one that was loaded, as `enable_lora_hotswap` was told."""
    told: Mapping[str, int | str] | None = getattr(model, ROOM, None)
    if told:
        rank, compiled = int(told["target_rank"]), str(told["check_compiled"])
        prepare_model_for_compiled_hotswap(model, config=config, target_rank=rank, check_compiled=compiled)
        setattr(model, ROOM, None)


def _inject(model: nn.Module, config: PeftConfig, name: str) -> None:
    inject(model, config, name, Precision(autocast=False), acts.component_of(model))


def _log_no_keys(model: nn.Module, prefix: str | None) -> None:
    """Say, as diffusers does, that there is nothing for a model."""
    from diffusers.utils import logging

    if prefix is not None:
        logging.get_logger("diffusers.loaders.peft").warning(
            f"No LoRA keys associated to {type(model).__name__} found with the prefix={prefix!r}. "
            "This is safe to ignore if LoRA state dict didn't originally have any params of it. "
            "You can also try specifying `prefix=None` to resolve the warning."
        )
