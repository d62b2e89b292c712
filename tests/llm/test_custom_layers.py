"""`_register_custom_module`: layers of classes of the user's own."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffpeft
from diffpeft import ConfigError, LoraConfig, PeftModel, get_peft_model
from diffpeft.layers import sites
from diffpeft.tuners import lora


@pytest.fixture(autouse=True)
def as_before():
    yield
    sites._registered.clear()
    sites._known.clear()


class Dense(nn.Module):
    """A linear layer that PyTorch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 8
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return 2 * F.linear(x, self.weight)


class Derived(Dense):
    pass


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = 9, 6, None
        self.scale_grad_by_freq = self.sparse = False
        self.weight = nn.Parameter(torch.randn(9, 6))

    def forward(self, x):
        return F.embedding(x, self.weight)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Plain(lora.Linear):
    """Nothing of its own."""


class PlainEmbedding(lora.Embedding):
    pass


class Theirs(peft.tuners.lora.Linear):
    pass


class Coded(lora.Linear):
    def forward(self, x):
        return x


class OfLstms(nn.Module, lora.LoraLayer):
    def __init__(self, base_layer, adapter_name, **kwargs):
        super().__init__()


class Net(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.own, self.out = nn.Linear(6, 6), (layer or Dense)(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.own(self.lin(x)))


def config(mapping=None, **fields):
    made = LoraConfig(target_modules=["lin", "own"], r=2, init_lora_weights=False, **fields)
    made._register_custom_module(mapping or {Dense: Plain})
    return made


def given(model):
    return model.get_base_model().own.adapters.default


@pytest.mark.parametrize("layer", [Dense, Derived])
@pytest.mark.parametrize("like", [Plain, Theirs])
def test_a_class_that_is_made_like_a_linear_layer_is_adapted_as_one(layer, like, tmp_path):
    text = f"Unsupported layer type '{layer}' encountered, proceed at your own risk."
    with pytest.warns(UserWarning, match=re.escape(text)):
        model = get_peft_model(Net(layer), config({Dense: like}))
    x, base = torch.randn(3, 6), Net(layer).own
    slot = given(model)
    torch.testing.assert_close(model.get_base_model().own(x), base(x) + 4 * x @ slot.lora_A.T @ slot.lora_B.T)
    model(x).square().sum().backward()
    assert slot.lora_A.grad is not None and slot.lora_B.grad is not None
    model.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    again._register_custom_module({Dense: like})
    loaded = PeftModel.from_pretrained(Net(layer), tmp_path, config=again)
    torch.testing.assert_close(loaded(x), model(x))
    assert type(loaded.unload().own) is layer


def test_other_kinds_and_copies():
    looked = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    looked._register_custom_module({Looked: PlainEmbedding})
    model = get_peft_model(nn.Sequential(Looked()), looked)
    assert isinstance(model.get_base_model()[0], PlainEmbedding) and isinstance(model.get_base_model()[0], Looked)
    ids = torch.tensor([1, 4])
    slot = model.get_base_model()[0].adapters.default
    want = model.get_base_model()[0].weight[ids] + 4 * slot.lora_embedding_A.T[ids] @ slot.lora_embedding_B.T
    torch.testing.assert_close(model(ids), want)
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


def test_layers_that_are_known_are_adapted_as_they_are():
    x = torch.randn(3, 6)
    for layer, key in ((OwnLinear(6, 8), OwnLinear), (nn.Linear(6, 8), nn.Linear)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            custom = get_peft_model(Net(lambda layer=layer: copy.deepcopy(layer)), config({key: Plain}))
            torch.manual_seed(1)
            plain = get_peft_model(
                Net(lambda layer=layer: copy.deepcopy(layer)),
                LoraConfig(target_modules=["lin", "own"], r=2, init_lora_weights=False),
            )
        assert torch.equal(custom(x), plain(x))


@pytest.mark.parametrize(
    "layer, mapping, text",
    [
        (lambda: nn.LSTM(6, 8), {nn.LSTM: OfLstms}, "OfLstms, whose code would not run"),
        (Dense, {Dense: Coded}, "Coded, whose code would not run"),
        (lambda: nn.Linear(6, 8), {nn.Linear: Coded}, "Coded, whose code would not run"),
        (lambda: nn.LSTM(6, 8), {nn.LSTM: Plain}, "registered as a Linear, and is not made like one"),
        (Dense, {nn.Embedding: Plain}, "is not supported"),
    ],
)
def test_what_would_not_act_as_registered_is_refused(layer, mapping, text):
    model = Net(layer)
    with pytest.raises(ConfigError, match=text):
        get_peft_model(model, config(mapping))
    assert not hasattr(model.lin, "adapters") and not sites._registered


def test_only_classes_are_registered_and_no_file_has_them(tmp_path):
    with pytest.raises(ConfigError, match="class"):
        LoraConfig()._register_custom_module({Dense: "Plain"})
    made = config()
    made._register_custom_module({Looked: PlainEmbedding})
    assert made._custom_modules == {Dense: Plain, Looked: PlainEmbedding}
    assert copy.deepcopy(made)._custom_modules == made._custom_modules and LoraConfig()._custom_modules is None
    assert not any("custom" in field for field in made.to_dict())


def test_attach_knows_a_registered_class():
    sites.register(Dense, nn.Linear)
    model = Net()
    assert diffpeft.attach(model, LoraConfig(r=2), targets=["own"]).layers == ("own",)
