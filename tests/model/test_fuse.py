"""Fusing and unfusing: which orders may be fused, what may happen in between, and that nothing ever drifts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoHaConfig,
    LoraConfig,
    NonFiniteError,
    OFTConfig,
    UnknownNameError,
    adapters,
    attach,
    fuse,
    get_adapters,
    set_adapters,
    unfuse,
    unload,
)

EXACT = dict(rtol=1e-12, atol=1e-12)  # float64, sums of a few products
CONFIGS = {"lora": LoraConfig(r=2), "loha": LoHaConfig(r=2), "oft": OFTConfig(oft_block_size=2)}


@pytest.fixture
def model(randomize):
    """Three adapters on two layers: two that commute and one that does not, active in this order."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(8, 4, 1).requires_grad_(False)).requires_grad_(False).double()
    net[1] = nn.Linear(8, 4).double().requires_grad_(False)
    for name, config in CONFIGS.items():
        attach(net, config, name, targets=["0", "1"])
        randomize(net, name)
    set_adapters(net, {"lora": 0.5, "loha": -0.7, "oft": 0.8})
    return net


x = torch.randn(3, 6, dtype=torch.float64)


def weights(model):
    return [p.clone() for n, p in model.named_parameters() if "adapters" not in n]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "names", [None, "lora", ["lora"], ["loha"], ["lora", "loha"], ["lora", "loha", "oft"], ["loha", "lora"]]
)
def test_a_prefix_or_what_commutes_may_be_fused(model, names):
    want, before = model(x), weights(model)
    fuse(model, names)
    assert not equal(weights(model), before)
    torch.testing.assert_close(model(x), want, **EXACT)
    fused = {n for n, status in get_adapters(model).items() if status.fused}
    assert fused == ({*CONFIGS} if names is None else {names} if isinstance(names, str) else set(names))
    assert all(status.active for status in get_adapters(model).values())
    unfuse(model)
    assert equal(weights(model), before)
    torch.testing.assert_close(model(x), want, **EXACT)


@pytest.mark.parametrize("names", ["oft", ["lora", "oft"]])
def test_what_does_not_commute_is_refused(model, names):
    before = weights(model)
    with pytest.raises(AdapterStateError, match="commute"):
        fuse(model, names)
    assert equal(weights(model), before)


def test_further_ones_may_be_fused_from_the_same_base(model):
    want, before = model(x), weights(model)
    fuse(model, "lora")
    fuse(model, "loha")
    step = weights(model)
    fuse(model)
    torch.testing.assert_close(model(x), want, **EXACT)
    unfuse(model)
    assert equal(weights(model), before)
    fuse(model, ["lora", "loha"])
    assert equal(weights(model), step)  # one after the other or at once: the same bytes


def test_fused_strengths_must_stay_and_others_may_change(model):
    fuse(model, "lora")
    fused = weights(model)
    for mix in ({"lora": 0.6}, {}, {"oft": 1.0, "lora": 0.5}):  # the last: oft would have to act before lora
        with pytest.raises(AdapterStateError):
            set_adapters(model, mix)
        with pytest.raises(AdapterStateError), adapters(model, mix):
            pass
    for mix in ({"lora": 0.5}, {"lora": 0.5, "oft": 2.0}, {"loha": 1.0, "lora": 0.5}):
        set_adapters(model, mix)
        got, same = model(x), weights(model)
        unfuse(model)
        torch.testing.assert_close(model(x), got, **EXACT)
        assert equal(same, fused)
        fuse(model, "lora")


def test_another_adapter_may_come_while_one_is_fused(model, randomize):
    fuse(model)
    attach(model, LoraConfig(r=1), "new", targets=["0"])
    randomize(model, "new")
    got = model(x)
    unfuse(model)
    torch.testing.assert_close(model(x), got, **EXACT)


def test_unloading_a_fused_adapter_unfuses_first(model):
    twin = copy.deepcopy(model)
    unload(twin)
    base = weights(twin)
    fuse(model)
    unload(model, "loha")
    assert equal(weights(model), base)
    assert not any(status.fused for status in get_adapters(model).values())
    fuse(model)
    unload(model)
    assert equal(weights(model), base) and type(model[0]) is nn.Linear


def test_without_the_base_there_is_no_way_back(model):
    want = model(x)
    fuse(model, keep_base="none")
    torch.testing.assert_close(model(x), want, **EXACT)
    before = weights(model)
    for call in (unfuse, unload):
        with pytest.raises(AdapterStateError, match="keep_base"):
            call(model)
    assert equal(weights(model), before)


def test_nothing_fused_is_nothing_to_unfuse(model):
    before = weights(model)
    unfuse(model)
    unfuse(nn.Linear(2, 2))
    assert equal(weights(model), before)


def test_fusing_twice_is_fusing_once(model):
    fuse(model)
    before = weights(model)
    with pytest.warns(UserWarning, match="already"):
        fuse(model)
    assert equal(weights(model), before)


def test_a_printed_layer_says_what_is_on_it(model):
    set_adapters(model, {"lora": 0.5, "oft": 0.25})
    fuse(model, "lora")
    text = repr(model[0])
    for said in ("lora=fused at 0.5", "oft=0.25", "loha=inactive", "lora, rank=2, scale=4", "bias=True"):
        assert said in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_cycles_leave_the_bytes(dtype, model):
    model.to(dtype)
    before = weights(model)
    for i in range(100):
        set_adapters(model, {"lora": 0.01 * i, "oft": 1 - 0.01 * i, "loha": -0.5})
        fuse(model, None if i % 3 else "lora")
        if i % 6 == 3:
            fuse(model)
        unfuse(model)
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_weight_is_rounded_once(dtype, model):
    model.to(dtype)
    wide = copy.deepcopy(model).double()
    fuse(model)
    fuse(wide)
    for a, b in zip(weights(model), weights(wide), strict=True):
        # fp32 keeps 2^-24 of each intermediate value; what lies that close to a tie may be rounded to the other side, one step away
        steps = (a.double() - b.to(dtype).double()).abs() / (b.abs() * torch.finfo(dtype).eps + 1e-12)
        assert (steps > 0).double().mean() < 0.01 and steps.max() <= 1.01


def test_the_parameters_stay_the_same_objects_and_follow_to(model):
    own = [p for n, p in model.named_parameters() if "adapters" not in n]
    before = weights(model)
    fuse(model)
    model.to(torch.float32)
    unfuse(model)
    assert [p for n, p in model.named_parameters() if "adapters" not in n] == own
    assert equal(weights(model), [p.float() for p in before])


def test_an_adapter_that_is_not_finite_is_refused(model):
    before = weights(model)
    with torch.no_grad():
        model[0].adapters["lora"].lora_A[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="0"):
        fuse(model)
    assert equal(weights(model), before)


def test_a_tied_weight_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    attach(model, LoraConfig(r=2, init_lora_weights=False), targets=["head"])
    with pytest.raises(AdapterStateError, match="tied"):
        fuse(model)


def test_an_offloaded_weight_is_refused():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LoraConfig(r=2), targets=["0"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="offloaded"):
        fuse(model)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: fuse(m, "lroa"), UnknownNameError),
        (lambda m: fuse(m, keep_base="disk"), ConfigError),
        (lambda m: (set_adapters(m, {"oft": 1.0}), fuse(m, "lora")), AdapterStateError),
        (lambda m: (set_adapters(m, {}), fuse(m)), AdapterStateError),
        (lambda m: fuse(nn.Linear(2, 2)), AdapterStateError),
    ],
)
def test_what_cannot_be_fused_is_said(model, call, error):
    with pytest.raises(error):
        call(model)


def test_a_component_keeps_its_own_strengths(pipe, image, randomize):
    attach(pipe, LoraConfig(r=2), "a", targets=["attn1.to_q", "fc1"])
    randomize(pipe, "a")
    set_adapters(pipe, {"a": {"unet": 0.5, "text_encoder": 0.0}})
    want = image(pipe)
    fuse(pipe)
    torch.testing.assert_close(image(pipe), want, rtol=1e-9, atol=1e-9)
    unfuse(pipe)
    assert torch.equal(image(pipe), want)
    assert diffpeft.get_adapters(pipe)["a"].strength == {"unet": 0.5, "text_encoder": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(640, 1300), nn.Conv2d(256, 320, 3, padding=1)], ids=["linear", "conv"])
def test_large_layers_are_fused_some_rows_at_a_time_to_the_same_weights(layer, dtype, monkeypatch):
    net = nn.Sequential(copy.deepcopy(layer)).to(dtype).requires_grad_(False)
    for name, r in (("a", 3), ("b", 5)):
        attach(net, LoraConfig(r=r, lora_alpha=2, init_lora_weights=False), name, targets=["0"])
    set_adapters(net, {"a": -0.7, "b": 1.3})
    found = []
    for some in (1 << 14, 1 << 40):
        monkeypatch.setattr("diffpeft.model.fuse.SOME", some)
        fuse(net)
        found.append(net[0].weight.clone())
        unfuse(net)
    # sums of fp32 in another order, rounded once: where they lie on different sides of a step they are one step apart
    close = dict(rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(*found, **close)
    assert not torch.allclose(found[0], net[0].weight, **close)
