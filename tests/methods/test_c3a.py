"""C3A: by its definition, PEFT's draws to the bit, and where PEFT is wrong."""

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.errors import CannotConvertError, ConfigError
from diffpeft.methods.c3a import correlated
from diffpeft.model.state import slots_of


def both(make, **fields):
    """The same layer in both libraries, with fresh tensors of one seed."""
    models = [nn.Sequential(make()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for library, model in zip((peft, diffpeft), models, strict=True):
        torch.manual_seed(3)
        library.inject_adapter_in_model(library.C3AConfig(target_modules=["0"], **fields), model)
    return models


@pytest.mark.parametrize("start", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_a_fresh_one_is_pefts_to_the_bit(start):
    theirs, ours = both(lambda: nn.Linear(6, 9), block_size=3, init_weights=start)
    assert torch.equal(slots_of(ours, "default")["0"].c3a_kernel, theirs[0].c3a_kernel["default"])


def test_the_delta_and_the_product_are_the_definition():
    m, n, b = 3, 2, 5
    w, x = torch.randn(m, n, b).double(), torch.randn(4, n * b).double()
    D = torch.zeros(m * b, n * b).double()
    for row in range(m * b):
        for column in range(n * b):
            D[row, column] = w[row // b, column // b, (column % b - row % b) % b]
    torch.testing.assert_close(correlated(x, w), x @ D.t(), rtol=1e-13, atol=1e-13)
    layer = nn.Sequential(nn.Linear(n * b, m * b, bias=False)).double()
    base = layer[0].weight.detach().clone()
    diffpeft.attach(layer, diffpeft.C3AConfig(block_size=b), targets=["0"])
    slot = slots_of(layer, "default")["0"].double()
    slot.c3a_kernel.data = w
    diffpeft.fuse(layer)
    torch.testing.assert_close(layer[0].weight, base + D / (n * b), rtol=1e-13, atol=1e-13)


def test_two_of_them_add_up_and_in_peft_the_second_sees_what_the_first_made():
    theirs, ours = both(lambda: nn.Linear(6, 6), block_size=3)
    peft.inject_adapter_in_model(peft.C3AConfig(block_size=3, target_modules=["0"]), theirs, "b")
    x, base = torch.randn(4, 6), theirs[0].base_layer
    kernels = theirs[0].c3a_kernel
    for t in kernels.values():
        nn.init.normal_(t)
    theirs[0].set_adapter(["default", "b"])
    deltas = [x @ theirs[0].get_delta_weight(name).t() for name in ("default", "b")]
    assert (theirs(x) - base(x) - sum(deltas)).abs().max() > 0.01
    diffpeft.attach(ours, diffpeft.C3AConfig(block_size=3), "b", targets=["0"])
    for name in ("default", "b"):
        slots_of(ours, name)["0"].c3a_kernel.data = kernels[name].detach().clone()
    diffpeft.set_adapters(ours, {"default": 1.0, "b": 1.0})
    torch.testing.assert_close(ours(x), base(x) + sum(deltas), rtol=0, atol=1e-6)


def test_the_gradient_of_the_input_is_the_derivative_and_pefts_is_not():
    theirs, ours = both(lambda: nn.Linear(6, 9), block_size=3)
    gradients = []
    for model in (ours, theirs):
        x = torch.arange(12.0).view(2, 6).requires_grad_()
        model(x).square().sum().backward()
        gradients.append(x.grad)
    W = theirs[0].base_layer.weight + theirs[0].get_delta_weight("default")
    x = torch.arange(12.0).view(2, 6)
    want = 2 * (x @ W.t() + theirs[0].base_layer.bias) @ W
    torch.testing.assert_close(gradients[0], want, rtol=1e-5, atol=1e-4)
    assert (gradients[1] - want).abs().max() > 0.1  # PEFT turns a block the other way there


def test_a_block_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match="divisor of 6"):
        diffpeft.attach(nn.Sequential(nn.Linear(12, 18)), diffpeft.C3AConfig(block_size=4), targets=["0"])


def test_a_layer_whose_name_ends_with_another_s_has_its_block_in_peft_and_such_a_config_is_refused(tmp_path):
    net = nn.ModuleDict(
        {"two": nn.Linear(12, 12), "inner": nn.ModuleDict({"two": nn.Linear(12, 12), "one": nn.Linear(12, 12)})}
    )
    config = diffpeft.C3AConfig(block_size=4, block_size_pattern={"inner.two": 4, "two": 3})
    diffpeft.attach(net, config, targets=["two", "inner.two", "inner.one"])
    assert {name: slot.rank for name, slot in slots_of(net, "default").items()} == {
        "two": 3,
        "inner.two": 4,
        "inner.one": 4,
    }
    with pytest.raises(CannotConvertError, match="ends with"):
        diffpeft.save_lora(net, tmp_path / "a", format="peft")
