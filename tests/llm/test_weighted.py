"""add_weighted_adapter: PEFT's algorithms as PEFT does them, and the exact sum for every method."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError
from diffpeft.layers.carried import effective, weights_of
from diffpeft.llm.peft_model import PeftModel, get_peft_model, get_peft_model_state_dict
from diffpeft.llm.weighted import TYPES
from diffpeft.methods import IA3Config, LoHaConfig, LoraConfig, OFTConfig
from diffpeft.model.state import slots_in
from tests.llm.models import batch, model, output, run

KINDS = {"llama": ["q_proj", "down_proj", "embed_tokens"], "gpt2": ["c_attn", "c_fc", "wte"]}
WEIGHTS = [0.7, -0.3]


def randomised(module, name, seed):
    g = torch.Generator().manual_seed(seed)
    for key, p in module.named_parameters():
        if f".{name}." in key:
            p.data = torch.randn(p.shape, generator=g) * 0.3
    return module


def pair(kind, ours, theirs):
    """The same adapters a, b, .. with the same weights in a PeftModel of ours and one of PEFT's."""
    mine, other = (
        get_peft_model(model(kind), copy.deepcopy(ours[0]), "a"),
        peft.get_peft_model(model(kind), copy.deepcopy(theirs[0]), "a"),
    )
    for name, one, two in zip("bcd", ours[1:], theirs[1:], strict=False):
        mine.add_adapter(name, copy.deepcopy(one))
        other.add_adapter(name, copy.deepcopy(two))
    for seed, name in enumerate(mine.peft_config):
        randomised(mine, name, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = get_peft_model_state_dict(mine, adapter_name=name, save_embedding_layers=False)
        missing = peft.set_peft_model_state_dict(other, state, name)
        assert not missing.unexpected_keys
    return mine, other


def loras(kind, *fields, common=None):
    """The same configs of ours and of PEFT's."""
    common = {"target_modules": KINDS[kind], **(common or {})}
    return [LoraConfig(**common, **f) for f in fields], [peft.LoraConfig(**common, **f) for f in fields]


PAIRS = {
    "plain": [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}],
    "rslora": [{"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 4, "lora_alpha": 3, "use_rslora": True}],
    "mixed": [{"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3, "init_lora_weights": False}],
}


@pytest.fixture(scope="module", params=[(kind, case) for kind in KINDS for case in PAIRS], ids="-".join)
def both(request):
    kind, case = request.param
    return (*pair(kind, *loras(kind, *PAIRS[case])), case)


def theirs_merged(other, name):
    """{layer: its weight with one of PEFT's adapters}."""
    return {
        key.replace("base_model.model.", ""): m.get_base_layer().weight.detach() + m.get_delta_weight(name).detach()
        for key, m in other.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer) and (name in m.lora_A or name in m.lora_embedding_A)
    }


def ours_merged(mine, name, layers):
    """{layer: its weight with one of ours}."""
    base = mine.get_base_model()
    slots, modules = slots_in(base, name), {layer: base.get_submodule(layer) for layer in layers}
    assert slots.keys() == layers.keys()
    with torch.no_grad():
        return {n: effective(m, [(slots[n], 1.0)], torch.float32, weights_of(m))["weight"] for n, m in modules.items()}


def compare(mine, other, name, tolerance=1e-5):
    want = theirs_merged(other, name)
    got = ours_merged(mine, name, want)
    assert want
    for layer, weight in want.items():
        torch.testing.assert_close(got[layer], weight, rtol=tolerance, atol=tolerance * float(weight.abs().max()))
    plain = ours_merged(mine, "a", want)
    assert all(not torch.allclose(plain[layer], got[layer], atol=1e-3) for layer in want)


@pytest.mark.parametrize("how", TYPES)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.5]], ids=str)
def test_a_type_by_name_is_pefts(both, how, weights):
    mine, other, case = both
    name, args = f"{how}{weights[0]:g}".replace(".", ""), {"combination_type": how, "density": 0.6}
    if case == "mixed" and TYPES[how][0] == "factors":
        with pytest.raises(ValueError, match="same r value"):
            other.add_weighted_adapter(["a", "b"], weights, name, **args)
        with pytest.raises(ConfigError, match="same r value"):
            mine.add_weighted_adapter(["a", "b"], weights, name, **args)
        assert name not in mine.peft_config
        return
    for it in (mine, other):
        torch.manual_seed(3)
        it.add_weighted_adapter(["a", "b"], weights, name, **args)
    compare(mine, other, name)
    assert (mine.peft_config[name].r, mine.peft_config[name].lora_alpha) == (
        other.peft_config[name].r,
        other.peft_config[name].lora_alpha,
    )


MORE = {
    "one adapter": (["a"], [-0.8], {"combination_type": "svd"}),
    "three": (["a", "b", "c"], [0.5, 0.3, -1.2], {"combination_type": "ties_svd", "density": 0.4, "svd_rank": 2}),
    "frequency": (
        ["a", "b", "c"],
        [0.5, 0.3, 1.2],
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "frequency"},
    ),
    "clamped": (["a", "b"], [0.5, 1.0], {"combination_type": "svd", "svd_clamp": 0.9}),
    "clamped, reduced": (
        ["a", "b"],
        [0.5, 1.0],
        {"combination_type": "svd", "svd_clamp": 0.8, "svd_full_matrices": False, "svd_rank": 3},
    ),
    "the same twice": (["a", "a"], [0.5, 1.0], {"combination_type": "dare_linear", "density": 0.5}),
    "density 0": (["a", "b"], [0.5, 1.0], {"combination_type": "cat", "density": 0.0}),
    "no layer in common": (["a", "d"], [0.5, 1.0], {"combination_type": "cat"}),
    "no layer in common, DARE": (["d", "b"], [0.5, 1.0], {"combination_type": "dare_ties", "density": 0.5}),
}


@pytest.fixture(scope="module")
def four():
    fields = [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}, {"r": 4, "init_lora_weights": "gaussian"}]
    ours, theirs = loras("llama", *fields)
    ours.append(LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights="gaussian"))
    theirs.append(peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights="gaussian"))
    return pair("llama", ours, theirs)


@pytest.mark.parametrize("case", MORE)
def test_options_are_pefts(four, case):
    mine, other = four
    adapters, weights, args = MORE[case]
    name = re.sub(r"\W", "", case)
    for it in four:
        torch.manual_seed(5)
        it.add_weighted_adapter(adapters, weights, name, **args)
    want = theirs_merged(other, name)
    got = ours_merged(mine, name, want)
    for layer, weight in want.items():
        torch.testing.assert_close(got[layer], weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))


def test_afterwards_the_random_stream_is_where_peft_leaves_it(four):
    numbers = []
    for it in four:
        torch.manual_seed(5)
        it.add_weighted_adapter(["a", "b"], [1.0, 1.0], "stream", "dare_linear_svd", density=0.5)
        numbers.append(torch.rand(4))
    assert torch.equal(*numbers)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("how", TYPES)
def test_convolutions_too(how):
    torch.manual_seed(0)
    base = Convolved()
    fields = {"r": 3, "target_modules": ["first", "second"]}
    mine, other = (
        get_peft_model(copy.deepcopy(base), LoraConfig(**fields), "a"),
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields), "a"),
    )
    mine.add_adapter("b", LoraConfig(**fields, lora_alpha=2))
    other.add_adapter("b", peft.LoraConfig(**fields, lora_alpha=2))
    for seed, name in enumerate("ab"):
        randomised(mine, name, seed)
        peft.set_peft_model_state_dict(other, get_peft_model_state_dict(mine, adapter_name=name), name)
    for it in (mine, other):
        torch.manual_seed(1)
        it.add_weighted_adapter(["a", "b"], WEIGHTS, "c", how, density=0.6)
    want = theirs_merged(other, "c")
    got = ours_merged(mine, "c", want)
    for layer, weight in want.items():
        torch.testing.assert_close(got[layer], weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))


@pytest.mark.parametrize("how", ["linear", "svd"])
def test_dora_and_an_init_from_the_weight(how):
    fields = [{"r": 4, "use_dora": True}, {"r": 4, "use_dora": True, "lora_alpha": 3}]
    mine, other = pair("llama", *loras("llama", *fields, common={"target_modules": ["q_proj"]}))
    for it in (mine, other):
        it.add_weighted_adapter(["a", "b"], [0.5, 0.7], "c", how)
        it.set_adapter("c")
    with torch.no_grad():
        torch.testing.assert_close(run(mine), output(other(**batch())), rtol=1e-5, atol=1e-5)
    pissa = get_peft_model(model(), LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]), "a")
    base = run(model())
    pissa.add_weighted_adapter(["a"], [1.0], "c", how)
    pissa.set_adapter("c")
    torch.testing.assert_close(run(pissa), base, rtol=1e-5, atol=1e-5)  # an untrained PiSSA changes nothing
    assert pissa.peft_config["c"].r == 8


# The exact sum

EXACT = {
    "lora": [LoraConfig(r=4, lora_alpha=8), LoraConfig(r=2, use_rslora=True)],
    "other layers": [LoraConfig(r=4), LoraConfig(r=3, target_modules=["down_proj"], layers_to_transform=[1])],
    "patterns": [LoraConfig(r=4, rank_pattern={"v_proj": 2}), LoraConfig(r=3, alpha_pattern={"q_proj": 9})],
    "expressions": [LoraConfig(target_modules=r".*q_proj"), LoraConfig(target_modules=r".*(k|v)_proj", r=3)],
    "loha": [LoHaConfig(r=2), LoHaConfig(r=2, alpha=3)],
    "lora and loha": [LoraConfig(r=4), LoHaConfig(r=2)],
    "oft": [OFTConfig(oft_block_size=8)],
    "dora": [LoraConfig(r=4, use_dora=True), LoraConfig(r=4)],
    "embedding": [LoraConfig(target_modules=["embed_tokens", "q_proj"]), LoraConfig(r=3)],
    "ia3": [IA3Config(feedforward_modules=["down_proj"], target_modules=["q_proj", "down_proj"])] * 2,
    "ia3 and lora": [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), LoraConfig()],
    "pissa": [LoraConfig(init_lora_weights="pissa"), LoraConfig(r=3)],
    "bias of B": [LoraConfig(lora_bias=True), LoraConfig(r=3)],
}


def deltas(it, name):
    """{layer: what an adapter does to its weight}."""
    base = it.get_base_model()
    found = {}
    with torch.no_grad():
        for layer, slot in slots_in(base, name).items():
            module = base.get_submodule(layer)
            whole = effective(module, [(slot, 1.0)], torch.float32, weights_of(module))["weight"]
            found[layer] = whole - module.weight
    return found


def adapted(configs, kind="llama"):
    configs = copy.deepcopy(configs)
    for config in configs:
        config.target_modules = config.target_modules or ["q_proj", "v_proj"]
    it = get_peft_model(model(kind), configs[0], "a")
    for name, config in zip("bc", configs[1:], strict=False):
        it.add_adapter(name, config)
    for seed, name in enumerate(it.peft_config):
        g = torch.Generator().manual_seed(seed)
        for slot in slots_in(it.get_base_model(), name).values():
            for p in slot.parameters():
                p.data += torch.randn(p.shape, generator=g) * 0.2
    return it


@pytest.mark.parametrize("case", EXACT)
def test_without_a_type_it_is_the_weighted_sum(case, tmp_path):
    it = adapted(EXACT[case])
    names = list(it.peft_config)
    weights = WEIGHTS[: len(names)]
    was = {key: p.requires_grad for key, p in it.named_parameters()}
    before = run(it)
    it.add_weighted_adapter(names, weights, "sum")
    assert torch.equal(run(it), before) and it.active_adapters == ["a"]
    assert {key: p.requires_grad for key, p in it.named_parameters() if key in was} == was
    slots = slots_in(it.get_base_model(), "sum")
    assert not any(p.requires_grad for slot in slots.values() for p in slot.parameters())
    parts, got = [deltas(it, name) for name in names], deltas(it, "sum")
    assert got.keys() == {layer for own in parts for layer in own}
    for layer, delta in got.items():
        want = sum(w * own[layer] for w, own in zip(weights, parts, strict=True) if layer in own)
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # the file: the same function here and in PEFT
    it.set_adapter("sum")
    assert all(p.requires_grad for slot in slots.values() for p in slot.parameters())
    here = run(it)
    assert not torch.allclose(here, before, atol=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        it.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(run(PeftModel.from_pretrained(model(), tmp_path / "sum")), here, rtol=1e-5, atol=1e-5)
    again = peft.PeftModel.from_pretrained(model(), str(tmp_path / "sum"))
    with torch.no_grad():
        torch.testing.assert_close(output(again(**batch())), here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "dare_ties_svd"])
def test_what_a_type_makes_is_saved_for_peft(how, tmp_path):
    it = adapted([LoraConfig(r=4, rank_pattern={"v_proj": 2}), LoraConfig(r=4, rank_pattern={"v_proj": 2})])
    it.add_weighted_adapter(["a", "b"], WEIGHTS, "new", how, density=0.5)
    it.set_adapter("new")
    it.save_pretrained(tmp_path, selected_adapters=["new"])
    with torch.no_grad():
        theirs = output(peft.PeftModel.from_pretrained(model(), str(tmp_path / "new"))(**batch()))
    torch.testing.assert_close(theirs, run(it), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(PeftModel.from_pretrained(model(), tmp_path / "new")), theirs, rtol=1e-5, atol=1e-5)


def test_biases_are_summed(tmp_path):
    it = adapted([LoraConfig(bias="lora_only", target_modules=["c_attn"]), LoraConfig(target_modules=["c_fc"])], "gpt2")
    before = run(it, "gpt2")
    it.add_weighted_adapter(["a"], [1.0], "sum")
    it.set_adapter("sum")
    torch.testing.assert_close(run(it, "gpt2"), before, rtol=1e-5, atol=1e-5)
    it.save_pretrained(tmp_path, selected_adapters=["sum"])
    with torch.no_grad():
        theirs = output(peft.PeftModel.from_pretrained(model("gpt2"), str(tmp_path / "sum"))(**batch("gpt2")))
    torch.testing.assert_close(theirs, before, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="biases"):
        it.add_weighted_adapter(["a"], [1.0], "other", "linear")


def test_a_module_trained_whole_is_summed_or_named():
    it = adapted([LoraConfig(modules_to_save=["lm_head"]), LoraConfig(r=3)])
    base = it.get_base_model()
    base.lm_head.copies["a"].weight.data += 1.0
    before = run(it)
    it.add_weighted_adapter(["a"], [1.0], "sum")
    it.set_adapter("sum")
    torch.testing.assert_close(run(it), before, rtol=1e-5, atol=1e-5)
    it.add_weighted_adapter(["a", "b"], [0.5, 1.0], "portion")
    own = base.lm_head._parameters["weight"]
    half = own + 0.5 * (base.lm_head.copies["a"].weight - own)
    torch.testing.assert_close(base.lm_head.copies["portion"].weight.detach(), half.detach())
    assert not base.lm_head.copies["portion"].weight.requires_grad
    with pytest.warns(UserWarning, match="left out: 'a'"):
        it.add_weighted_adapter(["a", "b"], [0.5, 1.0], "named", "cat")
    assert "named" not in base.lm_head.copies
    it.add_adapter("z", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="same module with modules_to_save"):
        it.add_weighted_adapter(["a", "z"], [0.5, 1.0], "both")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [([1, 5], [3]), ([1, 5, 3], [3, 7]), ([2], None)], ids=str)
def test_rows_of_tables_are_summed_or_named(rows, tied, tmp_path):
    """An fp64 sum is the oracle; PEFT's types leave rows out, as PEFT does without a word."""
    kind = "gpt2" if tied else "llama"
    fields = [dict(r=4) if index is None else dict(r=4, trainable_token_indices=index) for index in rows]
    ours, theirs = loras(kind, *fields, common={"target_modules": KINDS[kind][:1]})
    both = None not in rows  # PEFT cannot load an adapter without rows beside one that has some
    it, other = pair(kind, ours, theirs) if both else (adapted(ours, kind), None)
    plain = it.get_base_model()
    table, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    W = table._parameters["weight"].detach().double()
    want = W.clone()
    table.copies["a"].token_adapter.trainable_tokens_delta.data += 0.25 * (other is None)
    for name, weight, index in zip("ab", WEIGHTS, rows, strict=True):
        if index is not None:
            delta = table.copies[name].token_adapter.trainable_tokens_delta.detach().double()
            want[index] += weight * (delta - W[index])
    it.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
    assert not any(p.requires_grad for key, p in it.named_parameters() if ".sum." in key)
    it.set_adapter("sum")
    torch.testing.assert_close(table.weight.detach().double(), want, rtol=1e-6, atol=1e-6)
    assert (head._parameters["weight"] is table._parameters["weight"]) == tied
    if tied:
        torch.testing.assert_close(head.weight.detach().double(), want, rtol=1e-6, atol=1e-6)
    summed = run(it, kind)
    it.save_pretrained(tmp_path, selected_adapters=["sum"])
    for lib in (peft, diffpeft):
        again = lib.PeftModel.from_pretrained(model(kind), tmp_path / "sum")
        torch.testing.assert_close(run(again, kind), summed, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="left out: 'a'"):
        it.add_weighted_adapter(["a", "b"], WEIGHTS, "named", "cat")
    if other is None:
        return
    other.add_weighted_adapter(["a", "b"], WEIGHTS, "named", "cat")
    for module in (it, other):
        module.set_adapter("named")
    torch.testing.assert_close(run(it, kind), run(other, kind), rtol=1e-4, atol=1e-5)


# IA3


def test_linear_of_ia3_is_pefts():
    fields = [
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ]
    mine, other = pair("llama", [IA3Config(**f) for f in fields], [peft.IA3Config(**f) for f in fields])
    mine.add_weighted_adapter(["a", "b"], WEIGHTS, "c", "linear")
    other.add_weighted_adapter(["a", "b"], WEIGHTS, "c")
    for it in (mine, other):
        it.set_adapter("c")
    with torch.no_grad():
        torch.testing.assert_close(run(mine), output(other(**batch())), rtol=1e-5, atol=1e-5)
    assert {*mine.peft_config["c"].target_modules} == other.peft_config["c"].target_modules
    with pytest.raises(ConfigError, match="for LoRA"):
        mine.add_weighted_adapter(["a", "b"], WEIGHTS, "d", "svd")


def test_ia3_stays_ia3_where_the_factors_are_on_the_same_side():
    it = adapted(EXACT["ia3"])
    it.add_weighted_adapter(["a", "b"], [0.5, 0.5], "exact")
    it.add_weighted_adapter(["a", "b"], [0.5, 0.5], "linear", "linear")
    assert type(it.peft_config["exact"]) is IA3Config
    for layer, slot in slots_in(it.get_base_model(), "exact").items():  # weights that add up to 1: no origin shows
        torch.testing.assert_close(slot.ia3_l, slots_in(it.get_base_model(), "linear")[layer].ia3_l)
    mixed = adapted([EXACT["ia3"][0], IA3Config(target_modules=["down_proj"], feedforward_modules=[])])
    mixed.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
    assert type(mixed.peft_config["sum"]) is LoraConfig
    with pytest.raises(ConfigError, match="sides"):
        mixed.add_weighted_adapter(["a", "b"], WEIGHTS, "linear", "linear")


# Errors

WRONG = {
    "an unknown adapter": ({"adapters": ["a", "nope"]}, UnknownNameError, "nope does not exist", True),
    "no adapter": ({"adapters": [], "weights": []}, ConfigError, "Found no adapter", True),
    "an unknown type": ({"combination_type": "svdd"}, ConfigError, "Invalid combination_type: svdd", True),
    "a weight too few": ({"weights": [1.0]}, ConfigError, "2 adapters and 1 weights", False),
    "a weight that is no number": ({"weights": [1.0, float("nan")]}, ConfigError, "finite", False),
    "no density": ({"combination_type": "ties"}, ConfigError, "density is None", False),
    "a density below 0": ({"combination_type": "ties", "density": -0.1}, ConfigError, "density", True),
    "DARE's density 0": ({"combination_type": "dare_ties", "density": 0.0}, ConfigError, "density", False),
    "an unknown election": (
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "all"},
        ConfigError,
        "majority_sign_method",
        False,
    ),
    "ranks that differ": ({"adapters": ["a", "r"], "combination_type": "linear"}, ConfigError, "same r value", True),
    "ranks that differ on a layer": (
        {"adapters": ["a", "p"], "combination_type": "linear"},
        ConfigError,
        "on a layer r is 4, 2",
        False,
    ),
    "names and an expression": ({"adapters": ["a", "e"]}, ConfigError, "same target modules type", True),
    "a rank of 0": ({"combination_type": "svd", "svd_rank": 0}, ConfigError, "svd_rank", False),
    "an existing name": ({"adapter_name": "b"}, AdapterStateError, "already exists", False),
    "no LoRA": ({"adapters": ["a", "h"], "combination_type": "svd"}, ConfigError, "for LoRA, not for LoHa", False),
}


@pytest.fixture(scope="module")
def several():
    """Adapters a, b and others that do not go with them, and PEFT's where it can have them."""
    names = {"b": {}, "r": {"r": 6}, "p": {"rank_pattern": {"v_proj": 2}}, "e": {"target_modules": ".*q_proj"}}
    common = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    mine = get_peft_model(model(), LoraConfig(**common), "a")
    other = peft.get_peft_model(model(), peft.LoraConfig(**common), "a")
    for name, fields in names.items():
        mine.add_adapter(name, LoraConfig(**common | fields))
        other.add_adapter(name, peft.LoraConfig(**common | fields))
    mine.add_adapter("h", LoHaConfig(r=4, target_modules=["q_proj"]))
    return mine, other


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_says_so_and_changes_nothing(several, case):
    mine, other = several
    fields, error, said, also = WRONG[case]
    args = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new", **fields}
    before = mine.state_dict().keys(), [*mine.peft_config]
    with pytest.raises(error, match=said):
        mine.add_weighted_adapter(**args)
    assert (mine.state_dict().keys(), [*mine.peft_config]) == before
    if also:
        with pytest.raises(ValueError):
            copy.deepcopy(other).add_weighted_adapter(**{"combination_type": "svd"} | args)


def test_a_density_of_1_is_said(four):
    mine, _ = four
    with pytest.warns(UserWarning, match="nothing is left out"):
        mine.add_weighted_adapter(["a", "b"], WEIGHTS, "whole", "ties", density=1.0)


def test_an_interruption_leaves_no_trace(several, monkeypatch):
    mine, _ = several
    before = mine.state_dict().keys(), [*mine.peft_config]
    for where in ("model.weighted._padded", "llm.weighted._targets"):
        with monkeypatch.context() as patch:
            patch.setattr(f"diffpeft.{where}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            for kind in ("cat", None):
                if kind or where.endswith("_targets"):
                    with pytest.raises(KeyboardInterrupt):
                        mine.add_weighted_adapter(["a", "b"], WEIGHTS, "cut", kind)
    assert (mine.state_dict().keys(), [*mine.peft_config]) == before
    mine.add_weighted_adapter(["a", "b"], WEIGHTS, "cut")
