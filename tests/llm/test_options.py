"""PEFT's options and states of a model with several adapters: dtypes, the meta device, what cannot act together, what is switched off."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import LoraConfig, get_peft_model
from tests.llm.models import batch, output
from tests.llm.models import model as made

SAME = dict(rtol=1e-5, atol=1e-5)
FIELDS = dict(
    r=4,
    target_modules=["q_proj"],
    modules_to_save=["lm_head"],
    trainable_token_indices=[1, 2],
    target_parameters=["up_proj.weight"],
)


def llama(dtype=torch.float32):
    return made("llama").to(dtype)


def run(model, **more):
    with torch.no_grad():
        return output(model(**batch(), **more))


def kinds(model, name):
    """{kind of tensor: (dtype, device)} of an adapter."""
    words = {"lora_": "factors", "tokens_delta": "rows", "lm_head": "copy"}
    found = {
        word: (str(p.dtype), p.device.type)
        for key, p in model.named_parameters()
        for part, word in words.items()
        if part in key and f".{name}." in f"{key}."
    }
    assert len(found) == 3
    return found


def ways(lib, dtype, autocast, low, folder):
    """{how an adapter came: what its tensors are}."""
    options = dict(autocast_adapter_dtype=autocast, low_cpu_mem_usage=low)
    config = lambda: lib.LoraConfig(**copy.deepcopy(FIELDS))  # noqa: E731
    model = lib.get_peft_model(llama(dtype), config(), adapter_name="one", **options)
    found = {"get_peft_model": kinds(model, "one")}
    model = lib.get_peft_model(llama(dtype), config(), adapter_name="one")
    model.add_adapter("two", config(), **options)
    found["add_adapter"] = kinds(model, "two")
    model = lib.PeftModel.from_pretrained(llama(dtype), folder, adapter_name="one", **options)
    found["from_pretrained"] = kinds(model, "one")
    model.load_adapter(folder, "two", **options)
    found["load_adapter"] = kinds(model, "two")
    if autocast:
        model = lib.inject_adapter_in_model(config(), llama(dtype), adapter_name="one", low_cpu_mem_usage=low)
        found["inject_adapter_in_model"] = kinds(model, "one")
    return found


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Writes the folder of an adapter on a base of a dtype, with PEFT."""

    def make(dtype=torch.float32):
        path = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(llama(dtype), peft.LoraConfig(**copy.deepcopy(FIELDS), init_lora_weights=False))
        wrapped.save_pretrained(path)
        return path

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_devices_are_peft_s(dtype, autocast, low, folder_of):
    folder = folder_of(dtype)
    assert ways(diffpeft, dtype, autocast, low, folder) == ways(peft, dtype, autocast, low, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_is_empty_is_filled_by_what_is_loaded(dtype, wrapped, folder_of):
    tensors = diffpeft.load_peft_weights(folder_of())
    fields = {k: v for k, v in FIELDS.items() if k != "trainable_token_indices"}
    own = {k: t for k, t in tensors.items() if "tokens" not in k}
    if wrapped:
        model = get_peft_model(llama(dtype), LoraConfig(**fields), low_cpu_mem_usage=True).eval()
        full = get_peft_model(llama(dtype), LoraConfig(**fields), autocast_adapter_dtype=False).eval()
    else:
        own = {k.removeprefix("base_model.model."): t for k, t in own.items()}
        model = diffpeft.inject_adapter_in_model(LoraConfig(**fields), llama(dtype), low_cpu_mem_usage=True).eval()
        full = diffpeft.inject_adapter_in_model(LoraConfig(**fields), llama(dtype)).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(p.is_meta for p in model.parameters())
    for one in (model, full):
        assert not any(diffpeft.set_peft_model_state_dict(one, own, low_cpu_mem_usage=True)[:2])
    assert torch.equal(run(model), run(full)) and not any(p.is_meta for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}


def two(first, second):
    fields = dict(r=4, target_modules=["q_proj"], init_lora_weights=False)
    models = []
    for lib in (peft, diffpeft):
        model = lib.get_peft_model(llama(), lib.LoraConfig(**fields, **first), adapter_name="a")
        model.add_adapter("b", lib.LoraConfig(**fields, **second))
        models.append(model.eval())
    return models


CLASHES = {
    "copies": (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"]), True),
    "rows": (dict(trainable_token_indices=[1, 2]), dict(trainable_token_indices=[2, 3]), True),
    "other modules": (dict(modules_to_save=["lm_head"]), dict(modules_to_save=["norm"]), False),
    "one of them": (dict(modules_to_save=["lm_head"]), dict(), False),
}


SAID = {
    "copies": "Only one adapter can be set at a time for ModulesToSaveWrapper",
    "rows": "Only one adapter can be set at a time for TrainableTokensWrapper",
}
UNDEFINED = "are already defined and would result in undefined merging behavior"
# ways to have two adapters act together, or in the weights together
TOGETHER = {
    "set_adapter": lambda m: m.base_model.set_adapter(["a", "b"]),
    "merge both": lambda m: m.merge_adapter(["a", "b"]),
    "merge one after the other": lambda m: (m.merge_adapter(["a"]), m.merge_adapter(["b"])),
    "merge both for good": lambda m: m.merge_and_unload(adapter_names=["a", "b"]),
}


@pytest.mark.parametrize("case", CLASHES)
@pytest.mark.parametrize("way", TOGETHER)
def test_two_that_share_a_copy_or_a_row_are_not_active_together(case, way):
    first, second, clash = CLASHES[case]
    for model in two(first, second):
        ours = isinstance(model, diffpeft.PeftModel)
        before = run(model)
        if not clash:
            if ours or way == "set_adapter":
                TOGETHER[way](model)
                assert not torch.allclose(run(model) if way != "merge both for good" else before + 1, before)
        elif ours or way == "set_adapter":
            with pytest.raises(ValueError, match=SAID[case]):
                TOGETHER[way](model)
            if ours and "one after" not in way:
                assert torch.equal(run(model), before) and model.active_adapters == ["a"]
        elif case == "rows":
            with pytest.raises(ValueError, match=UNDEFINED):
                TOGETHER[way](model)
    if clash and case == "rows":
        with pytest.raises(ValueError, match=UNDEFINED):
            TOGETHER[way](two(first, second)[1])


@pytest.mark.parametrize("names", ["ab", "b"])
@pytest.mark.parametrize("copied", [[], ["lm_head"]])
def test_an_adapter_that_is_injected_acts_alone(names, copied):
    """PEFT leaves the copy of a second one aside."""
    outputs = []
    for lib in (diffpeft, *([] if copied and len(names) > 1 else [peft])):
        fields = dict(r=4, target_modules=["q_proj"], modules_to_save=copied or None)
        model = llama().eval()
        for name in names:
            lib.inject_adapter_in_model(lib.LoraConfig(**fields), model, name)
        tensors = lib.get_peft_model_state_dict(model, adapter_name="b")
        generator = torch.Generator().manual_seed(1)
        filled = {k: torch.randn(tensors[k].shape, generator=generator) * 0.2 for k in sorted(tensors)}
        lib.set_peft_model_state_dict(model, filled, "b")
        outputs.append(run(model))
    alone = diffpeft.inject_adapter_in_model(LoraConfig(**fields), llama(), "b").eval()
    diffpeft.set_peft_model_state_dict(alone, filled, "b")
    for logits in outputs:
        torch.testing.assert_close(logits, run(alone), rtol=1e-4, atol=1e-5)


def test_other_rows_of_one_table_act_together():
    """PEFT refuses it; nothing is lost by it."""
    _, model = two(dict(trainable_token_indices=[1, 2]), dict(trainable_token_indices=[3, 4]))
    model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"]


@pytest.mark.parametrize("switch", ["disable_adapter", "disable_adapter_layers"])
def test_a_batch_with_an_adapter_a_row_is_the_base_s_where_adapters_are_off(switch):
    names = ["default", "__base__"]
    for lib in (peft, diffpeft):
        fields = dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = lib.get_peft_model(llama(), lib.LoraConfig(**fields)).eval()
        on = run(model, adapter_names=names)
        if switch == "disable_adapter":
            with model.disable_adapter():
                off = run(model, adapter_names=names)
                if lib is diffpeft:
                    with pytest.raises(diffpeft.UnknownNameError):
                        run(model, adapter_names=["nobody", "default"])
        else:
            model.base_model.disable_adapter_layers()
            off = run(model, adapter_names=names)
            model.base_model.enable_adapter_layers()
        torch.testing.assert_close(off, run(llama()), **SAME)
        torch.testing.assert_close(run(model, adapter_names=names), on, **SAME)
        assert not torch.allclose(on, off)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.lin(x)))


DROPPED = {
    "boft": lambda lib: lib.BOFTConfig(
        boft_block_size=4, boft_dropout=0.5, init_weights=False, target_modules=["lin", "out"]
    ),
    "oft": lambda lib: lib.OFTConfig(
        oft_block_size=4, module_dropout=0.5, init_weights=False, target_modules=["lin", "out"]
    ),
    "loha": lambda lib: lib.LoHaConfig(
        r=2, rank_dropout=0.5, module_dropout=0.5, init_weights=False, target_modules=["lin", "out"]
    ),
    "lokr": lambda lib: lib.LoKrConfig(
        r=2, rank_dropout=0.5, module_dropout=0.5, init_weights=False, target_modules=["lin", "out"]
    ),
    "lora": lambda lib: lib.LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=["lin", "out"]),
    "dora": lambda lib: lib.LoraConfig(
        r=2, lora_dropout=0.5, use_dora=True, init_lora_weights=False, target_modules=["lin", "out"]
    ),
}


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload", "add_weighted_adapter"])
@pytest.mark.parametrize("method", DROPPED)
def test_merging_in_training_knows_no_dropout(method, way):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    wrapped = get_peft_model(Net(), DROPPED[method](diffpeft))
    want = wrapped.eval()(x)
    wrapped.train()
    if way == "add_weighted_adapter":
        wrapped.add_weighted_adapter(["default"], [1.0], "sum")
        wrapped.set_adapter("sum")
        got = wrapped.eval()(x)
    elif way == "merge_adapter":
        wrapped.merge_adapter()
        got = wrapped(x)
        assert all(m.training for m in wrapped.modules())
    else:
        got = wrapped.merge_and_unload()(x)
    torch.testing.assert_close(got, want, **SAME)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_vectors_of_a_state_dict_are_on_the_side_that_they_say(kind):
    """(IA)^3 scales the inputs of feed-forward layers."""
    first = peft.inject_adapter_in_model(peft.IA3Config(), made(kind))
    values = {k: torch.rand_like(t) + 0.5 for k, t in peft.get_peft_model_state_dict(first).items()}
    models = [lib.inject_adapter_in_model(lib.IA3Config(), made(kind), state_dict=values) for lib in (peft, diffpeft)]
    peft.set_peft_model_state_dict(models[0], values)
    assert not any(diffpeft.set_peft_model_state_dict(models[1], values)[:2])
    a, b = (run_of(kind, m) for m in models)
    torch.testing.assert_close(b, a, **SAME)


def run_of(kind, model):
    with torch.no_grad():
        return output(model(**batch(kind)))
