"""What attach makes of a config: biases, keywords, seeds, bad values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    BOFTConfig,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    UnknownNameError,
    attach,
    set_adapters,
    unload,
)
from diffpeft.model.state import bundle_of, parameters_of, slots_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.down(self.norm(self.up(self.group(self.conv(x)).mean((2, 3)))))


X = torch.randn(2, 3, 5, 5)


@pytest.mark.parametrize(
    ("bias", "layers"), [("none", set()), ("lora_only", {"up"}), ("all", {"conv", "group", "up", "norm"})]
)
def test_bias_trains_the_biases_it_names(bias, layers, trace):
    model = Net().requires_grad_(False)
    plain, before = model(X), trace(model)
    attach(model, LoraConfig(r=2, bias=bias), targets=["up", "down"])
    slots = slots_of(model, "default")
    assert {n for n, slot in slots.items() if hasattr(slot, "diff_b")} == layers
    assert torch.equal(model(X), plain)
    expected = copy.deepcopy(model)
    unload(expected)
    for name in layers:
        by = torch.randn_like(slots[name].diff_b)
        slots[name].diff_b.data = by
        expected.get_submodule(name).bias += 0.5 * by
    set_adapters(model, {"default": 0.5})
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)  # fp32, five layers deep
    model(X).sum().backward()
    assert all(p.grad is not None for p in parameters_of(model, "default"))
    diffpeft.fuse(model)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)
    diffpeft.unload(model)
    assert trace(model) == before


def test_what_only_changes_biases_is_an_entry_of_its_own():
    model = Net()
    attach(model, LoraConfig(r=2, bias="all"), targets=["up"])
    entries = {e.layer: (e.method, set(e.tensors)) for e in bundle_of(model, "default", "").entries}
    assert entries["up"] == ("lora", {"lora_A", "lora_B", "diff_b"})
    assert {layer for layer, entry in entries.items() if entry == ("full", {"diff_b"})} == {"conv", "group", "norm"}


CONFIGS = {
    "lora": (LoraConfig, {}),
    "gaussian": (LoraConfig, {"init_lora_weights": "gaussian"}),
    "orthogonal": (LoraConfig, {"init_lora_weights": "orthogonal"}),
    "fast pissa": (LoraConfig, {"init_lora_weights": "pissa_niter_4"}),
    "loha": (LoHaConfig, {}),
    "lokr": (LoKrConfig, {}),
    "oft": (OFTConfig, {"oft_block_size": 2, "init_weights": False}),
    "boft": (BOFTConfig, {"boft_block_size": 2, "init_weights": False}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_seed_gives_the_same_adapter(name):
    cls, fields = CONFIGS[name]
    model, found = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), []
    for which, seed in (("a", 7), ("b", 7), ("c", 8)):
        state = torch.get_rng_state()
        attach(model, cls(**fields), which, targets=["0", "1"], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
        found.append([t.clone() for slot in slots_of(model, which).values() for t in slot.tensors.values()])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_an_init_from_the_weight_leaves_the_base_and_the_output(init):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16)), torch.randn(5, 24)
    plain, W = model(x), model[0].weight.clone()
    attach(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=init), targets=["0"])
    assert torch.equal(model[0].weight, W)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-5)  # two products of fp32 cancel
    slot = slots_of(model, "default")["0"]
    product = slot.scale * slot.lora_B.detach() @ slot.lora_A.detach()
    if init != "olora":
        U, S, Vh = torch.linalg.svd(W)
        torch.testing.assert_close(product, (U[:, :4] * S[:4]) @ Vh[:4], rtol=0, atol=1e-5 if init == "pissa" else 0.05)
    else:
        Q, R = torch.linalg.qr(W)
        torch.testing.assert_close(slot.lora_B.detach() @ slot.lora_A.detach(), Q[:, :4] @ R[:4], rtol=0, atol=1e-5)
    diffpeft.to_lora(model, "default")
    assert slots_of(model, "default")["0"].rank == 8  # the initial product is part of it
    torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (LoraConfig(r=0), {}, "r is 0"),
        (LoraConfig(r=-1), {}, "r is -1"),
        (LoraConfig(r=2, bias="some"), {}, "bias"),
        (LoraConfig(r=3, init_lora_weights="orthogonal"), {}, "even"),
        (LoraConfig(r=2, init_lora_weights="pissa_niter_0"), {}, "pissa_niter_0"),
        (LoraConfig(r=2), {"side": "input"}, "side"),
        (LoraConfig(r=2), {"dora": "left"}, "dora"),
        (OFTConfig(), {"dora": "out"}, "dora"),
        (OFTConfig(), {"side": "left"}, "side"),
        (OFTConfig(), {"constraint": 1.0}, "output"),
        (LoHaConfig(r=0), {}, "r is 0"),
        (LoHaConfig(r=1, rank_dropout=1.0), {}, "rank_dropout"),
        (LoKrConfig(r=-2), {}, "r is -2"),
        (LoKrConfig(decompose_factor=0), {}, "decompose_factor"),
        (BOFTConfig(boft_block_size=3), {}, "3"),
        (BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3), {}, "stages"),
    ],
    ids=str,
)
def test_a_bad_config_is_refused_and_nothing_changes(config, options, said, trace):
    model = Net()
    before = trace(model)
    with pytest.raises(ConfigError, match=said):
        attach(model, config, targets=["up", "down"], **options)
    assert trace(model) == before


@pytest.mark.parametrize("target", ["norm", "group"])
def test_a_layer_that_no_method_fits_is_no_target(target):
    with pytest.raises(UnknownNameError):
        attach(Net(), LoraConfig(r=1), targets=[target])


def test_an_oft_block_that_does_not_divide_is_adjusted_with_one_warning():
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(10, 4), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="does not divide 2 layers") as record:
        attach(model, OFTConfig(oft_block_size=8), targets=["0", "1", "2"])
    assert len(record) == 1
    assert [slot.rank for slot in slots_of(model, "default").values()] == [6, 10, 8]


def test_a_rank_above_the_layer_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="smaller than the rank"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(r=5), targets=["0"])


def test_a_name_in_use_is_refused():
    model = Net()
    attach(model, LoraConfig(r=1), "a", targets=["up"])
    with pytest.raises(AdapterStateError, match="'a'"):
        attach(model, OFTConfig(oft_block_size=2), "a", targets=["down"])


def test_an_embedding_that_renormalises_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(AdapterStateError, match="max_norm"):
        attach(model, LoraConfig(r=1), targets=["0"])


def test_a_transposed_convolution_takes_an_output_size():
    model, x = nn.ConvTranspose2d(4, 6, 3, stride=2), torch.randn(2, 4, 5, 5)
    attach(nn.Sequential(model), LoraConfig(r=2, init_lora_weights=False), targets=["0"])
    for size in ((11, 11), (12, 11)):
        assert model(x, output_size=size).shape[2:] == size == model(x, size).shape[2:]
