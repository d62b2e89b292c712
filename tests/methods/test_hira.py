"""HiRA: ranks by layer, where PEFT has one for all."""

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.model.state import slots_of


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(6, 5)})


FIELDS = dict(r=3, rank_pattern={"two": 2}, target_modules=["one", "two"])


def test_a_layer_of_another_rank_has_it_here_and_not_in_peft(tmp_path):
    """PEFT's first adapter has one rank; its file says what it has not, and is read as it is."""
    theirs, ours = peft.get_peft_model(net(), peft.HiraConfig(**FIELDS)), net()
    assert theirs.base_model.model["two"].hira_A["default"].shape == (3, 6)
    theirs.save_pretrained(tmp_path)
    diffpeft.load_lora(ours, tmp_path, name="theirs")
    diffpeft.attach(ours, diffpeft.HiraConfig(**FIELDS), name="ours")
    assert slots_of(ours, "theirs")["two"].rank == 3 and slots_of(ours, "ours")["two"].rank == 2


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv2d(4, 6, 3), lambda: nn.Embedding(9, 5)])
def test_a_fresh_one_is_pefts_to_the_bit(make, start):
    models = [nn.Sequential(make()) for _ in range(2)]
    for library, model in zip((peft, diffpeft), models, strict=True):
        torch.manual_seed(3)
        library.inject_adapter_in_model(library.HiraConfig(r=3, init_weights=start, target_modules=["0"]), model)
    slot = slots_of(models[1], "default")["0"]
    for role, t in slot.tensors.items():
        assert torch.equal(t, getattr(models[0][0], role)["default"])
