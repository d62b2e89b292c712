"""What is reported of adapted layers and models, beside PEFT's report of the same."""

from __future__ import annotations

import dataclasses
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import diffpeft

LAYERS = {
    "linear": lambda: nn.Linear(16, 16),
    "gpt2": lambda: Conv1D(16, 16),
    "conv1d": lambda: nn.Conv1d(16, 16, 1),
    "conv2d": lambda: nn.Conv2d(16, 16, 1),
    "conv3d": lambda: nn.Conv3d(16, 16, 1),
    "embedding": lambda: nn.Embedding(16, 16),
}
SIZES = {
    "linear": lambda: nn.Linear(6, 8),
    "gpt2": lambda: Conv1D(8, 6),
    "conv1d": lambda: nn.Conv1d(6, 8, 1),
    "conv2d": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 8, 1),
    "embedding": lambda: nn.Embedding(6, 8),
}
METHODS = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "boft": ("BOFTConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "hra": ("HRAConfig", {}),
    "vera": ("VeraConfig", {}),
    "hira": ("HiraConfig", {}),
    "miss": ("MissConfig", {"r": 2}),
    "road": ("RoadConfig", {"group_size": 2}),
    "delora": ("DeloraConfig", {}),
    "c3a": ("C3AConfig", {"block_size": 2}),
}


class Net(nn.Module):
    """Layers of several kinds under names of their own."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def small():
    torch.manual_seed(0)
    made = {
        "lin0": "linear",
        "conv0": "conv2d",
        "emb0": "embedding",
        "lin1": "linear",
        "lin2": "linear",
        "emb1": "embedding",
    }
    return Net(**{name: LAYERS[kind]() for name, kind in made.items()})


def of(lib, fields, *further):
    model = lib.get_peft_model(small(), lib.LoraConfig(**fields))
    for name, other in zip(("b", "c"), further, strict=False):
        model.add_adapter(name, lib.LoraConfig(**other))
    return model


def layer(status):
    """One layer's report; the order of what is on one module is ours."""
    return dataclasses.astuple(status)


def both_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(map(layer, model.get_layer_status())), dataclasses.asdict(model.get_model_status())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_layers_are_called_what_peft_calls_them(method, kind):
    name, fields = METHODS[method]

    def made(lib):
        return lib.get_peft_model(Net(l=LAYERS[kind]()), getattr(lib, name)(target_modules=["l"], **fields))

    (ours,) = made(diffpeft).get_layer_status()
    try:
        (theirs,) = made(peft).get_layer_status()
    except Exception:  # PEFT has no such layer
        assert ours.module_type.lower().rpartition(".")[2].endswith(
            {"gpt2": "linear"}.get(kind, kind)
        ) and ours.active_adapters == ["default"]
        return
    assert layer(ours) == layer(theirs)


@pytest.mark.parametrize("kind", SIZES)
def test_layers_tell_their_sizes(kind):
    sizes = []
    for lib in (peft, diffpeft):
        model = lib.get_peft_model(Net(l=SIZES[kind]()), lib.LoraConfig(r=2, target_modules=["l"]))
        sizes.append((model.base_model.model.l.in_features, model.base_model.model.l.out_features))
    assert sizes[0] == sizes[1] == (6, 8)


MODELS = {
    "one": (dict(target_modules=["lin0", "conv0", "emb0"]),),
    "a copy": (dict(target_modules=["lin0"], modules_to_save=["lin1"]),),
    "copies of other modules": (
        dict(target_modules=["lin0"], modules_to_save=["lin1"]),
        dict(target_modules=["lin0"], modules_to_save=["lin2"]),
    ),
    "rows": (dict(target_modules=["lin0"], trainable_token_indices={"emb1": [0, 3]}),),
    "parameters": (dict(target_parameters=["lin0.weight"], target_modules=["lin1"]),),
    "on other layers": (dict(target_modules=["lin0", "emb0"]), dict(target_modules=["lin0", "lin1"], r=4)),
    "for inference": (dict(target_modules=["lin0"], inference_mode=True),),
}
# what is done to a model; what PEFT calls irregular, since a copy is never merged, or not active with all others, is regular here
STATES = {
    "fresh": lambda m: None,
    "the other is set": lambda m: m.set_adapter(list(m.peft_config)[-1]),
    "trained otherwise": lambda m: m.set_requires_grad(list(m.peft_config)[-1], False),
    "off": lambda m: m.base_model.disable_adapter_layers(),
    "off and on": lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()),
    "merged": lambda m: m.merge_adapter(),
    "merged and not": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", MODELS)
def test_states_are_what_peft_says(case, state):
    reports = []
    for lib in (peft, diffpeft):
        model = of(lib, *MODELS[case])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            STATES[state](model)
        reports.append(both_of(model))
    (layers, whole), (ours, our_whole) = reports
    if case == "for inference" and state == "off and on":  # PEFT trains it from then on
        assert whole["requires_grad"] == {"default": True} and our_whole["requires_grad"] == {"default": False}
        return
    if state == "merged" and "cop" in case:  # PEFT's report of copies does not follow a merge
        layers, ours = ([t for t in ls if t[1] != "ModulesToSaveWrapper"] for ls in (layers, ours))
    assert ours == layers
    odd = [name for name, value in whole.items() if value == "irregular" and our_whole[name] != value]
    assert not odd or ("cop" in case and {*odd} <= {"active_adapters", "merged_adapters"})
    assert {k: v for k, v in our_whole.items() if k not in odd} == {k: v for k, v in whole.items() if k not in odd}


def test_layers_of_which_a_bias_alone_is_trained_are_none_of_the_adapter_s():
    names = []
    for lib in (peft, diffpeft):
        model = lib.get_peft_model(small(), lib.LoraConfig(target_modules=["lin0"], bias="all"))
        names.append([s.name for s in model.get_layer_status()])
    assert names[0] == names[1] == ["model.lin0"]


def test_a_block_without_adapters_is_told():
    for lib in (peft, diffpeft):
        model = of(lib, dict(target_modules=["lin0"]))
        with model.disable_adapter():
            assert model.get_model_status().enabled is False
        assert model.get_model_status().enabled is True


def test_models_that_are_not_wrapped():
    for lib in (peft, diffpeft):
        plain = small()
        for status in (lib.get_layer_status, lib.get_model_status):
            with pytest.raises(ValueError, match="No adapter layers found in the model"):
                status(plain)
        lib.inject_adapter_in_model(lib.LoraConfig(target_modules=["lin0"]), plain)
        whole = lib.get_model_status(plain)
        assert (whole.base_model_type, whole.adapter_model_type, whole.peft_types) == ("other", "None", {})
        assert [s.name for s in lib.get_layer_status(plain)] == ["lin0"]


def test_prompts_are_on_no_layer():
    from tests.llm.models import model

    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(model(), lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        for status in ("get_layer_status", "get_model_status"):
            with pytest.raises(TypeError, match=rf"{status}\(\) got an invalid PeftModel instance"):
                getattr(wrapped, status)()
        with pytest.raises(TypeError, match="Setting `requires_grad` is not supported for prompt learning methods"):
            wrapped.set_requires_grad("no such adapter")


def test_a_model_s_config_is_a_dict():
    @dataclasses.dataclass
    class Config:
        hidden_size: int = 4

    from tests.llm.models import model

    nets = [nn.Linear(2, 2) for _ in range(3)]
    nets[1].config, nets[2].config = {"a": 1}, Config()
    for net in (*nets, model()):
        assert diffpeft.LoraModel.get_model_config(net) == peft.LoraModel.get_model_config(net)
