"""Adapters that are made for the keys of a state dict: layers and sides are those of the tensors, and PEFT's warnings are given."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import IA3Config, LoraConfig, inject_adapter_in_model


class Net(nn.Module):
    """Layers of which one's name is the end of another's, and some with as many inputs as outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.inner = nn.Linear(4, 4), nn.ModuleDict({"lin": nn.Linear(4, 4), "up": nn.Linear(4, 6)})
        self.conv, self.wide, self.blin = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 3, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.wide(self.conv(self.inner["up"](self.inner["lin"](self.blin(self.lin(x))))[:, :, None]))


LAYERS = ["lin", "blin", "inner.lin", "inner.up", "conv", "wide"]
X = torch.randn(3, 4)


def vectors(model, inner):
    """Vectors with PEFT's keys, on the inputs of the layers `inner`."""
    torch.manual_seed(1)
    state = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        out, into = layer.weight.shape[:2]
        if layer.weight.dim() > 2:
            state[f"{name}.ia3_l"] = torch.rand(1, into if name in inner else out, 1) + 0.5
        else:
            state[f"{name}.ia3_l"] = torch.rand(*((1, into) if name in inner else (out, 1))) + 0.5
    return state


def by_hand(state, inner):
    """What a net gives whose layers' inputs or outputs are multiplied."""
    model = Net()
    for name in LAYERS:
        by, layer = state[f"{name}.ia3_l"].flatten(), model.get_submodule(name)
        ones = [1] * (layer.weight.dim() - 2)
        with torch.no_grad():
            layer.weight.mul_(by.view(1, -1, *ones) if name in inner else by.view(-1, 1, *ones))
            if name not in inner:
                layer.bias.mul_(by)
    return model(X)


CONFIGS = {
    "says nothing": {},
    "says no layer": {"feedforward_modules": []},
    "says a layer": {"feedforward_modules": ["conv"]},
}


@pytest.mark.parametrize("said", CONFIGS)
@pytest.mark.parametrize(
    "inner",
    [("lin",), ("inner.lin",), ("inner.up", "wide"), ("lin", "inner.lin", "inner.up", "wide"), ()],
    ids=str,
)
def test_vectors_are_on_the_side_of_their_shape(inner, said):
    inner = {*inner, *(["conv"] if said == "says a layer" else [])}  # its shape does not tell
    state = vectors(Net(), inner)
    fields = CONFIGS[said] | ({"target_modules": LAYERS} if said == "says a layer" else {})
    model = inject_adapter_in_model(IA3Config(**fields), Net(), state_dict=state)
    assert diffpeft.set_peft_model_state_dict(model, state) == ([], [], [])
    torch.testing.assert_close(model(X), by_hand(state, inner))
    written = diffpeft.get_peft_model_state_dict(model)
    assert {key: t.shape for key, t in written.items()} == {key: t.shape for key, t in state.items()}


def test_a_compiled_model_s_keys_are_those_of_its_layers():
    state = {f"_orig_mod.{key}": t for key, t in vectors(Net(), {"lin"}).items()}
    model = inject_adapter_in_model(IA3Config(), Net(), state_dict=state)
    assert set(diffpeft.get_peft_model_state_dict(model)) == {key.removeprefix("_orig_mod.") for key in state}


def lora(names):
    return {f"{name}.lora_{ab}.weight": torch.zeros(2, 4) for name in names for ab in "AB"}


MEANT = {
    "the same layers": (["lin"], ["lin", "inner.lin"]),
    "the config means more": (["lin", "up"], ["lin", "inner.lin"]),
    "the keys mean more": (["inner.lin"], ["lin", "inner.lin"]),
    "both mean others": (["up"], ["lin"]),
    "an excluded layer": (["lin", "up"], ["lin", "inner.lin", "inner.up"]),
    "keys of no layer": (["lin"], ["lin", "inner.lin", "other"]),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_state_dict_that_disagrees_with_the_config_is_warned_of_as_in_peft(case):
    targets, names = MEANT[case]
    excluded = ["inner.up"] if "excluded" in case else None
    told = []
    for lib in (peft, diffpeft):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = lib.LoraConfig(r=2, target_modules=targets, exclude_modules=excluded)
            model = lib.inject_adapter_in_model(config, Net(), state_dict=lora(names))
        told.append([str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)])
        assert {*lib.get_peft_model_state_dict(model)} == {*lora(set(names) - {"other"})}
    assert told[0] == told[1]
    assert bool(told[0]) == (case not in ("the same layers", "keys of no layer"))


def test_where_a_model_has_no_default_the_keys_are_all_there_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject_adapter_in_model(LoraConfig(r=2), Net(), state_dict=lora(["inner.up"]))
    assert {key.partition(".lora")[0] for key in diffpeft.get_peft_model_state_dict(model)} == {"inner.up"}


@pytest.mark.parametrize("lib", [peft, diffpeft], ids=lambda lib: lib.__name__)
def test_keys_do_not_tell_parameters(lib):
    config = lib.LoraConfig(target_modules=[], target_parameters=["lin.weight"])
    with pytest.raises(ValueError, match="from a state_dict but the PEFT config uses `target_parameters`"):
        lib.inject_adapter_in_model(config, Net(), state_dict=lora(["lin"]))
