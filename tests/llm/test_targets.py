"""Which layers a config chooses: PEFT's answer is the oracle, its quirks included."""

from __future__ import annotations

import importlib
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import diffpeft
from diffpeft.llm.targets import chosen, matches, resolved, shortest
from diffpeft.model.target import adapted_layers
from tests.llm.models import TASKS, model


def theirs(base, config):
    """The layers that peft puts adapters on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config)
    return {n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}


FIELDS = {
    "a suffix": dict(target_modules=["q_proj"]),
    "suffixes": dict(target_modules=["q_proj", "down_proj"]),
    "a whole name": dict(target_modules=["model.layers.1.mlp.up_proj"]),
    "a part of a name is no suffix": dict(target_modules=["q_proj", "proj"]),
    "two segments": dict(target_modules=["mlp.up_proj"]),
    "an expression": dict(target_modules=r".*\.(q|v)_proj"),
    "an expression for whole names": dict(target_modules=r"model\.layers\.0\..*down_proj"),
    "all linear": dict(target_modules="all-linear"),
    "All-Linear": dict(target_modules="All-Linear"),
    "default": dict(),
    "one layer": dict(target_modules=["q_proj"], layers_to_transform=1),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1]),
    "a list of no layers": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "pattern of layers": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "patterns of layers": dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["h", "layers"]),
    "a whole name passes over the numbers": dict(
        target_modules=["model.layers.0.mlp.up_proj", "q_proj"], layers_to_transform=[1]
    ),
    "excluded suffix": dict(target_modules="all-linear", exclude_modules=["down_proj"]),
    "excluded expression": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.0\..*"),
    "excluded whole name": dict(target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "saved modules are no targets": dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head"]),
}


@pytest.mark.parametrize("case", FIELDS)
def test_the_same_layers_as_peft(case):
    ours = diffpeft.get_peft_model(model(), diffpeft.LoraConfig(**FIELDS[case]))
    found = set(adapted_layers(ours.get_base_model()))
    assert found and found == theirs(model(), peft.LoraConfig(**FIELDS[case]))


@pytest.mark.parametrize("config", ["LoraConfig", "IA3Config", "LoHaConfig"])
@pytest.mark.parametrize("kind", TASKS)
def test_defaults_and_all_linear_by_model(kind, config):
    for fields in ({}, {"target_modules": "all-linear"}):
        if config == "IA3Config" and fields:
            continue  # PEFT has no feedforward modules for it then
        if (config == "LoHaConfig" and kind == "gpt2") or (fields and kind in ("bert-tokens", "bert-qa")):
            continue  # PEFT has no LoHa for Conv1D, and puts adapters on these heads, which it then cannot train whole
        ours = diffpeft.get_peft_model(model(kind), getattr(diffpeft, config)(task_type=TASKS[kind], **fields))
        theirs_ = theirs(model(kind), getattr(peft, config)(task_type=TASKS[kind], **fields))
        assert set(adapted_layers(ours.get_base_model())) == theirs_


class Nested(nn.Module):
    """Names that are easily confused."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)}) for _ in range(3))
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2)])})


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=["q"]),
        dict(target_modules="q"),
        dict(target_modules=["q"], layers_to_transform=[1]),
        dict(target_modules=["layers.1.q"], layers_to_transform=[0]),
        dict(target_modules=["q"], layers_to_transform=[1], layers_pattern="layers"),
        dict(target_modules=r".*q"),
    ],
)
def test_names_on_any_module(fields):
    found = set(chosen(Nested(), resolved(Nested(), diffpeft.LoraConfig(**fields))))
    assert found == theirs(Nested(), peft.LoraConfig(**fields))


def test_the_rule_for_one_name_is_pefts():
    from peft.tuners.tuners_utils import check_target_module_exists

    names = ["q", "a.q", "a.layers.1.q", "layers.1.q", "b.layers.12.mlp.experts.3.q", "aq", "a.q.b"]
    for fields in (
        dict(target_modules=["q"]),
        dict(target_modules="(a\\.)?q"),
        dict(target_modules=["q"], layers_to_transform=[1, 12]),
        dict(target_modules=["q", "layers.1.q"], layers_to_transform=[3]),
    ):
        for name in names:
            want = bool(check_target_module_exists(peft.LoraConfig(**fields), name))
            assert matches(diffpeft.LoraConfig(**fields), name) == want, (fields, name)


@pytest.mark.parametrize("library", ["peft", "diffpeft"])
def test_nothing_matches(library):
    lib = importlib.import_module(library)
    base = model()
    with pytest.raises(ValueError, match="not found in the base model"):
        lib.get_peft_model(base, lib.LoraConfig(target_modules=["q_prj"]))
    if library == "diffpeft":  # and nothing has changed
        assert not adapted_layers(base) and all(p.requires_grad for p in base.parameters())


def test_a_typo_beside_what_matches_is_named():
    with pytest.warns(UserWarning, match="'q_prj', which no module is called. Did you mean 'q_proj'"):
        diffpeft.get_peft_model(model(), diffpeft.LoraConfig(target_modules=["v_proj", "q_prj"]))


# what a config chooses nothing with, and what is said of it
NOTHING = {
    "all are excluded": (dict(target_modules=["q_proj"], exclude_modules=".*"), "All modules were excluded"),
    "those that are meant": (
        dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
        "No modules were targeted for adaptation. This might be caused by a combination",
    ),
    "one, and one is none": (
        dict(target_modules=["q_proj", "typo"], exclude_modules=["q_proj"]),
        "No modules were targeted for adaptation",
    ),
    "a copy, and one is none": (
        dict(target_modules=["typo"], modules_to_save=["lm_head"]),
        "No modules were targeted for adaptation",
    ),
    "a copy of those that are meant": (
        dict(target_modules=["lm_head"], modules_to_save=["lm_head"]),
        "No modules were targeted for adaptation",
    ),
    "no module": (dict(target_modules=["typo"]), "not found in the base model"),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("case", NOTHING)
def test_what_is_said_where_nothing_is_chosen_is_what_peft_says(case, second):
    fields, said = NOTHING[case]
    for lib in (peft, diffpeft):
        base = model()
        if second:
            wrapped = lib.get_peft_model(base, lib.LoraConfig(target_modules=["v_proj"]))
        with pytest.raises(ValueError, match=said):
            if second:
                wrapped.add_adapter("second", lib.LoraConfig(**fields))
            else:
                lib.get_peft_model(base, lib.LoraConfig(**fields))


@pytest.mark.parametrize("exclude", [["typo"], "typo", ["q_proj"], ["lm_head"]])
def test_an_exclusion_of_nothing_is_named(exclude):
    """PEFT counts what is excluded of the model, be it targeted or not."""
    said = []
    for lib in (peft, diffpeft):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lib.get_peft_model(model(), lib.LoraConfig(target_modules=["v_proj"], exclude_modules=exclude))
        said.append([w for w in caught if "You have passed exclude_modules=" in str(w.message)])
    assert bool(said[0]) == bool(said[1]) == ("typo" in exclude)


def test_no_default():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        diffpeft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), diffpeft.LoraConfig())
    with pytest.raises(ValueError, match="is not supported"):
        diffpeft.get_peft_model(model(), diffpeft.LoraConfig(target_modules=["self_attn"]))


SMALL = dict(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, vocab_size=8)
NAMED = {
    "all linear, few": (1, dict(target_modules="all-linear")),
    "all linear, 14": (2, dict(target_modules="all-linear")),
    "all linear, 21": (3, dict(target_modules="ALL-linear")),
    "default": (1, dict()),
    "many names": (10, dict(target_modules=[f"model.layers.{i}.self_attn.{p}_proj" for i in range(10) for p in "qv"])),
    "19 names": (10, dict(target_modules=[f"model.layers.{i}.mlp.up_proj" for i in range(9)] + ["self_attn.q_proj"] * 9)),
    "many, one layer left out": (21, dict(target_modules=[f"model.layers.{i}.mlp.up_proj" for i in range(20)])),
    "many, of no model": (1, dict(target_modules=[f"nowhere.{i}.q" for i in range(30)] + ["q_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("cls", ["LoraConfig", "LoHaConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
@pytest.mark.parametrize("case", NAMED)
@pytest.mark.filterwarnings("ignore")
def test_a_config_names_layers_as_pefts_does_afterwards(case, cls):
    layers, fields = NAMED[case]
    configs = []
    for lib in (peft, diffpeft):
        more = {"LoHaConfig": {"target_modules": ["v_proj"]}, "AdaLoraConfig": {"total_step": 9}}.get(cls, {})
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": layers}))
        wrapped = lib.get_peft_model(base, getattr(lib, cls)(**more | fields), low_cpu_mem_usage=lib is peft)
        configs.append(wrapped.peft_config["default"].to_dict())
    assert configs[1]["target_modules"] == configs[0]["target_modules"]
    assert configs[1].get("feedforward_modules") == configs[0].get("feedforward_modules")


def test_the_shortest_ends_of_names_mean_no_others():
    assert shortest(["a.x", "b.x", "c.y"], ["d.y"]) == ["c.y", "x"]


def test_a_config_can_be_used_twice():
    """Of the second model it chooses what it chose of the first, for it is the first's: what `all-linear` meant stands in it."""
    configs = [lib.LoraConfig(target_modules="all-linear") for lib in (peft, diffpeft)]
    for lib, config in zip((peft, diffpeft), configs, strict=True):
        for kind in ("llama", "llama"):
            assert lib.get_peft_model(model(kind), config).peft_config["default"] is config
    assert configs[0].target_modules == configs[1].target_modules != "all-linear"


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_what_mambas_kernel_reads_is_refused_in_peft_s_words(kind):
    config = getattr(transformers, f"{kind}Config")(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    make = lambda: getattr(transformers, f"{kind}ForCausalLM")(config)  # noqa: E731
    for targets in (["out_proj"], ["conv1d"], ["in_proj", "out_proj"], "all-linear"):
        for library in (peft, diffpeft):
            with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
                library.get_peft_model(make(), library.LoraConfig(target_modules=targets))
    base = make()
    for of_method in (
        diffpeft.AdaLoraConfig(total_step=1),
        diffpeft.LoHaConfig(),
    ):  # their effect would be lost as well
        with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
            diffpeft.attach(base, of_method, targets=["conv1d"])
    assert not any("conv1d" in layer for layer in diffpeft.attach(base, diffpeft.LoraConfig(), targets="full").layers)
    assert diffpeft.get_peft_model(make(), diffpeft.LoraConfig(target_modules=["in_proj", "x_proj"]))
