"""Quantised language models: prepared for training as by PEFT, LoRAs that start from the rounding errors, and merged into plain models again."""

from __future__ import annotations

import copy
import inspect
import json

import peft
import peft.utils.loftq_utils as theirs
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from diffpeft import LoraConfig, attach, get_adapters, get_peft_model, set_adapters
from diffpeft.errors import ConfigError, MissingKeysError, UnknownNameError
from diffpeft.llm.kbit import forget_quantization, prepare_model_for_kbit_training, replace_lora_weights_loftq
from diffpeft.model.merge import merge_for_good
from diffpeft.model.state import slots_of

bnb = pytest.importorskip("bitsandbytes")

TARGETS = ["q_proj", "v_proj", "down_proj"]
BITS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4 twice": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8 bit": dict(load_in_8bit=True),
}
every_format = pytest.mark.parametrize("format", BITS)
x = torch.arange(10).view(2, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama on disk; its layers are larger than a block of numbers that share a scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(path, format, dtype=torch.float32):
    config = BitsAndBytesConfig(**BITS[format]) if format else None
    return LlamaForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def loaded(folder):
    return {format: load(folder, format) for format in BITS}


@pytest.fixture
def model(loaded):
    """A copy of the 4-bit model."""
    return copy.deepcopy(loaded["nf4"])


# -- prepare_model_for_kbit_training


def prepared_state(model):
    """All that preparing may change."""
    return (
        [(n, p.dtype, p.requires_grad, type(p)) for n, p in model.named_parameters()],
        model.is_gradient_checkpointing,
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        len(model.get_input_embeddings()._forward_hooks),
    )


@pytest.mark.parametrize("format", [*BITS, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"use_gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_it_does_what_pefts_does(folder, format, dtype, args):
    ours, other = load(folder, format, dtype), load(folder, format, dtype)
    before = prepared_state(ours)
    assert prepare_model_for_kbit_training(ours, **args) is ours
    peft.prepare_model_for_kbit_training(other, **args)
    assert prepared_state(ours) == prepared_state(other) != before
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "hqq", "torchao"])
def test_other_quantisations_keep_their_halves(folder, method):
    states = []
    for prepare in (prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training):
        model = load(folder, None, torch.bfloat16)
        model.quantization_method = method
        states.append(prepared_state(prepare(model)))
        assert model.lm_head.weight.dtype == torch.bfloat16 and model.is_gradient_checkpointing
    assert states[0] == states[1]


def test_the_arguments_are_pefts():
    ours, other = (
        inspect.signature(f).parameters for f in (prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training)
    )
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in other.values()]
    ours, other = (
        inspect.signature(f).parameters for f in (replace_lora_weights_loftq, peft.replace_lora_weights_loftq)
    )
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in other.values()]


class Plain(nn.Module):
    """What the helper asks of a model, without gradient_checkpointing_kwargs and enable_input_require_grads."""

    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)

    def get_input_embeddings(self):
        return self.embed

    def gradient_checkpointing_enable(self):
        self.enabled = True


def test_a_model_that_takes_no_options_is_told_of_them():
    with pytest.warns(FutureWarning, match="use_reentrant.*ignored"):
        model = prepare_model_for_kbit_training(Plain(), gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.enabled and model.embed(torch.tensor([1])).requires_grad
    model = prepare_model_for_kbit_training(Plain())  # nothing to be told
    assert model.enabled


@pytest.mark.parametrize("format", ["nf4", "8 bit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_prepared_model_is_trained_and_only_its_adapter_changes(folder, format, reentrant):
    model = load(folder, format, torch.bfloat16).train()
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    attach(model, LoraConfig(r=4), targets=TARGETS)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p for slot in slots_of(model, "default").values() for p in slot.parameters()]
    assert {*map(id, trained)} == {*map(id, own)}
    before = {n: p.clone() for n, p in model.named_parameters() if "adapters" not in n}
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(8):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


# -- LoftQ


@pytest.fixture(scope="module")
def oracle():
    """PEFT's replace_lora_weights_loftq, with the CPU in place of the device that its source names."""
    space = dict(vars(theirs))
    exec(inspect.getsource(theirs._loftq_init_new).replace('"cuda"', '"cpu"'), space)
    exec(inspect.getsource(theirs.replace_lora_weights_loftq), space)
    return space["replace_lora_weights_loftq"]


def products(model):
    return {name: slot.lora_B @ slot.lora_A for name, slot in slots_of(model, "default").items()}


def shares(model, folder):
    """How much of W - Q is left with the LoRAs added, by layer."""
    full = load(folder, None)
    out = {}
    for name, slot in slots_of(model, "default").items():
        layer = model.get_submodule(name)
        lost = full.get_submodule(name).weight.detach() - bnb.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        out[name] = float((lost - slot.scale * slot.lora_B @ slot.lora_A).norm().item() / lost.norm().item())
    return out


@pytest.mark.parametrize("format", ["nf4", "nf4 twice"])
def test_loftq_gives_what_pefts_does(folder, loaded, oracle, format):
    ours = copy.deepcopy(loaded[format])
    attach(ours, LoraConfig(r=4, lora_alpha=4), targets=TARGETS)
    replace_lora_weights_loftq(ours, folder)
    other = peft.get_peft_model(
        copy.deepcopy(loaded[format]), peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    )
    oracle(other, str(folder))
    found = products(ours)
    assert len(found) == 6
    for name, product in found.items():
        layer = other.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(product, B @ A, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [2, 8, 32])
def test_loftq_makes_good_part_of_the_error_whatever_the_scale(folder, model, alpha):
    attach(model, LoraConfig(r=8, lora_alpha=alpha), targets=TARGETS)
    assert set(shares(model, folder).values()) == {1.0}  # fresh: all of it is left
    replace_lora_weights_loftq(model, folder / "model.safetensors")
    left = shares(model, folder)
    assert max(left.values()) < 0.9  # PEFT's, at a scale of 4, has the residual four times: more than was lost
    want, full = model(x).logits, load(folder, None)(x).logits
    base = copy.deepcopy(model)
    set_adapters(base, {})
    assert (want - full).norm() < (base(x).logits - full).norm()


def test_loftq_writes_into_the_parameters_that_are_there(folder, model):
    attach(model, LoraConfig(r=4), targets=TARGETS)
    before = {n: (id(p), p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    replace_lora_weights_loftq(model)  # where the model was loaded from
    assert {n: (id(p), p.dtype, p.requires_grad) for n, p in model.named_parameters()} == before
    assert all(p.norm() > 0 for p in products(model).values())


def test_a_callback_decides_layer_by_layer(folder, model):
    attach(model, LoraConfig(r=4), targets=TARGETS)
    called = []

    def callback(given, name):
        assert given is model and products(model)[name].norm() > 0
        called.append(name)
        return "layers.1" in name

    fresh = {n: s.lora_A.clone() for n, s in slots_of(model, "default").items()}
    replace_lora_weights_loftq(model, folder, callback=callback)
    assert called == list(products(model))
    for name, slot in slots_of(model, "default").items():
        assert torch.equal(slot.lora_A, fresh[name]) == ("layers.1" not in name) == (products(model)[name].norm() == 0)


def test_loftq_reads_shards_and_headless_files(folder, model, tmp_path):
    attach(model, LoraConfig(r=4), targets=TARGETS)
    replace_lora_weights_loftq(model, folder)
    want = products(model)
    full = load(folder, None)
    full.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    full.model.save_pretrained(tmp_path / "headless")
    assert json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    for where in ("shards", "headless"):
        for slot in slots_of(model, "default").values():
            slot.lora_B.data.zero_()
        replace_lora_weights_loftq(model, tmp_path / where)
        for name, product in products(model).items():
            torch.testing.assert_close(product, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("prepare", "error", "said"),
    [
        (lambda m, f: (f, "lroa"), UnknownNameError, "default"),
        (lambda m, f: (f / "not there", "default"), FileNotFoundError, "model.safetensors"),
        (lambda m, f: (setattr(m.config, "_name_or_path", ""), (None, "default"))[1], ConfigError, "does not appear"),
        (
            lambda m, f: (setattr(m.config, "_name_or_path", "a/b"), (None, "default"))[1],
            ConfigError,
            "present on disk",
        ),
        (lambda m, f: (_other(f), "default"), MissingKeysError, "down_proj"),
    ],
)
def test_what_loftq_cannot_do_is_said_and_nothing_changes(folder, model, prepare, error, said, tmp_path):
    attach(model, LoraConfig(r=4), targets=TARGETS)
    path, name = prepare(model, folder if error is not MissingKeysError else (folder, tmp_path))
    with pytest.raises(error, match=said):
        replace_lora_weights_loftq(model, path, name)
    assert all(p.norm() == 0 for p in products(model).values())


def _other(where):
    """The model's file without one weight."""
    from safetensors.torch import load_file, save_file

    folder, new = where
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, new / "model.safetensors")
    return new


@pytest.mark.parametrize("format", [None, "8 bit"])
def test_loftq_needs_4_bit_layers(folder, loaded, format):
    model = load(folder, None) if format is None else copy.deepcopy(loaded[format])
    attach(model, LoraConfig(r=4), targets=TARGETS)
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        replace_lora_weights_loftq(model, folder)


# -- merging, and what the model says of itself then


@every_format
def test_a_merged_model_is_an_ordinary_one_and_is_saved_as_such(folder, loaded, format, tmp_path, randomize):
    model = copy.deepcopy(loaded[format])
    attach(model, LoraConfig(r=4), targets=r".*_proj")
    randomize(model, dtype=torch.float32)
    want = model(x).logits
    errors = merge_for_good(model, dequantize=True)
    forget_quantization(model)
    assert len(errors) == 14 and max(errors.values()) == 0 and get_adapters(model) == {}
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {nn.Linear}
    got = model(x).logits
    assert (got - want).norm() <= (0.1 if format == "8 bit" else 1e-5) * want.norm()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, None)
    assert not hasattr(again.config, "quantization_config") and torch.equal(again(x).logits, got)


def test_what_stays_quantised_is_saved_and_the_plain_layers_beside_it_stay_plain(model, tmp_path, randomize):
    attach(model, LoraConfig(r=4), targets=TARGETS)
    randomize(model, dtype=torch.float32)
    merge_for_good(model, dequantize=True)
    forget_quantization(model)
    got = model(x).logits
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {n: type(m) for n, m in again.named_modules() if n.endswith("_proj")}
    assert {*kinds.values()} == {nn.Linear, bnb.nn.Linear4bit}
    torch.testing.assert_close(again(x).logits, got, rtol=1e-5, atol=1e-5)


def test_a_plain_model_has_nothing_to_forget(folder):
    model = load(folder, None)
    before = {*vars(model)}, model.config.to_dict()
    forget_quantization(model)
    forget_quantization(nn.Linear(2, 2))
    assert ({*vars(model)}, model.config.to_dict()) == before


def test_gpt2s_layers_become_what_they_were(tmp_path, randomize):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    plain = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64)).eval()
    plain.save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**BITS["nf4"]), dtype=torch.float32
    ).eval()
    attach(model, LoraConfig(r=4), targets=["c_attn", "c_proj", "c_fc"])
    randomize(model, dtype=torch.float32)
    want = model(x).logits
    merge_for_good(model, dequantize=True)
    forget_quantization(model)
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(model(x).logits, want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(x).logits, want, rtol=1e-4, atol=1e-4)


def test_a_model_that_torchao_has_quantised_is_prepared_trained_and_merged(folder, tmp_path):
    """What transformers loads with a TorchAoConfig; merged it is an ordinary model, or says which of its layers are plain."""
    quantization = pytest.importorskip("torchao.quantization")
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    fields = dict(r=4, init_lora_weights=False)
    model = get_peft_model(prepare_model_for_kbit_training(load()), LoraConfig(**fields, target_modules="all-linear"))
    ids = torch.arange(1, 15).view(2, 7)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.get_model_status().quantization_backend == "torchao"
    want = model.eval()(ids).logits
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path)
    for plain in (merged, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(plain(ids).logits, want, rtol=1e-5, atol=1e-5)
    partly = get_peft_model(load(), LoraConfig(**fields, target_modules=["q_proj"])).merge_and_unload(dequantize=True)
    assert "model.layers.0.self_attn.q_proj" in partly.config.quantization_config.modules_to_not_convert
