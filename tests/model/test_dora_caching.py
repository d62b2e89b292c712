"""DoraCaching: kept norms give the same bits, and are worked out anew when anything changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from diffpeft import LoraConfig, attach, fuse, get_peft_model, set_adapters, unfuse
from diffpeft.layers.caching import DoraCaching, is_enabled
from diffpeft.methods import dora
from diffpeft.model.state import slots_of

KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.randint(9, (2, 4))),
}


@pytest.fixture(autouse=True)
def switched_off():
    yield
    DoraCaching()(enabled=False)


@pytest.fixture
def norms(monkeypatch):
    """How often norms were worked out."""
    count: list[int] = []
    for name in ("_rows", "_beside"):
        work = getattr(dora, name)
        monkeypatch.setattr(dora, name, lambda *args, work=work: count.append(1) or work(*args))
    return count


def made(kind="linear", across=False):
    torch.manual_seed(0)
    make, draw = KINDS[kind]
    model, config = nn.Sequential(make()), LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["0"])
    if across:
        model = get_peft_model(model, config).get_base_model()
    else:
        attach(model, config)
    for p in slots_of(model, "default")["0"].parameters():
        nn.init.normal_(p)
    return model.eval(), draw()


@pytest.mark.parametrize("kind, across", [*((kind, False) for kind in KINDS), ("grouped", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_and_the_norm_is_worked_out_once(kind, across, dtype, norms):
    model, x = made(kind, across)
    model[0].weight.data, x = model[0].weight.data.to(dtype), x.to(dtype) if x.is_floating_point() else x
    if getattr(model[0], "bias", None) is not None:
        model[0].bias.data = model[0].bias.data.to(dtype)
    want = model(x)
    norms.clear()
    with DoraCaching():
        for _ in range(3):
            assert torch.equal(model(x), want)
        assert len(norms) == 1
        with torch.no_grad():
            assert torch.equal(model(x), want)
    assert torch.equal(model(x), want) and len(norms) > 1


def change_in_place(model):
    with torch.no_grad():
        slots_of(model, "default")["0"].lora_B.mul_(2)


def change_the_data(model):
    slots_of(model, "default")["0"].lora_A.data.mul_(-3)


def change_the_magnitude(model):
    slots_of(model, "default")["0"].lora_magnitude_vector.data.add_(1)


def step(model):
    slot = slots_of(model, "default")["0"]
    slot.lora_A.grad = torch.ones_like(slot.lora_A)
    torch.optim.SGD([slot.lora_A], 0.3).step()


def change_the_weight(model):
    with torch.no_grad():
        model[0].weight.add_(0.5)


def give_another_weight(model):
    model[0].weight.data = model[0].weight.data * 3


def load(model):
    model.load_state_dict({key: 2 * t for key, t in model.state_dict().items()})


def scale(model):
    set_adapters(model, {"default": 0.3})


CHANGES = [
    change_in_place,
    change_the_data,
    change_the_magnitude,
    step,
    change_the_weight,
    give_another_weight,
    load,
    scale,
    lambda model: model.double(),
    lambda model: model.train(),
    lambda model: fuse(model) or unfuse(model),
    lambda model: attach(model, LoraConfig(r=2, init_lora_weights=False), "another", targets=["0"]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen(change):
    model, x = made()
    with DoraCaching():
        before = model(x)
        change(model)
        x = x.to(model[0].weight.dtype)
        cached = model(x)
        DoraCaching()(enabled=False)
        assert torch.equal(cached, model(x))
    assert change in CHANGES[8:] or not torch.allclose(cached, before)


def test_gradients_are_those_without_it():
    model, x = made()
    grads = []
    for enabled in (False, True, True):
        with DoraCaching(enabled):
            grads.append(
                torch.autograd.grad(model(x).square().sum(), list(slots_of(model, "default")["0"].parameters()))
            )
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_copies_and_pickles_work_out_their_own():
    model, x = made()
    with DoraCaching():
        want = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), want)
            change_in_place(other)
            assert not torch.allclose(other(x), want) and torch.equal(model(x), want)


def test_training_uses_none(norms):
    model, x = made()
    with DoraCaching():
        model(x)
        model.train()
        norms.clear()
        model(x), model(x)
        assert len(norms) == 2


def test_blocks_restore_what_was_set():
    assert not is_enabled()
    outer = DoraCaching()
    with outer:
        assert is_enabled()
        with DoraCaching(enabled=False):
            assert not is_enabled()
        with outer:
            pass
        assert is_enabled()
    assert not is_enabled()
    outer(enabled=True)
    assert is_enabled()
    with pytest.raises(ZeroDivisionError), DoraCaching(enabled=False):
        raise ZeroDivisionError
    assert is_enabled()
