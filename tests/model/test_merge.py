"""Merging for good: what the weights become, that nothing of ours stays, and what is refused."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    IA3Config,
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
)
from diffpeft.model.merge import merge_for_good
from tests.quantised import every_format, exact, quantised_layer

EXACT = dict(rtol=1e-12, atol=1e-12)  # float64, sums of a few products
CONFIGS = {"lora": LoraConfig(r=2), "loha": LoHaConfig(r=2), "oft": OFTConfig(oft_block_size=2)}


@pytest.fixture
def base():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(False).double()


@pytest.fixture
def model(base, randomize):
    """Three adapters on two layers, active in this order, and one that is not active."""
    net = copy.deepcopy(base)
    for name, config in {**CONFIGS, "idle": LoraConfig(r=1)}.items():
        attach(net, config, name, targets=["0", "2"])
        randomize(net, name)
    set_adapters(net, {"lora": 0.5, "loha": -0.7, "oft": 0.8})
    return net


x = torch.randn(3, 6, dtype=torch.float64)


def same_shape(a, b):
    """Two traces without the tensors' bytes."""
    return [(*row[:5], [t[:3] for t in row[5]]) for row in a] == [(*row[:5], [t[:3] for t in row[5]]) for row in b]


def test_the_active_ones_go_in_and_no_trace_is_left(model, base, trace):
    want, own = model(x), [model[0].weight, model[2].bias]
    errors = merge_for_good(model)
    torch.testing.assert_close(model(x), want, **EXACT)
    assert same_shape(trace(model), trace(base)) and type(model[0]) is nn.Linear
    assert model[0].weight is own[0] and model[2].bias is own[1]
    assert get_adapters(model) == {} and list(model.state_dict()) == list(base.state_dict())
    assert errors == {"0": 0.0, "2": 0.0}  # in float64 nothing is rounded
    assert merge_for_good(model) == {}


@pytest.mark.parametrize(
    ("names", "mix"),
    [
        (["oft"], {"oft": 0.8}),
        ("loha", {"loha": -0.7}),
        (["oft", "lora"], {"lora": 0.5, "oft": 0.8}),  # in activation order
        (["idle", "oft"], {"oft": 0.8, "idle": 1.0}),
        ([], {}),
    ],
)
def test_named_ones_go_in_as_if_they_alone_were_active(model, names, mix):
    twin = copy.deepcopy(model)
    set_adapters(twin, mix)
    errors = merge_for_good(model, names)
    torch.testing.assert_close(model(x), twin(x), **EXACT)
    assert get_adapters(model) == {} and set(errors) == ({"0", "2"} if names else set())


@pytest.mark.parametrize("keep_base", ["cpu", "none"])
@pytest.mark.parametrize("first", [["lora"], ["lora", "loha"], None])
def test_what_is_fused_already_is_not_added_twice(model, first, keep_base):
    want = model(x)
    fuse(model, first, keep_base=keep_base)
    merge_for_good(model)
    torch.testing.assert_close(model(x), want, **EXACT)
    assert get_adapters(model) == {}


def test_a_fused_one_that_was_not_named_comes_out_again_where_the_base_was_kept(model):
    twin = copy.deepcopy(model)
    set_adapters(twin, {"loha": -0.7})
    fuse(model)
    merge_for_good(model, "loha")
    torch.testing.assert_close(model(x), twin(x), **EXACT)


def test_all_unmerged_is_the_base_to_the_last_bit(model, base):
    fuse(model)
    merge_for_good(model, [])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


def test_a_fused_one_without_its_base_cannot_be_left_out(model):
    fuse(model, "lora", keep_base="none")
    before = copy.deepcopy(model)
    with pytest.raises(AdapterStateError, match="keep_base"):
        merge_for_good(model, "loha")
    assert torch.equal(model(x), before(x)) and set(get_adapters(model)) == {*CONFIGS, "idle"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_what_rounding_once_costs(model, dtype):
    model.to(dtype)
    wide = copy.deepcopy(model).float()
    errors, exact = merge_for_good(model), merge_for_good(wide)
    assert exact["0"] == 0 == exact["2"]  # of fp32 weights the merge is in fp32
    for layer in "02":
        W, V = model[int(layer)].weight.float(), wide[int(layer)].weight
        assert errors[layer] == pytest.approx(float((W - V).norm() / V.norm()), rel=1e-3, abs=1e-9)
        # a relative rounding error is spread over half a step: its root mean square is at most eps / sqrt(12)
        assert errors[layer] <= torch.finfo(dtype).eps / 2


def test_methods_that_change_the_bias_and_other_layers_are_merged(randomize):
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(96, 5)).double()
    attach(net, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), "ia3")
    attach(net, LoraConfig(r=2, lora_bias=True), "lora", targets=["0", "2"])
    for name in ("ia3", "lora"):
        randomize(net, name)
    given = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    want = net(given)
    merge_for_good(net)
    torch.testing.assert_close(net(given), want, **EXACT)


def test_an_embedding_keeps_the_layout_of_its_table(randomize):
    net = nn.Sequential(nn.Embedding(10, 4)).double()
    attach(net, LoraConfig(r=2), targets=["0"])
    randomize(net)
    ids, strides = torch.tensor([1, 3]), net[0].weight.stride()
    want = net(ids)
    merge_for_good(net)
    torch.testing.assert_close(net(ids), want, **EXACT)
    assert net[0].weight.stride() == strides and net[0].weight.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("safe", [True, False])
def test_values_that_are_not_finite_are_refused_and_nothing_changes(model, value, safe, trace):
    with torch.no_grad():
        model[2].adapters["lora"].lora_A[0, 0] = value
    before = trace(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights") as error:
        merge_for_good(model, safe=safe)
    assert isinstance(error.value, NonFiniteError) and "'2'" in str(error.value)
    assert trace(model) == before


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)))


@pytest.mark.parametrize("layer", ["head", "embed"])
def test_one_end_of_a_tie_is_refused_by_name(layer):
    net = Tied()
    attach(net, LoraConfig(r=2, init_lora_weights=False), targets=[layer, "middle"])
    want = net(torch.arange(3))
    with pytest.raises(AdapterStateError, match=f"{layer}.*tied"):
        merge_for_good(net)
    assert torch.equal(net(torch.arange(3)), want) and net.head.weight is net.embed.weight


def test_a_tie_beside_the_adapter_stays():
    net = Tied()
    attach(net, LoraConfig(r=2, init_lora_weights=False), targets=["middle"])
    merge_for_good(net)
    assert net.head.weight is net.embed.weight


def test_a_layer_that_is_held_twice_is_merged_once(randomize):
    layer = nn.Linear(4, 4).double()
    net = nn.Sequential(layer, nn.Tanh(), layer)
    attach(net, LoraConfig(r=2), targets=["0"])
    randomize(net)
    given = torch.randn(2, 4, dtype=torch.float64)
    want = net(given)
    assert list(merge_for_good(net)) == ["0"]
    torch.testing.assert_close(net(given), want, **EXACT)


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (lambda m: "lroa", UnknownNameError),
        (lambda m: set_adapters(m, [{"lora": 1.0}, {"oft": 1.0}]), AdapterStateError),
        (lambda m: set_adapters(m, {"lora": diffpeft.schedule.linear(0.0, 1.0)}), AdapterStateError),
    ],
)
def test_what_cannot_be_merged_is_said_and_nothing_changes(model, prepare, error, trace):
    names = prepare(model)
    before = trace(model)
    with pytest.raises(error):
        merge_for_good(model, names)
    assert trace(model) == before


def test_an_adapter_in_use_is_not_taken_away(model):
    with adapters(model, {"lora": 1.0}):
        with pytest.raises(AdapterStateError, match="busy"):
            merge_for_good(model)


def test_an_interrupted_merge_changes_nothing(model, monkeypatch, trace):
    before, calls = trace(model), []

    def enter(module, state, real=diffpeft.model.plan.enter):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(module, state)

    monkeypatch.setattr("diffpeft.model.plan.enter", enter)
    with pytest.raises(KeyboardInterrupt):
        merge_for_good(model)
    assert trace(model) == before


class Quantised(nn.Module):
    """A quantised layer under two names, between layers that are not."""

    def __init__(self, format, **k):
        super().__init__()
        self.first, self.inner = nn.Linear(64, 64), nn.ModuleDict({"q": quantised_layer(format, **k)[0]})
        self.again = self.inner["q"]

    def forward(self, given):
        return self.again(self.first(given)) + self.inner["q"](given)


def quantised(format, config, randomize, **k):
    net = Quantised(format, **k).to("cpu").requires_grad_(False).eval()
    given = torch.randn(5, 64)
    net(given)
    attach(net, config, targets=["inner.q", "first"])
    randomize(net, dtype=torch.float32)
    set_adapters(net, {"default": 0.3})
    return net, given


@every_format
def test_a_quantised_layer_is_refused_and_the_remedy_named(format, randomize):
    net, given = quantised(format, LoraConfig(r=4), randomize)
    want, first = net(given), net.first.weight.clone()
    with pytest.raises(AdapterStateError, match="dequantize=True"):
        merge_for_good(net)
    assert torch.equal(net(given), want) and torch.equal(net.first.weight, first)


@every_format
@pytest.mark.parametrize(
    "config", [LoraConfig(r=4), OFTConfig(oft_block_size=8), IA3Config()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("bias", [True, False])
def test_dequantised_it_becomes_a_plain_layer_everywhere(format, config, bias, randomize):
    net, given = quantised(format, config, randomize, bias=bias)
    want, calls = net(given), []
    net.again.register_forward_hook(lambda *_: calls.append(1))
    errors = merge_for_good(net, dequantize=True)
    assert set(errors) == {"first", "inner.q"} and max(errors.values()) == 0  # fp32 all along
    assert type(net.again) is nn.Linear and net.inner["q"] is net.again and net.again.weight.dtype == torch.float32
    assert (net.again.bias is not None) == bias and not net.again.training and not net.again.weight.requires_grad
    # 8-bit layers round their input to 8 bits as well
    assert (net(given) - want).norm() <= (1e-5 if format in exact else 0.05) * want.norm()
    assert calls == [1, 1]


@every_format
def test_the_plain_layer_takes_the_dtype_of_the_activations(format, randomize):
    if format == "torchao int4":
        pytest.skip("torchao does not cast weights that are packed for a CPU")
    net, given = quantised(format, LoraConfig(r=4), randomize)
    net.to(torch.bfloat16)
    want, given = net(given.bfloat16()), given.bfloat16()
    errors = merge_for_good(net, dequantize=True)
    assert net.again.weight.dtype == torch.bfloat16
    assert 0 < errors["inner.q"] <= torch.finfo(torch.bfloat16).eps / 2
    assert (net(given) - want).float().norm() <= 0.05 * want.float().norm()


def test_where_there_are_no_other_parameters_it_takes_the_layers_own(randomize):
    net = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16)).to("cpu")
    attach(net, LoraConfig(r=4), targets=["0"])
    randomize(net, dtype=torch.float32)
    merge_for_good(net, dequantize=True)
    assert net[0].weight.dtype == torch.bfloat16


def test_the_merged_weight_is_the_dequantised_one_and_the_product(randomize):
    net, _ = quantised("nf4", LoraConfig(r=4, lora_alpha=2), randomize)
    layer, slot = net.again, net.again.adapters["default"]
    W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    want = W + 0.3 * 0.5 * slot.lora_B @ slot.lora_A
    merge_for_good(net, dequantize=True)
    torch.testing.assert_close(net.again.weight, want, rtol=1e-6, atol=1e-6)


def test_a_quantised_layer_that_no_adapter_goes_into_stays_quantised(randomize):
    net, _ = quantised("nf4", LoraConfig(r=4), randomize)
    layer = net.again
    merge_for_good(net, [])
    assert net.again is layer and type(layer) is bnb.nn.Linear4bit and get_adapters(net) == {}


def test_an_interrupted_replacement_changes_nothing(randomize, monkeypatch):
    net, given = quantised("nf4", LoraConfig(r=4), randomize)
    want, layer = net(given), net.again

    def broken(module, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffpeft.model.plan.settle", broken)
        with pytest.raises(KeyboardInterrupt):
            merge_for_good(net, dequantize=True)
    assert net.again is layer and net.inner["q"] is layer and torch.equal(net(given), want)


def test_a_model_that_is_one_quantised_layer_cannot_be_replaced(randomize):
    layer, _ = quantised_layer("nf4")
    attach(layer, LoraConfig(r=4), targets=".*")
    with pytest.raises(AdapterStateError, match="holds it"):
        merge_for_good(layer, dequantize=True)
