"""QLoRA on several devices: a 4-bit base in shards, an adapter that is trained.

accelerate launch --config_file examples/fsdp_qlora.yaml examples/fsdp_qlora.py MODEL corpus.txt -o OUT [--bits 4] [--rank 16] [--steps 200]

The same script runs under DDP or DeepSpeed with another config file of accelerate, and alone without `accelerate launch`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from diffpeft import LoraConfig, TaskType, get_peft_model
from diffpeft.llm.kbit import prepare_model_for_kbit_training

# 4-bit numbers are kept in bf16 tensors, so that FSDP can shard them with the rest
BITS = {
    4: lambda dtype: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    ),
    8: lambda dtype: BitsAndBytesConfig(load_in_8bit=True),
    16: lambda dtype: None,
}


def main(argv: list[str] | None = None) -> list[float]:
    """Train on a text in blocks, save the adapter, return the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="blocks a device and step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a block")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--dtype", default="bfloat16", help="of activations")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)

    accelerator, dtype = Accelerator(cpu=args.cpu), getattr(torch, args.dtype)
    torch.manual_seed(0)  # every process starts from the same adapter
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=BITS[args.bits](dtype), dtype=dtype)
    if args.bits < 16:  # under FSDP all parameters of a unit have one dtype, so nothing is cast up there
        sharded = accelerator.distributed_type == DistributedType.FSDP
        model = model.requires_grad_(False) if sharded else prepare_model_for_kbit_training(model, False)
    model = get_peft_model(model, LoraConfig(r=args.rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt").input_ids[0]
    blocks = list(tokens[: len(tokens) // args.length * args.length].view(-1, args.length))
    data = DataLoader(blocks, args.batch, shuffle=True, drop_last=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    losses: list[float] = []
    model.train()
    while len(losses) < args.steps:
        for block in data:
            loss = model(input_ids=block, labels=block).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.print(f"step {len(losses)}/{args.steps}  loss {losses[-1]:.4f}", flush=True)
            if len(losses) == args.steps:
                break
    state = accelerator.get_state_dict(model)  # gathered from the shards
    accelerator.unwrap_model(model).save_pretrained(
        args.out, state_dict=state, is_main_process=accelerator.is_main_process
    )
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
