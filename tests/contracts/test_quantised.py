"""Layers of bitsandbytes: adapters act beside them, or on their dequantised weight."""

from __future__ import annotations

import copy

import pytest
import torch
from kinds import every_form, every_method
from test_laws import give
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, detach, set_adapters, to_lora
from diffpeft.layers.carried import base_class
from diffpeft.layers.site import site_of
from diffpeft.model.state import parameters_of, slots_of

bnb = pytest.importorskip("bitsandbytes")

FORMATS = {
    "nf4": lambda i, o: bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32),
    "nf4 twice": lambda i, o: bnb.nn.Linear4bit(
        i, o, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
    ),
    "8 bit": lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False),
}
every_format = pytest.mark.parametrize("format", FORMATS)


def quantised(format, i=64, o=32):
    """A quantised layer, the plain one with its dequantised weight, and an input."""
    plain, layer = nn.Linear(i, o), FORMATS[format](i, o)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer).to("cpu").requires_grad_(False)
    x = torch.randn(5, i)
    model(x)  # 8-bit layers move their scales in the first forward
    with torch.no_grad():
        plain.weight.copy_(site_of(base_class(model[0]))(model[0]).weight())
    return model, nn.Sequential(plain), x


@every_format
def test_the_dequantised_weight_is_what_the_library_says(format):
    model, plain, x = quantised(format)
    error = (model(x) - plain(x)).abs().max()
    # 4-bit layers multiply by exactly this weight; 8-bit ones round x to 8 bits as well: half a step of 1/127 of the largest x, times |W|_1
    bound = 1e-5 if "nf4" in format else (x.abs().max() / 127 / 2 * plain[0].weight.abs().sum(1).max()).item()
    assert error <= bound


@every_format
@every_form
def test_a_fresh_adapter_changes_nothing(format, form):
    model, _, x = quantised(format)
    want = model(x)
    give(model, form)
    cancels = ("pissa", "olora", "orthogonal")  # their parts cancel in fp32 instead of being zero
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5 if any(c in form for c in cancels) else 0)
    set_adapters(model, {"default": 0.0})
    assert torch.equal(model(x), want)


@every_format
@every_method
def test_an_adapter_does_to_it_what_it_does_to_the_dequantised_layer(format, form, randomize):
    model, plain, x = quantised(format)
    give(model, form)
    give(plain, form)
    randomize(plain, dtype=torch.float32)
    for role, p in slots_of(plain, "default")["0"].tensors.items():
        slots_of(model, "default")["0"].tensors[role].data.copy_(p.data)
    for s in (1.0, -0.4):
        set_adapters(model, {"default": s})
        set_adapters(plain, {"default": s})
        # an adapter that turns the input or scales the output multiplies the library's own error by that much
        error = model(x) - plain(x)
        assert error.norm() <= (1e-4 if "nf4" in format else 0.05) * plain(x).norm()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in parameters_of(model, "default"))


@every_format
def test_fusing_is_refused_and_nothing_changes(format, trace):
    model, _, x = quantised(format)
    give(model, "lora")
    before = model(x)
    with pytest.raises(AdapterStateError, match="quantised"):
        diffpeft.fuse(model)
    assert torch.equal(model(x), before)


@every_format
def test_detaching_gives_the_library_its_layer_back(format):
    model, _, x = quantised(format)
    cls, want, keys = type(model[0]), model(x), list(model.state_dict())
    give(model, "oft")
    detach(model, "default")
    assert type(model[0]) is cls and list(model.state_dict()) == keys and torch.equal(model(x), want)


@every_format
def test_converting_to_lora_uses_the_dequantised_weight(format, randomize):
    model, _, x = quantised(format)
    give(model, "oft")
    randomize(model, dtype=torch.float32)
    want = model(x)
    to_lora(model, "default")
    assert (model(x) - want).norm() <= (1e-4 if "nf4" in format else 0.05) * want.norm()


def test_a_4_bit_model_can_be_copied(randomize):
    model, _, x = quantised("nf4")
    give(model, "lora")
    randomize(model, dtype=torch.float32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="a CPU without AVX512-BF16")
@pytest.mark.parametrize("bias", (True, False))
def test_a_layer_packed_for_inference_keeps_its_weight_and_its_gradients(bias):
    plain = nn.Linear(64, 32, bias=bias)
    layer = bnb.nn.Linear4bit(64, 32, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    layer.support_avx512bf16_for_cpu = True
    model, x = nn.Sequential(layer).to("cpu").requires_grad_(False).eval(), torch.randn(5, 64)
    before = site_of(type(layer))(layer).weight()
    with torch.no_grad():
        model(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    after = site_of(type(layer))(layer).weight()
    # the scales of blocks are bfloat16 now: 8 bits
    assert ((after - before).abs() <= 2**-8 * before.abs() + 1e-8).all() and not torch.equal(after, before)
    diffpeft.attach(model, diffpeft.LoraConfig(r=2), targets=["0"])
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, after.sum(0).expand(5, -1))
    # bitsandbytes' product for inference computes in bfloat16
    torch.testing.assert_close(model(x).detach(), model(x.detach()).detach(), rtol=0, atol=0.05)
