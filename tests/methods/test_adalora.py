"""AdaLoRA on one layer, and its config, against PEFT; the laws are in tests/contracts, the schedule in tests/llm."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings

import peft
import pytest
import torch
from oracles import INPUTS, LAYERS, close, fresh, geometry_of, layer_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import diffpeft
from diffpeft import CannotConvertError, CheckpointError, ConfigError, converters, set_adapters
from diffpeft.bundle import Bundle
from diffpeft.methods import METHODS, Geometry, Spec
from diffpeft.methods.adalora import AdaLora, AdaLoraConfig
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.state import entries_of, parameters_of, slots_of

STEPS = {"total_step": 9}
KINDS = {
    **{kind: (lambda kind=kind: layer_of(kind), INPUTS[kind]) for kind in LAYERS if kind not in ("conv1d", "grouped")},
    "gpt-2's Conv1D": (lambda: Conv1D(36, 24).double(), (2, 5, 24)),
}
ROLES = AdaLora.roles


def pair(kind, **fields):
    """The same layer with the same adapter here and in PEFT, and an input, in float64."""
    make, shape = KINDS[kind]
    base, fields = nn.Sequential(make()).requires_grad_(False), {**STEPS, "init_r": 5, "lora_alpha": 7, **fields}
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out
        theirs = peft.get_peft_model(base, peft.AdaLoraConfig(**fields, target_modules=["0"])).double()
    diffpeft.attach(ours, AdaLoraConfig(**fields), targets=["0"])
    slot, layer = slots_of(ours, "default")["0"].double(), theirs.base_model.model[0]
    layer.ranknum["default"].requires_grad_(False)
    for role in ROLES:
        p = slot.get_parameter(role)
        assert p.shape == getattr(layer, role)["default"].shape, role
        nn.init.normal_(p, std=0.3)
        getattr(layer, role)["default"].data.copy_(p)
    return ours, theirs, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [7, 0.5, 0, -3])
@pytest.mark.parametrize("kind", KINDS)
def test_output_gradients_and_weight_are_pefts(kind, alpha):
    ours, theirs, x = pair(kind, lora_alpha=alpha)
    layer, slot = theirs.base_model.model[0], slots_of(ours, "default")["0"]
    outputs = ours(x), theirs(x)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for y in outputs:
        y.square().sum().backward()
    for role in ROLES:
        torch.testing.assert_close(
            slot.get_parameter(role).grad, getattr(layer, role)["default"].grad, rtol=1e-12, atol=1e-10, msg=role
        )
    diffpeft.fuse(ours)
    layer.merge()
    torch.testing.assert_close(ours[0].weight, layer.get_base_layer().weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_pefts(kind):
    ours, theirs, x = pair(kind, lora_dropout=0.4)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[0], ours.eval()(x))


def test_strength_is_pefts_scale():
    ours, theirs, x = pair("linear")
    set_adapters(ours, {"default": 0.4})
    theirs.base_model.model[0].scaling["default"] *= 0.4
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_two_commute_and_cost_one_product():
    ours, _, x = pair("linear")
    diffpeft.attach(ours, AdaLoraConfig(**STEPS, init_r=3), "b", targets=["0"])
    for p in parameters_of(ours, "b"):
        nn.init.normal_(p)
    slots_of(ours, "b")["0"].double()
    set_adapters(ours, {"default": 1.0, "b": 0.5})
    y = ours(x)
    set_adapters(ours, {"b": 0.5, "default": 1.0})
    close(ours(x), y)


@pytest.mark.parametrize("kind", LAYERS)
def test_fresh_tensors_are_drawn_as_in_peft(kind):
    """E zero, A and B with a deviation of 0.02; with init_lora_weights=False all with 1."""
    g = geometry_of(layer_of(kind))
    for init, std in ((True, 0.02), ("gaussian", 0.02), (False, 1.0)):
        made = fresh(AdaLora, AdaLoraConfig(**STEPS, init_r=16, init_lora_weights=init), g)
        shapes = {"lora_A": (16, g.columns), "lora_B": (g.out, 16), "lora_E": (16, 1)}
        assert {role: tuple(t.shape) for role, t in made.tensors.items()} == shapes
        for role in ("lora_A", "lora_B"):
            assert abs(made.tensors[role].std().item() / std - 1) < 0.15
        assert bool(made.tensors["lora_E"].any()) == (init is False)
        assert (made.alpha, made.options) == (8.0, {"ranknum": 16})
    with_dropout = fresh(AdaLora, AdaLoraConfig(**STEPS, lora_dropout=0.1), g)
    assert with_dropout.options == {"ranknum": 12, "dropout": 0.1}


def test_a_generator_decides_the_fresh_tensors():
    drawn = []
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Linear(16, 16))
        diffpeft.attach(model, AdaLoraConfig(**STEPS), targets=["0"], generator=torch.Generator().manual_seed(seed))
        drawn.append(slots_of(model, "default")["0"].lora_A)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_scale_is_of_the_rank_at_the_start():
    p = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(4, 2), "lora_E": torch.ones(2, 1)}
    g = Geometry(4, 6)
    assert AdaLora.scale(p, Spec(g, 6.0, {"ranknum": 12})) == 6 / 12.00001
    assert AdaLora.scale(p, Spec(g, -1.0, {"ranknum": 12})) == 2 / 12.00001
    assert AdaLora.scale(p, Spec(g, 6.0)) == 6 / 2.00001
    assert AdaLora.rank(p) == 2


def test_a_rank_of_0_changes_nothing():
    for kind in KINDS:
        make, shape = KINDS[kind]
        model = nn.Sequential(make()).requires_grad_(False)
        x = torch.randn(shape, dtype=torch.float64)
        want = model(x)
        diffpeft.attach(model, AdaLoraConfig(**STEPS), targets=["0"])
        slot = slots_of(model, "default")["0"].double()
        for role, axis in {"lora_A": 0, "lora_B": 1, "lora_E": 0}.items():
            p = slot.get_parameter(role)
            setattr(slot, role, nn.Parameter(p.detach().narrow(axis, 0, 0)))
        assert not AdaLora.check(slot.tensors, slot.parts[0].spec)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)
        model(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
        diffpeft.fuse(model)
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"lora_A": (2, 6), "lora_B": (4, 2)}, "lora_E missing"),
        ({"lora_A": (2, 6)}, "lora_B, lora_E missing"),
        ({"lora_A": (2, 7), "lora_B": (4, 2), "lora_E": (2, 1)}, "lora_A (2, 6), not (2, 7)"),
        ({"lora_A": (2, 6), "lora_B": (4, 3), "lora_E": (3,)}, "lora_E (3, 1), not (3,)"),
        ({"lora_A": (2, 6), "lora_B": (4, 2), "lora_E": (2, 1)}, ""),
    ],
)
def test_what_does_not_fit_is_said(shapes, said):
    why = AdaLora.check({role: torch.zeros(shape) for role, shape in shapes.items()}, Spec(Geometry(4, 6)))
    assert said in why if said else not why


# ---- the config


def test_fields_and_defaults_are_pefts():
    ours, theirs = AdaLoraConfig(**STEPS), peft.AdaLoraConfig(**STEPS)
    ours.validate()
    assert {f.name for f in dataclasses.fields(ours)} == {f.name for f in dataclasses.fields(theirs)}
    for f in dataclasses.fields(ours):
        if f.name not in ("peft_version", "runtime_config"):
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name
    assert METHODS["adalora"].config is AdaLoraConfig


def test_the_file_is_pefts(tmp_path):
    fields = dict(
        STEPS,
        init_r=6,
        tfinal=2,
        target_modules=["q", "k"],
        rank_pattern={"q.lora_E": [True, False], "k.lora_E": [True] * 2},
    )
    AdaLoraConfig(**fields).save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(theirs) is peft.AdaLoraConfig and theirs.rank_pattern == fields["rank_pattern"]
    peft.AdaLoraConfig(**fields).save_pretrained(tmp_path)
    ours = PeftConfig.from_pretrained(tmp_path)
    assert type(ours) is AdaLoraConfig and ours.to_dict() == AdaLoraConfig(**fields).to_dict()
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) - set(ours.to_dict()) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"total_step": 0},
        {"total_step": -1},
        {"total_step": 5, "orth_reg_weight": -0.1},
        {"total_step": 5, "tinit": 3, "tfinal": 2},
        {"total_step": 5, "tinit": 5},
        {"total_step": 5, "tfinal": 9},
        {"total_step": 5, "use_dora": True},
        {"total_step": 5, "target_modules": "q", "layers_to_transform": [0]},
        {"total_step": 5, "target_modules": ["q"], "layers_pattern": "h"},
    ],
)
def test_what_peft_refuses_is_refused(fields):
    with pytest.raises(ConfigError):
        AdaLoraConfig(**fields)
    with pytest.raises(ValueError):
        peft.AdaLoraConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_r": 0},
        {"target_r": -1},
        {"tinit": 1.5},
        {"deltaT": 0},
        {"beta1": 0},
        {"beta2": 1.0},
        {"lora_dropout": 1},
        {"lora_alpha": "8"},
        {"bias": "some"},
        {"init_lora_weights": "none"},
        {"eva_config": {"rho": 2}},
    ],
)
def test_a_wrong_value_is_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        AdaLoraConfig(**STEPS, **fields).validate()


def test_loftq_is_refused():
    with pytest.raises(ConfigError, match="ADALORA does not support LOFTQ"):
        AdaLoraConfig(**STEPS, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize("fields", [{"r": 4}, {"use_rslora": True}, {"lora_bias": True}, {"alpha_pattern": {"q": 4}}])
def test_a_field_of_loras_that_means_nothing_is_named_in_a_warning(fields):
    with pytest.warns(UserWarning, match="`r` is not used|mean nothing") as said:
        config = AdaLoraConfig(**STEPS, **fields)
    assert said[0].filename == __file__
    model = nn.Sequential(nn.Linear(16, 16))
    diffpeft.attach(model, config, targets=["0"])
    slot = slots_of(model, "default")["0"]
    assert (slot.rank, slot.scale, set(slot.tensors)) == (12, 8 / 12.00001, set(ROLES))


def test_other_fields_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaLoraConfig(**STEPS, r=8, lora_dropout=0.1, bias="lora_only").validate()


def test_biases_train_with_it():
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    diffpeft.attach(model, AdaLoraConfig(**STEPS, bias="lora_only"), targets=["0"])
    assert {n.split(".")[-1] for n, _ in model.named_parameters() if "adapters" in n} == {*ROLES, "diff_b"}


@pytest.mark.parametrize("keyword", [{"dora": "out"}, {"tucker": True}])
def test_keywords_of_other_methods_are_refused(keyword):
    with pytest.raises(ConfigError, match="nothing that adalora has"):
        diffpeft.attach(nn.Sequential(nn.Linear(16, 16)), AdaLoraConfig(**STEPS), targets=["0"], **keyword)


# ---- files


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    layers = nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12)
    return nn.Sequential(*layers).requires_grad_(False)


PATTERN = {"0.lora_E": [True, False, True, False], "2.lora_E": [False] * 4, "4.lora_E": [True] * 4}


@pytest.fixture(scope="module")
def pefts(base, tmp_path_factory):
    """A folder that PEFT wrote of a pruned adapter, an input, and PEFT's output for it."""
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(total_step=3, init_r=4, lora_alpha=5, target_modules=["0", "2", "4"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
    model.peft_config["default"].rank_pattern = {f"{key}.default": mask for key, mask in PATTERN.items()}
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, model.peft_config["default"].rank_pattern
    )
    folder, x = tmp_path_factory.mktemp("adalora"), torch.randn(3, 16)
    want = model(x).detach()
    model.save_pretrained(folder)
    return folder, x, want


def test_a_file_of_pefts_loads_and_goes_back(base, pefts, tmp_path):
    folder, x, want = pefts
    model = copy.deepcopy(base)
    assert diffpeft.load_lora(model, folder, name="s").methods == {"adalora"}
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert {layer: slot.rank for layer, slot in slots_of(model, "s").items()} == {"0": 2, "2": 0, "4": 4}
    diffpeft.save_lora(model, tmp_path, name="s", format="peft")
    torch.testing.assert_close(_in_peft(base, tmp_path)(x), want, rtol=1e-5, atol=1e-5)
    wrote, read = (load_file(where / "adapter_model.safetensors") for where in (tmp_path, folder))
    assert wrote.keys() == read.keys() and all(torch.equal(wrote[key], read[key]) for key in read)


def test_what_was_attached_here_loads_in_peft(base, pefts, tmp_path):
    _, x, _ = pefts
    model = copy.deepcopy(base)
    diffpeft.attach(model, AdaLoraConfig(total_step=3, init_r=4, lora_alpha=3), targets=["0", "2", "4"])
    for p in parameters_of(model, "default"):
        nn.init.normal_(p, std=0.5)
    diffpeft.save_lora(model, tmp_path, format="peft")
    torch.testing.assert_close(_in_peft(base, tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {*ROLES}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank_pattern": {**PATTERN, "0.lora_E": [True] * 4}}, "the rank is 4, not 2"),
        ({"rank_pattern": None}, "the rank is 4, not"),
        ({"peft_type": "LORA", "rank_pattern": {}}, "the tensors adalora"),
    ],
)
def test_a_config_that_says_something_else_is_refused(base, pefts, tmp_path, fields, said):
    folder, *_ = pefts
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(CheckpointError, match=said):
        diffpeft.load_lora(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("lost", ROLES)
def test_a_file_without_one_of_the_tensors_is_refused(base, pefts, tmp_path, lost):
    folder, *_ = pefts
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if k != f"base_model.model.0.{lost}"}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError):
        diffpeft.load_lora(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "lycoris"])
def test_other_formats_cannot_hold_it(base, tmp_path, format):
    model = copy.deepcopy(base)
    diffpeft.attach(model, AdaLoraConfig(total_step=3, init_r=4), targets=["0"])
    with pytest.raises(CannotConvertError):
        diffpeft.save_lora(model, tmp_path / "a.safetensors", format=format)
    assert not any(tmp_path.iterdir())


def test_a_folder_holds_one_alpha_and_one_rank_at_the_start(base, tmp_path):
    model = copy.deepcopy(base)
    diffpeft.attach(model, AdaLoraConfig(total_step=3, init_r=4), targets=["0"])
    diffpeft.attach(model, AdaLoraConfig(total_step=3, init_r=4, lora_alpha=1), "b", targets=["2"])
    entries = [e for name in ("default", "b") for l, s in slots_of(model, name).items() for e in entries_of(l, s)]
    with pytest.raises(CannotConvertError, match="same alpha"):
        converters.write(Bundle("memory", "", entries), tmp_path / "x", format="peft")


def _in_peft(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
