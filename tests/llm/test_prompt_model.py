"""Prompt methods through PeftModel: PEFT's quickstarts with nothing but the import changed, and each library's folders in the other."""

from __future__ import annotations

import importlib
import warnings

import peft
import pytest
import torch

import diffpeft
from tests.llm.models import TASKS, batch, model, run
from tests.llm.test_quickstarts import SAME, seeded

METHODS = {
    "prompt": ("PromptTuningConfig", dict(num_virtual_tokens=5)),
    "p-tuning": ("PromptEncoderConfig", dict(num_virtual_tokens=5, encoder_hidden_size=16)),
    "p-tuning, lstm": (
        "PromptEncoderConfig",
        dict(num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
    ),
    "prefix": ("PrefixTuningConfig", dict(num_virtual_tokens=5)),
    "prefix, projection": ("PrefixTuningConfig", dict(num_virtual_tokens=5, prefix_projection=True)),
}


@pytest.fixture(params=["peft", "diffpeft"])
def lib(request):
    return importlib.import_module(request.param)


def made(lib, method, kind):
    cls, fields = METHODS[method]
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seeded(lib.get_peft_model(model(kind), getattr(lib, cls)(task_type=TASKS[kind], **fields))).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert-cls", "bert-tokens", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_same_outputs_and_folders(method, kind, tmp_path):
    theirs, ours = made(peft, method, kind), made(diffpeft, method, kind)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "copies" not in n} == {
        n for n, p in theirs.named_parameters() if p.requires_grad and "modules_to_save" not in n
    }
    want = run(theirs, kind)
    torch.testing.assert_close(run(ours, kind), want, **SAME)
    assert want.shape != run(model(kind), kind).shape or not torch.allclose(want, run(model(kind), kind), **SAME)
    with ours.disable_adapter():
        assert torch.equal(run(ours, kind), run(model(kind), kind))
    theirs.save_pretrained(tmp_path / "peft")
    ours.save_pretrained(tmp_path / "diffpeft")
    for writer in ("peft", "diffpeft"):
        for reader in (peft, diffpeft):
            again = reader.PeftModel.from_pretrained(model(kind), tmp_path / writer).eval()
            torch.testing.assert_close(run(again, kind), want, **SAME)
            assert type(again).__name__ == type(ours).__name__


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation(method, kind):
    data = batch(kind)
    data.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=5, do_sample=False)
    want = made(peft, method, kind).generate(**data, **options)
    ours = made(diffpeft, method, kind)
    assert torch.equal(ours.generate(**data, **options), want)
    with ours.disable_adapter():
        assert torch.equal(ours.generate(**data, **options), model(kind).generate(**data, **options))


def test_a_prompt_is_learnt(lib):
    wrapped = lib.get_peft_model(
        model(), lib.PromptTuningConfig(task_type=lib.TaskType.CAUSAL_LM, num_virtual_tokens=8)
    ).train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    data, losses = batch(rows=4), []
    for _ in range(15):
        loss = wrapped(**data, labels=data["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(
        torch.equal(p, q) for p, q in zip(wrapped.get_base_model().parameters(), model().parameters(), strict=True)
    )


def test_several_prompts_and_what_is_refused(tmp_path):
    ours = made(diffpeft, "prompt", "llama")
    first = run(ours)
    ours.add_adapter("b", diffpeft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert torch.equal(run(ours), first) and ours.active_adapters == ["default"]
    ours.set_adapter("b")
    assert not torch.allclose(run(ours)[:, -1], first[:, -1])
    with pytest.raises(ValueError, match="Cannot combine adapters"):
        ours.add_adapter("c", diffpeft.LoraConfig())
    with pytest.raises(ValueError, match="already exists"):
        ours.add_adapter("b", diffpeft.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ValueError, match="one prompt"):
        run(ours, adapter_names=["default", "b"])
    ours.delete_adapter("b")
    assert torch.equal(run(ours), first)
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        diffpeft.PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    base = ours.unload()
    assert torch.equal(run(base), run(model())) and {n for n, _ in base.named_modules()} == {
        n for n, _ in model().named_modules()
    }


class Bare(torch.nn.Module):
    """A model that does not say where its embeddings are, nor on which device it is."""

    def __init__(self, names):
        super().__init__()
        self.config = {"vocab_size": 10}
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})

    def prepare_inputs_for_generation(self):
        return


def test_a_prefix_needs_no_embeddings_and_its_keys_no_mapping(tmp_path):
    fields = dict(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=8, num_attention_heads=2)
    wrapped = diffpeft.get_peft_model(Bare(["old"]), diffpeft.PrefixTuningConfig(**fields))
    with torch.no_grad():
        wrapped.prompt_encoder.default.embedding.weight.fill_(1.5)
    wrapped.save_pretrained(tmp_path)
    again = diffpeft.PeftModel.from_pretrained(Bare(["new"]), tmp_path, key_mapping={"^old": "new"})
    assert (again.prompt_encoder.default.embedding.weight == 1.5).all()
    with pytest.raises(diffpeft.ConfigError, match="has no get_input_embeddings"):
        diffpeft.get_peft_model(Bare(["old"]), diffpeft.PromptTuningConfig(**fields))
    with pytest.raises(diffpeft.ConfigError, match="Please specify `num_layers`"):
        diffpeft.get_peft_model(Bare(["old"]), diffpeft.PrefixTuningConfig(**{**fields, "num_layers": None}))


def test_another_base_than_the_config_names_is_said():
    for lib, name in ((peft, None), (diffpeft, None), (peft, "mine"), (diffpeft, "mine")):
        base = torch.nn.Sequential(torch.nn.Linear(2, 2))
        if name:
            base.name_or_path = name
        with pytest.warns(UserWarning, match=f"was renamed from 'other' to '{name}'"):
            lib.get_peft_model(base, lib.LoraConfig(target_modules=["0"], base_model_name_or_path="other"))
