"""nn.MultiheadAttention under PEFT's names: files and outputs are PEFT's."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import ConfigError, LoHaConfig, LoraConfig, PeftModel, converters, get_peft_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32, sums of ten products
FIELDS = {
    "plain": {"target_modules": ["mha"]},
    "beside others": {"target_modules": ["mha", "lin"], "r": 4, "lora_alpha": 3},
    "stabilised": {"target_modules": r".*mha", "use_rslora": True, "r": 3},
    "patterns": {"target_modules": ["mha", "lin"], "r": 4, "rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 5}},
}
every_config = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.emb, self.mha, self.lin = nn.Linear(7, 10), nn.MultiheadAttention(10, 2, **options), nn.Linear(10, 6)

    def forward(self, x):
        x = self.emb(x)
        return self.lin(self.mha(x, x, x)[0])


def base() -> Model:
    torch.manual_seed(0)
    return Model()


def x() -> torch.Tensor:
    return torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def theirs(tmp_path):
    """make(fields) -> PEFT's model with a random adapter, and its folder."""

    def make(fields, name="theirs"):
        torch.manual_seed(2)
        model = peft.get_peft_model(base(), peft.LoraConfig(init_lora_weights=False, **fields)).eval()
        model.save_pretrained(tmp_path / name)
        return model, tmp_path / name

    return make


@every_config
def test_their_files_load_and_ours_are_theirs(fields, theirs, tmp_path):
    model, folder = theirs(fields)
    ours = PeftModel.from_pretrained(base(), folder).eval()
    torch.testing.assert_close(ours(x()), model(x()), **CLOSE)
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(again(x()), model(x()), **CLOSE)
    for merge in (lambda m: m.merge_and_unload(), lambda m: m.merge_adapter() or m):
        torch.testing.assert_close(merge(copy.deepcopy(ours))(x()), merge(copy.deepcopy(model))(x()), **CLOSE)


@every_config
def test_a_fresh_adapter_acts_and_is_saved_as_theirs(fields, tmp_path):
    torch.manual_seed(2)
    ours = get_peft_model(base(), LoraConfig(init_lora_weights=False, **fields))
    ours.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    torch.testing.assert_close(ours(x()), model(x()), **CLOSE)
    shapes = lambda m: {k: t.shape for k, t in m.items()}  # noqa: E731
    assert shapes(diffpeft.get_peft_model_state_dict(ours)) == shapes(peft.get_peft_model_state_dict(model))
    assert {n for n, p in ours.base_model.model.named_parameters() if p.requires_grad and "adapters" not in n} == set()
    loss = ours.train()(x()).square().sum()
    loss.backward()
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == len(shapes(load_file(tmp_path / WEIGHTS))) and all(p.grad is not None for p in trained)


def test_a_file_is_loaded_before_and_after_the_model_is_made(theirs):
    model, folder = theirs(FIELDS["beside others"])
    ours = get_peft_model(base(), LoraConfig(**FIELDS["beside others"]))
    tensors = load_file(folder / WEIGHTS)
    assert not diffpeft.set_peft_model_state_dict(ours, tensors).unexpected_keys
    torch.testing.assert_close(ours.eval()(x()), model(x()), **CLOSE)
    injected = diffpeft.inject_adapter_in_model(LoraConfig(**FIELDS["beside others"]), base())
    bare = {key.removeprefix(PREFIX): t for key, t in tensors.items()}
    assert diffpeft.get_peft_model_state_dict(injected).keys() == bare.keys()
    diffpeft.set_peft_model_state_dict(injected, bare)
    torch.testing.assert_close(injected.eval()(x()), model(x()), **CLOSE)
    plain = ours.unload()
    assert type(plain.mha) is nn.MultiheadAttention and torch.equal(plain(x()), base().eval()(x()))


@every_config
def test_converters_carry_it(fields, theirs, tmp_path):
    model, folder = theirs(fields)
    converters.convert(folder, tmp_path / "again", to="peft")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())
    other = base()
    diffpeft.load_lora(other, folder, name="a")
    torch.testing.assert_close(other(x()), model(x()), **CLOSE)
    for format in ("diffusers", "lycoris", "peft"):
        path = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        diffpeft.save_lora(other, path, name="a", format=format)
        twin = base()
        diffpeft.load_lora(twin, path, name="b")
        torch.testing.assert_close(twin(x()), model(x()), **CLOSE)
    mine, theirs = load_file(tmp_path / "peft" / WEIGHTS), load_file(folder / WEIGHTS)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], t) for key, t in theirs.items())


def test_an_attached_adapter_is_written_so_that_it_does_the_same_in_peft(tmp_path):
    """Its alpha is the config's on both projections, and PEFT would add the second twice."""
    ours = base()
    diffpeft.attach(ours, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False), targets=["mha"])
    diffpeft.save_lora(ours, tmp_path / "a", name="default", format="peft")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == ["mha"]
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "a")
    torch.testing.assert_close(ours(x()), model(x()), **CLOSE)
    again = base()
    diffpeft.load_lora(again, tmp_path / "a", name="a")
    torch.testing.assert_close(again(x()), ours(x()), **CLOSE)


def test_what_no_folder_of_peft_says_is_refused(tmp_path):
    for name, config in {"loha": LoHaConfig(r=2), "uneven": LoraConfig(r=2), "dora": LoraConfig(use_dora=True)}.items():
        ours = base()
        diffpeft.attach(ours, config, name, targets=["mha"])
        if name == "uneven":
            diffpeft.to_lora(ours, name)
            slot = ours.mha.out_proj.adapters.uneven
            slot.lora_A.data, slot.lora_B.data = slot.lora_A.data[:1], slot.lora_B.data[:, :1]
        with pytest.raises(diffpeft.CannotConvertError, match="attention"):
            diffpeft.save_lora(ours, tmp_path / name, name=name, format="peft")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", None])
def test_sums_are_theirs(kind, theirs, tmp_path):
    fields = FIELDS["beside others"]
    model, folder = theirs(fields)
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, **fields))
    model.save_pretrained(folder)
    ours = PeftModel.from_pretrained(base(), folder)
    ours.load_adapter(folder / "other", "other")
    density = {"density": 0.5} if kind and kind != "svd" and kind not in ("linear", "cat") else {}
    ours.add_weighted_adapter(["default", "other"], [0.7, 0.5], "sum", combination_type=kind, **density)
    ours.set_adapter("sum")
    if kind is None:
        want = base()
        for name, w in (("default", 0.7), ("other", 0.5)):
            p = peft.get_peft_model_state_dict(model, adapter_name=name)
            for layer, by in (("mha", 1), ("mha.base_layer.out_proj", 2), ("lin", 1)):
                module = want.get_submodule(layer.replace(".base_layer", ""))
                weight = module.in_proj_weight if layer == "mha" else module.weight
                weight.data += w * by * 0.75 * p[f"{PREFIX}{layer}.lora_B.weight"] @ p[f"{PREFIX}{layer}.lora_A.weight"]
        expected = want(x())
    else:
        model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "sum", combination_type=kind, **density)
        model.set_adapter("sum")
        expected = model(x())
    torch.testing.assert_close(ours(x()), expected, **CLOSE)
    ours.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    for library in (peft, diffpeft):
        again = library.PeftModel.from_pretrained(base(), tmp_path / "saved" / "sum")
        torch.testing.assert_close(again(x()), expected, **CLOSE)


def test_another_file_takes_its_place(theirs):
    model, folder = theirs(FIELDS["beside others"])
    ours = get_peft_model(base(), LoraConfig(init_lora_weights=False, **FIELDS["beside others"])).eval()
    diffpeft.hotswap_adapter(ours, folder, "default")
    torch.testing.assert_close(ours(x()), model(x()), **CLOSE)
    with ours.disable_adapter():
        assert torch.equal(ours(x()), base().eval()(x()))


def test_biases_are_trained_and_saved(theirs, tmp_path):
    fields = {**FIELDS["beside others"], "bias": "all"}
    ours = get_peft_model(base(), LoraConfig(init_lora_weights=False, **fields))
    for name, p in ours.named_parameters():
        if name.endswith("diff_b"):
            nn.init.normal_(p)
    ours.save_pretrained(tmp_path / "ours")
    keys = {key.removeprefix(PREFIX) for key in load_file(tmp_path / "ours" / WEIGHTS) if key.endswith("bias")}
    inside = {"mha.base_layer.in_proj_bias", "mha.base_layer.out_proj.base_layer.bias"}
    assert keys == {*inside, "lin.base_layer.bias", "emb.bias"}
    for library in (peft, diffpeft):
        again = library.PeftModel.from_pretrained(base(), tmp_path / "ours")
        torch.testing.assert_close(again(x()), ours(x()), **CLOSE)


@pytest.mark.parametrize(
    "options, fields, text",
    [
        (
            {"kdim": 10, "vdim": 4},
            {},
            "Only same embed for query/key/value is supported as of now for MultiheadAttention",
        ),
        ({}, {"use_dora": True}, "MultiheadAttention does not support DoRA (yet), please set use_dora to False"),
    ],
)
def test_what_peft_refuses_is_refused_in_its_words(options, fields, text):
    for library in (peft, diffpeft):
        with pytest.raises(ValueError, match=re.escape(text)):
            library.get_peft_model(Model(**options), library.LoraConfig(target_modules=["mha"], **fields))
    assert issubclass(ConfigError, ValueError)


def test_a_batch_with_an_adapter_a_row_is_refused_in_its_words():
    for library in (peft, diffpeft):
        config = lambda r, library=library: library.LoraConfig(target_modules=["mha"], r=r, init_lora_weights=False)  # noqa: E731
        model = library.get_peft_model(base(), config(4), "a").eval()
        model.add_adapter("b", config(6))
        with pytest.raises(TypeError, match=r"lora\.MultiheadAttention does not support mixed adapter batches"):
            model(x(), adapter_names=["a", "b", "__base__", "a", "b"])


def test_other_methods_work_there_too(tmp_path):
    ours = get_peft_model(base(), LoHaConfig(r=2, target_modules=["mha"], init_weights=False))
    assert not torch.allclose(ours(x()), base()(x()))
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(x()), ours(x()), **CLOSE)


def test_all_linear_reaches_the_output_projection_alone():
    ours = get_peft_model(base(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert {*ours.base_model.targeted_module_names} == {"emb", "mha.out_proj", "lin"}
    plain = base()
    products = {n: m.adapters.default for n, m in ours.get_base_model().named_modules() if "adapters" in m._modules}
    for name, slot in products.items():
        plain.get_submodule(name).weight.data += slot.lora_B.data @ slot.lora_A.data
    torch.testing.assert_close(ours(x()), plain(x()), **CLOSE)
