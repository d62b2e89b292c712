"""`resize_token_embeddings` of a model that has adapters on its embeddings. PEFT refuses all of these."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tests.llm.models import VOCABULARY, output
from tests.llm.models import model as made

SAME = dict(rtol=1e-5, atol=1e-5)
MORE = VOCABULARY + 4
IDS = torch.tensor([[5, 6, 7, 90]])
NEW = torch.tensor([[5, VOCABULARY + 3, 7, 98]])
ON = {
    "copies": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "copy of the table": dict(modules_to_save=["embed_tokens"]),
    "copy of the head": dict(modules_to_save=["lm_head"]),
    "one copy": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "rows": dict(trainable_token_indices=[5, 90]),
    "lora": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "one lora": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "neither": dict(target_modules=["q_proj"]),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(tied):
    model = made("llama")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


def config(on, **more):
    return {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **ON[on], **more}


def filled(wrapped):
    generator = torch.Generator().manual_seed(1)
    for p in wrapped.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.3
    return wrapped.eval()


def run(model, ids=IDS):
    with torch.no_grad():
        return output(model(input_ids=ids))


def trained(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on", ON)
def test_old_tokens_stay_new_ones_work_and_come_back_from_a_file(on, tied, tmp_path):
    base = llama(tied)
    wrapped = filled(get_peft_model(base, LoraConfig(**config(on))))
    before, names, objects = run(wrapped), trained(wrapped), {id(p) for p in wrapped.parameters() if p.requires_grad}
    wrapped.resize_token_embeddings(MORE)
    after = run(wrapped)
    assert after.shape[-1] == MORE and base.config.vocab_size == MORE
    torch.testing.assert_close(after[..., :VOCABULARY], before, **SAME)
    assert (
        trained(wrapped).keys() == names.keys() and {id(p) for p in wrapped.parameters() if p.requires_grad} == objects
    )
    plain = llama(tied)
    plain.resize_token_embeddings(MORE, mean_resizing=False)
    plain.load_state_dict({k: base.state_dict()[k] for k in plain.state_dict()})
    with wrapped.disable_adapter():
        assert torch.equal(run(wrapped, NEW), run(plain, NEW))
    want = run(wrapped, NEW)
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(run(PeftModel.from_pretrained(plain, tmp_path), NEW), want, **SAME)
    out, table = base.get_output_embeddings(), base.get_input_embeddings()
    assert (out._parameters["weight"] is table._parameters["weight"]) == tied
    wrapped.train()(input_ids=NEW, labels=NEW).loss.backward()
    if "lora" not in on or not tied:
        torch.testing.assert_close(run(wrapped.eval().merge_and_unload(), NEW), want, **SAME)


@pytest.mark.parametrize("on", ["copies", "lora", "one copy", "one lora"])
def test_fewer_tokens_too(on):
    tied = on.startswith("one")
    wrapped = filled(get_peft_model(llama(tied), LoraConfig(**config(on))))
    before = run(wrapped, IDS[:, :3])
    wrapped.resize_token_embeddings(40)
    torch.testing.assert_close(run(wrapped, IDS[:, :3]), before[..., :40], **SAME)


@pytest.mark.parametrize("on", [name for name in ON if name not in ("neither", "copy of the head")])
def test_the_model_s_own_method_is_refused_and_nothing_has_changed(on):
    tied = on.startswith("one")
    base = llama(tied)
    wrapped = filled(get_peft_model(base, LoraConfig(**config(on))))
    before, names = run(wrapped), trained(wrapped)
    own = {k: t.clone() for k, t in base.state_dict().items()}
    with pytest.raises(AdapterStateError, match="resize_token_embeddings of the PeftModel"):
        base.resize_token_embeddings(MORE)
    assert torch.equal(run(wrapped), before) and trained(wrapped) == names
    assert {k: t.shape for k, t in base.state_dict().items()} == {k: t.shape for k, t in own.items()}
    assert all(torch.equal(t, own[k]) for k, t in base.state_dict().items())


@pytest.mark.parametrize("on", [dict(modules_to_save=["lm_head"]), dict(target_modules=["lm_head"])])
def test_a_head_that_was_replaced_is_missed(on):
    """transformers makes another head without a word to the one that is there."""
    base = llama(False)
    wrapped = filled(get_peft_model(base, LoraConfig(r=2, **{"target_modules": ["q_proj"], **on})))
    base.resize_token_embeddings(MORE)
    for use in (lambda: run(wrapped), lambda: wrapped.generate(input_ids=IDS, max_new_tokens=1)):
        with pytest.raises(AdapterStateError, match="lm_head that carries adapters is no longer in the model"):
            use()
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        with pytest.raises(AdapterStateError, match="no longer"):
            run(other)


def test_what_cannot_get_other_rows_is_refused_before_anything_changes():
    for adapter in (
        LoHaConfig(r=2, target_modules=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["lm_head"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
    ):
        wrapped = get_peft_model(llama(False), adapter)
        shape = wrapped.get_base_model().get_input_embeddings().weight.shape
        with pytest.raises(AdapterStateError, match="before the adapter is made"):
            wrapped.resize_token_embeddings(MORE)
        assert wrapped.get_base_model().get_input_embeddings().weight.shape == shape
    wrapped = filled(get_peft_model(llama(False), LoraConfig(**config("copies"))))
    wrapped.merge_adapter()
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        wrapped.resize_token_embeddings(MORE)


def test_rows_that_would_be_lost_are_named():
    wrapped = filled(get_peft_model(llama(True), LoraConfig(**config("rows"))))
    with pytest.raises(AdapterStateError, match="90"):
        wrapped.resize_token_embeddings(40)
    assert run(wrapped).shape[-1] == VOCABULARY


@pytest.mark.parametrize("on", [name for name in ON if name != "neither"])
def test_peft_has_no_answer(on):
    theirs = peft.get_peft_model(llama(False), peft.LoraConfig(**config(on, ensure_weight_tying=False)))
    with pytest.raises((TypeError, KeyError)):
        theirs.resize_token_embeddings(MORE)


def test_adapters_elsewhere_do_not_mind():
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(llama(False), lib.LoraConfig(r=2, target_modules=["q_proj"]))
        wrapped.get_base_model().resize_token_embeddings(MORE)
        assert run(wrapped, NEW).shape[-1] == MORE
    assert isinstance(wrapped.get_base_model().lm_head, nn.Linear)
