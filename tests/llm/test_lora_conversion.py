"""convert_to_lora and save_as_lora: PEFT's factors (as a product), ranks, configs and errors, for each method that adds to linear layers."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import ConfigError, PeftModel, UnknownNameError, convert_to_lora, get_peft_model, save_as_lora
from diffpeft.methods.layout import CONFIGS
from tests.llm.models import model, run

SAME = dict(rtol=1e-4, atol=1e-5)
TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "lora": ("LoraConfig", dict(r=6, init_lora_weights=False)),
    "rslora": ("LoraConfig", dict(r=6, use_rslora=True, lora_alpha=5, init_lora_weights=False)),
    "loha": ("LoHaConfig", dict(r=3, alpha=5, init_weights=False)),
    "lokr": ("LoKrConfig", dict(r=2, alpha=5, init_weights=False)),
    "lokr, whole": ("LoKrConfig", dict(r=64, alpha=5, init_weights=False)),
    "vera": ("VeraConfig", dict(r=6, init_weights=False, projection_prng_key=3)),
}
OURS = {  # methods and layers that PEFT does not convert, or not as they act
    "dora": ("LoraConfig", dict(r=6, use_dora=True, init_lora_weights=False)),
}


def made(lib, kind, base="llama", **more):
    name, fields = {**KINDS, **OURS}[kind]
    torch.manual_seed(5)
    fields = {"target_modules": TARGETS, **fields, **more}
    return lib.get_peft_model(model(base), getattr(lib, name)(**fields)).eval()


def pair(kind, base="llama", **more):
    """The same adapter in both libraries."""
    theirs = made(peft, kind, base, **more)
    ours = made(diffpeft, kind, base, **more)
    diffpeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def products(tensors):
    return {
        key.removesuffix(".lora_A.weight"): tensors[key.replace("_A", "_B")] @ t
        for key, t in tensors.items()
        if "_A" in key
    }


@pytest.mark.parametrize("rank", [1, 5, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_ranks_and_configs_are_pefts(kind, rank):
    ours, theirs = pair(kind)
    before = run(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (config, tensors), (their_config, want) = (
            lib.convert_to_lora(m, rank) for lib, m in ((diffpeft, ours), (peft, theirs))
        )
    if rank != 1.0:  # how many values are left of rounding is nobody's to say
        assert {k: t.shape for k, t in tensors.items()} == {k: t.shape for k, t in want.items()}
        for name in ("rank_pattern", "alpha_pattern"):
            assert getattr(config, name) == getattr(their_config, name)
    assert tensors.keys() == want.keys()
    own, others = products(tensors), products(want)
    for key, product in own.items():
        torch.testing.assert_close(product, others[key], **SAME)
    for name in ("r", "lora_alpha", "layers_pattern", "layers_to_transform", "modules_to_save"):
        assert getattr(config, name) == getattr(their_config, name)
    assert {*config.target_modules} == {*their_config.target_modules}
    assert torch.equal(run(ours), before)


@pytest.mark.parametrize("base,targets", [("llama", r".*\.q_proj"), ("gpt2", ["c_attn", "c_proj"])])
@pytest.mark.parametrize("rank", [4, 0.5])
def test_expressions_and_turned_weights(base, targets, rank):
    ours, theirs = pair("loha" if base == "llama" else "lora", base, target_modules=targets)
    (config, tensors), (their_config, want) = (
        lib.convert_to_lora(m, rank) for lib, m in ((diffpeft, ours), (peft, theirs))
    )
    assert config.rank_pattern == their_config.rank_pattern and config.alpha_pattern == their_config.alpha_pattern
    own, others = products(tensors), products(want)
    assert own.keys() == others.keys()
    for key, product in own.items():
        torch.testing.assert_close(product, others[key], **SAME)


@pytest.mark.parametrize("kind", [*KINDS, *OURS])
def test_at_the_full_rank_nothing_is_lost_and_peft_loads_it(kind, tmp_path):
    ours = made(diffpeft, kind, modules_to_save=["lm_head"] if kind != "vera" else None)
    with torch.no_grad():
        ours.get_base_model().lm_head.weight.mul_(-1.5)
    want = run(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_as_lora(tmp_path / "new" / "folder", ours, 32)
    for lib in (diffpeft, peft):
        base = model()
        with torch.no_grad():
            base.lm_head.weight.mul_(-1.5 if kind == "vera" else 1)
        loaded = lib.PeftModel.from_pretrained(base, str(tmp_path / "new" / "folder")).eval()
        with torch.no_grad():
            torch.testing.assert_close(run(loaded), want, rtol=1e-3, atol=1e-4)
    fields = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 32, 32)


def test_one_of_several_a_bare_model_and_a_compiled_one():
    ours = made(diffpeft, "loha")
    ours.add_adapter("other", diffpeft.LoKrConfig(r=2, init_weights=False, target_modules=["v_proj"]))
    _, tensors = convert_to_lora(ours, 2, adapter_name="other")
    assert all(".v_proj." in key and key.startswith("base_model.model.") for key in tensors)
    _, bare = convert_to_lora(ours.get_base_model(), 2, adapter_name="other")
    assert {f"base_model.model.{key}" for key in bare} == tensors.keys()
    _, compiled = convert_to_lora(torch.compile(ours, backend="eager"), 2, "other", compile_kwargs={"backend": "eager"})
    assert all(torch.equal(compiled[key], t) for key, t in tensors.items())
    ours.base_model.merge_adapter()
    _, merged = convert_to_lora(ours, 2, "other")
    assert all(torch.equal(merged[key], t) for key, t in tensors.items())
    with pytest.raises(UnknownNameError, match="nope"):
        convert_to_lora(ours, 2, "nope")


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)


REFUSED = {
    "no adapter": (lambda lib: model(), 2, TypeError),
    "prompts": (
        lambda lib: lib.get_peft_model(model(), lib.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        2,
        TypeError,
    ),
    "scales": (
        lambda lib: lib.get_peft_model(model(), lib.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        2,
        TypeError,
    ),
    "a rotation": (
        lambda lib: lib.get_peft_model(model(), lib.OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
        2,
        TypeError,
    ),
    "a convolution": (
        lambda lib: lib.get_peft_model(Conv(), lib.LoKrConfig(target_modules=["conv", "lin"])),
        2,
        TypeError,
    ),
    "biases": (
        lambda lib: lib.get_peft_model(model(), lib.LoraConfig(target_modules=["q_proj"], bias="all")),
        2,
        ValueError,
    ),
    "no rank": (lambda lib: made(lib, "loha"), 0, ValueError),
    "too high": (lambda lib: made(lib, "loha"), 33, ValueError),
    "no share": (lambda lib: made(lib, "loha"), 1.5, ValueError),
    "less than nothing": (lambda lib: made(lib, "loha"), -0.5, ValueError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_pefts(case):
    make, rank, kind = REFUSED[case]
    told = []
    for lib in (peft, diffpeft):
        with warnings.catch_warnings(), pytest.raises(kind) as error:
            warnings.simplefilter("ignore")
            lib.convert_to_lora(make(lib), rank)
        told.append(str(error.value))
        assert lib is peft or isinstance(error.value, ConfigError)
    theirs, ours = told
    assert ours.startswith(theirs.partition(":")[0].partition(",")[0].rstrip(". "))


SMALL = {
    "OFTConfig": {"oft_block_size": 4},
    "C3AConfig": {"block_size": 8},
    "MissConfig": {"r": 8},
    "RoadConfig": {"group_size": 8},
}  # that fit the model


def test_who_can_be_converted_is_said_before():
    for name in CONFIGS:
        config = getattr(diffpeft, name)
        fields = {"target_modules": ["q_proj"], **({"total_step": 5} if name == "AdaLoraConfig" else {})}
        fields |= {"feedforward_modules": []} if name == "IA3Config" else {}
        fields |= SMALL.get(name, {})
        wrapped = get_peft_model(model(), config(**fields))
        theirs = peft.get_peft_model(model(), getattr(peft, name)(**fields))
        assert wrapped.supports_lora_conversion() == theirs.supports_lora_conversion(), name
        assert wrapped.base_model.supports_lora_conversion("default") == wrapped.supports_lora_conversion()


def test_a_bar_and_a_warning(capsys):
    ours = made(diffpeft, "lora")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        convert_to_lora(ours, 2, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err


def test_the_file_is_what_is_returned(tmp_path):
    ours = made(diffpeft, "loha")
    config, tensors = convert_to_lora(ours, 3)
    save_as_lora(tmp_path, ours, 3)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[key], t) for key, t in tensors.items())
    assert type(PeftModel.from_pretrained(model(), tmp_path).peft_config["default"]) is type(config)
