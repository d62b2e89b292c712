"""What the tests of methods share: layers, a site for `init`, PEFT's layer with given tensors, and agreement."""

import importlib

import torch
from torch import nn

from diffpeft.layers.sites import ConvSite, EmbeddingSite, LinearSite
from diffpeft.methods import Site

LAYERS = {
    "linear": lambda: nn.Linear(24, 36),
    "conv1d": lambda: nn.Conv1d(24, 36, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(24, 36, 3, padding=1),
    "wide kernel": lambda: nn.Conv2d(24, 36, (3, 5), stride=(2, 1), padding=(0, 2)),
    "1x1": lambda: nn.Conv2d(24, 36, 1),
    "grouped": lambda: nn.Conv2d(24, 36, 3, groups=2),
}
INPUTS = {
    "linear": (2, 5, 24),
    "conv1d": (2, 24, 9),
    "conv2d": (2, 24, 6, 7),
    "wide kernel": (2, 24, 7, 8),
    "1x1": (2, 24, 4, 3),
    "grouped": (2, 24, 5, 5),
}


def site(geometry, kind=None):
    """A layer's site, in float64: of a linear layer, or an embedding."""
    if geometry.lookup:
        return EmbeddingSite(nn.Embedding(geometry.in_, geometry.out).double())
    return (kind or LinearSite)(nn.Linear(geometry.in_, geometry.out).double())


def layer_of(kind):
    return LAYERS[kind]().double()


def geometry_of(layer):
    return (LinearSite if isinstance(layer, nn.Linear) else ConvSite).geometry_of(layer)


def fresh(method, config, geometry, name="layer", **options):
    return method.init(config, Site(name, geometry, lambda: None), **options)


def random(shapes):
    return {role: torch.randn(*shape, dtype=torch.float64) for role, shape in shapes.items()}


def peft_layer(kind, layer, config, tensors=None):
    """PEFT's layer around `layer`, with these tensors if given."""
    name = next(n for n in ("Linear", "Conv1d", "Conv2d") if isinstance(layer, getattr(nn, n)))
    theirs = getattr(importlib.import_module(f"peft.tuners.{kind}.layer"), name)(
        layer, "default", config=config, r=config.r, alpha=config.alpha
    )
    for role, t in (tensors or {}).items():
        parameter = getattr(theirs, role)["default"]
        assert parameter.shape == t.shape, role
        parameter.data = t.clone()
    return theirs


def peft_tensors(theirs):
    """The tensors of a layer of PEFT, by role, in the order in which it draws them."""
    return {
        r: getattr(theirs, r)["default"].detach() for r in theirs.adapter_layer_names if "default" in getattr(theirs, r)
    }


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.detach().abs().max().item())


def product(A, B, geometry):
    """B A in the shape of W."""
    return (B.flatten(1) @ A.flatten(1)).reshape(geometry.shape)


def op_on(layer, x, weight):
    """The layer's operation with another weight and no bias."""
    return (LinearSite if isinstance(layer, nn.Linear) else ConvSite)(layer).op(x, weight, False)
