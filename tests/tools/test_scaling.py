"""An entry times a number does that many times as much to every weight and bias, for every form of every method that has such an entry."""

from __future__ import annotations

import pytest
import torch

from diffpeft import METHODS, CannotConvertError, ConfigError, io
from diffpeft.bundle import Entry
from diffpeft.definition import definition_of
from diffpeft.model.state import bundle_of
from diffpeft.tools.scaling import scaled
from tests.contracts.kinds import FORMS, fits, give, layer
from tests.pairwise import params

KINDS = ("linear", "linear tall", "conv2d strided", "embedding")
CURVED = {"dora", "oft", "boft", "hra", "road"}  # at half a strength they are none of their kind
CELLS = [(form, kind) for form in FORMS for kind in KINDS if fits(form, kind)]
ALL = [(form, kind, in_alpha) for form, kind in CELLS for in_alpha in (True, False)]
QUICK = [(form, kind, True) for form, kind in CELLS if kind == "linear" or "tucker" in form]


def change(entry: Entry, W: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f(W) - W and what is added to a bias b, in float64."""
    method, p, spec = definition_of(entry, W)
    delta = method.weight(W, p, spec) - W if {*p} - {"diff_b"} else torch.zeros_like(W)
    shift = method.bias(b, p, spec)
    (beside,) = io.load([entry.tensors["diff_b"]]) if "diff_b" in entry.tensors else (0.0,)
    return delta, (torch.zeros_like(b) if shift is None else shift) + beside


def entry_of(form: str, kind: str, randomize) -> tuple[Entry, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, _ = layer(kind)
    give(model, form)
    randomize(model)
    (entry,) = bundle_of(model, "default", "").entries
    W = torch.randn(entry.shape, dtype=torch.float64)
    return entry, W, torch.randn(entry.shape[0], dtype=torch.float64)


@pytest.mark.parametrize(("form", "kind", "in_alpha"), params(ALL, QUICK))
def test_strength_one_of_the_scaled_is_strength_s_of_the_entry(form, kind, in_alpha, randomize):
    entry, W, b = entry_of(form, kind, randomize)
    if FORMS[form].method in CURVED or "set_weight" in entry.tensors:
        with pytest.raises(CannotConvertError, match="Set its strength where it is used"):
            scaled(entry, 0.7, in_alpha=in_alpha)
        return
    before = change(entry, W, b)
    for s in (0.7, -1.3, 0.0, 2.0):
        new = scaled(entry, s, in_alpha=in_alpha)
        assert (new.method, new.shapes, new.layer) == (entry.method, entry.shapes, entry.layer)
        for now, was in zip(change(new, W, b), before, strict=True):
            assert torch.allclose(now, s * was, rtol=1e-12, atol=1e-12 * was.abs().max().item())
    assert before[0].abs().max() > 1e-3


def test_every_method_was_asked():
    assert {FORMS[form].method for form, _ in CELLS} | {"norm"} == {*METHODS}


def test_a_norm_too():
    tensors = {"w_norm": io.handle(torch.randn(6)), "b_norm": io.handle(torch.randn(6))}
    new = scaled(Entry("norm", "unet.norm", tensors), -0.25)
    for role in tensors:
        assert torch.equal(io.load([new.tensors[role]])[0], io.load([tensors[role]])[0] * -0.25)


def test_one_changes_nothing_and_factors_keep_their_bytes():
    A, B = torch.randn(4, 6).half(), torch.randn(6, 4).half()
    alpha = torch.tensor([3.0]).half()
    entry = Entry("lora", "unet.x", {"lora_A": io.handle(A), "lora_B": io.handle(B)}, io.handle(alpha))
    assert scaled(entry, 1.0) is entry
    new = scaled(entry, 0.1)
    assert all(io.same(new.tensors[role], entry.tensors[role]) for role in entry.tensors)
    assert (new.alpha.dtype, new.alpha.shape) == ("F32", (1,)) and io.number(new.alpha) == pytest.approx(0.3, rel=1e-7)
    turned = scaled(entry, -0.1)
    assert io.number(turned.alpha) > 0 and torch.equal(io.load([turned.tensors["lora_B"]])[0], -B)


def test_a_change_of_the_bias_beside_goes_along():
    tensors = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(6, 2), "diff_b": torch.randn(6)}
    entry = Entry("lora", "unet.x", {role: io.handle(t) for role, t in tensors.items()}, 2.0)
    (shift,) = io.load([scaled(entry, -0.5).tensors["diff_b"]])
    assert torch.equal(shift, tensors["diff_b"] * -0.5)


@pytest.mark.parametrize("by", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(by):
    with pytest.raises(ConfigError, match="finite"):
        scaled(Entry("lora", "unet.x", {}), by)
