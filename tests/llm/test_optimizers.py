"""PEFT's optimizers: the same groups, and the same weights after some steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import ConfigError
from diffpeft.optimizers import (
    LoraFAOptimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.optimizers")


class Net(nn.Module):
    """An embedding, a norm, linear layers and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer_norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.first, self.last, self.head = nn.Linear(6, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(self.last(self.first(self.layer_norm(self.embedding(ids))).relu()))


def pair(**fields):
    """PEFT's model and ours with the same LoRA in float64."""
    config = dict(r=2, lora_alpha=3, target_modules=["first", "last"], init_lora_weights=False, **fields)
    models = [lib.get_peft_model(Net().double(), lib.LoraConfig(**config)).double() for lib in (peft, diffpeft)]
    state = peft.get_peft_model_state_dict(models[0])
    diffpeft.set_peft_model_state_dict(models[1], state)
    return models


def role(name: str) -> str:
    """A parameter's name as both have it."""
    for infix in (".base_layer", ".modules_to_save", ".copies", ".adapters", ".default", ".weight"):
        name = name.replace(infix, "")
    name = name.replace("diff_b", "bias").replace("lora_B_bias", "lora_B.bias")
    return name.removeprefix("base_model.model.")


def groups(optimizer, model) -> list[tuple[set[str], float, float]]:
    names = {id(p): role(n) for n, p in model.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["embedding", "first"]},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["first"]},
        {"modules_to_save": ["head", "layer_norm"]},
        {"modules_to_save": ["embedding"]},
    ],
    ids=str,
)
def test_loraplus_groups_are_pefts(fields):
    models = [
        lib.get_peft_model(Net(), lib.LoraConfig(**{"target_modules": ["first", "last"], **fields}))
        for lib in (peft, diffpeft)
    ]
    options = dict(lr=1e-3, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5)
    made = [
        f(m, torch.optim.AdamW, **options)
        for f, m in zip((theirs.create_loraplus_optimizer, create_loraplus_optimizer), models, strict=True)
    ]
    expected, found = (groups(optimizer, model) for optimizer, model in zip(made, models, strict=True))
    assert len(found) == 4
    assert found == expected


def step(optimizer, model, seed: int) -> None:
    torch.manual_seed(seed)
    ids, labels = torch.randint(11, (4, 5)), torch.randint(3, (4, 5))
    model(ids).log_softmax(-1).gather(-1, labels[..., None]).mean().neg().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model) -> dict[str, torch.Tensor]:
    return {role(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}


def compare(create, create_theirs, models, tolerance: float) -> None:
    made = [f(m) for f, m in zip((create_theirs, create), models, strict=True)]
    for seed in range(4):
        for optimizer, model in zip(made, models, strict=True):
            step(optimizer, model, seed)
    expected, found = map(weights, models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "fields", [{}, {"rank_pattern": {"last": 3}, "use_rslora": True}, {"modules_to_save": ["head"]}], ids=str
)
def test_riemannian_steps_are_pefts(kind, fields):
    options = dict(lr=1e-2, reg=0.05)
    compare(
        lambda m: create_riemannian_optimizer(m, kind, **options),
        lambda m: theirs.create_riemannian_optimizer(m, kind, **options),
        pair(**fields),
        1e-9,
    )


def test_riemannian_optimizers_refuse_what_cannot_be():
    model = pair()[1]
    with pytest.raises(ConfigError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(Net(), torch.optim.SGD, lr=1e-2)
    with pytest.raises(ConfigError, match="requires a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-2)
    with pytest.raises(TypeError, match="must be a subclass"):
        create_riemannian_optimizer(model, nn.Linear, lr=1e-2)
    with pytest.raises(ConfigError, match="does not support closures"):
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2).step(lambda: 0.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "fields", [{}, {"alpha_pattern": {"last": 7}, "rank_pattern": {"first": 3}}, {"use_rslora": True}], ids=str
)
def test_lorafa_steps_are_pefts(monkeypatch, fields, decay):
    import peft.optimizers.lorafa as module

    monkeypatch.setattr(module, "is_bf16_available", lambda: False)  # it rounds to bfloat16 where there is one
    options = dict(r=2, lora_alpha=3, lr=1e-2, weight_decay=decay)
    models = pair(**fields)
    compare(
        lambda m: create_lorafa_optimizer(m, **options),
        lambda m: theirs.create_lorafa_optimizer(m, **options),
        models,
        1e-6,
    )
    frozen = [p.requires_grad for n, p in models[1].named_parameters() if n.endswith("lora_A")]
    assert frozen and not any(frozen)


def test_lorafa_trains_what_pefts_cannot():
    """A magnitude between the factors, convolutions, and a head beside them; its state is kept by parameter."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    model = diffpeft.get_peft_model(
        net, diffpeft.LoraConfig(r=2, target_modules=["0"], use_dora=True, modules_to_save=["2"])
    )
    optimizer = create_lorafa_optimizer(model, 2, 8, 1e-2)
    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    other = create_lorafa_optimizer(model, 2, 8, 1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == len(optimizer.state) > 2


def test_lorafa_projects_onto_the_gradient_of_the_whole_weight():
    """Of all changes of B, the projected one comes closest to the gradient of W: s B A with B = (g A^T) (A A^T)^-1 / s."""
    torch.manual_seed(0)
    A, G, s = torch.randn(3, 6).double(), torch.randn(5, 6).double(), 1.5
    B = nn.Parameter(torch.zeros(5, 3).double())
    B.grad = s * G @ A.T  # by the chain rule
    group = {
        "params": [nn.Parameter(A, requires_grad=False), B],
        "names": ["x.lora_A", "x.lora_B"],
        "scaling_factors": [s, s],
        "betas": (0.0, 0.0),
    }
    optimizer = LoraFAOptimizer([group], lr=1.0, correct_bias=False, eps=0.0)
    best = torch.linalg.lstsq(A.T, G.T).solution.T / s
    optimizer.step()
    torch.testing.assert_close(optimizer.state[B]["exp_avg"], best, rtol=1e-6, atol=1e-8)
    assert torch.equal(optimizer.param_groups[0]["params"][0], A)


def test_lorafa_arguments():
    model = pair(use_rslora=True)[1]
    with pytest.raises(ConfigError, match="was passed to create_lorafa_optimizer"):
        create_lorafa_optimizer(model, 2, 3, 1e-3, use_rslora=False)
    with pytest.warns(FutureWarning):
        optimizer = create_lorafa_optimizer(model, 2, 3, 1e-3, use_rslora=True)
    factors = [f for f in optimizer.param_groups[0]["scaling_factors"] if f is not None]
    assert factors == pytest.approx([3 / math.sqrt(2)] * 4)
    for options in ({"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}):
        with pytest.raises(ValueError, match="Invalid"):
            LoraFAOptimizer([nn.Parameter(torch.ones(1))], **options)
