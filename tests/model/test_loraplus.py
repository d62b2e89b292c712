"""LoRA+: the groups of parameters are PEFT's, in its order, for every kind of parameter that adapters have."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as theirs
from torch import nn

import diffpeft
from diffpeft import ConfigError, create_loraplus_optimizer

RATES = dict(lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5)
BOTH = {"target_modules": ["emb", "lin", "conv"]}
CASES = [
    ("LoraConfig", dict(r=2, **BOTH)),
    ("LoraConfig", dict(r=2, target_modules=["lin"], lora_bias=True)),
    ("LoraConfig", dict(r=2, use_dora=True, **BOTH)),
    ("LoraConfig", dict(r=2, target_modules=["lin"], bias="all")),
    ("LoraConfig", dict(r=2, target_modules=["lin"], modules_to_save=["norm", "head", "emb"])),
    ("LoraConfig", dict(r=2, target_modules=["lin"], target_parameters=["head.weight"])),
    ("AdaLoraConfig", dict(init_r=2, target_r=1, total_step=9, target_modules=["lin"])),
    ("LoHaConfig", dict(r=2, target_modules=["lin", "conv"])),
    ("IA3Config", dict(target_modules=["lin", "head"], feedforward_modules=["head"])),
    ("VeraConfig", dict(r=2, target_modules=["lin"])),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.lin, self.head = (
            nn.Embedding(7, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 5),
            nn.Linear(5, 3, bias=False),
        )
        self.conv = nn.Conv2d(3, 4, 3)


def groups(optimizer, model):
    """For each group its rates, and the shapes of what is in it by layer and role."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [
        (g["lr"], g["weight_decay"], sorted((_layer(names[id(p)]), tuple(p.shape)) for p in g["params"]))
        for g in optimizer.param_groups
    ]


def _layer(name):
    return next(part for part in name.split(".") if part not in ("base_model", "model"))


@pytest.mark.parametrize(("cls", "fields"), CASES, ids=lambda v: str(v)[:60])
@pytest.mark.filterwarnings("ignore")
def test_groups_and_their_rates_are_pefts(cls, fields):
    want = peft.get_peft_model(Net(), getattr(peft, cls)(**fields))
    ours = diffpeft.get_peft_model(Net(), getattr(diffpeft, cls)(**fields))
    expected = groups(theirs(want, torch.optim.AdamW, **RATES), want)
    assert groups(create_loraplus_optimizer(ours, torch.optim.AdamW, **RATES), ours) == expected
    assert len(expected) == 4


def test_a_model_without_adapters_has_the_same_groups():
    model = Net()
    expected = groups(theirs(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=2.0), model)
    assert groups(create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=2.0), model) == expected
    assert not expected[1][2]  # no adapter is on the embedding


@pytest.mark.parametrize("rates", [dict(lr=1e-3, loraplus_lr_ratio=0), dict(lr=0, loraplus_lr_ratio=2)])
def test_rates_are_above_0(rates):
    with pytest.raises(ConfigError, match="above 0"):
        create_loraplus_optimizer(Net(), torch.optim.AdamW, **rates)
