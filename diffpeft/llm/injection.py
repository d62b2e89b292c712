"""Which layers the keys of a state dict mean, for an adapter that is made for them without its own file."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Set

from torch import Tensor, nn

from diffpeft.converters.formats import attention
from diffpeft.converters.formats.base import dotted_role
from diffpeft.converters.formats.peft import PREFIX
from diffpeft.errors import ConfigError, UnusedPatternWarning, shown
from diffpeft.llm.targets import inner_modules, meant, resolved
from diffpeft.methods import IA3Config
from diffpeft.methods.ia3 import FACTORS, is_feedforward
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.target import COMPILED, geometry_of, layers_of


def targeting(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> PeftConfig:
    """A copy of a config that means the layers of which there are tensors; with a RuntimeWarning if the config means others.

    Which side (IA)^3's vectors are on, the tensors say too. Raises ConfigError for `target_parameters`, which keys do not tell.
    """
    if config.target_parameters:
        raise ConfigError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`",
            where=shown(config.target_parameters),
            remedy="Inject the adapter without state_dict=.",
        )
    roles = {key: place for key in tensors if (place := dotted_role(_plain(key)))}
    read = {attention.read(layer) for layer, _ in roles.values()}
    layers = {layer for layer in read if attention.around(layer, read) is None}
    _warn_others(model, config, layers)
    config = copy.deepcopy(config)
    config.target_modules = _exactly(layers, inner_modules(model))
    if config.exclude_modules:
        config.exclude_modules = None
    if isinstance(config, IA3Config):
        vectors = {layer: tensors[key] for key, (layer, role) in roles.items() if role == FACTORS}
        config.feedforward_modules = _on_inputs(model, resolved(model, config), vectors)
    return config


def _plain(key: str) -> str:
    """A key without what a PeftModel or torch.compile puts before it."""
    return key.removeprefix(PREFIX).removeprefix(f"{COMPILED}.")


def _warn_others(model: nn.Module, config: PeftConfig, layers: Set[str]) -> None:
    """Say which modules of a model a config means, and the keys do not, and the other way round."""
    try:
        config = resolved(model, config)
    except ConfigError:  # there is no default for the model: the keys are all there is
        return
    targeted = meant(model, config).keys()
    sides = {"The PEFT config": targeted - layers, "The state_dict": (layers & inner_modules(model).keys()) - targeted}
    if more := [
        f"{side} contained these additional target modules: {sorted(others)}."
        for side, others in sides.items()
        if others
    ]:
        told = (
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
            "state_dict. This is not necessarily an issue and can be ignored if this was the intent."
        )
        warnings.warn(" ".join((told, *more, "")), UnusedPatternWarning, stacklevel=4)


def _exactly(layers: Set[str], names: Iterable[str]) -> set[str] | str:
    """Layers, so that none of the other names is meant: an expression where one ends as a layer is called."""
    ends = tuple(f".{layer}" for layer in layers)
    return _either(layers) if any(name.endswith(ends) for name in names if name not in layers) else {*layers}


def _either(layers: Iterable[str]) -> str:
    """The expression for whole names that means these."""
    return "|".join(map(re.escape, sorted(layers)))


def _on_inputs(model: nn.Module, config: IA3Config, vectors: Mapping[str, Tensor]) -> set[str] | str:
    """What `feedforward_modules` has to be for layers with these vectors: those on whose inputs one is."""
    modules = layers_of(model)
    inner = {
        layer
        for layer, vector in vectors.items()
        if layer in modules and _is_inner(modules[layer][0], layer, vector, config)
    }
    return _either(inner) if any(is_feedforward(inner, layer) for layer in vectors if layer not in inner) else inner


def _is_inner(module: nn.Module, layer: str, vector: Tensor, config: IA3Config) -> bool:
    """Whether a vector multiplies a layer's inputs. What its shape does not tell, the config says."""
    g = geometry_of(module)
    ones = [1] * len(g.kernel)
    inner, outer = (1, g.in_, *ones), (1, g.out, *ones) if g.kernel else (g.out, 1)
    if inner == outer or tuple(vector.shape) not in (inner, outer):
        return is_feedforward(config.feedforward_modules, layer)
    return tuple(vector.shape) == inner
