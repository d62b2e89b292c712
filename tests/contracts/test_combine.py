"""Any method as a LoRA and several adapters as one: on every kind of layer, against the definition and PEFT's own functions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    UnknownNameError,
    attach,
    combine,
    fuse,
    get_adapters,
    set_adapters,
    to_lora,
)
from diffpeft.model.state import slots_of
from tests.contracts.kinds import EXACT, SelfAttention, blocks, config, give, layer, weight_of
from tests.contracts.pairs import every_kind


@every_kind
def test_a_cut_reports_what_it_lost(kind, randomize):
    model, _ = layer(kind)
    give(model, "loha", r=3)
    randomize(model)
    exact = _delta(model)
    (lost,) = to_lora(model, "default", name="small", rank=1).values()
    assert diffpeft.get_adapters(model)["small"].ranks == (1,) and not diffpeft.get_adapters(model)["small"].active
    small = _delta(model, "small")
    assert lost == pytest.approx(((exact - small).norm() / exact.norm()).item(), rel=1e-9)
    best = torch.linalg.svdvals(exact.flatten(1))
    assert lost == pytest.approx((best[1:].norm() / best.norm()).item(), rel=1e-9, abs=1e-12)  # Eckart and Young


def _delta(model, name="default"):
    slot = slots_of(model, name)["0"]
    (part,) = slot.parts
    p = slot.tensors_of(part)
    return (part.method.scale(p, part.spec) * part.method.delta(p, part.spec)).detach()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_least_rank_that_holds_it(energy, randomize):
    model, _ = layer("linear")
    give(model, "lora", r=6)
    randomize(model)
    spectrum = torch.linalg.svdvals(_delta(model)).square()
    (lost,) = to_lora(model, "default", energy=energy).values()
    rank = slots_of(model, "default")["0"].rank
    assert 1 - lost**2 >= energy - 1e-12
    assert rank == int((spectrum.cumsum(0) / spectrum.sum() < energy - 1e-12).sum()) + 1


@every_kind
def test_cat_is_the_weighted_sum_for_all_methods(kind, randomize):
    model, x = layer(kind)
    weights = {}
    for i, form in enumerate(("lora", "lora, pissa", "loha", "lokr", "lokr, both full", "dora", "oft", "boft, output")):
        give(model, form, f"a{i}")
        randomize(model, f"a{i}")
        weights[f"a{i}"] = (-1) ** i * (0.3 + i / 10)
    set_adapters(model, {})
    plain = response(model, x)
    want = plain.clone()
    for name, w in weights.items():
        set_adapters(model, {name: w})
        want += response(model, x) - plain
    for how in ("cat", "linear"):
        (lost,) = combine(model, weights, name=how, how=how).values()
        assert lost < 1e-12
        set_adapters(model, {how: 1.0})
        torch.testing.assert_close(response(model, x), want, rtol=1e-11, atol=1e-11)  # eight sums


def response(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output, or of what is not linear in its weight, that weight with the adapters in it."""
    if not isinstance(model[0], SelfAttention):
        return model(x)
    model = copy.deepcopy(model)
    if any(status.active for status in get_adapters(model).values()):
        fuse(model)
    return weight_of(model[0]).detach()


def test_cat_of_loras_keeps_their_factors(randomize):
    model, _ = layer("linear")
    for name, r in (("a", 1), ("b", 2)):
        give(model, "lora", name, r=r)
        randomize(model, name)
    combine(model, {"a": 0.5, "b": -2.0}, name="c")
    a, b, c = (slots_of(model, n)["0"] for n in "abc")
    assert torch.equal(c.lora_A, torch.cat([a.lora_A, b.lora_A]))
    torch.testing.assert_close(c.lora_B, torch.cat([0.5 * a.scale * a.lora_B, -2 * b.scale * b.lora_B], 1), **EXACT)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties", "magnitude"])
def test_pruned_sums_are_pefts(how, sign, randomize):
    from peft.utils import merge_utils

    weights = {"a": 0.7, "b": -0.3, "c": 1.2}
    model = torch.nn.Sequential(torch.nn.Linear(12, 10))
    for name in weights:
        attach(model, config("lora", r=3), name, targets=["0"])
        randomize(model, name)
    deltas, w = [_delta(model, name) for name in weights], torch.tensor(list(weights.values()), dtype=torch.float64)
    theirs = {
        "ties": lambda: merge_utils.ties(deltas, w, 0.6, sign),
        "dare": lambda: merge_utils.dare_linear(deltas, w, 0.6),
        "dare_ties": lambda: merge_utils.dare_ties(deltas, w, 0.6, sign),
        "magnitude": lambda: merge_utils.magnitude_prune(deltas, w, 0.6),
    }
    torch.manual_seed(3)
    want = theirs[how]()
    torch.manual_seed(3)  # DARE draws as PEFT draws
    combine(model, weights, name="m", how=how, density=0.6, majority_sign=sign, rank=10)
    torch.testing.assert_close(_delta(model, "m"), want, **EXACT)
    assert diffpeft.get_adapters(model)["m"].ranks == (10,)
    (lost,) = combine(model, weights, name="cut", how=how, density=0.6, majority_sign=sign).values()
    assert diffpeft.get_adapters(model)["cut"].ranks == (3,) and 0 < lost < 1


def test_an_adapter_on_some_layers_only_is_combined_there(randomize):
    model = blocks(2)
    attach(model, config("lora"), "a", targets=["0.up", "1.up"])
    attach(model, config("loha"), "b", targets=["1.up", "1.down"])
    assert set(combine(model, {"a": 1.0, "b": 1.0}, name="c")) == {"0.up", "1.up", "1.down"}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: combine(m, {"a": 1.0, "x": 1.0}, name="c"), UnknownNameError),
        (lambda m: combine(m, {"a": 1.0}, name="a"), AdapterStateError),
        (lambda m: combine(m, {"a": float("nan")}, name="c"), ConfigError),
        (lambda m: combine(m, {}, name="c"), ConfigError),
        (lambda m: combine(m, {"a": 1.0}, name="c", how="concat"), ConfigError),
        (lambda m: combine(m, {"a": 1.0}, name="c", how="svd", rank=0), ConfigError),
        (lambda m: combine(m, {"a": 1.0}, name="c", how="ties", density=0), ConfigError),
        (lambda m: to_lora(m, "x"), UnknownNameError),
        (lambda m: to_lora(m, "a", name="a"), AdapterStateError),
        (lambda m: to_lora(m, "a", rank=0), ConfigError),
        (lambda m: to_lora(m, "a", energy=1.5), ConfigError),
        (lambda m: to_lora(m, "a", rank=2, energy=0.5), ConfigError),
    ],
)
def test_what_cannot_be_combined_changes_nothing(call, error, trace):
    model, _ = layer("linear")
    give(model, "loha", "a")
    before = trace(model)
    with pytest.raises(error):
        call(model)
    assert trace(model) == before
