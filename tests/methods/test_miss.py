"""MiSS: PEFT's draws to the bit, its three forms by their definitions, and where PEFT is wrong."""

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.errors import ConfigError
from diffpeft.model.state import slots_of

FORMS = [
    dict(init_weights=True),
    dict(init_weights=False),
    dict(init_weights="mini", mini_r=2),
    dict(init_weights="bat"),
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_a_fresh_one_is_pefts_to_the_bit(fields):
    models = [nn.Sequential(nn.Linear(6, 12)) for _ in range(2)]
    for library, model in zip((peft, diffpeft), models, strict=True):
        torch.manual_seed(3)
        library.inject_adapter_in_model(library.MissConfig(r=3, target_modules=["0"], **fields), model)
    assert torch.equal(slots_of(models[1], "default")["0"].miss_block, models[0][0].miss_block["default"])


@pytest.mark.parametrize(
    ("r", "fields"), [(5, {}), (3, dict(init_weights="mini", mini_r=2)), (2, dict(init_weights="bat"))]
)
def test_the_weight_is_the_definition(r, fields):
    layer = nn.Sequential(nn.Conv2d(4, 6, (1, 3), bias=False)).double()
    W = layer[0].weight.detach().flatten(1).clone()
    diffpeft.attach(layer, diffpeft.MissConfig(r=r, **fields), targets=["0"])
    block = slots_of(layer, "default")["0"].double().miss_block
    nn.init.normal_(block)
    want = W.clone()
    for o in range(6):
        for c in range(12):
            if block.dim() == 2:
                want[o, c] += block[c % r, o % block.shape[1]]
            else:
                B = block[o // r]
                want[o, c] += B[o % r, c % r] + W[o, c // r * r : c // r * r + r] @ B[:, c % r]
    diffpeft.fuse(layer)
    torch.testing.assert_close(layer[0].weight.flatten(1), want, rtol=1e-13, atol=1e-13)


def test_forms_side_by_side_are_each_its_own_and_in_peft_all_are_the_first_one():
    """PEFT remembers the form of a layer's first adapter alone."""
    base = nn.Linear(6, 6)
    theirs, ours = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))
    for model in (theirs, ours):
        model[0].load_state_dict(base.state_dict())
    fields = {"a": dict(init_weights="bat"), "b": dict(init_weights="mini", mini_r=2)}
    x = torch.randn(4, 6)
    for name, more in fields.items():
        peft.inject_adapter_in_model(peft.MissConfig(r=3, target_modules=["0"], **more), theirs, name)
        diffpeft.attach(ours, diffpeft.MissConfig(r=3, **more), name, targets=["0"])
    block = slots_of(ours, "b")["0"].miss_block
    nn.init.normal_(block)
    diffpeft.set_adapters(ours, {"b": 1.0})
    torch.testing.assert_close(ours(x), base(x) + x.view(4, 2, 3).sum(1) @ block.repeat(1, 3), rtol=1e-5, atol=1e-5)
    theirs[0].set_adapter(["b"])
    with pytest.raises(RuntimeError):
        theirs(x)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (dict(r=7), "6 columns"),
        (dict(r=4, init_weights="bat"), "no tiles of 4 x 4"),
        (dict(r=3, init_weights="mini", mini_r=5), "mini_r 5"),
    ],
)
def test_what_does_not_fit_the_layer_is_refused(fields, why):
    with pytest.raises(ConfigError, match=why):
        diffpeft.attach(nn.Sequential(nn.Linear(6, 12)), diffpeft.MissConfig(**fields), targets=["0"])
