"""`full` and `norm`: what they take, and LyCORIS's modules for them."""

from __future__ import annotations

import re

import pytest
import torch
from oracles import INPUTS, LAYERS, close, geometry_of, layer_of
from torch import nn

import diffpeft
from diffpeft.layers.slot import Part, Piece, Slot
from diffpeft.methods import Full, Geometry, Norm, Spec
from diffpeft.model.attach import install
from diffpeft.model.mix import Adapter
from diffpeft.model.plan import Plan
from diffpeft.model.state import entries_of

EMBEDDING = Geometry(6, 10, lookup=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_diff_is_lycoris(kind):
    from lycoris.modules.full import FullModule

    layer = layer_of(kind)
    diff, shift = torch.randn_like(layer.weight), torch.randn_like(layer.bias)
    theirs = FullModule("l", layer, multiplier=1.0).double()
    theirs.weight.data, theirs.bias.data = diff.clone(), shift.clone()
    spec = Spec(geometry_of(layer), alpha=7.0)
    W, b = theirs.get_merged_weight()
    close(Full.weight(layer.weight, Full.adopt({"diff": diff}, spec), spec), W)
    close(layer.bias + shift, b)
    x = torch.randn(*INPUTS[kind], dtype=torch.float64)
    model = nn.Sequential(layer)
    slot = Slot([Piece("full", {"diff": diff}, None, spec)], {"diff_b": shift}, trainable=False)
    plan = Plan()
    install(plan, "", {"0": layer}, {"0": slot}, None, Adapter("a", ("0",)), 1.0)
    plan.commit()
    y = model(x)
    diffpeft.fuse(model)
    close(model(x), y)
    close(layer.weight, W)
    close(layer.bias, b)


@pytest.mark.parametrize("kind", ["layer norm", "group norm"])
def test_a_norm_is_lycoris(kind):
    from lycoris.modules.norms import NormModule

    layer = {"layer norm": nn.LayerNorm(6), "group norm": nn.GroupNorm(2, 6)}[kind].double()
    theirs = NormModule("l", layer, 1.0).double()
    p = {"w_norm": torch.randn(6).double(), "b_norm": torch.randn(6).double()}
    theirs.w_norm.data, theirs.b_norm.data = p["w_norm"].clone(), p["b_norm"].clone()
    spec = Spec(Geometry(6, 1))
    W, b = theirs.get_merged_weight()
    close(Norm.weight(layer.weight.view(6, 1), Norm.adopt(p, spec), spec).flatten(), W)
    close(layer.bias + Norm.bias(layer.bias, p, spec), b)


def test_a_value_takes_the_place_of_the_weight():
    spec, value = Spec(Geometry(8, 6, (3,))), torch.randn(8, 6, 3)
    torch.testing.assert_close(Full.weight(torch.randn(8, 6, 3), {"set_weight": value}, spec), value)
    assert Full.additive(["diff"]) and not Full.additive(["set_weight"])
    assert Part(Full, ("diff",), None, spec).additive and not Part(Full, ("set_weight",), None, spec).additive


def test_a_table_of_embeddings_is_not_transposed():
    spec, diff, W = Spec(EMBEDDING), torch.randn(10, 6), torch.randn(6, 10)
    assert not Full.check({"diff": diff}, spec)
    torch.testing.assert_close(Full.weight(W, Full.adopt({"diff": diff}, spec), spec), W + diff.T)


@pytest.mark.parametrize(
    ("method", "geometry", "shapes", "said"),
    [
        (Full, Geometry(8, 6), {"diff": (8, 6)}, ""),
        (Full, Geometry(8, 6, (1, 1)), {"diff": (8, 6)}, ""),
        (Full, Geometry(8, 6), {"set_weight": (8, 6, 1, 1)}, ""),
        (Full, Geometry(8, 1), {"diff": (8,)}, ""),
        (Full, Geometry(8, 6), {}, ""),
        (Full, Geometry(8, 6), {"diff": (6, 8)}, r"diff \(8, 6\), not \(6, 8\)"),
        (Full, Geometry(8, 6, (3, 3), groups=2), {"diff": (8, 6, 3, 3)}, r"\(8, 3, 3, 3\)"),
        (Full, Geometry(8, 6), {"diff": (8, 6), "set_weight": (8, 6)}, "one of them"),
        (Full, EMBEDDING, {"diff": (6, 10)}, r"\(10, 6\)"),
        (Norm, Geometry(8, 1), {"w_norm": (8,), "b_norm": (8,)}, ""),
        (Norm, Geometry(8, 1), {"b_norm": (8,)}, ""),
        (Norm, Geometry(8, 1), {"w_norm": (7,)}, r"w_norm \(8,\), not \(7,\)"),
        (Norm, Geometry(8, 6), {"w_norm": (8,)}, "for a norm"),
        (Norm, Geometry(0, 1), {"w_norm": (8,)}, r"\(0,\), not \(8,\)"),
    ],
)
def test_what_fits(method, geometry, shapes, said):
    found = method.check({role: torch.zeros(shape) for role, shape in shapes.items()}, Spec(geometry))
    assert re.search(said, found) if said else not found


def test_the_rank_is_the_most_that_the_shape_allows():
    assert Full.rank({"diff": torch.zeros(8, 2, 3)}) == 6
    assert Full.rank({"diff": torch.zeros(8)}) == 1
    assert Full.rank({}) == 0


def test_what_lies_beside_a_part_comes_back_with_it():
    spec = Spec(Geometry(4, 3))
    slot = Slot([Piece("full", {"diff": torch.ones(4, 3)}, None, spec)], {"diff_b": torch.ones(4)}, trainable=False)
    (entry,) = entries_of("x", slot)
    assert (entry.method, set(entry.tensors), entry.shape) == ("full", {"diff", "diff_b"}, (4, 3))
