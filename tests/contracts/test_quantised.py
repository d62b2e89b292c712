"""Quantised layers of every backend: adapters act beside them, or on their dequantised weight."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, detach, set_adapters, to_lora
from diffpeft.layers.carried import base_class
from diffpeft.layers.sites import site_of
from diffpeft.model.state import parameters_of, slots_of
from tests.contracts.kinds import FORMS, METHOD_FORMS, give
from tests.contracts.pairs import every_method
from tests.pairwise import params
from tests.quantised import FORMATS, backend_name, every_format, exact, quantised_layer


def quantised(format, i=64, o=32):
    """A quantised layer, the plain one with its dequantised weight, and an input."""
    layer, plain = quantised_layer(format, i, o)
    model = nn.Sequential(layer).requires_grad_(False)
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
    bound = 1e-5 if format in exact else (x.abs().max() / 127 / 2 * plain[0].weight.abs().sum(1).max()).item()
    assert error <= bound


CELLS = [(form, format) for form in FORMS for format in FORMATS]
TURNS = [(form, list(FORMATS)[n % len(FORMATS)]) for n, form in enumerate(FORMS)]


# the first form of each method on every format, the others in turn
@pytest.mark.parametrize(
    ("form", "format"), params(CELLS, [c for c in CELLS if c[0] in METHOD_FORMS.values() or c in TURNS])
)
def test_a_fresh_adapter_changes_nothing(format, form):
    if format.startswith("torchao"):
        pytest.importorskip("torchao")
    model, _, x = quantised(format)
    want = model(x)
    give(model, form)
    torch.testing.assert_close(model(x), want, rtol=0, atol=FORMS[form].identity_single)
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
        assert error.norm() <= (1e-4 if format in exact else 0.05) * plain(x).norm()
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
    assert (model(x) - want).norm() <= (1e-4 if format in exact else 0.05) * want.norm()


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


@every_format
def test_two_in_a_row_train_as_the_plain_ones_do(format, randomize):
    """The gradient passes through the product of the second to the adapter of the first."""
    quantised_model, plain = nn.Sequential(), nn.Sequential()
    for i, o in ((64, 96), (96, 32)):
        model, dequantised, _ = quantised(format, i, o)
        quantised_model.append(model[0])
        plain.append(dequantised[0])
    for model in (quantised_model, plain):
        diffpeft.attach(model, diffpeft.LoraConfig(r=4), targets=["0", "1"])
    randomize(plain, dtype=torch.float32)
    for a, b in zip(parameters_of(quantised_model, "default"), parameters_of(plain, "default"), strict=True):
        a.data.copy_(b.data)
    x = torch.randn(3, 5, 64)
    for model in (quantised_model, plain):
        optimizer = torch.optim.SGD(parameters_of(model, "default"), 1e-3)
        model.train()(x).square().mean().backward()
        optimizer.step()
    for a, b in zip(parameters_of(quantised_model, "default"), parameters_of(plain, "default"), strict=True):
        assert (a.grad - b.grad).norm() <= (1e-4 if format in exact else 0.05) * b.grad.norm() and b.grad.norm() > 0
    error = quantised_model(x) - plain(x)
    assert error.norm() <= (1e-4 if format in exact else 0.05) * plain(x).norm()


@every_format
def test_a_lora_on_it_is_saved_and_loaded(format, randomize, tmp_path):
    model, _, x = quantised(format)
    wrapped = diffpeft.get_peft_model(model, diffpeft.LoraConfig(r=4, target_modules=["0"]))
    randomize(wrapped.eval().get_base_model(), dtype=torch.float32)  # 8-bit layers round otherwise in training
    want = wrapped(x)
    wrapped.save_pretrained(tmp_path)
    plain = wrapped.unload()
    assert torch.equal(diffpeft.PeftModel.from_pretrained(plain, tmp_path)(x), want)


@every_format
def test_reports_name_the_backend_and_count_its_numbers(format):
    layer, plain = quantised_layer(format)
    wrapped = diffpeft.get_peft_model(nn.Sequential(layer), diffpeft.LoraConfig(r=4, target_modules=["0"]))
    assert wrapped.get_layer_status()[0].quantization_backend == backend_name(format)
    assert wrapped.get_model_status().quantization_backend == backend_name(format)
    assert wrapped.get_nb_trainable_parameters() == (4 * 96, 4 * 96 + sum(p.numel() for p in plain.parameters()))


@every_format
def test_merged_it_is_a_plain_layer(format, randomize):
    layer, _ = quantised_layer(format)
    wrapped = diffpeft.get_peft_model(nn.Sequential(layer), diffpeft.LoraConfig(r=4, target_modules=["0"])).eval()
    randomize(wrapped.get_base_model(), dtype=torch.float32)
    x = torch.randn(5, 64)
    want = wrapped(x)
    with pytest.raises(AdapterStateError, match="dequantize=True"):
        wrapped.merge_and_unload()
    assert torch.equal(wrapped(x), want)
    merged = wrapped.merge_and_unload(dequantize=True)
    assert type(merged[0]) is nn.Linear and type(merged[0].weight) is nn.Parameter
    assert (merged(x) - want).norm() <= (1e-5 if format in exact else 0.05) * want.norm()


@pytest.mark.parametrize("format", ["torchao int8", "torchao intx"])
def test_it_trains_as_in_peft(format, randomize):
    """PEFT refuses the packed 4-bit weights of torchao, and trains on the others."""
    pytest.importorskip("torchao")
    layers = [quantised_layer(format, 64, 64)[0] for _ in range(2)]
    theirs = peft.get_peft_model(
        nn.Sequential(*copy.deepcopy(layers)), peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    )
    ours = diffpeft.get_peft_model(nn.Sequential(*layers), diffpeft.LoraConfig(r=4, target_modules=["0", "1"]))
    state = peft.get_peft_model_state_dict(theirs)
    diffpeft.set_peft_model_state_dict(ours, state)
    x, grads = torch.randn(5, 64), []
    for model in (ours, theirs):
        y = model(x)
        y.square().sum().backward()
        named = {n.split("base_model.model.")[-1].replace(".adapters", ""): p for n, p in model.named_parameters()}
        grads.append([y, *(p.grad for _, p in sorted(named.items()) if p.requires_grad)])
    assert len(grads[0]) == len(grads[1]) == 5
    for a, b in zip(*map(lambda g: sorted(g, key=lambda t: (t.shape, t.norm().item())), grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
