"""Language models against peft: wrapping a Llama of a billion parameters, loading many adapters, mixed batches, training, and training over NF4.

Both work in one process, turn by turn. Printed are process CPU seconds (medians) and theirs / ours.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import diffpeft

BILLION = dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
)
SMALL = dict(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=4096,
)
LIBRARIES = {"diffpeft": diffpeft, "peft": peft}
FIELDS = dict(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
MANY = 10


def llama(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """With weights that cost little to draw."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.02, 0.02)
        for name, b in model.named_buffers():
            if "inv_freq" in name:
                b.copy_(1.0 / (10000 ** (torch.arange(0, b.numel() * 2, 2) / (b.numel() * 2))))
    return model.eval()


def timed(job: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    job()
    return time.process_time() - start


def wrapping(times: int) -> dict[str, list[float]]:
    """get_peft_model, and the tenth load_adapter."""
    base = llama(BILLION, torch.bfloat16)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times + 1):
            for name, lib in LIBRARIES.items():
                made: list[Any] = []
                config = lib.LoraConfig(**FIELDS)
                found.setdefault(f"{name} get_peft_model", []).append(
                    timed(lambda m=made, li=lib, c=config: m.append(li.get_peft_model(base, c)))
                )
                wrapped = made[0]
                if not Path(folder, name).exists():
                    wrapped.save_pretrained(Path(folder, name))
                for n in range(1, MANY):
                    spent = timed(lambda w=wrapped, at=Path(folder, name), k=n: w.load_adapter(at, f"a{k}"))
                found.setdefault(f"{name} load the tenth", []).append(spent)
                wrapped.unload()
                del wrapped, made
    return {job: spent[1:] for job, spent in found.items()}


def mixed(times: int) -> dict[str, list[float]]:
    """A batch of six rows for three adapters, and the base's forward."""
    found: dict[str, list[float]] = {}
    ids = torch.randint(0, 4096, (6, 64))
    names = ["a", "b", "c", "a", "b", "__base__"]
    models = {}
    for name, lib in LIBRARIES.items():
        wrapped = lib.get_peft_model(llama(SMALL, torch.float32), lib.LoraConfig(**FIELDS), adapter_name="a").eval()
        for other in ("b", "c"):
            wrapped.add_adapter(other, lib.LoraConfig(**FIELDS))
        models[name] = wrapped
    base = llama(SMALL, torch.float32)
    with torch.no_grad():
        for _ in range(times + 1):
            found.setdefault("base mixed batch", []).append(timed(lambda: base(ids)))
            for name, wrapped in models.items():
                found.setdefault(f"{name} mixed batch", []).append(
                    timed(lambda w=wrapped: w(input_ids=ids, adapter_names=names))
                )
    return {job: spent[1:] for job, spent in found.items()}


def step(wrapped: Any, ids: torch.Tensor) -> None:
    """Forward and backward."""
    wrapped(input_ids=ids, labels=ids).loss.backward()


def training(times: int, nf4: bool) -> dict[str, list[float]]:
    """A training step, the optimizer's part left out."""
    found: dict[str, list[float]] = {}
    ids = torch.randint(0, 4096, (2, 128))
    models = {}
    for name, lib in LIBRARIES.items():
        base = llama(SMALL, torch.float32)
        if nf4:
            base = quantised(base)
        models[name] = lib.get_peft_model(base, lib.LoraConfig(**FIELDS)).train()
    what = "NF4 training step" if nf4 else "training step"
    for _ in range(times + 1):
        for name, wrapped in models.items():
            found.setdefault(f"{name} {what}", []).append(timed(lambda w=wrapped: step(w, ids)))
    return {job: spent[1:] for job, spent in found.items()}


def quantised(model: Any) -> Any:
    """The linear layers of the blocks in NF4."""
    import bitsandbytes as bnb

    for module in list(model.model.layers.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is torch.nn.Linear:
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                module._modules[name] = new.to("cpu")
    return model


def main(quick: bool) -> None:
    """All of it."""
    times = 1 if quick else 3
    found = {**wrapping(times), **mixed(3 * times), **training(3 * times, False), **training(3 * times, True)}
    median = {job: statistics.median(spent) for job, spent in found.items()}
    for job in dict.fromkeys(job.partition(" ")[2] for job in median):
        ours, theirs, base = (median.get(f"{who} {job}") for who in ("diffpeft", "peft", "base"))
        beside = f"   base {base:8.4f} s: {ours / base:5.2f} x and {theirs / base:5.2f} x" if base else ""
        print(f"  {job:20} diffpeft {ours:8.4f} s   peft {theirs:8.4f} s   ours / theirs {ours / theirs:5.2f}{beside}")
