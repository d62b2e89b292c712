"""(IA)^3 against PEFT and LyCORIS; PEFT's forward and merge are also in tests/contracts/test_peft.py."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from oracles import INPUTS, LAYERS, close, geometry_of, layer_of
from torch import nn

import diffpeft
from diffpeft import ConfigError, IA3Config, ShapeMismatchError
from diffpeft.layers.slot import Piece, Slot
from diffpeft.methods import IA3, Geometry, Spec
from diffpeft.model.state import entries_of, slots_of

CONV = Geometry(8, 6, (3, 3))


def of(W, p, spec):
    return IA3.weight(W, IA3.prepare(IA3.adopt(p, spec), spec, False), spec)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "grouped"])
def test_the_weight_is_lycoris(kind, inner):
    from lycoris.modules.ia3 import IA3Module

    layer = layer_of(kind)
    theirs = IA3Module("l", layer, multiplier=1.0, train_on_input=inner).double()
    nn.init.normal_(theirs.weight)
    spec = Spec(geometry_of(layer))
    p = {"ia3_w": theirs.weight.detach(), "on_input": theirs.on_input}
    assert not IA3.check(p, spec)
    close(of(layer.weight, p, spec), theirs.get_merged_weight()[0])
    x, twin = torch.randn(*INPUTS[kind], dtype=torch.float64), copy.deepcopy(layer)
    twin.weight.data = of(layer.weight, p, spec).detach()
    theirs.apply_to()
    close(twin(x), theirs(x))


def test_two_of_pefts_multiply_the_bias_twice():
    base = nn.Sequential(nn.Linear(6, 8)).double().requires_grad_(False)
    ours, x = copy.deepcopy(base), torch.randn(3, 6, dtype=torch.float64)
    config = {"target_modules": ["0"], "feedforward_modules": []}
    theirs = peft.get_peft_model(base, peft.IA3Config(**config), "a").double()
    theirs.add_adapter("b", peft.IA3Config(**config))
    for name in "ab":
        diffpeft.attach(ours, IA3Config(**config), name)
        l = slots_of(ours, name)["0"].double().ia3_l
        nn.init.normal_(l)
        theirs.base_model.model[0].ia3_l[name].data = l.detach().clone()
    theirs.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    want = ours(x)
    diffpeft.fuse(ours, ["a"])
    torch.testing.assert_close(ours(x), want, rtol=1e-12, atol=1e-12)
    diffpeft.fuse(ours)  # again, from the kept bias
    torch.testing.assert_close(ours(x), want, rtol=1e-12, atol=1e-12)


def test_it_multiplies_the_bias_that_earlier_adapters_made():
    model, x = nn.Sequential(nn.Linear(6, 8)).double(), torch.randn(3, 6, dtype=torch.float64)
    diffpeft.attach(model, diffpeft.LoraConfig(r=1, bias="lora_only"), "a", targets=["0"])
    diffpeft.attach(model, IA3Config(target_modules=["0"]), "b")
    a, b = (slots_of(model, name)["0"].double() for name in "ab")
    nn.init.normal_(a.diff_b), nn.init.normal_(b.ia3_l)
    inner = x @ model[0].weight.T + model[0].bias + a.diff_b
    torch.testing.assert_close(model(x), inner * b.ia3_l.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("geometry", "shape", "feedforward", "inner"),
    [
        (Geometry(8, 6), (8, 1), None, False),
        (Geometry(8, 6), (1, 6), None, True),
        (Geometry(6, 6), (6, 1), None, False),
        (Geometry(6, 6), (1, 6), None, True),
        (Geometry(1, 6), (1, 1), None, False),
        (Geometry(6, 1), (1, 1), None, True),
        (Geometry(6, 6), (6,), True, True),
        (CONV, (1, 8, 1, 1), None, False),
        (CONV, (1, 6, 1, 1), None, True),
        (Geometry(6, 6, (3,)), (1, 6, 1), True, True),
        (Geometry(6, 6, (3,)), (1, 6, 1), False, False),
        (Geometry(8, 4, (3,), groups=2), (1, 4, 1), None, True),
    ],
)
def test_which_side_the_shape_or_else_the_option_says(geometry, shape, feedforward, inner):
    spec = Spec(geometry, options={} if feedforward is None else {"feedforward": feedforward})
    l, W = torch.randn(shape), torch.randn(geometry.shape)
    assert not IA3.check({"ia3_l": l}, spec)
    by = l.reshape(-1, *(1 for _ in W.shape[1:]))
    if inner:
        by = l.reshape(geometry.groups, -1, *geometry.kernel and [1] * len(geometry.kernel))
        by = by.repeat_interleave(geometry.out // geometry.groups, 0)
    torch.testing.assert_close(of(W, {"ia3_l": l}, spec), W * by)


@pytest.mark.parametrize(
    ("geometry", "p", "said"),
    [
        (Geometry(6, 6, (3, 3)), {"ia3_l": (1, 6, 1, 1)}, "nothing says of which"),
        (Geometry(6, 6), {"ia3_w": (6,)}, "nothing says of which"),
        (CONV, {"ia3_l": (1, 7, 1, 1)}, "6 inputs and 8 outputs"),
        (Geometry(8, 6), {"ia3_l": (6, 1)}, "6 inputs and 8 outputs"),
        (Geometry(8, 6), {"ia3_l": (8, 6)}, "6 inputs and 8 outputs"),
        (Geometry(8, 6), {"ia3_l": ()}, "6 inputs and 8 outputs"),
        (Geometry(8, 6), {"ia3_l": (8, 1), "on_input": ()}, "takes ia3_l, or"),
        (Geometry(8, 6), {"on_input": ()}, "takes ia3_l, or"),
        (Geometry(8, 6), {"ia3_w": (8,), "on_input": (2,)}, "no|not one number"),
    ],
)
def test_what_does_not_fit_is_said(geometry, p, said):
    import re

    assert re.search(said, IA3.check({role: torch.zeros(shape) for role, shape in p.items()}, Spec(geometry)))


def test_an_on_input_that_contradicts_the_size_is_refused():
    p = {"ia3_w": torch.zeros(8), "on_input": torch.tensor(1)}
    with pytest.raises(ShapeMismatchError, match="on_input is True"):
        IA3.adopt(p, Spec(Geometry(8, 6)))


@pytest.mark.parametrize(
    "flag", [torch.tensor(1), torch.tensor(True), torch.tensor(1.0), torch.tensor([1], dtype=torch.uint8)]
)
@pytest.mark.parametrize(("geometry", "shape"), [(Geometry(6, 6), (6,)), (Geometry(6, 6, (3, 3)), (1, 6, 1, 1))])
def test_what_goes_back_to_a_file_is_what_came_from_it(geometry, shape, flag):
    p, spec = {"ia3_w": torch.randn(shape), "on_input": flag}, Spec(geometry)
    slot = Slot([Piece("ia3", IA3.adopt(p, spec), None, spec)], trainable=True)
    assert [name for name, _ in slot.named_parameters()] == ["ia3_w"]  # a flag is never trained
    (entry,) = entries_of("x", slot)
    assert {role: tuple(h.shape) for role, h in entry.tensors.items()} == {
        "ia3_w": shape,
        "on_input": tuple(flag.shape),
    }
    W = torch.randn(geometry.shape)
    torch.testing.assert_close(of(W, p, spec), W * (1 + p["ia3_w"]).view(1, 6, *(1 for _ in geometry.kernel)))


def test_only_offsets_leave_the_bias_alone():
    spec, b = Spec(Geometry(8, 6)), torch.randn(8)
    factors = {"ia3_l": torch.randn(8, 1)}
    torch.testing.assert_close(b + IA3.bias(b, factors, spec), b * factors["ia3_l"].flatten())
    assert IA3.bias(None, factors, spec) is None
    assert IA3.bias(b, {"ia3_l": torch.randn(1, 6)}, spec) is None
    assert IA3.bias(b, {"ia3_w": torch.randn(8, 1)}, spec) is None


def test_feedforward_modules_are_chosen_as_peft_does():
    def net():
        return nn.ModuleDict(
            {"a": nn.Linear(4, 6), "ff": nn.ModuleDict({"up": nn.Linear(4, 6), "xup": nn.Linear(4, 6)})}
        )

    for chosen in (["up"], ["a"], r"ff\..*", r"up", []):
        config = {"target_modules": r".*(a|up)", "feedforward_modules": chosen}
        ours, theirs = net(), peft.inject_adapter_in_model(peft.IA3Config(**config), net())
        diffpeft.attach(ours, IA3Config(**config))
        for layer, slot in slots_of(ours, "default").items():
            assert slot.ia3_l.shape == theirs.get_submodule(layer).ia3_l["default"].shape, (chosen, layer)
            assert slot.ia3_l.requires_grad and (slot.ia3_l == 1).all()


def test_feedforward_modules_are_a_part_of_the_targets():
    fields = {"target_modules": ["a", "b"], "feedforward_modules": ["c"]}
    with pytest.raises(ValueError):
        peft.IA3Config(**fields)
    with pytest.raises(ConfigError, match=r"should be a subset of `target_modules`\. It also has c"):
        IA3Config(**fields)
    with pytest.raises(ConfigError, match="regular expression"):
        IA3Config(feedforward_modules="(").validate()
    IA3Config(target_modules="attn", feedforward_modules=["c"]).validate()


def test_init_ia3_weights_false_is_random():
    model = nn.Sequential(nn.Linear(6, 8))
    diffpeft.attach(
        model, IA3Config(target_modules=["0"], init_ia3_weights=False), generator=torch.Generator().manual_seed(1)
    )
    first = slots_of(model, "default")["0"].ia3_l
    assert first.shape == (8, 1) and first.std() > 0.3
