"""PEFT's documented quickstarts, line for line, with nothing but the import changed: each runs with peft and with diffpeft, on the same weights."""

from __future__ import annotations

import copy
import importlib
import io
import re
from contextlib import redirect_stdout

import pytest
import torch

from tests.llm.models import TASKS, batch, model, run

LIBRARIES = ("peft", "diffpeft")
SAME = dict(rtol=1e-5, atol=1e-5)  # the same sums in another order, in fp32


@pytest.fixture(params=LIBRARIES)
def lib(request):
    return importlib.import_module(request.param)


def both(job):
    """What a job gives with peft and with diffpeft."""
    return [job(importlib.import_module(name)) for name in LIBRARIES]


def seeded(wrapped, seed=3):
    """Random values in all trainable tensors, the same for both libraries."""
    names = {}
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            names[re.sub(r"\.(adapters\.)?(default|modules_to_save|copies)(?=\.|$)|\.weight$", "", name)] = p
    for number, name in enumerate(sorted(names)):
        p = names[name]
        values = torch.randn(p.numel(), generator=torch.Generator().manual_seed(seed + number)) * 0.1
        p.data.copy_(values.reshape(p.shape))
    return wrapped


@pytest.mark.parametrize("kind", TASKS)
def test_get_peft_model_with_task_type_save_and_load(kind, tmp_path):
    def quickstart(lib):
        peft_config = lib.LoraConfig(
            r=4,
            lora_alpha=16,
            task_type=getattr(lib.TaskType, TASKS[kind]),
            lora_dropout=0.0,
        )
        wrapped = seeded(lib.get_peft_model(model(kind), peft_config)).eval()
        with redirect_stdout(io.StringIO()) as printed:
            wrapped.print_trainable_parameters()
        folder = tmp_path / lib.__name__
        wrapped.save_pretrained(folder)
        again = lib.PeftModel.from_pretrained(model(kind), folder)
        assert type(again).__name__ == type(wrapped).__name__
        assert torch.equal(run(again, kind), run(wrapped, kind))
        return printed.getvalue(), run(wrapped, kind), folder

    (line, want, theirs), (mine, got, ours) = both(quickstart)
    assert mine == line
    torch.testing.assert_close(got, want, **SAME)
    # and each reads the other's folder
    peft, diffpeft = (importlib.import_module(name) for name in LIBRARIES)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(model(kind), ours), kind), want, **SAME)
    torch.testing.assert_close(run(diffpeft.PeftModel.from_pretrained(model(kind), theirs), kind), want, **SAME)
    assert not torch.allclose(run(model(kind), kind), want, **SAME)


def test_a_training_loop(lib):
    wrapped = lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    before = {n: p.clone() for n, p in wrapped.named_parameters()}
    wrapped.train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    data = batch(rows=4)
    losses = []
    for _ in range(15):
        loss = wrapped(**data, labels=data["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in wrapped.named_parameters() if p.requires_grad} and changed


def test_both_learn_the_same(tmp_path):
    def quickstart(lib):
        wrapped = seeded(lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=4))).train()
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            data = batch()
            loss = wrapped(**data, labels=data["input_ids"]).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    torch.testing.assert_close(*both(quickstart), **SAME)


def test_auto_peft_model(lib, tmp_path):
    model().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = seeded(lib.get_peft_model(base, lib.LoraConfig(task_type=lib.TaskType.CAUSAL_LM))).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    again = lib.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(run(again), run(wrapped)) and not again.training
    with pytest.raises(ValueError, match="Expected target PEFT class"):
        lib.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_several_adapters_and_switching(tmp_path):
    def quickstart(lib):
        for n in (1, 2):
            made = seeded(lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=2 * n)), seed=10 * n)
            made.save_pretrained(tmp_path / lib.__name__ / str(n))
        wrapped = lib.PeftModel.from_pretrained(model(), tmp_path / lib.__name__ / "1", adapter_name="first")
        found = [run(wrapped)]
        wrapped.load_adapter(tmp_path / lib.__name__ / "2", adapter_name="second")
        assert wrapped.active_adapters == ["first"]
        found += [run(wrapped)]
        wrapped.set_adapter("second")
        found += [run(wrapped)]
        wrapped.base_model.set_adapter(["first", "second"])
        assert wrapped.active_adapters == ["first", "second"]
        found += [run(wrapped)]
        with wrapped.disable_adapter():
            found += [run(wrapped)]
        wrapped.set_adapter("first")
        found += [run(wrapped, adapter_names=["second", "__base__"])]
        wrapped.delete_adapter("first")
        assert wrapped.active_adapters == ["second"] and list(wrapped.peft_config) == ["second"]
        return [*found, run(wrapped)]

    for want, got in zip(*both(quickstart), strict=True):
        torch.testing.assert_close(got, want, **SAME)


def test_merge_for_deployment(tmp_path):
    def quickstart(lib):
        wrapped = seeded(lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=4))).eval()
        want = run(wrapped)
        wrapped.merge_adapter()
        torch.testing.assert_close(run(wrapped), want, **SAME)
        wrapped.unmerge_adapter()
        merged = wrapped.merge_and_unload()
        assert type(merged).__name__ == "LlamaForCausalLM"
        merged.save_pretrained(tmp_path / lib.__name__)
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(tmp_path / lib.__name__)
        assert {n for n, _ in plain.named_parameters()} == {n for n, _ in model().named_parameters()}
        return run(plain)

    torch.testing.assert_close(*both(quickstart), **SAME)


def test_ia3():
    def quickstart(lib):
        peft_config = lib.IA3Config(
            task_type=lib.TaskType.SEQ_CLS,
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        )
        wrapped = seeded(lib.get_peft_model(model("bert-cls"), peft_config)).eval()
        return run(wrapped, "bert-cls")

    torch.testing.assert_close(*both(quickstart), **SAME)


def test_generation(lib):
    wrapped = lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM"))
    ids = batch(rows=1)["input_ids"]
    with torch.no_grad():
        want = model().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False), want)
        seeded(wrapped)
        found = wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert not torch.equal(found, want)
        assert torch.equal(found, wrapped.eval().generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_an_adapter_a_prompt(lib, beams, kind):
    fields = dict(task_type=TASKS[kind], target_modules=["v_proj", "q_proj"] if kind == "llama" else ["q", "wi"])
    wrapped = seeded(lib.get_peft_model(model(kind), lib.LoraConfig(**fields), adapter_name="a")).eval()
    wrapped.add_adapter("b", lib.LoraConfig(**fields, r=4, init_lora_weights=False))
    data = {key: t for key, t in batch(kind, rows=3).items() if "labels" not in key and "decoder" not in key}
    options = dict(max_new_tokens=4, do_sample=False, num_beams=beams)
    with torch.no_grad():
        mixed = wrapped.generate(**data, adapter_names=["a", "__base__", "b"], **options)
        for row, name in enumerate(("a", None, "b")):
            if name is None:
                with wrapped.disable_adapter():
                    alone = wrapped.generate(**data, **options)
            else:
                wrapped.set_adapter(name)
                alone = wrapped.generate(**data, **options)
            n = min(mixed.shape[1], alone.shape[1])
            assert torch.equal(mixed[row, :n], alone[row, :n]), name
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in wrapped.get_base_model().modules()
    )  # they are gone


def test_the_low_level_api(tmp_path):
    def quickstart(lib):
        class DummyModel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embedding = torch.nn.Embedding(10, 10)
                self.linear = torch.nn.Linear(10, 10)
                self.lm_head = torch.nn.Linear(10, 10)

            def forward(self, input_ids):
                return self.lm_head(self.linear(self.embedding(input_ids)))

        lora_config = lib.LoraConfig(
            lora_alpha=16, lora_dropout=0.0, r=8, bias="none", target_modules=["linear"], init_lora_weights=False
        )
        net = lib.inject_adapter_in_model(lora_config, DummyModel())
        seeded(net)
        state = lib.get_peft_model_state_dict(net)
        fresh = lib.inject_adapter_in_model(lora_config, DummyModel())
        result = lib.set_peft_model_state_dict(fresh, state)
        assert not result.unexpected_keys
        ids = torch.arange(10)[None]
        return sorted(state), net(ids), fresh(ids)

    (keys, want, _), (mine, got, again) = both(quickstart)
    assert mine == keys
    torch.testing.assert_close(got, want, **SAME)
    assert torch.equal(got, again)


def test_a_custom_model_without_a_task(lib, tmp_path):
    def mlp():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    config = lib.LoraConfig(target_modules=["0"], modules_to_save=["2"])
    wrapped = seeded(lib.get_peft_model(mlp(), config))
    x = torch.randn(4, 20)
    wrapped.save_pretrained(tmp_path)
    again = lib.PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(again(x), wrapped.eval()(x)) and not torch.allclose(again(x), mlp()(x))
    with again.disable_adapter():
        assert torch.equal(again(x), mlp()(x))


def test_quickstarts_copy_and_pickle(lib, tmp_path):
    wrapped = seeded(lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM"))).eval()
    twin = copy.deepcopy(wrapped)
    assert type(twin) is type(wrapped) and torch.equal(run(twin), run(wrapped))
    torch.save(wrapped, tmp_path / "whole.pt")
    assert torch.equal(run(torch.load(tmp_path / "whole.pt", weights_only=False)), run(wrapped))


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model().save_pretrained(tmp_path / "base")

    def quickstart(lib):
        bnb_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bnb_config)
        base = lib.prepare_model_for_kbit_training(base)
        config = lib.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = seeded(lib.get_peft_model(base, config)).train()
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
        data, losses = batch(rows=4), []
        for _ in range(6):
            loss = wrapped(**data, labels=data["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        wrapped.save_pretrained(tmp_path / lib.__name__)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bnb_config)
        again = lib.PeftModel.from_pretrained(base, tmp_path / lib.__name__)
        torch.testing.assert_close(run(again), run(wrapped.eval()), **SAME)
        return torch.tensor(losses)

    torch.testing.assert_close(*both(quickstart), rtol=1e-4, atol=1e-4)  # six steps over 4-bit matrix products


def test_prefix_tuning_for_translation():
    def quickstart(lib):
        config = lib.PrefixTuningConfig(
            task_type=lib.TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=20
        )
        wrapped = seeded(lib.get_peft_model(model("t5"), config))
        data = batch("t5")
        loss = wrapped(
            input_ids=data["input_ids"], attention_mask=data["attention_mask"], labels=data["input_ids"]
        ).loss
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(*both(quickstart), **SAME)


def test_adalora():
    def quickstart(lib):
        config = lib.AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=6, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=12, lora_alpha=8
        )
        wrapped = seeded(lib.get_peft_model(model(), config)).train()
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        data, losses = batch(), []
        for step in range(12):
            loss = wrapped(**data, labels=data["input_ids"]).loss
            loss.backward()
            optimizer.step()
            wrapped.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    torch.testing.assert_close(*both(quickstart), **SAME)
