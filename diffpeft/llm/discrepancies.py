"""What a config asks for and the model has not: PEFT's warnings, when an adapter is made or loaded."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from diffpeft import patterns
from diffpeft.errors import ConfigWarning, PeftWarning, UnusedPatternWarning, near, shown
from diffpeft.llm.patches import ends_of, names_parameter, parameter_keys
from diffpeft.methods import LoraConfig
from diffpeft.methods.layout import PATTERNS
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.patches import parameters_of
from diffpeft.model.target import kind_of


def warn(model: nn.Module, config: PeftConfig, layers: Mapping[str, nn.Module], patched: Iterable[str]) -> None:
    """Warn of what a resolved config says in vain, for an adapter on these `layers`, and on parameters of the modules `patched`."""
    if config.target_modules and config.target_parameters and not layers:
        warnings.warn(
            f"target_modules={config.target_modules} were set but no module was matched.",
            UnusedPatternWarning,
            stacklevel=6,
        )
    if config.target_parameters:
        _warn_parameters(model, config.target_parameters)
    names = [*layers, *(f"{where}.{name}" for where in patched for name in parameters_of(model.get_submodule(where)))]
    for field in ("alpha_pattern", *PATTERNS):
        _warn_patterns(field, _patterns(config, field), names)
    if isinstance(config, LoraConfig) and config.lora_bias and config.peft_type == PeftType.LORA:
        _warn_biases(layers.values())


def _warn_parameters(model: nn.Module, targets: Sequence[str]) -> None:
    """Name the targets that no parameter is called."""
    keys = parameter_keys(model)
    unknown = [target for target in targets if not any(names_parameter(target, key) for key in keys)]
    if len(unknown) == len(targets):
        warnings.warn(
            f"target_parameters={targets} were set but no parameter was matched.", UnusedPatternWarning, stacklevel=7
        )
    for target in unknown:
        hint = near(target, ends_of(keys))
        warnings.warn(
            f"target_parameters has {shown(target)}, which no parameter is called. {hint}".strip(),
            ConfigWarning,
            stacklevel=7,
        )


def _patterns(config: PeftConfig, field: str) -> Collection[str]:
    """The expressions of a field. AdaLoRA's `rank_pattern` has none: it is what the training has left."""
    values = getattr(config, field, None) or {}
    return [] if any(isinstance(value, list) for value in values.values()) else list(values)


def _warn_patterns(field: str, keys: Collection[str], names: Collection[str]) -> None:
    """Name the expressions that mean none of the layers."""
    unmatched = sorted(key for key in keys if not any(patterns.ends(key, name) for name in names))
    if unmatched:
        hint = near(unmatched[0], {end for name in names for end in patterns.name_ends(name)})
        warnings.warn(
            f"The following {field} keys did not match any targeted module and were ignored: {unmatched}. {hint}".strip(),
            UnusedPatternWarning,
            stacklevel=7,
        )


def _warn_biases(layers: Iterable[nn.Module]) -> None:
    """Name the kinds of layers that get a bias of B, which has no place in the layer when it is merged."""
    for kind in dict.fromkeys(kind_of(layer).__name__ for layer in layers if layer._parameters.get("bias") is None):
        warnings.warn(
            f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias. "
            "This means that merging LoRA weights won't be possible.",
            PeftWarning,
            stacklevel=7,
        )
