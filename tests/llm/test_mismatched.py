"""`ignore_mismatched_sizes`: an adapter for a model of other sizes, beside PEFT's loading of the same."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft


class Net(nn.Module):
    """An embedding, a layer and a head of some sizes, with a norm that has a scalar among its tensors."""

    def __init__(self, tokens=10, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin, self.norm = nn.Embedding(tokens, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.lin(self.emb(x).sum(1))))


FIELDS = dict(r=2, target_modules=["emb", "lin"], modules_to_save=["head", "norm"], init_lora_weights=False)
SMALL, LARGE = dict(tokens=10, classes=4), dict(tokens=13, classes=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    wrapped = diffpeft.get_peft_model(Net(**SMALL), diffpeft.LoraConfig(**FIELDS))
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape)
    path = tmp_path_factory.mktemp("small")
    wrapped.save_pretrained(path)
    return path


def tensors_of(lib, model, name="default"):
    return {k: t.clone() for k, t in lib.get_peft_model_state_dict(model, adapter_name=name).items()}


# ways into a model of other sizes: -> the tensors of the adapter before and after, and what the call says
def loaded(lib, folder):
    model = lib.PeftModel.from_pretrained(Net(**LARGE), folder, ignore_mismatched_sizes=True)
    return None, tensors_of(lib, model)


def added(lib, folder):
    model = lib.get_peft_model(Net(**LARGE), lib.LoraConfig(**FIELDS))
    model.load_adapter(folder, "other", ignore_mismatched_sizes=True)
    return None, tensors_of(lib, model, "other")


def reloaded(lib, folder):
    model = lib.get_peft_model(Net(**LARGE), lib.LoraConfig(**FIELDS))
    before = tensors_of(lib, model)
    model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
    return before, tensors_of(lib, model)


def put(lib, folder):
    model = lib.get_peft_model(Net(**LARGE), lib.LoraConfig(**FIELDS))
    before = tensors_of(lib, model)
    lib.set_peft_model_state_dict(model, lib.load_peft_weights(folder, device="cpu"), ignore_mismatched_sizes=True)
    return before, tensors_of(lib, model)


@pytest.mark.parametrize("way", [loaded, added, reloaded, put])
def test_what_fits_is_loaded_and_the_others_stay(way, folder):
    file = diffpeft.load_peft_weights(folder)
    for lib in (peft, diffpeft):
        with pytest.warns(UserWarning, match="being ignored because you passed `ignore_mismatched_sizes=True`") as said:
            before, after = way(lib, folder)
        assert after.keys() == file.keys()
        odd = {key for key in file if after[key].shape != file[key].shape}
        assert {key.removeprefix("base_model.model.") for key in odd} == {
            "emb.lora_embedding_A",
            "head.weight",
            "head.bias",
        }
        told = next(str(w.message) for w in said if "being ignored" in str(w.message))
        assert all(str(tuple(file[key].shape)[-1]) in told and str(tuple(after[key].shape)[-1]) in told for key in odd)
        assert all(torch.equal(after[key], file[key]) for key in file if key not in odd)
        assert before is None or all(torch.equal(after[key], before[key]) for key in odd)


@pytest.mark.parametrize("way", [loaded, added, reloaded, put])
def test_where_all_fits_nothing_is_said(way, folder, monkeypatch):
    monkeypatch.setitem(LARGE, "tokens", SMALL["tokens"])
    monkeypatch.setitem(LARGE, "classes", SMALL["classes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, after = way(diffpeft, folder)
    assert all(torch.equal(t, after[key]) for key, t in diffpeft.load_peft_weights(folder).items())


def test_the_keys_are_in_the_result(folder):
    model = diffpeft.inject_adapter_in_model(diffpeft.LoraConfig(**FIELDS), Net(**LARGE))
    file = diffpeft.load_peft_weights(folder)
    with pytest.warns(UserWarning, match="being ignored"):
        result = diffpeft.set_peft_model_state_dict(model, file, ignore_mismatched_sizes=True)
    assert {key for key, *_ in result.mismatched_keys} == {k for k in file if "embedding_A" in k or "head" in k}


def test_without_the_word_sizes_are_told_and_nothing_changes(folder):
    for lib in (peft, diffpeft):
        base = Net(**LARGE)
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(RuntimeError, match="size mismatch") as error:
            lib.PeftModel.from_pretrained(base, folder)
        assert "10" in error.value.args[0] and "13" in error.value.args[0]
        if lib is diffpeft:
            assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
