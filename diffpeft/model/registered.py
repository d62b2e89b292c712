"""Layers of classes that nobody here knows, which are made like those of a class of PyTorch's."""

from __future__ import annotations

from torch import nn

from diffpeft.errors import ConfigError, shown
from diffpeft.layers.sites import is_registered, register, site_of


def is_known(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are layers without anybody having said so."""
    return site_of(cls) is not None and not is_registered(cls)


def register_like(name: str, module: nn.Module, cls: type[nn.Module], like: type[nn.Module]) -> None:
    """Let modules of a class be layers as those of another are, of which `module` is one. Raises ConfigError if it is not made so."""
    site = site_of(like)
    assert site is not None, like
    try:
        shape = tuple(site(module).weight().shape)
        wrong = "" if shape == site.geometry_of(module).shape else f"has a weight of shape {shape}"
    except AttributeError as error:
        wrong = f"is not made like one ({error})"
    if wrong:
        raise ConfigError(f"module {shown(name)} is registered as a {like.__name__}, and {wrong}")
    register(cls, like)
