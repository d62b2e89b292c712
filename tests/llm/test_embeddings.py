"""Embeddings and heads that a file holds beside its adapter: they act while it does, and leave with it. PEFT writes them over the model's."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import (
    LoraConfig,
    NonFiniteError,
    PeftModel,
    ShapeMismatchError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests.llm.models import VOCABULARY, batch, output
from tests.llm.models import model as made

SAME = dict(rtol=1e-4, atol=1e-5)
TARGETS = {
    "beside": ["q_proj"],
    "embed": ["q_proj", "embed_tokens"],
    "head": ["q_proj", "lm_head"],
    "both": ["q_proj", "embed_tokens", "lm_head"],
}
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(tied, seed=0):
    """A model; those of different seeds differ in their embeddings alone."""
    model = made("llama")
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data += seed * torch.randn(layer.weight.shape, generator=generator) * 0.3
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


def run(model, **more):
    with torch.no_grad():
        return output(model(**batch(), **more))


def bytes_of(model):
    return {k: t.clone() for k, t in model.state_dict().items() if "copies" not in k and "adapters" not in k}


@pytest.fixture(params=[(where, tied) for where in TARGETS for tied in (True, False)], ids=str)
def case(request, tmp_path):
    """A folder that PEFT wrote from a base with other embeddings, and the logits of PEFT with it on this base."""
    where, tied = request.param
    config = peft.LoraConfig(r=4, target_modules=TARGETS[where], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(llama(tied, seed=1), config)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    want = run(peft.PeftModel.from_pretrained(llama(tied), tmp_path / "a"))
    return tmp_path / "a", want, tied


def test_they_act_as_in_peft_and_the_base_keeps_its_bytes(case):
    folder, want, tied = case
    base, before = llama(tied), run(llama(tied))
    own = bytes_of(base)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    torch.testing.assert_close(run(model), want, **SAME)
    assert not torch.allclose(before, want, **SAME)
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    rows = run(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(rows[0], want[0], **SAME)
    torch.testing.assert_close(rows[1], before[1], **SAME)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    model.set_adapter("default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert all(torch.equal(t, own[k]) for k, t in bytes_of(base).items())
    gone = model.unload()
    assert torch.equal(run(gone), before) and {*gone.state_dict()} == {*own}


def test_they_touch_no_other_adapter(case, tmp_path):
    folder, want, tied = case
    torch.manual_seed(5)
    first = get_peft_model(llama(tied), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    alone = run(first)
    first.load_adapter(folder, "other")
    assert torch.equal(run(first), alone)
    first.set_adapter("other")
    torch.testing.assert_close(run(first), want, **SAME)
    first.set_adapter("default")
    assert torch.equal(run(first), alone)
    first.set_adapter("other")
    first.delete_adapter("other")
    assert torch.equal(run(first), alone)


def test_saved_again_they_are_in_the_file(case, tmp_path):
    folder, want, tied = case
    model = PeftModel.from_pretrained(llama(tied), folder)
    model.save_pretrained(tmp_path / "b")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "b"))
    assert {*first} <= {*second} and all(torch.equal(t, second[k]) for k, t in first.items())
    for lib in (peft, diffpeft):
        torch.testing.assert_close(run(lib.PeftModel.from_pretrained(llama(tied), tmp_path / "b")), want, **SAME)


@pytest.mark.parametrize("way", ["set", "load"])
def test_put_into_an_adapter_that_is_there_they_are_its(case, way):
    folder, want, tied = case
    base = llama(tied)
    own, before = bytes_of(base), run(base)
    config = diffpeft.PeftConfig.from_pretrained(folder)
    model = get_peft_model(base, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    for _ in range(2):  # the second time they are there already
        if way == "set":
            assert not any(set_peft_model_state_dict(model, tensors)[:2])
        else:
            model.load_adapter(folder, "default")
        torch.testing.assert_close(run(model), want, **SAME)
    assert all(torch.equal(t, own[k]) for k, t in bytes_of(base).items())
    assert torch.equal(run(model.unload()), before)


def test_merged_for_good_they_stay(case, tmp_path):
    folder, want, tied = case
    if (
        tied
        and "beside" not in str(diffpeft.PeftConfig.from_pretrained(folder).target_modules)
        and len(diffpeft.PeftConfig.from_pretrained(folder).target_modules) > 1
    ):
        pytest.skip("a layer that shares its weight is not merged")
    plain = PeftModel.from_pretrained(llama(tied), folder).merge_and_unload()
    torch.testing.assert_close(run(plain), want, **SAME)
    one, other = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert (one is other) == tied == plain.config.tie_word_embeddings


def test_a_resized_vocabulary_is_saved_along(tmp_path):
    """As in PEFT, where the folder of the base says another size."""
    llama(False).save_pretrained(tmp_path / "base")
    keys = []
    for lib in (peft, diffpeft):
        model = type(llama(False)).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
        wrapped = lib.get_peft_model(model, lib.LoraConfig(r=4, target_modules=["q_proj"]))
        wrapped.save_pretrained(tmp_path / lib.__name__)
        keys.append({*load_file(tmp_path / lib.__name__ / "adapter_model.safetensors")})
        want = run(wrapped)
    assert keys[0] == keys[1] and "base_model.model.lm_head.weight" in keys[1]
    again = type(llama(False)).from_pretrained(tmp_path / "base")
    with pytest.raises(ShapeMismatchError, match=r"96.*100.*resize_token_embeddings\(100\)"):
        PeftModel.from_pretrained(again, tmp_path / "diffpeft")
    again.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    torch.testing.assert_close(run(PeftModel.from_pretrained(again, tmp_path / "diffpeft")), want, **SAME)
    wrapped.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert all("lora" in k for k in load_file(tmp_path / "without" / "adapter_model.safetensors"))


def test_broken_ones_are_named_and_nothing_has_changed(tmp_path):
    wrapped = get_peft_model(llama(True), LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = torch.full_like(tensors["base_model.model.lm_head.weight"], torch.nan)
    save_file(tensors, file)
    base = llama(True)
    before = base.state_dict().keys()
    with pytest.raises(NonFiniteError, match="lm_head"):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.state_dict().keys() == before and torch.equal(run(base), run(llama(True)))


def test_a_model_s_own_are_not_copied(tmp_path):
    """Adapters on embeddings always bring the weight along; where it is the model's, nothing is held twice."""
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    wrapped = get_peft_model(llama(False), config)
    want = run(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(False), tmp_path)
    torch.testing.assert_close(run(again), want, **SAME)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in wrapped.parameters())
    assert {*get_peft_model_state_dict(again)} == {*load_file(tmp_path / "adapter_model.safetensors")}


def test_adapters_of_one_base_act_together_and_those_of_two_do_not(tmp_path):
    """Adapters that were trained on the same resized model bring the same embeddings."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(llama(True, seed), config).save_pretrained(tmp_path / name, save_embedding_layers=True)
    base = llama(True)
    before = run(base)
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in "bc":
        model.load_adapter(tmp_path / name, name)
    model.base_model.set_adapter(["a", "b"])
    want = run(model)
    plain = llama(True, 1)
    for name in "ab":
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        for i, layer in enumerate(plain.model.layers):
            A, B = (tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{n}.weight"] for n in "AB")
            layer.self_attn.q_proj.weight.data += 4 * B @ A
    torch.testing.assert_close(want, run(plain), **SAME)
    with pytest.raises(ValueError, match="Only one adapter can be set"):
        model.base_model.set_adapter(["a", "c"])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(run(model), want, **SAME)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "embed" in n or "lm_head" in n)
    assert torch.equal(run(model.unload()), before)
