"""Laws where the surroundings are unusual: how a weight lies in memory, float8, no rows at all, torch.func, torch.jit.trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from diffpeft import AdapterStateError, LoraConfig, attach, fuse, set_adapters, unfuse, unload
from diffpeft.methods.linalg import traced
from tests.contracts.kinds import give, layer, weight_of
from tests.contracts.pairs import every_method, every_method_cell, turn


def apart(w: torch.Tensor) -> torch.Tensor:
    """The same numbers with others between them."""
    return torch.stack((w, torch.zeros_like(w)), -1)[..., 0]


def turned(w: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first axis innermost."""
    return w.movedim(0, -1).contiguous().movedim(-1, 0)


def last(w: torch.Tensor) -> torch.Tensor:
    """Channels innermost, as `.to(memory_format=torch.channels_last)` has them."""
    return w.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {"apart": apart, "turned": turned, "channels last": last}


@every_method_cell
def test_fusing_knows_every_memory_layout(form, kind, randomize, subtests):
    for name, laid in LAYOUTS.items():
        with subtests.test(name):
            model, x = layer(kind)
            weight = weight_of(model[0])
            weight.data = laid(weight.data)
            stride, before = weight.stride(), weight.clone()
            give(model, form)
            randomize(model)
            want = model(x)
            fuse(model)
            assert not torch.equal(weight, before)
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)  # float64, sums of up to 100 products
            if name != "apart":  # which leaves holes that new memory does not have
                assert weight.stride() == stride
            unfuse(model)
            assert weight.stride() == stride and torch.equal(weight, before) and weight_of(model[0]) is weight


def test_channels_last_models_fuse(pipe, randomize, image):
    pipe.unet.to(memory_format=torch.channels_last)
    attach(pipe, LoraConfig(r=2), targets=["conv_in", "conv1", "to_q", "conv_shortcut"])
    randomize(pipe)
    want, strides = image(pipe), {n: p.stride() for n, p in pipe.unet.named_parameters()}
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    fuse(pipe)
    torch.testing.assert_close(image(pipe), want, rtol=0, atol=1e-9)
    assert {n: p.stride() for n, p in pipe.unet.named_parameters()} == strides
    unfuse(pipe)
    assert all(torch.equal(p, before[n]) for n, p in pipe.unet.named_parameters())


@every_method_cell
def test_a_float8_base_is_fused_with_one_rounding(form, kind, randomize):
    dtype = turn((torch.float8_e4m3fn, torch.float8_e5m2), form, kind)
    model, _ = layer(kind, torch.float32)
    weight_of(model[0]).data = weight_of(model[0]).data.to(dtype)
    twin = copy.deepcopy(model)
    weight_of(twin[0]).data = weight_of(twin[0]).data.float()
    give(model, form)
    randomize(model, dtype=torch.float32)
    tensors = [p for name, p in model.named_parameters() if "adapters" in name]
    give(twin, form)
    for mine, theirs in zip((p for n, p in twin.named_parameters() if "adapters" in n), tensors, strict=True):
        mine.data.copy_(theirs)
    before = weight_of(model[0]).clone()
    for net in (model, twin):
        set_adapters(net, {"default": 0.5})
        fuse(net)
    assert weight_of(model[0]).dtype == dtype
    assert torch.equal(weight_of(model[0]).float(), weight_of(twin[0]).to(dtype).float())
    unfuse(model)
    assert torch.equal(weight_of(model[0]).view(torch.uint8), before.view(torch.uint8))


@every_method
@pytest.mark.parametrize("kind", ("linear", "conv2d strided", "embedding", "gpt-2's Conv1D"))
def test_no_rows_are_no_trouble(form, kind, randomize):
    model, x = layer(kind)
    give(model, form)
    randomize(model)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            y = model(x[:0])
        assert y.shape == (0, *model(x).shape[1:]) and y.dtype == torch.float64
        if grads:
            y.sum().backward()
            assert all(not p.grad.abs().sum() for p in model.parameters() if p.grad is not None)


# ---- transformations of functions


def parts(form, randomize, kind="linear"):
    model, x = layer(kind)
    give(model, form)
    randomize(model)
    return model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, x


@every_method
@pytest.mark.parametrize("kind", ("linear", "conv2d strided"))
def test_torch_func_gives_what_autograd_gives(form, kind, randomize):
    model, own, x = parts(form, randomize, kind)

    def loss(p, x):
        return functional_call(model, p, (x,)).square().sum()

    model(x).square().sum().backward()
    wants = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, got in grad(loss)(own, x).items():
        torch.testing.assert_close(got, wants[name], rtol=1e-9, atol=1e-9)
    tangent = torch.randn_like(x)
    y, dy = jvp(lambda x: model(x), (x,), (tangent,))
    torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dy, model(x + tangent) - model(x), rtol=1e-8, atol=1e-8)  # linear in x, but for rounding
    each = vmap(grad(loss), in_dims=(None, 0))(own, x[:, None])
    for name, got in each.items():
        torch.testing.assert_close(got.sum(0), wants[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-9)  # nothing of the transformations was kept
    assert not traced()


@every_method
@pytest.mark.parametrize("kind", ("linear", "conv2d strided"))
def test_torch_jit_trace_passes_its_own_check(form, kind, randomize):
    model, _, x = parts(form, randomize, kind)
    for frozen in (False, True):
        if frozen:
            model.requires_grad_(False)
        with torch.set_grad_enabled(not frozen):
            want = model(x)
            traced_model = torch.jit.trace(model, (x,), check_trace=True)
            torch.testing.assert_close(traced_model(x), want, rtol=0, atol=1e-9)
            other = torch.randn_like(x)
            torch.testing.assert_close(traced_model(other), model(other), rtol=0, atol=1e-9)


@pytest.mark.parametrize("lazy", (lambda: nn.LazyLinear(4), lambda: nn.LazyConv2d(4, 3)))
def test_a_lazy_layer_is_refused_until_it_has_a_shape(lazy, trace):
    model = nn.Sequential(lazy())
    with pytest.raises(AdapterStateError, match="lazy and has no shape yet"):
        attach(model, LoraConfig(r=2), targets=["0"])
    x = torch.randn(2, 6, 5, 5)
    model(x)
    before = trace(model)
    attach(model, LoraConfig(r=2), targets=["0"])
    unload(model)
    assert trace(model) == before
