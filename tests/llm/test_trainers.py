"""transformers' Trainer, accelerate and TRL, with nothing but the import changed. They ask peft what a PeftModel is; ours pass."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import load_file

from tests.llm.models import VOCABULARY, batch, model, run
from tests.llm.test_quickstarts import SAME, seeded

peft = pytest.importorskip("peft")


@pytest.fixture(params=["peft", "diffpeft"])
def lib(request):
    return importlib.import_module(request.param)


class Texts(torch.utils.data.Dataset):
    """Rows of token numbers that can be learnt."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.arange(3 + i, 11 + i) % VOCABULARY
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def arguments(folder, **more):
    from transformers import TrainingArguments

    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return TrainingArguments(**{**options, **more})


def trained(lib, folder, **more):
    from transformers import Trainer

    wrapped = seeded(lib.get_peft_model(model(), lib.LoraConfig(task_type=lib.TaskType.CAUSAL_LM, r=4)))
    trainer = Trainer(model=wrapped, args=arguments(folder, **more), train_dataset=Texts())
    loss = trainer.train().training_loss
    return wrapped, trainer, loss


def test_trainer_trains_saves_and_resumes(lib, tmp_path):
    wrapped, trainer, _ = trained(lib, tmp_path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row] or [
        trainer.state.log_history[-1]["train_loss"]
    ]
    assert losses[-1] < 6
    last = tmp_path / "checkpoint-12"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in last.iterdir()}
    assert not (last / "model.safetensors").exists()
    again = lib.PeftModel.from_pretrained(model(), last)
    torch.testing.assert_close(run(again), run(wrapped.eval()), **SAME)
    from transformers import Trainer

    fresh = lib.get_peft_model(model(), lib.LoraConfig(task_type=lib.TaskType.CAUSAL_LM, r=4))
    resumed = Trainer(model=fresh, args=arguments(tmp_path, num_train_epochs=3), train_dataset=Texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(
        run(fresh.eval()), run(wrapped), rtol=1e-4, atol=1e-4
    )  # eight steps, saved and read in between


def test_trainer_gives_the_same_loss_as_with_peft(tmp_path):
    losses = [
        trained(importlib.import_module(name), tmp_path / name, num_train_epochs=1)[2] for name in ("peft", "diffpeft")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gradient_checkpointing(lib, tmp_path):
    wrapped, _, _ = trained(
        lib,
        tmp_path,
        gradient_checkpointing=True,
        num_train_epochs=1,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    plain, _, _ = trained(lib, tmp_path / "plain", num_train_epochs=1)
    torch.testing.assert_close(run(wrapped.eval()), run(plain.eval()), **SAME)


def test_an_accelerate_loop(lib, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped = lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=4))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    data, losses = batch(rows=4), []
    for _ in range(10):
        loss = wrapped(**data, labels=data["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    accelerator.unwrap_model(wrapped).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(wrapped)
    )
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8
    accelerator.save_state(tmp_path / "state")
    accelerator.free_memory()


def test_trl(lib, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{k: v.tolist() for k, v in Texts()[i].items()} for i in range(16)])
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=model(),
        args=args,
        train_dataset=rows,
        peft_config=lib.LoraConfig(task_type="CAUSAL_LM", r=4),
        processing_class=_tokenizer(),
    )
    trainer.train()
    trainer.save_model(tmp_path / "out")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    again = lib.PeftModel.from_pretrained(model(), tmp_path / "out")
    torch.testing.assert_close(run(again), run(trainer.model.eval()), **SAME)


def test_trl_with_a_model_that_is_wrapped_already(lib, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{k: v.tolist() for k, v in Texts()[i].items()} for i in range(8)])
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
    )
    wrapped = lib.get_peft_model(model(), lib.LoraConfig(task_type="CAUSAL_LM", r=4))
    before = run(wrapped.eval())
    trainer = trl.SFTTrainer(model=wrapped, args=args, train_dataset=rows, processing_class=_tokenizer())
    trainer.train()
    assert not torch.equal(run(wrapped.eval()), before)


def _tokenizer():
    """Words that are numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(n): n for n in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), unk_token="0", pad_token="0", eos_token="2"
    )
