"""GLoRA against LyCORIS's forward through the weight (its bypass forward applies the scale twice), in float64."""

from __future__ import annotations

import pytest
import torch
from oracles import INPUTS, LAYERS, close, geometry_of, layer_of, op_on

from diffpeft.methods import Geometry, GLoRA, Spec
from diffpeft.methods.glora import SWAPPED

SUPPORTED = [kind for kind in LAYERS if kind != "grouped"]


def made(g, r=3, core=False, ones=True):
    one = [1] * len(g.kernel) if ones else []
    shapes = {
        "glora_a1": (g.in_, r, *one),
        "glora_a2": (r, g.in_, *one),
        "glora_b1": (g.out, r, *one),
        "glora_b2": (r, g.in_, *(one if core else g.kernel)),
    }
    if core:
        shapes["glora_bm"] = (r, r, *g.kernel)
    return {role: torch.randn(*shape, dtype=torch.float64) for role, shape in shapes.items()}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_weight_is_lycoris(kind):
    from lycoris.modules.glora import GLoRAModule

    layer = layer_of(kind)
    theirs = GLoRAModule("l", layer, lora_dim=3, alpha=1.5).double()
    spec = Spec(geometry_of(layer), alpha=1.5)
    p = made(spec.geometry)
    for role, t in p.items():
        getattr(theirs, role.removeprefix("glora_")).weight.data = t.clone()
    assert not GLoRA.check(p, spec)
    W = GLoRA.weight(layer.weight, GLoRA.adopt(p, spec), spec)
    close(W, theirs.get_merged_weight()[0])
    x = torch.randn(*INPUTS[kind], dtype=torch.float64)
    theirs.apply_to()
    close(layer_of_weight(layer, x, W), theirs(x))


def layer_of_weight(layer, x, W):
    y = op_on(layer, x, W)
    return y + layer.bias.view(-1, *(1 for _ in y.shape[2:])) if W.dim() > 2 else y + layer.bias


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "wide kernel"])
def test_a_core_is_lycoris(kind):
    from lycoris.modules.glora import _glora_weight

    layer = layer_of(kind)
    spec = Spec(geometry_of(layer), alpha=1.5)
    p = made(spec.geometry, core=True)
    assert not GLoRA.check(p, spec)
    args = (p[role] for role in GLoRA.roles)
    close(
        GLoRA.weight(layer.weight, GLoRA.adopt(p, spec), spec), layer.weight + _glora_weight(layer.weight, *args, 0.5)
    )


@pytest.mark.parametrize("geometry", [Geometry(8, 6), Geometry(6, 6), Geometry(8, 6, (3, 3)), Geometry(6, 6, (1, 1))])
def test_old_files_are_turned_around(geometry):
    """dW = s (b2 b1 + W a2 a1)."""
    spec, p = Spec(geometry, alpha=1.5), made(geometry)
    old = {SWAPPED[role]: t for role, t in p.items()}
    assert not GLoRA.check(old, spec)
    W = torch.randn(geometry.shape, dtype=torch.float64)
    want = 0.5 * (
        (old["glora_b2"].flatten(1) @ old["glora_b1"].flatten(1)).reshape(W.shape)
        + torch.einsum("oi...,ij->oj...", W, old["glora_a2"].flatten(1) @ old["glora_a1"].flatten(1))
    )
    close(GLoRA.weight(W, GLoRA.adopt(old, spec), spec), W + want)
    again = GLoRA.adopt(GLoRA.adopt(old, spec), spec)
    assert all(torch.equal(again[role], t) for role, t in p.items())


def test_where_old_and_new_look_alike_it_is_new():
    spec, p = Spec(Geometry(4, 4)), made(Geometry(4, 4), r=4)
    assert all(torch.equal(t, p[role]) for role, t in GLoRA.adopt(p, spec).items())


def test_factors_may_come_without_the_axes_of_1():
    spec, p = Spec(Geometry(8, 6, (1, 1))), made(Geometry(8, 6, (1, 1)))
    flat = {role: t.flatten(1) for role, t in p.items()}
    assert not GLoRA.check(flat, spec)
    assert all(torch.equal(t, p[role]) for role, t in GLoRA.adopt(flat, spec).items())


@pytest.mark.parametrize(
    ("geometry", "change", "said"),
    [
        (Geometry(8, 6, (3, 3), groups=2), {}, "in groups"),
        (Geometry(8, 6), {"glora_b2": None}, "glora_b2 missing"),
        (Geometry(8, 6), {"glora_b1": (7, 3)}, r"glora_b1 \(8, 3\), not \(7, 3\)"),
        (Geometry(8, 6), {"glora_a1": (6, 2)}, "glora_a1"),
        (Geometry(8, 6, (3, 3)), {"glora_b2": (3, 6, 1, 1)}, "glora_b2"),
    ],
)
def test_what_does_not_fit_is_said(geometry, change, said):
    import re

    p = made(geometry) | {role: shape and torch.zeros(shape) for role, shape in change.items()}
    assert re.search(said, GLoRA.check({role: t for role, t in p.items() if t is not None}, Spec(geometry)))


def test_the_scale_is_alpha_by_rank():
    p = made(Geometry(8, 6), r=4)
    assert GLoRA.scale(p, Spec(Geometry(8, 6))) == 1 and GLoRA.scale(p, Spec(Geometry(8, 6), 2.0)) == 0.5
