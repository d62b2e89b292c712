"""RoAd: PEFT's draws to the bit, the definition, and layers that PEFT has not."""

import math

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.errors import ConfigError
from diffpeft.model.state import slots_of

VARIANTS = ("road_1", "road_2", "road_4")


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_one_is_pefts_to_the_bit(variant, start):
    models = [nn.Sequential(nn.Linear(6, 8)) for _ in range(2)]
    for library, model in zip((peft, diffpeft), models, strict=True):
        torch.manual_seed(3)
        config = library.RoadConfig(variant=variant, group_size=4, init_weights=start, target_modules=["0"])
        library.inject_adapter_in_model(config, model)
    for role, t in slots_of(models[1], "default")["0"].tensors.items():
        assert torch.equal(t, getattr(models[0][0], role)["default"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_a_convolution_are_turned_by_the_definition_and_the_bias_with_them(variant):
    layer, size = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).double(), 4
    x = torch.randn(2, 3, 5, 5).double()
    plain = layer(x).detach()
    diffpeft.attach(layer, diffpeft.RoadConfig(variant=variant, group_size=size), targets=["0"])
    slot = slots_of(layer, "default")["0"].double()
    theta, alpha = (nn.init.normal_(t).detach() for t in (slot.road_theta, slot.road_alpha))
    want = plain.clone()
    for o in range(8):
        group, place = divmod(o, size)
        half, pair = divmod(place, size // 2)
        cos, sin = {
            "road_1": (group * size // 2 + pair,) * 2,
            "road_2": (o, o),
            "road_4": (group * 2 * size + place, group * 2 * size + size + place),
        }[variant]
        partner = o + (size // 2 if half == 0 else -size // 2)
        sign = -1 if half == 0 else 1
        want[:, o] = alpha[cos] * math.cos(theta[cos]) * plain[:, o]
        want[:, o] += sign * alpha[sin] * math.sin(theta[sin]) * plain[:, partner]
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    diffpeft.set_adapters(layer, {"default": 0.3})
    torch.testing.assert_close(layer(x), plain + 0.3 * (want - plain), rtol=1e-12, atol=1e-12)
    diffpeft.set_adapters(layer, {"default": 1.0})
    diffpeft.fuse(layer)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("fields", "why"), [(dict(group_size=3), "even"), (dict(group_size=16), "16 does not divide")])
def test_a_group_that_does_not_fit_is_refused(fields, why):
    with pytest.raises(ConfigError, match=why):
        diffpeft.attach(nn.Sequential(nn.Linear(6, 8)), diffpeft.RoadConfig(**fields), targets=["0"])
