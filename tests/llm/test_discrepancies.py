"""What a config says in vain: PEFT's warnings and errors, for those things and no others, when an adapter is made, added and loaded."""

from __future__ import annotations

import re
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft

LIBRARIES = (peft, diffpeft)
NAMES = ("PeftWarning", "RuntimeWarning")  # the kinds of warnings that are compared


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.bare = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.conv, self.inner = nn.Conv2d(4, 4, 1, bias=False), nn.ModuleDict({"lin": nn.Linear(4, 2)})

    def forward(self, x):
        return self.inner["lin"](self.bare(self.lin(self.emb(x))))


def told(lib, act):
    """What a library warns of: (kind, message). A kind of ours is PEFT's where it is derived from it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act(lib)
    kinds = [(next((c.__name__ for c in w.category.__mro__ if c.__name__ in NAMES), ""), w) for w in caught]
    return [(kind, str(w.message)) for kind, w in kinds if kind]


def compared(act):
    """PEFT's warnings, of which each is the begin of one of ours, and there are no others."""
    theirs, ours = (sorted(told(lib, act)) for lib in LIBRARIES)
    assert [kind for kind, _ in ours] == [kind for kind, _ in theirs]
    for (_, message), (_, own) in zip(theirs, ours, strict=True):
        assert own.startswith(message.rstrip())
    return theirs


WARNED = {
    "all keys mean layers": ("LoraConfig", dict(target_modules=["lin"], rank_pattern={"lin": 2}, alpha_pattern={"inner.lin": 2})),
    "an expression means layers": ("LoraConfig", dict(target_modules=["lin"], rank_pattern={"^inner.*": 2, r".*\.lin": 3})),
    "a typo": ("LoraConfig", dict(target_modules=["lin"], alpha_pattern={"typo_key": 100})),
    "typos beside what means layers": (
        "LoraConfig",
        dict(target_modules=["lin"], alpha_pattern={"lin": 1, "typo": 2, "a": 3}, rank_pattern={"lin": 2, "other.lin": 2}),
    ),
    "a layer that is no target": ("LoraConfig", dict(target_modules=["bare"], rank_pattern={"lin": 2})),
    "a part of a name": ("LoHaConfig", dict(target_modules=["lin"], rank_pattern={"li": 2, "nner.lin": 2})),
    "of LoKr": ("LoKrConfig", dict(target_modules=["lin"], alpha_pattern={"lin2": 2})),
    "no modules, a parameter": ("LoraConfig", dict(target_modules=["foobar"], target_parameters=["lin.weight"])),
    "modules, no parameter": ("LoraConfig", dict(target_modules=["lin"], target_parameters=["foobar.weight"])),
    "modules, one parameter": ("LoraConfig", dict(target_modules=["lin"], target_parameters=["foobar.weight", "bare.weight"])),
    "a bias on a layer without": ("LoraConfig", dict(target_modules=["bare", "lin"], lora_bias=True)),
    "a bias on a convolution without": ("LoraConfig", dict(target_modules=["conv"], lora_bias=True)),
    "a bias on layers with one": ("LoraConfig", dict(target_modules=["lin"], lora_bias=True)),
    "a rank pattern of AdaLoRA": ("AdaLoraConfig", dict(target_modules=["lin"], total_step=9)),
}  # fmt: skip
SILENT = {"all keys mean layers", "an expression means layers", "modules, one parameter", "a bias on layers with one", "a rank pattern of AdaLoRA"}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_what_a_config_says_in_vain_is_warned_of_as_in_peft(case, tmp_path):
    name, fields = WARNED[case]

    def made(lib):
        return lib.get_peft_model(Net(), getattr(lib, name)(**fields))

    assert bool(compared(made)) == (case not in SILENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(diffpeft).save_pretrained(tmp_path)
        second = {lib: lib.get_peft_model(Net(), lib.LoHaConfig(target_modules=["bare"])) for lib in LIBRARIES}
    compared(lambda lib: lib.PeftModel.from_pretrained(Net(), tmp_path))
    if name == "LoHaConfig":
        compared(lambda lib: second[lib].add_adapter("other", getattr(lib, name)(**fields)))


def test_a_parametrised_parameter_is_named_like_any_other():
    """Spectral norm takes `weight` out of a layer's parameters; it may be a target all the same."""
    net = Net()
    nn.utils.parametrizations.spectral_norm(net.lin)
    config = diffpeft.LoraConfig(target_parameters=["lin.weight"], target_modules=[], rank_pattern={"lin.weight": 2})
    assert told(diffpeft, lambda _: diffpeft.get_peft_model(net, config)) == []


def test_a_hint_follows():
    with pytest.warns(RuntimeWarning, match=r"ignored: \['ln'\]. Did you mean 'lin'"):
        diffpeft.get_peft_model(Net(), diffpeft.LoraConfig(target_modules=["lin"], rank_pattern={"ln": 2}))


REFUSED = {
    "no targets": (dict(target_modules=[]), "No `target_modules` passed but also no `target_parameters` found"),
    "an empty text": (dict(target_modules=""), "No `target_modules` passed but also no `target_parameters` found"),
    "no targets, no parameter": (
        dict(target_modules=[], target_parameters=["foobar.weight"]),
        "No `target_modules` passed but also no `target_parameters` found. Please check the values for these arguments.",
    ),
    "default, no parameter": (dict(target_parameters=["lin"]), "No `target_modules` passed but also no `target_parameters`"),
    "rows alone": (dict(target_modules=[], trainable_token_indices={"emb": [1]}), "No `target_modules` passed but also"),
    "a copy alone": (dict(target_modules=[], modules_to_save=["lin"]), "No modules were targeted for adaptation"),
    "names of nothing": (dict(target_modules=["foo"], target_parameters=["bar"]), "Target modules {'foo'} not found in the base"),
    "an expression of nothing": (dict(target_modules="foo.*bar"), "Target modules foo.*bar not found in the base model."),
    "a layer and its parameter": (
        dict(target_modules=["lin"], target_parameters=["lin.weight"]),
        "Trying to wrap an `nn.Parameter` of layer 'lin' of type Linear, which is not a valid target.",
    ),
    "a bias on an embedding": (dict(target_modules=["emb"], lora_bias=True), "lora_bias=True is not supported for Embedding"),
    "an odd rank": (
        dict(target_modules=["lin"], r=7, init_lora_weights="orthogonal"),
        "Orthogonal initialization requires the LoRA rank to be even, got 7 instead.",
    ),
    "an odd rank of one layer": (
        dict(target_modules=["lin"], rank_pattern={"lin": 5}, init_lora_weights="orthogonal"),
        "Orthogonal initialization requires the LoRA rank to be even, got 5 instead.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_means_nothing_is_refused_with_pefts_words(case):
    fields, words = REFUSED[case]
    kinds, net = [], Net()
    for lib in LIBRARIES:
        with pytest.raises(ValueError) as caught:
            lib.get_peft_model(net if lib is diffpeft else Net(), lib.LoraConfig(**fields))
        assert words in str(caught.value)
        kinds.append(caught.type.__name__)
    assert kinds[0] in (kinds[1], "ValueError")
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in Net().named_parameters()]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("cls", ["bare", "conv"])
@pytest.mark.filterwarnings("ignore")
def test_a_bias_of_b_is_merged_into_no_layer_without_one(cls):
    for lib in LIBRARIES:
        model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=[cls], lora_bias=True))
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer"
            ):
                merge()


@pytest.mark.filterwarnings("ignore")
def test_a_second_adalora_is_not_loaded_to_be_trained(tmp_path):
    config = dict(target_modules=["lin"], total_step=9)
    diffpeft.get_peft_model(Net(), diffpeft.AdaLoraConfig(**config)).save_pretrained(tmp_path)
    for lib in LIBRARIES:
        model = lib.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
        with pytest.raises(ValueError, match="AdaLoraModel supports only 1 trainable adapter"):
            model.load_adapter(tmp_path, "other", is_trainable=True)
        with pytest.raises(ValueError, match="AdaLoraModel supports only 1 trainable adapter"):
            model.add_adapter("another", lib.AdaLoraConfig(**config))
        assert list(model.peft_config) == ["default"] or lib is peft
    assert diffpeft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True).load_adapter(tmp_path, "other")


def test_a_mixed_batch_is_refused_in_pefts_order_and_words():
    """What is wrong is said one after the other, in training, of the names, of their number, of merged adapters."""
    config = dict(target_modules=["lin"], init_lora_weights=False)
    x = torch.tensor([1, 2, 3])
    for lib in LIBRARIES:
        model = lib.get_peft_model(Net(), lib.LoraConfig(**config)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter()
        for words, names, act in (
            ("Cannot pass `adapter_names` when the model is in training mode.", ["b", "a"], lambda: None),
            ("Trying to infer with non-existing adapter(s): a, b", ["b", "a", "default", "__base__"], model.eval),
            (
                "Length of `adapter_names` should be the same as the number of inputs, but got ",
                ["default"],
                lambda: None,
            ),
            (
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.",
                ["default"] * 3,
                lambda: None,
            ),
        ):
            act()
            with pytest.raises(ValueError, match=re.escape(words)):
                model(x, adapter_names=names)
        model.unmerge_adapter()
        model(x, adapter_names=["default", "__base__", "default"])


def test_merging_twice_is_said_as_in_peft():
    told = {}
    for lib in LIBRARIES:
        model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["bare"]))
        model.add_adapter("other", lib.LoraConfig(target_modules=["bare"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.merge_adapter()
            model.merge_adapter()
            model.merge_adapter(["default", "other"])
            model.merge_adapter(["other"])
        told[lib] = [str(w.message) for w in caught]
    assert told[peft] == told[diffpeft] and len(told[peft]) == 3
    with pytest.raises(TypeError, match="adapter_names should be a list of strings"):
        model.merge_adapter("default")
