"""PeftMixedModel: PEFT's outputs, names and errors for several methods on one model; and that it can be saved."""

from __future__ import annotations

import itertools
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import PeftMixedModel, get_peft_model
from tests.llm.models import batch, model, run

KINDS = {
    "lora": ("LoraConfig", dict(r=4, init_lora_weights=False)),
    "loha": ("LoHaConfig", dict(r=4, init_weights=False)),
    "lokr": ("LoKrConfig", dict(r=4, alpha=3, init_weights=False)),
    "adalora": ("AdaLoraConfig", dict(init_r=4, total_step=5, init_lora_weights=False)),
}
x = torch.randn(3, 10, generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 16)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def config(lib, kind, targets):
    name, fields = KINDS[kind]
    return getattr(lib, name)(target_modules=list(targets), **fields)


def made(lib, one, two, targets=("lin0", "lin1")):
    torch.manual_seed(0)
    wrapped = lib.get_peft_model(Net().eval(), config(lib, one, targets), "one", mixed=True)
    wrapped.add_adapter("two", config(lib, two, ["lin0"]))
    return wrapped.eval()


def filled(lib, one, two, numbers):
    """The same numbers in both libraries: they come in the order of an adapter's file."""
    wrapped = made(lib, one, two)
    if lib is diffpeft:
        for name in ("one", "two"):
            diffpeft.set_peft_model_state_dict(wrapped, numbers[name], name)
        return wrapped, numbers
    keys = [
        key for key in wrapped.state_dict() if "ranknum" not in key
    ]  # PEFT wraps a layer in another for each method
    return wrapped, {
        name: {
            key.replace(".base_layer", "").replace(f".{name}", ""): wrapped.state_dict()[key]
            for key in keys
            if f".{name}" in key
        }
        for name in ("one", "two")
    }


@pytest.mark.parametrize("one,two", itertools.combinations_with_replacement(KINDS, 2))
def test_any_two_methods_give_pefts_outputs(one, two):
    theirs, numbers = filled(peft, one, two, {})
    ours, _ = filled(diffpeft, one, two, numbers)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for active in (["one"], ["two"], ["one", "two"]):
            for wrapped in (ours, theirs):
                wrapped.set_adapter(active)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
            assert ours.active_adapters == theirs.active_adapters == active
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        trained = {name.rpartition(".")[2].partition("_")[0] for name, p in ours.named_parameters() if p.requires_grad}
        assert trained and not any(p.requires_grad for p in ours.get_base_model().lin1._parameters.values())
        want = theirs.merge_and_unload(adapter_names=["two"])(x)
        torch.testing.assert_close(ours.merge_and_unload(adapter_names=["two"])(x), want, rtol=1e-4, atol=1e-5)


def test_it_is_a_model_of_pefts_name_and_its_tuner_too():
    wrapped = made(diffpeft, "lora", "loha")
    assert type(wrapped) is PeftMixedModel and isinstance(wrapped, peft.PeftMixedModel)
    assert type(wrapped.base_model).__name__ == "MixedModel" and type(wrapped.get_base_model()) is Net
    assert wrapped.peft_config["two"].peft_type == "LOHA"
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert 0 < trainable < total


def told(job):
    with pytest.raises((ValueError, TypeError)) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job()
    return error.value


ERRORS = {
    "unknown, set": lambda lib, m: m.set_adapter(["one", "nope"]),
    "unknown, deleted": lambda lib, m: m.delete_adapter(["one", "nope"]),
    "prompts": lambda lib, m: m.add_adapter("p", lib.PrefixTuningConfig(num_virtual_tokens=2)),
    "a name in use": lambda lib, m: m.add_adapter("one", config(lib, "lora", ["lin0"])),
    "layer status": lambda lib, m: m.get_layer_status(),
    "model status": lambda lib, m: m.get_model_status(),
    "merged": lambda lib, m: (m.base_model.merge_adapter(["two"]), m.delete_adapter(["one", "two"])),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_pefts_and_change_nothing(case):
    theirs, ours = made(peft, "lora", "loha"), made(diffpeft, "lora", "loha")
    want, error = (told(lambda lib=lib, m=m: ERRORS[case](lib, m)) for lib, m in ((peft, theirs), (diffpeft, ours)))
    assert isinstance(error, TypeError) == isinstance(want, TypeError)
    assert str(error).startswith(str(want).partition(" Compatible")[0].rstrip("."))
    assert list(ours.peft_config) == ["one", "two"] == list(theirs.peft_config)
    assert {n for s in diffpeft.get_layer_status(ours.get_base_model()) for n in s.available_adapters} == {"one", "two"}


def test_adapters_are_deleted_together():
    ours = made(diffpeft, "lora", "loha")
    with torch.no_grad():
        base = Net()
        base.load_state_dict({k: t for k, t in ours.get_base_model().state_dict().items() if "adapters" not in k})
        ours.delete_adapter(["two", "one"])
        assert not ours.peft_config and ours.active_adapters == []
        assert torch.equal(ours(x), base(x)) and type(ours.get_base_model().lin0) is nn.Linear


def test_it_is_saved_and_loaded_which_pefts_is_not(tmp_path):
    wrapped = get_peft_model(model(), config(diffpeft, "lora", ["q_proj"]), "one", mixed=True)
    wrapped.add_adapter("two", config(diffpeft, "loha", ["v_proj", "q_proj"]))
    wrapped.eval().set_adapter(["one", "two"])
    want = run(wrapped)
    wrapped.save_pretrained(tmp_path)
    for lib in (diffpeft, peft):
        loaded = lib.PeftMixedModel.from_pretrained(model(), str(tmp_path / "one"), "one")
        loaded.load_adapter(str(tmp_path / "two"), "two")
        loaded.set_adapter(["one", "two"])
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**batch()).logits, want, rtol=1e-4, atol=1e-5)
        assert type(loaded) is lib.PeftMixedModel
    ids = batch()["input_ids"]
    assert wrapped.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (2, 9)
