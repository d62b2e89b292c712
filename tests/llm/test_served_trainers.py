"""Trainer, TRL's trainers and accelerate with `peft` served from here and none installed: what they print and write is what it is with peft."""

from __future__ import annotations

import json

import pytest

from tests.llm.served import MODES, process, served

pytest.importorskip("peft")
pytest.importorskip("trl", reason="trl is not installed")

PROGRAM = """
import json, os, sys, tempfile, warnings
import datasets, torch, transformers, trl
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from tests.llm.chat import tokenizer, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.utils.logging.disable_progress_bar()
root = tempfile.mkdtemp()
write_model(f"{root}/base")
COMMON = dict(report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-2, seed=3, logging_steps=1)
told = []

def base():
    return AutoModelForCausalLM.from_pretrained(f"{root}/base")

def config(**fields):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields})

def same_start(net):
    '''The numbers of A by a formula: peft and others draw them in another order.'''
    with torch.no_grad():
        for name, p in sorted((n, p) for n, p in net.named_parameters() if "lora_A" in n):
            p.copy_(0.1 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view(p.shape))
    return net

def losses(trainer):
    return [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row]

def written(folder):
    return sorted(n for n in os.listdir(folder) if n.startswith("adapter") or n.endswith(".safetensors"))

tok = tokenizer()
texts = [f"{a} after {b}" for a, b in zip("abcdefghijkl", "bcdefghijklm")]
rows = [{k: torch.tensor(v) for k, v in tok(t, padding="max_length", max_length=12).items() if k != "token_type_ids"} for t in texts]
rows = [{**row, "labels": row["input_ids"]} for row in rows]

# transformers' Trainer: checkpoints, the way back, and the best of them
net = same_start(get_peft_model(base(), config()))
arguments = dict(per_device_train_batch_size=4, num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True)
trainer = Trainer(net, TrainingArguments(f"{root}/trainer", **COMMON, **arguments), train_dataset=rows, eval_dataset=rows[:4])
trainer.train()
told.append(["trainer", losses(trainer), written(f"{root}/trainer/checkpoint-9")])
trainer.save_model(f"{root}/saved")
told.append(["saved", written(f"{root}/saved"), round(trainer.evaluate()["eval_loss"], 4)])
net = same_start(get_peft_model(base(), config()))
again = Trainer(net, TrainingArguments(f"{root}/trainer", **COMMON, **arguments), train_dataset=rows, eval_dataset=rows[:4])
again.train(resume_from_checkpoint=f"{root}/trainer/checkpoint-6")
told.append(["resumed", losses(again)[-3:]])
# the same with an adapter of the model's own
net = base()
net.add_adapter(config())
trainer = Trainer(same_start(net), TrainingArguments(f"{root}/own", **COMMON, per_device_train_batch_size=4, num_train_epochs=1), train_dataset=rows)
trainer.train()
trainer.save_model(f"{root}/own/saved")
told.append(["own adapter", losses(trainer), written(f"{root}/own/saved")])
# accelerate
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel

accelerator = Accelerator(cpu=True)
net = same_start(get_peft_model(base(), config()))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
net, optimizer = accelerator.prepare(net, optimizer)
batch = {k: torch.stack([row[k] for row in rows[:4]]) for k in rows[0]}
for _ in range(3):
    loss = net(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
accelerator.save_state(f"{root}/state")
loss = net(**batch).loss.item()
same_start(net)
accelerator.load_state(f"{root}/state")
told.append(["accelerate", round(loss, 4), round(net(**batch).loss.item(), 4), isinstance(extract_model_from_parallel(net), PeftModel)])
# TRL
texts = datasets.Dataset.from_list([{"text": t} for t in texts])
pairs = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "b", "chosen": " c", "rejected": " a"}] * 2)
prompts = datasets.Dataset.from_list([{"prompt": "a after"}, {"prompt": "b after"}] * 2)

def trained(kind, settings, data, net=None, **more):
    wrapped = {"peft_config": config()} if net is None else {}
    trainer = kind(model=net or base(), args=settings, train_dataset=data, processing_class=tok, **wrapped, **more)
    same_start(trainer.model)
    assert isinstance(trainer.model, PeftModel) and any(isinstance(m, BaseTunerLayer) for m in trainer.model.modules())
    trainer.train()
    trainer.save_model(f"{settings.output_dir}/saved")
    return trainer, written(f"{settings.output_dir}/saved")

trainer, files = trained(trl.SFTTrainer, trl.SFTConfig(f"{root}/sft", **COMMON, max_steps=3, per_device_train_batch_size=4), texts)
told.append(["sft", losses(trainer), files])
net = PeftModel.from_pretrained(base(), f"{root}/sft/saved", is_trainable=True)
trainer, files = trained(trl.SFTTrainer, trl.SFTConfig(f"{root}/more", **COMMON, max_steps=2, per_device_train_batch_size=4), texts, net)
told.append(["sft again", losses(trainer), files])
trainer, files = trained(trl.DPOTrainer, trl.DPOConfig(f"{root}/dpo", **COMMON, max_steps=3, per_device_train_batch_size=2), pairs)
told.append(["dpo", losses(trainer), files])
settings = trl.RewardConfig(f"{root}/reward", **COMMON, max_steps=2, per_device_train_batch_size=2)
head = transformers.AutoModelForSequenceClassification.from_pretrained(f"{root}/base", num_labels=1)
trainer = trl.RewardTrainer(head, args=settings, train_dataset=pairs, processing_class=tok, peft_config=config(task_type="SEQ_CLS", modules_to_save=["score"]))
trainer.train()
told.append(["reward", len(losses(trainer)), all(l == l for l in losses(trainer))])
settings = trl.GRPOConfig(f"{root}/grpo", **COMMON, max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=4, beta=0.1)
trainer, files = trained(trl.GRPOTrainer, settings, prompts, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions])
told.append(["grpo", len(losses(trainer)), files])
try:
    on_the_head = dict(peft_config=config(target_modules=["lm_head"]), processing_class=tok, train_dataset=texts)
    trl.SFTTrainer(model=base(), args=trl.SFTConfig(f"{root}/no", **COMMON), **on_the_head)
except ValueError as error:
    told.append(["head", "lm_head" in str(error)])
print(json.dumps(told))
"""


@pytest.mark.slow  # whole runs, in processes of their own
def test_trainers_print_and_write_what_they_do_with_peft():
    expected, found = (json.loads(run.splitlines()[-1]) for run in (process(PROGRAM), served(PROGRAM, MODES[1])))
    assert [name for name, *_ in found] == [name for name, *_ in expected] and len(found) > 9
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == _rounded(theirs, ours), (ours, theirs)


def _rounded(theirs: object, ours: object) -> object:
    """What peft told, but for numbers that differ in the last digit."""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [_rounded(a, b) for a, b in zip(theirs, ours, strict=True)]
    return (
        ours
        if isinstance(theirs, float) and isinstance(ours, float) and abs(theirs - ours) < 5e-4 * abs(theirs) + 2e-4
        else theirs
    )
