"""Linear layers in few bits: what they compute is what the numbers that they hold stand for, forwards and backwards, and nothing else is kept."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffpeft import TrainConfig
from diffpeft.layers.backends import backend_of, numbers
from diffpeft.layers.packed import PACKINGS, packed
from diffpeft.model.attach import attach
from diffpeft.model.placing import Placing
from diffpeft.model.state import trained_parameters
from diffpeft.train.method import ADAPTERS, CONFIGS
from tests.families.pipelines import pipeline

CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", PACKINGS)


def layers(kind, i=96, o=40, bias=True, dtype=torch.float32):
    """A layer in few bits and the plain one with the numbers that it stands for."""
    torch.manual_seed(0)
    plain = nn.Linear(i, o, bias, dtype=dtype)
    plain.weight.data[3] *= 100
    plain.weight.data[5] = 0
    layer = packed(copy.deepcopy(plain), kind, CPU)
    before = plain.weight.detach().clone()
    plain.weight.data = layer.unpacked()
    return layer, plain.requires_grad_(False), before


def by_definition(kind, W):
    """Each kind from its own words, in float64 but for the scales, which are held in fp32."""
    if kind == "nf4":
        return bnb.dequantize_4bit(*bnb.quantize_4bit(W, compress_statistics=True, quant_type="nf4"))
    largest, W = {"int8": 127, "fp8": 448}[kind], W.double()
    scale = (W.abs().amax(1, keepdim=True).float().clamp_min(1e-38) / largest).double()
    units = (W / scale).round() if kind == "int8" else (W / scale).float().to(torch.float8_e4m3fn).double()
    return units * scale


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_definition(kind, dtype):
    layer, _, W = layers(kind, dtype=dtype)
    wanted = by_definition(kind, W).double()
    step = {"nf4": None, "int8": 1 / 250, "fp8": 1 / 15}[kind]  # of the largest in a row; of a number itself
    torch.testing.assert_close(layer.unpacked().double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    largest, errors = W.double().abs().amax(1, keepdim=True), (layer.unpacked().double() - W.double()).abs()
    if step is not None:
        rounding = (torch.finfo(dtype).eps + 2e-5) * largest
        assert (errors <= step * (W.double().abs() if kind == "fp8" else largest) + rounding).all()
    assert numbers(layer.weight) == W.numel() and backend_of(layer).name == "diffpeft"
    held = sum(p.numel() * p.element_size() for p in layer.held)
    assert held <= W.numel() * {"nf4": 0.55, "int8": 1.05, "fp8": 1.05}[kind]


@every_kind
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_as_the_plain_layer_and_keeps_only_bytes(kind, bias):
    layer, plain, _ = layers(kind, bias=bias)
    x = torch.randn(2, 3, 96, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert kept and all(t.dtype == torch.uint8 for t in kept)
    assert torch.equal(y, plain(x))
    (gx,) = torch.autograd.grad(y.sin().sum(), x)
    (wanted,) = torch.autograd.grad(plain(x).sin().sum(), x)
    torch.testing.assert_close(gx, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.unpacked(), layer.bias))


@every_kind
def test_a_change_of_dtype_leaves_the_bytes_alone(kind):
    layer, _, _ = layers(kind)
    before = [t.clone() for t in layer.held]
    layer.to(torch.bfloat16)
    assert all(map(torch.equal, before, layer.held)) and layer.bias.dtype == torch.bfloat16
    assert not any(p.is_floating_point() for p in layer.held)
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@every_kind
def test_on_meta_it_takes_what_it_takes(kind):
    layer, _, _ = layers(kind)
    outline = packed(nn.Linear(96, 40, device="meta"), kind, torch.device("meta"))
    assert [(t.shape, t.dtype) for t in outline.held] == [(t.shape, t.dtype) for t in layer.held]
    assert outline(torch.empty(2, 96, device="meta", requires_grad=True)).shape == (2, 40)


@every_kind
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_learn_what_they_learn_on_the_numbers_it_stands_for(kind, method):
    few, plain, _ = layers(kind)
    models = [nn.Sequential(few), nn.Sequential(plain)]
    settings = CONFIGS[method](TrainConfig(rank=4))
    learnt = []
    for model in models:
        attach(model, settings, "a", targets=["0"], generator=torch.Generator().manual_seed(1), **ADAPTERS[method])
        parameters = trained_parameters(model, "a")
        optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
        for i in range(3):
            x = torch.randn(5, 96, generator=torch.Generator().manual_seed(i))
            model(x).tanh().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        learnt.append({name: p.detach() for name, p in parameters.items()})
    for name, p in learnt[0].items():
        torch.testing.assert_close(p, learnt[1][name], rtol=1e-4, atol=1e-5)


def test_only_layers_of_blocks_are_in_few_bits():
    model = pipeline("flux dev", torch.float32).transformer
    Placing("cpu", "int8")(model)
    few = {name for name, m in model.named_modules() if type(m).__name__ == "PackedLinear"}
    assert few and all("transformer_blocks." in name for name in few)
    assert type(model.x_embedder) is nn.Linear and type(model.proj_out) is nn.Linear
    assert model.dtype == torch.float32
