"""DeLoRA: PEFT's draws and lengths to the bit, and the definition on a kernel."""

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.model.state import slots_of


@pytest.mark.parametrize("start", [True, False])
def test_a_fresh_one_is_pefts_to_the_bit(start):
    models = [nn.Sequential(nn.Linear(6, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for library, model in zip((peft, diffpeft), models, strict=True):
        torch.manual_seed(3)
        config = library.DeloraConfig(r=3, init_weights=start, target_modules=["0"], lambda_pattern={"0": 7})
        library.inject_adapter_in_model(config, model)
    slot = slots_of(models[1], "default")["0"]
    assert [*slot.tensors] == ["delora_A", "delora_B", "delora_lambda", "delora_w_norm"]
    for role, t in slot.tensors.items():
        assert torch.equal(t, getattr(models[0][0], role)["default"]), role
    assert not slot.delora_w_norm.requires_grad


def test_the_weight_is_the_definition():
    layer, r = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False)).double(), 3
    W = layer[0].weight.detach().clone()
    diffpeft.attach(layer, diffpeft.DeloraConfig(r=r, delora_lambda=5, init_weights=False), targets=["0"])
    slot = slots_of(layer, "default")["0"].double()
    A, B = slot.delora_A.detach().flatten(1), slot.delora_B.detach().flatten(1)
    steps = sum(torch.outer(B[:, j], A[j]) / (A[j].norm() * B[:, j].norm()) for j in range(r))
    want = W.flatten(1) + 5 / r * steps * slot.delora_w_norm.flatten()
    diffpeft.fuse(layer)
    torch.testing.assert_close(layer[0].weight.flatten(1), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slot.delora_w_norm.flatten(), W.flatten(1).norm(dim=0), rtol=1e-6, atol=0)
