"""The kinds of layers: the only place that knows Linear from Conv from Embedding. One file a kind, one line here.

A site lends methods the layer's operation (`methods.Operation`) and gives its weight in canonical form, [out, in / groups, *kernel].
"""

from __future__ import annotations

from torch import nn

from diffpeft.layers.backends import Kind
from diffpeft.layers.sites.attention import AttentionSite
from diffpeft.layers.sites.base import LayerSite
from diffpeft.layers.sites.conv import ConvSite, TransposedConvSite
from diffpeft.layers.sites.embedding import EmbeddingSite
from diffpeft.layers.sites.linear import LinearSite, TransposedLinearSite
from diffpeft.layers.sites.norm import NormSite

SITES: tuple[type[LayerSite], ...] = (
    LinearSite,
    TransposedLinearSite,
    EmbeddingSite,
    ConvSite,
    TransposedConvSite,
    NormSite,
    AttentionSite,
)


def site_of(cls: type[nn.Module]) -> type[LayerSite] | None:
    """The kind of site that modules of this class are, or None if no method fits them."""
    if cls not in _known:
        _known[cls] = _site(cls)
    return _known[cls]


def register(cls: type[nn.Module], like: type[nn.Module]) -> None:
    """Let modules of a class, and of those derived from it, be layers as those of another are: of the same attributes and shapes. In this process."""
    site = site_of(like)
    assert site is not None, like
    _registered[cls] = site
    _known.clear()


_known: dict[type[nn.Module], type[LayerSite] | None] = {}
_registered: dict[type[nn.Module], type[LayerSite]] = {}


def is_registered(cls: type[nn.Module]) -> bool:
    """Whether modules of a class are layers because somebody said so."""
    return any(base in _registered for base in cls.__mro__)


def _site(cls: type[nn.Module]) -> type[LayerSite] | None:
    if is_registered(cls):
        return next(_registered[base] for base in cls.__mro__ if base in _registered)
    names = {(c.__module__, c.__name__) for c in cls.__mro__}

    def fits(kind: type[nn.Module] | Kind) -> bool:
        return kind in names if isinstance(kind, tuple) else issubclass(cls, kind)

    return next((s for s in SITES if any(map(fits, s.kinds)) or cls.__name__.endswith(s.endings)), None)


def parameter_names(module: nn.Module) -> tuple[str, str]:
    """What a module calls its weight and its bias, adapted or not."""
    site = site_of(getattr(type(module), "_diffpeft_base", type(module)))
    return ("weight", "bias") if site is None else (site.weight_name, site.bias_name)


__all__ = [
    "AttentionSite",
    "ConvSite",
    "EmbeddingSite",
    "LinearSite",
    "NormSite",
    "SITES",
    "LayerSite",
    "TransposedConvSite",
    "TransposedLinearSite",
    "is_registered",
    "parameter_names",
    "register",
    "site_of",
]
