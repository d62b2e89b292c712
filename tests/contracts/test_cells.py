"""The laws of one form on one kind of layer: a model is built for a cell, and every claim is made of it in turn.

In float64, where equality to the definition is claimed, and once more in the precisions that people use.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import diffpeft
from diffpeft import detach, set_adapters, to_lora
from diffpeft.methods import costs
from diffpeft.model.state import slots_of
from tests.contracts.definition import defined
from tests.contracts.kinds import EXACT, FORMS, Form, SelfAttention, give, layer, weight_of
from tests.contracts.pairs import every_cell, turn

STRENGTHS = (1.0, 0.5, -0.7, 2.5)
MANY = 32  # times the positions of an input: where a product is cheaper in the weight


@dataclass
class Cell:
    """A model of one layer with an adapter, an input, and what the model was and gave before."""

    form: Form
    model: nn.Module
    x: Tensor
    plain: nn.Module
    base: Tensor

    @classmethod
    def of(cls, form: str, kind: str, dtype: torch.dtype = torch.float64) -> Cell:
        model, x = layer(kind, dtype)
        plain = copy.deepcopy(model)
        return cls(FORMS[form], model, x, plain, plain(x))

    def at(self, s: float) -> Cell:
        set_adapters(self.model, {"default": s})
        return self

    def defined(self, s: float, x: Tensor | None = None) -> Tensor:
        return defined(self.model, self.x if x is None else x, [("default", s)], self.plain)

    def fresh(self) -> Tensor:
        """What the model gives. Torch orders the sums of a product otherwise if its weight asks for a gradient, as one that is read does then."""
        with torch.set_grad_enabled(not isinstance(self.model[0], SelfAttention)):
            return self.model(self.x)

    @property
    def slot(self):
        return slots_of(self.model, "default")["0"]


def changes_no_output(cell: Cell) -> None:
    torch.testing.assert_close(cell.fresh(), cell.base, rtol=0, atol=cell.form.identity)


def is_linear_in_its_strength(cell: Cell) -> None:
    for s in STRENGTHS:
        torch.testing.assert_close(cell.at(s).model(cell.x), cell.defined(s), **EXACT)


def is_the_base_at_strength_0(cell: Cell) -> None:
    assert not torch.equal(cell.at(1.0).model(cell.x), cell.base)
    assert torch.equal(cell.at(0.0).model(cell.x), cell.base)
    set_adapters(cell.model, {})
    assert torch.equal(cell.model(cell.x), cell.base)


def may_be_fused_and_unfused(cell: Cell) -> None:
    weight = weight_of(cell.model[0])
    want, before = cell.at(0.6).model(cell.x), weight.clone()
    diffpeft.fuse(cell.model)
    assert not torch.equal(weight, before)
    torch.testing.assert_close(cell.model(cell.x), want, **EXACT)
    diffpeft.unfuse(cell.model)
    assert torch.equal(weight, before)
    torch.testing.assert_close(cell.model(cell.x), want, **EXACT)


def has_the_gradients_of_its_definition(cell: Cell) -> None:
    """By every route that the cost models know for such layers; some are open at strength 1 only."""
    for s in (1.0, 0.7):
        has_the_gradients_at(cell.at(s), s)


def has_the_gradients_at(cell: Cell, s: float) -> None:
    x = cell.x.detach().clone().requires_grad_(cell.x.is_floating_point())
    inputs = ([x] if x.requires_grad else []) + list(cell.slot.parameters())
    direction = torch.randn_like(cell.base)
    wants = torch.autograd.grad((cell.defined(s, x) * direction).sum(), inputs, allow_unused=True)
    for route in routes(cell):
        with forced(route):
            grads = torch.autograd.grad((cell.model(x) * direction).sum(), inputs, allow_unused=True)
        for grad, want in zip(grads, wants, strict=True):
            assert (grad is None) == (want is None), route
            if grad is not None:
                torch.testing.assert_close(grad, want, **EXACT, msg=lambda text, route=route: f"{route}: {text}")


def routes(cell: Cell) -> range:
    """The ways that cost models weigh for this layer, by number; one where nothing is weighed."""
    weighed = [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "cheapest", lambda what, dtype, ways: weighed.append(len(ways)) or next(iter(ways)))
        cell.model(cell.x)
    return range(max(weighed))


@contextmanager
def forced(route: int) -> Iterator[None]:
    """The cost models find this way the cheapest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "cheapest", lambda what, dtype, ways: list(ways)[route])
        yield


@torch.no_grad()
def is_the_same_without_gradients(cell: Cell) -> None:
    """Where other ways are open; with a long input a product is cheaper in the weight."""
    long = cell.x.repeat(MANY, *(1 for _ in cell.x.shape[1:]))
    for x in (cell.x, long) if cell.base.shape[0] == cell.x.shape[0] else (cell.x,):
        torch.testing.assert_close(cell.at(0.7).model(x), cell.defined(0.7, x), **EXACT)


def becomes_a_lora(cell: Cell) -> None:
    want = cell.at(0.7).model(cell.x)
    lost = to_lora(cell.model, "default")
    assert set(lost) == {"0"} and lost["0"] < 1e-13
    assert cell.slot.methods == ("lora",) and cell.slot.weight.requires_grad
    torch.testing.assert_close(cell.model(cell.x), want, **EXACT)


CLAIMS = (
    is_linear_in_its_strength,
    is_the_base_at_strength_0,
    may_be_fused_and_unfused,
    has_the_gradients_of_its_definition,
    is_the_same_without_gradients,
    becomes_a_lora,
)


@every_cell
def test_an_adapter_keeps_the_laws_and_leaves_no_trace(form, kind, randomize, trace, subtests):
    cell = Cell.of(form, kind)
    cell.model[0].register_forward_hook(lambda module, args, out: out)  # someone else's, which stays
    before, keys = trace(cell.model), list(cell.model.state_dict())
    give(cell.model, form)
    with subtests.test("fresh"):
        changes_no_output(cell)
    randomize(cell.model)
    for claim in CLAIMS:
        with subtests.test(claim.__name__):
            claim(cell)
    with subtests.test("detached"):
        give(cell.model, form, "b.c")
        detach(cell.model, "default")
        detach(cell.model, "b.c")
        assert trace(cell.model) == before and list(cell.model.state_dict()) == keys
        assert torch.equal(cell.model(cell.x), cell.base)


# ---- in the precisions that people use


def near(cell: Cell, form: Form) -> float:
    """How far a fresh adapter may be from the base: 0, or where its parts cancel a few roundings."""
    if form.identity == math.inf:
        return math.inf
    return 4 * cell.base.abs().max().item() * torch.finfo(cell.base.dtype).eps if form.identity else 0


@every_cell
def test_an_adapter_keeps_to_the_precision_of_its_layer(form, kind, randomize, subtests):
    half = turn((torch.bfloat16, torch.float16), form, kind)
    for dtype in (torch.float32, half):
        cell = Cell.of(form, kind, dtype)
        give(cell.model, form)
        with subtests.test(f"fresh in {dtype}"):
            assert cell.form.tensors or {p.dtype for p in cell.slot.parameters()} == {torch.float32}
            torch.testing.assert_close(cell.fresh(), cell.base, rtol=0, atol=near(cell, cell.form))
        randomize(cell.model, dtype=torch.float32)
        if dtype == half:
            with subtests.test(f"{dtype}"):
                gives_the_definition_to_its_precision(cell)
            continue
        with subtests.test("strength 0"):
            is_the_base_at_strength_0(cell)
        if kind != "embedding":  # autocast leaves lookups alone
            with subtests.test("autocast"):
                follows_autocast(cell.at(1.0))


def gives_the_definition_to_its_precision(cell: Cell) -> None:
    y, exact = cell.model(cell.x), copy.deepcopy(cell.model).double()
    want = exact(cell.x.double() if cell.x.is_floating_point() else cell.x)
    assert y.dtype == cell.base.dtype and y.isfinite().all()
    # base, adapted input or rank activations, update and sum are rounded once each, in sums of up to 36 products
    bound = 8 * max(want.abs().max().item(), 8) * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=0, atol=bound)


def follows_autocast(cell: Cell) -> None:
    y = cell.model(cell.x)
    with torch.autocast("cpu", torch.bfloat16):
        z = cell.model(cell.x)
        z.float().sum().backward()
    assert z.dtype == torch.bfloat16
    # as above, and the input and the tensors are rounded too
    torch.testing.assert_close(z.float(), y, rtol=0, atol=16 * max(y.abs().max().item(), 8) * 2**-8)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in cell.slot.parameters())
